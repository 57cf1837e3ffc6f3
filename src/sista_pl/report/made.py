"""The sections of the page on how it was made: the pre-trainings, what was swept, on which data and by what."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from html import escape
from typing import Any

import numpy as np

from sista_pl.compare import HOW
from sista_pl.report import Contents, parts, plots
from sista_pl.report.parts import Entry, duration, interval, named
from sista_pl.report.plots import Look, percent
from sista_pl.report.swept import Swept
from sista_pl.sweep import Cell


def training(found: Contents, look: dict[str, Look]) -> str:
    """Retrieval and loss of each pre-training by epoch, and what the best checkpoint reached."""
    swept = found.swept
    cells = [cell for cell in swept.wanted if cell.task is None]
    shown: list[tuple[Cell, dict[str, Any]]] = []
    absent = []
    for cell in sorted(cells, key=lambda cell: swept.methods.index(cell.method)):
        told = swept.facts(cell, test=False) if cell in swept.done else {}
        if told.get("history"):
            shown.append((cell, told))
        else:
            absent.append(f"{cell.name} (its run has no history)" if cell in swept.done else cell.name)
    missing = [escape(f"not done: {', '.join(absent)}")] if absent else [] if cells else ["nothing is pre-trained"]
    if not shown:
        return parts.missing(missing)
    return _reached(swept, shown, look) + _retrieval(shown, look) + _losses(shown, look) + parts.missing(missing)


def _reached(swept: Swept, shown: list[tuple[Cell, dict[str, Any]]], look: dict[str, Look]) -> str:
    """A line a pre-training: what its best checkpoint reached."""
    heads = [
        ("method", "name"), ("seed", "num"), ("epochs", "num"), ("best epoch", "num"),
        ("validation R_mean [95 %]", "num"), ("test R_mean [95 %]", "num"), ("time", "num"),
    ]  # fmt: skip
    lines, pools = [], set()
    for cell, told in shown:
        best, test, seconds = told.get("best") or {}, swept.facts(cell), swept.mark(cell).get("seconds")
        pools.add((test.get("test") or {}).get("test/pool"))
        epoch = best["epoch"] + 1 if "epoch" in best else None
        line: list[Entry] = [
            (named(cell.method, look), None, "name"), (str(cell.seed), cell.seed, "num"),
            (str(len(told["history"])), len(told["history"]), "num"), (str(epoch or ""), epoch, "num"),
        ]  # fmt: skip
        for figures, name in ((best.get("intervals"), "val/R_mean"), (test.get("intervals"), "test/R_mean")):
            figure = (figures or {}).get(name) or {}
            low, high = figure.get("interval95") or (None, None)
            line.append((interval(figure.get("value"), low, high), figure.get("value"), "num"))
        lines.append([*line, (duration(seconds), seconds, "num")])
    pool = pools.pop() if len(pools) == 1 else None
    told_pool = f", in pools of {pool:.0f}" if pool else ""
    return parts.table(heads, lines) + parts.soft(
        "R_mean: how often an image's report, and a report's image, is among the first 1, 5 and 10, mean of the six"
        f"{told_pool}; the interval is by patient."
    )


def _retrieval(shown: list[tuple[Cell, dict[str, Any]]], look: dict[str, Look]) -> str:
    lines = [(cell.method, *_series(told, "val/R_mean"), look[cell.method], None) for cell, told in shown]
    lines = [line for line in lines if len(line[1])]
    if not lines:
        return ""
    last = "; ".join(f"{method} {values[-1]:.3f}" for method, _, values, *_ in lines)
    alt = f"Validation R_mean by epoch, a line a pre-training. At the end: {last}."
    return parts.panels([parts.panel("Validation R_mean", plots.training(lines, "retrieval", alt, True))])


def _losses(shown: list[tuple[Cell, dict[str, Any]]], look: dict[str, Look]) -> str:
    figures: list[str] = []
    for method in dict.fromkeys(cell.method for cell, _ in shown):
        mine, style = [told for cell, told in shown if cell.method == method], Look(look[method].hue)
        stages: list[tuple[str, Any]] = [("val", None), ("train", plots.DASHES[1])]
        lines = [(stage, *_series(told, f"{stage}/loss"), style, dash) for told in mine for stage, dash in stages]
        lines = [line for line in lines if len(line[1])]
        if lines:
            ends = ", ".join(f"{stage} {values[-1]:.2f}" for stage, _, values, *_ in lines)
            alt = f"Loss of {method} by epoch, {parts.several(len(mine), 'seed', 'seeds')}. At the end: {ends}."
            drawn = plots.training(lines, f"loss{len(figures)}", alt, size=(3.0, 2.1))
            figures.append(parts.panel(escape(method), drawn))
    told = (
        "Solid: validation; dashed: training, of the last batch that was logged before it; a line a seed. Losses of "
        "different methods are different sums: compare their shape, not their height."
    )
    return f"<h3>Losses</h3>{parts.soft(told)}{parts.panels(figures, 'small')}" if figures else ""


def _series(told: dict[str, Any], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return epochs from 1 and values of a figure of metrics.json's history."""
    points = [(row["epoch"] + 1, row[key]) for row in told["history"] if isinstance(row.get(key), (int, float))]
    table = np.array(points, float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def methods(found: Contents, look: dict[str, Look]) -> str:
    """What each method and task is, how much of it is done, on which data, and by which versions."""
    swept = found.swept
    columns: list[tuple[str | None, float | None]] = [(None, None), *swept.settings]
    heads = [("method", "name"), ("pre-trained by", "")]
    heads += [("pre-training" if task is None else f"{task} {percent(share)}", "num") for task, share in columns]
    lines = []
    for method in look:
        cells = [cell for cell in swept.wanted if cell.method == method and cell.task is None]
        first = next((cell for cell in cells if cell in swept.done), None)
        made = "nothing: it starts at random" if not cells else _made(swept, first)
        line: list[Entry] = [(named(method, look), None, "name"), (made, None, "soft")]
        for task, share in columns:
            done, wanted = swept.count(method, task, share)
            line.append((f"{done} / {wanted}" if wanted else "–", None, "num"))
        lines.append(line)
    told = (
        "Cells that are done, of those wanted; each is one seed and subset of the labels. Options of a file of the "
        "sweep have their value."
    )
    told += f" Tuning: {escape(swept.tuning)}." if swept.tuning else ""
    return parts.table(heads, lines) + parts.soft(told) + _data(swept) + _versions(swept) + _commands(swept)


def _made(swept: Swept, cell: Cell | None) -> str:
    return "not done" if cell is None else escape(" ".join(swept.made_by(cell))) or "its defaults"


def _data(swept: Swept) -> str:
    """What the cells of each task were computed on."""
    heads = [
        ("", "name"), ("made by", ""), ("data", ""), ("hash", ""), ("split, hash", ""), ("test images", "num"),
        ("cells", "num"),
    ]  # fmt: skip
    lines: list[list[Entry]] = []
    for task in [None, *swept.tasks]:
        cells = [cell for cell in swept.done if cell.task == task]
        made = _made(swept, cells[0]) if task is not None and cells else ""
        for text, count in Counter(_source(swept.facts(cell).get("data") or {}) for cell in cells).items():
            source, digest, split, images = (escape(part) for part in json.loads(text))
            lines.append([
                (escape(task or "pre-training"), None, "name"), (made, None, "soft"), (source, None, ""),
                (digest, None, ""), (split, None, ""), (images, None, "num"), (str(count), None, "num"),
            ])  # fmt: skip
    return f"<h3>Data</h3>{parts.table(heads, lines)}" if lines else ""


def _source(data: dict[str, Any]) -> str:
    """Data, their hash, split with its hash, images of the test, as one text to count by."""
    split, rows = data.get("split") or {}, data.get("rows") or {}
    told = [data.get("source", ""), str(data.get("hash", ""))[:12],
            f"{split.get('name', '')}, {str(split.get('sha256', ''))[:12]}", str(rows.get("test", ""))]  # fmt: skip
    return json.dumps(told)


def _versions(swept: Swept) -> str:
    """Packages, precision and devices of the cells; where they disagree, how many have which."""
    counted: dict[str, Counter[str]] = {}
    for cell in swept.done:
        told = swept.facts(cell)
        for key, value in {**(told.get("versions") or {}), "precision": told.get("precision")}.items():
            if value is not None:
                counted.setdefault(key, Counter())[str(value)] += 1
    shown = []
    for key, values in counted.items():
        counts = [f"{value} in {parts.several(count, 'cell', 'cells')}" for value, count in values.items()]
        shown.append(f"{key} {' and '.join(counts if len(counts) > 1 else values)}")
    return f"<h3>Made with</h3>{parts.soft(escape(', '.join(shown)))}" if shown else ""


def _commands(swept: Swept) -> str:
    """The commands of one cell of each kind."""
    seen, lines = set(), []
    for cell in swept.done:
        if (cell.method, cell.task) not in seen:
            seen.add((cell.method, cell.task))
            lines += [f"sista {shlex.join(command)}" for command in swept.mark(cell).get("commands") or []]
    if not lines:
        return ""
    told = "the commands of one cell of each kind; OUT is the sweep's folder"
    text = escape("\n".join(lines))
    return f'<details><summary>{told}</summary><p class="mono">{text}</p></details>'


def how(found: Contents, look: dict[str, Look]) -> str:
    """How the figures were computed, and what a reader has to know of them."""
    comparison = found.comparison
    if comparison is None:
        return parts.missing(["nothing was compared"])
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in HOW.items())
    of = parts.several(comparison.comparisons, "comparison", "comparisons")
    told = f"{comparison.draws:,} resamples, seed {comparison.seed}; p (Holm) is corrected for {of}."
    return parts.soft(told) + f"<dl>{terms}</dl>" + parts.missing([escape(note) for note in comparison.notes])
