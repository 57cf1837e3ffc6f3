"""What a sweep has done so far, in its folder.

A cell's run lies where `sista fit --name CELL` puts it, and a mark beside the runs says that it is done, so that a
sweep that was stopped goes on where it was.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from sista_pl import runs
from sista_pl.atomic import writing
from sista_pl.errors import SistaError
from sista_pl.sweep import PRETRAIN, Cell, Sweep

COLUMNS = ("method", "task", "fraction", "seed", "subset")  # of a cell
PLACES = ("--run_root", "--model.weights")  # options of a cell's commands that name a place in the sweep's folder


@dataclass(frozen=True)
class Book:
    """What a sweep has done so far, in its folder.

    Args:
        root: the sweep's folder: `runs/`, `logs/`, `begun/`, `done/`, `cells.csv`.
    """

    root: Path

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def log(self, cell: Cell) -> Path:
        return self.root / "logs" / f"{cell.name}.log"

    def mark(self, cell: Cell) -> Path:
        return self.root / "done" / f"{cell.name}.json"

    def lock(self, cell: Cell) -> Path:
        """The file that whoever makes a cell keeps locked."""
        return self.root / "begun" / f"{cell.name}.lock"

    def is_done(self, cell: Cell) -> bool:
        """Return whether a cell is done, by whatever commands: marked, and its run there."""
        return self.mark(cell).is_file() and bool(runs.runs_of(self.runs, cell.name))

    def done(self, sweep: Sweep, cell: Cell) -> bool:
        """Return whether a cell is done, by the commands that the sweep has for it now.

        Raises:
            SistaError: it was made by other commands.
        """
        if not self.is_done(cell):
            return False
        self._same(self.mark(cell), sweep, cell)
        return True

    def begin(self, sweep: Sweep, cell: Cell) -> bool:
        """Mark a cell as begun, and return whether its training goes on where it was stopped.

        Raises:
            SistaError: what was stopped was begun by other commands.
        """
        mark, seconds = self._begun(cell), 0.0
        stopped = runs.has_checkpoint(self.runs, cell.name, "last")
        if stopped and mark.is_file():
            self._same(mark, sweep, cell)
            kept = runs.find_checkpoint(self.runs, cell.name, "last").stat().st_mtime - mark.stat().st_mtime
            seconds = json.loads(mark.read_text()).get("seconds", 0.0) + max(0.0, kept)
        self._write(mark, {"commands": self.recorded(sweep, cell), "seconds": round(seconds, 1)})
        return stopped

    def _begun(self, cell: Cell) -> Path:
        """Return the mark that a cell is begun: its commands, and the seconds of what was kept before that."""
        return self.root / "begun" / f"{cell.name}.json"

    def _same(self, mark: Path, sweep: Sweep, cell: Cell) -> None:
        made, wanted = json.loads(mark.read_text())["commands"], self.recorded(sweep, cell)
        if made != wanted:
            odd = next((pair for pair in zip(chain(*made), chain(*wanted), strict=False) if pair[0] != pair[1]), None)
            told = f" ({odd[0]} there, {odd[1]} now)" if odd else ""
            raise SistaError(
                f"sweep: {cell.name} in {self.root} was made by another command{told}; give another --out, or delete "
                f"{mark} and {self.runs / cell.name} to make it again"
            )

    def recorded(self, sweep: Sweep, cell: Cell) -> list[list[str]]:
        """Return a cell's commands as a mark keeps them: wherever the sweep's folder lies, and however it is called."""
        return [
            [
                f"OUT/{Path(word).relative_to(self.root).as_posix()}" if flag in PLACES else word
                for flag, word in zip(["", *command], command, strict=False)
            ]
            for command in sweep.commands(cell, self.runs)
        ]

    def finish(self, sweep: Sweep, cell: Cell, seconds: float) -> None:
        """Mark a cell as done, `seconds` after it was begun or went on."""
        if self._begun(cell).is_file():
            seconds += json.loads(self._begun(cell).read_text()).get("seconds", 0.0)
        self._write(self.mark(cell), {"commands": self.recorded(sweep, cell), "seconds": round(seconds, 1)})

    def _write(self, mark: Path, told: dict[str, Any]) -> None:
        mark.parent.mkdir(parents=True, exist_ok=True)
        with writing(mark) as partial:
            partial.write_text(json.dumps(told, indent=2) + "\n")

    def table(self, sweep: Sweep) -> pd.DataFrame:
        """Return a row for each cell and figure of its test: `COLUMNS`, metric, value, low, high, predictions, code.

        `predictions` is the file, relative to the sweep's folder, that the figures of a task were computed on; `code`
        is the hash of the code that tested it, "" where the test was made before that was kept.
        """
        rows = []
        for cell in sweep.cells():
            if cell.setting is not None or not self.is_done(cell):
                continue
            test = max(run / "test" for run in runs.runs_of(self.runs, cell.name) if (run / "test").is_dir())
            told = json.loads((test / "metrics.json").read_text())
            predictions = test / "predictions.parquet"
            for metric, figure in told["intervals"].items():
                low, high = figure["interval95"] or (None, None)
                rows.append({
                    "method": cell.method, "task": cell.task or PRETRAIN, "fraction": cell.fraction, "seed": cell.seed,
                    "subset": cell.subset, "metric": metric.removeprefix("test/"),
                    "value": figure["value"], "low": low, "high": high,
                    "predictions": predictions.relative_to(self.root).as_posix() if predictions.is_file() else None,
                    "code": (told.get("versions") or {}).get("code", ""),
                })  # fmt: skip
        columns = [*COLUMNS, "metric", "value", "low", "high", "predictions", "code"]
        return pd.DataFrame(rows, columns=columns)

    def tuned(self, sweep: Sweep) -> pd.DataFrame:
        """Return a row for each setting that was tried: method, setting, options, figure, value, chosen."""
        rows = []
        for method in sweep.methods:
            cells = sweep.tuning(method)
            if cells and all(map(self.is_done, cells)):
                chosen = sweep.chosen(method, self.runs)
                for k, (figure, value) in sweep.scores(method, self.runs).items():
                    assert sweep.tune is not None
                    tried = sweep.tune.settings[k]
                    rows.append((method, k, json.dumps(tried), figure, value, tried == chosen))
        return pd.DataFrame(rows, columns=["method", "setting", "options", "figure", "value", "chosen"])

    def write_table(self, sweep: Sweep) -> Path:
        """Write `figures.csv`, all figures, and `cells.csv`, a line a cell with predictions, for `sista compare`.

        Where there is something to tune, `tuning.csv` says what was tried, and what was chosen.
        """
        table = self.table(sweep)
        tested = table.dropna(subset="predictions")[[*COLUMNS, "predictions"]]
        frames = [("figures.csv", table), ("cells.csv", tested.drop_duplicates())]
        frames += [("tuning.csv", self.tuned(sweep))] if sweep.tune is not None else []
        for name, frame in frames:
            with writing(self.root / name) as partial:
                frame.to_csv(partial, index=False)
        return self.root / "cells.csv"


def mixed(figures: pd.DataFrame) -> str:
    """Return a line where the cells of `Book.table` were tested by code that differs, "" where by the same."""
    counts = figures.drop_duplicates([*COLUMNS])["code"].value_counts()
    if len(counts) < 2:
        return ""
    told = ", ".join(f"{count} by {code or 'code before it was noted'}" for code, count in counts.items())
    return (
        f"the cells were tested by code that differs ({told}; figures.csv has which): delete done/CELL.json and "
        "runs/CELL of some, and run the sweep again, to have them by the code as it is"
    )
