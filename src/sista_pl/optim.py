"""AdamW with proper parameter groups, linear warm-up and a cosine to zero."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from sista_pl.errors import SistaError


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Split trainable parameters: matrices and kernels decay; biases, norms, scalars and embeddings' norms do not."""
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decay if getattr(parameter, "matrix", parameter.ndim > 1) else rest).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def warmup_cosine(step: int, total: int, warmup: int) -> float:
    """Factor on the learning rate at `step`: linear from 1/warmup to 1, then a cosine to 0 at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1 + math.cos(math.pi * progress))


def adamw(model: nn.Module, lr: float, weight_decay: float, warmup: float, total: float) -> dict:
    """Return Lightning's optimizer dict.

    Args:
        model: whose trainable parameters are optimised.
        lr: peak learning rate.
        weight_decay: on matrices and kernels only.
        warmup: share of all steps, in [0, 1).
        total: number of optimizer steps of the whole training.

    Raises:
        SistaError: a rate below zero, warm-up outside [0, 1), no end of training.
    """
    if lr <= 0 or weight_decay < 0 or not 0 <= warmup < 1:
        raise SistaError(f"optimizer: lr {lr}, weight_decay {weight_decay}, warmup {warmup}; lr > 0, warmup in [0, 1)")
    if not math.isfinite(total) or total < 1:
        raise SistaError("trainer: no end of training is set; give max_epochs or max_steps, the schedule needs it")
    # not fused: Lightning refuses to clip gradients under a fused optimizer
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr)
    steps = int(total)
    first = max(1, round(warmup * steps)) if warmup else 0
    schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, first))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
