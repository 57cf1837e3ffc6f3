"""`sista report`: a sweep as one page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sista_pl.commands.options import natural
from sista_pl.errors import SistaError

_HELP = """\
Puts what a sweep found on one HTML page that needs no network: the table with intervals and corrected p-values, average
ranks, few-label curves, differences finding by finding, training curves, the same words over the patches under each
method, worst cases. `sista sweep` writes it at its end; a sweep that is half done is reported as far as it is, and the
page names what is missing.

  sista report sweeps/smoke
  sista report sweeps/mine --out mine.html --draws 500

The figures are those of `sista compare`, which are taken from compare.json where that is of the same predictions.
"""
_EPILOG = """\
The page holds images and reports of the validation and test sets: share it only as the data themselves may be shared.
--no-words leaves out the only part that reads images and checkpoints; the word maps need the prepared store of the
pre-training, found from the folder in which the sweep was run.
"""


def main(argv: list[str]) -> int:
    """Run `sista report` and return the exit code.

    Raises:
        SistaError: a folder that is no sweep's, predictions that can't be compared, a file that can't be written.
    """
    options = _parser().parse_args(argv)
    out: Path = options.out or options.sweep / "report.html"
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise SistaError(f"report: --out is {out}; give a file, as report.html")

    # after the parser: they bring torch
    from sista_pl import report
    from sista_pl.report.page import page

    swept = report.Swept.open(options.sweep)
    with _bar() as begin:
        found = report.gather(swept, options.draws, options.seed, not options.no_words, begin)
    report.write(out, page(found))
    for note in found.notes:
        print(f"note: {note}")
    print(f"report: {out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "sista report", description=_HELP, epilog=_EPILOG, formatter_class=raw, allow_abbrev=False
    )
    parser.add_argument("sweep", type=Path, metavar="SWEEP_DIR", help="folder of a sweep, as sweeps/smoke")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="(default: report.html in the folder)")
    parser.add_argument("--draws", type=int, default=2000, metavar="N", help="resamples (default: %(default)s)")
    parser.add_argument("--seed", type=natural, default=0, help="of the resampling (default: %(default)s)")
    parser.add_argument("--no-words", action="store_true", help="leave the word maps out, which encode images")
    return parser


@contextmanager
def _bar() -> Iterator[Callable[[int], Callable[[], Any]]]:
    """A bar over the draws, on a terminal."""
    if not sys.stderr.isatty():
        yield lambda total: lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("resampling patients"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:

        def begin(total: int) -> Callable[[], Any]:
            task = bar.add_task("", total=total)
            return lambda: bar.advance(task)

        yield begin
