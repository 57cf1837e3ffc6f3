"""Losses in blocks against whole matrices in float64: every mode, in one block and in many.

B pairs, D joint dimension, Ds semantic dimension.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sista_pl.losses import LOSSES
from sista_pl.losses.chunked import softplus
from sista_pl.pair import Features, Pair, Semantics

B, D, OFFSET, DELTA, TAU = 2048, 32, 0.6, 0.9, 0.1
SPECS = {
    "clip": {"name": "clip"},
    "soft": {"name": "sia", "mode": "soft", "delta": DELTA, "tau": TAU},
    "soft, half": {"name": "sia", "mode": "soft", "delta": DELTA, "tau": TAU, "alpha": 0.5},
    "mask": {"name": "sia", "mode": "mask", "delta": DELTA},
    "multi_positive": {"name": "sia", "mode": "multi_positive", "delta": DELTA},
    "siglip": {"name": "siglip", "bias": -5.0},
    "siglip, semantic": {"name": "siglip", "bias": -5.0, "semantic": True, "delta": DELTA},
}


def make_pair(size: int = B, scale: float = 14.3, dtype: torch.dtype = torch.float32) -> Pair:
    """Embeddings of which partners are somewhat alike, and reports of which a few are."""
    draw = torch.Generator().manual_seed(0)
    image, noise = torch.randn(2, size, D, generator=draw)
    semantics = F.normalize(torch.rand(size, 24, generator=draw), dim=1)
    semantics[size // 2] = semantics[0]
    text = image + noise
    return Pair(
        Features(image.to(dtype).requires_grad_(), torch.zeros(size, 1, D)),
        Features(text.to(dtype).requires_grad_(), torch.zeros(size, 1, D)),
        torch.tensor(scale, dtype=dtype, requires_grad=True),
        Semantics(semantics.to(dtype), OFFSET),
    )


def whole(name: str, pair: Pair, bias: Tensor) -> Tensor:
    """The formulas, on B x B matrices."""
    v, t = (F.normalize(side.pooled, dim=1) for side in (pair.image, pair.text))
    z, eye = pair.scale * v @ t.T, torch.eye(len(v), dtype=v.dtype)
    r = pair.semantics.vectors
    s = ((r @ r.T - OFFSET) / (1 - OFFSET)).fill_diagonal_(1)
    alike = s >= DELTA
    if name.startswith("siglip"):
        y = 2.0 * alike - 1 if name.endswith("semantic") else 2 * eye - 1
        return -F.logsigmoid(y * (z + bias)).sum() / len(v)
    target = {"clip": eye, "mask": eye, "soft": (s / TAU).softmax(1), "soft, half": ((s / TAU).softmax(1) + eye) / 2,
              "multi_positive": alike / alike.sum(1, keepdim=True)}[name]  # fmt: skip
    closed = (alike & (eye == 0)) if name == "mask" else eye > 1
    ways = ((z, closed), (z.T, closed.T))
    return sum(F.cross_entropy(way.masked_fill(shut, -1e30), target) for way, shut in ways) / 2


def of_whole(name: str, pair: Pair) -> list[Tensor]:
    bias = torch.tensor(-5.0, dtype=torch.float64, requires_grad=True)
    return values(whole(name, pair, bias), pair, bias if name.startswith("siglip") else None)


def of_blocks(name: str, pair: Pair, chunk: int | None = None) -> list[Tensor]:
    loss = LOSSES.build({**SPECS[name], "chunk": chunk}).to(pair.scale.dtype)
    return values(loss(pair)[0], pair, getattr(loss, "bias", None))


def values(loss: Tensor, pair: Pair, bias: Tensor | None) -> list[Tensor]:
    """The loss, and its gradients with respect to both sides, the scale and the bias."""
    wanted = [pair.image.pooled, pair.text.pooled, pair.scale] + ([] if bias is None else [bias])
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize("name", ["clip", "soft", "mask", "siglip"])
def test_float32_blocks_equal_whole_matrices_in_float64(name):
    exact = of_whole(name, make_pair(dtype=torch.float64))
    loss, *gradients = of_blocks(name, make_pair())
    assert loss.item() == pytest.approx(exact[0].item(), rel=1e-6)
    for ours, right in zip(gradients, exact[1:], strict=True):
        assert (ours - right).norm() <= 1e-5 * right.norm()


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("chunk", [5, 16, 50])
def test_blocks_of_any_side_equal_whole_matrices(name, scale, chunk):
    pair = make_pair(37, scale, torch.float64)
    for ours, right in zip(of_blocks(name, pair, chunk), of_whole(name, pair), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["clip", "soft", "mask"])
def test_no_digits_are_lost_at_the_lowest_temperature(name):
    """Logits of -100 to 100, whose exponentials in float32 are 0 beside the highest of another row."""
    exact, pair = make_pair(64, 100.0, torch.float64), make_pair(64, 100.0)
    for p in (exact, pair):
        with torch.no_grad():
            p.text.pooled[:32] = -p.image.pooled[:32]  # far from their own image, and near to others
    for ours, right in zip(of_blocks(name, pair, 16), of_whole(name, exact), strict=True):
        assert (ours - right).norm() <= 2e-5 * right.norm()


def test_nothing_of_the_size_of_the_matrix_is_saved_or_made():
    size, chunk = 512, 64
    pair = make_pair(size)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(one, Tensor):
                    largest = max(largest, one.numel())
            return out

    for name in SPECS:
        largest = 0
        with Watch():
            of_blocks(name, pair, chunk)
        assert chunk * chunk <= largest <= size * D, name


def test_backward_under_autocast_is_in_float32():
    pair = make_pair(64)
    loss = LOSSES.build("clip")(pair)[0]
    right = torch.autograd.grad(loss, pair.image.pooled, retain_graph=True)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.autograd.grad(loss, pair.image.pooled)[0], right)


def test_softplus_keeps_its_digits():
    x = torch.cat([torch.linspace(-20, 80, 4001), torch.tensor([0.0, -16.6, -17.4])])
    exact = x.double().exp().log1p()
    assert ((softplus(x) - exact).abs() / exact).max() < 1e-6
    assert softplus(torch.tensor([1e4, -1e4])).tolist() == [1e4, 0]
    assert softplus(torch.tensor(-30.0, dtype=torch.float64)).item() == pytest.approx(math.exp(-30), rel=1e-12)
