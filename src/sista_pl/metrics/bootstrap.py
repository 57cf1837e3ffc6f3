"""Intervals by resampling whole patients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def bootstrap_interval(
    values: np.ndarray, clusters: np.ndarray, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of a mean, resampling whole clusters (patients).

    Args:
        values: (N,) one value a sample.
        clusters: (N,) the patient of each sample.
        draws: bootstrap resamples.
        seed: of the resampling.
        level: coverage.

    Returns:
        lower and upper end.
    """
    _, inverse = np.unique(clusters, return_inverse=True)
    sums = np.bincount(inverse, weights=values)
    counts = np.bincount(inverse)
    picks = np.random.default_rng(seed).integers(len(counts), size=(draws, len(counts)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


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
    patients, inverse = np.unique(np.asarray(clusters), return_inverse=True)
    values = figures(np.ones(len(inverse)))
    drawn: dict[str, list[float]] = {name: [] for name in values}
    asked = draws if len(patients) > 1 else 0
    generator = np.random.default_rng(seed)
    for _ in range(asked):
        picks = generator.integers(len(patients), size=len(patients))
        weights = np.bincount(picks, minlength=len(patients))[inverse].astype(np.float64)
        for name, value in figures(weights).items():
            if name in drawn:
                drawn[name].append(value)
    tail = (1 - level) / 2
    told: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        found = drawn[name]
        interval = tuple(map(float, np.quantile(found, [tail, 1 - tail]))) if len(found) > 1 else None
        told[name] = {"value": float(value), "interval95": interval, "n": len(inverse)}
        if len(found) < asked:
            told[name]["draws"] = len(found)
    return told
