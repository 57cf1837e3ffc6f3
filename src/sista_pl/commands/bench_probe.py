"""`sista bench probe`: a linear probe on features computed once, against one that sees the images in each epoch."""

from __future__ import annotations

import itertools
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from sista_pl import plugins
from sista_pl.errors import SistaError
from sista_pl.models import ImageEncoder

FRACTIONS, SEEDS = (0.01, 0.1, 1.0), (0, 1, 2)


def compare(encoder: str, image_size: int, images: int, epochs: int) -> dict[str, Any]:
    """Fit the probe of `protocol: mgca` for 1, 10 and 100 % of the labels and three seeds, in both ways.

    Both sides run the same epochs without augmentation on the same drawn films; only `cache` differs.

    Args:
        encoder: timm name, from scratch: what it has learned changes no time.
        image_size: side of the images in pixels.
        images: films to draw; 80 % are for training.
        epochs: of each fit.

    Returns:
        for `cached` and `uncached` the encoder's passes (images encoded), seconds and fits, the ratios of both, and the
        largest difference of the layers that they end with.
    """
    if "classification" not in plugins.load():
        raise SistaError("bench probe: the task classification is not installed; install sista-pl whole")
    with tempfile.TemporaryDirectory(prefix="sista-bench-") as folder, _quiet():
        store = _store(Path(folder), images, image_size)
        sides = {
            name: _fit_all(store, encoder, image_size, epochs, cache)
            for name, cache in (("cached", True), ("uncached", False))
        }
    layers = {name: side.pop("layers") for name, side in sides.items()}
    pairs = zip(layers["cached"], layers["uncached"], strict=True)
    return {
        **sides,
        "ratios": {key: sides["uncached"][key] / sides["cached"][key] for key in ("passes", "seconds")},
        "largest_difference": max(float((a - b).abs().max()) for a, b in pairs),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Eighteen fits say the same eighteen times."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _store(folder: Path, images: int, size: int) -> Path:
    from sista_pl.data.formats import READERS
    from sista_pl.data.phantom import write_phantom
    from sista_pl.data.prepare import prepare

    root = write_phantom("chestxray14", folder / "raw", images, size=size)
    release = READERS.build({"name": "chestxray14", "root": root, "split": "chestxray14/grouped"})
    prepare(release, folder / "store", size=size, progress=False)
    return folder / "store"


def _fit_all(store: Path, encoder: str, size: int, epochs: int, cache: bool) -> dict[str, Any]:
    from pytorch_lightning import Trainer, seed_everything

    from sista_pl.data.transfer import TransferDataModule

    kind = plugins.load()["classification"]
    passes, layers = 0, []

    def count(module: torch.nn.Module, arguments: tuple) -> None:
        nonlocal passes
        if isinstance(module, ImageEncoder):
            passes += len(arguments[0])

    start = time.perf_counter()
    nine = list(itertools.product(FRACTIONS, SEEDS))
    for fraction, seed in track(nine, f"{'features kept' if cache else 'images each epoch'}, fit"):
        data = TransferDataModule(store, size=size, batch_size=48, label_fraction=fraction, fraction_seed=seed)
        seed_everything(0, verbose=False)  # one encoder for all
        task = kind(15, image_encoder=encoder, image_size=size, protocol="mgca", cache=cache)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = Trainer(
                max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False, num_sanity_val_steps=0, accelerator="cpu", devices=1,
            )  # fmt: skip
            hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
            try:
                trainer.fit(task, datamodule=data)
            finally:
                hook.remove()
        layers.append(task.head.weight.detach().clone())
    return {"passes": passes, "seconds": time.perf_counter() - start, "fits": len(layers), "layers": layers}
