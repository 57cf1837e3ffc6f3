"""`sista compare`: methods against one another on stored predictions."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sista_pl.atomic import writing
from sista_pl.commands.options import natural
from sista_pl.errors import SistaError

if TYPE_CHECKING:
    from sista_pl.compare import Comparison

_HELP = """\
Sets methods against a reference on the predictions that `sista test` left: paired differences with intervals, p-values
corrected for the number of comparisons, sizes of the effects, average ranks. Needs no model and no image.

A method is NAME=GLOB; each match is one seed: a run's folder (of its numbered runs the newest with a test is taken), a
folder with predictions.parquet, or a file of predictions, .parquet or .csv:
  sista compare clip='runs/clip-*' sista='runs/sista-*'
  sista compare clip='runs/clip-*' sista='runs/sista-*' peer=peer.csv --reference peer --metric auroc/Edema

Predictions of others come as a CSV, one row an image:
  image_id,patient_id,truth_Edema,score_Edema,truth_Mass,score_Mass
  s1/v1.jpg,p1,1,0.83,0,0.10
with the same images and the same truth (1, 0, or empty for unknown) as the rest, and scores in 0 to 1. Without
patient_id the patients are those of the other files; where none has it, each image counts as a patient, and that is
said. Masks: intersection_pixels, predicted_pixels, truth_pixels. Boxes: truth_boxes and predicted_boxes in JSON.

Many settings, of task and label fraction, come as a table; `sista sweep` makes one. Paths are relative to it, fraction
and seed may be empty, a column metric chooses by setting, a column subset tells draws of labels with one seed apart:
  method,task,fraction,seed,predictions
  clip,cls_rsna,0.1,0,runs/clip-0/0001/test/predictions.parquet
  sista compare --table cells.csv
"""
_EPILOG = """\
A small p says that other patients would show the difference, not that another training would: read SD and d for that.
Writes compare.md, compare.tex (a plain tabular), compare.csv and compare.json.
"""


def main(argv: list[str]) -> int:
    """Run `sista compare` and return the exit code.

    Raises:
        SistaError: predictions that are not there or can't be compared, a mistake in the command.
    """
    options = _parser().parse_intermixed_args(argv)  # a method may follow an option
    methods = _methods(options.methods)
    if bool(methods) == bool(options.table):
        raise SistaError("compare: give methods as NAME=GLOB, or --table FILE.csv, one of the two; see --help")

    # after the parser: it brings torch
    from sista_pl import compare as statistics
    from sista_pl import stored

    runs, passed = (stored.read_runs(options.table), []) if options.table else stored.find_runs(methods)
    reference = statistics.check_reference(list(dict.fromkeys(run.method for run in runs)), options.reference)
    phantom = stored.of_phantom(runs)
    settings = stored.load(runs, options.metric)
    with _bar(statistics.work(settings, options.draws)) as advance:
        found = statistics.compare(settings, reference, options.draws, options.seed, advance)
    found.notes[:0] = passed
    files = {
        "compare.md": markdown(found, phantom), "compare.tex": latex(found, phantom),
        "compare.csv": _csv(found, phantom),
        "compare.json": json.dumps(_plain(found, phantom, runs), indent=2, allow_nan=False) + "\n",
    }  # fmt: skip
    _write(options.out, files)
    _show(found, phantom)
    print(f"compare: {options.out / 'compare.md'}, .tex, .csv, .json")
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "sista compare", description=_HELP, epilog=_EPILOG, formatter_class=raw, allow_abbrev=False
    )
    parser.add_argument("methods", nargs="*", metavar="NAME=GLOB", help="a method and its runs or files, one a seed")
    parser.add_argument("--table", type=Path, metavar="FILE.csv", help="settings of a sweep instead")
    parser.add_argument(
        "--metric",
        metavar="NAME",
        help="figure of the test (default: auroc_macro, for masks dice_positive, for boxes map_40_75)",
    )
    parser.add_argument("--reference", metavar="NAME", help="the method to differ from (default: the first)")
    parser.add_argument("--draws", type=int, default=2000, metavar="N", help="resamples (default: %(default)s)")
    parser.add_argument("--seed", type=natural, default=0, help="of the resampling (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("compare"), metavar="DIR", help="(default: %(default)s)")
    return parser


def _methods(words: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        name, equals, pattern = word.partition("=")
        if not (name and equals and pattern):
            raise SistaError(f"compare: {word!r} is no NAME=GLOB; write for example clip='runs/clip-*', in quotes")
        if name in found:
            raise SistaError(f"compare: {name} is there twice; give it one glob, as {name}='runs/{name}-[0-9]'")
        found[name] = pattern
    return found


@contextmanager
def _bar(total: int) -> Iterator[Callable[[], Any]]:
    """A bar over the draws, on a terminal."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("resampling patients"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


# --- what is shown and written -----------------------------------------------------


def grid(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the heads and the rows of the table, as text; a column that says the same of all is left out."""
    heads = ["task", "fraction", "metric", "method", "seeds", "subsets", "mean [95 %]", "SD",
             f"difference from {found.reference} [95 %]", "p", "p (Holm)", "z", "d", "rank"]  # fmt: skip
    lines = []
    for row in found.rows:
        lines.append([
            row["task"], _text(row["fraction"], "g"), row["metric"], row["method"], str(row["seeds"]),
            str(row["subsets"]), _interval(row, "", ".3f"), _text(row["seed_sd"], ".3f"),
            _interval(row, "difference", "+.3f"), _probability(row["p"]), _probability(row["p_holm"]),
            _text(row["z"], "+.1f"), _text(row["d"], "+.1f"), _text(row["rank"], "g"),
        ])  # fmt: skip
    spare = {i for i, head in enumerate(heads) if head in ("task", "fraction", "metric", "p (Holm)")
             and len({line[i] for line in lines}) == 1}  # fmt: skip
    if all(row["subsets"] == 1 for row in found.rows):
        spare.add(heads.index("subsets"))
    if found.comparisons == 1:
        spare.add(heads.index("p (Holm)"))
    kept = [i for i in range(len(heads)) if i not in spare]
    return [heads[i] for i in kept], [[line[i] for i in kept] for line in lines]


def _about(found: Comparison) -> str:
    """What the table is of, in one line."""
    parts = []
    for column, word in (("task", ""), ("fraction", "fraction "), ("metric", "")):
        values = {row[column] for row in found.rows}
        if len(values) == 1 and (value := values.pop()):
            parts.append(word + str(value))
    sizes = {(row["images"], row["patients"]) for row in found.rows}
    if len(sizes) == 1:
        parts.append("{} images of {} patients".format(*sizes.pop()))
    several = "s" if found.comparisons != 1 else ""
    parts += [f"{found.draws} draws, seed {found.seed}", f"{found.comparisons} comparison{several}"]
    return ", ".join(parts)


def markdown(found: Comparison, phantom: bool) -> str:
    """Return compare.md: the table, the average ranks, notes, and how it was computed."""
    from sista_pl.compare import HOW

    def table(heads: list[str], rows: list[list[str]]) -> list[str]:
        lines = [heads, ["---"] * len(heads), *rows]
        return ["| " + " | ".join(text.replace("|", r"\|") for text in line) + " |" for line in lines] + [""]

    lines = ["# Comparison", "", *(["**PHANTOM DATA: drawn by a program, no patient**", ""] if phantom else [])]
    lines += [_about(found), "", *table(*grid(found))]
    if found.ranks:
        lines += [f"Average rank, settings: {found.ranks[0]['settings']}", ""]
        lines += table(["method", "rank [95 %]"], _ranks(found))
    if found.notes:
        lines += ["Notes", "", *(f"- {note}" for note in found.notes), ""]
    lines += ["How", "", *(f"- {name}: {text}" for name, text in HOW.items()), ""]
    return "\n".join(lines)


def latex(found: Comparison, phantom: bool) -> str:
    """Return compare.tex: plain tabulars of the table and of the average ranks."""

    def table(heads: list[str], rows: list[list[str]]) -> list[str]:
        lines = [" & ".join(map(_tex, line)) + r" \\" for line in (heads, *rows)]
        return [rf"\begin{{tabular}}{{{'l' * len(heads)}}}", r"\hline", lines[0], r"\hline", *lines[1:], r"\hline",
                r"\end{tabular}"]  # fmt: skip

    lines = [f"% {_about(found)}", *(f"% {note}" for note in found.notes)]
    lines += [r"\textbf{PHANTOM DATA: drawn by a program, no patient}", ""] if phantom else []
    lines += table(*grid(found))
    if found.ranks:
        lines += ["", *table(["method", "rank [95 %]"], _ranks(found))]
    return "\n".join(lines) + "\n"


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$",
               "|": r"\textbar{}"}  # fmt: skip
    told = "".join(special.get(c, "\\" + c if c in "&%$#_{}" else c) for c in text)
    return re.sub(r"(?<![\w\]])-(?=\d)", "$-$", told)  # a minus, no hyphen


def _ranks(found: Comparison) -> list[list[str]]:
    rows = sorted(found.ranks, key=lambda row: row["rank"])
    return [[row["method"], _interval({"value": row["rank"], **row}, "", ".2f")] for row in rows]


def _interval(row: dict[str, Any], name: str, form: str) -> str:
    value, low, high = (row[key] for key in ((name, f"{name}_low", f"{name}_high") if name else
                                             ("value", "low", "high")))  # fmt: skip
    ends = f" [{low:{form}}, {high:{form}}]" if low == low else ""
    return _text(value, form) + ends


def _text(value: float | None, form: str) -> str:
    return "" if value is None or value != value else f"{value:{form}}"


def _probability(value: float) -> str:
    return "<0.001" if value < 0.001 else _text(value, ".3f")


def _csv(found: Comparison, phantom: bool) -> str:
    import pandas as pd

    return pd.DataFrame(found.rows).assign(reference=found.reference, phantom=phantom).to_csv(index=False)


def _plain(found: Comparison, phantom: bool, runs: list) -> dict[str, Any]:
    """Return compare.json: everything, with null where there is no figure."""
    from sista_pl.compare import HOW

    def records(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: None if value != value else value for key, value in row.items()} for row in rows]

    return {
        "schema": 2, "phantom": phantom, "reference": found.reference, "draws": found.draws, "seed": found.seed,
        "comparisons": found.comparisons, "rows": records(found.rows), "ranks": records(found.ranks),
        "files": [{"method": run.method, "task": run.task, "fraction": run.fraction, "seed": run.seed,
                   "subset": run.subset, "predictions": str(run.file)} for run in runs],
        "notes": found.notes, "how": HOW,
    }  # fmt: skip


def _write(out: Path, files: dict[str, str]) -> None:
    """Write all under another name, then put them in the place of the last ones."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as all_of_them:
            for name, text in files.items():
                all_of_them.enter_context(writing(out / name)).write_text(text, encoding="utf-8")
    except OSError as why:
        raise SistaError(f"{out}: cannot be written ({why.strerror}); give --out another folder") from None


def _show(found: Comparison, phantom: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    console = Console() if sys.stdout.isatty() else Console(width=140)
    if phantom:
        console.print("PHANTOM DATA: drawn by a program, no patient", style="bold yellow")
    heads, lines = grid(found)
    table = Table(*map(escape, heads), title=Text(_about(found)), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    settings = [(row["task"], row["fraction"]) for row in found.rows]
    for line, setting, after in zip(lines, settings, [*settings[1:], None], strict=True):
        table.add_row(*map(Text, line), end_section=setting != after)
    console.print(table)
    for method, rank in _ranks(found):
        console.print(Text(f"average rank of {method}: {rank}"), soft_wrap=True)
    for note in found.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)
