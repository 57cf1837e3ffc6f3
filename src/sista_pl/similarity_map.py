"""Where on an image the words of a phrase are most alike to it.

L words, P patches (row by row of a square grid), D joint dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sista_pl.pair import at_least_float32
from sista_pl.words import STOP_WORDS, word_id

_STOP = sorted(map(word_id, STOP_WORDS))


def content_words(ids: Tensor) -> Tensor:
    """Return (..., L) bool: the words that say where to look, neither padding, negated, nor boilerplate.

    Args:
        ids: (..., L) signed word identities, as `Features.ids` of a text.
    """
    return (ids > 0) & ~torch.isin(ids, torch.tensor(_STOP, device=ids.device))


def similarity_map(words: Tensor, patches: Tensor, used: Tensor | None = None) -> Tensor:
    """Return the mean cosine of a phrase's words with each patch, as a map.

    Args:
        words: (..., L, D) local features of a text in the joint space.
        patches: (..., P, D) local features of images; P is a square number.
        used: (..., L) bool, the words that count, at least one of them; all where not given.

    Returns:
        (..., rows, columns) in [-1, 1], at least fp32; the leading dimensions of both sides broadcast.
    """
    with torch.autocast(patches.device.type, enabled=False):
        words, patches = (F.normalize(at_least_float32(x), dim=-1) for x in (words, patches))
        share = words.new_ones(words.shape[:-1]) if used is None else used.to(words.dtype)
        phrase = (words * share.unsqueeze(-1)).sum(-2) / share.sum(-1, keepdim=True)  # ... D
        values = (patches @ phrase.unsqueeze(-1)).squeeze(-1)  # ... P
    side = round(values.shape[-1] ** 0.5)
    return values.unflatten(-1, (side, side))


def upsample(maps: Tensor, size: int) -> Tensor:
    """Bring maps (..., rows, columns) to (..., size, size) pixels, bilinearly; a patch's value is its centre's."""
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    grown = F.interpolate(flat, (size, size), mode="bilinear", align_corners=False)
    return grown.reshape(*maps.shape[:-2], size, size)
