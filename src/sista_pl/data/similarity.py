"""How alike two reports are: a unit vector for each distinct report, and the figures that calibrate their products.

N distinct reports, M training images, Ds semantic dimension. S = r rᵀ, calibrated S' = (S - o) / (1 - o), so that two
unrelated images have about 0 and two of equal reports 1. Images are counted, as batches hold them: a study of two
frontal films has two, with one report.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from sista_pl.atomic import writing
from sista_pl.data.findings import finding_vectors
from sista_pl.errors import SistaError, did_you_mean
from sista_pl.registry import Registry

# Part of a cache file's name: raise it whenever a source gives other vectors for the same reports.
VERSION = 2
CALIBRATIONS = ("center", "none")
MAX_DIMENSIONS = 1024
SAMPLE_SHAPE = (256, 1024)
EQUAL = 0.999
_QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)

SOURCES = Registry("similarity source")


class Source(Protocol):
    """What a registered source builds."""

    def vectors(self, reports: Sequence[str], train: np.ndarray) -> np.ndarray:
        """Return (N, Ds) unit rows of N reports; only those that `train` (M,) points to may be fitted on."""

    def fingerprint(self) -> str:
        """Return what the vectors depend on beside the arguments: the weights in a folder, say; "" for nothing."""


@SOURCES.register("findings")
class Findings:
    """Findings with side and zone, read from the text by rules; nothing is fitted. See `findings.finding_vectors`."""

    def vectors(self, reports: Sequence[str], train: np.ndarray) -> np.ndarray:
        return finding_vectors(reports)[0]

    def fingerprint(self) -> str:
        return ""


@SOURCES.register("tfidf")
class Tfidf:
    """TF-IDF of single words and pairs of words, reduced by a truncated SVD: a lexical control.

    Args:
        dimensions: of the reduced space, 1 to 1023.
        max_features: number of the most frequent words and word pairs that are kept.
        seed: of the SVD.
    """

    def __init__(self, dimensions: int = 512, max_features: int = 50_000, seed: int = 0):
        if not 1 <= dimensions < MAX_DIMENSIONS:
            raise SistaError(f"similarity source 'tfidf': dimensions {dimensions}; choose 1 to {MAX_DIMENSIONS - 1}")
        self.dimensions, self.max_features, self.seed = dimensions, max_features, seed

    def vectors(self, reports: Sequence[str], train: np.ndarray) -> np.ndarray:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        tfidf = TfidfVectorizer(
            ngram_range=(1, 2), token_pattern=r"\w+", max_features=self.max_features, dtype=np.float32
        )
        try:
            fitted = tfidf.fit_transform([reports[i] for i in np.unique(train)])
        except ValueError as why:
            raise SistaError(f"similarity source 'tfidf': {why}; check that the training reports have words") from None
        rows = tfidf.transform(reports)
        if fitted.shape[1] > self.dimensions:
            rows = TruncatedSVD(self.dimensions, random_state=self.seed).fit(fitted).transform(rows)
        else:
            rows = rows.toarray()
        # A report without any word of the training split is like its kind only.
        unknown = np.linalg.norm(rows, axis=1, keepdims=True) < 1e-6
        rows = np.where(unknown, 0, rows)
        return _unit(np.concatenate([rows, unknown], axis=1) if unknown.any() else rows)

    def fingerprint(self) -> str:
        return ""


@SOURCES.register("frozen_text")
class FrozenText:
    """A frozen Hugging Face encoder.

    Args:
        model: local folder, or name on the hub; its hidden size is at most 1024.
        pooling: "cls" (first token) or "mean" (of all tokens that are no padding).
        max_tokens: to which a report is cut.
        batch_size: reports encoded at once.
    """

    def __init__(self, model: str, pooling: str = "mean", max_tokens: int = 112, batch_size: int = 64):
        if pooling not in ("cls", "mean"):
            raise SistaError(
                f"similarity source 'frozen_text': pooling {pooling!r}; {did_you_mean(pooling, ('cls', 'mean'))}"
            )
        self.model, self.pooling, self.max_tokens, self.batch_size = model, pooling, max_tokens, batch_size

    def vectors(self, reports: Sequence[str], train: np.ndarray) -> np.ndarray:
        import torch

        from sista_pl.models.text import hugging_face

        encoder = hugging_face(self.model, pooling=self.pooling, max_tokens=self.max_tokens, frozen=True)
        dim = cast(int, encoder.dim)
        if dim > MAX_DIMENSIONS:
            raise SistaError(
                f"similarity source 'frozen_text': {self.model!r} has {dim} dimensions; "
                f"choose an encoder with at most {MAX_DIMENSIONS}"
            )
        rows = np.empty((len(reports), dim), dtype=np.float32)
        table = encoder.tokenize(reports)
        # Reports of like length together: less padding.
        order = sorted(range(len(reports)), key=lambda i: len(reports[i]))
        with torch.inference_mode():
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                rows[batch] = encoder(table.batch(batch)).pooled.numpy()
        return _unit(rows)

    def fingerprint(self) -> str:
        folder, digest = Path(self.model), hashlib.sha256()
        for file in sorted(p for p in folder.iterdir() if p.is_file()) if folder.is_dir() else ():
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                for block in iter(lambda: stream.read(1 << 20), b""):
                    digest.update(block)
        return digest.hexdigest()


@SOURCES.register("permuted")
class Permuted:
    """A negative control, not for use: the vectors of another source, each given to another text.

    As many texts are alike as before, and as much, but not those that say the same. Studies of one and the same text
    stay alike: they have one vector, whichever it is.

    Args:
        of: the other source, a name or a mapping with `name` and its arguments.
        seed: of the permutation.
    """

    def __init__(self, of: str | Mapping[str, Any] = "findings", seed: int = 0):
        self.of: Source = SOURCES.build(of, seed=seed)
        self.seed = seed

    def vectors(self, reports: Sequence[str], train: np.ndarray) -> np.ndarray:
        ring = np.random.default_rng(self.seed).permutation(len(reports))  # each gets its successor's, none its own
        vectors = np.asarray(self.of.vectors(reports, train))
        moved = np.empty_like(vectors)
        moved[ring] = vectors[np.roll(ring, -1)]
        return moved

    def fingerprint(self) -> str:
        return self.of.fingerprint()


@dataclass
class Similarity:
    """What `fit_similarity` returns, and what a cache file holds.

    Args:
        vectors: (N, Ds) float32 unit rows, one a distinct report.
        offset: mean S of two different training images; 0 where calibration is "none".
        sample: (<= 256, <= 1024) float32 calibrated similarities S' of training images to other training images.
        source: name of the source.
        calibration: "center" or "none".
        identical_pairs: share of pairs of training images that have the same text.
        repeated_images: share of training images whose text another one has, too.
    """

    vectors: np.ndarray
    offset: float
    sample: np.ndarray
    source: str
    calibration: str
    identical_pairs: float
    repeated_images: float

    def report(self) -> dict[str, Any]:
        """Return plain figures, fit for JSON: offset, shares of equal reports, median and quantiles of S'."""
        quantiles = np.quantile(self.sample, _QUANTILES).tolist()
        return {
            "source": self.source,
            "calibration": self.calibration,
            "reports": len(self.vectors),
            "dimensions": self.vectors.shape[1],
            "offset": self.offset,
            "identical_pairs": self.identical_pairs,
            "repeated_images": self.repeated_images,
            "equal_semantics": float((self.sample >= EQUAL).mean()),
            "median": quantiles[_QUANTILES.index(0.5)],
            "quantiles": dict(zip((str(q) for q in _QUANTILES), quantiles, strict=True)),
        }


def fit_similarity(
    reports: Sequence[str],
    train: np.ndarray,
    source: str | Mapping[str, Any] = "findings",
    calibration: str = "center",
    seed: int = 0,
    cache: Path | None = None,
) -> Similarity:
    """Compute the report similarity of a data set.

    Args:
        reports: the N distinct texts of all splits.
        train: (M,) int, the text of each training image as an index into `reports`; repeats as they occur. Whatever is
            fitted (vocabulary, offset, sample) is fitted on these.
        source: a name in `SOURCES`, or a mapping with `name` and its arguments.
        calibration: "center" takes o = (‖Σr‖² - M) / (M (M - 1)), the mean S of two different training images;
            "none" takes 0.
        seed: of the SVD and of the sample.
        cache: folder where the result is kept and looked up; None for no cache.

    Raises:
        SistaError: unknown source, argument or calibration; fewer than two training images; an index out of range;
            training reports that are all alike, which no calibration can part.
    """
    train = np.asarray(train)
    if calibration not in CALIBRATIONS:
        raise SistaError(f"similarity calibration {calibration!r}: unknown; {did_you_mean(calibration, CALIBRATIONS)}")
    if len(train) < 2:
        raise SistaError(f"report similarity: {len(train)} training images; at least two are needed to compare")
    if train.min() < 0 or train.max() >= len(reports):
        raise SistaError(
            f"report similarity: training index {train.max()} for {len(reports)} reports; give indices into them"
        )
    name, _ = SOURCES.split(source)
    built: Source = SOURCES.build(source, seed=seed)
    path = None
    if cache is not None:
        key = _key(reports, train, SOURCES.split(source), built.fingerprint(), calibration, seed)
        path = Path(cache) / f"similarity-{name}-{key[:32]}.npz"
        if (stored := _load(path)) is not None:
            return stored
    vectors = _checked(built.vectors(reports, train), len(reports), name)
    counts = np.bincount(train, minlength=len(reports)).astype(np.float64)
    images = counts.sum()
    offset = 0.0
    if calibration == "center":
        offset = float((np.square(_weighted_sum(vectors, counts)).sum() - images) / (images * (images - 1)))
        if offset > 1 - 1e-6:
            raise SistaError(
                f"report similarity {name!r}: all training reports are alike to it; "
                "check the reports, choose another source, or set calibration: none"
            )
    similarity = Similarity(
        vectors=vectors,
        offset=offset,
        sample=(_sample(vectors, train, seed) - np.float32(offset)) / np.float32(1 - offset),
        source=name,
        calibration=calibration,
        identical_pairs=float((np.square(counts).sum() - images) / (images * (images - 1))),
        repeated_images=float(counts[counts > 1].sum() / images),
    )
    if path is not None:
        _save(similarity, path)
    return similarity


def _unit(rows: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.maximum(norm, np.finfo(np.float32).tiny)).astype(np.float32)


def _weighted_sum(rows: np.ndarray, weights: np.ndarray, block: int = 8192) -> np.ndarray:
    """Return Σ w_i r_i in double precision, without a double-precision copy of all rows."""
    total = np.zeros(rows.shape[1])
    for i in range(0, len(rows), block):
        total += weights[i : i + block] @ rows[i : i + block].astype(np.float64)
    return total


def _checked(vectors: np.ndarray, n: int, name: str) -> np.ndarray:
    """Hold a source, maybe one of a plug-in, to its contract."""
    vectors = np.asarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != n or vectors.shape[1] > MAX_DIMENSIONS:
        raise SistaError(
            f"similarity source {name!r}: vectors of shape {vectors.shape} for {n} reports; "
            f"it has to return ({n}, at most {MAX_DIMENSIONS})"
        )
    if not np.allclose(np.square(vectors).sum(1), 1, atol=1e-3):
        raise SistaError(f"similarity source {name!r}: vectors that are not of length 1; it has to return unit rows")
    return vectors


def _sample(vectors: np.ndarray, train: np.ndarray, seed: int) -> np.ndarray:
    """Return S of up to 256 training images to up to 1024 others each, without replacement."""
    rng, images = np.random.default_rng(seed), len(train)
    anchors = rng.choice(images, min(SAMPLE_SHAPE[0], images), replace=False)
    sample = np.empty((len(anchors), min(SAMPLE_SHAPE[1], images - 1)), dtype=np.float32)
    for row, anchor in zip(sample, anchors, strict=True):
        others = (anchor + 1 + rng.choice(images - 1, len(row), replace=False)) % images
        row[:] = vectors[train[others]] @ vectors[train[anchor]]
    return sample


def _key(reports: Sequence[str], train: np.ndarray, *rest: Any) -> str:
    digest = hashlib.sha256(json.dumps([VERSION, len(reports), *rest], sort_keys=True, default=str).encode())
    for report in reports:
        raw = report.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    digest.update(train.astype("<i8").tobytes())
    return digest.hexdigest()


def _load(path: Path) -> Similarity | None:
    """Return what a cache file holds; None where there is none, or where it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            figures = json.loads(str(stored["figures"]))
            return Similarity(vectors=stored["vectors"], sample=stored["sample"], **figures)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _save(similarity: Similarity, path: Path) -> None:
    """Write atomically: of several processes that compute the same, each leaves a whole file."""
    figures = {k: v for k, v in asdict(similarity).items() if k not in ("vectors", "sample")}
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as partial, partial.open("wb") as stream:
        np.savez_compressed(stream, vectors=similarity.vectors, sample=similarity.sample, figures=json.dumps(figures))
