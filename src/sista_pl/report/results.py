"""The sections of the page on what was found: the table, each setting, few-label curves, finding by finding."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from sista_pl.compare import LOWER
from sista_pl.report import Contents, Findings, parts, plots
from sista_pl.report.parts import Entry, apart, interval, named, number, probability
from sista_pl.report.plots import Look, percent

Row = dict[str, Any]
NOTHING = "no two methods are tested yet"


def results(found: Contents, look: dict[str, Look]) -> str:
    """What was found in a few sentences, and the means of all settings with the average ranks."""
    comparison = found.comparison
    if comparison is None:
        return parts.missing([NOTHING])
    ranks = {row["method"]: row for row in comparison.ranks}
    groups = _groups(comparison.rows)
    heads = [("method", "name")]
    heads += [(f"{task} {percent(share)}".strip(), "num") for task, share in groups]
    heads += [("average rank [95 %]", "num")]
    lines = []
    for method in sorted(look, key=lambda name: ranks[name]["rank"] if name in ranks else np.inf):
        line: list[Entry] = [(named(method, look), None, "name")]
        line += [_mean(method, rows, comparison.reference) for rows in groups.values()]
        rank = ranks.get(method, {})
        line.append((interval(rank.get("rank"), rank.get("low"), rank.get("high"), ".2f"), rank.get("rank"), "num"))
        lines.append(line)
    metrics = {task: rows[0]["metric"] for (task, _), rows in groups.items()}
    told = (
        "Mean over the seeds, the best of a column bold; below it the difference from "
        f"{escape(comparison.reference)}, with ▲ or ▼ where p (Holm) is below 0.05. "
        f"{escape('; '.join(f'{task}: {metric}' for task, metric in metrics.items()))}."
    )
    return _lead(found) + parts.table(heads, lines) + parts.soft(told)


def _mean(method: str, rows: Sequence[Row], reference: str) -> Entry:
    """A method's mean in a setting, with the difference below it."""
    row = next((row for row in rows if row["method"] == method), None)
    if row is None:
        return '<span class="soft">not done</span>', None, "num"
    text = number(row["value"])
    if row["rank"] == min(other["rank"] for other in rows):
        text = f"<b>{text}</b>"
    sign = ("▲ " if row["difference"] > 0 else "▼ ") if row["p_holm"] < 0.05 else ""
    below = "reference" if method == reference else sign + number(row["difference"], "+.3f")
    return f'{text}<br><small class="soft">{below}</small>', row["value"], "num"


def _lead(found: Contents) -> str:
    """The sentences that a reader would look for first, as the figures say them."""
    comparison = found.comparison
    assert comparison is not None
    told = []
    if comparison.ranks:
        first = min(comparison.ranks, key=lambda row: row["rank"])
        rank = interval(first["rank"], first["low"], first["high"], ".2f")
        over = parts.several(first["settings"], "setting", "settings")
        told.append(f"First in average rank is <b>{escape(first['method'])}</b>, {rank} over {over}.")
    sure = sorted((row for row in comparison.rows if row["p_holm"] < 0.05), key=lambda row: -abs(row["difference"]))
    words = [
        f"<b>{escape(row['method'])}</b> on {escape(row['task'])} {percent(row['fraction'])} ({apart(row)})"
        for row in sure
    ]
    of = f"Of {parts.several(comparison.comparisons, 'comparison', 'comparisons')} with {escape(comparison.reference)}"
    if words:
        more = f"; and {len(words) - 4} more" if len(words) > 5 else ""
        shown = "; ".join(words[:4] if more else words)
        told.append(f"{of}, {len(words)} {'has' if len(words) == 1 else 'have'} p (Holm) below 0.05: {shown}{more}.")
    else:
        told.append(f"{of}, none has p (Holm) below 0.05.")
    if all(row["seeds"] < 2 for row in comparison.rows):
        told.append("There is one seed: nothing here says whether another training would find the same.")
    return f'<p class="lead">{" ".join(told)}</p>'


def settings(found: Contents, look: dict[str, Look]) -> str:
    """A table a task and share of labels."""
    if found.comparison is None:
        return parts.missing([NOTHING])
    reference, html = found.comparison.reference, ""
    heads = [
        ("method", "name"), ("mean [95 %]", "num"), ("SD over seeds", "num"), ("seeds", "num"),
        (f"difference from {reference} [95 %]", "num"), ("", "picture"), ("p", "num"), ("p (Holm)", "num"),
        ("d", "num"), ("rank", "num"),
    ]  # fmt: skip
    for (task, share), rows in _groups(found.comparison.rows).items():
        ends = [abs(row[key]) for row in rows for key in ("difference_low", "difference_high")]
        reach = float(np.nanmax([1e-3, *ends]))
        lines = [_line(row, look, reference, reach) for row in rows]
        metric, absent = rows[0]["metric"], [name for name in look if all(row["method"] != name for row in rows)]
        told = f"{metric}{', less is better' if metric in LOWER else ''}; {rows[0]['images']:,} images of " + (
            f"{rows[0]['patients']:,} patients"
        )
        html += f'<h3>{escape(parts.setting(task, share))} <span class="soft">{escape(told)}</span></h3>'
        html += parts.table(heads, lines)
        html += parts.missing([escape(f"not done: {', '.join(absent)}")] if absent else [])
    there = {(row["task"], row["fraction"]) for row in found.comparison.rows}
    return html + parts.missing([
        escape(f"{parts.setting(*each)}: nothing is tested yet") for each in found.swept.settings if each not in there
    ])  # fmt: skip


def _line(row: Row, look: dict[str, Look], reference: str, reach: float) -> list[Entry]:
    method, able = row["method"], parts.known(row["difference"])
    difference = '<span class="soft">reference</span>' if method == reference else apart(row)
    return [
        (named(method, look), None, "name"), (interval(row["value"], row["low"], row["high"]), row["value"], "num"),
        (number(row["seed_sd"]), row["seed_sd"], "num"), (_seeds(row), row["seeds"], "num"),
        (difference, row["difference"], "num"),
        (parts.glyph(row, reach, look[method]) if able else "", None, "picture"),
        (probability(row["p"]), row["p"], "num"), (probability(row["p_holm"]), row["p_holm"], "num"),
        (number(row["d"], "+.1f"), row["d"], "num"), (f"{row['rank']:g}", row["rank"], "num"),
    ]  # fmt: skip


def _seeds(row: Row) -> str:
    return str(row["seeds"]) if row["subsets"] == 1 else f"{row['seeds']} × {row['subsets']} subsets"


def curves(found: Contents, look: dict[str, Look]) -> str:
    """The metric of each task against the share of its labels."""
    if found.comparison is None:
        return parts.missing([NOTHING])
    figures: list[str] = []
    for task in dict.fromkeys(row["task"] for row in found.comparison.rows):
        rows = [row for row in found.comparison.rows if row["task"] == task]
        metric: str = rows[0]["metric"]
        best: dict[float | None, str] = {}
        for row in sorted(rows, key=lambda row: row["rank"]):
            best.setdefault(row["fraction"], f"{row['method']} {number(row['value'])} at {percent(row['fraction'])}")
        alt = (
            f"{metric} of {task} against the share of labels, a line a method with 95 % intervals. Best: "
            f"{'; '.join(best.values())}. The numbers are in the table of each setting."
        )
        caption = f'{escape(task)} <span class="soft">{escape(metric)}</span>'
        figures.append(parts.panel(caption, plots.curves(rows, look, f"curve{len(figures)}", alt)))
    told = "Means over the seeds with 95 % intervals by patient; the spread over the seeds is in the tables."
    return parts.soft(told) + parts.panels(figures)


def findings(found: Contents, look: dict[str, Look]) -> str:
    """Differences of AUROC in the classification settings, a finding at a time."""
    if not found.findings:
        return parts.missing(["no classification of several findings is tested with the reference and another method"])
    figures: list[str] = []
    notes, tables = [], ""
    for each in found.findings:
        name = parts.setting(each.setting.task, each.setting.fraction)
        notes += [escape(f"{name}: {note}") for note in each.notes]
        if each.rows:
            caption = f'{escape(each.setting.task)} <span class="soft">{percent(each.setting.fraction)}</span>'
            drawn = plots.forest(each.rows, look, each.reference, f"forest{len(figures)}", _told(each, name))
            figures.append(parts.panel(caption, drawn))
            tables += f"<details><summary>the numbers of {escape(name)}</summary>{_numbers(each, look)}</details>"
    told = (
        f"Differences of AUROC from {escape(found.findings[0].reference)}; right of the line a method is better. "
        "Intervals are 95 %, one at a time: of many some leave out 0 by chance. How many images have the finding, and "
        "how many have not, stands beside it."
    )
    return parts.soft(told) + parts.panels(figures) + tables + parts.missing(notes)


def _told(each: Findings, name: str) -> str:
    """A forest in words: what its intervals leave 0 out of."""
    sure = [
        f"{row['finding']}, {row['method']} {number(row['difference'], '+.3f')}"
        for row in each.rows if row["difference_low"] > 0 or row["difference_high"] < 0
    ]  # fmt: skip
    what = "Intervals leave out 0 for " + "; ".join(sure) if sure else "No interval leaves out 0"
    return f"Differences of AUROC from {each.reference} by finding, {name}, with 95 % intervals. {what}."


def _numbers(each: Findings, look: dict[str, Look]) -> str:
    heads = [
        ("finding", "name"), ("method", ""), ("with / without", "num"), ("AUROC [95 %]", "num"),
        (f"difference from {each.reference} [95 %]", "num"), ("p, not corrected", "num"),
    ]  # fmt: skip
    lines = [
        [
            (escape(row["finding"]), None, "name"), (named(row["method"], look), None, ""),
            (f"{row['positives']} / {row['negatives']}", row["positives"], "num"),
            (interval(row["value"], row["low"], row["high"]), row["value"], "num"),
            (apart(row), row["difference"], "num"), (probability(row["p"]), row["p"], "num"),
        ]
        for row in each.rows
    ]  # fmt: skip
    return parts.table(heads, lines)


def _groups(rows: Sequence[Row]) -> dict[tuple[str, float | None], list[Row]]:
    """Rows by task and share of labels, the shares of a task side by side and rising."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    found: dict[tuple[str, float | None], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (tasks.index(row["task"]), row["fraction"] or 1.0)):
        found.setdefault((row["task"], row["fraction"]), []).append(row)
    return found
