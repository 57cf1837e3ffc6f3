"""CheXpert-v1.0 in full, -small and -downsampled, with the official test set where it was downloaded too."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sista_pl.data.formats import READERS, Release, Row, is_phantom, need_columns, read_csv, refuse_duplicates
from sista_pl.data.splits import NAMED_SPLITS, shuffled_counts, split_hash, split_table
from sista_pl.errors import SistaError, did_you_mean

LABELS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
)  # fmt: skip
COMPETITION = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
VAL_IMAGES, TRAIN_FRONTALS = 5_000, 191_027
TEST_FILES = ("groundtruth.csv", "test_labels.csv", "test.csv")
_OPTIONS: dict[str, tuple[str, ...]] = {
    "uncertain": ("competition", "unknown", "ones", "zeros"),
    "labels": ("all", "competition"),
    "blank": ("absent", "unknown"),
    "test": ("valid", "official"),
    "views": ("frontal", "lateral"),
}
_ONES = {"Atelectasis": 1.0, "Edema": 1.0, "Pleural Effusion": 1.0, "Cardiomegaly": 0.0, "Consolidation": 0.0}
_KNOWN = {"1.0": 1.0, "1": 1.0, "0.0": 0.0, "0": 0.0, "-1.0": -1.0, "-1": -1.0, "": None}
_STUDY = r"(?:[^/\0]+/)?(train|valid|test)/(patient[0-9]+)/(study[0-9]+)"
_IMAGE = re.compile(_STUDY + r"/(view[0-9]+_(frontal|lateral)\.(?:jpe?g|png))")
_FOLDER = re.compile(_STUDY)


@NAMED_SPLITS.register("chexpert/competition")
def chexpert_competition(table: pd.DataFrame, seed: int = 0) -> list[str]:
    """Test is the expert-labelled list; val are whole patients of train with 5,000 frontal films together.

    Which 5,000 images MGCA and GLoRIA drew was never published. Of a smaller release val takes the same share, 5,000
    of 191,027. A patient with more films than are still wanted is passed over. Laterals follow their patient, so that
    nobody's split depends on the views that are read. `list` says where a row stands ("train" or other), `frontal`
    whether its film is frontal.
    """
    train = table[(table["list"] == "train").to_numpy()]
    frontals = {str(name): int(count) for name, count in train.groupby("patient_id")["frontal"].sum().items()}
    wanted = math.ceil(VAL_IMAGES * min(1.0, sum(frontals.values()) / TRAIN_FRONTALS))
    val: set[str] = set()
    # dealt to one part only, patients stand in the order of their hash
    for patient in shuffled_counts(list(frontals), {"order": len(frontals)}, seed) if frontals else ():
        if not wanted:
            break
        if frontals[patient] <= wanted:
            val.add(patient)
            wanted -= frontals[patient]
    places = zip(table["list"], table["patient_id"], strict=True)
    return ["test" if place != "train" else "val" if patient in val else "train" for place, patient in places]


@READERS.register("chexpert")
def read_chexpert(
    root: Path,
    split: str = "chexpert/competition",
    uncertain: str = "competition",
    labels: str = "all",
    views: Sequence[str] = ("frontal",),
    blank: str = "absent",
    test: str = "valid",
) -> Release:
    """Read CheXpert: one row an image, without report. No image file is touched.

    Args:
        root: the folder with `train.csv` and `train/`, or the one that holds it (`CheXpert-v1.0-small`, say).
        split: "chexpert/competition".
        uncertain: what -1 becomes in train and val: "competition" (Atelectasis, Edema and Pleural Effusion 1,
            Cardiomegaly and Consolidation 0, any other NaN), "unknown" (NaN), "ones" or "zeros".
        labels: "all" 14, or "competition", the five of the leaderboard.
        views: "frontal", "lateral" or both; films of another view are not read.
        blank: a blank cell says that the report does not mention the finding: "absent" takes it as 0, as the
            competition's protocol does, "unknown" as NaN.
        test: "valid" takes the 200 studies of `valid.csv`; "official" the 500 of `groundtruth.csv`, `test_labels.csv`
            or `test.csv` with `test/`, and leaves `valid.csv` out. In either no label is replaced: experts wrote 1
            or 0, and what is neither is NaN.

    Raises:
        SistaError: no table, a missing column, a value that is no label, a repeated image, an unknown option.
    """
    views = [views] if isinstance(views, str) else list(views)
    given = {"uncertain": [uncertain], "labels": [labels], "blank": [blank], "test": [test], "views": views}
    for option, values in given.items():
        for value in values:
            if value not in _OPTIONS[option]:
                raise SistaError(f"chexpert: {option} {value!r}; {did_you_mean(str(value), _OPTIONS[option])}")
    if split not in (own := [name for name in NAMED_SPLITS if name.startswith("chexpert/")]):
        raise SistaError(f"chexpert: split {split!r}; {did_you_mean(split, own)}")
    root = Path(root)
    folder = _find(root)
    names = LABELS if labels == "all" else COMPETITION
    absent = 0.0 if blank == "absent" else math.nan
    replaced = {
        "unknown": {}, "ones": dict.fromkeys(names, 1.0), "zeros": dict.fromkeys(names, 0.0), "competition": _ONES,
    }[uncertain]  # fmt: skip

    skipped: list[tuple[str, str]] = []
    versions: list[str] = []
    rows = _read_images(folder / "train.csv", "train", names, replaced, absent, skipped, versions)
    if test == "valid":
        rows += _read_images(folder / "valid.csv", "valid", names, {}, math.nan, skipped, versions)
    else:
        rows += _read_test(folder, names, skipped, versions)
    ids = pd.DataFrame({
        "image_id": [row.image_id for row in rows], "patient_id": [row.patient_id for row in rows],
        "list": [row.split for row in rows], "frontal": ["_lateral" not in row.image_id for row in rows],
    })  # fmt: skip
    kept = []
    for row, part, frontal in zip(rows, split_table(split, ids), ids["frontal"].tolist(), strict=True):
        row.split = part
        if ("frontal" if frontal else "lateral") in views:
            kept.append(row)
    options: dict[str, Any] = {
        "split": split, "uncertain": uncertain, "labels": labels, "views": views, "blank": blank, "test": test,
        "split_sha256": split_hash([row.image_id for row in kept], [row.split for row in kept]),
    }  # fmt: skip
    version = next((name for name in versions if re.fullmatch(r"CheXpert-v1\.0[\w.-]*", name)), "CheXpert")
    return Release("chexpert", version, kept, skipped, is_phantom(folder, folder.parent), folder, options, split)


def _find(root: Path) -> Path:
    """Return the folder with `train.csv`: the root or one in it."""
    if not root.is_dir():
        raise SistaError(f"{root}: no such folder; give the folder of CheXpert as root")
    if (root / "train.csv").is_file():
        return root
    found = sorted(folder for folder in root.glob("CheXpert*") if (folder / "train.csv").is_file())
    if len(found) > 1:
        raise SistaError(f"{root}: holds {', '.join(folder.name for folder in found)}; give one of them as root")
    if not found:
        raise SistaError(f"{root}: train.csv not found; give the folder of CheXpert-v1.0 or -small as root")
    return found[0]


def _read_images(
    file: Path, place: str, names: Sequence[str], uncertain: dict[str, float], blank: float,
    skipped: list[tuple[str, str]], versions: list[str],
) -> list[Row]:  # fmt: skip
    """Read a table of one row an image; `place` is the folder that its images lie in."""
    if not file.is_file():
        raise SistaError(f"{file.parent}: {file.name} not found; download it again, or see the option test")
    table = read_csv(file)
    need_columns(file, list(table.columns), ["Path", *names])
    values = _labels(file, table, names, uncertain, blank)
    positions = table["AP/PA"].tolist() if "AP/PA" in table.columns else [""] * len(table)
    rows, numbers = [], []
    columns = zip(table["Path"].tolist(), positions, values, strict=True)
    for number, (path, position, known) in enumerate(columns, start=2):
        found = _IMAGE.fullmatch(path)
        source = f"{file.name}:{number}"
        if found is None or found[1] != place:
            skipped.append((path.replace("\0", "") or source, f"{source}: {path[:100]!r} is no image of {place}"))
            continue
        versions.append(path.split("/", 1)[0])
        numbers.append(number)
        rows.append(_row(file.parent, place, found[2], found[3], found[4], position, known, source))
    refuse_duplicates(file, [row.image_id for row in rows], numbers)
    return rows


def _row(
    folder: Path, place: str, patient: str, study: str, name: str, position: str, labels: dict[str, float], source: str
) -> Row:
    image = f"{place}/{patient}/{study}/{name}"
    view = "Lateral" if "_lateral" in name else position
    return Row(image, patient, f"{patient}/{study}", folder / image, view, place, "", "", labels, source=source)


def _labels(
    file: Path, table: pd.DataFrame, names: Sequence[str], uncertain: dict[str, float], blank: float
) -> list[dict[str, float]]:
    columns = []
    for name in names:
        texts = table[name].tolist()
        for text in dict.fromkeys(texts):
            if text not in _KNOWN:
                row = texts.index(text) + 2
                raise SistaError(f"{file}: row {row}: {name} is {text!r}; 1, 0, -1 or blank is known")
        value = {**_KNOWN, **dict.fromkeys(("-1", "-1.0"), uncertain.get(name, math.nan)), "": blank}
        columns.append([value[text] for text in texts])
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _read_test(folder: Path, names: Sequence[str], skipped: list[tuple[str, str]], versions: list[str]) -> list[Row]:
    """Read the official test set, by image (`Path`) or by study (`Study`), whose images are then listed."""
    file = next((folder / name for name in TEST_FILES if (folder / name).is_file()), None)
    if file is None:
        raise SistaError(
            f"{folder}: none of {', '.join(TEST_FILES)} found; put the labels of CheXpert's test set and its folder "
            "test there, or set test to valid"
        )
    table = read_csv(file)
    if "Study" not in table.columns:
        return _read_images(file, "test", names, {}, math.nan, skipped, versions)
    need_columns(file, list(table.columns), names)
    rows, numbers = [], []
    known = _labels(file, table, names, {}, math.nan)
    for number, (path, labels) in enumerate(zip(table["Study"].tolist(), known, strict=True), start=2):
        found = _FOLDER.fullmatch(path)
        source = f"{file.name}:{number}"
        if found is None or found[1] != "test":
            skipped.append((path.replace("\0", "") or source, f"{source}: {path[:100]!r} is no study of test"))
            continue
        versions.append(path.split("/", 1)[0])
        study = folder / "test" / found[2] / found[3]
        images = sorted(image.name for image in study.glob("view*") if _IMAGE.fullmatch(f"{path}/{image.name}"))
        if not images:
            skipped.append((f"{found[2]}/{found[3]}", f"{source}: no image of the study in test"))
        rows += [_row(folder, "test", found[2], found[3], name, "", labels, source) for name in images]
        numbers += [number] * len(images)
    refuse_duplicates(file, [row.image_id for row in rows], numbers)
    return rows
