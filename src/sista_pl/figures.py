"""Pictures: report words over image patches.

P patches on a square grid, L words.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


@dataclass
class WordMaps:
    """One study of the picture.

    Args:
        image: (H, W) in [0, 1].
        report: its text.
        words: the words shown.
        maps: one (h, w) similarity map a word.
    """

    image: np.ndarray
    report: str
    words: list[str]
    maps: list[np.ndarray]


def draw_word_maps(studies: Sequence[WordMaps], path: Path, title: str) -> Path:
    """Draw a row a study: the film with its report, then each word's map over it; written as PNG."""
    columns = 1 + max(len(study.words) for study in studies)
    # by hand, in inches: the caption below a film is no part of its axes, which no automatic layout takes well
    head, film, caption_height = 0.6, 2.3, 0.85
    height = head + (film + caption_height) * len(studies)
    figure = Figure(figsize=(film * columns, height))
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, y=1 - 0.08 / height, va="top")
    axes = figure.subplots(len(studies), columns, squeeze=False)
    figure.subplots_adjust(0.005, caption_height / height, 0.995, 1 - head / height, 0.03, caption_height / film)
    for row, study in zip(axes, studies, strict=True):
        for axis in row:
            axis.set_axis_off()
        row[0].imshow(study.image, cmap="gray", vmin=0, vmax=1)
        caption = "\n".join(textwrap.wrap(study.report, 42)[:6])
        row[0].text(0.0, -0.03, caption, transform=row[0].transAxes, va="top", fontsize=6)
        height, width = study.image.shape
        for axis, word, values in zip(row[1:], study.words, study.maps, strict=False):
            axis.imshow(study.image, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
            axis.imshow(values, cmap="inferno", alpha=0.5, interpolation="bicubic", extent=(0, width, height, 0))
            axis.set_title(word, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def informative(words: Sequence[str], maps: np.ndarray, usable: Sequence[bool], count: int) -> list[int]:
    """Return the places of the `count` usable words whose maps (L, P) stand out most from their own mean."""
    peak = (maps.max(1) - maps.mean(1)) / (maps.std(1) + 1e-6) * maps.std(1)
    order = [int(i) for i in np.argsort(-peak, kind="stable") if usable[i]]
    chosen: list[int] = []
    for i in order:
        if words[i].lower() not in {words[j].lower() for j in chosen}:
            chosen.append(i)
    return sorted(chosen[:count])


@dataclass
class Case:
    """One film of a grid.

    Args:
        image: (H, W) uint8.
        caption: under it, short lines.
        truth: (H, W) bool mask of the truth, or None.
        predicted: the same of the prediction.
        truth_boxes: (M, 4) x y w h in pixels of the image.
        predicted_boxes: (D, 4).
        scores: (D,) of the predicted boxes.
        heat: (H, W) map over the film, brighter where it is higher.
        point: x and y of a place that is marked as predicted.
    """

    image: np.ndarray
    caption: str
    truth: np.ndarray | None = None
    predicted: np.ndarray | None = None
    truth_boxes: np.ndarray | None = None
    predicted_boxes: np.ndarray | None = None
    scores: np.ndarray | None = None
    heat: np.ndarray | None = None
    point: tuple[float, float] | None = None


TRUTH, PREDICTION = "#2ca02c", "#ff7f0e"


def draw_cases(rows: Sequence[tuple[str, Sequence[Case]]], path: Path, title: str) -> Path:
    """Draw a grid of films, a titled row each: truth in green, prediction in orange; written as PNG."""
    rows = [(name, cases) for name, cases in rows if cases]
    columns = max((len(cases) for _, cases in rows), default=1)
    head, film, caption_height = 0.7, 2.0, 0.75
    height = head + (film + caption_height) * max(1, len(rows))
    figure = Figure(figsize=(max(6.0, film * columns), height))
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, y=1 - 0.08 / height, va="top")
    axes = figure.subplots(max(1, len(rows)), columns, squeeze=False)
    figure.subplots_adjust(0.005, caption_height / height, 0.995, 1 - head / height, 0.03, caption_height / film)
    for axis in axes.ravel():
        axis.set_axis_off()
    for line, (name, cases) in zip(axes, rows, strict=False):
        for place, (axis, case) in enumerate(zip(line, cases, strict=False)):
            axis.imshow(case.image, cmap="gray", vmin=0, vmax=255)
            if case.heat is not None:
                axis.imshow(case.heat, cmap="inferno", alpha=0.45)
            if case.point is not None:
                axis.plot(*case.point, "+", color=PREDICTION, markersize=9, markeredgewidth=2)
            for mask, colour in ((case.truth, TRUTH), (case.predicted, PREDICTION)):
                if mask is not None and mask.any():
                    axis.contour(mask.astype(float), [0.5], colors=[colour], linewidths=1.2)
            _draw_boxes(axis, case)
            axis.set_title(name if place == 0 else "", fontsize=8, loc="left")
            axis.text(0.0, -0.03, case.caption, transform=axis.transAxes, va="top", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _draw_boxes(axis, case: Case) -> None:
    from matplotlib.patches import Rectangle

    for boxes, colour in ((case.truth_boxes, TRUTH), (case.predicted_boxes, PREDICTION)):
        for x, y, w, h in boxes if boxes is not None else ():
            axis.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=colour, linewidth=1.2))
    if case.predicted_boxes is not None and case.scores is not None:
        for (x, y, *_), score in zip(case.predicted_boxes, case.scores, strict=True):
            axis.text(x, y, f"{score:.2f}", fontsize=6, color=PREDICTION, va="bottom")


@dataclass
class Curve:
    """One line of a plot: its points and its name."""

    x: np.ndarray
    y: np.ndarray
    name: str


def draw_curves(panels: Sequence[tuple[str, str, str, Sequence[Curve]]], path: Path, title: str) -> Path:
    """Draw panels (title, x label, y label, curves) side by side; written as PNG."""
    figure = Figure(figsize=(4.2 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    for axis, (name, x, y, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for curve in curves:
            axis.plot(curve.x, curve.y, label=curve.name, linewidth=1.4)
        axis.set(title=name, xlabel=x, ylabel=y, xlim=(-0.01, 1.01) if x != "false positives an image" else None)
        axis.set_ylim(-0.01, 1.01)
        axis.grid(alpha=0.25)
        if curves:
            axis.legend(fontsize=6, loc="best")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
