"""Losses of segmentation; `takes = "mask"`: forward(logits, mask) → (loss, diagnostics).

B images, H W pixels; a mask is uint8: 0 background, 127 ignore, 255 object.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sista_pl.data.images import IGNORE
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


@LOSSES.register("dice_bce")
class DiceBCE(nn.Module):
    """1 - soft Dice of the batch's object pixels, plus binary cross-entropy, the mean over all pixels of the batch.

    Pixels to be ignored count in neither. Without an object in the batch the Dice term is 0.

    Args:
        dice: weight of the Dice term, in [0, 1]; the cross-entropy has the rest.
    """

    takes = "mask"

    def __init__(self, dice: float = 0.5):
        super().__init__()
        import segmentation_models_pytorch as smp  # half of the time of an import of all losses

        self.share = number("dice_bce", "dice", dice, 0, 1)
        self.dice = smp.losses.DiceLoss("binary", from_logits=True, smooth=1.0, ignore_index=IGNORE)
        self.bce = smp.losses.SoftBCEWithLogitsLoss(ignore_index=IGNORE, reduction="none")

    def forward(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Args: logits (B, 1, H, W), mask (B, H, W)."""
        logits, target = logits.float(), binary_target(logits, mask)
        # its own mean would divide by the ignored pixels too
        bce = self.bce(logits, target).sum() / (target != IGNORE).sum().clamp(min=1)
        dice = self.dice(logits, target)
        return self.share * dice + (1 - self.share) * bce, {"dice": dice.detach(), "bce": bce.detach()}


@LOSSES.register("focal_logdice")
class FocalLogDice(nn.Module):
    """10 · focal loss (γ = 2) - log(soft Dice), what MGCA trains its U-Net with.

    The focal loss is the mean over all pixels of the batch; Dice is of the batch's object pixels, 0 where it has none.

    Args:
        focal: weight of the focal term.
        gamma: its exponent.
    """

    takes = "mask"

    def __init__(self, focal: float = 10.0, gamma: float = 2.0):
        super().__init__()
        import segmentation_models_pytorch as smp

        self.weight = number("focal_logdice", "focal", focal, 0)
        self.focal = smp.losses.FocalLoss(
            "binary", gamma=number("focal_logdice", "gamma", gamma, 0), ignore_index=IGNORE
        )
        self.dice = smp.losses.DiceLoss("binary", log_loss=True, from_logits=True, smooth=1.0, ignore_index=IGNORE)

    def forward(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Args: logits (B, 1, H, W), mask (B, H, W)."""
        logits, target = logits.float(), binary_target(logits, mask)
        # the mean over no pixel would be NaN
        focal = self.focal(logits, target) if (target != IGNORE).any() else logits.sum() * 0
        dice = self.dice(logits, target)
        return self.weight * focal + dice, {"focal": focal.detach(), "logdice": dice.detach()}
