"""What a sweep's folder holds: which cells were wanted, which are done, where their runs lie and what they say."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from sista_pl import runs
from sista_pl.atomic import writing
from sista_pl.book import Book
from sista_pl.errors import SistaError
from sista_pl.stored import PREDICTIONS, Run
from sista_pl.sweep import Cell, Sweep

PLAN, SCHEMA = "sweep.json", 1
OWN = ("--name", "--run_root", "--seed_everything", "--data.label_fraction", "--data.fraction_seed", "--model.weights")


def write_plan(root: Path, sweep: Sweep) -> Path:
    """Keep beside a sweep's runs which cells it has, so that a report knows what is missing."""
    told = {"schema": SCHEMA, "name": sweep.name, "reference": sweep.reference,
            "tuning": sweep.tune.told() if sweep.tune is not None else "",
            "cells": [asdict(cell) for cell in sweep.cells()]}  # fmt: skip
    try:
        root.mkdir(parents=True, exist_ok=True)
        with writing(root / PLAN) as partial:
            partial.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    except OSError as why:
        raise SistaError(f"sweep: {root} cannot be written ({why.strerror}); give --out another folder") from None
    return root / PLAN


@dataclass(frozen=True)
class Swept:
    """A sweep's folder.

    Args:
        root: the folder.
        name: of the sweep.
        wanted: its cells, each pre-training before its tasks.
        reference: the method that the others are set against.
        tuning: the budget that each method was tuned with, in a line; empty where none was.
        tried: the cells that choose the methods' settings, which are not tested.
    """

    root: Path
    name: str
    wanted: list[Cell]
    reference: str
    tuning: str = ""
    tried: list[Cell] = field(default_factory=list)

    @classmethod
    def open(cls, root: Path) -> Swept:
        """Read what a sweep left.

        Raises:
            SistaError: no such folder, or nothing of a sweep in it.
        """
        if not root.is_dir():
            raise SistaError(f"report: {root}: no such folder; give that of a sweep, as sweeps/NAME")
        if not (root / PLAN).is_file():
            raise SistaError(f"report: {root} has no {PLAN}; run `sista sweep` first, or give the folder that it made")
        try:
            told = json.loads((root / PLAN).read_text(encoding="utf-8"))
            cells = [Cell(**cell) for cell in told["cells"]]
            wanted, tried = ([cell for cell in cells if (cell.setting is None) == own] for own in (True, False))
            return cls(root, told["name"], wanted, told["reference"], told["tuning"], tried)
        except (OSError, ValueError, KeyError, TypeError) as why:
            raise SistaError(f"report: {root / PLAN} can't be read ({why}); run its sweep again") from None

    @property
    def book(self) -> Book:
        return Book(self.root)

    @cached_property
    def done(self) -> list[Cell]:
        """The wanted cells that are done."""
        return [cell for cell in self.wanted if self.cells[cell]]

    @cached_property
    def cells(self) -> dict[Cell, bool]:
        """Whether each cell is done, of those that choose a setting, too."""
        return {cell: self.book.is_done(cell) for cell in [*self.tried, *self.wanted]}

    @property
    def seconds(self) -> float:
        """What all cells that are done took."""
        return sum(float(self.mark(cell).get("seconds") or 0) for cell, done in self.cells.items() if done)

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(cell.method for cell in self.wanted))

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(cell.seed for cell in self.wanted))

    @property
    def settings(self) -> list[tuple[str, float]]:
        """Tasks with their shares of the labels, in the sweep's order."""
        found = dict.fromkeys((cell.task, cell.fraction) for cell in self.wanted)
        return [(task, share) for task, share in found if task is not None and share is not None]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for task, _ in self.settings))

    def count(self, method: str, task: str | None, fraction: float | None) -> tuple[int, int]:
        """Return how many of a method's cells in a setting are done, and how many are wanted."""

        def of(cells: Iterable[Cell]) -> int:
            return sum((cell.method, cell.task, cell.fraction) == (method, task, fraction) for cell in cells)

        return of(self.done), of(self.wanted)

    def run(self, cell: Cell) -> Path | None:
        """Return the newest run of a cell that has a test, or None."""
        return runs.newest_tested(self.book.runs, cell.name)

    def tested(self) -> list[Run]:
        """Return the predictions of all task cells that are done, as `sista compare` takes them."""
        found = []
        for cell in self.done:
            file = (self.run(cell) or self.root) / "test" / PREDICTIONS
            if cell.task is not None and file.is_file():
                found.append(Run(cell.method, file, str(cell.seed), cell.task, cell.fraction, None, str(cell.subset)))
        return found

    def facts(self, cell: Cell, test: bool = True) -> dict[str, Any]:
        """Return metrics.json of a cell that is done: of its test, or of its training, {} where that has none."""
        run = self.run(cell)
        return read_json(run / ("test/metrics.json" if test else "metrics.json")) if run is not None else {}

    def config(self, cell: Cell) -> dict[str, Any]:
        """Return the configuration of a cell's run, {} where it has none."""
        file = (self.run(cell) or self.root) / "config.yaml"
        try:
            found = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except (OSError, ValueError, yaml.YAMLError) as why:
            raise SistaError(f"report: {file}: can't be read ({' '.join(str(why).split())[:120]}); make the cell "
                             "again") from None  # fmt: skip
        return found if isinstance(found, dict) else {}

    def here(self, path: str, cell: Cell) -> Path:
        """Return a path of a run's configuration: as it is, or seen from where the sweep was run."""
        given, root = Path(path), Path(str(self.config(cell).get("run_root") or ""))
        if given.exists() or given.is_absolute() or root.is_absolute():
            return given
        at = self.book.runs.resolve()
        return Path(*at.parts[: -len(root.parts)]) / given if at.parts[-len(root.parts) :] == root.parts else given

    def mark(self, cell: Cell) -> dict[str, Any]:
        """Return the mark of a cell that is done: its `commands`, with OUT for the sweep's folder, and `seconds`."""
        return read_json(self.book.mark(cell))

    def made_by(self, cell: Cell) -> list[str]:
        """Return the configurations and options of a cell, without those that every cell has."""
        commands = self.mark(cell).get("commands") or [[]]
        words = iter(commands[0][1:])
        return [f"{value}" if flag == "--config" else f"{flag.removeprefix('--')}={value}"
                for flag, value in zip(words, words, strict=False) if flag not in OWN]  # fmt: skip


def read_json(file: Path) -> dict[str, Any]:
    """Return what a JSON file holds, {} where it isn't there.

    Raises:
        SistaError: it can't be read.
    """
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as why:
        raise SistaError(f"report: {file}: can't be read ({why}); make that cell again") from None
    return found if isinstance(found, dict) else {}
