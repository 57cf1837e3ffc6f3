"""Losses of segmentation; `takes = "mask"`: forward(logits, mask) → (loss, diagnostics).

B images, H W pixels; a mask is uint8: 0 background, 127 ignore, 255 object.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sista_pl.data.images import IGNORE
from sista_pl.distributed import all_sum, global_mean
from sista_pl.errors import SistaError
from sista_pl.losses import LOSSES
from sista_pl.losses.arguments import number


def binary_target(logits: Tensor, mask: Tensor) -> Tensor:
    """(B, H, W) uint8 → (B, 1, H, W) float: 0 background, 1 object, 127 ignore.

    Raises:
        SistaError: a mask of another size than the logits.
    """
    if logits.shape != mask[:, None].shape:
        raise SistaError(
            f"mask: of {tuple(mask.shape)}, the logits of {tuple(logits.shape)}; bring the logits to the mask's size"
        )
    return torch.where(mask == 255, 1, mask)[:, None].float()


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the binary cross-entropy (B, 1, H, W) of each pixel; that of an ignored one means nothing."""
    known = target != IGNORE
    return F.binary_cross_entropy_with_logits(logits, torch.where(known, target, 0), reduction="none")


def soft_dice(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the soft Dice () of the object pixels of all ranks, smoothed by one pixel, and whether there is one.

    Of p in [0, 1] and t of 0 or 1 it is 2 Σpt = Σp + Σt - Σ|p - t|, summed so in segmentation-models-pytorch, too.
    """
    known = target != IGNORE
    predicted, true = F.logsigmoid(logits).exp() * known, target * known
    sums = torch.stack([predicted.sum(), true.sum(), torch.linalg.vector_norm(predicted - true, ord=1)])
    predicted, true, apart = all_sum(sums)
    both = (predicted + true - apart) / 2
    return (both + 1) / ((predicted + true) / 2 + 1), true > 0


@LOSSES.register("dice_bce")
class DiceBCE(nn.Module):
    """1 - soft Dice of the batch's object pixels, plus binary cross-entropy, the mean over all pixels of the batch.

    The batch is that of all ranks. Pixels to be ignored count in neither. Without an object the Dice term is 0.

    Args:
        dice: weight of the Dice term, in [0, 1]; the cross-entropy has the rest.
    """

    takes = "mask"

    def __init__(self, dice: float = 0.5):
        super().__init__()
        self.share = number("dice_bce", "dice", dice, 0, 1)

    def forward(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Args: logits (B, 1, H, W), mask (B, H, W)."""
        logits, target = logits.float(), binary_target(logits, mask)
        bce = global_mean(cross_entropy(logits, target), target != IGNORE)
        score, there = soft_dice(logits, target)
        dice = (1 - score) * there
        return self.share * dice + (1 - self.share) * bce, {"dice": dice.detach(), "bce": bce.detach()}


@LOSSES.register("focal_logdice")
class FocalLogDice(nn.Module):
    """10 · focal loss (γ = 2) - log(soft Dice), what MGCA trains its U-Net with.

    The focal loss is the mean over all pixels of the batch; Dice is of the batch's object pixels, 0 where it has none.
    The batch is that of all ranks.

    Args:
        focal: weight of the focal term.
        gamma: its exponent.
    """

    takes = "mask"

    def __init__(self, focal: float = 10.0, gamma: float = 2.0):
        super().__init__()
        self.weight = number("focal_logdice", "focal", focal, 0)
        self.gamma = number("focal_logdice", "gamma", gamma, 0)

    def forward(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Args: logits (B, 1, H, W), mask (B, H, W)."""
        logits, target = logits.float(), binary_target(logits, mask)
        each = cross_entropy(logits, target)
        focal = global_mean((1 - (-each).exp()) ** self.gamma * each, target != IGNORE)
        score, there = soft_dice(logits, target)
        dice = -score.log() * there
        return self.weight * focal + dice, {"focal": focal.detach(), "logdice": dice.detach()}
