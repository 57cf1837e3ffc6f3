"""Data modules: a prepared store in, batches out.

B samples, H W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from sista_pl import distributed
from sista_pl.data import transforms
from sista_pl.data.loader import EpochSampler, ResumableLoader
from sista_pl.data.store import Store
from sista_pl.errors import SistaError


class StoreDataset(Dataset):
    """Images of a store with their row, a batch at a time; a subclass adds what its task needs in `samples`."""

    def __init__(self, store: Store, transform, random: bool):
        self.store, self.transform, self.random = store, transform, random

    def __len__(self) -> int:
        return len(self.store)

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return the batch of these (row, seed of the augmentation): image (B, 1, H, W) in [-1, 1], index (B,), …"""
        rows = np.array([row for row, _ in places])
        pixels = self.pixels(rows, [seed for _, seed in places])
        return {**pixels, "index": torch.from_numpy(rows), **self.samples(rows)}

    def pixels(self, rows: np.ndarray, seeds: Sequence[int]) -> dict[str, Any]:
        """Return the images of these rows, augmented, and what has to be moved along with them."""
        images = torch.from_numpy(self.store.images(rows))[:, None]
        if self.random:
            pairs = zip(images, seeds, strict=True)
            images = torch.stack([transforms.seeded(self.transform, image, seed) for image, seed in pairs])
        else:
            images = self.transform(images)
        return {"image": transforms.normalise(images)}

    def samples(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Return further (B, …) tensors of these rows."""
        return {}


def as_it_is(batch: Any) -> Any:
    """Collate nothing: `StoreDataset` returns whole batches."""
    return batch


class BaseDataModule(LightningDataModule):
    """Reads a prepared store, and prepares it first where it is not there yet.

    Args:
        store: folder of the prepared store.
        format: how the release is laid out, one of `sista list datasets`; needed to prepare.
        root: folder of the raw release; needed to prepare.
        phantom: draw the release first, `{studies: 4000, seed: 0}`, with the words of the real reports that a file
            `reports` holds, if it is given; only on a root that is absent or a phantom.
        options: of the reader, such as `reports`, `views` or `columns`.
        size: side of the stored images in pixels.
        crop: side of the encoder's input in pixels; the size where it is not given.
        rotate: augmentation, degrees.
        contrast: augmentation, relative change of brightness and contrast.
        batch_size: of one device.
        num_workers: loader processes; -1 takes what the machine has, less one, at most 8.
        seed: of order and augmentation.
        max_bad: largest share of unreadable images before preparation stops.
    """

    dataset_class: type[StoreDataset] = StoreDataset
    least_batch = 1

    def __init__(
        self,
        store: str | Path,
        format: str | None = None,
        root: str | Path | None = None,
        phantom: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        size: int = 256,
        crop: int | None = None,
        rotate: float = 0.0,
        contrast: float = 0.0,
        batch_size: int = 144,
        num_workers: int = 0,
        seed: int = 0,
        max_bad: float = 0.01,
    ):
        super().__init__()
        self.store_path, self.format, self.root = Path(store), format, None if root is None else Path(root)
        self.phantom, self.options = phantom, options or {}
        self.size, self.crop = size, crop or size
        self.rotate, self.contrast = rotate, contrast
        self.batch_size, self.seed, self.max_bad = batch_size, seed, max_bad
        self.num_workers = min(8, max(0, (os.cpu_count() or 1) - 1)) if num_workers < 0 else num_workers
        self.store: Any = None  # a Store, from setup on
        self.rows: dict[str, np.ndarray] = {}
        self.train_loader: ResumableLoader | None = None
        self.position: dict[str, int] | None = None  # of a restored checkpoint, in its epoch
        if batch_size < self.least_batch:
            why = "a contrast needs at least 2 pairs" if self.least_batch == 2 else "give at least 1"
            raise SistaError(f"data: batch_size is {batch_size}; {why}")

    def prepare_data(self) -> None:
        """Draw the phantom and prepare the store, where they are not there yet; on one process of a node."""
        if self.root is None or self.format is None:
            if not (self.store_path / "store.json").is_file():
                raise SistaError(
                    f"data: {self.store_path} is no prepared store; set data.root and data.format to prepare it, or "
                    "point data.store at one"
                )
            return
        from sista_pl.data.formats import READERS
        from sista_pl.data.prepare import prepare

        if self.phantom is not None:
            from sista_pl.data.phantom import write_phantom

            write_phantom(str(self.format), self.root, **self.phantom)
        release = READERS.build({"name": self.format, "root": self.root, **self.options})
        if release.phantom and self.phantom is None:
            raise SistaError(
                f"data: {self.root} holds a phantom, but data.phantom is not set; a phantom and real data never mix"
            )
        prepare(release, self.store_path, size=self.size, max_bad=self.max_bad)

    def setup(self, stage: str) -> None:
        if self.store is not None:
            return
        self.store = Store.open(self.store_path)
        if self.store.size != self.size:
            raise SistaError(
                f"data: {self.store_path} holds {self.store.size} px images but data.size is {self.size}; "
                "one store per size: give another data.store"
            )
        self.rows = self.split()
        need = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ())
        for split in need:
            if len(self.rows[split]) == 0:
                counts = ", ".join(f"{name} {len(rows)}" for name, rows in self.rows.items())
                raise SistaError(
                    f"data: {self.store_path} has nothing in split {split!r} ({counts}); check the splits; "
                    "`sista data prepare table --option columns.split=null` deals the patients of a table by a seed"
                )

    def split(self) -> dict[str, np.ndarray]:
        """Return the rows of each split."""
        splits = self.store.manifest["split"].to_numpy()
        return {name: np.flatnonzero(splits == name) for name in ("train", "val", "test")}

    @property
    def split_told(self) -> dict[str, str]:
        """Name and SHA-256 of the rule that split the images, for checkpoint, tracker and metrics.json."""
        return dict(self.store.info["split"])

    def epoch_rows(self, split: str, train: bool) -> np.ndarray:
        """Return the rows of the store that an epoch goes through, in any order."""
        return self.rows[split]

    def in_order(self, split: str, told: str = "") -> Iterable[Any]:
        """Return the batches of a split in order, without augmentation; on several devices each has all of them.

        Args:
            split: `train`, `val` or `test`.
            told: what the progress bar calls them; none where not given.
        """
        batches = self._loader(split, False)
        batches.batch_sampler.rank, batches.batch_sampler.world = 0, 1
        return track(batches, told, console=Console(stderr=True), transient=True, disable=not told or len(batches) < 20)

    def _loader(self, split: str, train: bool) -> ResumableLoader:
        transform = transforms.build(self.size, self.crop, train, self.rotate, self.contrast)
        rows, world = self.epoch_rows(split, train), distributed.world_size()
        size = self.batch_size if self.least_batch > 1 else max(1, min(self.batch_size, len(rows) // world))
        sampler = EpochSampler(rows, size, train, self.seed, distributed.rank(), world)
        return ResumableLoader(
            self.dataset_class(self.store, transform, train), sampler, collate_fn=as_it_is,
            num_workers=self.num_workers, persistent_workers=self.num_workers > 0, pin_memory=torch.cuda.is_available(),
            # else the loader draws its workers' seeds from the global generator, and a resumed run differs
            generator=torch.Generator().manual_seed(self.seed),
        )  # fmt: skip

    def train_dataloader(self) -> ResumableLoader:
        self.train_loader = self._loader("train", True)
        self.train_loader.trainer = self.trainer
        if self.position is not None:
            self.train_loader.load_state_dict(self.position)
            self.position = None
        return self.train_loader

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the training epoch, and which data and split they are of.

        Lightning asks the loader too, but gives it nothing back when a schedule has asked for the number of steps.
        """
        place = {"batches": 0} if self.train_loader is None else self.train_loader.state_dict()
        return {"place": place, "data": self.store.hash, "split": self.split_told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the place in the epoch.

        Raises:
            SistaError: the checkpoint is of other data, so that its place means nothing here.
        """
        if self.trainer is None or self.trainer.state.fn != "fit":
            return  # a test may be on other data
        if state["data"] != self.store.hash:
            raise SistaError(
                f"resume: the checkpoint was trained on other data (hash {state['data'][:12]}, {self.store_path} has "
                f"{self.store.hash[:12]}); a new fit may start from its weights, a resume needs the same store"
            )
        self.position = state["place"]

    def val_dataloader(self) -> ResumableLoader:
        return self._loader("val", False)

    def test_dataloader(self) -> ResumableLoader:
        return self._loader("test", False)

    def predict_dataloader(self) -> DataLoader:
        # Lightning rebuilds the loader of a prediction from standard arguments, to track the rows
        loader = self._loader("test", False)
        rows = [place for batch in loader.batch_sampler for place in batch]
        return DataLoader(
            loader.dataset, batch_size=self.batch_size, sampler=rows, num_workers=self.num_workers,
            collate_fn=as_it_is,
        )  # fmt: skip
