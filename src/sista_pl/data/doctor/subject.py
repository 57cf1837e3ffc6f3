"""What is examined: a prepared store or a raw release, in one form; and what a check says of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from sista_pl.data.formats import Release
from sista_pl.data.images import IGNORE, BadImage, fit, fit_box, fit_mask, image_size, read_gray, read_mask
from sista_pl.data.masks import Rle
from sista_pl.data.store import Store

LEVELS = ("ok", "note", "warning", "problem")
_PIXELS = 256


@dataclass
class Check:
    """What one check says.

    Args:
        name: of the check.
        level: one of `LEVELS`.
        text: one line.
        step: what to do next; "" where nothing.
        figures: all numbers, for `doctor.json`.
        examples: (rows that stand side by side, what is wrong with them).
    """

    name: str
    level: str
    text: str
    step: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    examples: list[tuple[list[int], str]] = field(default_factory=list)


@dataclass
class Subject:
    """What is examined.

    Args:
        kind: "store" or "release".
        table: (N) the columns of a store's manifest; `file`, the path of the image, where `kind` is "release".
        rows: of the table, those with pixels.
        image: row → (size, size) uint8.
        mask: row → the same, or None where no image has a mask.
        size: side of the squares in pixels.
        skipped: what the reader or the preparation left out, and why.
        key: of the hash that stands for an image's id.
    """

    kind: str
    name: str
    version: str
    split: str
    phantom: bool
    options: dict[str, Any]
    table: pd.DataFrame
    rows: np.ndarray
    image: Callable[[int], np.ndarray]
    mask: Callable[[int], np.ndarray] | None
    size: int
    skipped: list[tuple[str, str]]
    key: str

    @classmethod
    def of_store(cls, store: Store) -> Subject:
        table = store.manifest  # first: with it the files are compared with their list
        with (store.path / "skipped.csv").open(encoding="utf-8", newline="") as file:
            skipped = [(row[0], row[1]) for row in list(csv.reader(file))[1:]]
        info = store.info
        return cls(
            "store", store.name, store.version, info["split"]["name"], store.phantom, info["options"], table,
            np.arange(len(store)), store.image, store.mask if store.has_masks else None, store.size, skipped,
            store.hash,
        )  # fmt: skip

    @classmethod
    def of_release(cls, release: Release, pixels: int = 0, seed: int = 0) -> Subject:
        """Look at a reader's rows, and at the pixels of `pixels` images drawn at random."""
        names = ("image_id", "patient_id", "study_id", "view", "split", "findings", "impression", "source")
        columns: dict[str, Any] = {name: [getattr(row, name) for row in release.rows] for name in names}
        for label in dict.fromkeys(label for row in release.rows for label in row.labels):
            columns[f"label_{label}"] = np.array([row.labels.get(label, np.nan) for row in release.rows], np.float32)
        columns["has_mask"] = np.array([row.mask is not None for row in release.rows], bool)
        columns["boxes"] = [None if row.boxes is None else json.dumps(row.boxes) for row in release.rows]
        columns["file"] = [str(row.image) for row in release.rows]
        table = pd.DataFrame(columns)
        skipped = list(release.skipped)
        images, masks = {}, {}
        order = np.random.default_rng(seed).permutation(len(table))[:pixels]
        sizes = np.zeros((2, len(table)), np.int32)
        for index in sorted(order.tolist()):
            row = release.rows[index]
            try:
                image, (width, height) = read_gray(row.image, _PIXELS), image_size(row.image)
                mask = np.full((_PIXELS, _PIXELS), IGNORE, np.uint8)
                if isinstance(row.mask, Rle):
                    mask = fit_mask(row.mask.decode(), _PIXELS)
                elif row.mask is not None:
                    mask = read_mask(row.mask, _PIXELS)
                if row.boxes is not None:
                    boxes = [fit_box(box, width, height, _PIXELS) for box in row.boxes]
                    table.loc[index, "boxes"] = json.dumps(boxes)
            except BadImage as why:
                skipped.append((row.image_id, str(why)))
                continue
            images[index], masks[index], sizes[:, index] = image, mask, (width, height)
        table["width"], table["height"] = sizes
        return cls(
            "release", release.name, release.version, release.split, release.phantom, release.options, table,
            np.array(sorted(images), int), images.__getitem__,
            masks.__getitem__ if table["has_mask"].any() else None, _PIXELS, skipped, release.name,
        )  # fmt: skip

    def content(self, row: int) -> tuple[int, int, int, int]:
        """Return left, top, right, bottom of the image in its square; the rest is padding."""
        width, height = (int(self.table[name].to_numpy()[row]) for name in ("width", "height"))
        scale, dx, dy = fit(width, height, self.size)
        right, bottom = dx + max(1, round(width * scale)), dy + max(1, round(height * scale))
        return dx, dy, min(self.size, right), min(self.size, bottom)


def share(part: float, whole: float) -> str:
    """Return "12.3%"."""
    ratio = part / whole if whole else 0.0
    return f"{ratio:.1%}" if ratio >= 0.001 or not part else "< 0.1%"


def worst(checks: Sequence[Check]) -> str:
    """Return the highest level."""
    return max((check.level for check in checks), key=LEVELS.index, default="ok")
