"""One pass over the pixels: digests, perceptual hashes, intensities; and near pairs found without comparing all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sista_pl.data.doctor.subject import Subject
from sista_pl.data.images import IGNORE

# A film that is written again as a JPEG, at two
# thirds of its size, or with another contrast differs in 4 to 28 of the 256 bits (median 4 to 16) and its details
# correlate by 0.87 at least; of two films, the nearest differ in 40 and correlate by 0.76. A crop of 3% is not found.
NEAR_BITS = 30
NEAR_CORRELATION = 0.85
_WINDOW = 2_000
_CANDIDATES = 20_000
# Bits of a byte; numpy counts them itself from 2.0 on.
_ONES = np.array([number.bit_count() for number in range(256)], np.uint8)


@dataclass
class Scan:
    """What one pass over the pixels keeps; arrays are over `Subject.rows`."""

    digest: np.ndarray  # of the pixels
    hash: np.ndarray  # (N, 4) uint64, perceptual
    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    small: np.ndarray  # (N, 256) means of 16 × 16 fields
    mask_digest: np.ndarray  # "" without a mask
    mask_object: np.ndarray  # pixels
    mask_strange: np.ndarray  # values other than 0, 127, 255

    @property
    def flat(self) -> np.ndarray:
        """Images without content: they are alike, and no duplicates."""
        return (self.std < 3) | (self.high.astype(int) - self.low < 8)


def scan(subject: Subject, advance: Callable[[int], None] = lambda n: None) -> Scan:
    """Read every image and mask once."""
    rows = subject.rows
    n = len(rows)
    found = Scan(
        digest=np.zeros(n, "S16"), hash=np.zeros((n, 4), np.uint64), low=np.zeros(n, np.uint8),
        high=np.zeros(n, np.uint8), mean=np.zeros(n, np.float32), std=np.zeros(n, np.float32),
        small=np.zeros((n, 256), np.uint8), mask_digest=np.zeros(n, "S16"), mask_object=np.zeros(n, int),
        mask_strange=np.zeros(n, bool),
    )  # fmt: skip
    has_mask = subject.table["has_mask"].to_numpy(bool)
    for i, row in enumerate(rows.tolist()):
        square = subject.image(row)
        left, top, right, bottom = subject.content(row)
        image = np.ascontiguousarray(square[top:bottom, left:right])
        found.digest[i] = hex_digest(square)
        found.hash[i] = perceptual_hash(image)
        found.small[i] = resized(image, 16).ravel()
        found.low[i], found.high[i] = image.min(), image.max()
        found.mean[i], found.std[i] = image.mean(), image.std()
        if subject.mask and has_mask[row]:
            mask = subject.mask(row)
            found.mask_digest[i] = hex_digest(mask)
            found.mask_object[i] = np.count_nonzero(mask == 255)
            found.mask_strange[i] = not np.isin(mask, (0, IGNORE, 255)).all()
        advance(1)
    return found


def hex_digest(array: np.ndarray) -> bytes:
    return hashlib.blake2b(array.data, digest_size=8).hexdigest().encode()


def resized(image: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX), np.float32)


_DCT = np.cos(np.pi / 32 * np.outer(np.arange(16), np.arange(32) + 0.5)).astype(np.float32)
# Neighbouring frequencies say alike things: each band of 16 bits gets some of all.
_MIXED = np.random.default_rng(0).permutation(256)


def perceptual_hash(image: np.ndarray) -> np.ndarray:
    """Return (4,) uint64: which of the 16 × 16 lowest frequencies (DCT of 32 × 32 means) are above their median."""
    spectrum = (_DCT @ resized(image, 32) @ _DCT.T).ravel()
    spectrum[0] = np.median(spectrum[1:])
    return np.packbits((spectrum > spectrum[0])[_MIXED]).view(np.uint64)


def near_pairs(hashes: np.ndarray, group: np.ndarray, bits: int = NEAR_BITS) -> tuple[np.ndarray, np.ndarray, bool]:
    """Find pairs of near hashes of different groups without comparing all pairs.

    Only rows that agree in one of 16 bands of 16 bits are compared: of the pairs that differ in fewer than 16 bits all,
    in 20 bits 99%, in 30 bits 90%.

    Args:
        hashes: (N, 4) uint64.
        group: (N) the split of each.
        bits: greatest distance.

    Returns:
        pairs (M, 2), nearest first, their distances (M), and whether bands were so common that not all were compared.
    """
    bands, best, capped = hashes.view(np.uint16), dict[tuple[int, int], int](), False
    for band in bands.T:
        order = np.lexsort((*hashes.T, band))
        ranked = band[order]
        alive = np.arange(len(order))
        for step in range(1, _WINDOW):
            alive = alive[alive + step < len(order)]
            alive = alive[ranked[alive] == ranked[alive + step]]
            if not len(alive):
                break
            i, j = order[alive], order[alive + step]
            across = group[i] != group[j]
            i, j = i[across], j[across]
            distance = _ONES[(hashes[i] ^ hashes[j]).view(np.uint8)].sum(1)
            for a, b, d in zip(*(v[distance <= bits].tolist() for v in (i, j, distance)), strict=True):
                best[min(a, b), max(a, b)] = d
        else:
            capped = True
    ordered = sorted(best, key=lambda pair: (best[pair], pair))[:_CANDIDATES]
    pairs = np.array(ordered, int).reshape(-1, 2)
    return pairs, np.array([best[pair] for pair in ordered], int), capped or len(best) > _CANDIDATES


def likeness(first: np.ndarray, second: np.ndarray) -> float:
    """Return the correlation of the details of two images: 64 × 64 means, less their surroundings."""
    details = []
    for image in (first, second):
        small = resized(image, 64)
        blurred = np.asarray(Image.fromarray(resized(image, 8)).resize((64, 64), Image.Resampling.BICUBIC))
        details.append((small - blurred).ravel())
    a, b = (detail - detail.mean() for detail in details)
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm else 0.0
