"""Pictures: report words over image patches.

P patches on a square grid, L words.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


class Sheet:
    """Films in rows, each with a title over it and a caption under it.

    All lie in one pair of axes, in inches from the upper left corner: a pair for each film would take longer to make
    than all that is in it.

    Args:
        rows, columns: films.
        title: of the sheet.
        caption: inches under a film.
        film: inches of a film's longer side, with the gap to the next.
        least: inches that the sheet is wide at least.
    """

    def __init__(self, rows: int, columns: int, title: str, *, caption: float, film: float, least: float = 0.0):
        self.head, self.film, self.row = 0.7, film, film + caption
        width, height = max(least, film * columns), self.head + self.row * max(1, rows)
        self.figure = Figure(figsize=(width, height))
        FigureCanvasAgg(self.figure)
        self.figure.suptitle(title, fontsize=10, y=1 - 0.08 / height, va="top")
        self.axes = self.figure.add_axes((0.0, 0.0, 1.0, 1.0), xlim=(0.0, width), ylim=(height, 0.0))
        self.axes.set_axis_off()

    def place(self, row: int, column: int, shape: Sequence[int], title: str, caption: str) -> Frame:
        """Return where a film of this (height, width) lies, after writing what is over and under it."""
        side = self.film - 0.06
        scale = side / max(shape)
        left = column * self.film + (self.film - scale * shape[1]) / 2
        top = self.head + row * self.row + (side - scale * shape[0]) / 2
        below = top + scale * shape[0] + 0.04
        self.axes.text(left, top - 0.05, title, va="bottom", fontsize=8, parse_math=False)  # reports may have a $
        self.axes.text(left, below, caption, va="top", fontsize=6.5, parse_math=False)
        return Frame(left, top, scale)

    def show(self, frame: Frame, image: np.ndarray, of: Sequence[int] | None = None, **style: Any) -> None:
        """Draw an image that fills the frame of a film of (height, width) `of`; that of the image itself by default."""
        height, width = image.shape if of is None else of
        (left, right), (top, bottom) = frame.x(np.array([0, width])), frame.y(np.array([0, height]))
        self.axes.imshow(image, extent=(left, right, bottom, top), **style)

    def write(self, path: Path) -> Path:
        """Write the sheet as PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.figure.savefig(path, dpi=110, pil_kwargs={"compress_level": 1})  # level 6 takes as long as the drawing
        return path


@dataclass
class Frame:
    """Where a film lies on a sheet: inches of its upper left corner and of a pixel."""

    left: float
    top: float
    scale: float

    def x(self, pixels: Any) -> Any:
        """Return the inches of columns, 0 the left edge of the first."""
        return self.left + self.scale * pixels

    def y(self, pixels: Any) -> Any:
        """Return the inches of rows, 0 the upper edge of the first."""
        return self.top + self.scale * pixels


def draw_word_maps(studies: Sequence[WordMaps], path: Path, title: str) -> Path:
    """Draw a row a study: the film with its report, then each word's map over it; written as PNG."""
    columns = 1 + max(len(study.words) for study in studies)
    sheet = Sheet(len(studies), columns, title, caption=0.85, film=2.3)
    for row, study in enumerate(studies):
        caption = "\n".join(textwrap.wrap(study.report, 42)[:6])
        frame = sheet.place(row, 0, study.image.shape, "", caption)
        sheet.show(frame, study.image, cmap="gray", vmin=0, vmax=1)
        for column, (word, values) in enumerate(zip(study.words, study.maps, strict=False), 1):
            frame = sheet.place(row, column, study.image.shape, word, "")
            sheet.show(frame, study.image, cmap="gray", vmin=0, vmax=1)
            sheet.show(frame, values, study.image.shape, cmap="inferno", alpha=0.5, interpolation="bicubic")
    return sheet.write(path)


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
    sheet = Sheet(len(rows), columns, title, caption=0.75, film=2.0, least=6.0)
    for row, (name, cases) in enumerate(rows):
        for column, case in enumerate(cases):
            frame = sheet.place(row, column, case.image.shape, name if column == 0 else "", case.caption)
            _draw_case(sheet, frame, case)
    return sheet.write(path)


def _draw_case(sheet: Sheet, frame: Frame, case: Case) -> None:
    from matplotlib.patches import Rectangle

    axes = sheet.axes
    sheet.show(frame, case.image, cmap="gray", vmin=0, vmax=255)
    if case.heat is not None:
        sheet.show(frame, case.heat, case.image.shape, cmap="inferno", alpha=0.45)
    if case.point is not None:
        x, y = case.point
        axes.plot(frame.x(x + 0.5), frame.y(y + 0.5), "+", color=PREDICTION, markersize=9, markeredgewidth=2)
    for mask, colour in ((case.truth, TRUTH), (case.predicted, PREDICTION)):
        if mask is not None and mask.any():
            height, width = mask.shape
            at = frame.x(np.arange(width) + 0.5), frame.y(np.arange(height) + 0.5)
            axes.contour(*at, mask.astype(float), [0.5], colors=[colour], linewidths=1.2)
    for boxes, colour in ((case.truth_boxes, TRUTH), (case.predicted_boxes, PREDICTION)):
        for x, y, w, h in boxes if boxes is not None else ():
            size = {"width": frame.scale * w, "height": frame.scale * h}
            axes.add_patch(Rectangle((frame.x(x), frame.y(y)), **size, fill=False, edgecolor=colour, linewidth=1.2))
    if case.predicted_boxes is not None and case.scores is not None:
        for (x, y, *_), score in zip(case.predicted_boxes, case.scores, strict=True):
            axes.text(frame.x(x), frame.y(y), f"{score:.2f}", fontsize=6, color=PREDICTION, va="bottom")


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
