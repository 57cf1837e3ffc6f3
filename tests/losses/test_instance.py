"""`clip` against a slow loop, and the properties that it has to keep.

B pairs, D joint dimension.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sista_pl.errors import SistaError
from sista_pl.losses import LOSSES
from sista_pl.losses.chunked import Block
from sista_pl.losses.instance import Alike, Likeness, contrast
from sista_pl.pair import Features, Pair


def make_pair(size: int = 7, dtype: torch.dtype = torch.float64, seed: int = 0) -> Pair:
    """Random embeddings."""
    draw = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(size, 5, generator=draw, dtype=torch.float64).to(dtype) for _ in range(2))
    return Pair(
        image=Features(image.requires_grad_(), torch.zeros(size, 1, 5)),
        text=Features(text.requires_grad_(), torch.zeros(size, 1, 5)),
        scale=torch.tensor(6.0, dtype=dtype, requires_grad=True),
    )


def inputs(pair: Pair) -> list[Tensor]:
    return [pair.image.pooled, pair.text.pooled, pair.scale]


def loss_and_gradients(spec, pair: Pair) -> list[Tensor]:
    loss = LOSSES.build(spec)(pair)[0]
    return [loss.detach(), *torch.autograd.grad(loss, inputs(pair))]


def logit(pair: Pair, a: Tensor, b: Tensor) -> Tensor:
    return pair.scale * (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()


def slow(pair: Pair) -> tuple[Tensor, float]:
    """The formula, pair by pair: loss and accuracy."""
    v, t, n = pair.image.pooled, pair.text.pooled, len(pair.image.pooled)
    total, hits = torch.zeros((), dtype=torch.float64), 0.0
    for i in range(n):
        for anchor, others in ((v[i], t), (t[i], v)):
            z = [logit(pair, anchor, other) for other in others]
            total = total - (z[i].exp() / sum(x.exp() for x in z)).log() / 2 / n
            hits += (max(range(n), key=lambda j, z=z: z[j].item()) == i) / 2 / n
    return total, hits


def test_clip_equals_slow_loop():
    pair = make_pair()
    logs = LOSSES.build("clip")(pair)[1]
    expected, hits = slow(pair)
    right = [expected.detach(), *torch.autograd.grad(expected, inputs(pair))]
    for ours, exact in zip(loss_and_gradients("clip", pair), right, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)
    assert logs["accuracy"].item() == pytest.approx(hits)


def test_gradient_is_the_slope():
    pair, draw = make_pair(), torch.Generator().manual_seed(5)
    loss, values = LOSSES.build("clip"), [x.detach() for x in inputs(pair)]
    for place, gradient in enumerate(loss_and_gradients("clip", pair)[1:]):
        step = torch.randn(gradient.shape, generator=draw, dtype=torch.float64) * 1e-6
        ends = []
        for sign in (1, -1):
            image, text, scale = (x + sign * step if i == place else x for i, x in enumerate(values))
            pair.image.pooled, pair.text.pooled, pair.scale = image, text, scale
            ends.append(loss(pair)[0].item())
        assert (ends[0] - ends[1]) / 2 == pytest.approx((gradient * step).sum().item(), rel=1e-4)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_are_exact(chunk):
    pair = make_pair(dtype=torch.float32)
    spec = {"name": "clip", "chunk": chunk}
    for one, other in zip(loss_and_gradients("clip", pair), loss_and_gradients(spec, pair), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert LOSSES.build(spec)(pair)[1]["accuracy"] == LOSSES.build("clip")(pair)[1]["accuracy"]


@pytest.mark.parametrize("alone", [False, True])
def test_a_likeness_is_asked_for_a_block_at_once(alone):
    seen = []

    def own(block: Block) -> Alike:
        rows, columns = (range(7)[where] for where in (block.rows, block.columns))
        seen.append((len(rows), len(columns)))
        mass = torch.tensor([[float(row == column) for column in columns] for row in rows]).double()
        places = [] if block.own is None else mass.diagonal(block.own).tolist()
        assert places == [1.0] * int(mass.sum())
        return Alike(mass, None, lambda: {"row": mass @ torch.tensor(columns).double()})

    loss, logs = contrast(make_pair(), Likeness(own, 1.0, alone), chunk=3)
    loss.backward()
    # each of the nine blocks in the forward, where negatives come first twice, and again in the backward pass
    blocks = [(3, 3)] * 4 + [(3, 1)] * 2 + [(1, 3)] * 2 + [(1, 1)]
    assert sorted(seen) == sorted(blocks * (3 if alone else 2))
    assert logs["row"].tolist() == list(range(7))
    assert logs["true_pair_mass"].tolist() == [1] * 7
    # with one column of mass there is none to be left out, so that both forms are the same
    assert loss.item() == pytest.approx(slow(make_pair())[0].item(), abs=1e-12)


def test_one_pair_is_zero_with_finite_gradient():
    loss, *gradients = loss_and_gradients("clip", make_pair(size=1))
    assert loss.item() == 0
    assert all(g.isfinite().all() and g.abs().max() < 1e-12 for g in gradients)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_gradient_is_close(autocast):
    exact = make_pair(size=16, dtype=torch.float32, seed=3)
    half = make_pair(size=16, dtype=torch.bfloat16, seed=3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = LOSSES.build("clip")(half)[0]
    assert loss.dtype == torch.float32
    reference = torch.autograd.grad(LOSSES.build("clip")(exact)[0], inputs(exact)[:2])
    for ours, right in zip(torch.autograd.grad(loss, inputs(half)[:2]), reference, strict=True):
        assert (ours.float() - right).abs().max() <= 2e-2 * right.norm()


@pytest.mark.parametrize("chunk", [0, 2.5, True, math.inf])
def test_wrong_arguments_are_one_line(chunk):
    with pytest.raises(SistaError, match="at least 1") as error:
        LOSSES.build({"name": "clip", "chunk": chunk})
    assert "\n" not in str(error.value)
