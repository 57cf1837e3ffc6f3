"""A sweep: methods x seeds pre-train, each encoder goes through tasks x label fractions; every cell is a command.

A cell is one pre-training or one task at one fraction.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sista_pl import packaged, runs
from sista_pl.errors import SistaError, did_you_mean
from sista_pl.tuning import Tuning, best, validated

PRETRAIN = "pretrain"
KEYS = ("name", "pretrain", "methods", "tasks", "tune", "seeds", "fractions", "reference")
PART_KEYS = ("config", "options", "fractions", "fits", "subsets")
SUBSET_STEP = 10_000  # seeds are smaller
TUNE_KEYS = ("options", "task", "fraction")


@dataclass(frozen=True)
class Cell:
    """One pre-training (`task` is None), or one task on its encoder.

    Args:
        method: whose encoder it is.
        seed: of the pre-training, of the task, and of the subset of labels.
        task: name of the task in the sweep.
        fraction: share of the training labels, in [0, 1]; 0 of an evaluation, which fits nothing.
        setting: of the sweep's `tune`, where the cell is for choosing one; it is not tested.
        subset: which draw of that share of the labels.
    """

    method: str
    seed: int
    task: str | None = None
    fraction: float | None = None
    setting: int | None = None
    subset: int = 0

    @property
    def name(self) -> str:
        task = "" if self.task is None else f"-{self.task}-{self.fraction:g}"
        task += f"-{self.subset}" if self.subset else ""
        return f"{self.method}-{self.seed if self.setting is None else f'tune{self.setting}'}{task}"

    @property
    def encoder(self) -> Cell:
        """The pre-training that a task's cell needs."""
        return Cell(self.method, self.seed, setting=self.setting)

    @property
    def fraction_seed(self) -> int:
        """What draws the labels: the same for all methods, another for each seed and subset."""
        return self.seed + SUBSET_STEP * self.subset


@dataclass(frozen=True)
class Part:
    """What the cells of a pre-training, a method or a task have in common: configurations and options."""

    config: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    fractions: list[float] | None = None
    fits: bool = True
    subsets: dict[float, int] = field(default_factory=dict)


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
      cls_chexpert: {config: cls_chexpert.yaml, fractions: [0.01, 0.1], subsets: {0.01: 10}}   # ten draws of 1 %
      seg_siim: {config: seg_siim.yaml, options: {trainer.max_epochs: 3}}
      grounding: {config: ground_siim.yaml, fits: false}    # an evaluation: no labels, nothing to fit
    tune: {options: {model.lr: [5.0e-4, 1.0e-3]}, task: cls_chexpert, fraction: 0.01}   # may be left out
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
        tune: what is tried for each method before its pre-trainings; None takes what the configurations say.
    """

    name: str
    pretrain: Part
    methods: dict[str, Part | None]
    tasks: dict[str, Part]
    seeds: list[int]
    fractions: list[float]
    reference: str | None = None
    tune: Tuning | None = None

    def cells(self, part: tuple[int, int] = (0, 1)) -> list[Cell]:
        """Return the cells, each pre-training before its tasks.

        Args:
            part: (i, n), the i-th of n shares of the pre-trainings with their tasks, for an array job.
        """
        index, count = part
        groups = [(method, [seed]) for seed in self.seeds for method in self.methods]
        if self.tune is not None:  # what is chosen for a method is for all of its seeds
            groups = [(method, self.seeds) for method in self.methods]
        found = []
        for method, seeds in groups[index::count]:
            found += self.tuning(method)
            for seed in seeds:
                found += self._of(method, seed)
        return found

    def _of(self, method: str, seed: int) -> list[Cell]:
        found = [] if self.methods[method] is None else [Cell(method, seed)]
        for name, task in self.tasks.items():
            if task.fits:
                found += [
                    Cell(method, seed, name, share, subset=k)
                    for share in task.fractions or self.fractions for k in range(task.subsets.get(share, 1))
                ]  # fmt: skip
            elif self.methods[method] is not None:  # an evaluation is of a pre-training
                found.append(Cell(method, seed, name, 0.0))
        return found

    def tuning(self, method: str) -> list[Cell]:
        """Return the cells that choose a method's setting, each pre-training before its task."""
        if self.tune is None or self.methods[method] is None:
            return []
        task, share, places = self.tune.task, self.tune.fraction, range(len(self.tune.settings))
        return [
            cell for k in places
            for cell in (Cell(method, self.seeds[0], setting=k), Cell(method, self.seeds[0], task, share, k))
        ]  # fmt: skip

    def needs(self, cell: Cell) -> list[Cell]:
        """Return the cells that have to be done before this one."""
        if self.methods[cell.method] is None:
            return []
        if cell.task is not None:
            return [cell.encoder]
        return [] if cell.setting is not None else self.tuning(cell.method)

    def scores(self, method: str, root: Path) -> dict[int, tuple[str, float]]:
        """Return of each setting that was tried for a method the validation figure, name and value.

        Raises:
            SistaError: one has not ended.
        """
        tried = [cell for cell in self.tuning(method) if cell.task is not None and cell.setting is not None]
        return {cell.setting: validated(root, cell.name) for cell in tried if cell.setting is not None}

    def chosen(self, method: str, root: Path) -> dict[str, Any]:
        """Return the options that were chosen for a method, {} where nothing is tuned."""
        scores = {setting: value for setting, (_, value) in self.scores(method, root).items()}
        return self.tune.settings[best(scores)] if self.tune is not None and scores else {}

    def commands(self, cell: Cell, root: Path) -> list[list[str]]:
        """Return the arguments of `sista` that make a cell, in order.

        Raises:
            SistaError: an encoder is not there yet, or a setting not chosen.
        """
        common = ["--name", cell.name, "--run_root", str(root), "--seed_everything", str(cell.seed)]
        if cell.task is None:
            tried = None if cell.setting is None or self.tune is None else self.tune.settings[cell.setting]
            options = self.chosen(cell.method, root) if tried is None else tried
            said = [*flags(self.pretrain, self.methods[cell.method] or Part(), Part(options=options)), *common]
        else:
            task = self.tasks[cell.task]
            said = [*flags(task), *common]
            if task.fits:
                said += ["--data.label_fraction", f"{cell.fraction:g}", "--data.fraction_seed", str(cell.fraction_seed)]
            if self.methods[cell.method] is not None:
                said += ["--model.weights", str(runs.find_checkpoint(root, cell.encoder.name, "best"))]
            if not task.fits:
                return [["test", *said]]
        return [["fit", *said], ["test", *said]] if cell.setting is None else [["fit", *said]]


def read_sweep(*names: str) -> Sweep:
    """Read a sweep from a file, or the packaged one of that name.

    Of several, each adds to those before it, key by key, or says its value anew; the first gives the name.
    `${oc.env:NAME}` stands for an environment variable, `${key}` for another value of the files.

    Raises:
        SistaError: no such file; not YAML; an unknown key, a configuration that is not there, nothing to sweep over, a
            variable that is not set.
    """
    paths = [packaged.find(name) for name in names]
    path = " + ".join(map(str, paths))
    try:
        given: Any = OmegaConf.to_container(OmegaConf.merge(*map(_loaded, paths)), resolve=True)
    except OmegaConfBaseException as why:
        raise SistaError(f"sweep {path}: {str(why).splitlines()[0]}; set it, or write the value there") from None
    except TypeError:  # of a list and a mapping
        raise SistaError(f"sweep {path}: no mapping each; write methods, tasks, seeds and fractions") from None
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
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int and 0 <= s < SUBSET_STEP for s in seeds):
        raise SistaError(f"sweep {path}: seeds is {seeds!r}; give whole numbers under {SUBSET_STEP}, as in [0, 1, 2]")
    if len(set(seeds)) < len(seeds):
        raise SistaError(f"sweep {path}: seeds is {seeds!r}; give each once")
    reference = given.get("reference")
    if reference is not None and (not isinstance(reference, str) or reference not in methods):
        near = did_you_mean(str(reference), methods)
        raise SistaError(f"sweep {path}: reference: unknown method {reference!r}; {near}")
    pretrain = _part(given.get("pretrain") or {"config": "pretrain.yaml"}, f"sweep {path}: pretrain")
    shares = _fractions(given.get("fractions", [1.0]), f"sweep {path}")
    for key, task in tasks.items():
        if odd := sorted(set(task.subsets) - set(task.fractions or shares)):
            raise SistaError(f"sweep {path}: tasks: {key}: subsets is of {odd[0]:g}, which is none of its fractions "
                             f"{task.fractions or shares}; give one of these")  # fmt: skip
    tune = None if given.get("tune") is None else _tune(given["tune"], tasks, shares, f"sweep {path}: tune")
    return Sweep(str(given.get("name") or paths[0].stem), pretrain, methods, tasks, seeds, shares, reference, tune)


def _loaded(path: Path) -> Any:
    try:
        return OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as why:
        raise SistaError(f"sweep {path}: not YAML: {' '.join(str(why).split())[:200]}; check that place") from None


def _known(given: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    for key in given:
        if key not in keys:
            raise SistaError(f"{where}: unknown key {key!r}; {did_you_mean(str(key), keys)}")


def _mapping(given: dict[str, Any], key: str, path: str) -> dict[str, Any]:
    found = given.get(key)
    if not isinstance(found, dict) or not found:
        raise SistaError(f"sweep {path}: no {key}; write `{key}:` and under it a name a line")
    return found


def _plain(name: object, path: str) -> str:
    if not isinstance(name, str) or not name.replace("_", "").replace(".", "").isalnum() or name == PRETRAIN:
        raise SistaError(f"sweep {path}: the name {name!r} is to become a folder's; use letters, digits, _ and .")
    return name


def _part(given: Any, where: str) -> Part:
    if not isinstance(given, dict):
        raise SistaError(f"{where} is {given!r}; write {{config: NAME.yaml, options: {{key: value}}}}")
    _known(given, PART_KEYS, where)
    configs = given.get("config", [])
    configs = [configs] if isinstance(configs, str) else configs
    if not isinstance(configs, list) or not all(isinstance(name, str) for name in configs):
        raise SistaError(f"{where}: config is {configs!r}; give a file, a packaged configuration or a list of them")
    for name in configs:
        packaged.find(name)
    options = given.get("options") or {}
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise SistaError(f"{where}: options is {options!r}; write {{key: value}}, as {{model.lr: 0.001}}")
    shares, fits = given.get("fractions"), given.get("fits", True)
    if not isinstance(fits, bool) or (shares is not None and not fits):
        raise SistaError(f"{where}: fits is {fits!r}; give false, without fractions, where there is nothing to fit")
    shares = None if shares is None else _fractions(shares, where)
    return Part(configs, options, shares, fits, _subsets(given.get("subsets"), fits, where))


def _subsets(given: Any, fits: bool, where: str) -> dict[float, int]:
    """Return how often the labels of a fraction are drawn."""
    if given is None:
        return {}
    right = isinstance(given, dict) and all(
        type(share) in (int, float) and 0 < share < 1 and type(count) is int and count >= 1
        for share, count in given.items()
    )
    if not right or not fits:
        raise SistaError(f"{where}: subsets is {given!r}; give of a task that is fitted how often the labels of a "
                         "fraction under 1 are drawn, as in {0.01: 10}")  # fmt: skip
    return {float(share): count for share, count in given.items()}


def _tune(given: Any, tasks: Mapping[str, Part], shares: list[float], where: str) -> Tuning:
    if not isinstance(given, dict):
        raise SistaError(f"{where} is {given!r}; write {{options: {{model.lr: [0.0005, 0.001]}}, task: NAME}}")
    _known(given, TUNE_KEYS, where)
    options = given.get("options")
    if not isinstance(options, dict) or not options or not all(isinstance(v, list) and v for v in options.values()):
        raise SistaError(f"{where}: options is {options!r}; give values to try, as {{model.lr: [0.0005, 0.001]}}")
    task = str(given.get("task") or next((name for name, part in tasks.items() if part.fits), None))
    if task not in tasks or not tasks[task].fits:
        near = did_you_mean(task, [name for name, part in tasks.items() if part.fits])
        raise SistaError(f"{where}: task is {task!r}; give one that is fitted, {near}")
    share = _fractions([given.get("fraction", min(tasks[task].fractions or shares))], where)[0]
    return Tuning({str(key): values for key, values in options.items()}, task, share)


def _fractions(given: Any, where: str) -> list[float]:
    right = isinstance(given, list) and given and all(type(f) in (int, float) and 0 < f <= 1 for f in given)
    if not right:
        raise SistaError(f"{where}: fractions is {given!r}; give shares of the labels, as in [0.01, 0.1, 1.0]")
    if len({f"{share:g}" for share in given}) < len(given):  # as they stand in a cell's name
        raise SistaError(f"{where}: fractions is {given!r}; give each once")
    return [float(share) for share in given]
