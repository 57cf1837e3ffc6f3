"""Labelled images for downstream tasks: labels, masks or boxes of a prepared store, and images without any.

B samples, K labels, M boxes of one image, H W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from sista_pl.data import transforms
from sista_pl.data.images import BadImage, find_images, image_size, read_gray
from sista_pl.data.labels import label_names, read_labels
from sista_pl.data.module import BaseDataModule, StoreDataset, as_it_is
from sista_pl.data.splits import folds, label_fraction, split_hash
from sista_pl.errors import SistaError, did_you_mean

TARGETS = ("labels", "mask", "boxes")


@dataclass
class Kept:
    """What stands in for images, shared by the data module and its loaders: made later than the loaders are.

    Args:
        features: (rows of the store, D) of a frozen encoder.
    """

    features: np.ndarray | None = None


class TransferDataset(StoreDataset):
    """Images with the target of the task; with `features`, the encoder's vectors stand in for the images."""

    def __init__(self, store, transform, random: bool, data: TransferDataModule):
        super().__init__(store, transform, random)
        self.data = data.target, data.labels, data.boxes, data.masks_from_boxes
        self.kept = data.kept

    def pixels(self, rows: np.ndarray, seeds: Sequence[int]) -> dict[str, Any]:
        target, _, boxes, masks_from_boxes = self.data
        if self.kept.features is not None:
            return {"features": torch.from_numpy(self.kept.features[rows])}
        if target == "labels":
            return super().pixels(rows, seeds)
        found: dict[str, list[Any]] = {}
        images = torch.from_numpy(self.store.images(rows))[:, None]
        for row, image, seed in zip(rows.tolist(), images, seeds, strict=True):
            sample: dict[str, Any] = {"image": tv_tensors.Image(image)}
            if target == "mask":
                mask = fill_boxes(boxes[row][0], self.store.size) if masks_from_boxes else self.store.mask(row)
                sample["mask"] = tv_tensors.Mask(torch.from_numpy(mask))
            else:
                corners, kinds = boxes[row]
                sample["boxes"] = tv_tensors.BoundingBoxes(
                    torch.from_numpy(corners), format="XYXY", canvas_size=tuple(image.shape[-2:])
                )
                sample["box_labels"] = torch.from_numpy(kinds)
            sample = transforms.seeded(self.transform, sample, seed) if self.random else self.transform(sample)
            if target == "boxes":
                sample = _TIDY(sample)
            for key, value in sample.items():
                found.setdefault(key, []).append(value.as_subclass(torch.Tensor))
        batch: dict[str, Any] = {"image": transforms.normalise(torch.stack(found["image"]))}
        if target == "mask":
            return batch | {"mask": torch.stack(found["mask"])}
        return batch | {"boxes": found["boxes"], "box_labels": found["box_labels"]}

    def samples(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        target, labels, *_ = self.data
        return {"labels": torch.from_numpy(labels[rows])} if target == "labels" else {}


# A box that the crop cut to nothing goes, with its label.
_TIDY = v2.Compose(
    [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1, labels_getter=lambda sample: sample["box_labels"])]
)


def fill_boxes(corners: np.ndarray, size: int) -> np.ndarray:
    """(M, 4) x0 y0 x1 y1 → (size, size) uint8: 255 inside a box, 0 elsewhere."""
    mask = np.zeros((size, size), np.uint8)
    for x0, y0, x1, y1 in np.rint(corners).astype(int):
        mask[y0:y1, x0:x1] = 255
    return mask


class InputsDataset(Dataset):
    """Image files without labels, decoded as they come; what can't be read is listed in the batch."""

    def __init__(self, files: Sequence[Path], size: int, crop: int):
        self.files, self.size = files, size
        self.transform = transforms.build(size, crop, train=False)

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, places: Sequence[int]) -> dict[str, Any]:
        """Return image (B', 1, H, W), index (B',), original_size (B', 2) as width and height, and bad (index, why)."""
        images, index, sizes, bad = [], [], [], []
        for place in places:
            try:
                images.append(torch.from_numpy(read_gray(self.files[place], self.size))[None])
                sizes.append(image_size(self.files[place]))
                index.append(place)
            except BadImage as why:
                bad.append((place, str(why)))
                del images[len(index) :]
        stacked = torch.stack(images) if images else torch.zeros(0, 1, self.size, self.size, dtype=torch.uint8)
        return {
            "image": transforms.normalise(self.transform(stacked)),
            "index": torch.tensor(index, dtype=torch.long),
            "original_size": torch.tensor(sizes, dtype=torch.long).reshape(-1, 2),
            "bad": bad,
        }


class TransferDataModule(BaseDataModule):
    """Images of a prepared store with the target of a downstream task; rows without one are left out.

    Args:
        target: `labels`, `mask` or `boxes`.
        labels: which label columns, in the order of the classes; all of the store where not given.
        categories: which boxes, in the order of the classes; all of the store where not given.
        masks_from_boxes: with `target: mask`, fill the boxes instead of reading masks.
        label_fraction: share of the labelled training images, in (0, 1]: nested, stratified, by whole patients.
        fraction_seed: another seed, another subset.
        fold: cross-validation in place of the release's split: `0/5` tests on the first of five folds of whole
            patients, validates on the next and trains on the rest; `1/5` … `4/5` are the others.
        fold_seed: another seed, other folds.
        min_epoch_images: a training set of fewer images is repeated within an epoch, each time augmented anew, so that
            few labels get as many steps as all of them.
        balance: keep as many training images without the target as there are with it (MGCA's SIIM protocol).
        inputs: of `sista predict`: a folder (searched through), a CSV with a column `image` (or `path`), or a file.
        kwargs: see `BaseDataModule`.
    """

    dataset_class: Any = TransferDataset

    def __init__(
        self,
        store: str | Path,
        target: str = "labels",
        labels: list[str] | None = None,
        categories: list[str] | None = None,
        masks_from_boxes: bool = False,
        label_fraction: float = 1.0,
        fraction_seed: int = 0,
        fold: str | None = None,
        fold_seed: int = 0,
        min_epoch_images: int = 0,
        balance: bool = False,
        inputs: str | Path | None = None,
        **kwargs: Any,
    ):
        super().__init__(store, **kwargs)
        if target not in TARGETS:
            raise SistaError(f"data: target is {target!r}; {did_you_mean(target, TARGETS)}")
        if not 0 < label_fraction <= 1:
            raise SistaError(f"data: label_fraction is {label_fraction}; give a share above 0 and at most 1, as 0.01")
        self.target, self.wanted_labels, self.wanted_categories = target, labels, categories
        self.masks_from_boxes, self.label_fraction, self.fraction_seed = masks_from_boxes, label_fraction, fraction_seed
        self.fold = None if fold is None else _fold(fold)
        self.fold_seed, self.min_epoch_images = fold_seed, min_epoch_images
        self.balance, self.inputs = balance, None if inputs is None else Path(inputs)
        self.classes: list[str] = []  # names of the K labels or box categories
        self.labels = np.zeros((0, 0), np.float32)  # (rows of the store, K)
        self.boxes: list[tuple[np.ndarray, np.ndarray]] = []  # a row: (M, 4) x0 y0 x1 y1 in store pixels, (M,) class
        self.phrases: list[list[str]] = []  # a row: what its boxes are called, "" where only their category is known
        self._usable = np.zeros(0, bool)  # (rows of the store,) whether it has a target
        self.kept = Kept()
        self.files: list[Path] = []

    def prepare_data(self) -> None:
        if self.inputs is None:
            super().prepare_data()

    def setup(self, stage: str) -> None:
        if self.inputs is not None and stage == "predict":
            self.files = self.files or find_images(self.inputs)
            return
        super().setup(stage)

    def split(self) -> dict[str, np.ndarray]:
        """Return the rows of each split that have a target; of the training rows the asked share."""
        usable, strata = getattr(self, f"_read_{self.target}")()
        self._usable = usable
        rows = super().split() if self.fold is None else self._split_by_fold(usable)
        rows = {name: found[usable[found]] for name, found in rows.items()}
        train, patients = rows["train"], self.store.manifest["patient_id"].to_numpy()
        if len(train) and self.balance:
            train = _balanced(train, (strata[train] == 1).any(1), self.fraction_seed)
        if len(train) and self.label_fraction < 1:
            train = train[label_fraction(patients[train], strata[train], self.label_fraction, self.fraction_seed)]
            self._check_fraction(strata[rows["train"]], strata[train])
        return rows | {"train": train}

    def _split_by_fold(self, usable: np.ndarray) -> dict[str, np.ndarray]:
        assert self.fold is not None
        number, count = self.fold
        rows = np.flatnonzero(usable)
        dealt = folds(self.store.manifest["patient_id"].to_numpy()[rows], count, self.fold_seed)
        test, val = dealt == number, dealt == (number + 1) % count
        return {"train": rows[~test & ~val], "val": rows[val], "test": rows[test]}

    @property
    def split_told(self) -> dict[str, str]:
        if self.fold is None:
            return super().split_told
        parts = self._split_by_fold(self._usable)
        ids = self.store.manifest["image_id"].to_numpy()[np.concatenate(list(parts.values()))]
        places = [name for name, rows in parts.items() for _ in rows]
        number, count = self.fold
        return {"name": f"fold {number}/{count}, seed {self.fold_seed}", "sha256": split_hash(ids.tolist(), places)}

    def _check_fraction(self, whole: np.ndarray, part: np.ndarray) -> None:
        lost = (whole == 1).any(0) & ~(part == 1).any(0)
        if lost.all() and len(lost):
            raise SistaError(
                f"data: label_fraction {self.label_fraction:g} leaves {len(part)} training images without a positive "
                "one; raise data.label_fraction"
            )
        if lost.any():
            names = ", ".join(name for name, gone in zip(self.classes, lost, strict=False) if gone)
            rank_zero_info(f"label_fraction {self.label_fraction:g}: no positive training image of {names}")

    def _read_labels(self) -> tuple[np.ndarray, np.ndarray]:
        self.classes = list(self.wanted_labels or label_names(self.store))
        if not self.classes:
            raise SistaError(f"data: {self.store_path} has no labels; prepare a release with labels")
        self.labels = read_labels(self.store, self.classes)
        return np.array(~np.isnan(self.labels).all(1)), self.labels

    def _read_boxes(self) -> tuple[np.ndarray, np.ndarray]:
        looked = self.store.manifest["boxes"].notna().to_numpy()
        if not looked.any():
            raise SistaError(f"data: {self.store_path} has no boxes; prepare a release with boxes")
        parsed = [
            json.loads(text) if seen else [] for text, seen in zip(self.store.manifest["boxes"], looked, strict=True)
        ]
        known = sorted({box["category"] for found in parsed for box in found})
        self.classes = list(self.wanted_categories or known)
        for name in self.classes:
            if name not in known:
                raise SistaError(f"data: {self.store_path} has no boxes of {name!r}; {did_you_mean(name, known)}")
        place = {name: i for i, name in enumerate(self.classes)}
        present = np.zeros((len(parsed), len(self.classes)), np.float32)
        self.boxes, self.phrases = [], []
        for row, found in enumerate(parsed):
            kept = [box for box in found if box["category"] in place]
            corners = [(box["x"], box["y"], box["x"] + box["w"], box["y"] + box["h"]) for box in kept]
            kinds = np.array([place[box["category"]] for box in kept], np.int64)
            present[row, kinds] = 1
            self.phrases.append([box.get("phrase", "") for box in kept])
            self.boxes.append((np.array(corners, np.float32).reshape(-1, 4), kinds))
        return looked, present

    def _read_mask(self) -> tuple[np.ndarray, np.ndarray]:
        if self.masks_from_boxes:
            looked, present = self._read_boxes()
            self.classes = ["object"]
            return looked, np.array(present.any(1, keepdims=True), np.float32)
        if not self.store.has_masks:
            raise SistaError(f"data: {self.store_path} has no masks; prepare a release with masks, or masks_from_boxes")
        self.classes = ["object"]
        has = self.store.manifest["has_mask"].to_numpy(bool)
        present = np.array([bool(row) and bool((self.store.mask(i) == 255).any()) for i, row in enumerate(has)])
        return has, present[:, None].astype(np.float32)

    def _loader(self, split: str, train: bool):
        self.dataset_class = lambda store, transform, random: TransferDataset(store, transform, random, self)
        return super()._loader(split, train)

    def epoch_rows(self, split: str, train: bool) -> np.ndarray:
        rows = super().epoch_rows(split, train)
        return np.resize(rows, self.min_epoch_images) if train and 0 < len(rows) < self.min_epoch_images else rows

    def predict_dataloader(self) -> DataLoader:
        if self.inputs is None:
            return super().predict_dataloader()
        return DataLoader(
            InputsDataset(self.files, self.size, self.crop), batch_size=self.batch_size, num_workers=self.num_workers,
            collate_fn=as_it_is,
        )  # fmt: skip


def _fold(text: str) -> tuple[int, int]:
    number, _, count = str(text).partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count) and int(count) >= 3):
        raise SistaError(f"data: fold is {text!r}; of five folds the first is 0/5, the last 4/5; 3 folds at least")
    return int(number), int(count)


def _balanced(rows: np.ndarray, positive: np.ndarray, seed: int) -> np.ndarray:
    """Keep all positive rows and as many of the others, drawn by `seed`."""
    others = rows[~positive]
    count = min(len(others), int(positive.sum()))
    drawn = np.random.default_rng([seed, 7]).choice(others, count, replace=False)
    return np.sort(np.concatenate([rows[positive], drawn]))
