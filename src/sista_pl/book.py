"""What a sweep has done so far, in its folder.

A cell's run lies where `sista fit --name CELL` puts it, and a mark beside the runs says that it is done, so that a
sweep that was stopped goes on where it was. A mark keeps how the cell was made: its commands, what their configurations
said, and the encoder that a task is of; a cell that would be made otherwise now is refused. A mark of before these were
kept is not asked what configurations said, and holds for an encoder whose own mark has no hash either.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from sista_pl import packaged, runs
from sista_pl.atomic import writing
from sista_pl.errors import SistaError
from sista_pl.sweep import PRETRAIN, Cell, Sweep

COLUMNS = ("method", "task", "fraction", "seed", "subset")  # of a cell
PLACES = ("--run_root", "--model.weights")  # options of a cell's commands that name a place in the sweep's folder
GROUPS = ("--data", "--model", "--trainer")  # options that may name a configuration


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
        """The file that the process which runs a cell's commands keeps locked, even where its sweep has gone."""
        return self.root / "begun" / f"{cell.name}.lock"

    def alone(self, cell: Cell) -> AbstractContextManager[None]:
        """Keep other sweeps from a cell.

        Raises:
            SistaError: another has it.
        """
        return _locked(self.lock(cell).with_suffix(".sweep"), cell)

    def is_done(self, cell: Cell) -> bool:
        """Return whether a cell is done, by whatever commands: marked, and its run there, with a test if it has one."""
        if not self.mark(cell).is_file():
            return False
        if cell.setting is not None:
            return bool(runs.runs_of(self.runs, cell.name))
        return runs.newest_tested(self.runs, cell.name) is not None

    def done(self, sweep: Sweep, cell: Cell) -> bool:
        """Return whether a cell is done, as the sweep would make it now.

        Raises:
            SistaError: it was made by other commands, by configurations that said something else, or on an encoder that
                was made again.
        """
        if not self.is_done(cell):
            return False
        self._same(self.mark(cell), cell, self.facts(sweep, cell))
        return True

    def begin(self, sweep: Sweep, cell: Cell) -> bool:
        """Mark a cell as begun, and return whether its training goes on where it was stopped.

        Raises:
            SistaError: its commands still run; what was stopped was begun otherwise, or nothing says how.
        """
        mark, seconds, told = self._begun(cell), 0.0, self.facts(sweep, cell)
        with _locked(self.lock(cell), cell):
            stopped = runs.has_checkpoint(self.runs, cell.name, "last")
            if stopped:
                if not mark.is_file():
                    raise SistaError(
                        f"sweep: {self.runs / cell.name} has a training that was stopped, and no {mark} says by which "
                        "commands; delete that folder to make the cell again"
                    )
                self._same(mark, cell, told)
                kept = runs.find_checkpoint(self.runs, cell.name, "last").stat().st_mtime - mark.stat().st_mtime
                seconds = _read(mark).get("seconds", 0.0) + max(0.0, kept)
            self.mark(cell).unlink(missing_ok=True)
            self._write(mark, {**told, "seconds": round(seconds, 1)})
        return stopped

    def _begun(self, cell: Cell) -> Path:
        """Return the mark that a cell is begun: how it is made, and the seconds of what was kept before that."""
        return self.root / "begun" / f"{cell.name}.json"

    def _same(self, mark: Path, cell: Cell, wanted: dict[str, Any]) -> None:
        made = _read(mark)
        if why := _difference(made, wanted, cell):
            tasks = f", and of its tasks, {cell.name}-*, both," if cell.task is None else ""
            raise SistaError(
                f"sweep: {cell.name} in {self.root} was made {why}; give another --out, or delete {mark} and "
                f"{self.runs / cell.name}{tasks} to make it again"
            )

    def facts(self, sweep: Sweep, cell: Cell) -> dict[str, Any]:
        """Return what a mark keeps of how a cell is made: `commands`, `configs`, and of a task `encoder`.

        `configs` is `packaged.said` of all configurations that the commands name, `encoder` the SHA-256 of the
        pre-training's checkpoint when that was done.
        """
        told: dict[str, Any] = {"commands": self.recorded(sweep, cell), "configs": {}}
        for flag, word in dict.fromkeys(pairwise(chain(*told["commands"]))):
            if flag == "--config" or (flag in GROUPS and word.endswith(".yaml")):
                told["configs"] |= packaged.said(word)
        if cell.task is not None and (encoder := _read(self.mark(cell.encoder)).get("encoder")):
            told["encoder"] = encoder
        return told

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
        """Mark a cell as done, `seconds` after it was begun or went on, with how it was made then."""
        told = _read(self._begun(cell)) or self.facts(sweep, cell)
        told["seconds"] = round(told.get("seconds", 0.0) + seconds, 1)
        if cell.task is None and runs.has_checkpoint(self.runs, cell.name, "best"):
            with runs.find_checkpoint(self.runs, cell.name, "best").open("rb") as file:
                told["encoder"] = hashlib.file_digest(file, "sha256").hexdigest()
        self._write(self.mark(cell), told)

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
            run = runs.newest_tested(self.runs, cell.name)
            if cell.setting is not None or run is None or not self.is_done(cell):
                continue
            told = json.loads((run / "test" / "metrics.json").read_text())
            predictions = run / "test" / "predictions.parquet"
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


def _read(mark: Path) -> dict[str, Any]:
    """Return what a mark tells, {} where it isn't there."""
    return json.loads(mark.read_text()) if mark.is_file() else {}


def _difference(made: dict[str, Any], wanted: dict[str, Any], cell: Cell) -> str:
    """Return in words how a cell was made otherwise than is wanted, "" where it was not."""
    if made["commands"] != wanted["commands"]:
        pairs = zip(chain(*made["commands"]), chain(*wanted["commands"]), strict=False)
        odd = next((pair for pair in pairs if pair[0] != pair[1]), None)
        return "by another command" + (f" ({odd[0]} there, {odd[1]} now)" if odd else "")
    if cell.task is not None and made.get("encoder") != wanted.get("encoder"):
        return f"on another encoder than {cell.encoder.name} has now"
    then, now = made.get("configs", wanted["configs"]), wanted["configs"]
    changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return f"when {', '.join(changed)} said something else" if changed else ""


@contextmanager
def _locked(path: Path, cell: Cell) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SistaError(
                f"sweep: another process is at work on {cell.name} ({path}); wait until it has ended"
            ) from None
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a child that is just being started has it open, too


def mixed(figures: pd.DataFrame) -> str:
    """Return a line where the cells of `Book.table` were tested by code that differs, "" where by the same."""
    counts = figures.drop_duplicates([*COLUMNS])["code"].value_counts()
    if len(counts) < 2:
        return ""
    told = ", ".join(f"{count} by {code or 'code before it was noted'}" for code, count in counts.items())
    return (
        f"the cells were tested by code that differs ({told}; figures.csv has which): delete done/CELL.json and "
        "runs/CELL of some, of a pre-training those of CELL-*, too, and run the sweep again, to have them by the code "
        "as it is"
    )
