"""The picture of a test of retrieval: images with their own report and those that are nearest."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sista_pl.metrics.retrieval import RetrievalFigures
from sista_pl.predictions import Predicted

if TYPE_CHECKING:
    from sista_tasks.retrieval.task import RetrievalTask

EACH = 3  # images of a group
SHOWN = 3  # reports beside an image
LONGEST = 260  # characters of a report


def draw_nearest(task: RetrievalTask, found: Predicted, family: RetrievalFigures, path: Path, notice: str) -> None:
    """Draw images whose report came first, in the middle and last, each beside its own and its nearest reports."""
    data, scores = task.trainer.datamodule, task.scores(found)
    ranks, nearest = family.ranks["i2t"], task.nearest(scores, found, SHOWN)
    order = np.argsort(ranks, kind="stable")
    middle = max(0, len(order) // 2 - EACH // 2)
    places = list(dict.fromkeys([*order[:EACH], *order[middle : middle + EACH], *order[::-1][:EACH]]))
    height = 0.5 + 2.1 * len(places)
    figure = Figure(figsize=(10, height))
    FigureCanvasAgg(figure)
    figure.suptitle(f"images, their report and the nearest ones\n{notice}", fontsize=10, y=1 - 0.08 / height, va="top")
    axes = figure.subplots(len(places), 2, squeeze=False, width_ratios=[1, 3.8])
    figure.subplots_adjust(0.005, 0.005, 0.995, 1 - 0.55 / height, 0.01, 0.03)
    texts = [data.reports[report] for report in data.report_ids[found.rows]]
    for (film, words), place in zip(axes, places, strict=True):
        film.imshow(data.store.image(int(found.rows[place])), cmap="gray", vmin=0, vmax=255)
        lines = [f"its own, rank {ranks[place]} of {len(ranks)}: {_short(texts[place])}"]
        lines += [
            f"{number}. cosine {scores[place, near]:.2f}{_equal(texts[near], texts[place])}: {_short(texts[near])}"
            for number, near in enumerate(nearest[place], 1)
        ]
        told = "\n".join(textwrap.fill(line, 118) for line in lines)
        words.text(0, 0.98, told, va="top", fontsize=7, parse_math=False)  # reports may have a $
        for axis in (film, words):
            axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _equal(text: str, own: str) -> str:
    return ", equal" if text == own else ""


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rsplit(' ', 1)[0]} …"
