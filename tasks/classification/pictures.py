"""Pictures of a test of classification: curves, and the films that it got right and wrong most surely."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sista_pl import figures
from sista_pl.data.store import Store
from sista_pl.figures import Case, Curve


def draw_curves(truth: np.ndarray, scores: np.ndarray, names: Sequence[str], path: Path, notice: str) -> None:
    """Draw ROC and precision–recall curves of each class that has both kinds of images."""
    from sklearn.metrics import precision_recall_curve, roc_auc_score, roc_curve

    roc, precision = [], []
    for k, name in enumerate(names):
        known = ~np.isnan(truth[:, k])
        target, score = truth[known, k], scores[known, k]
        if len(np.unique(target)) < 2:
            continue
        x, y, _ = roc_curve(target, score)
        roc.append(Curve(x, y, f"{name} {roc_auc_score(target, score):.3f}"))
        y, x, _ = precision_recall_curve(target, score)
        precision.append(Curve(x, y, f"{name} ({target.mean():.1%} present)"))
    panels = [
        ("ROC", "1 - specificity", "sensitivity", roc),
        ("precision and recall", "recall", "precision", precision),
    ]
    figures.draw_curves(panels, path, notice or "test")


def draw_cases(
    store: Store, rows: np.ndarray, truth: np.ndarray, scores: np.ndarray, names: Sequence[str], path: Path, notice: str
) -> None:
    """Draw, for up to four classes, the surest hits, misses and false alarms."""
    lines = []
    prevalent = np.argsort(-np.nansum(truth, 0), kind="stable")[:4]
    for k in prevalent:
        present, absent = np.flatnonzero(truth[:, k] == 1), np.flatnonzero(truth[:, k] == 0)
        by_score = scores[:, k]
        kinds = [
            ("found", present[np.argsort(-by_score[present])][:2]),
            ("missed", present[np.argsort(by_score[present])][:2]),
            ("false alarm", absent[np.argsort(-by_score[absent])][:2]),
        ]
        cases = [
            Case(store.image(int(rows[i])), f"{kind}\nscore {by_score[i]:.2f}")
            for kind, places in kinds
            for i in places
        ]
        lines.append((names[k], cases))
    figures.draw_cases(lines, path, f"surest hits, misses and false alarms of each finding\n{notice}")
