"""What a model said of each image, gathered over ranks by the image's row, so that padding counts once.

N images, V values an image, M items (boxes, runs of a mask) over all images, W columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from sista_pl import distributed


@dataclass
class Predicted:
    """Predictions of a split, in the order of the rows.

    Args:
        rows: (N,) rows of the store, each once, rising.
        values: (N, V).
        items: (M, W) of all images, in the order of the rows.
        of: (M,) place in `rows` that each item belongs to.
    """

    rows: np.ndarray
    values: np.ndarray
    items: np.ndarray
    of: np.ndarray

    def per_image(self) -> list[np.ndarray]:
        """Return the items of each image, (M_i, W)."""
        return np.split(self.items, np.searchsorted(self.of, np.arange(1, len(self.rows)))) if len(self.rows) else []


class Predictions(Metric):
    """Collects `values` and `items` by row; a row that several ranks were given, as padding, is kept once.

    Args:
        width: W of the items, 0 where the task has none.
    """

    full_state_update = False

    def __init__(self, width: int = 0):
        super().__init__()
        self.width = width
        for name in ("rows", "values", "items", "of"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, rows: Tensor, values: Tensor, items: Tensor | None = None, of: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            rows: (B,) rows of the store.
            values: (B, V).
            items: (m, W), float64 where whole numbers above 2²⁴ are in them.
            of: (m,) place in the batch that each item belongs to, rising.
        """
        here = torch.full_like(rows, distributed.rank())
        self.rows.append(torch.stack([rows, here], 1))
        self.values.append(values.detach().float())
        if items is None or of is None:
            items, of = values.new_zeros(0, self.width), rows.new_zeros(0)
        self.items.append(items.detach().double())
        self.of.append(torch.stack([rows[of], here[of]], 1))

    def compute(self) -> Predicted:
        """Return what was collected on all ranks."""
        keys, values, items, of = (dim_zero_cat(getattr(self, name)).cpu().numpy() for name in
                                   ("rows", "values", "items", "of"))  # fmt: skip
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        keys, values = keys[order], values[order]
        first = np.ones(len(keys), bool)
        first[1:] = keys[1:, 0] != keys[:-1, 0]
        rows, ranks, values = keys[first, 0], keys[first, 1], values[first]
        place = np.searchsorted(rows, of[:, 0])
        mine = ranks[place] == of[:, 1] if len(of) else np.zeros(0, bool)
        items, place = items[mine], place[mine]
        order = np.argsort(place, kind="stable")
        return Predicted(rows, values, items[order], place[order])
