"""Figures of segmentation, each a function of the images' weights.

N images; counts are of pixels, ignored ones left out before.
"""

from __future__ import annotations

import numpy as np


class Segmentation:
    """The Dice coefficients of the literature, each under its own name, and IoU.

    Args:
        intersection: (N,) pixels in both masks.
        predicted: (N,) pixels of the prediction.
        truth: (N,) pixels of the truth.
    """

    def __init__(self, intersection: np.ndarray, predicted: np.ndarray, truth: np.ndarray):
        self.counts = tuple(np.asarray(counts, np.float64) for counts in (intersection, predicted, truth))
        both, total = self.counts[0], self.counts[1] + self.counts[2]
        self.positive = self.counts[2] > 0
        self.dice = np.divide(2 * both, total, out=np.ones_like(total), where=total > 0)
        self.iou = np.divide(both, total - both, out=np.ones_like(total), where=total > 0)
        self.absent = [] if self.positive.any() else ["no image has an object: no dice_positive"]

    def figures(self, weights: np.ndarray | None = None) -> dict[str, float]:
        """Return by name, what is not defined left out:

        * `dice_image_empty1`: mean over images, 1 where both masks are empty (the published one),
        * `dice_positive`: mean over images with an object,
        * `dice_dataset`: 2 ΣI / (ΣP + ΣT), every pixel alike,
        * `iou`: mean over images, 1 where both are empty,
        * `empty_specificity`: share of the images without an object whose prediction is empty.

        Args:
            weights: (N,) >= 0 of the images; all 1 where not given.
        """
        both, predicted, truth = self.counts
        w = np.ones(len(truth)) if weights is None else weights
        found: dict[str, float] = {}
        if w.sum() > 0:
            found["dice_image_empty1"] = float((w * self.dice).sum() / w.sum())
            found["iou"] = float((w * self.iou).sum() / w.sum())
        if (w * self.positive).sum() > 0:
            found["dice_positive"] = float((w * self.dice * self.positive).sum() / (w * self.positive).sum())
        if (w * (predicted + truth)).sum() > 0:
            found["dice_dataset"] = float(2 * (w * both).sum() / (w * (predicted + truth)).sum())
        empty = w * ~self.positive
        if empty.sum() > 0:
            found["empty_specificity"] = float((empty * (predicted == 0)).sum() / empty.sum())
        return found
