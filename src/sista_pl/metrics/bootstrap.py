"""Intervals by resampling whole patients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

MOST = 2000  # clusters left out one by one


def percentiles(drawn: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return lower and upper end of the percentile interval of what was drawn, (B,)."""
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def resamples(clusters: np.ndarray, draws: int, seed: int | Sequence[int] = 0) -> Iterator[np.ndarray]:
    """Yield the samples' weights (N,) of each draw: how often the sample's cluster was drawn.

    As many clusters are drawn as there are, with replacement, in the order of their names: the order of the samples
    changes nothing.

    Args:
        clusters: (N,) the patient of each sample.
        draws: how many.
        seed: of the resampling.
    """
    names, inverse = np.unique(np.asarray(clusters), return_inverse=True)
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        picks = generator.integers(len(names), size=len(names))
        yield np.bincount(picks, minlength=len(names))[inverse].astype(np.float64)


def left_out(clusters: np.ndarray, most: int = MOST) -> Iterator[np.ndarray]:
    """Yield the samples' weights (N,) with each cluster left out in turn: 0 in it, 1 elsewhere.

    Args:
        clusters: (N,) the patient of each sample.
        most: where there are more clusters, neighbours by name are left out together, in this many groups.
    """
    names, inverse = np.unique(np.asarray(clusters), return_inverse=True)
    count = min(len(names), most)
    groups = inverse * count // max(1, len(names))
    for group in range(count):
        yield (groups != group).astype(np.float64)


def degrees_of_freedom(figures: np.ndarray) -> float:
    """Return how many patients a figure's standard error rests on, as degrees of freedom (Satterthwaite 1946).

    With L the figure's jackknife deviations, V = Σ L² has the variance Σ L⁴ - V² / G, and so 2 V² / (Σ L⁴ - V² / G)
    degrees of freedom: G where all matter alike, few where few do, as the patients who have a rare finding.

    Args:
        figures: (G,) with each patient left out in turn.

    Returns:
        from 1 to G - 1; G - 1 where nothing deviates; NaN where one is not defined without a patient.
    """
    if len(figures) < 2 or np.isnan(figures).any():
        return float("nan")
    squares = (figures - figures.mean()) ** 2
    total, most = squares.sum(), len(figures) - 1
    spread = (squares**2).sum() - total**2 / len(figures)
    return float(np.clip(2 * total**2 / spread, 1, most)) if spread > 0 else float(most)


def intervals(
    figures: Callable[[np.ndarray], dict[str, float]],
    clusters: np.ndarray,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, dict[str, Any]]:
    """Percentile intervals of figures that are functions of the samples' weights, resampling whole clusters.

    A sample's weight in a draw is how often its cluster was drawn. A figure that a draw leaves undefined (no positive
    was drawn) has one draw less.

    Args:
        figures: weights (N,) → {name: value}, undefined ones left out; as `Classification.figures`.
        clusters: (N,) the patient of each sample.
        draws: bootstrap resamples.
        seed: of the resampling.
        level: coverage.

    Returns:
        {name: {"value", "interval95", "n"}} of the figures that the samples themselves define. `interval95` is None
        with fewer than two clusters or defined draws; n counts samples; "draws" is there where fewer were defined.
    """
    clusters = np.asarray(clusters)
    values = figures(np.ones(len(clusters)))
    drawn: dict[str, list[float]] = {name: [] for name in values}
    asked = draws if len(np.unique(clusters)) > 1 else 0
    for weights in resamples(clusters, asked, seed):
        for name, value in figures(weights).items():
            if name in drawn:
                drawn[name].append(value)
    told: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        found = drawn[name]
        interval = percentiles(np.array(found), level) if len(found) > 1 else None
        told[name] = {"value": float(value), "interval95": interval, "n": len(clusters)}
        if len(found) < asked:
            told[name]["draws"] = len(found)
    return told
