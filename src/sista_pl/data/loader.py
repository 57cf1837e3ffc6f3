"""Batches as a pure function of (seed, epoch, rank), so that a run stopped in mid-epoch goes on where it was.

N samples, B batch size of one rank, R ranks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from sista_pl.errors import SistaError


class EpochSampler:
    """Yields batches of `(row, seed)`: which row of the store, and the seed of its augmentation.

    Args:
        rows: (N,) rows of the store.
        batch_size: B.
        shuffle: a new order each epoch, the last incomplete batch dropped; else in order, all rows, and every rank
            padded with repeats to the same number (metrics drop them by id).
        seed: of order and augmentation.
        rank: of this process.
        world: R.

    Raises:
        SistaError: fewer rows than one batch on every rank, when shuffling.
    """

    def __init__(self, rows: np.ndarray, batch_size: int, shuffle: bool, seed: int = 0, rank: int = 0, world: int = 1):
        if shuffle and len(rows) < batch_size * world:
            raise SistaError(
                f"data: {len(rows)} training pairs are fewer than one batch of {batch_size} on {world} device(s); "
                "lower data.batch_size"
            )
        self.rows, self.batch_size, self.shuffle, self.seed = rows, batch_size, shuffle, seed
        self.rank, self.world = rank, world
        self.epoch = 0
        self.start = 0  # batches of the epoch that were consumed before a restart

    @property
    def sampler(self) -> EpochSampler:
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        per_rank = len(self.rows) // self.world if self.shuffle else -(-len(self.rows) // self.world)
        return per_rank // self.batch_size if self.shuffle else -(-per_rank // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        n, seeds = len(self.rows), generator.integers(2**62, size=len(self.rows))
        if self.shuffle:
            order = generator.permutation(n)[: n - n % self.world]
        else:
            order = np.resize(np.arange(n), -(-n // self.world) * self.world)
        mine = order[self.rank :: self.world]
        start, self.start = self.start, 0
        for batch in range(start, len(self)):
            picks = mine[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(int(self.rows[i]), int(seeds[i])) for i in picks]


class ResumableLoader(DataLoader):
    """A DataLoader whose position is part of the checkpoint; Lightning saves and restores it by these two methods.

    Attributes:
        position: batches of the epoch that were given.
        waited: seconds that were spent in all epochs until a batch was there.
        trainer: whose epoch ends after its `num_training_batches`, where it has fewer than the loader.
    """

    trainer: Any = None

    def __init__(self, dataset: Any, sampler: EpochSampler, **options: Any):
        super().__init__(dataset, batch_sampler=sampler, **options)
        self.position, self.waited = 0, 0.0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.position, began = self.batch_sampler.start, time.perf_counter()
        for batch in super().__iter__():
            self.position += 1
            self.waited += time.perf_counter() - began
            yield batch
            began = time.perf_counter()

    def state_dict(self) -> dict[str, int]:
        epoch = len(self) if self.trainer is None else min(len(self), self.trainer.num_training_batches)
        return {"batches": self.position % epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batch_sampler.start = state["batches"]
