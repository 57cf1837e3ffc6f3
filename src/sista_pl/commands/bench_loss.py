"""`sista bench loss`: instance losses in blocks of the logits, against whole matrices.

B pairs, D joint dimension.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sista_pl.losses import LOSSES
from sista_pl.pair import Features, Pair, Semantics

DELTA, TAU, BIAS = 0.9, 0.1, -10.0
SPECS: dict[str, dict[str, Any]] = {
    "clip": {"name": "clip"},
    "sia soft": {"name": "sia", "mode": "soft", "delta": DELTA, "tau": TAU},
    "sia mask": {"name": "sia", "mode": "mask", "delta": DELTA},
    "siglip": {"name": "siglip", "bias": BIAS},
}


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive at once, of those made while it is on.

    Attributes:
        peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak, self.seen = 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(one, Tensor):
                self._count(one.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.alive -= size


def make_pair(pairs: int, dim: int) -> Pair:
    """Return random embeddings, each somewhat like its partner, and reports of random similarity."""
    draw = torch.Generator().manual_seed(0)
    image, noise = torch.randn(2, pairs, dim, generator=draw)
    vectors = F.normalize(torch.rand(pairs, 24, generator=draw), dim=1)
    text, no_tokens = image + noise, torch.zeros(pairs, 0, dim)
    sides = [Features(side.requires_grad_(), no_tokens) for side in (image.clone(), text)]
    return Pair(sides[0], sides[1], torch.tensor(14.3, requires_grad=True), Semantics(vectors, 0.6))


def whole(name: str, pair: Pair) -> Tensor:
    """Return the loss by its formula, on matrices of B x B."""
    v, t = (F.normalize(side.pooled, dim=1) for side in (pair.image, pair.text))
    z = pair.scale * v @ t.T
    if name == "siglip":
        sign = 2 * torch.eye(len(z)) - 1
        return -F.logsigmoid(sign * (z + BIAS)).sum() / len(z)
    own = torch.arange(len(z))
    if name == "clip":
        return (F.cross_entropy(z, own) + F.cross_entropy(z.T, own)) / 2
    assert pair.semantics is not None
    r = pair.semantics.vectors
    alike = ((r @ r.T - pair.semantics.offset) / (1 - pair.semantics.offset)).fill_diagonal_(1)
    if name == "sia soft":
        target = (alike / TAU).softmax(1)
        return (F.cross_entropy(z, target) + F.cross_entropy(z.T, target)) / 2
    left_out = (alike >= DELTA).fill_diagonal_(False)
    return (F.cross_entropy(z.masked_fill(left_out, -1e30), own)
            + F.cross_entropy(z.T.masked_fill(left_out, -1e30), own)) / 2  # fmt: skip


def steps(pairs: int, dim: int) -> dict[str, tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]]:
    """Return by loss what computes its value and gradients: in blocks, and whole."""
    pair = make_pair(pairs, dim)
    wanted = [pair.image.pooled, pair.text.pooled, pair.scale]

    def value(loss: Callable[[], Tensor]) -> list[Tensor]:
        found = loss()
        return [found.detach(), *torch.autograd.grad(found, wanted)]

    def both(name: str) -> tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]:
        loss = LOSSES.build(SPECS[name])
        return lambda: value(lambda: loss(pair)[0]), lambda: value(lambda: whole(name, pair))

    return {name: both(name) for name in SPECS}


def peak(step: Callable[[], Any]) -> int:
    """Return the most bytes of tensors that a step keeps at once."""
    with Peak() as counted:
        step()
    return counted.peak


def difference(ours: list[Tensor], others: list[Tensor]) -> float:
    """Return the largest relative difference of value and gradients, by norm."""
    pairs = zip(ours, others, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)
