"""Finding level: images and reports against one prototype for each finding that reports name.

B pairs of this rank, D joint dimension, K findings.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sista_pl.data.findings import KINDS
from sista_pl.errors import SistaError
from sista_pl.losses import LOSSES
from sista_pl.losses.arguments import choice, number, whole
from sista_pl.pair import Pair, at_least_float32


@LOSSES.register("findings")
class FindingPrototypes(nn.Module):
    """What a report says is there, predicted from its image and from itself, by prototypes that both sides share.

    With unit v, t and K prototypes C (rows normalised in each step, inside `forward`), r the first K coordinates of the
    report's semantic vector and y = r² / Σ r², in which "no finding" has little beside a finding:
    ½ [sCE(v Cᵀ / temperature, y) + sCE(t Cᵀ / temperature, y)]. Two reports are alike as far as they share findings,
    where `sia` asks whether they are alike as a whole, and most pairs that share one are not. The softmax with equal
    parts for each of several labels is that of Mahajan et al. 2018 (arXiv 1805.00932), who found it ahead of a sigmoid
    each. It is no part of the SISTA paper (Bui et al., arXiv 2601.08165); no label is used but what the report says.

    Logs `image_accuracy` and `text_accuracy`: how often the nearest prototype is of one of the report's own findings,
    those with at least half of the largest share of y.

    Args:
        sides: `both`, or `image` alone.
        temperature: > 0.
        prototypes: K >= 2; the default are the findings of `similarity: findings`, without their sides and zones, in
            an order that no data change. Of fewer coordinates all are used.
        dim: D; the task gives its own.

    Raises:
        SistaError: argument out of its range; in `forward`: no report similarity, or one with negative coordinates;
            `dim` is not that of the pair.
    """

    needs_tokens = False

    def __init__(self, sides: str = "both", temperature: float = 0.1, prototypes: int = len(KINDS) + 1, dim: int = 128):
        super().__init__()
        self.sides = choice("findings", "sides", sides, ("both", "image"))
        self.temperature = number("findings", "temperature", temperature, 0, above=True)
        rows, columns = whole("findings", "prototypes", prototypes, 2), whole("findings", "dim", dim, 1)
        self.prototypes = nn.Parameter(F.normalize(torch.randn(rows, columns), dim=1))
        self.checked = False

    def forward(self, pair: Pair) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean over the local pairs, () fp32, and what to log."""
        if pair.semantics is None:
            raise SistaError(
                "loss 'findings': the data bring no report similarity; set `similarity: findings` in the data group"
            )
        count, dim = self.prototypes.shape
        r = at_least_float32(pair.semantics.vectors[:, :count].detach())  # B K
        if pair.image.pooled.shape[1] != dim:
            given = pair.image.pooled.shape[1]
            raise SistaError(f"loss 'findings': dim is {dim}, the embeddings have {given}; give `dim: {given}`")
        if not self.checked:  # once: it waits for the device
            if bool((r < 0).any()):
                raise SistaError(
                    "loss 'findings': the report similarity has negative coordinates, which are no findings; set "
                    "`similarity: findings` in the data group"
                )
            self.checked = True
        with torch.autocast(pair.image.pooled.device.type, enabled=False):
            target = r.square() / r.square().sum(1, keepdim=True).clamp_min(torch.finfo(r.dtype).tiny)  # B K
            prototypes = F.normalize(at_least_float32(self.prototypes), dim=1)[: r.shape[1]]  # K D
            losses, logs = [], {}
            for name, side in (("image", pair.image), ("text", pair.text))[: 2 if self.sides == "both" else 1]:
                logits = F.normalize(at_least_float32(side.pooled), dim=1) @ prototypes.T / self.temperature  # B K
                losses.append(-(target * logits.log_softmax(1)).sum(1).mean())
                nearest = target.gather(1, logits.detach().argmax(1, keepdim=True))
                logs[f"{name}_accuracy"] = (nearest >= target.amax(1, keepdim=True) / 2).float().mean()
        # alone it would leave the logit scale, and of one side the other's head, without a gradient, which stops DDP
        unused = pair.text.pooled.sum() if self.sides == "image" else 0
        return torch.stack(losses).mean() + 0 * (pair.scale + unused), logs
