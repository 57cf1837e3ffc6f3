"""Projections into the joint space.

B pairs, N tokens, D dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sista_pl.distributed import all_sum
from sista_pl.errors import SistaError
from sista_pl.pair import Features, at_least_float32


class MaskedBatchNorm(nn.Module):
    """Batch normalisation whose statistics leave padding out and span all ranks.

    With an all-true mask and one process it equals `torch.nn.BatchNorm1d`. Padded rows come out as zeros.

    Args:
        dim: number of features D.
        affine: learn scale and shift.
    """

    def __init__(self, dim: int, affine: bool = True, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise (…, D); `mask` (…) bool says which rows are real."""
        with torch.autocast(x.device.type, enabled=False):
            x = at_least_float32(x)
            if self.training:
                mean, var = self._statistics(x.flatten(0, -2) if mask is None else x[mask])
            else:
                mean, var = self.running_mean, self.running_var
            y = (x - mean) * torch.rsqrt(var + self.eps)
            if self.weight is not None:
                y = y * self.weight + self.bias
            return y if mask is None else y * mask.unsqueeze(-1)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sums = all_sum(torch.cat([x.sum(0), x.new_full((1,), len(x))]))
        count = sums[-1].clamp_min(1)
        mean = sums[:-1] / count
        # the second pass costs another collective, and keeps the digits that E[x²] - E[x]² would cancel
        var = all_sum((x - mean).square().sum(0)) / count
        with torch.no_grad():
            unbiased = var * count / (count - 1).clamp_min(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
        return mean, var


class Norm(nn.Module):
    """Layer normalisation with the call of `MaskedBatchNorm`: it looks at one row at a time, so padding can't leak."""

    def __init__(self, dim: int, affine: bool = True):
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=affine)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.norm(x)


NORMS = {"batch": MaskedBatchNorm, "layer": Norm}


class Projection(nn.Module):
    """Linear, norm, ReLU, linear, norm without affine; each row apart (as in MGCA).

    Padding is outside the statistics, costs nothing, and comes out as zeros.
    """

    def __init__(self, dim: int, hidden: int, out: int, norm: str = "batch"):
        super().__init__()
        if norm not in NORMS:
            raise SistaError(f"head_norm is {norm!r}; write one of {', '.join(NORMS)}")
        self.inner = nn.Linear(dim, hidden, bias=False)
        self.inner_norm = NORMS[norm](hidden)
        self.outer = nn.Linear(hidden, out, bias=False)
        self.outer_norm = NORMS[norm](out, affine=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return self._project(x)
        if torch.compiler.is_compiling():  # a graph has no number of rows that the data decide
            return self._project(x, mask) * mask.unsqueeze(-1)
        found = self._project(x[mask])
        return found.new_zeros(*mask.shape, found.shape[-1]).index_put((mask,), found)

    def _project(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.inner_norm(self.inner(x), mask).relu()
        return self.outer_norm(self.outer(x), mask)


class ProjectionHead(nn.Module):
    """One projection for the pooled vector and one for the tokens of an encoder.

    Args:
        dim: the encoder's `dim`.
        local_dim: the encoder's `local_dim`.
        out: D of the joint space.
        hidden: width of the inner layer.
        norm: `batch` (padding left out, statistics over all ranks) or `layer`.
    """

    def __init__(self, dim: int, local_dim: int, out: int = 128, hidden: int = 2048, norm: str = "batch"):
        super().__init__()
        self.pooled = Projection(dim, hidden, out, norm)
        self.local = Projection(local_dim, hidden, out, norm)

    def forward(self, features: Features, tokens: bool = True) -> Features:
        """Project (B, D) and (B, N, D); without `tokens` the local projection is left out and `local` stays raw."""
        local = self.local(features.local, features.mask) if tokens else features.local
        return Features(self.pooled(features.pooled), local, features.mask, features.ids, features.attention)
