"""`clip` and `sia` against slow loops, and the properties that each has to keep.

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
MODES = ("soft", "mask", "multi_positive")


def make_pair(
    size: int = 7, dtype: torch.dtype = torch.float64, seed: int = 0, equal: tuple[int, ...] = (1, 4)
) -> Pair:
    """Random embeddings; the reports in `equal` have the same semantics."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    image, text, semantics = normal(size, 5), normal(size, 5), normal(size, 4).abs()
    for row in equal:
        semantics[row] = semantics[equal[0]]
    sample = normal(32, 64).clamp(-0.3, 1)
    return Pair(
        image=Features(image.requires_grad_(), torch.zeros(size, 1, 5)),
        text=Features(text.requires_grad_(), torch.zeros(size, 1, 5)),
        scale=torch.tensor(6.0, dtype=dtype, requires_grad=True),
        semantics=Semantics(F.normalize(semantics, dim=1), OFFSET, sample),
    )


def inputs(pair: Pair) -> list[Tensor]:
    return [pair.image.pooled, pair.text.pooled, pair.scale]


def loss_and_gradients(spec, pair: Pair) -> list[Tensor]:
    loss = LOSSES.build(spec)(pair)[0]
    return [loss.detach(), *torch.autograd.grad(loss, inputs(pair))]


def cosine(a: Tensor, b: Tensor) -> float:
    return (
        sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    ).item()


def slow(pair: Pair, mode: str, alpha: float = 1.0, delta: float = 0.5, tau: float = 0.3) -> dict[str, float]:
    """The formulas, pair by pair."""
    v, t = pair.image.pooled.detach(), pair.text.pooled.detach()
    r, n = pair.semantics.vectors, len(v)
    s = [[1.0 if i == j else (cosine(r[i], r[j]) - OFFSET) / (1 - OFFSET) for j in range(n)] for i in range(n)]
    total = mass = false_negatives = identical = hits = 0.0
    for i in range(n):
        positive = [j for j in range(n) if j == i or s[i][j] >= delta]
        if mode == "soft":
            weights = [math.exp(x / tau) for x in s[i]]
            y = [alpha * w / sum(weights) + (1 - alpha) * (i == j) for j, w in enumerate(weights)]
        elif mode == "multi_positive":
            y = [1 / len(positive) if j in positive else 0.0 for j in range(n)]
        else:
            y = [float(i == j) for j in range(n)]
        free = [j for j in range(n) if mode != "mask" or j == i or j not in positive]
        for anchor, others in ((v[i], t), (t[i], v)):
            z = [pair.scale.item() * cosine(anchor, other) for other in others]
            denominator = sum(math.exp(z[j]) for j in free)
            total -= sum(y[j] * math.log(math.exp(z[j]) / denominator) for j in range(n)) / 2 / n
            hits += (max(range(n), key=z.__getitem__) == i) / 2 / n
        mass += y[i] / n
        false_negatives += (len(positive) - 1) / n
        identical += any(s[i][j] >= 0.9999 for j in range(n) if j != i) / n
    return {
        "loss": total,
        "true_pair_mass": mass,
        "false_negatives": false_negatives,
        "identical_reports": identical,
        "accuracy": hits,
    }


def test_clip_equals_slow_loop():
    pair = make_pair()
    loss, logs = LOSSES.build("clip")(pair)
    expected = slow(pair, "clip")
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-10)
    assert logs["accuracy"].item() == pytest.approx(expected["accuracy"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_sia_equals_slow_loop(mode, alpha):
    pair = make_pair()
    loss, logs = LOSSES.build({"name": "sia", "mode": mode, "alpha": alpha, "delta": 0.5, "tau": 0.3})(pair)
    expected = slow(pair, mode, alpha)
    assert expected["false_negatives"] > 0.5
    assert expected["identical_reports"] == pytest.approx(2 / 7)
    assert loss.item() == pytest.approx(expected.pop("loss"), abs=1e-10)
    for key, value in expected.items():
        assert logs[key].item() == pytest.approx(value, abs=1e-6), key


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "sia", "mode": "soft", "alpha": 0.0},
        {"name": "sia", "mode": "mask", "delta": 1.01},
        {"name": "sia", "mode": "multi_positive", "delta": 1.01},
    ],
)
def test_sia_without_semantics_is_clip(spec):
    pair = make_pair()
    for ours, clip in zip(loss_and_gradients(spec, pair), loss_and_gradients("clip", pair), strict=True):
        torch.testing.assert_close(ours, clip, rtol=0, atol=1e-12)


def test_soft_goes_to_clip_with_alpha():
    pair = make_pair()
    clip = LOSSES.build("clip")(pair)[0]
    gaps = [(LOSSES.build({"name": "sia", "alpha": a})(pair)[0] - clip).abs().item() for a in (1.0, 0.1, 0.001)]
    assert gaps[0] > 0.1
    assert gaps[1] == pytest.approx(gaps[0] / 10, rel=1e-6)
    assert gaps[2] == pytest.approx(gaps[0] / 1000, rel=1e-6)


@pytest.mark.parametrize("mode", ["multi_positive", "soft"])
def test_equal_reports_share_mass_equally(mode):
    pair = make_pair(size=6, equal=(0, 2, 3, 5), dtype=torch.float32)
    pair.semantics.vectors[[1, 4]] = torch.eye(4)[:2]
    pair.semantics.vectors[[0, 2, 3, 5]] = torch.eye(4)[2]
    logs = LOSSES.build({"name": "sia", "mode": mode, "delta": 0.9, "tau": 0.01})(pair)[1]
    assert logs["true_pair_mass"].item() == pytest.approx((4 * 0.25 + 2) / 6, abs=1e-6)
    assert logs["identical_reports"].item() == pytest.approx(4 / 6)
    # and the gradient does not care which of the equal reports is the own one
    swapped = make_pair(size=6, equal=(0, 2, 3, 5), dtype=torch.float32)
    swapped.semantics = pair.semantics
    swapped.text.pooled = pair.text.pooled[[2, 1, 0, 3, 4, 5]].detach().requires_grad_()
    spec = {"name": "sia", "mode": mode, "delta": 0.9, "tau": 0.01}
    assert LOSSES.build(spec)(swapped)[0].item() == pytest.approx(LOSSES.build(spec)(pair)[0].item(), abs=1e-5)


def test_equal_reports_are_positives_in_float32_whatever_the_offset():
    pair = make_pair(size=8, equal=(1, 4), dtype=torch.float32)
    pair.semantics.offset = 0.9
    for mode in MODES:
        assert LOSSES.build({"name": "sia", "mode": mode})(pair)[1]["identical_reports"].item() == pytest.approx(2 / 8)


@pytest.mark.parametrize("spec", ["clip", *({"name": "sia", "mode": mode, "delta": 0.5} for mode in MODES)])
def test_gradient_is_the_slope(spec):
    pair, draw = make_pair(), torch.Generator().manual_seed(5)
    loss, values = LOSSES.build(spec), [x.detach() for x in inputs(pair)]
    for place, gradient in enumerate(loss_and_gradients(spec, pair)[1:]):
        step = torch.randn(gradient.shape, generator=draw, dtype=torch.float64) * 1e-6
        ends = []
        for sign in (1, -1):
            image, text, scale = (x + sign * step if i == place else x for i, x in enumerate(values))
            pair.image.pooled, pair.text.pooled, pair.scale = image, text, scale
            ends.append(loss(pair)[0].item())
        assert (ends[0] - ends[1]) / 2 == pytest.approx((gradient * step).sum().item(), rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_no_gradient_into_semantics(mode):
    pair = make_pair()
    pair.semantics.vectors.requires_grad_()
    loss = LOSSES.build({"name": "sia", "mode": mode, "delta": 0.5})(pair)[0]
    gradients = torch.autograd.grad(loss, [pair.semantics.vectors, pair.image.pooled], allow_unused=True)
    assert gradients[0] is None
    assert gradients[1].abs().max() > 0


@pytest.mark.parametrize("spec", [{"name": "clip"}, *({"name": "sia", "mode": mode} for mode in MODES)])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_are_exact(spec, chunk):
    pair = make_pair(dtype=torch.float32)
    whole, chunked = LOSSES.build(spec), LOSSES.build({**spec, "chunk": chunk})
    for one, other in zip(
        loss_and_gradients(spec, pair), loss_and_gradients({**spec, "chunk": chunk}, pair), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    for key, value in whole(pair)[1].items():
        assert chunked(pair)[1][key].item() == pytest.approx(value.item(), abs=1e-6), key


@pytest.mark.parametrize("spec", ["clip", *({"name": "sia", "mode": mode} for mode in MODES)])
def test_one_pair_is_zero_with_finite_gradient(spec):
    loss, *gradients = loss_and_gradients(spec, make_pair(size=1, equal=(0,)))
    assert loss.item() == 0
    assert all(g.isfinite().all() and g.abs().max() < 1e-12 for g in gradients)


@pytest.mark.parametrize("spec", ["clip", *({"name": "sia", "mode": mode} for mode in MODES)])
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_gradient_is_close(spec, autocast):
    exact = make_pair(size=16, dtype=torch.float32, seed=3)
    half = make_pair(size=16, dtype=torch.bfloat16, seed=3)
    half.semantics = exact.semantics
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = LOSSES.build(spec)(half)[0]
    assert loss.dtype == torch.float32
    reference = torch.autograd.grad(LOSSES.build(spec)(exact)[0], inputs(exact)[:2])
    for ours, right in zip(torch.autograd.grad(loss, inputs(half)[:2]), reference, strict=True):
        assert (ours.float() - right).abs().max() <= 2e-2 * right.norm()


@pytest.mark.parametrize("positives", [2.0, 10.0])
def test_solved_for_the_wanted_number_of_positives(positives):
    pair = make_pair(size=40, dtype=torch.float32)
    sample = pair.semantics.sample = torch.rand(64, 256, generator=torch.Generator().manual_seed(1)) * 1.3 - 0.3
    logs = LOSSES.build({"name": "sia", "positives": positives})(pair)[1]
    delta, tau = logs["delta"].item(), logs["tau"].item()
    assert 39 * (sample >= delta).double().mean().item() == pytest.approx(positives, rel=0.01)
    mean_log = 0.0
    for row in sample.tolist():
        own, others = math.exp(1 / tau), 39 * sum(math.exp(x / tau) for x in row) / len(row)
        mean_log += math.log((own + others) / own) / len(sample)
    assert mean_log == pytest.approx(math.log(1 + positives), abs=1e-4)


def test_reports_that_are_no_more_alike_than_any_two_are_no_positives():
    pair = make_pair(size=6, dtype=torch.float32)
    assert pair.semantics.sample.quantile(0.2) < 0
    assert LOSSES.build({"name": "sia", "positives": 4})(pair)[1]["delta"].item() == 0


def test_temperature_is_at_the_end_of_its_range_where_equal_reports_are_too_many():
    pair = make_pair(size=40)
    pair.semantics.sample = torch.ones(4, 8)
    logs = LOSSES.build({"name": "sia", "positives": 2})(pair)[1]
    assert logs["tau"].item() == pytest.approx(0.01)
    assert logs["delta"].item() == pytest.approx(0.999)


def test_solved_again_for_each_batch_size():
    loss = LOSSES.build({"name": "sia", "positives": 4})
    draw = torch.Generator().manual_seed(2)
    sample, deltas, taus = torch.rand(32, 512, generator=draw), [], []
    for size in (8, 32, 128, 8):
        pair = make_pair(size=size, dtype=torch.float32)
        pair.semantics.sample = sample
        logs = loss(pair)[1]
        deltas.append(logs["delta"].item())
        taus.append(logs["tau"].item())
    assert deltas[0] < deltas[1] < deltas[2]
    assert taus[0] > taus[1] > taus[2]
    assert (deltas[3], taus[3]) == (deltas[0], taus[0])


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"name": "sia", "mode": "maks"}, "did you mean mask"),
        ({"name": "sia", "alpha": 1.5}, "from 0 to 1"),
        ({"name": "sia", "alpha": "high"}, "from 0 to 1"),
        ({"name": "sia", "positives": 0}, "above 0"),
        ({"name": "sia", "tau": -0.1}, "above 0"),
        ({"name": "sia", "delta": math.nan}, "above 0"),
        ({"name": "sia", "chunk": 0}, "at least 1"),
        ({"name": "clip", "chunk": 2.5}, "at least 1"),
    ],
)
def test_wrong_arguments_are_one_line(spec, says):
    with pytest.raises(SistaError, match=says) as error:
        LOSSES.build(spec)
    assert "\n" not in str(error.value)


def test_missing_similarity_names_the_next_step():
    pair = make_pair()
    pair.semantics.sample = None
    with pytest.raises(SistaError, match="give both"):
        LOSSES.build("sia")(pair)
    assert LOSSES.build({"name": "sia", "tau": 0.1, "delta": 0.9})(pair)[0].isfinite()
    pair.semantics = None
    with pytest.raises(SistaError, match="similarity: findings"):
        LOSSES.build("sia")(pair)
