"""The picture of a test of grounding: the maps that fit their region best and worst."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from sista_tasks.grounding.frame import OBJECT, regions

from sista_pl import figures
from sista_pl.data import transforms
from sista_pl.data.images import centre
from sista_pl.figures import Case
from sista_pl.predictions import Predicted

if TYPE_CHECKING:
    from sista_tasks.grounding.task import GroundingTask

MOST = 4  # classes
FILMS = 5


def draw_cases(task: GroundingTask, found: Predicted, path: Path, notice: str) -> None:
    """Draw, for up to four classes, the maps with the highest and the lowest contrast-to-noise ratio."""
    data, values = task.trainer.datamodule, task.by_class(found)
    present = values[..., 0] > 0
    lines = []
    for k in np.argsort(-present.sum(0), kind="stable")[:MOST]:
        places = np.flatnonzero(present[:, k])
        by_cnr = places[np.argsort(-values[places, k, 3], kind="stable")]
        half = (len(by_cnr) + 1) // 2
        for name, chosen in (("best", by_cnr[:half][:FILMS]), ("worst", by_cnr[half:][::-1][:FILMS])):
            cases = []
            for place, heat in zip(chosen, maps_of(task, found.rows[chosen], int(k)), strict=True):
                row, (hit, cnr, iou) = int(found.rows[place]), values[place, k, 2:5]
                said = "hit" if hit == 1 else "miss" if hit == 0 else f"hit {hit:.2f}"
                cases.append(Case(
                    centre(data.store.image(row), data.crop), f"{said}, CNR {cnr:.2f}, mIoU {iou:.2f}",
                    truth=regions(data, row, data.crop)[k] == OBJECT, heat=heat, point=tuple(values[place, k, -2:]),
                ))  # fmt: skip
            lines.append((f"{task.classes[k]}: {name}", cases))
    title = "map of the phrase (brighter: more alike), its highest point orange, true region green"
    figures.draw_cases(lines, path, f"{title}\n{notice}")


def maps_of(task: GroundingTask, rows: np.ndarray, k: int) -> np.ndarray:
    """Return the maps (n, H, W) of class k for these rows."""
    data = task.trainer.datamodule
    images = transforms.build(data.size, data.crop, train=False)(torch.from_numpy(data.store.images(rows))[:, None])
    return task.maps(transforms.normalise(images).to(task.device), rows)[:, k].cpu().numpy()
