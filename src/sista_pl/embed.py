"""Both encoders of a pre-training with their projections, out of its checkpoint, and the embeddings of many films.

B films, E joint dimension, D dimension of the encoder, H W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from torch import Tensor, nn

from sista_pl import plugins
from sista_pl.atomic import writing
from sista_pl.checkpoint import read_checkpoint
from sista_pl.data import transforms
from sista_pl.data.images import read_gray
from sista_pl.data.reports import NORMALISE
from sista_pl.data.store import Store
from sista_pl.errors import BadImage, SistaError
from sista_pl.joint import JointEncoder, load_joint
from sista_pl.losses import LOSSES
from sista_pl.models import ProjectionHead
from sista_pl.pair import Features
from sista_pl.runs import run_of


class Joint(JointEncoder):
    """A `JointEncoder` that knows the losses it was trained with.

    Args:
        found: of `load_joint`.
        losses: by the name of the component.
    """

    def __init__(self, found: JointEncoder, losses: Mapping[str, nn.Module]):
        super().__init__(
            found.image_encoder, found.text_encoder, found.image_head, found.text_head,
            found.scale, found.image_size, found.tokens_trained,
        )  # fmt: skip
        self.losses = nn.ModuleDict(losses)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def text_features(self, texts: Sequence[str]) -> Features:
        """B texts → the text encoder's features, not projected."""
        tokens = self.text_encoder.tokenize(list(texts)).batch(range(len(texts)))
        return self.text_encoder({k: v.to(self.device) for k, v in tokens.items()})


def open_joint(path: str | Path, device: str = "cpu") -> Joint:
    """Return both encoders of a checkpoint of `sista fit --config pretrain.yaml` and their projections, in eval mode.

    Raises:
        SistaError: not such a checkpoint, weights that don't cover the encoders.
    """
    plugins.load_modules()
    found, hyper = load_joint(path), read_checkpoint(path)["hyper_parameters"]
    losses = {}
    for name, spec in hyper["losses"].items():
        kind, arguments = LOSSES.split(spec)
        if arguments.pop("weight", 1.0):
            losses[name] = LOSSES.build({"name": kind, **arguments}, dim=hyper["embed_dim"])
    return Joint(found, losses).to(device)


@dataclass
class Preparation:
    """How the films and reports of a pre-training came into its encoders.

    Args:
        size: side of the square that a film's long side is brought to, in pixels.
        crop: side of the centre crop of it that the encoder sees.
        normalize: of the reports' text.
        told: where `size` is from.
        of_run: whether it is the run's own.
    """

    size: int
    crop: int
    normalize: str
    told: str
    of_run: bool = False

    def text(self, report: str) -> str:
        """Return a text as the training had its reports."""
        return NORMALISE[self.normalize](report)


def preparation(path: str | Path, crop: int, size: int | None = None) -> Preparation:
    """Return how films are prepared for a checkpoint, from its run's config.yaml where it lies in a run.

    Args:
        path: the checkpoint.
        crop: side of its encoder's input.
        size: side of the stored square; else the run's, else `crop`: the whole film then, nothing cut off.

    Raises:
        SistaError: a size below the crop.
    """
    run = run_of(Path(path))
    data: Any = {}
    if run is not None and (run / "config.yaml").is_file():
        try:
            data = (yaml.safe_load((run / "config.yaml").read_text()) or {})["data"]["init_args"]
        except (OSError, yaml.YAMLError, KeyError, TypeError):
            data = {}  # edited by hand; what follows is told
    own, text = data.get("size"), data.get("text") or {}
    normalize = text.get("normalize", "unicode") if isinstance(text, Mapping) else "unicode"
    if normalize not in NORMALISE:
        normalize = "unicode"
    told = "as asked"
    of_run = size is None and isinstance(own, int) and own >= crop
    if of_run:
        size, told = own, "as its run has it"
    elif size is None:
        size, told = crop, "the whole film, since no config.yaml of its run is beside it; --size sets the store's"
    if size < crop:
        raise SistaError(f"--size {size}: the encoder sees {crop} px of it; give {crop} or more")
    return Preparation(size, crop, normalize, told, of_run)


@dataclass
class Batch:
    """Films on their way into the encoder.

    Args:
        ids: columns of the table, one value a film.
        images: (B, 1, crop, crop) in [-1, 1].
        texts: B reports, "" where a film has none; None where no film has one.
        unreadable: file and why.
    """

    ids: dict[str, list[str]]
    images: Tensor
    texts: list[str] | None = None
    unreadable: list[tuple[str, str]] = field(default_factory=list)


class StoreFilms:
    """The rows of a prepared store, with their reports.

    Args:
        store: prepared at any size of at least the crop.
        how: of the checkpoint.

    Raises:
        SistaError: images below the crop.
    """

    IDS = ("image_id", "patient_id", "study_id", "split")

    def __init__(self, store: Store, how: Preparation):
        self.store, self.how = store, how
        self.columns = list(self.IDS)
        self.transform = transforms.build(store.size, how.crop, train=False)
        self.has_texts = any((store.manifest[name].fillna("") != "").any() for name in ("impression", "findings"))

    def __len__(self) -> int:
        return len(self.store)

    def batches(self, size: int) -> Iterator[Batch]:
        rows = self.store.manifest
        for start in range(0, len(self), size):
            part = slice(start, min(start + size, len(self)))
            images = torch.from_numpy(self.store.images(range(part.start, part.stop)))[:, None]
            ids = {name: rows[name].iloc[part].astype(str).tolist() for name in self.IDS}
            texts = None
            if self.has_texts:
                written = rows["impression"].iloc[part].fillna("") + " " + rows["findings"].iloc[part].fillna("")
                texts = [self.how.text(text) for text in written.str.strip()]
            yield Batch(ids, transforms.normalise(self.transform(images)), texts)


class FileFilms:
    """Image files, decoded in threads a batch ahead.

    Args:
        files: JPEG, PNG or DICOM.
        how: of the checkpoint.
        workers: threads.
    """

    has_texts = False

    def __init__(self, files: Sequence[Path], how: Preparation, workers: int = 1):
        self.files, self.how, self.workers, self.columns = files, how, max(1, workers), ["image"]
        self.transform = transforms.build(how.size, how.crop, train=False)

    def __len__(self) -> int:
        return len(self.files)

    def _read(self, file: Path) -> np.ndarray | str:
        try:
            return read_gray(file, self.how.size)
        except BadImage as why:
            return str(why)

    def batches(self, size: int) -> Iterator[Batch]:
        parts = [self.files[start : start + size] for start in range(0, len(self), size)]
        with ThreadPoolExecutor(self.workers) as pool:
            ahead = pool.map(self._read, parts[0])
            for part, following in zip(parts, [*parts[1:], []], strict=True):
                found, ahead = list(ahead), pool.map(self._read, following)
                good = [(file, pixels) for file, pixels in zip(part, found, strict=True) if not isinstance(pixels, str)]
                bad = [(str(file), why) for file, why in zip(part, found, strict=True) if isinstance(why, str)]
                square = np.stack([pixels for _, pixels in good]) if good else np.zeros((0, *[self.how.size] * 2), "u1")
                images = transforms.normalise(self.transform(torch.from_numpy(square)[:, None]))
                yield Batch({"image": [str(file) for file, _ in good]}, images, None, bad)


@torch.inference_mode()
def embed(
    joint: Joint,
    films: StoreFilms | FileFilms,
    out: Path,
    pooled: bool = False,
    batch_size: int = 64,
    facts: Mapping[str, Any] | None = None,
    advance: Callable[[int], Any] = lambda count: None,
) -> tuple[int, list[tuple[str, str]]]:
    """Write embeddings to a Parquet file, a batch at a time: the memory does not grow with the number of films.

    Columns: the ids of the films, `embedding` float32 of fixed length, and `text_embedding` where the films have
    reports, NaN for a film without one.

    Args:
        joint: of `open_joint`.
        films: of a store, or files.
        out: the file; it has its name only when it is whole.
        pooled: the encoders' own pooled vectors, as they are, instead of the projected ones of length 1.
        batch_size: films at a time.
        facts: plain values, kept as JSON in the file's metadata under `sista`.
        advance: called with the number of films after each batch.

    Returns:
        the number of rows, and the files that can't be read, with the reason.

    Raises:
        SistaError: no film can be read, vectors that are not finite, a file that can't be written.
    """
    towers: tuple[Any, Any] = (joint.image_encoder, joint.text_encoder)
    dims = (towers[0].dim, towers[1].dim) if pooled else (_out(joint.image_head),) * 2
    fields = [pa.field(name, pa.string()) for name in films.columns]
    fields.append(pa.field("embedding", pa.list_(pa.float32(), dims[0])))
    if films.has_texts:
        fields.append(pa.field("text_embedding", pa.list_(pa.float32(), dims[1])))
    schema = pa.schema(fields, {"sista": json.dumps(facts or {})})
    rows, bad = 0, []
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with writing(out) as partial, pq.ParquetWriter(partial, schema) as writer:
            for batch in films.batches(batch_size):
                bad += batch.unreadable
                if len(batch.images):
                    columns: list[Any] = [pa.array(batch.ids[name], pa.string()) for name in films.columns]
                    columns.append(_column(_vectors(joint, batch.images, pooled), dims[0]))
                    if batch.texts is not None:
                        columns.append(_text_column(joint, batch.texts, pooled, dims[1]))
                    writer.write_table(pa.Table.from_arrays(columns, schema=schema))
                    rows += len(batch.images)
                advance(len(batch.images) + len(batch.unreadable))
            if not rows:
                told = f"{bad[0][0]}: {bad[0][1]}"
                raise SistaError(f"no film can be read; the first: {told}; JPEG, PNG and DICOM are read")
    except OSError as why:
        raise SistaError(f"{out}: cannot be written ({why.strerror or why}); give --out another file") from None
    return rows, bad


def _out(head: ProjectionHead) -> int:
    return int(head.pooled.outer.out_features)


def _vectors(joint: Joint, images: Tensor, pooled: bool) -> np.ndarray:
    found = joint.image_encoder(images.to(joint.device))
    return _plain(found.pooled if pooled else joint.image_head.pooled(found.pooled), pooled)


def _plain(vectors: Tensor, pooled: bool) -> np.ndarray:
    vectors = vectors.float()
    if not vectors.isfinite().all():
        raise SistaError("the encoder gives vectors that are not finite; take another checkpoint of the run")
    return (vectors if pooled else nn.functional.normalize(vectors, dim=1)).cpu().numpy()


def _column(vectors: np.ndarray, dim: int) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1)), dim)


def _text_column(joint: Joint, texts: Sequence[str], pooled: bool, dim: int) -> pa.Array:
    # Arrow writes a null in a list of fixed length to Parquet, and can't read it again
    vectors = np.full((len(texts), dim), np.nan, np.float32)
    written = np.array([bool(text) for text in texts])
    if written.any():
        found = joint.text_features([text for text in texts if text])
        vectors[written] = _plain(found.pooled if pooled else joint.text_head.pooled(found.pooled), pooled)
    return _column(vectors, dim)
