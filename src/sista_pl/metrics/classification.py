"""Figures of classification, each a function of the images' weights.

N images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sista_pl.errors import SistaError

BINS = 15


class Classification:
    """AUROC, average precision, accuracy, F1 and calibration error of a set of predictions.

    A class without a positive or without a negative image has no AUROC and no average precision: it is left out of
    the means and named in `absent`. The same holds within a bootstrap draw.

    Args:
        truth: (N, K) 1, 0 or NaN (unknown, left out); one-hot where `kind` is `multiclass`.
        scores: (N, K) in [0, 1].
        names: of the classes.
        kind: `multilabel`, `binary` (K = 1) or `multiclass`.
        thresholds: (K,) for F1 a score of at least this is positive; 0.5 where not given, and always for accuracy.

    Raises:
        SistaError: a score that is not finite.
    """

    def __init__(
        self,
        truth: np.ndarray,
        scores: np.ndarray,
        names: Sequence[str],
        kind: str = "multilabel",
        thresholds: np.ndarray | None = None,
    ):
        bad = int((~np.isfinite(scores)).sum())
        if bad:
            raise SistaError(f"{bad} of {scores.size} scores are not finite; the model has diverged, lower its lr")
        self.names, self.exclusive, self.size = list(names), kind == "multiclass", len(truth)
        self.thresholds = np.full(len(names), 0.5) if thresholds is None else np.asarray(thresholds)
        self.known = ~np.isnan(truth)
        if self.exclusive:
            self.known &= self.known.all(1, keepdims=True)
        self.truth, self.scores = np.where(self.known, truth, 0) == 1, np.asarray(scores, np.float64)
        self.absent = []
        for name, known, target in zip(self.names, self.known.T, self.truth.T, strict=True):
            for what, count in (("positive", (known & target).sum()), ("negative", (known & ~target).sum())):
                if not count:
                    self.absent.append(f"{name} has no {what} image: no AUROC")
        self._ranked = [self._rank(k) for k in range(len(self.names))]
        if self.exclusive:
            rows = self.known[:, 0]
            self.rows = np.flatnonzero(rows)
            self.chosen, self.right = self.scores[rows].argmax(1), self.truth[rows].argmax(1)

    def _rank(self, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return known images by falling score, their truth, and where each run of equal scores ends."""
        rows = np.flatnonzero(self.known[:, k])
        rows = rows[np.argsort(-self.scores[rows, k], kind="stable")]
        score = self.scores[rows, k]
        ends = np.flatnonzero(np.append(score[1:] != score[:-1], True)) if len(rows) else rows
        return rows, self.truth[rows, k], ends

    def figures(self, weights: np.ndarray | None = None) -> dict[str, float]:
        """Return the figures by name; one that is not defined is not there.

        Args:
            weights: (N,) >= 0 of the images; all 1 where not given.
        """
        weights = np.ones(self.size) if weights is None else weights
        found: dict[str, float] = {}
        each: dict[str, list[float]] = {"auroc": [], "auprc": [], "f1": []}
        for k, name in enumerate(self.names):
            values = self._areas(k, weights) | self._f1(k, weights)
            for figure, value in values.items():
                each[figure].append(value)
                if len(self.names) > 1:
                    found[f"{figure}/{name}"] = value
        found |= {f"{figure}_macro": float(np.mean(values)) for figure, values in each.items() if values}
        return found | self._accuracy(weights) | self._calibration(weights)

    def _areas(self, k: int, weights: np.ndarray) -> dict[str, float]:
        rows, truth, ends = self._ranked[k]
        w = weights[rows]
        positive, negative = np.cumsum(w * truth), np.cumsum(w * ~truth)
        if not len(rows) or positive[-1] <= 0 or negative[-1] <= 0:
            return {}
        # equal scores are one step of the curves
        hits, alarms = positive[ends], negative[ends]
        auroc = np.sum(np.diff(alarms, prepend=0) * (hits + np.append(0, hits[:-1])) / 2) / (hits[-1] * alarms[-1])
        total = np.maximum(hits + alarms, 1e-300)
        auprc = np.sum(np.diff(hits, prepend=0) / hits[-1] * hits / total)
        return {"auroc": float(auroc), "auprc": float(auprc)}

    def _f1(self, k: int, weights: np.ndarray) -> dict[str, float]:
        if self.exclusive:
            w, said, true = weights[self.rows], self.chosen == k, self.right == k
        else:
            known = self.known[:, k]
            w, said, true = weights[known], self.scores[known, k] >= self.thresholds[k], self.truth[known, k]
        if (w * true).sum() <= 0:
            return {}
        return {"f1": float(2 * (w * (said & true)).sum() / ((w * said).sum() + (w * true).sum()))}

    def _accuracy(self, weights: np.ndarray) -> dict[str, float]:
        if self.exclusive:
            w = weights[self.rows]
            return {"accuracy": float((w * (self.chosen == self.right)).sum() / w.sum())} if w.sum() > 0 else {}
        right = (self.scores >= 0.5) == self.truth
        w = weights[:, None] * self.known
        return {"accuracy": float((w * right).sum() / w.sum())} if w.sum() > 0 else {}

    def _calibration(self, weights: np.ndarray) -> dict[str, float]:
        """The expected calibration error over 15 bins: of the chosen class, or the mean over the questions."""
        if self.exclusive:
            score = self.scores[self.rows].max(1)
            value = calibration_error(score, self.chosen == self.right, weights[self.rows])
            return {} if value is None else {"ece": value}
        values = [
            calibration_error(self.scores[known, k], self.truth[known, k], weights[known])
            for k, known in enumerate(self.known.T)
        ]
        defined = [value for value in values if value is not None]
        return {"ece": float(np.mean(defined))} if defined else {}


def calibration_error(scores: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> float | None:
    """Weighted mean over 15 equal bins of |mean score - share of truth|; None where nothing has a weight."""
    place = np.minimum((scores * BINS).astype(int), BINS - 1)
    total = weights.sum()
    if total <= 0:
        return None
    gaps = np.bincount(place, weights * (scores - truth), minlength=BINS)
    return float(np.abs(gaps).sum() / total)


def best_thresholds(truth: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return (K,) the threshold of each class with the highest F1: for validation, never for a test.

    It lies in the middle between neighbouring scores; 0.5 for a class without a positive image.

    Args:
        truth: (N, K) 1, 0 or NaN.
        scores: (N, K).
    """
    found = np.full(truth.shape[1], 0.5)
    for k in range(truth.shape[1]):
        known = ~np.isnan(truth[:, k])
        order = np.argsort(-scores[known, k], kind="stable")
        score, target = scores[known, k][order], truth[known, k][order] == 1
        if not target.any():
            continue
        hits, said = np.cumsum(target), np.arange(1, len(target) + 1)
        f1 = 2 * hits / (said + target.sum())
        last = np.append(score[1:] != score[:-1], True)  # a threshold can't cut between equal scores
        best = int(np.where(last, f1, -1).argmax())
        below = score[best + 1] if best + 1 < len(score) else 0.0
        found[k] = (score[best] + below) / 2
    return found
