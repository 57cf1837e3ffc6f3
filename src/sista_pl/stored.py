"""Stored predictions of several methods, read and checked to be comparable: the same images, the same truth.

N images, R runs (one method with one seed and subset of the labels).
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from sista_pl.errors import SistaError, did_you_mean
from sista_pl.metrics.classification import Classification
from sista_pl.metrics.detection import Detection
from sista_pl.metrics.grounding import Grounding
from sista_pl.metrics.retrieval import RetrievalFigures
from sista_pl.metrics.segmentation import Segmentation
from sista_pl.runs import newest_tested, runs_of

PREDICTIONS = "predictions.parquet"
COLUMNS = ("method", "task", "fraction", "seed", "predictions")


class Family(Protocol):
    """Figures of a set of predictions; those of `sista_pl.metrics`."""

    absent: list[str]

    def figures(self, weights: np.ndarray | None = None) -> dict[str, float]: ...

    def figure(self, name: str, weights: np.ndarray | None = None) -> float: ...


@dataclass(frozen=True)
class Run:
    """The predictions of one method, trained with one seed.

    Args:
        method: its name.
        file: `.parquet` or `.csv`.
        seed: its name, "" where none is told; nothing is paired by it.
        task: runs of one task and fraction are one setting; "" where there is but one.
        fraction: share of the training labels, or None.
        metric: to compare by, or None for the family's.
        subset: name of the draw of that share of the labels, of several with the seed; a run without is a seed.
    """

    method: str
    file: Path
    seed: str = ""
    task: str = ""
    fraction: float | None = None
    metric: str | None = None
    subset: str = ""


@dataclass
class Setting:
    """Runs on one test set, checked to be on the same images with the same truth.

    Args:
        task: of the runs.
        fraction: of the runs.
        metric: a figure that each family has.
        runs: R of them.
        families: (R,) their figures; all take the images in the same order.
        patients: (N,) of the images.
        notes: what a reader has to know of it.
    """

    task: str
    fraction: float | None
    metric: str
    runs: list[Run]
    families: list[Family]
    patients: np.ndarray
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        share = f" {self.fraction:g}" if self.fraction else ""  # an evaluation has 0: it fits nothing
        return f"{self.task}{share}" or self.metric

    @property
    def kind(self) -> str:
        """The metric without its class."""
        return self.metric.partition("/")[0].removesuffix("_macro")

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(run.method for run in self.runs))

    def of(self, method: str) -> list[int]:
        """Return the places of a method's runs."""
        return [place for place, run in enumerate(self.runs) if run.method == method]

    def by_seed(self, method: str, figures: np.ndarray) -> np.ndarray:
        """Return (…, S) a figure of each seed of a method, by rising name, the mean over its subsets of the labels.

        Args:
            method: one of the setting's.
            figures: (…, R) of the runs.
        """
        places: dict[object, list[int]] = {}
        for place in sorted(self.of(method), key=lambda place: (self.runs[place].seed, self.runs[place].subset)):
            run = self.runs[place]
            places.setdefault(run.seed if run.subset else place, []).append(place)
        return np.stack([figures[..., mine].mean(-1) for mine in places.values()], -1)


# --- which predictions -------------------------------------------------------------


def find_runs(methods: Mapping[str, str]) -> tuple[list[Run], list[str]]:
    """Return the runs of methods given as NAME: GLOB, and notes on what was passed over.

    Each match is a seed: a file, a folder with `test/predictions.parquet` or `predictions.parquet`, or a folder of
    numbered runs as `sista fit` makes it, of which the newest with a test is taken.

    Raises:
        SistaError: no match, a match without predictions, a file that is taken twice.
    """
    runs: list[Run] = []
    notes: list[str] = []
    taken: dict[Path, str] = {}
    for method, pattern in methods.items():
        matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        if not matches:
            raise SistaError(f"compare: {method}: nothing matches {pattern!r}; give run folders or prediction files")
        for match in map(Path, matches):
            file, passed = _predictions_of(match, method)
            if file.resolve() in taken:
                raise SistaError(f"compare: {file} is taken for {taken[file.resolve()]} and for {method}; mend a glob")
            taken[file.resolve()] = method
            if passed:
                notes.append(f"{match}: run {passed} has no test, {file.parent.parent.name} is taken")
            runs.append(Run(method, file))
    return runs, notes


def _predictions_of(path: Path, method: str) -> tuple[Path, str]:
    """Return a match's file, and the newer run without a test that was passed over, or nothing."""
    if path.is_file():
        return path, ""
    numbered, tested = runs_of(path.parent, path.name), newest_tested(path.parent, path.name)
    if tested is not None and (tested / "test" / PREDICTIONS).is_file():
        return tested / "test" / PREDICTIONS, numbered[-1].name if numbered[-1] != tested else ""
    for file in (path / "test" / PREDICTIONS, path / PREDICTIONS):
        if file.is_file():
            return file, ""
    raise SistaError(f"compare: {method}: {path} has no test/{PREDICTIONS}; run `sista test` on it, to its end "
                     "(test/metrics.json), or narrow the glob")  # fmt: skip


def read_runs(table: Path) -> list[Run]:
    """Return the runs of a CSV of method, task, fraction, seed, predictions (relative to it), maybe subset and metric.

    Raises:
        SistaError: no such file, a column that is missing, a setting that is empty or given twice.
    """
    if table.suffix != ".csv":
        raise SistaError(f"{table}: not .csv; give a table of {', '.join(COLUMNS)}")
    rows = _read(table, dtype=str, keep_default_na=False)
    for column in COLUMNS:
        if column not in rows:
            raise SistaError(f"{table}: no column {column!r}; {did_you_mean(column, rows.columns)}")
    runs: list[Run] = []
    lines: dict[tuple[Any, ...], int] = {}
    for line, row in enumerate(rows.to_dict("records"), 2):
        for column in ("method", "predictions"):
            if not row[column]:
                raise SistaError(f"{table}: line {line}: {column} is empty; fill it in, or leave the line out")
        try:
            fraction = float(row["fraction"]) if row["fraction"] else None
        except ValueError:
            raise SistaError(f"{table}: line {line}: fraction is {row['fraction']!r}; give a number") from None
        run = Run(row["method"], table.parent / row["predictions"], row["seed"], row["task"], fraction,
                  row.get("metric") or None, row.get("subset") or "")  # fmt: skip
        key = (run.method, run.task, run.fraction, run.seed, run.subset)
        if key in lines:
            raise SistaError(f"{table}: lines {lines[key]} and {line} are the same setting and seed; keep one of them")
        lines[key] = line
        runs.append(run)
    if not runs:
        raise SistaError(f"{table}: no line; give one for each method, task, fraction and seed")
    return runs


def _read(file: Path, **options: Any) -> pd.DataFrame:
    """Read a table; `options` are those of `pandas.read_csv`."""
    try:
        if file.suffix == ".csv":
            return pd.read_csv(file, **options)
        if file.suffix == ".parquet":
            return pd.read_parquet(file)
    except FileNotFoundError:
        raise SistaError(f"{file}: no such file; check the path") from None
    except (OSError, ValueError) as why:
        raise SistaError(f"{file}: cannot be read ({(str(why).splitlines() or ['broken'])[0]}); check it") from None
    raise SistaError(f"{file}: neither .csv nor .parquet; give predictions in one of the two")


# --- from predictions to figures ---------------------------------------------------


def family_of(table: pd.DataFrame) -> tuple[Family, str]:
    """Return the figures of a table of predictions, told by its columns, and the metric to compare them by.

    * `intersection_pixels`, `predicted_pixels`, `truth_pixels`: segmentation, `dice_positive`,
    * `truth_boxes`, `predicted_boxes`: detection, `map_40_75`,
    * `rank_i2t`, `rank_t2i`: retrieval, `R_mean`,
    * `truth_share_<class>`, `hit_<class>`: grounding, `pointing_macro`,
    * `truth_<class>`, `score_<class>`: classification, `auroc_macro`.

    Raises:
        SistaError: none of these columns, or what is in them is no prediction.
    """
    if {"intersection_pixels", "predicted_pixels", "truth_pixels"} <= set(table):
        return Segmentation.from_table(table), "dice_positive"
    if {"truth_boxes", "predicted_boxes"} <= set(table):
        return Detection.from_table(table), "map_40_75"
    if {"rank_i2t", "rank_t2i"} <= set(table):
        return RetrievalFigures.from_table(table), "R_mean"
    if any(f"hit_{str(column).removeprefix('truth_share_')}" in table for column in table):
        return Grounding.from_table(table), "pointing_macro"
    if any(str(column).startswith("truth_") for column in table):
        return Classification.from_table(table), "auroc_macro"
    columns = ", ".join(map(str, table)) or "no column"
    raise SistaError(f"it has no truth ({columns}); give truth_<class> and score_<class>, or what `sista test` wrote")


def load(runs: Sequence[Run], metric: str | None = None) -> list[Setting]:
    """Read the predictions of all runs, check them, and return the settings.

    Args:
        runs: of any number of settings.
        metric: to compare by in all of them, before the runs' own.

    Raises:
        SistaError: a file that can't be read, images or truth that differ within a setting, a metric it does not have.
    """
    groups: dict[tuple[str, float | None], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.task, run.fraction), []).append(run)
    return [_cell(group, metric) for group in groups.values()]


def _cell(runs: list[Run], metric: str | None) -> Setting:
    tables = [_predictions(run.file) for run in runs]
    first, file = tables[0], runs[0].file
    families: list[Family] = []
    usual: set[str] = set()
    for run, table in zip(runs, tables, strict=True):
        _check_images(table["image_id"], run.file, first["image_id"], file)
        try:
            family, default = family_of(table)
        except SistaError as why:
            raise SistaError(f"{run.file}: {why}") from None
        families.append(family)
        usual.add(default)
        _check_truth(table, run.file, first, file)
    asked = {metric} if metric else {run.metric for run in runs if run.metric} or usual
    setting = Setting(runs[0].task, runs[0].fraction, min(asked), runs, families, _patients(runs, tables))
    if len(asked) > 1:
        raise SistaError(f"compare: {setting.name} has the metrics {', '.join(sorted(asked))}; give it one")
    for run, family in zip(runs, families, strict=True):
        if setting.metric not in (known := family.figures()):
            absent = f" ({'; '.join(family.absent)})" if family.absent else ""
            raise SistaError(f"{run.file}: it has no {setting.metric}{absent}; {did_you_mean(setting.metric, known)}")
    if (
        setting.kind in ("f1", "accuracy", "ece")
        and len({getattr(family, "exclusive", None) for family in families}) > 1
    ):
        raise SistaError(f"compare: {setting.name}: scores of some runs sum to 1 over the classes, those of others "
                         f"don't, and {setting.metric} is another figure then; compare by auroc_macro")  # fmt: skip
    setting.notes = _notes(setting, tables)
    return setting


def _predictions(file: Path) -> pd.DataFrame:
    """Read predictions, one row an image, in the order of the ids."""
    table = _read(file, converters={"image_id": str, "patient_id": str})  # 007 stays 007
    if "image_id" not in table:
        raise SistaError(f"{file}: no column image_id; it has {', '.join(map(str, table)) or 'none'}")
    for column in {"image_id", "patient_id"} & set(table):
        if bad := int((table[column].isna() | (table[column].astype(str) == "")).sum()):
            raise SistaError(f"{file}: {column} is empty in {bad} of {len(table)} rows; give one for each")
        table[column] = table[column].astype(str)
    if (twice := table["image_id"].duplicated()).any():
        raise SistaError(f"{file}: {table['image_id'][twice].iloc[0]!r} is there twice ({int(twice.sum())} such rows); "
                         "give each image once")  # fmt: skip
    if not len(table):
        raise SistaError(f"{file}: it has no rows; test it again")
    return table.sort_values("image_id", ignore_index=True)


def _check_images(images: pd.Series, file: Path, expected: pd.Series, first: Path) -> None:
    for has, lacks, other, part in ((first, file, images, expected), (file, first, expected, images)):
        if len(odd := part[~part.isin(other)]):
            named = ", ".join(odd[:3]) + (" …" if len(odd) > 3 else "")
            raise SistaError(f"compare: {lacks} lacks {len(odd)} of the {len(part)} images of {has} ({named}); "
                             "test all methods of a setting on the same images")  # fmt: skip


def _check_truth(table: pd.DataFrame, file: Path, first: pd.DataFrame, other: Path) -> None:
    mine, theirs = ({str(name) for name in part if str(name).startswith("truth_")} for part in (table, first))
    if odd := mine ^ theirs:
        has, lacks = (file, other) if min(odd) in mine else (other, file)
        raise SistaError(f"compare: {has} has {min(odd)}, {lacks} has not; test all on the same classes")
    for name in sorted(mine):
        if name == "truth_boxes":
            same = np.array([json.loads(a) == json.loads(b) for a, b in zip(table[name], first[name], strict=True)])
        else:
            same = (table[name] == first[name]).to_numpy() | (table[name].isna() & first[name].isna()).to_numpy()
        if not same.all():
            raise SistaError(
                f"compare: {name} of {file} and of {other} differs in {int((~same).sum())} of {len(same)} images "
                f"(first {table['image_id'][int(np.argmin(same))]}); test all on the same labels and at the same size"
            )


def _patients(runs: Sequence[Run], tables: Sequence[pd.DataFrame]) -> np.ndarray:
    """Return (N,) the patients as the files with patient_id say; the images themselves where none does."""
    told = [(run.file, table) for run, table in zip(runs, tables, strict=True) if "patient_id" in table]
    for file, table in told:
        if len(odd := table["image_id"][table["patient_id"] != told[0][1]["patient_id"]]):
            raise SistaError(f"compare: patient_id of {file} and of {told[0][0]} differs in {len(odd)} images (first "
                             f"{odd.iloc[0]}); give both the same, or leave the column out of one")  # fmt: skip
    return (told[0][1]["patient_id"] if told else tables[0]["image_id"]).to_numpy(str)


def _notes(setting: Setting, tables: Sequence[pd.DataFrame]) -> list[str]:
    family = setting.families[0]
    notes = [f"{setting.name}: {line}" for line in family.absent]
    if not any("patient_id" in table for table in tables):
        notes.append(f"{setting.name}: no file has patient_id, each image counts as a patient of its own")
    if len(set(setting.patients)) < 2:
        notes.append(f"{setting.name}: one patient alone, no interval and no p")
    if setting.kind in ("f1", "accuracy") and not getattr(family, "exclusive", True):
        notes.append(f"{setting.name}: {setting.metric} at the threshold 0.5; predictions hold no other")
    for method in setting.methods:
        seen: dict[int, Run] = {}
        for place in setting.of(method):
            told = tables[place].drop(columns="patient_id", errors="ignore").sort_index(axis=1)
            key = hash(tuple(pd.util.hash_pandas_object(told, index=False)))
            if key in seen:
                notes.append(f"{setting.name}: {seen[key].file} and {setting.runs[place].file} predict exactly the "
                             "same: two seeds that are one make SD too small")  # fmt: skip
            seen.setdefault(key, setting.runs[place])
    return notes


def of_phantom(runs: Sequence[Run]) -> bool:
    """Return whether the metrics.json beside any of the predictions says PHANTOM DATA."""
    for file in sorted({run.file.parent / "metrics.json" for run in runs}):
        if file.is_file():
            try:
                told = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as why:
                raise SistaError(f"{file}: cannot be read ({why}); test again, or move it away") from None
            if isinstance(told, dict) and told.get("phantom"):
                return True
    return False
