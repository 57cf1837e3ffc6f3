"""`sista bench data`: what preparing once saves, against decoding each image in each epoch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# The usual radiograph of MIMIC-CXR-JPG; at quality 92 the drawn ones have its 1.3 MB too.
HEIGHT, WIDTH, QUALITY = 3056, 2544, 92


def steps(images: int, size: int, crop: int, epochs: int = 20) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """Write `images` large JPEGs and return what is to be timed, and facts about the data.

    `plain` decodes and resizes each file whole; `prepare` is what a store is made with. `decoding loader` is an epoch
    that decodes each time, as the reference does; `store loader` reads the store. Both loaders resize, crop at random
    and normalise alike, in one process.
    """
    import torch
    from torchvision.transforms import v2

    from sista_pl.data import transforms
    from sista_pl.data.formats import Release, Row
    from sista_pl.data.images import read_gray
    from sista_pl.data.loader import EpochSampler, ResumableLoader
    from sista_pl.data.module import StoreDataset, as_it_is
    from sista_pl.data.prepare import prepare

    torch.set_num_threads(1)
    folder = tempfile.TemporaryDirectory(prefix="sista-bench-")
    files = _radiographs(Path(folder.name), images)
    rows = [Row(f.name, f.name, f.name, f, "PA", "train", "", "") for f in files]
    store = prepare(Release("bench", "bench", rows, root=Path(folder.name)), Path(folder.name) / "store", size,
                    progress=False)  # fmt: skip
    augment = transforms.build(size, crop, train=True)

    def plain(file: Path) -> Image.Image:
        with Image.open(file) as image:
            scale = size / max(image.size)
            shape = round(image.width * scale), round(image.height * scale)
            return image.convert("L").resize(shape, Image.Resampling.LANCZOS)

    decoding = v2.Compose([v2.ToImage(), v2.Resize((size, size)), v2.RandomCrop(crop), v2.ToDtype(torch.float32, True),
                           v2.Normalize([transforms.MEAN], [transforms.STD])])  # fmt: skip

    def decoding_epoch() -> int:
        for file in files:
            with Image.open(file) as image:
                decoding(image.convert("L"))
        return images

    sampler = EpochSampler(np.repeat(np.arange(images), epochs), images, shuffle=True)
    loader = ResumableLoader(StoreDataset(store, augment, random=True), sampler, collate_fn=as_it_is)

    def store_epochs() -> int:
        return sum(len(batch["image"]) for batch in loader)

    differences = [
        np.abs(_unpad(read_gray(file, size), np.asarray(plain(file))) - np.asarray(plain(file), np.float32)).mean()
        for file in files[:4]
    ]
    timed: dict[str, Callable[[], Any]] = {
        "plain": lambda: len([plain(file) for file in files]),
        "prepare": lambda: len([read_gray(file, size) for file in files]),
        "decoding loader": decoding_epoch,
        "store loader": store_epochs,
    }
    facts = {
        "images": f"{images} JPEGs of {WIDTH}×{HEIGHT}, {np.mean([f.stat().st_size for f in files]) / 1e6:.2f} MB each",
        "difference": float(np.mean(differences)),
        "folder": folder,  # kept until the last step has run
    }
    return timed, facts


def _radiographs(folder: Path, count: int) -> list[Path]:
    from sista_pl.data.phantom.cohort import LAYOUTS, Plan, draw

    files, rng, layout = [], np.random.default_rng(0), LAYOUTS.build("mimic_cxr")
    for number in range(count):
        film = Image.fromarray(draw(Plan(number, 0), 0, 512, layout).rendering.image).resize(
            (WIDTH, HEIGHT), Image.Resampling.BICUBIC
        )
        noise = rng.normal(0, 3, (HEIGHT, WIDTH)).astype(np.float32)
        pixels = np.clip(np.asarray(film) + noise, 0, 255).astype(np.uint8)
        files.append(folder / f"{number}.jpg")
        Image.fromarray(pixels).save(files[-1], quality=QUALITY)
    return files


def _unpad(square: np.ndarray, like: np.ndarray) -> np.ndarray:
    dy, dx = (square.shape[0] - like.shape[0]) // 2, (square.shape[1] - like.shape[1]) // 2
    return square[dy : dy + like.shape[0], dx : dx + like.shape[1]].astype(np.float32)
