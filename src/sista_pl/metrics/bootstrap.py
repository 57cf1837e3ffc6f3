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

    A figure that a draw leaves undefined (no positive was drawn) is left out of that draw.

    Args:
        figures: weights (N,) → {name: value}.
        clusters: (N,) the patient of each sample.
        draws: bootstrap resamples.
        seed: of the resampling.
        level: coverage.

    Returns:
        {name: {"value", "interval95" (None with fewer than two clusters), "n", and "draws" where fewer were defined}}
    """
    names, inverse = np.unique(np.asarray(clusters), return_inverse=True)
    values = figures(np.ones(len(inverse)))
    found: dict[str, list[float]] = {name: [] for name in values}
    if len(names) > 1:
        generator = np.random.default_rng(seed)
        for _ in range(draws):
            weights = np.bincount(generator.integers(len(names), size=len(names)), minlength=len(names))[inverse]
            for name, value in figures(weights.astype(float)).items():
                if name in found:
                    found[name].append(value)
    tail = (1 - level) / 2
    told: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        interval = tuple(map(float, np.quantile(found[name], [tail, 1 - tail]))) if len(found[name]) > 1 else None
        told[name] = {"value": float(value), "interval95": interval, "n": len(inverse)}
        if interval and len(found[name]) < draws:
            told[name]["draws"] = len(found[name])
    return told
