"""Figures of classification, each a function of the images' weights.

N images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sista_pl.errors import SistaError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

BINS = 15
BY_CLASS = ("auroc", "auprc", "f1")
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
        self._order()
        self._decide()

    @classmethod
    def from_table(cls, table: pd.DataFrame) -> Classification:
        """Return the family of a table of predictions, as `sista test` writes it, or of the same columns.

        It is `binary` with one class, and `multiclass` where each image of known truth has one class and all scores of
        each image sum to 1, as those of a softmax do, within 0.01. Thresholds are not in the table: F1 and accuracy are
        those at 0.5.

        Args:
            table: `truth_<class>` (1, 0 or empty) and `score_<class>` (in [0, 1]) of each class, one row an image.

        Raises:
            SistaError: a truth without its score, or the other way round; what is no number; what the class refuses.
        """
        columns = [str(column) for column in table]
        names = [name.removeprefix("truth_") for name in columns if name.startswith("truth_")]
        alone = {name.removeprefix("score_") for name in columns if name.startswith("score_")} ^ set(names)
        if alone or not names:
            odd = min(alone, default="<class>")
            raise SistaError(f"there is not both truth_{odd} and score_{odd}; each class needs the two columns")
        truth, scores = (
            np.column_stack([_numbers(table[f"{side}_{name}"]) for name in names]) for side in ("truth", "score")
        )
        known = ~np.isnan(truth).any(1)
        exclusive = len(names) > 1 and (truth[known].sum(1) == 1).all() and (np.abs(scores.sum(1) - 1) < 0.01).all()
        return cls(truth, scores, names, "binary" if len(names) == 1 else "multiclass" if exclusive else "multilabel")

    def _order(self) -> None:
        """Line up the known images of all classes by falling score, and where each run of equal scores ends.

        For the AUROC: negatives by rising score, and positives with how many they exceed.
        """
        parts, negatives, positives = [(np.zeros(0, np.int64),) * 4], [0], [0]
        ranked, images, ends = [(np.zeros(0, np.int64),) * 4], [0], [0]
        for k in range(len(self.names)):
            rows = np.flatnonzero(self.known[:, k])
            rows = rows[np.argsort(-self.scores[rows, k], kind="stable")]
            truth, last = self.truth[rows, k], 1 + images[-1] + run_ends(self.scores[rows, k])
            ranked.append((rows, truth, last, np.concatenate([[images[-1]], last[:-1]])[: len(last)]))
            images.append(images[-1] + len(rows))
            ends.append(ends[-1] + len(last))
            lower, upper = rows[~truth][::-1], rows[truth]
            found = [np.searchsorted(self.scores[lower, k], self.scores[upper, k], side) for side in ("left", "right")]
            parts.append((lower, upper, *(negatives[-1] + place for place in found)))
            negatives.append(negatives[-1] + len(lower))
            positives.append(positives[-1] + len(upper))
        self._negatives, self._positives, self._below, self._upto = map(np.concatenate, zip(*parts, strict=True))
        self._negatives_until, self._positives_until = np.array(negatives), np.array(positives)
        self._rows, self._hits, self._after, self._before = map(np.concatenate, zip(*ranked, strict=True))
        self._until, self._ends_until = np.array(images), np.array(ends)

    def _decide(self) -> None:
        """Tell the images of each class that are said to be of it, those that are, and both; each score's bin."""
        if self.exclusive:
            rows = np.flatnonzero(self.known[:, 0])
            each = np.arange(len(self.names))
            chosen, right = self.scores[rows].argmax(1), self.truth[rows].argmax(1)
            said, true = chosen[:, None] == each, right[:, None] == each
            judged, known = self.scores[rows].max(1, initial=0)[:, None], np.ones((len(rows), 1), bool)
            correct = (chosen == right)[:, None]
        else:
            rows, known, judged, correct = np.arange(self.size), self.known, self.scores, self.truth
            said, true = (self.scores >= self.thresholds) & known, self.truth
        self.rows, self._said = rows, np.stack([said & true, said, true]).astype(np.float64)  # 3 R K
        self._asked = known.astype(np.float64)  # R, K or 1
        answered = correct if self.exclusive else (said == true) & known
        self._right = answered.sum(1).astype(np.float64)  # right answers of each image
        at, column = np.nonzero(known)
        score = judged[at, column]
        self._judged, self._gap = rows[at], score - correct[at, column]
        self._bin = column * BINS + np.minimum((score * BINS).astype(int), BINS - 1)  # 1 lies in the last

    def figures(self, weights: np.ndarray | None = None) -> dict[str, float]:
        """Return the figures by name, one that is not defined left out:

        * `auroc/<class>`, `auprc/<class>` (average precision, not interpolated), `f1/<class>`,
        * `auroc_macro`, `auprc_macro`, `f1_macro`: their means over the classes that have one,
        * `accuracy`: share of right answers, over all known pairs of image and class where not `multiclass`,
        * `ece`: calibration error, the mean over 15 equally wide bins of |mean score - share of truth|, weighted by
          images; its mean over classes, or that of the chosen class's score.

        Args:
            weights: (N,) >= 0 of the images; all 1 where not given.
        """
        weights = np.ones(self.size) if weights is None else np.asarray(weights, np.float64)
        each = {figure: self._by_class(figure, weights) for figure in BY_CLASS}
        found = {f"{figure}/{name}": float(each[figure][k]) for k, name in enumerate(self.names) for figure in BY_CLASS}
        found |= {f"{figure}_macro": _mean(values) for figure, values in each.items()}
        found |= {"accuracy": self._accuracy(weights), "ece": self._calibration(weights)}
        return {name: value for name, value in found.items() if not np.isnan(value)}

    def figure(self, name: str, weights: np.ndarray | None = None) -> float:
        """Return one of the `figures`, NaN where it is not defined, and compute no other kind."""
        weights = np.ones(self.size) if weights is None else np.asarray(weights, np.float64)
        kind, _, of = name.partition("/")
        if name.removesuffix("_macro") in BY_CLASS and name not in BY_CLASS:
            return _mean(self._by_class(name.removesuffix("_macro"), weights))
        if kind in BY_CLASS and of in self.names:
            return float(self._by_class(kind, weights)[self.names.index(of)])
        others = {"accuracy": self._accuracy, "ece": self._calibration}
        return others[name](weights) if name in others else float("nan")

    def _by_class(self, figure: str, weights: np.ndarray) -> np.ndarray:
        """Return (K,) `auroc`, `auprc` or `f1`, NaN where it is not defined."""
        return {"auroc": self._aurocs, "auprc": self._auprcs, "f1": self._f1s}[figure](weights)

    def _aurocs(self, weights: np.ndarray) -> np.ndarray:
        # of each positive: the weight of the negatives below it, and half of those level with it; all classes at once
        below = _sums(weights[self._negatives])
        positive = weights[self._positives]
        won = positive * (below[self._below] + below[self._upto]) / 2
        starts, ends = self._positives_until[:-1], self._positives_until[1:]
        total, won = _sums(positive), _sums(won)
        before = below[self._negatives_until]
        hits, alarms = total[ends] - total[starts], before[1:] - before[:-1]
        won = won[ends] - won[starts] - hits * before[:-1]
        return np.divide(won, hits * alarms, out=np.full(len(hits), np.nan), where=(hits > 0) & (alarms > 0))

    def _auprcs(self, weights: np.ndarray) -> np.ndarray:
        # equal scores are one step of the curve
        weights = weights[self._rows]
        hits, said = _sums(weights * self._hits), _sums(weights)
        starts, ends = self._until[:-1], self._until[1:]
        begin = np.repeat(starts, np.diff(self._ends_until))
        so_far = np.maximum(said[self._after] - said[begin], np.finfo(float).tiny)  # 0 before the first with a weight
        steps = _sums((hits[self._after] - hits[self._before]) * (hits[self._after] - hits[begin]) / so_far)
        area = steps[self._ends_until[1:]] - steps[self._ends_until[:-1]]
        positive = hits[ends] - hits[starts]
        negative = said[ends] - said[starts] - positive
        return np.divide(area, positive, out=np.full(len(area), np.nan), where=(positive > 0) & (negative > 0))

    def _f1s(self, weights: np.ndarray) -> np.ndarray:
        both, said, true = weights[self.rows] @ self._said
        return np.divide(2 * both, said + true, out=np.full(len(true), np.nan), where=true > 0)

    def _accuracy(self, weights: np.ndarray) -> float:
        weights = weights[self.rows]
        total = weights @ self._asked.sum(1)
        return float(weights @ self._right / total) if total > 0 else np.nan

    def _calibration(self, weights: np.ndarray) -> float:
        total = weights[self.rows] @ self._asked
        gaps = np.bincount(self._bin, weights[self._judged] * self._gap, minlength=BINS * len(total))
        gaps = np.abs(gaps.reshape(-1, BINS)).sum(1)
        return _mean(np.divide(gaps, total, out=np.full(len(total), np.nan), where=total > 0))


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


def _numbers(column: pd.Series) -> np.ndarray:
    try:
        return column.to_numpy(np.float64)
    except (TypeError, ValueError) as why:
        raise SistaError(f"column {column.name} holds no numbers ({why}); give truth as 1, 0 or empty") from None


def _sums(values: np.ndarray) -> np.ndarray:
    """(N,) → (N + 1,) the sums of the first 0, 1, … N."""
    sums = np.zeros(len(values) + 1)
    np.cumsum(values, out=sums[1:])
    return sums


def _mean(values: np.ndarray) -> float:
    """Return the mean of those that are defined, NaN without any."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else np.nan


def run_ends(scores: np.ndarray) -> np.ndarray:
    """(N,) sorted → the last place of each run of equal values."""
    return np.flatnonzero(np.append(scores[1:] != scores[:-1], True)) if len(scores) else np.zeros(0, np.int64)


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
