"""The logits z = s v tᵀ + b of a global batch in square blocks, of which no more than one is kept at any time.

B images of this rank, N reports of all ranks, b x c a block of both, D joint dimension.

A loss walks over the blocks once for its value and what it needs to know of each row (B,) and column (N,), and again in
the backward pass, where a block is computed anew and its gradient multiplied into the (B, D) and (N, D) of the two
sides at once. So memory is b·c + (B + N)·D numbers instead of several times B·N, and a block stays in the cache.
A block serves both directions: a rank has all columns of its rows, and what a column needs of other ranks' rows is a
few vectors (N,).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sista_pl.distributed import all_sum, gather, rank, world_size
from sista_pl.losses.arguments import whole
from sista_pl.pair import Pair, at_least_float32

LN2 = math.log(2)
# Far below any logit, and what is subtracted from one to leave it out: a row of which all are left out stays finite.
LEFT_OUT = 1e30
Slope = Callable[["Block", Tensor], Tensor]
# of a block: 1 MiB in float32 fits the cache of a core; a GPU is busy with 64 MiB, and waits for Python below
CPU_SIDE, GPU_SIDE = 512, 4096


def side(loss: str, chunk: object) -> int | None:
    """Return a loss's argument `chunk`, the side of a block; None for one that suits the device."""
    return None if chunk is None else whole(loss, "chunk", chunk, 1)


class Block(NamedTuple):
    """A block of z.

    Args:
        rows: images of this rank.
        columns: reports of all ranks.
        own: the diagonal on which the own pairs lie, as the offset of `Tensor.diagonal`; None where there are none.
    """

    rows: slice
    columns: slice
    own: int | None

    def of_own(self, values: Tensor) -> Tensor:
        """Return the rows' part of (B,) values for the rows whose own pair lies in the block."""
        assert self.own is not None
        rows, columns = self.rows.stop - self.rows.start, self.columns.stop - self.columns.start
        start = max(0, -self.own)
        return values[self.rows][start : min(rows, columns - self.own)]


def own_pairs(values: Tensor, block: Block, value: float) -> Tensor:
    """Write the value to the own pairs among a block's values (b, c), in place, and return them."""
    if block.own is not None:
        values.diagonal(block.own).fill_(value)
    return values


class Logits(NamedTuple):
    """The logits of local images and all reports.

    Args:
        v: (B, D) unit rows.
        t: (N, D) unit rows.
        scale: () s.
        bias: () b, or None for 0.
        side: of a block.
        unit: what z is given in; ln 2 for bits, whose `exp2` a CPU computes three times as fast as `exp`.
    """

    v: Tensor
    t: Tensor
    scale: Tensor
    bias: Tensor | None
    side: int
    unit: float = 1.0

    @classmethod
    def of(cls, pair: Pair, chunk: int | None, bias: Tensor | None = None, unit: float = 1.0) -> Logits:
        """Return those of a batch, at least fp32, with gradient."""
        v, t = (F.normalize(at_least_float32(side.pooled), dim=1) for side in (pair.image, pair.text))  # B D
        usual = CPU_SIDE if v.device.type == "cpu" else GPU_SIDE
        return cls(v, gather(t), at_least_float32(pair.scale), bias, chunk or usual, unit)

    @property
    def mine(self) -> slice:
        """The columns of this rank's own reports."""
        return slice(rank() * len(self.v), (rank() + 1) * len(self.v))

    def blocks(self) -> Iterator[tuple[Block, Tensor]]:
        """Walk over the blocks, row by row, each with its z (b, c); it belongs to the caller."""
        scaled = self.scale / self.unit * self.v
        for top in range(0, len(self.v), self.side):
            rows = slice(top, min(top + self.side, len(self.v)))
            for left in range(0, len(self.t), self.side):
                columns = slice(left, min(left + self.side, len(self.t)))
                own = self.mine.start + top - left
                crossed = top - rows.stop < own < columns.stop - left
                z = scaled[rows] @ self.t[columns].T
                if self.bias is not None:
                    z += self.bias / self.unit
                yield Block(rows, columns, own if crossed else None), z

    def attach(self, value: Tensor, slope: Slope, factor: float) -> Tensor:
        """Return the value () with its gradient, which is computed when it is asked for, block by block.

        Args:
            value: () the loss of this rank.
            slope: of a block and its z → (b, c); times `factor`, the derivative of the sum of all ranks' losses by z,
                whatever the unit of z. It may write into z.
        """
        parameters = [self.scale] if self.bias is None else [self.scale, self.bias]
        inputs = [self.v, self.t, *parameters]

        def gradients(v: Tensor, t: Tensor, scale: Tensor, bias: Tensor | None = None) -> list[Tensor]:
            to_v, to_t, total = torch.zeros_like(v), torch.zeros_like(t), v.new_zeros(())
            for block, z in Logits(v, t, scale, bias, self.side, self.unit).blocks():
                d = slope(block, z)
                to_v[block.rows].addmm_(d, t[block.columns])
                to_t[block.columns].addmm_(d.T, v[block.rows])
                if bias is not None:
                    total += d.sum()
            found = [scale * to_v, scale * to_t, (v * to_v).sum()]
            return [factor * one for one in (found if bias is None else [*found, total])]

        return _Later.apply(value, gradients, *inputs)


class _Later(torch.autograd.Function):
    """A value, and a function that computes its gradients when the backward pass asks for them."""

    @staticmethod
    def forward(ctx, value: Tensor, gradients: Callable[..., list[Tensor]], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        ctx.save_for_backward(*inputs)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        with torch.autocast(grad.device.type, enabled=False):
            found = ctx.gradients(*(x.detach() for x in ctx.saved_tensors))
        return None, None, *(grad * one for one in found)


def softplus(x: Tensor) -> Tensor:
    """Return log(1 + e^x) to the last digits; torch's takes four times as long on a CPU, and is x above 20."""
    small = x.abs().mul_(-1 / LN2).exp2_()
    one = 1 + small  # rounded; what that lost is added to its logarithm
    return one.log().add_(small.sub_(one - 1).div_(one)).add_(x.relu())


class Sums:
    """Sums of (b, c) values over the columns of each row, and over all ranks' rows of each column."""

    def __init__(self, logits: Logits):
        self.rows, self.columns = logits.v.new_zeros(len(logits.v)), logits.v.new_zeros(len(logits.t))

    def add(self, block: Block, values: Tensor) -> None:
        self.rows[block.rows] += values.sum(1)
        self.columns[block.columns] += values.sum(0)

    def value(self) -> tuple[Tensor, Tensor]:
        """Return (B,) and (N,)."""
        return self.rows, all_sum(self.columns)


class Counts:
    """Sums over the columns of each row, by name."""

    def __init__(self, logits: Logits):
        self.like = logits.v
        self.value: dict[str, Tensor] = {}

    def add(self, block: Block, counts: dict[str, Tensor]) -> None:
        """Args: counts: of a block's rows, each (b,)."""
        for key, count in counts.items():
            self.value.setdefault(key, self.like.new_zeros(len(self.like)))[block.rows] += count


class LogSumExp:
    """log₂ Σ 2^z over the columns of each row, and over all ranks' rows of each column, with a running maximum."""

    def __init__(self, logits: Logits):
        like = logits.v
        self.highest = [like.new_full((len(x),), torch.finfo(like.dtype).min) for x in (like, logits.t)]
        self.total = [like.new_zeros(len(x)) for x in (like, logits.t)]

    def add(self, block: Block, z: Tensor, maxima: tuple[Tensor, Tensor] | None = None) -> None:
        """Take in a block; `maxima` of its rows (b,) and columns (c,), where they are known."""
        for way, where in enumerate((block.rows, block.columns)):
            before = self.highest[way][where]
            now = torch.maximum(before, z.amax(1 - way) if maxima is None else maxima[way])
            self.total[way][where] *= (before - now).exp2_()
            self.total[way][where] += (z - now.unsqueeze(1 - way)).exp2_().sum(1 - way)
            self.highest[way][where] = now

    def value(self) -> tuple[Tensor, Tensor]:
        """Return (B,) and (N,)."""
        rows, columns = (highest + total.log2() for highest, total in zip(self.highest, self.total, strict=True))
        if world_size() > 1:
            columns = (gather(columns).view(world_size(), -1) * LN2).logsumexp(0) / LN2
        return rows, columns


class Winners:
    """How often the own partner is the most alike of all, mean of both directions; of equal ones, the first wins."""

    def __init__(self, logits: Logits):
        self.mine = logits.mine
        self.best = [x.new_full((len(x),), -torch.inf) for x in (logits.v, logits.t)]
        self.hit = [torch.zeros(len(x), dtype=torch.bool, device=x.device) for x in (logits.v, logits.t)]

    def add(self, block: Block, z: Tensor) -> tuple[Tensor, Tensor]:
        """Take in a block, in the order of `Logits.blocks`; return the maxima of its rows (b,) and columns (c,)."""
        maxima = z.amax(1), z.amax(0)
        for way, where in enumerate((block.rows, block.columns)):
            best, hit = self.best[way][where], self.hit[way][where]  # views
            better = maxima[way] > best
            hit &= ~better
            if block.own is not None:
                own = torch.arange(z.shape[way], device=z.device) + (block.own if way == 0 else -block.own)
                hit |= better & (z.argmax(1 - way) == own)
            torch.maximum(best, maxima[way], out=best)
        return maxima

    def value(self) -> Tensor:
        """Return the hits of the local pairs, (B,) 0 to 1."""
        of_report = self.hit[1][self.mine]
        if world_size() > 1:
            every = gather(self.best[1]).view(world_size(), -1)[:, self.mine]  # R B
            of_report = of_report & (every.argmax(0) == rank())
        return (self.hit[0].float() + of_report.float()) / 2
