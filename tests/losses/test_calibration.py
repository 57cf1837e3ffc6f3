"""Where delta, tau and the offset of `sia` come from: solved on training reports, or running along with the training.

B pairs, D joint dimension, Ds semantic dimension.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sista_pl.losses import LOSSES
from sista_pl.pair import Features, Pair, Semantics

# none of the thresholds is met by rounding alone
ONLINE = [
    {"name": "sia", "mode": mode, "source": "online", "delta": 0.3, "tau": 0.3, "positive_threshold": 0.4,
     "negative_threshold": 0.1}
    for mode in ("soft", "mask", "multi_positive", "triage")
]  # fmt: skip


def mode(spec) -> str:
    return spec["mode"]


def make_pair(size: int = 7, dtype: torch.dtype = torch.float64, seed: int = 0, sample: Tensor | None = None) -> Pair:
    """Random embeddings, those of the reports with a common part; random semantics."""
    draw = torch.Generator().manual_seed(seed)
    image, text, semantics = (torch.randn(size, 5, generator=draw, dtype=torch.float64).to(dtype) for _ in range(3))
    text = text + torch.linspace(-0.5, 1, 5, dtype=dtype)
    return Pair(
        image=Features(image.requires_grad_(), torch.zeros(size, 1, 5)),
        text=Features(text.requires_grad_(), torch.zeros(size, 1, 5)),
        scale=torch.tensor(6.0, dtype=dtype, requires_grad=True),
        semantics=Semantics(F.normalize(semantics.abs(), dim=1), 0.2, sample),
    )


def with_gradients(loss: Tensor, pair: Pair) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, [pair.image.pooled, pair.text.pooled, pair.scale])]


def mean_similarity(text: Tensor) -> float:
    """The mean cosine of two different rows."""
    found = [
        ((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()).item()
        for i, a in enumerate(text)
        for j, b in enumerate(text)
        if i != j
    ]
    return sum(found) / len(found)


@pytest.mark.parametrize("positives", [2.0, 10.0])
def test_solved_for_the_wanted_number_of_positives(positives):
    sample = torch.rand(64, 256, generator=torch.Generator().manual_seed(1)) * 1.3 - 0.3
    pair = make_pair(size=40, sample=sample)
    logs = LOSSES.build({"name": "sia", "positives": positives})(pair)[1]
    delta, tau = logs["delta"].item(), logs["tau"].item()
    assert 39 * (sample >= delta).double().mean().item() == pytest.approx(positives, rel=0.01)
    mean_log = 0.0
    for row in sample.tolist():
        own, others = math.exp(1 / tau), 39 * sum(math.exp(x / tau) for x in row) / len(row)
        mean_log += math.log((own + others) / own) / len(sample)
    assert mean_log == pytest.approx(math.log(1 + positives), abs=1e-4)


def test_reports_that_are_no_more_alike_than_any_two_are_no_positives():
    sample = torch.linspace(-0.3, 1, 200)[None]
    logs = LOSSES.build({"name": "sia", "positives": 4})(make_pair(size=6, sample=sample))[1]
    assert sample.quantile(1 - 4 / 5) < 0
    assert logs["delta"].item() == 0


def test_temperature_is_at_the_end_of_its_range_where_equal_reports_are_too_many():
    logs = LOSSES.build({"name": "sia", "positives": 2})(make_pair(size=40, sample=torch.ones(4, 8)))[1]
    assert logs["tau"].item() == pytest.approx(0.01)
    assert logs["delta"].item() == pytest.approx(0.999)


def test_solved_again_for_each_batch_size():
    loss = LOSSES.build({"name": "sia", "positives": 4})
    sample = torch.rand(32, 512, generator=torch.Generator().manual_seed(2))
    found = [loss(make_pair(size=size, sample=sample))[1] for size in (8, 32, 128, 8)]
    deltas, taus = ([logs[key].item() for logs in found] for key in ("delta", "tau"))
    assert deltas[0] < deltas[1] < deltas[2]
    assert taus[0] > taus[1] > taus[2]
    assert (deltas[3], taus[3]) == (deltas[0], taus[0])


def test_data_leave_nothing_in_a_checkpoint():
    assert not LOSSES.build("sia").state_dict()


@pytest.mark.parametrize("spec", ONLINE, ids=mode)
@pytest.mark.parametrize("chunk", [None, 3])
def test_online_is_the_encoders_own_reports_as_data(spec, chunk):
    """Their vectors given as data, centred by the mean similarity of the batch, have the same loss and gradient."""
    pair, given = make_pair(), make_pair()
    center = mean_similarity(pair.text.pooled.detach())
    assert center > 0.05
    given.semantics = Semantics(F.normalize(given.text.pooled.detach(), dim=1), center)
    pair.semantics = None  # what the data say is not looked at
    (loss, logs), (right, exact) = (
        LOSSES.build({**spec, "source": source, "chunk": chunk})(x)
        for source, x in (("online", pair), ("data", given))
    )  # fmt: skip
    for one, other in zip(with_gradients(loss, pair), with_gradients(right, given), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)  # the mean is kept in float32
    assert logs.pop("ema_center").item() == pytest.approx(center, abs=1e-6)
    assert logs.keys() == exact.keys()
    for key, value in exact.items():
        assert logs[key].item() == pytest.approx(value.item(), abs=1e-5), key
    assert 0 < logs["false_negatives"] < 5


@pytest.mark.parametrize("chunk", [None, 3])
def test_the_running_mean(chunk):
    loss = LOSSES.build({**ONLINE[0], "chunk": chunk})
    pairs = [make_pair(seed=seed) for seed in range(14)]
    expected, weights = 0.0, [max(0.1, 1 / (i + 1)) for i in range(len(pairs))]
    for pair, weight in zip(pairs, weights, strict=True):
        expected += weight * (mean_similarity(pair.text.pooled.detach()) - expected)
        found, logs = loss(pair)
        found.backward()  # which computes the chunks again, and must not count the batch twice
        assert logs["ema_center"].item() == pytest.approx(expected, abs=1e-6)
    assert weights[-1] == 0.1
    # validation looks at it and leaves it
    loss.eval()
    other = make_pair(seed=99)
    assert loss(other)[1]["ema_center"].item() == pytest.approx(expected, abs=1e-6)
    # and a checkpoint keeps it, with the number of batches
    again = LOSSES.build(ONLINE[0])
    again.load_state_dict(loss.state_dict())
    expected += 0.1 * (mean_similarity(other.text.pooled.detach()) - expected)
    assert again(other)[1]["ema_center"].item() == pytest.approx(expected, abs=1e-6)


def test_a_chunk_is_computed_again_with_the_mean_of_its_own_batch():
    spec, pair, gradients = {**ONLINE[2], "chunk": 3}, make_pair(), []
    for later in ([], [make_pair(seed=1), make_pair(seed=2)]):
        loss = LOSSES.build(spec)
        first = loss(pair)[0]
        for other in later:
            loss(other)
        gradients.append(with_gradients(first, pair))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("spec", ONLINE, ids=mode)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_online_with_all_reports_alike_is_finite(spec, dtype):
    pair = make_pair(dtype=dtype)
    pair.text.pooled = pair.text.pooled.detach()[[0] * 7].requires_grad_()
    loss, logs = LOSSES.build(spec)(pair)
    assert logs["ema_center"].item() == pytest.approx(0.99)
    assert logs["identical_reports"] == 1
    assert all(value.isfinite().all() for value in with_gradients(loss, pair))
