"""Losses of image labels; `takes = "labels"`: forward(logits, labels) → (loss, diagnostics).

B images, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sista_pl.distributed import global_mean
from sista_pl.losses import LOSSES


@LOSSES.register("bce")
class BinaryCrossEntropy(nn.Module):
    """Binary cross-entropy of each class, the mean over known labels; NaN is unknown."""

    takes = "labels"

    def forward(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Args: logits (B, K), labels (B, K) 1, 0 or NaN."""
        known = ~torch.isnan(labels)
        each = nn.functional.binary_cross_entropy_with_logits(
            logits.float(), torch.where(known, labels, 0).float(), reduction="none"
        )
        return global_mean(each, known), {}


@LOSSES.register("cross_entropy")
class CrossEntropy(nn.Module):
    """Cross-entropy over exclusive classes, the mean over images with a known class."""

    takes = "labels"

    def forward(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Args: logits (B, K), labels (B, K) one-hot, a row of NaN where unknown."""
        known = ~torch.isnan(labels).any(1)
        each = -(torch.nan_to_num(labels).float() * logits.float().log_softmax(1)).sum(1)
        return global_mean(each, known), {}
