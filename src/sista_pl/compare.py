"""Methods against one another on stored predictions: paired differences, corrected p-values, average ranks.

N images, B draws of the bootstrap, R runs (one method, seed and subset of the labels), M methods.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

from sista_pl.errors import SistaError, did_you_mean
from sista_pl.metrics.bootstrap import MOST, degrees_of_freedom, left_out, percentiles, resamples
from sista_pl.stored import Setting

LOWER = ("ece", "i2t_median_rank", "t2i_median_rank")  # figures of which less is better
LEVEL, DRAWS = 0.95, 2000
PAIRED = ("difference", "difference_low", "difference_high", "freedom", "p", "p_holm", "z", "d")
HOW = {
    "mean": "of the metric over the method's seeds, of each over its subsets of the labels",
    "resamples": "of whole patients (Efron & Tibshirani 1993), the same for all methods and seeds of a setting, and "
    "for all settings on the same patients",
    "t": "quantile of Student's distribution; its degrees of freedom are Satterthwaite's (1946) of the jackknife over "
    "patients: few where few patients decide, as those with a rare finding, and there 1.96 is too short",
    "interval of a mean": "95 %, percentiles of the resamples, as far out as t sqrt((f + 1) / f), f the degrees of "
    "freedom, instead of 1.96 (Hesterberg 2015)",
    "SD": "over the seeds: the spread of training again, which no interval and no p contains",
    "difference": "from the reference, within each resample; its interval is 95 %, difference ± t SE, with SE the "
    "standard deviation over the resamples",
    "p": "two-sided, of z = difference / SE as Student's t; below 0.05 where the interval leaves out 0",
    "p (Holm)": "corrected for all comparisons made here (Holm 1979)",
    "z": "difference / SE: its size against the noise of this test set",
    "d": "difference / pooled SD over seeds (Cohen 1988): its size against the noise of training; two seeds of both",
    "rank": "1 is the best, equal means share the mean of their ranks; averaged over the settings that have all "
    "methods (Demsar 2006), with the 2.5th and 97.5th percentile of the same resamples",
}


@dataclass
class Comparison:
    """What was found.

    Args:
        rows: one a setting and method: task, fraction, metric, method, seeds, subsets (of a seed, at least so many),
            images, patients, draws, value, low, high, seed_sd, difference, difference_low, difference_high, freedom
            (degrees of it, of the difference), p, p_holm, z, d, rank; NaN where there is none.
        ranks: one a method: method, rank, low, high, settings.
        reference: the method that the others are set against.
        draws: resamples asked for; a row's own number leaves out those in which the metric is not defined.
        seed: of the resampling.
        comparisons: that the p-values are corrected for.
        notes: what a reader has to know.
    """

    rows: list[dict[str, Any]]
    ranks: list[dict[str, Any]]
    reference: str
    draws: int
    seed: int
    comparisons: int
    notes: list[str]


@dataclass
class Drawn:
    """The metric of each run on the test set, on resamples of its patients, and without each of them.

    A row of NaN is one where the metric is not defined, as for lack of a positive; the truth alone decides that, and so
    it holds for all runs.

    Args:
        figures: (R,) on the test set.
        draws: (B, R) on resamples.
        left_out: (G, R) without each patient in turn.
    """

    figures: np.ndarray
    draws: np.ndarray
    left_out: np.ndarray


def resample(setting: Setting, draws: int, seed: int = 0, advance: Callable[[], Any] = lambda: None) -> Drawn:
    """Return the metric of a setting's runs on resamples.

    A resample is a function of the seed and the patients' names: settings on the same patients share it, others don't.
    With one patient there are none.

    Args:
        setting: what to resample.
        draws: B.
        seed: of the resampling.
        advance: called after each resample and each patient left out.
    """

    def figures(weights: np.ndarray | None = None) -> list[float]:
        return [family.figure(setting.metric, weights) for family in setting.families]

    def all_of(resamples: Iterable[np.ndarray]) -> np.ndarray:
        found = []
        for weights in resamples:
            found.append(figures(weights))
            advance()
        return np.array(found).reshape(-1, len(setting.families))

    names = np.unique(setting.patients)
    if len(names) < 2:
        return Drawn(np.array(figures()), all_of(()), all_of(()))
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=8).digest()
    drawn = all_of(resamples(setting.patients, draws, [seed, int.from_bytes(digest, "big")]))
    return Drawn(np.array(figures()), drawn, all_of(left_out(setting.patients)))


def work(settings: Sequence[Setting], draws: int) -> int:
    """Return how often `compare` advances."""
    patients = [len(set(setting.patients)) for setting in settings]
    return sum(draws + min(count, MOST) for count in patients if count > 1)


def holm(p: np.ndarray) -> np.ndarray:
    """Return (m,) the p-values corrected by Holm's step-down procedure (Holm 1979), NaN where p is.

    The i-th smallest of m is multiplied by m - i + 1, at most 1 and at least what the one before it became.
    """
    found, known = np.full(len(p), np.nan), np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    found[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return found


def ranks(values: np.ndarray, lower: bool = False) -> np.ndarray:
    """Return (…, M) the ranks from 1, the best, along the last axis; equal values share their mean rank.

    Args:
        values: (…, M).
        lower: whether less is better.
    """
    better = -values if lower else values
    mine, other = better[..., :, None], better[..., None, :]
    return 1 + (other > mine).sum(-1) + ((other == mine).sum(-1) - 1) / 2


def compare(
    settings: Sequence[Setting],
    reference: str | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    advance: Callable[[], Any] = lambda: None,
) -> Comparison:
    """Compare the methods of each setting with a reference by a paired bootstrap over patients; `HOW` says how.

    Args:
        settings: of `load`.
        reference: a method; the first one where it is None.
        draws: B.
        seed: of the resampling.
        advance: called `work` times.

    Raises:
        SistaError: fewer than two methods, an unknown reference, fewer than 100 draws.
    """
    methods = list(dict.fromkeys(method for setting in settings for method in setting.methods))
    reference = check_reference(methods, reference)
    if draws < 100:
        raise SistaError(f"compare: {draws} draws give no interval; give at least 100")
    if seed < 0:
        raise SistaError(f"compare: the seed is {seed}; give 0 or more")
    notes = [note for setting in settings for note in setting.notes]
    rows: list[dict[str, Any]] = []
    complete: list[np.ndarray] = []
    for setting in settings:
        drawn = resample(setting, draws, seed, advance)
        means = Means(setting, drawn)
        rows += _rows(setting, drawn.figures, means, reference)
        notes += _notes(setting, means, draws)
        if missing := [method for method in methods if method not in setting.methods]:
            apart = ", and without differences" if reference in missing else ""
            notes.append(f"{setting.name}: no {', '.join(missing)}; left out of the average ranks{apart}")
        else:
            order = [setting.methods.index(method) for method in methods]
            all_of = np.vstack([means.value, means.draws])[:, order]
            complete.append(np.where(np.isnan(all_of), np.nan, ranks(all_of, setting.metric in LOWER)))
    p = np.array([row["p"] for row in rows])
    for row, corrected in zip(rows, holm(p), strict=True):
        row["p_holm"] = float(corrected)
    return Comparison(rows, _average(methods, complete), reference, draws, seed, int((~np.isnan(p)).sum()), notes)


def check_reference(methods: Sequence[str], reference: str | None) -> str:
    """Return the reference, the first of the methods where it is None.

    Raises:
        SistaError: it is none of them, or there is but one.
    """
    if len(methods) < 2:
        raise SistaError(f"compare: {', '.join(methods)} alone; give a second method to compare with")
    if reference is not None and reference not in methods:
        raise SistaError(f"compare: no method {reference!r}; {did_you_mean(reference, methods)}")
    return reference or methods[0]


class Means:
    """Means over the seeds of each method: `value` (M,), `draws` (B, M), `left_out` (G, M); rows of NaN are kept."""

    def __init__(self, setting: Setting, drawn: Drawn):
        def of(figures: np.ndarray) -> np.ndarray:
            means = np.stack([setting.by_seed(method, figures).mean(-1) for method in setting.methods], -1)
            return np.round(means, 12)  # equal predictions differ by the order of sums alone

        self.value, self.draws, self.left_out = of(drawn.figures), of(drawn.draws), of(drawn.left_out)
        self.defined = self.draws[~np.isnan(self.draws).any(1)]


def _notes(setting: Setting, means: Means, draws: int) -> list[str]:
    if not len(means.left_out):
        return []  # one patient: the setting's own notes say so
    if np.isnan(means.left_out).any():
        return [f"{setting.name}: without one of the patients {setting.metric} is not defined: no interval and no p"]
    lost = draws - len(means.defined)
    return (
        [f"{setting.name}: {lost} of {draws} draws leave {setting.metric} undefined and are left out"] if lost else []
    )


def _rows(setting: Setting, figures: np.ndarray, means: Means, reference: str) -> list[dict[str, Any]]:
    """Return the setting's rows; `figures` (R,) of the test set."""
    rank = ranks(means.value, setting.metric in LOWER)
    base = setting.methods.index(reference) if reference in setting.methods else None
    rows = []
    for m, method in enumerate(setting.methods):
        mine = setting.by_seed(method, figures)
        freedom = degrees_of_freedom(means.left_out[:, m])
        low, high = mean_interval(means.defined[:, m], freedom)
        row: dict[str, Any] = {
            "task": setting.task, "fraction": setting.fraction, "metric": setting.metric, "method": method,
            "seeds": len(mine), "subsets": len(setting.of(method)) // len(mine),
            "images": len(setting.patients), "patients": len(set(setting.patients)),
            "draws": len(means.defined), "value": float(means.value[m]), "low": low, "high": high,
            "seed_sd": float(mine.std(ddof=1)) if len(mine) > 1 else np.nan,
            **dict.fromkeys(PAIRED, np.nan), "rank": float(rank[m]),
        }  # fmt: skip
        if base is not None and m != base:
            row["difference"] = difference = float(means.value[m] - means.value[base])
            row["freedom"] = freedom = degrees_of_freedom(means.left_out[:, m] - means.left_out[:, base])
            found = paired(difference, means.defined[:, m] - means.defined[:, base], freedom)
            row |= dict(zip(("difference_low", "difference_high", "z", "p"), found, strict=True))
            row["d"] = cohen(mine, setting.by_seed(reference, figures))
        rows.append(row)
    return rows


def mean_interval(drawn: np.ndarray, freedom: float) -> tuple[float, float]:
    """Return the 95 % interval of a figure: expanded percentiles of its resamples (Hesterberg 2015).

    Plain ones are short by the factor sqrt(f / (f + 1)), and by that of 1.96 to Student's t with f degrees of freedom.

    Args:
        drawn: (B,) of the resamples.
        freedom: degrees of freedom, see `degrees_of_freedom`; NaN for no interval.
    """
    if len(drawn) < 2 or np.isnan(freedom):
        return np.nan, np.nan
    return percentiles(drawn, 1 - 2 * float(special.ndtr(-_quantile(freedom) * np.sqrt((freedom + 1) / freedom))))


def paired(difference: float, drawn: np.ndarray, freedom: float) -> tuple[float, float, float, float]:
    """Return lower and upper end of the 95 % interval of a difference, z, and the two-sided p-value; see `HOW`.

    Where no resample and no patient left out changes a difference of 0, p is 1; of another one p is NaN.

    Args:
        difference: on the test set.
        drawn: (B,) of the resamples.
        freedom: degrees of freedom, see `degrees_of_freedom`; NaN for neither interval nor p.
    """
    if len(drawn) < 2 or np.isnan(freedom):
        return np.nan, np.nan, np.nan, np.nan
    error = round(float(drawn.std(ddof=1)), 12)  # equal differences differ by the order of sums alone
    reach = _quantile(freedom) * error
    if error == 0:
        return difference, difference, np.nan, 1.0 if difference == 0 else np.nan
    z = difference / error
    return difference - reach, difference + reach, z, float(2 * special.stdtr(freedom, -abs(z)))


def _quantile(freedom: float) -> float:
    return float(special.stdtrit(freedom, (1 + LEVEL) / 2))


def cohen(a: np.ndarray, b: np.ndarray) -> float:
    """Return Cohen's d of a against b: difference of means by pooled SD; NaN with one value of either, or no spread."""
    if len(a) < 2 or len(b) < 2:
        return np.nan
    pooled = ((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(a) + len(b) - 2)
    return float((a.mean() - b.mean()) / np.sqrt(pooled)) if pooled > 0 else np.nan


def _average(methods: Sequence[str], settings: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Return the average ranks; `settings` holds (1 + B, M) the ranks of each setting, the test set's first."""
    if not settings:
        return []
    shortest = min(map(len, settings))  # a setting of one patient has no draws
    mean = np.mean([setting[:shortest] for setting in settings], 0)
    drawn = mean[1:][~np.isnan(mean[1:]).any(1)]
    rows = []
    for m, method in enumerate(methods):
        low, high = percentiles(drawn[:, m]) if len(drawn) > 1 else (np.nan, np.nan)
        rows.append({"method": method, "rank": float(mean[0, m]), "low": low, "high": high, "settings": len(settings)})
    return rows
