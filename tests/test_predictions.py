"""Predictions gathered by row: any order, any padding, any number of ranks give the same."""

import numpy as np
import torch

from sista_pl import distributed
from sista_pl.predictions import Predicted, Predictions


def collect(batches, ranks=None, monkeypatch=None):
    """Feed batches of (rows, items of each row) as the given ranks would, then put their states together."""
    metric = Predictions(width=2)
    for i, (rows, items) in enumerate(batches):
        if ranks is not None:
            monkeypatch.setattr(distributed, "rank", lambda rank=ranks[i]: rank)
        of = torch.tensor([place for place, found in enumerate(items) for _ in found], dtype=torch.long)
        flat = torch.tensor([item for found in items for item in found], dtype=torch.float64).reshape(-1, 2)
        metric.update(torch.tensor(rows), torch.tensor(rows)[:, None] * 10.0, flat, of)
    return metric.compute()


def slow(batches) -> Predicted:
    known: dict[int, list] = {}
    for rows, items in batches:
        for row, found in zip(rows, items, strict=True):
            known.setdefault(row, found)
    rows = sorted(known)
    flat = [item for row in rows for item in known[row]]
    of = [place for place, row in enumerate(rows) for _ in known[row]]
    return Predicted(np.array(rows), np.array(rows)[:, None] * 10.0, np.array(flat).reshape(-1, 2), np.array(of))


def same(a: Predicted, b: Predicted) -> None:
    for name in ("rows", "values", "items", "of"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name


ITEMS = {4: [[1, 2], [3, 4]], 7: [], 9: [[5, 6]], 2: [[2**25 + 1, 8]]}


def batch(*rows):
    return list(rows), [ITEMS[row] for row in rows]


def test_rows_come_sorted_and_items_stay_with_them():
    batches = [batch(9, 4), batch(2, 7)]
    same(collect(batches), slow(batches))
    found = collect(batches)
    assert [len(items) for items in found.per_image()] == [1, 2, 0, 1]
    assert found.per_image()[0].tolist() == [[2**25 + 1, 8]], "whole numbers beyond 2^24 stay whole"


def test_a_row_that_pads_another_rank_counts_once(monkeypatch):
    batches = [batch(2, 7), batch(4, 9), batch(2)]
    same(collect(batches, [0, 1, 1], monkeypatch), slow(batches))


def test_nothing_at_all_is_fine():
    metric = Predictions()
    metric.update(torch.tensor([3]), torch.tensor([[0.5]]))
    found = metric.compute()
    assert found.per_image()[0].shape == (0, 0)
    assert len(found.rows) == 1
