"""`mgca_cta` and `mgca_cpa` against slow loops, and the properties that they have to keep.

B pairs, P patches, L words, D joint dimension, K prototypes.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sista_pl.errors import SistaError
from sista_pl.losses import LOSSES
from sista_pl.losses.mgca import clipped, sinkhorn
from sista_pl.pair import Features, Pair
from sista_pl.pretrain import PretrainTask

LENGTHS = (5, 12, 1, 0, 3)
P, D, K = 7, 6, 9


def make_pair(lengths=LENGTHS, dtype: torch.dtype = torch.float64, seed: int = 0, pad: int = 0, epoch: int = 1) -> Pair:
    """Random tokens and attentions; the words' values do not depend on the padding."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    size, length = len(lengths), max(lengths) + pad
    words, attention = torch.full((size, length, D), 5.0, dtype=torch.float64), torch.zeros(size, length).double()
    for i, n in enumerate(lengths):
        words[i, :n], attention[i, :n] = normal(n, D), normal(n).exp()
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    patches, patch_attention = normal(size, P, D).to(dtype), normal(size, P).exp().to(dtype)
    return Pair(
        image=Features(normal(size, D).to(dtype).requires_grad_(), patches.requires_grad_(), attention=patch_attention),
        text=Features(
            normal(size, D).to(dtype).requires_grad_(), words.to(dtype).requires_grad_(), mask, None,
            attention.to(dtype),
        ),
        scale=torch.tensor(1.0, requires_grad=True),
        epoch=epoch,
    )  # fmt: skip


def local(pair: Pair) -> list[Tensor]:
    return [pair.image.local, pair.text.local]


def pooled(pair: Pair) -> list[Tensor]:
    return [pair.image.pooled, pair.text.pooled]


def both(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def cta(pair: Pair, **options) -> list[Tensor]:
    return both(LOSSES.build({"name": "mgca_cta", **options})(pair)[0], local(pair))


def quantile(values: list[float], q: float) -> float:
    """Between the two nearest ranks in proportion."""
    place, values = q * (len(values) - 1), sorted(values)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def slow_weights(attention: list[float]) -> list[float]:
    low, high = quantile(attention, 0.1), quantile(attention, 0.9)
    inside = [min(max(a, low), high) for a in attention]
    return [a / sum(inside) for a in inside]


def slow_side(tokens: list[Tensor], others: list[Tensor], weights: list[float], tau: float) -> Tensor:
    """The weighted loss of one report's words against its patches, or the other way round."""
    unit = [token / token.norm() for token in tokens]
    other = [token / token.norm() for token in others]
    attended = []
    for w in unit:
        exps = [torch.exp(w @ v / tau) for v in other]
        o = sum(e / sum(exps) * v for e, v in zip(exps, other, strict=True))
        attended.append(o / o.norm())
    total = torch.zeros((), dtype=torch.float64)
    for i, weight in enumerate(weights):
        own = torch.exp(unit[i] @ attended[i] / tau)
        across = sum(torch.exp(unit[i] @ o / tau) for o in attended)
        back = sum(torch.exp(w @ attended[i] / tau) for w in unit)
        total = total - weight * (torch.log(own / across) + torch.log(own / back)) / 2
    return total


def slow_cta(pair: Pair, tau: float = 0.1) -> tuple[Tensor, Tensor]:
    """Words' and patches' loss, each the mean over the reports with words."""
    words, patches = [], []
    for i, mask in enumerate(pair.text.mask):
        w, v = [x for x, real in zip(pair.text.local[i], mask, strict=True) if real], list(pair.image.local[i])
        if not w:
            continue
        word_attention = [a for a, real in zip(pair.text.attention[i].tolist(), mask, strict=True) if real]
        words.append(slow_side(w, v, slow_weights(word_attention), tau))
        uniform = [1 / len(v)] * len(v)
        seen = pair.image.attention
        patches.append(slow_side(v, w, uniform if seen is None else slow_weights(seen[i].tolist()), tau))
    return sum(words) / len(words), sum(patches) / len(patches)


@pytest.mark.parametrize("tau", [0.1, 0.5])
@pytest.mark.parametrize("cnn", [False, True])
def test_cta_equals_slow_loop(tau, cnn):
    pair = make_pair()
    if cnn:
        pair.image.attention = None
    words, patches = slow_cta(pair, tau)
    for ours, slow in zip(cta(pair, temperature=tau), both(words + patches, local(pair)), strict=True):
        torch.testing.assert_close(ours, slow, rtol=0, atol=1e-10)
    logs = LOSSES.build({"name": "mgca_cta", "temperature": tau})(pair)[1]
    assert logs["word_loss"].item() == pytest.approx(words.item(), abs=1e-10)
    assert logs["patch_loss"].item() == pytest.approx(patches.item(), abs=1e-10)


def test_clipped_weights_equal_a_loop():
    pair = make_pair()
    weights = clipped(pair.text.attention, pair.text.mask)
    for row, attention, n in zip(weights.tolist(), pair.text.attention.tolist(), LENGTHS, strict=True):
        assert row[:n] == pytest.approx(slow_weights(attention[:n]) if n else [])
        assert row[n:] == [0.0] * (len(row) - n)
    # of 12 words, one at each end and a part of the next lie outside of the quantiles
    assert weights[1].max() / weights[1].min() < pair.text.attention[1].max() / pair.text.attention[1, :12].min()


def test_cta_weights_carry_no_gradient():
    pair = make_pair()
    seen = [pair.image.attention.requires_grad_(), pair.text.attention.requires_grad_()]
    loss = LOSSES.build("mgca_cta")(pair)[0]
    assert torch.autograd.grad(loss, seen, allow_unused=True) == (None, None)


def test_cta_does_not_depend_on_padding():
    loss, patches, words = cta(make_pair())
    longer = cta(make_pair(pad=5))
    torch.testing.assert_close(longer[0], loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(longer[1], patches, rtol=0, atol=1e-12)
    torch.testing.assert_close(longer[2][:, : words.shape[1]], words, rtol=0, atol=1e-12)
    assert (longer[2][~make_pair(pad=5).text.mask] == 0).all()


def test_cta_does_not_depend_on_the_other_samples():
    """The gradient of a report with words is that of the report alone, divided by the number of such reports."""
    together = cta(make_pair())
    for i in (0, 1, 2, 4):
        alone = make_pair()
        for side in (alone.image, alone.text):
            side.local = side.local[i : i + 1].detach().requires_grad_()
            side.attention = side.attention[i : i + 1]
        alone.text.mask = alone.text.mask[i : i + 1]
        for every, one in zip(together[1:], cta(alone)[1:], strict=True):
            torch.testing.assert_close(every[i], one[0] / 4, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        lambda _: make_pair([1, 1], torch.float32),
        lambda _: make_pair([0, 0], torch.float32, pad=2),
        lambda pair: replaced(pair, "image"),
        lambda pair: replaced(pair, "text"),
    ],
    ids=["one-word reports", "no words", "zero patches", "zero words"],
)
def test_cta_of_degenerate_batches_is_finite(change):
    pair = change(make_pair(dtype=torch.float32))
    loss, logs = LOSSES.build("mgca_cta")(pair)
    assert all(value.isfinite() for value in (loss, *logs.values()))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, local(pair)))
    if not pair.text.mask.any():
        assert loss.item() == 0


def replaced(pair: Pair, side: str) -> Pair:
    features = getattr(pair, side)
    features.local = torch.zeros_like(features.local, requires_grad=True)
    return pair


def test_cta_learns_which_patch_a_word_speaks_of():
    pair = make_pair([3, 3], torch.float32)
    loss = LOSSES.build("mgca_cta")
    optimizer = torch.optim.Adam(local(pair), lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        loss(pair)[0].backward()
        optimizer.step()
    assert loss(pair)[1]["word_accuracy"].item() == pytest.approx(1)


def test_cta_needs_the_reports_attention():
    pair = make_pair()
    pair.text.attention = None
    with pytest.raises(SistaError, match="no attention of its class token") as error:
        LOSSES.build("mgca_cta")(pair)
    assert "\n" not in str(error.value)


def build_cpa(dtype: torch.dtype = torch.float64, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return LOSSES.build({"name": "mgca_cpa", "prototypes": K, "dim": D, **options}).to(dtype)


def slow_sinkhorn(scores: list[list[float]], epsilon: float, iterations: int) -> list[list[float]]:
    q = [[math.exp(s / epsilon) for s in row] for row in scores]
    samples, prototypes = range(len(q)), range(len(q[0]))
    for _ in range(iterations):
        for k in prototypes:
            total = sum(q[n][k] for n in samples)
            for n in samples:
                q[n][k] /= total * len(prototypes)
        for n in samples:
            total = sum(q[n])
            for k in prototypes:
                q[n][k] /= total * len(samples)
    return [[x * len(samples) for x in row] for row in q]


@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_sinkhorn_equals_slow_loop(iterations):
    scores = torch.rand(11, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    codes = sinkhorn(scores, 0.05, iterations)
    expected = torch.tensor(slow_sinkhorn(scores.tolist(), 0.05, iterations), dtype=torch.float64)
    torch.testing.assert_close(codes, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(codes.sum(1), torch.ones(11, dtype=torch.float64))
    # with more iterations the prototypes share the batch
    assert codes.sum(0).sub(11 / 4).abs().max() < {1: 3.0, 3: 1.0, 20: 0.1}[iterations]


def test_sinkhorn_in_float32_survives_a_small_epsilon():
    scores = torch.rand(11, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    codes = sinkhorn(scores, 1e-3, 3)
    assert codes.isfinite().all()
    torch.testing.assert_close(codes, sinkhorn(scores.double(), 1e-3, 3).float(), rtol=0, atol=1e-3)


def slow_cpa(pair: Pair, prototypes: Tensor, epsilon: float, iterations: int, tau: float) -> Tensor:
    c = [row / row.norm() for row in prototypes]
    scores = [[[x / x.norm() @ row for row in c] for x in side] for side in pooled(pair)]
    codes = [slow_sinkhorn([[s.item() for s in row] for row in side], epsilon, iterations) for side in scores]
    total = torch.zeros((), dtype=torch.float64)
    for side, other in ((0, 1), (1, 0)):
        for n, row in enumerate(scores[side]):
            partition = sum(torch.exp(s / tau) for s in row)
            for s, q in zip(row, codes[other][n], strict=True):
                total = total - q * torch.log(torch.exp(s / tau) / partition) / 2 / len(scores[side])
    return total


@pytest.mark.parametrize("options", [{}, {"epsilon": 0.2, "iterations": 1, "temperature": 0.5}])
def test_cpa_equals_slow_loop(options):
    pair, loss = make_pair(), build_cpa(**options)
    settings = {"epsilon": 0.05, "iterations": 3, "temperature": 0.2} | options
    inputs = [*pooled(pair), loss.prototypes]
    slow = slow_cpa(pair, loss.prototypes, *settings.values())
    for ours, expected in zip(both(loss(pair)[0], inputs), both(slow, inputs), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


def test_cpa_logs_what_is_nearest():
    pair, loss = make_pair(), build_cpa()
    with torch.no_grad():
        loss.prototypes.copy_(F.pad(torch.eye(D), (0, 0, 0, K - D)) + 0.01)
        for side, nearest in ((pair.image, [0, 1, 2, 3, 4]), (pair.text, [0, 1, 2, 4, 3])):
            side.pooled.copy_(torch.eye(D)[nearest])
    logs = loss(pair)[1]
    assert logs["agreement"].item() == pytest.approx(3 / 5)
    assert logs["used_prototypes"].item() == 5


def test_prototypes_are_frozen_in_the_first_epoch_with_a_gradient():
    loss = build_cpa()
    frozen, free = (both(loss(pair := make_pair(epoch=e))[0], [*pooled(pair), loss.prototypes]) for e in (0, 1))
    assert (frozen[3] == 0).all()
    assert free[3].abs().max() > 1e-3
    for a, b in zip(frozen[:3], free[:3], strict=True):
        assert torch.equal(a, b)
    longer = build_cpa(frozen_epochs=3)
    for epoch, still in ((2, True), (3, False)):
        gradient = torch.autograd.grad(longer(make_pair(epoch=epoch))[0], longer.prototypes)[0]
        assert (gradient == 0).all() == still


def test_cpa_does_not_depend_on_the_length_of_prototypes():
    pair, loss = make_pair(), build_cpa()
    before = loss(pair)[0].item()
    with torch.no_grad():
        loss.prototypes *= torch.arange(1, K + 1)[:, None]
    assert loss(pair)[0].item() == pytest.approx(before, abs=1e-12)


def test_cpa_alone_leaves_the_scale_a_gradient():
    pair = make_pair()
    assert torch.autograd.grad(build_cpa()(pair)[0], pair.scale)[0].item() == 0


def test_cpa_of_one_pair_and_of_zeros_is_finite():
    for pair in (make_pair([2]), make_pair([1, 1])):
        pair.image.pooled = torch.zeros_like(pair.image.pooled, requires_grad=True)
        assert all(x.isfinite().all() for x in both(build_cpa()(pair)[0], pooled(pair)))


@pytest.mark.parametrize("name", ["mgca_cta", "mgca_cpa"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_gradient_is_close(name, autocast):
    exact, half = make_pair(dtype=torch.float32, seed=2), make_pair(dtype=torch.bfloat16, seed=2)
    half.text.attention, half.image.attention = exact.text.attention, exact.image.attention
    loss = build_cpa(torch.float32) if name == "mgca_cpa" else LOSSES.build(name)
    inputs = pooled if name == "mgca_cpa" else local
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = loss(half)[0]
    assert value.dtype == torch.float32
    for ours, right in zip(both(value, inputs(half))[1:], both(loss(exact)[0], inputs(exact))[1:], strict=True):
        assert (ours.float() - right).abs().max() <= 2e-2 * right.norm()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"name": "mgca_cta", "temperature": 0}, "above 0"),
        ({"name": "mgca_cpa", "prototypes": 1}, "at least 2"),
        ({"name": "mgca_cpa", "epsilon": 0}, "above 0"),
        ({"name": "mgca_cpa", "iterations": 0}, "at least 1"),
        ({"name": "mgca_cpa", "temperature": -0.2}, "above 0"),
        ({"name": "mgca_cpa", "frozen_epochs": 0.5}, "at least 0"),
        ({"name": "mgca_cpa", "dim": "128"}, "at least 1"),
    ],
)
def test_wrong_arguments_are_one_line(spec, says):
    with pytest.raises(SistaError, match=says) as error:
        LOSSES.build(spec)
    assert "\n" not in str(error.value)


def test_cpa_of_another_dimension_names_the_next_step():
    with pytest.raises(SistaError, match=f"give `dim: {D}`"):
        LOSSES.build("mgca_cpa")(make_pair(dtype=torch.float32))


def test_the_task_asks_for_attention_and_tells_the_dimension():
    small = {"text_encoder": {"name": "small-bert", "layers": 1, "dim": 32, "vocab_size": 60},
             "image_encoder": "resnet10t", "image_size": 32, "embed_dim": 8, "head_hidden": 8}  # fmt: skip
    clip, mgca = (
        PretrainTask({"instance": {"name": "clip"}, **more}, **small)
        for more in ({}, {"token": {"name": "mgca_cta"}, "prototype": {"name": "mgca_cpa"}})
    )
    assert mgca.losses["prototype"].prototypes.shape == (500, 8)
    batch = {"input_ids": torch.tensor([[2, 7, 8, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long),
             "word_index": torch.tensor([[-1, 0, 1, -1]]), "word_ids": torch.tensor([[5, 6]])}  # fmt: skip
    assert clip.encode_text(batch).attention is None
    attention = mgca.encode_text(batch).attention
    assert attention.shape == (1, 2)
    assert (attention > 0).all()
    assert attention.sum() < 1


def test_shuffled_gives_each_image_the_report_of_another():
    pair, moved = make_pair(), make_pair()
    order = [4, 0, 1, 2, 3]
    text = moved.text
    moved.text = Features(*(x if x is None else x[order] for x in (text.pooled, text.local, text.mask, text.ids,
                                                                    text.attention)))  # fmt: skip
    ours = LOSSES.build({"name": "mgca_cta", "shuffled": True})(pair)[0].item()
    assert ours == LOSSES.build("mgca_cta")(moved)[0].item()
    assert ours != pytest.approx(LOSSES.build("mgca_cta")(pair)[0].item(), abs=1e-3)
    with pytest.raises(SistaError, match="'mgca_cta': shuffled is 1; write true or false"):
        LOSSES.build({"name": "mgca_cta", "shuffled": 1})
