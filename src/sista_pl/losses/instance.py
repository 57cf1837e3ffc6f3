"""Instance level: whole images against whole reports of the global batch.

B pairs of this rank, N pairs of all ranks, b rows of a chunk, D joint dimension.

The local rows are compared with all columns, in both directions: memory B x N, and exactly the loss of one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sista_pl.distributed import gather, rank
from sista_pl.losses import LOSSES
from sista_pl.losses.arguments import whole
from sista_pl.pair import Pair, at_least_float32

Block = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


class Target(NamedTuple):
    """What some rows of the batch should be close to.

    Args:
        mass: (b, N) rows that sum to 1.
        dropped: (b, N) bool, True for columns outside the denominator; None where there are none.
        diagnostics: (b,) values to log the mean of.
        alone: each column with mass is contrasted with those without any, and not with the others that have some:
            -Σ_j Y_ij log(e^{z_ij} / (e^{z_ij} + Σ_{k: Y_ik = 0} e^{z_ik})); 0 where there are none without.
    """

    mass: Tensor
    dropped: Tensor | None
    diagnostics: dict[str, Tensor]
    alone: bool = False


@LOSSES.register("clip")
class Clip(nn.Module):
    """Image-report contrast in which only the own report is right: ½ [CE(z, I) + CE(zᵀ, I)], z = s v tᵀ.

    Radford et al. 2021 (CLIP); Zhang et al. 2022 (ConVIRT). Logs `accuracy`: how often the own partner of a row has
    the highest of N similarities, mean of both directions.

    Args:
        chunk: rows of z that are kept at once, >= 1, for batches whose (B, N) does not fit; None for all. The value
            and the gradients stay the same, the backward pass computes the rows again.

    Raises:
        SistaError: `chunk` is no whole number >= 1.
    """

    needs_tokens = False

    def __init__(self, chunk: int | None = None):
        super().__init__()
        self.chunk = None if chunk is None else whole("clip", "chunk", chunk, 1)

    def forward(self, pair: Pair) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean over the local rows of both directions, () fp32, and what to log."""

        def own(rows: Tensor, diagonal: Tensor) -> Target:
            return Target(diagonal.to(torch.float32), None, {})

        return contrast(pair, own, self.chunk)


def contrast(
    pair: Pair, target: Callable[[Tensor, Tensor], Target], chunk: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Contrast local images with all reports and local reports with all images.

    Args:
        pair: of this rank.
        target: called with the local row numbers (b,) and their place (b, N) bool in the global batch.
        chunk: rows that are kept at once; None for all.

    Returns:
        () mean over the local rows and both directions, and the detached means of the target's diagnostics and of
        `accuracy`.
    """
    with torch.autocast(pair.image.pooled.device.type, enabled=False):
        v, t = (F.normalize(at_least_float32(side.pooled), dim=1) for side in (pair.image, pair.text))  # B D
        v_all, t_all = gather(v), gather(t)  # N D
        scale = at_least_float32(pair.scale)
        first, columns = rank() * len(v), torch.arange(len(v_all), device=v.device)

        def block(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            wanted = target(rows, (rows + first)[:, None] == columns)
            loss, hits = torch.zeros_like(v[rows, 0]), torch.zeros(len(rows), device=v.device)  # b
            for anchors, others in ((v, t_all), (t, v_all)):
                z = scale * anchors[rows] @ others.T  # b N
                loss = loss + cross_entropy(z, wanted) / 2
                hits = hits + (z.argmax(1) == rows + first).float() / 2
            return loss, wanted.diagnostics | {"accuracy": hits}

        return by_rows(block, torch.arange(len(v), device=v.device), chunk)


def cross_entropy(z: Tensor, target: Target) -> Tensor:
    """Return the loss (b,) of rows of z (b, N) under their target."""
    mass, dropped = target.mass, target.dropped
    if target.alone:
        others = mass > 0 if dropped is None else dropped | (mass > 0)
        # the lowest finite number, so that nothing of a row without negatives is inf - inf
        negatives = z.masked_fill(others, torch.finfo(z.dtype).min).logsumexp(1, keepdim=True)  # b 1
        return -(mass * F.logsigmoid(z - negatives)).sum(1)
    free = z if dropped is None else z.masked_fill(dropped, -torch.inf)
    return free.logsumexp(1) - (mass * z).sum(1)


def by_rows(block: Block, rows: Tensor, chunk: int | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean of a loss over the rows (B,), () and the detached means of its diagnostics.

    Args:
        block: of some rows (b,) → their losses (b,) and what to log of them, each (b,).
        rows: all of them.
        chunk: rows that are kept at once, computed again in the backward pass; None keeps all.
    """
    if chunk is None or chunk >= len(rows):
        parts = [block(rows)]
    else:
        parts = [checkpoint(block, part, use_reentrant=False, preserve_rng_state=False) for part in rows.split(chunk)]
    loss = torch.cat([part for part, _ in parts]).mean()
    return loss, {key: torch.cat([logs[key] for _, logs in parts]).detach().mean() for key in parts[0][1]}
