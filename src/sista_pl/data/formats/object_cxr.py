"""Object-CXR: JPEG films with foreign objects, marked as rectangles, ellipses and polygons."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from sista_pl.data.formats import READERS, Release, Row, inside, is_phantom, need_columns, read_csv, refuse_duplicates
from sista_pl.data.splits import NAMED_SPLITS, shuffled_counts, split_hash, split_table
from sista_pl.errors import BadImage, SistaError

CATEGORY = "foreign_object"
_SHAPES = {"0": "rectangle", "1": "ellipse", "2": "polygon"}


@NAMED_SPLITS.register("object_cxr/official")
def object_cxr_official(table: pd.DataFrame, seed: int = 0) -> list[str]:
    """`dev.csv` is the test; 10 % of `train.csv` are validation (MGCA's shares). The release names no patients.

    Args:
        table: with `official`, "train" or "dev".
        seed: another seed, another validation set.
    """
    train = table["image_id"][table["official"] == "train"].tolist()
    dealt = shuffled_counts(train, {"train": 90, "val": 10}, seed)
    return [dealt.get(name, "test") for name in table["image_id"]]


@READERS.register("object_cxr")
def read_object_cxr(root: Path, split: str = "object_cxr/official") -> Release:
    """Read Object-CXR: label `foreign_object` and a box around each, a polygon's included.

    Args:
        root: the folder with `train.csv`, `dev.csv`, `train/` and `dev/`.
        split: "object_cxr/official".

    Raises:
        SistaError: no train.csv, a missing column.
    """
    root = Path(root)
    if not (root / "train.csv").is_file():
        raise SistaError(f"{root}: train.csv not found; give the folder of Object-CXR as root")
    rows: list[Row] = []
    skipped: list[tuple[str, str]] = []
    official: list[str] = []
    for part in ("train", "dev"):
        file = root / f"{part}.csv"
        if not file.is_file():
            continue
        table = read_csv(file)
        column = "image_path" if "image_path" in table and "image_name" not in table else "image_name"
        need_columns(file, list(table.columns), [column, "annotation"])
        folder = root / part / part if (root / part / part).is_dir() else root / part
        numbers = []
        pairs = table[[column, "annotation"]].itertuples(index=False, name=None)
        for number, (name, annotation) in enumerate(pairs, start=2):
            source = f"{file.name}:{number}"
            # the release's page writes /path/00001.jpg; the folder of a part is flat
            path = inside(folder, name.lstrip("/"))
            if path is None:
                skipped.append((name or source, f"{source}: {name!r} is no file of the release"))
                continue
            try:
                boxes = parse_annotation(annotation)
            except BadImage as why:
                skipped.append((name, f"{source}: {why}"))
                continue
            image_id = f"{part}/{path.name}"
            labels = {CATEGORY: float(bool(boxes))}
            rows.append(
                Row(image_id, image_id, image_id, folder / path.name, "", part, "", "", labels, None, boxes, source)
            )
            numbers.append(number)
            official.append(part)
        refuse_duplicates(file, [row.image_id for row in rows[-len(numbers) :]] if numbers else [], numbers)
    ids = {"image_id": [row.image_id for row in rows], "patient_id": [row.patient_id for row in rows]}
    parts = split_table(split, pd.DataFrame({**ids, "official": official}))
    for row, dealt in zip(rows, parts, strict=True):
        row.split = dealt
    options = {"split": split, "split_sha256": split_hash(ids["image_id"], parts)}
    return Release("object_cxr", "Object-CXR", rows, skipped, is_phantom(root), root, options, split)


def parse_annotation(text: str) -> list[dict]:
    """Return the boxes of "TYPE x1 y1 x2 y2 …;…": 0 rectangle, 1 ellipse (two corners each), 2 polygon (its points).

    Raises:
        BadImage: another type, not numbers in pairs, too few of them, no area.
    """
    boxes = []
    for shape in filter(None, (part.strip() for part in text.split(";"))):
        kind, *words = shape.split()
        name = _SHAPES.get(kind)
        if name is None:
            raise BadImage(f"shape of type {kind[:20]!r}; 0 rectangle, 1 ellipse and 2 polygon are known")
        try:
            values = [float(word) for word in words]
        except ValueError:
            raise BadImage(f"{name} with {' '.join(words)[:40]!r}; numbers are known") from None
        few = len(values) != 4 if kind != "2" else len(values) < 6 or len(values) % 2
        if few or not all(map(math.isfinite, values)):
            raise BadImage(f"{name} of {len(values)} numbers; two corners, or three points and more of a polygon")
        xs, ys = values[::2], values[1::2]
        wide, high = max(xs) - min(xs), max(ys) - min(ys)
        box = {"category": CATEGORY, "x": min(xs), "y": min(ys), "w": wide, "h": high}
        if not (wide > 0 and high > 0):
            raise BadImage(f"{name} without an area")
        boxes.append(box)
    return boxes
