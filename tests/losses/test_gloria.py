"""`gloria` against a slow loop, and the properties that it has to keep.

B pairs, P patches, L words, D joint dimension.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sista_pl.errors import SistaError
from sista_pl.losses import LOSSES
from sista_pl.pair import Features, Pair

LENGTHS = (5, 2, 1, 0, 4)


def make_pair(lengths=LENGTHS, dtype: torch.dtype = torch.float64, seed: int = 0, pad: int = 0) -> Pair:
    """Random tokens; the words' values do not depend on the padding."""
    draw = torch.Generator().manual_seed(seed)
    length = max(lengths) + pad
    words = torch.full((len(lengths), length, 6), 5.0, dtype=torch.float64)
    for i, n in enumerate(lengths):
        words[i, :n] = torch.randn(n, 6, generator=draw, dtype=torch.float64)
    patches = torch.randn(len(lengths), 7, 6, generator=draw, dtype=torch.float64)
    pooled, mask = torch.zeros(len(lengths), 6), torch.arange(length) < torch.tensor(lengths)[:, None]
    return Pair(
        image=Features(pooled, patches.to(dtype).requires_grad_()),
        text=Features(pooled, words.to(dtype).requires_grad_(), mask),
        scale=torch.tensor(1.0),
    )


def gradients(pair: Pair, **options) -> list[Tensor]:
    return both(LOSSES.build({"name": "gloria", **options})(pair)[0], pair)


def both(loss: Tensor, pair: Pair) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, [pair.image.local, pair.text.local])]


def softmax(values: list[Tensor]) -> list[Tensor]:
    exps = [x.exp() for x in values]
    return [e / sum(exps) for e in exps]


def slow_similarity(words: list[Tensor], patches: list[Tensor], temps, aggregation: str) -> Tensor:
    """Of one report and one image."""
    over_words = [softmax([patch @ word for word in words]) for patch in patches]  # P L
    total = torch.zeros((), dtype=torch.float64)
    for i, word in enumerate(words):
        weights = softmax([temps[0] * row[i] for row in over_words])
        context = sum(a * patch for a, patch in zip(weights, patches, strict=True))
        r = word @ context / (word.norm() * context.norm())
        total = total + (temps[1] * r).exp()
    return temps[2] * torch.log(total / len(words) if aggregation == "mean" else total)


def slow(pair: Pair, temps=(4.0, 5.0, 10.0), aggregation: str = "sum") -> tuple[Tensor, float]:
    """Loss and accuracy; a report without words is no candidate and its image no anchor."""
    reports = {}
    for i, (words, mask) in enumerate(zip(pair.text.local, pair.text.mask, strict=True)):
        if mask.any():
            reports[i] = [word for word, real in zip(words, mask, strict=True) if real]
    images = [list(patches) for patches in pair.image.local]
    z = {(b, i): slow_similarity(words, images[b], temps, aggregation)
         for i, words in reports.items() for b in range(len(images))}  # fmt: skip
    total, hits = torch.zeros((), dtype=torch.float64), 0
    for i in reports:
        to_reports = {j: z[i, j] for j in reports}
        to_images = {b: z[b, i] for b in range(len(images))}
        for others in (to_reports, to_images):
            total = total - torch.log(others[i].exp() / sum(x.exp() for x in others.values())) / 2 / len(reports)
            hits += max(others, key=lambda j: others[j].item()) == i
    return total, hits / 2 / len(reports)


@pytest.mark.parametrize("temps", [(4.0, 5.0, 10.0), (1.0, 2.0, 3.0)])
@pytest.mark.parametrize("aggregation", ["sum", "mean"])
def test_equals_slow_loop(temps, aggregation):
    pair = make_pair()
    options = dict(zip(("attention_scale", "word_scale", "scale"), temps, strict=True), aggregation=aggregation)
    expected, accuracy = slow(pair, temps, aggregation)
    for ours, right in zip(gradients(pair, **options), both(expected, pair), strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-9)
    assert LOSSES.build({"name": "gloria", **options})(pair)[1]["accuracy"].item() == pytest.approx(accuracy)


def test_the_published_numbers_are_the_defaults():
    pair = make_pair()
    published = {"attention_scale": 4.0, "word_scale": 5.0, "scale": 10.0, "aggregation": "sum"}
    assert torch.equal(gradients(pair)[0], gradients(pair, **published)[0])


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_chunks_are_exact(chunk):
    for whole, part in zip(gradients(make_pair(), chunk=None), gradients(make_pair(), chunk=chunk), strict=True):
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-12)


def test_a_chunk_is_computed_again_instead_of_kept():
    """What the graph keeps does not grow with the number of chunks, but for the tokens and the (B, N) similarities."""

    def kept(chunk: int | None) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            LOSSES.build({"name": "gloria", "chunk": chunk})(make_pair([6] * 12))
        return sum(sizes)

    assert kept(1) < kept(None) / 4


@pytest.mark.parametrize("chunk", [None, 2])
def test_padding_does_not_matter(chunk):
    loss, patches, words = gradients(make_pair(), chunk=chunk)
    longer = gradients(make_pair(pad=5), chunk=chunk)
    torch.testing.assert_close(longer[0], loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(longer[1], patches, rtol=0, atol=1e-12)
    torch.testing.assert_close(longer[2][:, : words.shape[1]], words, rtol=0, atol=1e-12)
    assert (longer[2][~make_pair(pad=5).text.mask] == 0).all()


def test_longer_reports_are_more_alike_in_the_sum_alone():
    """Doubling the words of each report moves the sum by log 2 everywhere, and the mean not at all."""
    pair = make_pair([3, 3, 3])
    double = make_pair([3, 3, 3])
    double.text = Features(double.text.pooled, pair.text.local.repeat(1, 2, 1), pair.text.mask.repeat(1, 2))
    loss = {name: LOSSES.build({"name": "gloria", "aggregation": name}) for name in ("sum", "mean")}
    v, used = pair.image.local, pair.text.mask
    for name, shift in (("sum", 10 * torch.tensor(2.0).double().log()), ("mean", torch.zeros(()).double())):
        # the same words twice halve the attention of each: undone by an attention scale of twice the size
        twice = LOSSES.build({"name": "gloria", "aggregation": name, "attention_scale": 8.0})
        one = loss[name]._similarity(v, pair.text.local, used)
        two = twice._similarity(v, double.text.local, double.text.mask)
        torch.testing.assert_close(two, one + shift)


@pytest.mark.parametrize(
    "change",
    [
        lambda _: make_pair([1, 1], torch.float32),
        lambda _: make_pair([0, 0], torch.float32, pad=2),
        lambda _: make_pair([3], torch.float32),
        lambda pair: replaced(pair, "image"),
        lambda pair: replaced(pair, "text"),
    ],
    ids=["one-word reports", "no words", "one pair", "zero patches", "zero words"],
)
def test_degenerate_batches_are_finite(change):
    pair = change(make_pair(dtype=torch.float32))
    loss, logs = LOSSES.build("gloria")(pair)
    assert loss.isfinite()
    assert logs["accuracy"].isfinite()
    assert all(gradient.isfinite().all() for gradient in both(loss, pair)[1:])
    if len(pair.text.mask) == 1 or not pair.text.mask.any():
        assert loss.item() == 0


def replaced(pair: Pair, side: str) -> Pair:
    features = getattr(pair, side)
    features.local = torch.zeros_like(features.local, requires_grad=True)
    return pair


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("chunk", [None, 2])
def test_bf16_gradient_is_close(autocast, chunk):
    exact, half = make_pair(dtype=torch.float32, seed=2), make_pair(dtype=torch.bfloat16, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = LOSSES.build({"name": "gloria", "chunk": chunk})(half)[0]
    assert loss.dtype == torch.float32
    for ours, right in zip(both(loss, half)[1:], gradients(exact)[1:], strict=True):
        assert (ours.float() - right).abs().max() <= 2e-2 * right.norm()


def test_learns_whose_report_it_is():
    pair = make_pair([3, 4, 2, 5], torch.float32)
    loss = LOSSES.build("gloria")
    optimizer = torch.optim.Adam([pair.image.local, pair.text.local], lr=0.1)
    first = loss(pair)[0].item()
    for _ in range(30):
        optimizer.zero_grad()
        loss(pair)[0].backward()
        optimizer.step()
    last, logs = loss(pair)
    assert last.item() < 0.1 * first
    assert logs["accuracy"].item() == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"attention_scale": 0}, "above 0"),
        ({"word_scale": -1}, "above 0"),
        ({"scale": "ten"}, "above 0"),
        ({"aggregation": "summ"}, "did you mean sum"),
        ({"chunk": 0}, "at least 1"),
    ],
)
def test_wrong_arguments_are_one_line(options, says):
    with pytest.raises(SistaError, match=says) as error:
        LOSSES.build({"name": "gloria", **options})
    assert "\n" not in str(error.value)


def test_shuffled_gives_each_image_the_report_of_another():
    pair, moved = make_pair(), make_pair()
    order = [4, 0, 1, 2, 3]
    text = moved.text
    moved.text = Features(*(x if x is None else x[order] for x in (text.pooled, text.local, text.mask, text.ids,
                                                                    text.attention)))  # fmt: skip
    ours = LOSSES.build({"name": "gloria", "shuffled": True})(pair)[0].item()
    assert ours == LOSSES.build("gloria")(moved)[0].item()
    assert ours != pytest.approx(LOSSES.build("gloria")(pair)[0].item(), abs=1e-3)
    with pytest.raises(SistaError, match="'gloria': shuffled is 1; write true or false"):
        LOSSES.build({"name": "gloria", "shuffled": 1})
