"""Figures of segmentation, each a function of the images' weights.

N images, K classes, H W pixels; counts are of pixels, ignored ones left out before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sista_pl.errors import SistaError

if TYPE_CHECKING:
    import pandas as pd

IGNORED, OBJECT = 127, 255


class Segmentation:
    """The Dice coefficients of the literature, each under its own name, and IoU.

    Args:
        intersection: (N,) pixels in both masks; (N, K) of several classes.
        predicted: likewise, pixels of the prediction.
        truth: likewise, pixels of the truth.
        names: of the K classes.

    Raises:
        SistaError: the counts' shapes or `names` disagree.
    """

    def __init__(
        self,
        intersection: np.ndarray,
        predicted: np.ndarray,
        truth: np.ndarray,
        names: Sequence[str] | None = None,
    ):
        counts = [np.asarray(count, np.float64) for count in (intersection, predicted, truth)]
        self.names = ["object"] if names is None else list(names)
        counts = [count[:, None] if count.ndim == 1 else count for count in counts]
        if any(count.shape != (len(counts[0]), len(self.names)) for count in counts):
            shapes = ", ".join(str(count.shape) for count in counts)
            raise SistaError(f"segmentation: counts of {shapes} for {len(self.names)} classes; give (N, K) and K names")
        self.both, self.predicted, self.truth = counts
        total = self.predicted + self.truth
        self.positive = self.truth > 0
        self.dice = np.divide(2 * self.both, total, out=np.ones_like(total), where=total > 0)
        self.iou = np.divide(self.both, total - self.both, out=np.ones_like(total), where=total > 0)
        self.absent = []
        for name, positive, pixels in zip(self.names, self.positive.T, total.T, strict=True):
            of = f" of {name}" if len(self.names) > 1 else ""
            if not positive.any():
                lost = "dice_positive" if pixels.any() else "dice_positive, no dice_dataset"
                self.absent.append(f"no image has an object{of}: no {lost}")
            elif positive.all():
                self.absent.append(f"every image has an object{of}: no empty_specificity")

    @classmethod
    def from_table(cls, table: pd.DataFrame) -> Segmentation:
        """Return the family of a table of predictions, as `sista test` writes it.

        Args:
            table: `intersection_pixels`, `predicted_pixels` and `truth_pixels`, one row an image, one object class.

        Raises:
            SistaError: a count is no number, or more pixels are in both masks than in one of them.
        """
        try:
            both, predicted, truth = (
                table[f"{name}_pixels"].to_numpy(np.float64) for name in ("intersection", "predicted", "truth")
            )
        except (TypeError, ValueError) as why:
            raise SistaError(f"the columns of pixels hold no numbers ({why}); give counts") from None
        if bad := int((~((both >= 0) & (both <= predicted) & (both <= truth))).sum()):
            raise SistaError(f"{bad} of {len(table)} rows have more intersection_pixels than a mask has; check them")
        return cls(both, predicted, truth)

    def figure(self, name: str, weights: np.ndarray | None = None) -> float:
        """Return one of the `figures`, NaN where it is not defined."""
        return self.figures(weights).get(name, float("nan"))

    def figures(self, weights: np.ndarray | None = None) -> dict[str, float]:
        """Return by name, what is not defined left out:

        * `dice_image_empty1`: mean over images, 1 where both masks are empty (the published one),
        * `dice_positive`: mean over images with an object,
        * `dice_dataset`: 2 ΣI / (ΣP + ΣT), every pixel alike,
        * `iou`: mean over images, 1 where both are empty,
        * `empty_specificity`: share of the images without an object whose prediction is empty.

        With several classes `<figure>/<class>` stands beside the figure, their mean.

        Args:
            weights: (N,) >= 0 of the images; all 1 where not given.
        """
        w = np.ones(len(self.truth)) if weights is None else np.asarray(weights, np.float64)
        each = [self._of_class(k, w) for k in range(len(self.names))]
        found: dict[str, float] = {}
        for figure in ("dice_image_empty1", "dice_positive", "dice_dataset", "iou", "empty_specificity"):
            values = {f"{figure}/{name}": of[figure] for name, of in zip(self.names, each, strict=True) if figure in of}
            if values:
                found[figure] = float(np.mean(list(values.values())))
                found |= values if len(self.names) > 1 else {}
        return found

    def _of_class(self, k: int, w: np.ndarray) -> dict[str, float]:
        positive, empty = w * self.positive[:, k], w * ~self.positive[:, k]
        total = self.predicted[:, k] + self.truth[:, k]
        terms = {
            "dice_image_empty1": (w @ self.dice[:, k], w.sum()),
            "dice_positive": (positive @ self.dice[:, k], positive.sum()),
            "dice_dataset": (2 * w @ self.both[:, k], w @ total),
            "iou": (w @ self.iou[:, k], w.sum()),
            "empty_specificity": (empty @ (self.predicted[:, k] == 0), empty.sum()),
        }
        return {name: float(part / whole) for name, (part, whole) in terms.items() if whole > 0}
