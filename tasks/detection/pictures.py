"""Pictures of a test of detection: curves, and films with their true and predicted boxes.

N images.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sista_pl import figures
from sista_pl.figures import Case, Curve
from sista_pl.metrics.curves import froc
from sista_pl.metrics.detection import HALF, HIT, RATES, Detection, Ranked
from sista_pl.predictions import Predicted

if TYPE_CHECKING:
    from sista_tasks.detection.task import DetectionTask

SHOWN = 6  # films a row
ALARMS = 1.0  # false positives an image at the threshold of the films


def draw_curves(family: Detection, path: Path, notice: str) -> None:
    """Draw FROC (IoU .40) and precision–recall curves (IoU .50) of each class that has a true box."""
    responses, precisions = [], []
    for k, (name, ranked) in enumerate(zip(family.names, family.ranked, strict=True)):
        if not len(ranked.truth):
            continue
        x, y = froc(family, k)
        seen = x <= RATES[-1]
        responses.append(Curve(x[seen], y[seen], f"{name} ({len(ranked.truth)} boxes)"))
        recall, precision = precision_recall(ranked)
        precisions.append(Curve(recall, precision, name))
    panels = [
        ("FROC, IoU .40", "false positives an image", "sensitivity", responses),
        ("precision and recall, IoU .50", "recall", "precision", precisions),
    ]
    figures.draw_curves(panels, path, notice or "test")


def precision_recall(ranked: Ranked) -> tuple[np.ndarray, np.ndarray]:
    """Return recall and precision at IoU .50 of a class with a true box, from (0, 1), a point a distinct score."""
    hits = np.searchsorted(ranked.hits[HALF.start], ranked.ends, side="right")
    return np.append(0.0, hits / len(ranked.truth)), np.append(1.0, hits / (ranked.ends + 1))


def threshold(family: Detection, k: int) -> float:
    """Return the lowest score of class k with at most `ALARMS` false positives an image, infinity where none has."""
    ranked = family.ranked[k]
    alarms = (ranked.ends + 1 - ranked.hits_until) / family.size
    allowed = ranked.ends[alarms <= ALARMS]
    return float(ranked.scores[allowed[-1]]) if len(allowed) else np.inf


def counts(family: Detection, cuts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (N,) the true boxes of each image, those found at these thresholds (K,), and the false alarms there."""
    truth, found, alarms = np.zeros((3, family.size), int)
    for ranked, cut in zip(family.ranked, cuts, strict=True):
        sure = ranked.scores >= cut
        hit = np.zeros(len(sure), bool)
        hit[ranked.hits[HIT]] = True
        truth += np.bincount(ranked.truth, minlength=family.size)
        found += np.bincount(ranked.image[sure & hit], minlength=family.size)
        alarms += np.bincount(ranked.image[sure & ~hit], minlength=family.size)
    return truth, found, alarms


def draw_cases(task: DetectionTask, found: Predicted, family: Detection, path: Path, notice: str) -> None:
    """Draw the films whose boxes are found best, those with the most missed ones, and the most false alarms."""
    data, items, rows = task.trainer.datamodule, found.per_image(), found.rows
    cuts = np.array([threshold(family, k) for k in range(len(family.names))])
    truth, hits, alarms = counts(family, cuts)
    # among equals the surest
    best = np.lexsort((-found.values[:, 0], alarms, -hits))
    missed, false = (np.lexsort((-found.values[:, 0], -number)) for number in (truth - hits, alarms))
    groups = [
        ("found", best[(hits > 0)[best]]), ("missed", missed[(truth > hits)[missed]]),
        ("false alarms", false[(alarms > 0)[false]]),
    ]  # fmt: skip
    off = (data.size - data.crop) // 2
    cut = slice(off, off + data.crop)
    lines = []
    for name, places in groups:
        cases = []
        for place in places[:SHOWN]:
            (true,), said = task.truth(rows[place : place + 1]), items[place]
            said = said[said[:, 1] >= cuts[said[:, 0].astype(int)]]
            caption = f"{hits[place]} of {truth[place]} found\n{alarms[place]} false"
            image = data.store.image(int(rows[place]))[cut, cut]
            cases.append(Case(image, caption, None, None, true[:, 2:], said[:, 2:], said[:, 1]))
        lines.append((name, cases))
    told = f"truth green, prediction orange, at most {ALARMS:g} false alarm an image and class, IoU .40"
    figures.draw_cases(lines, path, f"{told}\n{notice}")
