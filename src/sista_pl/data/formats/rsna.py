"""RSNA Pneumonia Detection Challenge, stage 2: DICOM films, one row a box."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from sista_pl.data.formats import READERS, Release, Row, is_phantom, need_columns, read_csv
from sista_pl.data.splits import NAMED_SPLITS, shuffled_counts, split_hash, split_table
from sista_pl.errors import SistaError

LABELS_FILE = "stage_2_train_labels.csv"
CLASSES_FILE = "stage_2_detailed_class_info.csv"
IMAGES = "stage_2_train_images"
_NORMAL = {"Normal": 1.0, "No Lung Opacity / Not Normal": 0.0, "Lung Opacity": 0.0}


@NAMED_SPLITS.register("rsna/mgca")
def rsna_mgca(table: pd.DataFrame, seed: int = 0) -> list[str]:
    """16,010 / 5,337 / 5,337 patients, the sizes that MGCA publishes; which patients they were was never published."""
    dealt = shuffled_counts(table["patient_id"].tolist(), {"train": 16010, "val": 5337, "test": 5337}, seed)
    return [dealt[name] for name in table["patient_id"]]


@NAMED_SPLITS.register("rsna/gloria-cls")
def rsna_gloria(table: pd.DataFrame, seed: int = 0) -> list[str]:
    """70 / 15 / 15 % of the patients, the shares of GLoRIA's classification; its own draw is not repeated."""
    dealt = shuffled_counts(table["patient_id"].tolist(), {"train": 70, "val": 15, "test": 15}, seed)
    return [dealt[name] for name in table["patient_id"]]


@READERS.register("rsna")
def read_rsna(root: Path, split: str = "rsna/mgca") -> Release:
    """Read RSNA stage 2: a patient is one film; labels `Pneumonia` and `No Finding`, boxes of the category `opacity`.

    The 3,000 films of `stage_2_test_images` have no labels and are left aside.

    Args:
        root: the folder with `stage_2_train_labels.csv` and `stage_2_train_images/`.
        split: "rsna/mgca" or "rsna/gloria-cls".

    Raises:
        SistaError: no labels file, a missing column, a target that is neither 0 nor 1, an unknown split.
    """
    root = Path(root)
    file = root / LABELS_FILE
    if not file.is_file():
        raise SistaError(f"{root}: {LABELS_FILE} not found; give the folder of RSNA stage 2 as root")
    table = read_csv(file)
    need_columns(file, list(table.columns), ["patientId", "x", "y", "width", "height", "Target"])
    normal = _classes(root / CLASSES_FILE)
    targets: dict[str, float] = {}
    boxes: dict[str, list] = {}
    first: dict[str, int] = {}
    skipped: list[tuple[str, str]] = []
    bad: set[str] = set()
    columns = ["patientId", "x", "y", "width", "height", "Target"]
    for number, (name, *place, target) in enumerate(table[columns].itertuples(index=False, name=None), start=2):
        source = f"{LABELS_FILE}:{number}"
        if target not in ("0", "1"):
            raise SistaError(f"{file}: row {number}: Target is {target!r}; 0 or 1 is known")
        if not name or "\0" in name or Path(name).name != name or name in (".", ".."):
            skipped.append((name or source, f"{source}: {name!r} is no patient id"))
            continue
        first.setdefault(name, number)
        if targets.setdefault(name, float(target)) != float(target):
            raise SistaError(f"{file}: row {number}: {name} is 0 and 1; remove one of its rows")
        boxes.setdefault(name, [])
        if target == "1":
            x, y, w, h = (_number(value) for value in place)
            if all(map(math.isfinite, (x, y, w, h))) and w > 0 and h > 0:
                box = {"category": "opacity", "x": x, "y": y, "w": w, "h": h}
                if box not in boxes[name]:  # repeated rows occur
                    boxes[name].append(box)
            elif name not in bad:
                bad.add(name)
                skipped.append((name, f"{source}: box {place} is no rectangle"))
    names = [name for name in targets if name not in bad]
    parts = split_table(split, pd.DataFrame({"image_id": names, "patient_id": names}))
    folder = root / IMAGES if (root / IMAGES).is_dir() else root
    rows = [
        Row(name, name, name, folder / f"{name}.dcm", "", part, "", "",
            {"Pneumonia": targets[name], "No Finding": normal.get(name, math.nan)}, None, boxes[name],
            f"{LABELS_FILE}:{first[name]}")
        for name, part in zip(names, parts, strict=True)
    ]  # fmt: skip
    options = {"split": split, "split_sha256": split_hash(names, parts)}
    return Release("rsna", "RSNA Pneumonia stage 2", rows, skipped, is_phantom(root), folder, options, split)


def _classes(file: Path) -> dict[str, float]:
    """Return {patient: 1 where the film is normal}; rows are repeated for each box."""
    if not file.is_file():
        return {}
    table = read_csv(file)
    need_columns(file, list(table.columns), ["patientId", "class"])
    for number, name in enumerate(table["class"], start=2):
        if name not in _NORMAL:
            raise SistaError(f"{file}: row {number}: class {name!r}; known: {', '.join(_NORMAL)}")
    return dict(zip(table["patientId"], table["class"].map(_NORMAL), strict=True))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
