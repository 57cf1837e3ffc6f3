"""The picture of a test of segmentation: best and worst masks, and false alarms."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sista_pl import figures
from sista_pl.data.transfer import fill_boxes
from sista_pl.figures import Case
from sista_pl.predictions import Predicted

if TYPE_CHECKING:
    from sista_tasks.segmentation.task import SegmentationTask


def draw_cases(task: SegmentationTask, found: Predicted, path: Path, notice: str) -> None:
    """Draw the masks of the best, middle and worst images with an object, and the largest false alarms."""
    data = task.trainer.datamodule
    intersection, predicted, truth = found.values.T
    dice = 2 * intersection / np.maximum(predicted + truth, 1)
    positive, empty = np.flatnonzero(truth > 0), np.flatnonzero((truth == 0) & (predicted > 0))
    by_dice = positive[np.argsort(-dice[positive], kind="stable")]
    middle = max(0, len(by_dice) // 2 - 3)
    groups = [
        ("best", by_dice[:6]), ("middle", by_dice[middle : middle + 6]), ("worst", by_dice[::-1][:6]),
        ("false alarms", empty[np.argsort(-predicted[empty], kind="stable")][:6]),
    ]  # fmt: skip
    off = (data.size - data.crop) // 2
    cut = slice(off, off + data.crop)
    lines = []
    for name, places in groups:
        cases = []
        for place, mask in zip(places, task.masks_of(found, places), strict=True):
            row = int(found.rows[place])
            whole = fill_boxes(data.boxes[row][0], data.size) if data.masks_from_boxes else data.store.mask(row)
            caption = f"Dice {dice[place]:.2f}" if truth[place] else f"{int(predicted[place])} px"
            cases.append(Case(data.store.image(row)[cut, cut], caption, (whole == 255)[cut, cut], mask))
        lines.append((name, cases))
    figures.draw_cases(lines, path, f"truth green, prediction orange\n{notice}")
