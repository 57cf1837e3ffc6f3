"""Figures of grounding, each a function of the images' weights: does a phrase's map point at the finding?

N images, K classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sista_pl.errors import SistaError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
TIE = 1e-6  # what interpolation makes of equal values
COLUMNS = ("share", "hit", "cnr", "iou", "prior_hit", "prior_cnr", "prior_iou")


def pointing(values: np.ndarray, region: np.ndarray, known: np.ndarray) -> float:
    """Return 1 where the highest value lies inside the region, 0 where not.

    Of several equal ones it is the share that lies inside, so that a map without any contrast hits as a random point.

    Args:
        values: (H, W) similarity.
        region: (H, W) bool.
        known: (H, W) bool, the pixels that count.
    """
    top = known & (values >= values[known].max() - TIE)
    return float(region[top].mean())


def contrast(values: np.ndarray, region: np.ndarray, known: np.ndarray) -> float:
    """Return the contrast-to-noise ratio (mean inside - mean outside) / √(variance inside + variance outside).

    Signed, unlike the first definition (Boecking et al. 2022, BioViL), so that a map that points elsewhere is below 0;
    0 without any noise, or where the region is all there is. A random map has 0 in the mean.
    """
    inside, outside = values[region & known], values[~region & known]
    if not len(inside) or not len(outside):
        return 0.0
    noise = float(np.sqrt(inside.var() + outside.var()))
    return float(inside.mean() - outside.mean()) / noise if noise > TIE else 0.0


def mean_iou(values: np.ndarray, region: np.ndarray, known: np.ndarray) -> float:
    """Return the mean IoU of region and {similarity > t} over the thresholds 0.1, 0.2, 0.3, 0.4 and 0.5.

    Those are the ones of MS-CXR's publication (Boecking et al. 2022), applied to the cosine as it is.
    """
    found = []
    for threshold in THRESHOLDS:
        said = (values > threshold) & known
        found.append((said & region).sum() / max(1, ((said | region) & known).sum()))
    return float(np.mean(found))


class Grounding:
    """The pointing game, contrast-to-noise ratio and mean IoU over the images that show a class.

    Args:
        measured: (N, K, 7) of each image and class, in the order of `COLUMNS`: the region's share of the image, whether
            the map's highest point lies in it, `contrast` and `mean_iou` of the map, and the same three of the prior.
        present: (N, K) bool, whether the image shows the class.
        names: of the classes.

    Raises:
        SistaError: shapes that disagree, no image that shows anything.
    """

    def __init__(self, measured: np.ndarray, present: np.ndarray, names: Sequence[str]):
        self.measured, self.present = np.asarray(measured, np.float64), np.asarray(present, bool)
        self.names = list(names)
        if self.measured.shape != (*self.present.shape, len(COLUMNS)) or self.present.shape[1] != len(self.names):
            raise SistaError(
                f"grounding: measured is {self.measured.shape}, present {self.present.shape}, names {len(self.names)}; "
                f"give (N, K, {len(COLUMNS)}), (N, K) and K"
            )
        there = np.asarray(self.present.any(0))
        if not there.any():
            raise SistaError(f"grounding: no image shows {', '.join(self.names)}; test a split with regions")
        self.absent = [
            f"{name} is in no image: no pointing game, CNR and mIoU"
            for name, shown in zip(self.names, there, strict=True)
            if not shown
        ]

    @classmethod
    def from_table(cls, table: pd.DataFrame) -> Grounding:
        """Return the family of a table of predictions, as `sista test` writes it.

        Args:
            table: `truth_share_<class>`, empty where the image does not show it, and `hit_`, `cnr_`, `iou_` and the
                three of the prior, one row an image.

        Raises:
            SistaError: a column is missing or holds no numbers.
        """
        names = [str(column).removeprefix("truth_share_") for column in table if str(column).startswith("truth_share_")]
        wanted = [
            [("truth_" if column == "share" else "") + f"{column}_{name}" for column in COLUMNS] for name in names
        ]
        for column in (column for columns in wanted for column in columns):
            if column not in table:
                raise SistaError(f"there is no {column}; {did_you_mean(column, map(str, table))}")
        try:
            measured = np.stack([table[columns].to_numpy(np.float64) for columns in wanted], 1)  # N K 7
        except (TypeError, ValueError) as why:
            raise SistaError(f"the columns of regions hold no numbers ({why}); give figures") from None
        return cls(np.nan_to_num(measured), ~np.isnan(measured[..., 0]), names)

    def figure(self, name: str, weights: np.ndarray | None = None) -> float:
        """Return one of the `figures`, NaN where it is not defined."""
        return self.figures(weights).get(name, float("nan"))

    def figures(self, weights: np.ndarray | None = None) -> dict[str, float]:
        """Return by name, `<figure>/<class>` over the images that show the class, and `<figure>_macro`, their mean:

        * `pointing`, `cnr`, `miou`: of the map,
        * `pointing_random`: expected of a random point, the region's share of the image,
        * `pointing_prior`, `cnr_prior`, `miou_prior`: of the prior, a map that does not look at the image,
        * `pointing_above_random`, `pointing_above_prior`, `cnr_above_prior`, `miou_above_prior`: the map less the
          baseline on the same images, so that their intervals are paired.

        Args:
            weights: (N,) >= 0 of the images; all 1 where not given.
        """
        w = np.ones(len(self.present)) if weights is None else np.asarray(weights, np.float64)
        each = w[:, None] * self.present  # N K
        total = each.sum(0)
        share, hit, cnr, iou, prior_hit, prior_cnr, prior_iou = np.einsum("nk,nkc->ck", each, self.measured)
        sums = {
            "pointing": hit, "cnr": cnr, "miou": iou, "pointing_random": share, "pointing_prior": prior_hit,
            "cnr_prior": prior_cnr, "miou_prior": prior_iou, "pointing_above_random": hit - share,
            "pointing_above_prior": hit - prior_hit, "cnr_above_prior": cnr - prior_cnr,
            "miou_above_prior": iou - prior_iou,
        }  # fmt: skip
        there = np.flatnonzero(total > 0)
        found: dict[str, float] = {}
        for name, values in sums.items():
            means = values[there] / total[there]
            found |= {f"{name}/{self.names[k]}": float(mean) for k, mean in zip(there, means, strict=True)}
            if len(there):
                found[f"{name}_macro"] = float(means.mean())
        return found
