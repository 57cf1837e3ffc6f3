"""Collectives that carry the gradient: one process with B pairs equals R processes with B/R each.

DDP averages gradients over ranks. So a loss that is the mean over its *local* rows, computed against columns
gathered here, has exactly the gradient of the one-process loss: the backward pass sums what every rank's loss says
of a rank's own rows. A gather without gradient would point elsewhere.
Rank and world size are read when called, since losses are built before the process group exists.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x)
        ctx.rows = x.shape[0]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()  # the reduction works in place, and this gradient is autograd's
        dist.all_reduce(grad)
        return grad[rank() * ctx.rows : (rank() + 1) * ctx.rows]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


def gather(x: Tensor) -> Tensor:
    """(B, …) on each of R ranks → (R·B, …), rank by rank, with gradient. Every rank must hold the same B."""
    return x if world_size() == 1 else _Gather.apply(x)


def all_sum(x: Tensor) -> Tensor:
    """Sum over the ranks, with gradient."""
    return x if world_size() == 1 else _Sum.apply(x)


def global_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Mean of `values` weighted by `weight` over all ranks, scaled so that DDP's average over ranks gives it.

    Args:
        values: (…) local values, finite where the weight is 0, too.
        weight: (…) same shape, >= 0, no gradient (a mask, usually).

    Returns:
        () R · Σ_local(values·weight) / Σ_all ranks(weight); 0 where no rank has any weight.
    """
    weight = weight.to(values.dtype)
    total = all_sum(weight.sum().detach())
    return world_size() * (values * weight).sum() / torch.where(total > 0, total, 1)


def make_shardable(model: nn.Module) -> None:
    """Make of a model what torch's FSDP can shard, in place: it takes no scalar parameters, which get one dimension.

    A parameter is remembered to be a matrix, as `matrix`, for a shard of it is flat and weight decay asks.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 0:
                parameter = nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad)
                setattr(module, name, parameter)
            parameter.matrix = parameter.ndim > 1
