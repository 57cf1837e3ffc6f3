"""NIH ChestX-ray14: PNG films, a row an image, boxes for some of the test images."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from sista_pl.data.formats import (
    READERS,
    Release,
    Row,
    index_images,
    is_phantom,
    need_columns,
    refuse_duplicates,
)
from sista_pl.data.reports import BadReport, decode_text
from sista_pl.data.splits import NAMED_SPLITS, grouped_split, split_hash, split_table
from sista_pl.errors import SistaError

LABELS = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia",
    "Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax",
)  # fmt: skip
TABLES = {"Data_Entry_2017_v2020.csv": "ChestX-ray14 v2020", "Data_Entry_2017.csv": "ChestX-ray14 2017"}
LISTS = ("train_val_list.txt", "test_list.txt")
BOXES = "BBox_List_2017.csv"
_COLUMNS = ("Image Index", "Finding Labels", "Follow-up #", "Patient ID", "View Position")


@NAMED_SPLITS.register("chestxray14/official")
def chestxray14_official(table: pd.DataFrame, seed: int = 0) -> list[str]:
    """The published test list; of the other patients 10 % are validation. An image in no list is left out.

    Args:
        table: with `official`, "train_val", "test" or "".
        seed: another seed, another validation set.
    """
    dealt = grouped_split(table["patient_id"].tolist(), seed, (0.9, 0.1, 0.0))
    part = {"test": "test", "": ""}
    return [part.get(official, own) for official, own in zip(table["official"], dealt, strict=True)]


@NAMED_SPLITS.register("chestxray14/grouped")
def chestxray14_grouped(table: pd.DataFrame, seed: int = 0) -> list[str]:
    """80 / 10 / 10 % of the patients, where the published lists are not at hand."""
    return grouped_split(table["patient_id"].tolist(), seed)


@READERS.register("chestxray14")
def read_chestxray14(root: Path, split: str = "chestxray14/official") -> Release:
    """Read ChestX-ray14: the 14 labels and `No Finding`; boxes where the release has some, unknown elsewhere.

    Args:
        root: the folder with `Data_Entry_2017_v2020.csv` (or the older table), the two lists, `BBox_List_2017.csv`,
            and the images in it or below it.
        split: "chestxray14/official", or "chestxray14/grouped" where the lists are missing.

    Raises:
        SistaError: no table, a missing column or list, an unknown label.
    """
    root = Path(root)
    name = next((name for name in TABLES if (root / name).is_file()), None)
    if name is None:
        raise SistaError(f"{root}: {next(iter(TABLES))} not found; give the folder of ChestX-ray14 as root")
    file = root / name
    table = _table(file)
    where, (boxes, sources) = index_images(root, (".png",)), _boxes(root / BOXES)
    rows: list[Row] = []
    listed = {image for _, (image, *_) in table}
    skipped = [(image, f"{source}: {image!r} is not in {name}") for image, source in sources.items()
               if image not in listed]  # fmt: skip
    numbers: list[int] = []
    for number, (image, found, follow, patient, view) in table:
        source = f"{name}:{number}"
        named = [] if found == "No Finding" else found.split("|")
        for label in named:
            if label not in LABELS:
                raise SistaError(f"{file}: row {number}: label {label!r}; known: No Finding, {', '.join(LABELS)}")
        if image not in where:
            skipped.append((image or source, f"{source}: no image of that name below the root"))
        elif not patient:
            skipped.append((image, f"{source}: no patient id"))
        elif (own := boxes.get(image)) is not None and any(not _is_box(box) for box in own):
            skipped.append((image, f"{source}: a box of it in {BOXES} is no rectangle"))
        else:
            labels = {label: float(label in named) for label in LABELS} | {"No Finding": float(not named)}
            study = f"{patient}-{follow}"
            rows.append(Row(image, patient, study, where[image], view, "", "", "", labels, None, own, source))
            numbers.append(number)
    refuse_duplicates(file, [row.image_id for row in rows], numbers)
    ids = {"image_id": [row.image_id for row in rows], "patient_id": [row.patient_id for row in rows]}
    official = _official(root) if split == "chestxray14/official" else {}
    parts = split_table(split, pd.DataFrame({**ids, "official": [official.get(i, "") for i in ids["image_id"]]}))
    kept = []
    for row, part in zip(rows, parts, strict=True):
        row.split = part
        if part:
            kept.append(row)
        else:
            skipped.append((row.image_id, f"{row.source}: in neither {' nor '.join(LISTS)}"))
    options = {"split": split, "split_sha256": split_hash(ids["image_id"], parts)}
    return Release("chestxray14", TABLES[name], kept, skipped, is_phantom(root), root, options, split)


def _fields(file: Path, needed: Sequence[str], least: int = 0) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the header and (number, fields) of the other rows, that are as many as the `needed` columns ask for.

    Commas inside the brackets of a header make more names of it than there are columns, so that pandas cannot.
    """
    try:
        text = io.StringIO(decode_text(file.read_bytes()), newline="")
        lines = [[field.strip() for field in line] for line in csv.reader(text)]
    except (BadReport, OSError, csv.Error) as why:
        raise SistaError(f"{file}: not a readable CSV ({why}); download it again") from None
    header = lines[0] if lines else []
    need_columns(file, header, needed)
    least = max(least, *(header.index(name) + 1 for name in needed))
    rows = [(number, line) for number, line in enumerate(lines[1:], start=2) if line]
    for number, line in rows:
        if len(line) < least:
            raise SistaError(f"{file}: row {number} has {len(line)} fields; download the file again")
    return header, rows


def _table(file: Path) -> list[tuple[int, list[str]]]:
    """Return (number, the columns that are needed) of each row; all of them are left of the brackets."""
    header, rows = _fields(file, _COLUMNS)
    places = [header.index(name) for name in _COLUMNS]
    return [(number, [line[place] for place in places]) for number, line in rows]


def _official(root: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, part in zip(LISTS, ("train_val", "test"), strict=True):
        file = root / name
        if not file.is_file():
            raise SistaError(f"{root}: {name} not found; download it, or set the option split=chestxray14/grouped")
        try:
            names = decode_text(file.read_bytes()).split()
        except BadReport as why:
            raise SistaError(f"{file}: not a readable list ({why}); download it again") from None
        for image in names:
            if found.setdefault(image, part) != part:
                raise SistaError(f"{file}: {image} is in both lists; download them again")
    return found


def _boxes(file: Path) -> tuple[dict[str, list[dict]], dict[str, str]]:
    """Return {image: boxes} and {image: "file:row" of its first box}.

    The release writes `Bbox [x,y,w,h]` over four columns, and Infiltrate for Infiltration.
    """
    found: dict[str, list[dict]] = {}
    sources: dict[str, str] = {}
    if not file.is_file():
        return found, sources
    for number, (image, label, *place) in _fields(file, ("Image Index", "Finding Label"), least=6)[1]:
        category = "Infiltration" if label == "Infiltrate" else label
        if category not in LABELS:
            raise SistaError(f"{file}: row {number}: label {label!r}; known: {', '.join(LABELS)}")
        box = dict(zip("xywh", (_number(value) for value in place[:4]), strict=True))
        found.setdefault(image, []).append({"category": category, **box})
        sources.setdefault(image, f"{file.name}:{number}")
    return found, sources


def _is_box(box: dict) -> bool:
    return all(math.isfinite(box[key]) for key in "xywh") and box["w"] > 0 and box["h"] > 0


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
