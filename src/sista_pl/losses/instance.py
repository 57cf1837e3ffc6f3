"""Instance level: whole images against whole reports of the global batch.

B pairs of this rank, N pairs of all ranks, b x c a block of images and reports, D joint dimension.

The local images are compared with all reports, and what that says of the reports is summed over the ranks: exactly the
loss of one process. Nothing of the size B x N is ever kept: see `sista_pl.losses.chunked`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sista_pl.distributed import all_sum
from sista_pl.losses import LOSSES
from sista_pl.losses.chunked import (
    LEFT_OUT,
    LN2,
    Block,
    Counts,
    Logits,
    LogSumExp,
    Slope,
    Sums,
    Winners,
    side,
    softplus,
)
from sista_pl.pair import Pair


class Alike(NamedTuple):
    """Which pairs of a block are alike; what it says of i and j is true of j and i, too.

    Args:
        mass: (b, c) >= 0, > 0 for own pairs; a row or column is divided by its sum. None: the own pairs alone.
        dropped: (b, c) 1 for pairs outside the denominator, else 0; None where there are none.
        counts: computes what to log of the rows, each (b,), a sum over the columns.
    """

    mass: Tensor | None = None
    dropped: Tensor | None = None
    counts: Callable[[], dict[str, Tensor]] = dict


class Likeness(NamedTuple):
    """What the rows and the columns should be close to: Y = (1 - share) I + share · mass / its sum.

    Args:
        of: asked for each block, in the forward and again in the backward pass.
        share: 0 to 1.
        alone: each column with mass is contrasted with those without any, and not with the others that have some:
            -Σ_j Y_ij log(e^{z_ij} / (e^{z_ij} + Σ_{k: Y_ik = 0} e^{z_ik})); 0 where there are none without.
            With `share` 1.
    """

    of: Callable[[Block], Alike] = lambda block: Alike()
    share: float = 0.0
    alone: bool = False


@LOSSES.register("clip")
class Clip(nn.Module):
    """Image-report contrast in which only the own report is right: ½ [CE(z, I) + CE(zᵀ, I)], z = s v tᵀ.

    Radford et al. 2021 (CLIP); Zhang et al. 2022 (ConVIRT). Logs `accuracy`: how often the own partner of a row has
    the highest of N similarities, mean of both directions.

    Args:
        chunk: side of the blocks of z, >= 1, of which one is kept at a time; the value and the gradients stay the
            same. None for 512 on a CPU, where a block stays in the cache, and 4096 elsewhere.

    Raises:
        SistaError: `chunk` is no whole number >= 1.
    """

    needs_tokens = False

    def __init__(self, chunk: int | None = None):
        super().__init__()
        self.chunk = side("clip", chunk)

    def forward(self, pair: Pair) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean over the local pairs and both directions, () fp32, and what to log."""
        loss, logs = contrast(pair, Likeness(), self.chunk)
        return loss, {"accuracy": logs["accuracy"].mean()}


def contrast(pair: Pair, likeness: Likeness, chunk: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Contrast images with all reports and reports with all images.

    Args:
        pair: of this rank.
        likeness: which of them are alike.
        chunk: side of a block; None for the device's.

    Returns:
        () mean over the local pairs and both directions; and of the local pairs `accuracy`, `true_pair_mass` and the
        sums of `counts`, each (B,).
    """
    with torch.autocast(pair.image.pooled.device.type, enabled=False):
        logits = Logits.of(pair, chunk, unit=LN2)
        with torch.no_grad():
            value, slope, logs = (_alone if likeness.alone else _softmax)(logits, likeness)
        return logits.attach(value, slope, 0.5 / len(logits.v)), logs


class _Log:
    """What every contrast logs of its rows."""

    def __init__(self, logits: Logits, share: float):
        self.winners, self.share = Winners(logits), share
        self.own_mass, self.counts = torch.zeros_like(logits.v[:, 0]), Counts(logits)

    def add(self, block: Block, z: Tensor, alike: Alike) -> tuple[Tensor, Tensor]:
        """Take in a block; return the maxima of its rows and columns."""
        self.counts.add(block, alike.counts())
        if block.own is not None and alike.mass is not None:
            block.of_own(self.own_mass).copy_(alike.mass.diagonal(block.own))
        return self.winners.add(block, z)

    def value(self, share: Tensor) -> dict[str, Tensor]:
        """Args: share: (B,) what one of mass is of a row's target."""
        true = 1 - self.share + share * self.own_mass
        return {**self.counts.value, "accuracy": self.winners.value(), "true_pair_mass": true}


def _softmax(logits: Logits, likeness: Likeness) -> tuple[Tensor, Slope, dict[str, Tensor]]:
    """Return the cross-entropy of the local pairs, () mean over both directions, its slope, and what to log."""
    share = likeness.share
    denominator, mass, weighted = LogSumExp(logits), Sums(logits), Sums(logits)
    own, log = torch.zeros_like(logits.v[:, 0]), _Log(logits, share)
    for block, z in logits.blocks():
        alike = likeness.of(block)
        maxima: tuple[Tensor, Tensor] | None = log.add(block, z, alike)
        if block.own is not None:
            block.of_own(own).copy_(z.diagonal(block.own))
        if alike.mass is not None:
            mass.add(block, alike.mass)
            weighted.add(block, alike.mass * z)
        if alike.dropped is not None:
            z.sub_(alike.dropped, alpha=LEFT_OUT)
            maxima = None
        denominator.add(block, z, maxima)
    of_row, of_column = denominator.value()
    loss = of_row + of_column[logits.mine] - 2 * (1 - share) * own  # B
    share_row, share_column = torch.zeros_like(of_row), torch.zeros_like(of_column)
    if share:
        (mass_row, mass_column), (near_row, near_column) = mass.value(), weighted.value()
        share_row, share_column = share / mass_row, share / mass_column
        loss = loss - share_row * near_row - (share_column * near_column)[logits.mine]

    def slope(block: Block, z: Tensor) -> Tensor:
        alike = likeness.of(block)
        if alike.dropped is not None:
            z.sub_(alike.dropped, alpha=LEFT_OUT)
        d = (z - of_row[block.rows, None]).exp2_()
        d += z.sub_(of_column[block.columns]).exp2_()
        if alike.mass is not None:
            d -= alike.mass.mul_(share_row[block.rows, None] + share_column[block.columns])
        if block.own is not None:
            d.diagonal(block.own).sub_(2 * (1 - share))
        return d

    return loss.mean() * LN2 / 2, slope, log.value(share_row)


def _alone(logits: Logits, likeness: Likeness) -> tuple[Tensor, Slope, dict[str, Tensor]]:
    """Return the same for `Likeness.alone`; the blocks are computed once more, as the negatives come first."""
    denominator, mass, log = LogSumExp(logits), Sums(logits), _Log(logits, 1.0)

    def read(block: Block, z: Tensor) -> tuple[Tensor, Tensor, Alike]:
        """Return the mass, z of the negatives alone, each (b, c), and what else is known of the block."""
        alike = likeness.of(block)
        assert alike.mass is not None
        others = alike.mass.sign() if alike.dropped is None else alike.mass.sign() + alike.dropped
        return alike.mass, z.sub(others, alpha=LEFT_OUT), alike

    for block, z in logits.blocks():
        positive, negative, alike = read(block, z)
        log.add(block, z, alike)
        mass.add(block, positive)
        denominator.add(block, negative)
    (of_row, of_column), (mass_row, mass_column) = denominator.value(), mass.value()

    def ways(block: Block) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return denominator and mass of a block's rows, each (b, 1), and of its columns, each (c,)."""
        rows, columns = block.rows, block.columns
        return (of_row[rows, None], mass_row[rows, None]), (of_column[columns], mass_column[columns])

    loss, pushed = torch.zeros_like(of_row), (torch.zeros_like(of_row), torch.zeros_like(of_column))
    for block, z in logits.blocks():
        positive = read(block, z)[0]
        for way, (negatives, total) in enumerate(ways(block)):
            above = (negatives - z) * LN2  # b c
            loss[block.rows] += (positive / total * softplus(above)).sum(1)
            pushed[way][block[way]] += (positive / total * above.sigmoid_()).sum(1 - way)
    push_row, push_column = pushed[0], all_sum(pushed[1])

    def slope(block: Block, z: Tensor) -> Tensor:
        positive, negative, _ = read(block, z)
        d = torch.zeros_like(z)
        pushes = push_row[block.rows, None], push_column[block.columns]
        for (negatives, total), push in zip(ways(block), pushes, strict=True):
            d += push * (negative - negatives).exp2_() - positive / total * ((negatives - z) * LN2).sigmoid_()
        return d

    return loss.mean() / 2, slope, log.value(1 / mass_row)
