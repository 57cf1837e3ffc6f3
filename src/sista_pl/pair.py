"""What an encoder returns and what a loss may look at. Losses know no model, models know no loss.

B pairs, D joint dimension, N tokens (P patches of an image, L words of a report), K classes, Ds semantic dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Features:
    """What an encoder returns for a batch.

    Args:
        pooled: (B, D) one vector an image or report.
        local: (B, N, D) one vector a patch (row-major over the grid) or word.
        mask: (B, N) bool, True where `local` is real; None where all are (images).
        ids: (B, N) int64 word identity: a stable hash of the word, the same in each report; **negative** where the
            word stands inside a negation ("no [effusion]"), 0 for padding. None for images.
        attention: (B, N) >= 0, attention of the class token to each patch or word in the last layer, mean over heads,
            summed over a word's sub-words, 0 for padding; no gradient. None where no loss asks for it
            (`needs_attention`), and of images where the encoder has no class token, as a CNN.
    """

    pooled: Tensor
    local: Tensor
    mask: Tensor | None = None
    ids: Tensor | None = None
    attention: Tensor | None = None

    def shifted(self) -> Features:
        """Return each sample's features in the place of the next one, for negative controls; the last is the first."""
        moved = (self.pooled, self.local, self.mask, self.ids, self.attention)
        return Features(*(x if x is None else x.roll(1, 0) for x in moved))  # type: ignore[arg-type]


@dataclass
class Semantics:
    """How alike the reports of a batch are, as the similarity source sees it; never carries a gradient.

    `S = vectors @ vectors.T`, calibrated `S' = (S - offset) / (1 - offset)`, so that two unrelated reports have
    about 0 and two equal ones 1.

    Args:
        vectors: (B, Ds) unit rows.
        offset: mean similarity of two different training reports; 0 without calibration.
        sample: (M, N) calibrated similarities of M training studies to N *other* training studies, drawn once;
            thresholds and temperatures are solved on it for a wanted number of positives an anchor.
    """

    vectors: Tensor
    offset: float = 0.0
    sample: Tensor | None = None


@dataclass
class Pair:
    """A batch of image-report pairs in the joint space: all that a loss may look at.

    Args:
        image: `pooled` (B, D) and `local` (B, P, D), as the projection heads return them, not normalised.
        text: the same for the report's words (B, L, D), with `mask` and `ids`.
        scale: () the learnable logit scale s = exp(s'), s <= 100.
        semantics: report similarities, or None where no similarity source is configured.
        labels: (B, K) float 1, 0 or NaN = unknown, or None.
        epoch: the current epoch, from 0.
    """

    image: Features
    text: Features
    scale: Tensor
    semantics: Semantics | None = None
    labels: Tensor | None = None
    epoch: int = 0


def at_least_float32(x: Tensor) -> Tensor:
    """Return half precision as float32, and leave float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
