"""SIIM-ACR Pneumothorax: stage 1 and stage 2 as Kaggle released them, and the PNG mirror."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from sista_pl.data.formats import READERS, Release, Row, is_phantom, need_columns, read_csv
from sista_pl.data.images import BadImage, image_size
from sista_pl.data.masks import Rle
from sista_pl.data.splits import NAMED_SPLITS, grouped_split, shuffled_counts, split_table
from sista_pl.errors import SistaError

LABEL = "Pneumothorax"
_STAGES = {
    # table: (images, version)
    "train-rle.csv": ("dicom-images-train", "SIIM-ACR stage 1"),
    "stage_2_train.csv": ("stage_2_images", "SIIM-ACR stage 2"),
}
_MIRROR = ("stage_1_train_images.csv", "stage_1_test_images.csv")


@NAMED_SPLITS.register("siim/grouped")
def siim_grouped(table: pd.DataFrame, seed: int = 0) -> list[str]:
    """80 / 10 / 10 % by image, the finest unit that the ids know."""
    return grouped_split(table["patient_id"].tolist(), seed)


@NAMED_SPLITS.register("siim/mgca-rows")
def siim_mgca_rows(table: pd.DataFrame, seed: int = 0) -> list[str]:
    """70 / 15 / 15 % of the table's *rows*, training negatives cut to the number of positives: a known defect.

    A film with several rows comes into several splits, each with a part of its mask. Only for comparison with figures
    that were published on such a split. `positive` says which rows hold run lengths.
    """
    numbers = [f"{n}" for n in range(len(table))]
    dealt = shuffled_counts(numbers, {"train": 70, "val": 15, "test": 15}, seed)
    splits = np.array([dealt[n] for n in numbers], dtype=object)
    positive = table["positive"].to_numpy(bool)
    negatives = np.flatnonzero((splits == "train") & ~positive)
    splits[negatives[((splits == "train") & positive).sum() :]] = ""
    return splits.tolist()


@READERS.register("siim")
def read_siim(root: Path, split: str = "siim/grouped") -> Release:
    """Read SIIM-ACR: label `Pneumothorax` and its mask; a film without one has an empty mask.

    Run lengths are relative (each start counts from the end of the run before) and run down the columns; several rows
    of a film are one mask.

    Args:
        root: the folder with `train-rle.csv` and `dicom-images-train/`, with `stage_2_train.csv` and `stage_2_images/`,
            or with `stage_1_train_images.csv`, `png_images/` and `png_masks/`; the first that is there is read.
        split: "siim/grouped" or "siim/mgca-rows".

    Raises:
        SistaError: no table, a missing column, no image, an unknown split, `siim/mgca-rows` of the mirror.
    """
    root = Path(root)
    by_rows = split == "siim/mgca-rows"
    stage = next((name for name in _STAGES if (root / name).is_file()), None)
    if stage is not None:
        folder, version = _STAGES[stage]
        rows, skipped = _read_stage(root / stage, root / folder, by_rows)
    elif not any((root / name).is_file() for name in _MIRROR):
        known = ", ".join([*_STAGES, _MIRROR[0]])
        raise SistaError(f"{root}: none of {known} found; give the folder of SIIM-ACR as root")
    elif by_rows:
        raise SistaError(f"{root}: siim/mgca-rows needs the table of run lengths; use siim/grouped")
    else:
        version = "SIIM-ACR stage 1, PNG mirror"
        rows, skipped = _read_mirror(root)
    ids = pd.DataFrame({
        "image_id": [row.image_id for row in rows], "patient_id": [row.patient_id for row in rows],
        "positive": [row.labels[LABEL] == 1 for row in rows],
    })  # fmt: skip
    for row, part in zip(rows, split_table(split, ids), strict=True):
        row.split = part
    rows = [row for row in rows if row.split]
    return Release("siim", version, rows, skipped, is_phantom(root), root, {"split": split}, split)


def _read_stage(file: Path, folder: Path, by_rows: bool) -> tuple[list[Row], list[tuple[str, str]]]:
    table = read_csv(file)
    # stage 1 writes `ImageId, EncodedPixels`
    table.columns = [name.strip() for name in table.columns]
    need_columns(file, list(table.columns), ["ImageId", "EncodedPixels"])
    where = {path.stem: path for path in sorted(folder.rglob("*.dcm"))}
    if not where:
        raise SistaError(f"{folder}: no .dcm file in it; put the films there, as they were released")
    width, height = _size(folder, list(where.values()))
    rows: dict[str, Row] = {}
    runs: dict[str, list[str]] = {}
    skipped = []
    for number, (name, text) in enumerate(zip(table["ImageId"].str.strip(), table["EncodedPixels"], strict=True), 2):
        source = f"{file.name}:{number}"
        if name not in where:
            skipped.append((name or source, f"{source}: no film {name!r} in {folder.name}"))
            continue
        text = text.strip()
        positive = text not in ("-1", "")
        key = f"{name}#{number}" if by_rows else name
        row = rows.setdefault(key, Row(key, name, name, where[name], "", "", "", "", {LABEL: 0.0}, source=source))
        if positive:
            row.labels[LABEL] = 1.0
            if text not in runs.setdefault(key, []):
                runs[key].append(text)
    for key, row in rows.items():
        row.mask = Rle(tuple(runs.get(key, ())), width, height, relative=True)
    return list(rows.values()), skipped


def _size(folder: Path, films: list[Path]) -> tuple[int, int]:
    """Width and height of the films, all alike in the release: of the first that can be read."""
    for film in films:
        try:
            return image_size(film)
        except BadImage:
            continue
    raise SistaError(f"{folder}: not one film can be read; download them again")


def _read_mirror(root: Path) -> tuple[list[Row], list[tuple[str, str]]]:
    rows: dict[str, Row] = {}
    skipped = []
    plain: Callable[[str], bool] = lambda name: bool(name) and Path(name).name == name and name != ".."  # noqa: E731
    for name in _MIRROR:
        file = root / name
        if not file.is_file():
            continue
        table = read_csv(file)
        need_columns(file, list(table.columns), ["new_filename", "ImageId", "has_pneumo"])
        columns = zip(table["new_filename"], table["ImageId"], table["has_pneumo"], strict=True)
        for number, (image, patient, positive) in enumerate(columns, start=2):
            source = f"{name}:{number}"
            if positive not in ("0", "1"):
                raise SistaError(f"{file}: row {number}: has_pneumo is {positive!r}; 0 or 1 is known")
            if not plain(image) or not patient:
                skipped.append((patient or source, f"{source}: {image!r} is no file name of png_images"))
            elif image in rows:
                skipped.append((image, f"{source}: repeats the image {image!r}"))
            else:
                rows[image] = Row(image, patient, patient, root / "png_images" / image, "", "", "", "",
                                  {LABEL: float(positive)}, root / "png_masks" / image, None, source)  # fmt: skip
    return list(rows.values()), skipped
