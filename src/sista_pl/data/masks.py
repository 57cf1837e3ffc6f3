"""Masks as run lengths, as Kaggle's competitions write them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sista_pl.errors import BadImage


@dataclass(frozen=True, slots=True)
class Rle:
    """A mask as pairs of numbers over an image, column by column.

    Args:
        runs: one string an object, "start length start length …"; the mask is their union, () is an empty mask.
        width: of the image, in pixels.
        height: the same.
        relative: a start counts from the end of the run before (SIIM-ACR stage 1); else from pixel 1 of the image.
    """

    runs: tuple[str, ...]
    width: int
    height: int
    relative: bool

    def decode(self) -> np.ndarray:
        """Return (height, width) uint8: 255 object, 0 background.

        Raises:
            BadImage: not pairs of whole numbers, a run without length or past the end.
        """
        flat = np.zeros(self.width * self.height, np.uint8)
        for text in self.runs:
            try:
                numbers = [int(word) for word in text.split()]
            except ValueError:
                raise BadImage(f"run lengths with {text[:40]!r}; whole numbers are known") from None
            if len(numbers) % 2:
                raise BadImage(f"run lengths of {len(numbers)} numbers; they come in pairs")
            end = 0
            for start, length in zip(numbers[::2], numbers[1::2], strict=True):
                first = end + start if self.relative else start - 1
                if first < 0 or length < 1 or first + length > flat.size:
                    raise BadImage(f"run of {length} from {start} leaves the image of {self.width}×{self.height}")
                end = first + length
                flat[first:end] = 255
        return flat.reshape(self.width, self.height).T


def encode_rle(mask: np.ndarray) -> str:
    """(H, W) bool → "start length start length …", column by column, pixels counted from 1 (Kaggle's form)."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    starts, ends = edges[::2], edges[1::2]
    return " ".join(f"{start + 1} {end - start}" for start, end in zip(starts, ends, strict=True))
