"""`siglip` against a slow loop, and the properties that it has to keep.

B pairs, D joint dimension, Ds semantic dimension.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sista_pl.errors import SistaError
from sista_pl.losses import LOSSES
from sista_pl.pair import Features, Pair, Semantics

OFFSET = 0.2
IDENTITY = {"name": "siglip", "bias": -1.5}
SEMANTIC = {**IDENTITY, "semantic": True, "delta": 0.75}


def make_pair(size: int = 7, dtype: torch.dtype = torch.float64, seed: int = 0) -> Pair:
    """Random embeddings; two reports have the same semantics."""
    draw = torch.Generator().manual_seed(seed)
    image, text, semantics = (torch.randn(size, 5, generator=draw, dtype=torch.float64).to(dtype) for _ in range(3))
    semantics[-1] = semantics[0]
    return Pair(
        image=Features(image.requires_grad_(), torch.zeros(size, 1, 5)),
        text=Features(text.requires_grad_(), torch.zeros(size, 1, 5)),
        scale=torch.tensor(6.0, dtype=dtype, requires_grad=True),
        semantics=Semantics(F.normalize(semantics.abs(), dim=1), OFFSET, torch.rand(32, 64, generator=draw)),
    )


def run(spec, pair: Pair, dtype: torch.dtype | None = None) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the loss with its gradients, the bias's too, and what is logged."""
    module = LOSSES.build(spec).to(dtype)
    loss, logs = module(pair)
    wanted = [pair.image.pooled, pair.text.pooled, pair.scale, module.bias]
    return [loss.detach(), *torch.autograd.grad(loss, wanted)], logs


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()


def slow(pair: Pair, start: float, delta: float = math.inf) -> tuple[list[Tensor], float]:
    """The formula, pair by pair: loss and gradients, and the others that are positives of an anchor."""
    v, t, r, n = pair.image.pooled, pair.text.pooled, pair.semantics.vectors, len(pair.image.pooled)
    bias = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    total, others = torch.zeros((), dtype=torch.float64), 0.0
    for i in range(n):
        for j in range(n):
            like = i != j and (cosine(r[i], r[j]) - OFFSET) / (1 - OFFSET) >= delta
            others += like / n
            y = 1 if i == j or like else -1
            total = total + (1 + (-y * (pair.scale * cosine(v[i], t[j]) + bias)).exp()).log() / n
    return [total.detach(), *torch.autograd.grad(total, [v, t, pair.scale, bias])], others


@pytest.mark.parametrize("start", [-10.0, -1.5, 0.0])
@pytest.mark.parametrize("semantic", [False, True])
def test_siglip_equals_slow_loop(start, semantic):
    pair = make_pair()
    expected, others = slow(pair, start, 0.75 if semantic else math.inf)
    found, logs = run({**(SEMANTIC if semantic else IDENTITY), "bias": start}, pair, torch.float64)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert logs["bias"].item() == start
    if semantic:
        assert 0.5 < others < 5
        assert logs["false_negatives"].item() == pytest.approx(others)
        assert logs["identical_reports"].item() == pytest.approx(2 / 7)
        assert logs["delta"].item() == 0.75
    else:
        assert logs.keys() == {"accuracy", "bias"}


def test_the_scale_and_bias_that_it_starts_with_are_siglips():
    module = LOSSES.build("siglip")
    assert module.bias.item() == -10
    assert list(module.state_dict()) == ["bias"]
    # at s = 10, with nothing learned and N - 1 = 6 negatives, a positive costs what softplus(10) does
    pair = make_pair()
    pair.scale = torch.tensor(0.0)
    expected = math.log1p(math.exp(10)) + 6 * math.log1p(math.exp(-10))
    assert module(pair)[0].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_accuracy_is_clips(seed):
    pair = make_pair(size=4, seed=seed)
    assert LOSSES.build(SEMANTIC)(pair)[1]["accuracy"] == LOSSES.build("clip")(pair)[1]["accuracy"]


def test_delta_is_solved_as_in_sia():
    pair = make_pair(size=20)
    ours = LOSSES.build({"name": "siglip", "semantic": True, "positives": 3})(pair)[1]
    sia = LOSSES.build({"name": "sia", "mode": "mask", "positives": 3})(pair)[1]
    assert 0.5 < sia["delta"] < 0.999
    for key in ("delta", "false_negatives", "identical_reports"):
        assert ours[key] == sia[key], key


def test_semantic_without_like_reports_is_identity():
    pair = make_pair()
    ours, right = run({**SEMANTIC, "delta": 1.01}, pair)[0], run(IDENTITY, pair)[0]
    assert all(torch.equal(one, other) for one, other in zip(ours, right, strict=True))


def test_no_gradient_into_semantics():
    pair = make_pair()
    pair.semantics.vectors.requires_grad_()
    loss = LOSSES.build(SEMANTIC)(pair)[0]
    gradients = torch.autograd.grad(loss, [pair.semantics.vectors, pair.image.pooled], allow_unused=True)
    assert gradients[0] is None
    assert gradients[1].abs().max() > 0


@pytest.mark.parametrize("spec", [IDENTITY, SEMANTIC], ids=["identity", "semantic"])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_are_exact(spec, chunk):
    pair = make_pair(dtype=torch.float32)
    (whole, logs), (chunked, same) = run(spec, pair), run({**spec, "chunk": chunk}, pair)
    for one, other in zip(chunked, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)
    assert logs.keys() == same.keys()
    for key, value in logs.items():
        assert same[key].item() == pytest.approx(value.item(), abs=1e-6), key


@pytest.mark.parametrize("spec", [IDENTITY, SEMANTIC], ids=["identity", "semantic"])
@pytest.mark.parametrize("scale", [0.0, 100.0])
def test_finite_at_the_ends_of_the_scale(spec, scale):
    pair = make_pair(size=2, dtype=torch.float32)
    pair.scale = torch.tensor(scale, requires_grad=True)
    assert all(value.isfinite().all() for value in run(spec, pair)[0])


@pytest.mark.parametrize("spec", [IDENTITY, SEMANTIC], ids=["identity", "semantic"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_gradient_is_close(spec, autocast):
    exact = make_pair(size=16, dtype=torch.float32, seed=3)
    half = make_pair(size=16, dtype=torch.bfloat16, seed=3)
    half.semantics = exact.semantics
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours = run(spec, half)[0]
    assert ours[0].dtype == torch.float32
    for one, right in zip(ours[1:3], run(spec, exact)[0][1:3], strict=True):
        assert (one.float() - right).abs().max() <= 2e-2 * right.norm()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"semantic": "yes"}, "true or false"),
        ({"semantic": True, "positives": 0}, "above 0"),
        ({"semantic": True, "delta": -1}, "above 0"),
        ({"delta": 0.9}, "set `semantic: true` as well"),
        ({"bias": math.inf}, "from -100 to 100"),
        ({"bias": "low"}, "from -100 to 100"),
        ({"chunk": 0}, "at least 1"),
    ],
)
def test_wrong_arguments_are_one_line(spec, says):
    with pytest.raises(SistaError, match=says) as error:
        LOSSES.build({"name": "siglip", **spec})
    assert "\n" not in str(error.value)


def test_missing_similarity_names_the_next_step():
    pair = make_pair()
    pair.semantics.sample = None
    with pytest.raises(SistaError, match=r"'siglip': .* solve delta on; give it, as in `delta: 0.95`"):
        LOSSES.build({"name": "siglip", "semantic": True})(pair)
    pair.semantics = None
    with pytest.raises(SistaError, match="similarity: findings"):
        LOSSES.build(SEMANTIC)(pair)
    assert LOSSES.build(IDENTITY)(pair)[0].isfinite()
