"""A sweep: methods x seeds pre-train, each encoder goes through tasks x label fractions; every cell is a command.

A cell is one pre-training or one task at one fraction. Its run lies where `sista fit --name CELL` puts it, and a mark
beside the runs says that it is done, so that a sweep that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sista_pl import packaged, runs
from sista_pl.errors import SistaError, did_you_mean

PRETRAIN = "pretrain"
KEYS = ("name", "pretrain", "methods", "tasks", "seeds", "fractions", "reference")
PART_KEYS = ("config", "options", "fractions", "fits")


@dataclass(frozen=True)
class Cell:
    """One pre-training (`task` is None), or one task on its encoder.

    Args:
        method: whose encoder it is.
        seed: of the pre-training, of the task, and of the subset of labels.
        task: name of the task in the sweep.
        fraction: share of the training labels, in [0, 1]; 0 of an evaluation, which fits nothing.
    """

    method: str
    seed: int
    task: str | None = None
    fraction: float | None = None

    @property
    def name(self) -> str:
        task = "" if self.task is None else f"-{self.task}-{self.fraction:g}"
        return f"{self.method}-{self.seed}{task}"


@dataclass(frozen=True)
class Part:
    """What the cells of a pre-training, a method or a task have in common: configurations and options."""

    config: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    fractions: list[float] | None = None
    fits: bool = True


def flags(*parts: Part) -> list[str]:
    """Return the configurations of all parts, and after them their options: a later configuration would undo them."""
    found = [flag for part in parts for name in part.config for flag in ("--config", name)]
    for key, value in (pair for part in parts for pair in part.options.items()):
        found += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return found


@dataclass(frozen=True)
class Sweep:
    """What is swept over, as a YAML file says it.

    ```yaml
    pretrain: {config: pretrain.yaml, options: {trainer.max_epochs: 5}}
    methods:
      random: null                    # no pre-training: the encoder starts at random in each task
      clip: {config: method/clip.yaml}
      sista: {config: method/sia_sta_batch.yaml, options: {model.lr: 2.0e-3}}
    tasks:
      cls_chexpert: {config: cls_chexpert.yaml, fractions: [0.01, 0.1]}
      seg_siim: {config: seg_siim.yaml, options: {trainer.max_epochs: 3}}
      grounding: {config: ground_siim.yaml, fits: false}    # an evaluation: no labels, nothing to fit
    fractions: [0.01, 0.1, 1.0]       # of each task that gives none
    seeds: [0, 1, 2]
    reference: clip                   # the method that `sista compare` sets the others against
    ```

    Args:
        name: of the sweep, the file's.
        pretrain: what all pre-trainings have in common.
        methods: by name; None starts at random.
        tasks: by name.
        seeds: of the pre-trainings.
        fractions: of the training labels.
        reference: one of the methods, or None for the first.
    """

    name: str
    pretrain: Part
    methods: dict[str, Part | None]
    tasks: dict[str, Part]
    seeds: list[int]
    fractions: list[float]
    reference: str | None = None

    def cells(self, part: tuple[int, int] = (0, 1)) -> list[Cell]:
        """Return the cells, each pre-training before its tasks.

        Args:
            part: (i, n), the i-th of n shares of the pre-trainings with their tasks, for an array job.
        """
        index, count = part
        groups = [(method, seed) for seed in self.seeds for method in self.methods][index::count]
        found = []
        for method, seed in groups:
            found += [] if self.methods[method] is None else [Cell(method, seed)]
            for name, task in self.tasks.items():
                if task.fits:
                    found += [Cell(method, seed, name, share) for share in task.fractions or self.fractions]
                elif self.methods[method] is not None:  # an evaluation is of a pre-training
                    found.append(Cell(method, seed, name, 0.0))
        return found

    def commands(self, cell: Cell, root: Path) -> list[list[str]]:
        """Return the arguments of `sista` that make a cell, in order; an encoder that is not there yet is an error."""
        common = ["--name", cell.name, "--run_root", str(root), "--seed_everything", str(cell.seed)]
        if cell.task is None:
            said = [*flags(self.pretrain, self.methods[cell.method] or Part()), *common]
            return [["fit", *said], ["test", *said]]
        task = self.tasks[cell.task]
        said = [*flags(task), *common]
        if task.fits:
            said += ["--data.label_fraction", f"{cell.fraction:g}", "--data.fraction_seed", str(cell.seed)]
        if self.methods[cell.method] is not None:
            said += ["--model.weights", str(runs.find_checkpoint(root, Cell(cell.method, cell.seed).name, "best"))]
        return [["fit", *said], ["test", *said]] if task.fits else [["test", *said]]


def read_sweep(name: str) -> Sweep:
    """Read a sweep from a file, or the packaged one of that name.

    `${oc.env:NAME}` stands for an environment variable, `${key}` for another value of the file.

    Raises:
        SistaError: no such file; not YAML; an unknown key, a configuration that is not there, nothing to sweep over, a
            variable that is not set.
    """
    path = packaged.find(name)
    try:
        given: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as why:
        raise SistaError(f"sweep {path}: not YAML: {' '.join(str(why).split())[:200]}; check that place") from None
    except OmegaConfBaseException as why:
        raise SistaError(f"sweep {path}: {str(why).splitlines()[0]}; set it, or write the value there") from None
    if not isinstance(given, dict):
        raise SistaError(f"sweep {path}: no mapping; write methods, tasks, seeds and fractions")
    _known(given, KEYS, f"sweep {path}")
    methods = {
        _plain(key, path): None if part is None else _part(part, f"sweep {path}: methods: {key}")
        for key, part in _mapping(given, "methods", path).items()
    }
    tasks = {
        _plain(key, path): _part(part, f"sweep {path}: tasks: {key}")
        for key, part in _mapping(given, "tasks", path).items()
    }
    for key, task in tasks.items():
        if not task.config:
            raise SistaError(f"sweep {path}: tasks: {key} has no config; write `{key}: {{config: cls_chexpert.yaml}}`")
    seeds = given.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise SistaError(f"sweep {path}: seeds is {seeds!r}; give whole numbers, as in [0, 1, 2]")
    if len(set(seeds)) < len(seeds):
        raise SistaError(f"sweep {path}: seeds is {seeds!r}; give each once")
    reference = given.get("reference")
    if reference is not None and reference not in methods:
        raise SistaError(f"sweep {path}: reference: unknown method {reference!r}; {did_you_mean(reference, methods)}")
    pretrain = _part(given.get("pretrain") or {"config": "pretrain.yaml"}, f"sweep {path}: pretrain")
    shares = _fractions(given.get("fractions", [1.0]), f"sweep {path}")
    return Sweep(str(given.get("name") or path.stem), pretrain, methods, tasks, seeds, shares, reference)


def _known(given: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    for key in given:
        if key not in keys:
            raise SistaError(f"{where}: unknown key {key!r}; {did_you_mean(str(key), keys)}")


def _mapping(given: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    found = given.get(key)
    if not isinstance(found, dict) or not found:
        raise SistaError(f"sweep {path}: no {key}; write `{key}:` and under it a name a line")
    return found


def _plain(name: object, path: Path) -> str:
    if not isinstance(name, str) or not name.replace("_", "").replace(".", "").isalnum() or name == PRETRAIN:
        raise SistaError(f"sweep {path}: the name {name!r} is to become a folder's; use letters, digits, _ and .")
    return name


def _part(given: Any, where: str) -> Part:
    if not isinstance(given, dict):
        raise SistaError(f"{where} is {given!r}; write {{config: NAME.yaml, options: {{key: value}}}}")
    _known(given, PART_KEYS, where)
    configs = given.get("config", [])
    configs = [configs] if isinstance(configs, str) else configs
    for name in configs:
        packaged.find(str(name))
    options = given.get("options") or {}
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise SistaError(f"{where}: options is {options!r}; write {{key: value}}, as {{model.lr: 0.001}}")
    shares, fits = given.get("fractions"), given.get("fits", True)
    if not isinstance(fits, bool) or (shares is not None and not fits):
        raise SistaError(f"{where}: fits is {fits!r}; give false, without fractions, where there is nothing to fit")
    return Part([str(name) for name in configs], options, None if shares is None else _fractions(shares, where), fits)


def _fractions(given: Any, where: str) -> list[float]:
    right = isinstance(given, list) and given and all(type(f) in (int, float) and 0 < f <= 1 for f in given)
    if not right:
        raise SistaError(f"{where}: fractions is {given!r}; give shares of the labels, as in [0.01, 0.1, 1.0]")
    return [float(share) for share in given]


# --- what is on disk -------------------------------------------------------------


@dataclass(frozen=True)
class Book:
    """What a sweep has done so far, in its folder.

    Args:
        root: the sweep's folder: `runs/`, `logs/`, `done/`, `cells.csv`.
    """

    root: Path

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def log(self, cell: Cell) -> Path:
        return self.root / "logs" / f"{cell.name}.log"

    def mark(self, cell: Cell) -> Path:
        return self.root / "done" / f"{cell.name}.json"

    def done(self, sweep: Sweep, cell: Cell) -> bool:
        """Return whether a cell is done, by the commands that the sweep has for it now.

        Raises:
            SistaError: it was made by other commands.
        """
        mark = self.mark(cell)
        if not mark.is_file():
            return False
        made, wanted = json.loads(mark.read_text())["commands"], self.recorded(sweep, cell)
        if made != wanted:
            odd = next((pair for pair in zip(chain(*made), chain(*wanted), strict=False) if pair[0] != pair[1]), None)
            told = f" ({odd[0]} there, {odd[1]} now)" if odd else ""
            raise SistaError(
                f"sweep: {cell.name} in {self.root} was made by another command{told}; give another --out, or delete "
                f"{mark} and {self.runs / cell.name} to make it again"
            )
        return True

    def recorded(self, sweep: Sweep, cell: Cell) -> list[list[str]]:
        """Return a cell's commands as a mark keeps them: wherever the sweep's folder lies, and however it is called."""
        here = str(self.root)
        return [[word.replace(here, "OUT") for word in command] for command in sweep.commands(cell, self.runs)]

    def finish(self, sweep: Sweep, cell: Cell, seconds: float) -> None:
        """Mark a cell as done."""
        mark = self.mark(cell)
        mark.parent.mkdir(parents=True, exist_ok=True)
        told = {"commands": self.recorded(sweep, cell), "seconds": round(seconds, 1)}
        partial = mark.with_suffix(".partial")
        partial.write_text(json.dumps(told, indent=2) + "\n")
        partial.replace(mark)

    def table(self, sweep: Sweep) -> pd.DataFrame:
        """Return a row for each cell and figure of its test: method, task, fraction, seed, metric, value, low, high.

        `predictions` is the file, relative to the sweep's folder, that the figures of a task were computed on.
        """
        rows = []
        for cell in sweep.cells():
            if not self.mark(cell).is_file():
                continue
            test = max(run / "test" for run in runs.runs_of(self.runs, cell.name) if (run / "test").is_dir())
            told = json.loads((test / "metrics.json").read_text())
            predictions = test / "predictions.parquet"
            for metric, figure in told["intervals"].items():
                low, high = figure["interval95"] or (None, None)
                rows.append({
                    "method": cell.method, "task": cell.task or PRETRAIN, "fraction": cell.fraction, "seed": cell.seed,
                    "metric": metric.removeprefix("test/"), "value": figure["value"], "low": low, "high": high,
                    "predictions": predictions.relative_to(self.root).as_posix() if predictions.is_file() else None,
                })  # fmt: skip
        columns = ["method", "task", "fraction", "seed", "metric", "value", "low", "high", "predictions"]
        return pd.DataFrame(rows, columns=columns)

    def write_table(self, sweep: Sweep) -> Path:
        """Write `figures.csv`, all figures, and `cells.csv`, a line a cell with predictions, for `sista compare`."""
        table = self.table(sweep)
        tested = table.dropna(subset="predictions")[["method", "task", "fraction", "seed", "predictions"]]
        for name, frame in (("figures.csv", table), ("cells.csv", tested.drop_duplicates())):
            partial = self.root / f".{name}.{os.getpid()}.partial"  # tasks of an array job write it, too
            frame.to_csv(partial, index=False)
            partial.replace(self.root / name)
        return self.root / "cells.csv"
