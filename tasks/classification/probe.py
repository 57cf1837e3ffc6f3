"""The linear probe: L2 logistic regression on frozen features, its strength chosen on validation.

N images, D features, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # scikit-learn's C, the inverse of the penalty


def fit_probe(
    features: np.ndarray, labels: np.ndarray, exclusive: bool, worth: Callable[[np.ndarray, np.ndarray], float]
) -> tuple[np.ndarray, np.ndarray, float]:
    """Fit logistic regression for each strength, keep the best.

    Features are standardised by the training images; the scale is folded into the returned weights. The weights of the
    least penalised loss lie in the span of the images, so that fewer images than features are as many features.

    Args:
        features: (N, D) of the training images.
        labels: (N, K) 1, 0 or NaN; one-hot where `exclusive`.
        exclusive: one class an image (multinomial) instead of K questions.
        worth: (weight (K, D), bias (K,)) → validation figure, higher is better.

    Returns:
        weight (K, D), bias (K,) and the strength.
    """
    mean, scale = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    scale[scale < 1e-8] = 1.0
    standard = (features - mean) / scale
    fit = _fit_exclusive if exclusive else _fit_each
    # each strength begins where the one before, which asks for smaller weights, ended
    models = [_model(exclusive) for _ in range(1 if exclusive else labels.shape[1])]
    span = np.linalg.qr(standard.T)[0] if len(standard) < standard.shape[1] else None  # (D, N)
    inside = standard if span is None else standard @ span
    best = None
    for strength in STRENGTHS:
        weight, bias = fit(inside, labels, [model.set_params(C=strength) for model in models])
        weight = weight if span is None else weight @ span.T
        folded = (weight / scale, bias - (weight / scale) @ mean)
        value = worth(*folded)
        if best is None or value > best[0]:
            best = (value, *folded, strength)
    assert best is not None
    return best[1], best[2], best[3]


def _model(exclusive: bool) -> Any:
    from sklearn.linear_model import LogisticRegression

    # Newton's method converges for weak penalties, too; its matrix is (D, D), but (K D, K D) for exclusive classes
    return LogisticRegression(max_iter=500, warm_start=True, solver="lbfgs" if exclusive else "newton-cholesky")


def _regression(model: Any, features: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # L-BFGS may be far from it for the weakest penalties, which validation then does not choose
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features, target)
    return model.coef_, model.intercept_


def _fit_each(features: np.ndarray, labels: np.ndarray, models: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    weight, bias = np.zeros((labels.shape[1], features.shape[1])), np.zeros(labels.shape[1])
    for k, target in enumerate(labels.T):
        known = ~np.isnan(target)
        if len(np.unique(target[known])) == 2:
            weight[k : k + 1], bias[k : k + 1] = _regression(models[k], features[known], target[known])
        elif known.any():
            bias[k] = 4.0 if target[known][0] == 1 else -4.0  # all alike: nothing to learn but that
    return weight, bias


def _fit_exclusive(features: np.ndarray, labels: np.ndarray, models: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    known = ~np.isnan(labels).any(1)
    target = labels[known].argmax(1)
    classes = np.unique(target)
    weight, bias = np.zeros((labels.shape[1], features.shape[1])), np.full(labels.shape[1], -8.0)
    if len(classes) == 1:
        bias[classes] = 0.0
        return weight, bias
    found = _regression(models[0], features[known], target)
    if len(classes) == 2:  # scikit-learn gives one row then, the second against the first
        weight[classes[1]], bias[classes] = found[0][0], (0.0, found[1][0])
    else:
        weight[classes], bias[classes] = found
    return weight, bias
