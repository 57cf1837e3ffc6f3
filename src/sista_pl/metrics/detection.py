"""Figures of detection, each a function of the images' weights.

N images, K classes, M true boxes and D detections (of one image, or of one class over all images), T IoU thresholds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sista_pl.errors import SistaError
from sista_pl.metrics.classification import run_ends

if TYPE_CHECKING:
    import pandas as pd

# by linspace, as pycocotools has them: 0.6 written out is another number
IOUS = np.concatenate([np.linspace(0.4, 0.45, 2), np.linspace(0.5, 0.95, 10)])
COCO, LOW, HALF, HIT = slice(2, 12), slice(0, 8), slice(2, 3), 0  # of IOUS: .50-.95, .40-.75, .50, and FROC's .40
AVERAGES = {"map_coco": COCO, "map_40_75": LOW, "ap_50": HALF}
RECALLS = np.linspace(0, 1, 101)
RATES = (0.125, 0.25, 0.5, 1, 2, 4, 8)  # false positives an image
MOST = 100  # detections of one class in one image; the surest count
SURE = 0.5  # `map_mgca` sees no detection below


@dataclass
class Ranked:
    """Detections of one class by falling score, matched once.

    Args:
        image: (D,) place of each detection's image.
        scores: (D,).
        hits: T times the rising places of the detections that found a true box.
        truth: (M,) place of each true box's image.
    """

    image: np.ndarray
    scores: np.ndarray
    hits: list[np.ndarray]
    truth: np.ndarray

    def __post_init__(self) -> None:
        self.ends = run_ends(self.scores)
        self.hits_until = np.searchsorted(self.hits[HIT], self.ends, side="right")

    def within(self, image: np.ndarray, score: float) -> Ranked:
        """Return what is in these images (N,) bool, and of the detections those of at least this score."""
        kept = image[self.image] & (self.scores >= score)
        place = np.cumsum(kept) - 1
        hits = [place[hit[kept[hit]]] for hit in self.hits]
        return Ranked(self.image[kept], self.scores[kept], hits, self.truth[image[self.truth]])

    def precision(self, weights: np.ndarray) -> np.ndarray | None:
        """Return (T,) the average precision at each of `IOUS`; None where no true box has a weight."""
        positive = weights[self.truth].sum()
        if positive <= 0:
            return None
        w = weights[self.image]
        said = np.cumsum(w)
        found = np.zeros(len(self.hits))
        for t, hits in enumerate(self.hits):
            true = np.cumsum(w[hits])
            # between two hits precision falls and recall stays: the hits alone make the envelope
            precision = true / np.maximum(said[hits], np.finfo(float).tiny)
            envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
            found[t] = envelope[np.searchsorted(true / positive, RECALLS)].mean()
        return found

    def froc(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Return false positives an image and sensitivity, a point a distinct score; None without a true box."""
        positive = weights[self.truth].sum()
        if positive <= 0:
            return None
        w = weights[self.image]
        true = np.append(0.0, np.cumsum(w[self.hits[HIT]]))[self.hits_until]
        return (np.cumsum(w)[self.ends] - true) / weights.sum(), true / positive


class Detection:
    """Average precision of several protocols, and FROC, of a set of detections.

    Matching is COCO's: class by class the surest detection first, each takes the free true box of highest IoU, at most
    100 detections of a class in an image count. Figures equal those of the images repeated as often as their weights
    say, but where one image has two detections of a class and exactly the same score.

    A class without a true box is left out of the means and named in `absent`; without any true box nothing is
    defined. Without detections all figures are 0.

    Args:
        truth: N times (M, 4) x y w h of the true boxes, x and y of the upper left corner.
        truth_labels: N times (M,) class, 0 to K - 1.
        predictions: N times (D, 4) x y w h.
        labels: N times (D,) class.
        scores: N times (D,), higher is surer; in [0, 1] for `map_mgca`.
        names: of the K classes.

    Raises:
        SistaError: lengths that disagree, a label that is no class, a box or score that is not finite.
    """

    def __init__(
        self,
        truth: Sequence[np.ndarray],
        truth_labels: Sequence[np.ndarray],
        predictions: Sequence[np.ndarray],
        labels: Sequence[np.ndarray],
        scores: Sequence[np.ndarray],
        names: Sequence[str],
    ):
        self.names, self.size = list(names), len(truth)
        if not len(truth) == len(truth_labels) == len(predictions) == len(labels) == len(scores):
            raise SistaError("detection: truth and predictions are of different numbers of images; give one list each")
        true = _flat("truth", truth, truth_labels, None, len(self.names))
        said = _flat("prediction", predictions, labels, scores, len(self.names))
        self.ranked = [_match(k, *true, *said) for k in range(len(self.names))]
        told = np.bincount(said[1][said[3] >= SURE], minlength=self.size) > 0
        self._published = [each.within(told & (np.bincount(true[1], minlength=self.size) > 0), SURE)
                           for each in self.ranked]  # fmt: skip
        self.absent = [
            f"{name} has no true box: left out of the means"
            for name, each in zip(self.names, self.ranked, strict=True)
            if not len(each.truth)
        ]
        if len(self.absent) == len(self.names):
            self.absent = ["no image has a true box: no mAP, FROC and sensitivity"]

    @classmethod
    def from_table(cls, table: pd.DataFrame) -> Detection:
        """Return the family of a table of predictions, as `sista test` writes it.

        Boxes are rounded there, so that figures may differ from those of the test in the fourth decimal.

        Args:
            table: `truth_boxes` and `predicted_boxes`, one row an image, each a JSON list of `{"category", "x", "y",
                "w", "h"}`, and `"score"` where predicted.

        Raises:
            SistaError: no such list; what the class itself refuses.
        """
        try:
            sides = [[json.loads(text) for text in table[column]] for column in ("truth_boxes", "predicted_boxes")]
            names = sorted({str(box["category"]) for side in sides for boxes in side for box in boxes})
            place = {name: k for k, name in enumerate(names)}
            corners = [[np.array([[float(box[key]) for key in "xywh"] for box in boxes]) for boxes in side]
                       for side in sides]  # fmt: skip
            labels = [[np.array([place[str(box["category"])] for box in boxes]) for boxes in side] for side in sides]
            scores = [np.array([float(box["score"]) for box in boxes]) for boxes in sides[1]]
        except (KeyError, TypeError, ValueError) as why:
            raise SistaError(f"the columns of boxes hold no JSON of category, x, y, w, h, score ({why!r})") from None
        return cls(corners[0], labels[0], corners[1], labels[1], scores, names)

    def figure(self, name: str, weights: np.ndarray | None = None) -> float:
        """Return one of the `figures`, NaN where it is not defined; of average precisions it computes no more."""
        kind, _, of = name.partition("/")
        if kind not in AVERAGES or (of and len(self.names) == 1):
            return self.figures(weights).get(name, float("nan"))
        w = np.ones(self.size) if weights is None else np.asarray(weights, np.float64)
        chosen = [self.ranked[k] for k, each in enumerate(self.names) if of in ("", each)]
        values = [p[AVERAGES[kind]].mean() for each in chosen if (p := each.precision(w)) is not None]
        return float(np.mean(values)) if values else float("nan")

    def figures(self, weights: np.ndarray | None = None) -> dict[str, float]:
        """Return by name, each the mean over the classes that have a true box, what is not defined left out:

        * `map_coco`: mean over IoU .50:.95:.05 of the average precision, interpolated at 101 recalls,
        * `map_40_75`: the same over IoU .40:.75:.05,
        * `ap_50`: the same at IoU .50,
        * `map_mgca`: `map_40_75` as MGCA's code takes it, for comparison with published numbers only: detections below
          0.5 are dropped, then all images without a detection or without a true box. Missed images and false alarms on
          normal ones don't count: it is **inflated**. 0 where no image is left.
        * `sensitivity@<r>fp`: share of the true boxes found (IoU at least .40) at the lowest threshold with at most r
          false positives an image; not interpolated. A second detection of a found box is a false positive.
        * `froc`: mean of these over r = 1/8, 1/4, 1/2, 1, 2, 4, 8.

        With several classes `<figure>/<class>` stands beside the first three and `froc`.

        Args:
            weights: (N,) >= 0 of the images; all 1 where not given.
        """
        w = np.ones(self.size) if weights is None else np.asarray(weights, np.float64)
        found: dict[str, float] = {}
        rates: list[np.ndarray] = []
        each: dict[str, list[float]] = {}
        for name, ranked in zip(self.names, self.ranked, strict=True):
            precision, curve = ranked.precision(w), ranked.froc(w)
            if precision is None or curve is None:
                continue
            rates.append(_sensitivity(*curve))
            values = {figure: precision[ious] for figure, ious in AVERAGES.items()} | {"froc": rates[-1]}
            for figure, value in values.items():
                each.setdefault(figure, []).append(float(value.mean()))
                if len(self.names) > 1:
                    found[f"{figure}/{name}"] = float(value.mean())
        if not rates:
            return {}
        found |= {figure: float(np.mean(values)) for figure, values in each.items()}
        found |= {f"sensitivity@{r:g}fp": float(v) for r, v in zip(RATES, np.mean(rates, 0), strict=True)}
        published = [precision[LOW].mean() for one in self._published if (precision := one.precision(w)) is not None]
        return found | {"map_mgca": float(np.mean(published)) if published else 0.0}


def _sensitivity(alarms: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Return the sensitivity at each of `RATES`."""
    return np.append(0.0, found)[np.searchsorted(alarms, RATES, side="right")]


def _flat(
    what: str, boxes: Sequence[np.ndarray], labels: Sequence[np.ndarray], scores: Sequence[np.ndarray] | None, k: int
) -> tuple[np.ndarray, ...]:
    """Return boxes (n, 4), image (n,), label (n,), and scores (n,) where given, of all images, the surest first."""
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        if len(box) != len(label) or (scores is not None and len(box) != len(scores[i])):
            raise SistaError(f"detection: image {i} has {len(box)} {what} boxes but another number of labels or scores")
    flat = np.concatenate([np.zeros((0, 4)), *(np.asarray(box, np.float64).reshape(-1, 4) for box in boxes)])
    image = np.repeat(np.arange(len(boxes)), [len(box) for box in boxes])
    label = np.concatenate([np.zeros(0, np.int64), *(np.asarray(each, np.int64).reshape(-1) for each in labels)])
    if len(label) and not 0 <= label.min() <= label.max() < k:
        raise SistaError(f"detection: {what} labels run from {label.min()} to {label.max()}; there are {k} classes")
    if bad := int((~np.isfinite(flat)).any(1).sum()):
        raise SistaError(f"{bad} of {len(flat)} {what} boxes are not finite; the model has diverged, lower its lr")
    if scores is None:
        return flat, image, label
    score = np.concatenate([np.zeros(0), *(np.asarray(each, np.float64).reshape(-1) for each in scores)])
    if bad := int((~np.isfinite(score)).sum()):
        raise SistaError(f"{bad} of {len(score)} scores are not finite; the model has diverged, lower its lr")
    order = np.argsort(-score, kind="stable")
    return flat[order], image[order], label[order], score[order]


def _match(
    k: int,
    truth: np.ndarray,
    truth_image: np.ndarray,
    truth_label: np.ndarray,
    boxes: np.ndarray,
    image: np.ndarray,
    label: np.ndarray,
    scores: np.ndarray,
) -> Ranked:
    """Match the detections of class k; the arguments are of `_flat`."""
    mine = np.flatnonzero(label == k)
    by_image = mine[np.argsort(image[mine], kind="stable")]  # within an image still by falling score
    first = np.searchsorted(image[by_image], image[by_image])
    kept = by_image[np.arange(len(by_image)) - first < MOST]
    truth, truth_image = truth[truth_label == k], truth_image[truth_label == k]
    hit = np.zeros((len(IOUS), len(boxes)), bool)
    for i in np.unique(truth_image):
        here = kept[slice(*np.searchsorted(image[kept], [i, i + 1]))]
        there = truth[slice(*np.searchsorted(truth_image, [i, i + 1]))]
        hit[:, here] = greedy(overlaps(boxes[here], there))
    kept = np.sort(kept)
    hits = [np.flatnonzero(found) for found in hit[:, kept]]
    return Ranked(image[kept], scores[kept], hits, truth_image)


def overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the IoU of boxes (D, 4) and (M, 4), x y w h: (D, M)."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, :2] + a[:, None, 2:], b[None, :, :2] + b[None, :, 2:])
    width, height = np.moveaxis(np.maximum(high - low, 0), -1, 0)
    both = width * height
    total = (a[:, 2] * a[:, 3])[:, None] + (b[:, 2] * b[:, 3])[None] - both
    return np.divide(both, total, out=np.zeros_like(both), where=both > 0)


def greedy(iou: np.ndarray) -> np.ndarray:
    """Let each detection, the surest first, take the free true box of highest IoU, the last among equals as in COCO.

    Args:
        iou: (D, M), D by falling score.

    Returns:
        (T, D) bool: whether it found one, at each of `IOUS`.
    """
    found = np.zeros((len(IOUS), len(iou)), bool)
    taken = np.zeros((len(IOUS), iou.shape[1]), bool)
    least = IOUS[:, None]
    for d in np.flatnonzero(iou.max(1, initial=0) >= IOUS[0]):
        free = np.where(taken | (iou[d] < least), -1.0, iou[d])
        best = iou.shape[1] - 1 - free[:, ::-1].argmax(1)
        found[:, d] = free[np.arange(len(IOUS)), best] >= 0
        taken[found[:, d], best[found[:, d]]] = True
    return found
