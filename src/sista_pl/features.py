"""A frozen encoder's vectors of a store's images, computed once and kept.

N rows, D dimension of `pooled`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from torch import Tensor

from sista_pl import distributed
from sista_pl.atomic import writing
from sista_pl.data import transforms
from sista_pl.data.store import Store
from sista_pl.models import ImageEncoder


def encoder_hash(encoder: ImageEncoder) -> str:
    """SHA-256 over an encoder's class, the normalisation of its input, names, shapes and values."""
    digest = hashlib.sha256(f"{type(encoder).__module__}.{type(encoder).__qualname__}".encode())
    digest.update(str(getattr(encoder, "name", "")).encode())
    if hasattr(encoder, "renormalise"):
        digest.update(str((encoder.renormalise.mean, encoder.renormalise.std)).encode())
    for name, value in sorted(encoder.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def extract(
    encoder: ImageEncoder, store: Store, rows: np.ndarray, crop: int, batch_size: int = 64, progress: bool = False
) -> np.ndarray:
    """Return the pooled vectors (len(rows), D) float32 of the centre crops of these rows; the encoder in eval mode."""
    transform = transforms.build(store.size, crop, train=False)
    device, training, found = next(encoder.parameters()).device, encoder.training, []
    encoder.eval()
    starts = range(0, len(rows), batch_size)
    for start in track(starts, "encoding images", console=Console(stderr=True), disable=not progress):
        images = torch.from_numpy(store.images(rows[start : start + batch_size]))[:, None]
        found.append(encoder(transforms.normalise(transform(images)).to(device)).pooled.float().cpu().numpy())
    encoder.train(training)
    dim = encoder.dim
    return np.concatenate(found) if found else np.zeros((0, dim), np.float32)


def cached(
    encoder: ImageEncoder, store: Store, rows: np.ndarray, crop: int, batch_size: int = 64, progress: bool = True
) -> np.ndarray:
    """Return (len(store), D) float32 in which `rows` are filled, NaN elsewhere; kept beside the store.

    The file's name is a hash of the encoder's weights, the data and the crop: another of them, another file. Rows that
    an earlier run filled are not encoded again. Several ranks share the work; what is kept is what the first one finds.
    """
    key = hashlib.sha256(f"{encoder_hash(encoder)} {store.hash} {crop}".encode()).hexdigest()[:16]
    file = store.path.parent / "features" / f"{store.path.name}-{key}.npy"
    found = _load(file, (len(store), encoder.dim))
    kept = rows[~np.isnan(found[rows, 0])]
    if distributed.world_size() > 1:  # on another machine the store may be a copy, with other features or none
        first = [(kept, found[kept])]
        dist.broadcast_object_list(first)
        kept, vectors = first[0]
        found[kept] = vectors
    missing = rows[~np.isin(rows, kept)]
    if distributed.world_size() > 1:
        parts: list = [None] * distributed.world_size()
        mine = missing[distributed.rank() :: distributed.world_size()]
        dist.all_gather_object(parts, (mine, extract(encoder, store, mine, crop, batch_size)))
        for part, vectors in parts:
            found[part] = vectors
    elif len(missing):
        found[missing] = extract(encoder, store, missing, crop, batch_size, progress and len(missing) > 500)
    if len(missing) and distributed.rank() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        with writing(file) as partial, partial.open("wb") as out:
            np.save(out, found)
    return found


def _load(file: Path, shape: tuple[int, int]) -> np.ndarray:
    try:
        found = np.load(file)
    except (OSError, ValueError, EOFError):
        return np.full(shape, np.nan, np.float32)
    return found if found.shape == shape else np.full(shape, np.nan, np.float32)
