"""Points of curves, for drawing.

N images.
"""

from __future__ import annotations

import numpy as np

from sista_pl.metrics.classification import run_ends
from sista_pl.metrics.detection import Detection


def _steps(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return hits and false alarms by falling threshold, a step a distinct score; None with one kind of image only."""
    known = ~np.isnan(truth)
    order = np.argsort(-scores[known], kind="stable")
    target = truth[known][order] == 1
    if not target.any() or target.all():
        return None
    ends = run_ends(scores[known][order])
    return np.cumsum(target)[ends], np.cumsum(~target)[ends]


def roc(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return 1 - specificity and sensitivity, from (0, 0) to (1, 1); empty without a positive or a negative image.

    Args:
        truth: (N,) 1, 0 or NaN (unknown, left out).
        scores: (N,).
    """
    steps = _steps(truth, scores)
    if steps is None:
        return np.zeros(0), np.zeros(0)
    hits, alarms = steps
    return np.append(0.0, alarms / alarms[-1]), np.append(0.0, hits / hits[-1])


def precision_recall(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return recall and precision, from (0, 1), a point a distinct score; arguments and empty as `roc`.

    Average precision is the area of its steps, each of the height of its right end.
    """
    steps = _steps(truth, scores)
    if steps is None:
        return np.zeros(0), np.zeros(0)
    hits, alarms = steps
    return np.append(0.0, hits / hits[-1]), np.append(1.0, hits / (hits + alarms))


def froc(family: Detection, k: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return false positives an image and sensitivity of a class, from (0, 0); empty where it has no true box.

    Args:
        family: of the test.
        k: place of the class.
    """
    curve = family.ranked[k].froc(np.ones(family.size))
    if curve is None:
        return np.zeros(0), np.zeros(0)
    return np.append(0.0, curve[0]), np.append(0.0, curve[1])
