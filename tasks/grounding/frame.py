"""The encoder's frame: where the film, the true regions and a point of it lie.

K classes, H W pixels of the crop.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sista_pl.data.images import centre, fit
from sista_pl.data.transfer import fill_boxes

OBJECT, IGNORED = 255, 127


def regions(data: Any, row: int, crop: int) -> np.ndarray:
    """Return the true regions of an image, (K, crop, crop) uint8: 255 inside, 0 outside, 127 to be ignored.

    Args:
        data: a `TransferDataModule` with masks or boxes; its masks have one class.
        row: of the store.
        crop: side of the centre crop.
    """
    if data.target == "boxes":
        corners, kinds = data.boxes[row]
        found = np.stack([fill_boxes(corners[kinds == k], data.size) for k in range(len(data.classes))])
    elif data.masks_from_boxes:
        found = fill_boxes(data.boxes[row][0], data.size)[None]
    else:
        found = data.store.mask(row)[None]
    return centre(found, crop)


def highest(values: np.ndarray, known: np.ndarray) -> tuple[int, int]:
    """Return x and y of the highest value among `known`; of several equal ones the one in their middle."""
    ys, xs = np.nonzero(known & (values >= values[known].max() - 1e-6))
    place = int(((xs - xs.mean()) ** 2 + (ys - ys.mean()) ** 2).argmin())
    return int(xs[place]), int(ys[place])


def original_point(x: float, y: float, width: int, height: int, size: int, crop: int) -> tuple[float, float]:
    """Return the centre of a pixel of the centre crop in pixels of the (width, height) original."""
    scale, dx, dy = fit(width, height, size)
    off = (size - crop) // 2
    place = ((x + 0.5 + off - dx) / scale, (y + 0.5 + off - dy) / scale)
    return float(np.clip(place[0], 0, width)), float(np.clip(place[1], 0, height))


def centre_map(crop: int) -> np.ndarray:
    """Return (crop, crop) falling from 1 in the middle to 0 in the corners."""
    line = (np.arange(crop) + 0.5) / crop * 2 - 1
    return 1 - np.sqrt((line[:, None] ** 2 + line**2) / 2)
