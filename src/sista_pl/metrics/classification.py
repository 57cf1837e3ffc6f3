"""Figures of classification, each a function of the images' weights.

N images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sista_pl.errors import SistaError, did_you_mean

BINS = 15
KINDS = ("multilabel", "binary", "multiclass")


class Classification:
    """AUROC, average precision, accuracy, F1 and calibration error of a set of predictions.

    A class without a positive or without a negative image has no AUROC and no average precision: it is left out of
    the means and named in `absent`. The same holds within a bootstrap draw.

    Args:
        truth: (N, K) 1, 0 or NaN (unknown, left out); one-hot where `kind` is `multiclass`.
        scores: (N, K) in [0, 1].
        names: of the classes.
        kind: `multilabel`, `binary` (K = 1) or `multiclass`.
        thresholds: (K,) a score of at least this is positive, for F1 and accuracy; 0.5 where not given. `multiclass`
            takes the class with the highest score instead.

    Raises:
        SistaError: a score that is not finite or outside [0, 1]; a truth that is none; shapes that disagree.
    """

    def __init__(
        self,
        truth: np.ndarray,
        scores: np.ndarray,
        names: Sequence[str],
        kind: str = "multilabel",
        thresholds: np.ndarray | None = None,
    ):
        truth, scores = np.asarray(truth, np.float64), np.asarray(scores, np.float64)
        self.names, self.exclusive, self.size = list(names), kind == "multiclass", len(truth)
        _check(truth, scores, self.names, kind)
        self.thresholds = np.full(len(self.names), 0.5) if thresholds is None else np.asarray(thresholds)
        self.known = ~np.isnan(truth)
        if self.exclusive:
            self.known &= self.known.all(1, keepdims=True)
        self.truth, self.scores = np.where(self.known, truth, 0) == 1, scores
        self.absent = []
        for name, known, target in zip(self.names, self.known.T, self.truth.T, strict=True):
            if not (known & target).any():
                self.absent.append(f"{name} has no positive image: no AUROC, average precision and F1")
            elif not (known & ~target).any():
                self.absent.append(f"{name} has no negative image: no AUROC and average precision")
        self._ranked = [self._rank(k) for k in range(len(self.names))]
        if self.exclusive:
            self.rows = np.flatnonzero(self.known[:, 0])
            self.chosen, self.right = self.scores[self.rows].argmax(1), self.truth[self.rows].argmax(1)

    def _rank(self, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return known images by falling score, their truth, and where each run of equal scores ends."""
        rows = np.flatnonzero(self.known[:, k])
        rows = rows[np.argsort(-self.scores[rows, k], kind="stable")]
        return rows, self.truth[rows, k], run_ends(self.scores[rows, k])

    def figures(self, weights: np.ndarray | None = None) -> dict[str, float]:
        """Return the figures by name, one that is not defined left out:

        * `auroc/<class>`, `auprc/<class>` (average precision, not interpolated), `f1/<class>`,
        * `auroc_macro`, `auprc_macro`, `f1_macro`: their means over the classes that have one,
        * `accuracy`: share of right answers, over all known pairs of image and class where not `multiclass`,
        * `ece`: calibration error, see `calibration_error`; mean over classes, or of the chosen class's score.

        Args:
            weights: (N,) >= 0 of the images; all 1 where not given.
        """
        weights = np.ones(self.size) if weights is None else np.asarray(weights, np.float64)
        found: dict[str, float] = {}
        each: dict[str, list[float]] = {"auroc": [], "auprc": [], "f1": []}
        for k, name in enumerate(self.names):
            for figure, value in (self._areas(k, weights) | self._f1(k, weights)).items():
                each[figure].append(value)
                found[f"{figure}/{name}"] = value
        found |= {f"{figure}_macro": float(np.mean(values)) for figure, values in each.items() if values}
        return found | self._accuracy(weights) | self._calibration(weights)

    def _areas(self, k: int, weights: np.ndarray) -> dict[str, float]:
        rows, truth, ends = self._ranked[k]
        w = weights[rows]
        # equal scores are one step of the curves
        hits, alarms = np.cumsum(w * truth)[ends], np.cumsum(w * ~truth)[ends]
        if not len(rows) or hits[-1] <= 0 or alarms[-1] <= 0:
            return {}
        auroc = np.sum(np.diff(alarms, prepend=0) * (hits + np.append(0, hits[:-1])) / 2) / (hits[-1] * alarms[-1])
        said = np.maximum(hits + alarms, np.finfo(float).tiny)  # 0 before the first image that has a weight
        auprc = np.sum(np.diff(hits, prepend=0) * hits / said) / hits[-1]
        return {"auroc": float(auroc), "auprc": float(auprc)}

    def _f1(self, k: int, weights: np.ndarray) -> dict[str, float]:
        if self.exclusive:
            w, said, true = weights[self.rows], self.chosen == k, self.right == k
        else:
            known = self.known[:, k]
            w, said, true = weights[known], self.scores[known, k] >= self.thresholds[k], self.truth[known, k]
        if w @ true <= 0:
            return {}
        return {"f1": float(2 * (w @ (said & true)) / (w @ said + w @ true))}

    def _accuracy(self, weights: np.ndarray) -> dict[str, float]:
        if self.exclusive:
            right, known = self.chosen == self.right, np.ones(len(self.rows), bool)
            weights = weights[self.rows]
        else:
            right = (((self.scores >= self.thresholds) == self.truth) & self.known).sum(1)
            known = self.known.sum(1)
        total = weights @ known
        return {"accuracy": float(weights @ right / total)} if total > 0 else {}

    def _calibration(self, weights: np.ndarray) -> dict[str, float]:
        if self.exclusive:
            score = self.scores[self.rows].max(1, initial=0)
            values = [calibration_error(score, self.chosen == self.right, weights[self.rows])]
        else:
            values = [
                calibration_error(self.scores[known, k], self.truth[known, k], weights[known])
                for k, known in enumerate(self.known.T)
            ]
        defined = [value for value in values if value is not None]
        return {"ece": float(np.mean(defined))} if defined else {}


def _check(truth: np.ndarray, scores: np.ndarray, names: list[str], kind: str) -> None:
    if kind not in KINDS:
        raise SistaError(f"classification: kind is {kind!r}; {did_you_mean(kind, KINDS)}")
    if truth.ndim != 2 or truth.shape != scores.shape or truth.shape[1] != len(names):
        raise SistaError(
            f"classification: truth is {truth.shape}, scores are {scores.shape}, names {len(names)}; give (N, K) each"
        )
    if kind == "binary" and len(names) != 1:
        raise SistaError(f"classification: binary has one column, not {len(names)}; choose multilabel or multiclass")
    if bad := int((~np.isfinite(scores)).sum()):
        raise SistaError(f"{bad} of {scores.size} scores are not finite; the model has diverged, lower its lr")
    if bad := int(((scores < 0) | (scores > 1)).sum()):
        raise SistaError(f"{bad} of {scores.size} scores are outside 0 to 1; give probabilities, not logits")
    known = ~np.isnan(truth)
    if bad := int((known & (truth != 0) & (truth != 1)).sum()):
        raise SistaError(f"{bad} of {truth.size} labels are not 1, 0 or NaN; map the uncertain ones first")
    if kind == "multiclass" and (bad := int((truth[known.all(1)].sum(1) != 1).sum())):
        raise SistaError(f"{bad} of {len(truth)} images have no class or several; multiclass needs one each")


def run_ends(scores: np.ndarray) -> np.ndarray:
    """(N,) sorted → the last place of each run of equal values."""
    return np.flatnonzero(np.append(scores[1:] != scores[:-1], True)) if len(scores) else np.zeros(0, np.int64)


def score_bins(scores: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Return the bin of each score in [0, 1], of `bins` equally wide ones; 1 lies in the last."""
    return np.minimum((scores * bins).astype(int), bins - 1)


def calibration_error(scores: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> float | None:
    """Weighted mean over 15 equally wide bins of |mean score - share of truth|; None where nothing has a weight."""
    total = weights.sum()
    if total <= 0:
        return None
    gaps = np.bincount(score_bins(scores), weights * (scores - truth), minlength=BINS)
    return float(np.abs(gaps).sum() / total)


def best_thresholds(truth: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return (K,) the threshold of each class with the highest F1: for validation, never for a test.

    It lies in the middle between neighbouring scores, the highest where several are best; 0.5 for a class without a
    positive image.

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
        ends = run_ends(score)  # a threshold can't cut between equal scores
        f1 = 2 * np.cumsum(target)[ends] / (ends + 1 + target.sum())
        best = int(f1.argmax())
        above, below = score[ends[best]], score[ends[best + 1]] if best + 1 < len(ends) else 0.0
        # in float32, which a checkpoint keeps it in: between neighbouring numbers there is no middle
        middle = np.float32((float(above) + float(below)) / 2)
        found[k] = middle if below < middle <= above else above
    return found
