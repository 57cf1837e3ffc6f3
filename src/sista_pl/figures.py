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
