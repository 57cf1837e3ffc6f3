"""`sta` against slow loops, and the properties that it has to keep.

B pairs, P patches, L words, D joint dimension.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sista_pl.errors import SistaError
from sista_pl.losses import LOSSES
from sista_pl.losses.token import sparse_weights
from sista_pl.pair import Features, Pair
from sista_pl.words import word_id

HEART, LUNG, EDEMA, THE, LEFT = (word_id(word) for word in ("heart", "lung", "edema", "the", "left"))
# repeats, a negated and an affirmed word, stop words, one word, no word
REPORTS = [
    [HEART, LUNG, HEART, THE, -EDEMA],
    [LUNG, EDEMA, -EDEMA, LEFT],
    [EDEMA],
    [],
    [THE, LEFT, HEART, LUNG, LEFT, LUNG],
]


def make_pair(
    reports: list[list[int]] = REPORTS, dtype: torch.dtype = torch.float64, seed: int = 0, pad: int = 0
) -> Pair:
    """Random tokens; the words' values do not depend on the padding."""
    draw = torch.Generator().manual_seed(seed)
    length = max(map(len, reports)) + pad
    ids = torch.tensor([report + [0] * (length - len(report)) for report in reports])
    words = torch.full((len(reports), length, 6), 5.0, dtype=torch.float64)  # what stands in padding must not matter
    for i, report in enumerate(reports):
        words[i, : len(report)] = torch.randn(len(report), 6, generator=draw, dtype=torch.float64)
    patches = torch.randn(len(reports), 7, 6, generator=draw, dtype=torch.float64)
    pooled = torch.zeros(len(reports), 6)
    return Pair(
        image=Features(pooled, patches.to(dtype).requires_grad_()),
        text=Features(pooled, words.to(dtype).requires_grad_(), ids != 0, ids),
        scale=torch.tensor(1.0),
    )


def gradients(spec, pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    loss = LOSSES.build(spec)(pair)[0]
    return loss.detach(), *torch.autograd.grad(loss, [pair.image.local, pair.text.local])


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: list[float], b: list[float]) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def slow_group(word: list[float], patches: list[list[float]], sigma: float, similarity: str) -> list[float]:
    """The language-grouped vision embedding of one word in one image."""
    s = [(dot if similarity == "inner" else cosine)(word, patch) for patch in patches]
    unit = [(x - min(s)) / (max(s) - min(s)) if max(s) > min(s) else 1.0 for x in s]
    kept = [x if x >= sigma * max(unit) else 0.0 for x in unit]
    return [sum(k / sum(kept) * patch[d] for k, patch in zip(kept, patches, strict=True)) for d in range(len(word))]


def cross_entropy(logits: list[float], targets: list[float]) -> float:
    total = sum(math.exp(z) for z in logits)
    return -sum(y * math.log(math.exp(z) / total) for z, y in zip(logits, targets, strict=True) if y)


def chosen(pair: Pair, skip: bool) -> list[list[tuple[int, list[float]]]]:
    stop = {THE}
    return [
        [
            (word, vector)
            for word, vector in zip(ids, vectors, strict=True)
            if word and not (skip and (word < 0 or word in stop))
        ]
        for ids, vectors in zip(pair.text.ids.tolist(), pair.text.local.tolist(), strict=True)
    ]


def mean_loss(losses: list[list[float]], reduction: str) -> float:
    if reduction == "word":
        flat = [loss for report in losses for loss in report]
        return sum(flat) / len(flat)
    means = [sum(report) / len(report) for report in losses if report]
    return sum(means) / len(means)


def slow_within(pair, sigma=0.5, similarity="inner", repeated_words="merge", skip=False, reduction="report") -> float:
    losses = []
    for words, patches in zip(chosen(pair, skip), pair.image.local.tolist(), strict=True):
        grouped = [slow_group(w, patches, sigma, similarity) for _, w in words]
        losses.append([])
        for i, (name, vector) in enumerate(words):
            same = [other == name if repeated_words == "merge" else j == i for j, (other, _) in enumerate(words)]
            target = [x / sum(same) for x in same]
            to_vision = [cosine(vector, c) / 0.1 for c in grouped]
            to_words = [cosine(other, grouped[i]) / 0.1 for _, other in words]
            losses[-1].append((cross_entropy(to_vision, target) + cross_entropy(to_words, target)) / 2)
    return mean_loss(losses, reduction)


def slow_batch(
    pair, sigma=0.5, similarity="inner", repeated_words="merge", skip=True, reduction="report", group=32
) -> float:
    images, losses = pair.image.local.tolist(), []
    for i, words in enumerate(chosen(pair, skip)):
        if repeated_words == "merge":
            vectors: dict[int, list[list[float]]] = {}
            for name, vector in words:
                vectors.setdefault(name, []).append(vector)
            words = [(n, [sum(x) / len(x) for x in zip(*vs, strict=True)]) for n, vs in vectors.items()]
        members = range(i - i % group, min(i - i % group + group, len(images)))
        losses.append([])
        for name, vector in words:
            open_images = [j for j in members if j == i or name not in pair.text.ids[j].tolist()]
            logits = [cosine(vector, slow_group(vector, images[j], sigma, similarity)) / 0.1 for j in open_images]
            losses[-1].append(cross_entropy(logits, [float(j == i) for j in open_images]))
    return mean_loss(losses, reduction)


OPTIONS = [
    {},
    {"sigma": 0.0},
    {"sigma": 0.9},
    {"similarity": "cosine"},
    {"repeated_words": "separate"},
    {"reduction": "word"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("negatives", ["within", "batch"])
def test_equals_slow_loop(options, skip, negatives):
    pair = make_pair()
    spec = {"name": "sta", "negatives": negatives, "skip_negated": skip, "skip_stop_words": skip, **options}
    slow = slow_within if negatives == "within" else slow_batch
    assert LOSSES.build(spec)(pair)[0].item() == pytest.approx(slow(pair, skip=skip, **options), abs=1e-10)


@pytest.mark.parametrize("group", [1, 2, 3])
def test_groups_equal_slow_loop(group):
    pair = make_pair()
    loss = LOSSES.build({"name": "sta", "negatives": "batch", "group": group})(pair)[0]
    assert loss.item() == pytest.approx(slow_batch(pair, group=group), abs=1e-10)
    assert (loss.item() == 0) == (group == 1)


def test_one_over_n_is_a_number():
    pair = make_pair()
    loss = LOSSES.build({"name": "sta", "sigma": "1/N"})(pair)[0]
    assert loss.item() == pytest.approx(slow_within(pair, sigma=1 / 7), abs=1e-10)


def test_defaults_of_the_skip_options_follow_the_negatives():
    pair = make_pair()
    for negatives, skip in (("within", False), ("batch", True)):
        given = {"name": "sta", "negatives": negatives, "skip_negated": skip, "skip_stop_words": skip}
        ours, explicit = (LOSSES.build(s)(pair) for s in ({"name": "sta", "negatives": negatives}, given))
        assert ours[0].item() == explicit[0].item()
    assert LOSSES.build("sta")(pair)[1]["words"].item() == pytest.approx(16 / 5)
    # heart lung · lung edema left · edema · · left heart lung
    assert LOSSES.build({"name": "sta", "negatives": "batch"})(pair)[1]["words"].item() == pytest.approx(9 / 5)


def test_negated_stop_word_is_a_stop_word():
    pair = make_pair([[HEART, -THE, -EDEMA]])
    logs = LOSSES.build({"name": "sta", "skip_stop_words": True})(pair)[1]
    assert logs["words"].item() == 2


@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.5, 1.0])
def test_weights_sum_to_one_and_keep_a_patch(sigma):
    s = torch.randn(4, 9, 25, generator=torch.Generator().manual_seed(1))
    weights = sparse_weights(s, sigma)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 9))
    assert (weights >= 0).all()
    assert (weights.gather(-1, s.argmax(-1, keepdim=True)) > 0).all()


def test_higher_sigma_keeps_fewer_patches():
    pair = make_pair()
    kept = [LOSSES.build({"name": "sta", "sigma": x})(pair)[1]["kept_patches"].item() for x in (0.0, 0.5, 0.8, 1.0)]
    assert kept[0] == pytest.approx(6 / 7)
    assert kept[3] == pytest.approx(1 / 7)
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 4


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e3])
def test_constant_similarities_are_uniform(scale):
    s = torch.full((2, 8), scale).requires_grad_()
    weights = sparse_weights(s + torch.tensor([0.0, 1e-7]).repeat(4) * scale, 0.5)
    torch.testing.assert_close(weights, torch.full((2, 8), 1 / 8))
    weights.square().sum().backward()
    assert s.grad.isfinite().all()


DEGENERATE = {
    "sigma 1": ({"sigma": 1.0}, lambda pair: pair),
    "constant similarities": ({}, lambda pair: replace_patches(pair, pair.image.local[:, :1].expand(-1, 7, -1))),
    "zero patches": ({}, lambda pair: replace_patches(pair, torch.zeros_like(pair.image.local))),
    "zero words": ({}, lambda pair: replace_words(pair, torch.zeros_like(pair.text.local))),
    "one-word reports": ({}, lambda _: make_pair([[HEART], [LUNG], [EDEMA]], torch.float32)),
    "no word that batch takes": ({}, lambda _: make_pair([[], [THE, -EDEMA], []], torch.float32)),
    "one pair": ({}, lambda _: make_pair([[HEART, LUNG]], torch.float32)),
    "the same words everywhere": ({}, lambda _: make_pair([[HEART, HEART], [HEART]], torch.float32)),
}


def replace_patches(pair: Pair, patches: Tensor) -> Pair:
    pair.image.local = patches.detach().clone().requires_grad_()
    return pair


def replace_words(pair: Pair, words: Tensor) -> Pair:
    pair.text.local = words.detach().clone().requires_grad_()
    return pair


@pytest.mark.parametrize("negatives", ["within", "batch"])
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_batches_are_finite(case, negatives):
    options, change = DEGENERATE[case]
    pair = change(make_pair(dtype=torch.float32))
    loss, logs = LOSSES.build({"name": "sta", "negatives": negatives, **options})(pair)
    assert loss.isfinite()
    assert all(value.isfinite() for value in logs.values())
    for gradient in torch.autograd.grad(loss, [pair.image.local, pair.text.local]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("negatives", ["within", "batch"])
def test_nothing_to_contrast_is_zero(negatives):
    pair = make_pair([[HEART], [HEART]])
    assert LOSSES.build({"name": "sta", "negatives": negatives})(pair)[0].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("negatives", ["within", "batch"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_padding_does_not_matter(negatives, shuffled):
    spec = {"name": "sta", "negatives": negatives, "shuffled": shuffled}
    loss, patches, words = gradients(spec, make_pair())
    longer = gradients(spec, make_pair(pad=5))
    torch.testing.assert_close(longer[0], loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(longer[1], patches, rtol=0, atol=1e-12)
    torch.testing.assert_close(longer[2][:, : words.shape[1]], words, rtol=0, atol=1e-12)
    assert (longer[2][:, words.shape[1] :] == 0).all()
    assert (words[make_pair().text.ids == 0] == 0).all()


def test_within_does_not_depend_on_the_other_samples():
    """The gradient of a report with words is that of the report alone, divided by the number of such reports."""
    together = gradients("sta", make_pair())
    for i in (0, 1, 2, 4):
        alone = make_pair()
        alone.image.local = alone.image.local[i : i + 1].detach().requires_grad_()
        alone.text = Features(
            alone.text.pooled,
            alone.text.local[i : i + 1].detach().requires_grad_(),
            alone.text.mask[i : i + 1],
            alone.text.ids[i : i + 1],
        )
        for all_, one in zip(together[1:], gradients("sta", alone)[1:], strict=True):
            torch.testing.assert_close(all_[i], one[0] / 4, rtol=0, atol=1e-12)


@pytest.mark.parametrize("negatives", ["within", "batch"])
def test_skipped_words_get_no_gradient(negatives):
    pair = make_pair()
    spec = {"name": "sta", "negatives": negatives, "skip_negated": True, "skip_stop_words": True}
    words = gradients(spec, pair)[2].abs().sum(2)
    skipped = (pair.text.ids < 0) | (pair.text.ids == THE)
    assert (words[skipped] == 0).all()
    assert (words[0, :3] > 0).all()


def test_report_that_denies_a_finding_stays_a_negative_for_it():
    spec = {"name": "sta", "negatives": "batch"}
    loss, patches, _ = gradients(spec, make_pair([[EDEMA], [-EDEMA]]))
    assert loss.item() > 0
    assert patches[1].abs().max() > 0
    loss, patches, _ = gradients(spec, make_pair([[EDEMA], [EDEMA]]))
    assert loss.item() == 0
    assert (patches == 0).all()


@pytest.mark.parametrize("negatives", ["within", "batch"])
def test_detached_weights_change_the_gradient_alone(negatives):
    spec = {"name": "sta", "negatives": negatives, "sigma": 0.3}
    whole, detached = (gradients({**spec, "detach_weights": x}, make_pair()) for x in (False, True))
    assert whole[0].item() == detached[0].item()
    assert (whole[1] - detached[1]).abs().max() > 1e-4


@pytest.mark.parametrize("negatives", ["within", "batch"])
def test_gradient_is_the_slope(negatives):
    spec = {"name": "sta", "negatives": negatives, "sigma": 0.3}
    loss, pair = LOSSES.build(spec), make_pair()
    for name, gradient in zip(("image", "text"), gradients(spec, pair)[1:], strict=True):
        side = getattr(pair, name)
        values, draw = side.local.detach(), torch.Generator().manual_seed(5)
        step = torch.randn(values.shape, generator=draw, dtype=torch.float64) * 1e-6
        ends = []
        for sign in (1, -1):
            side.local = values + sign * step
            ends.append(loss(pair)[0].item())
        side.local = values
        assert (ends[0] - ends[1]) / 2 == pytest.approx((gradient * step).sum().item(), rel=1e-4)


@pytest.mark.parametrize("negatives", ["within", "batch"])
def test_shuffled_gives_each_image_the_words_of_another_report(negatives):
    pair, rolled = make_pair(), make_pair()
    order = [4, 0, 1, 2, 3]
    rolled.text = Features(
        rolled.text.pooled, rolled.text.local[order], rolled.text.mask[order], rolled.text.ids[order]
    )
    ours = LOSSES.build({"name": "sta", "negatives": negatives, "shuffled": True})(pair)[0].item()
    assert ours == LOSSES.build({"name": "sta", "negatives": negatives})(rolled)[0].item()
    assert ours != pytest.approx(LOSSES.build({"name": "sta", "negatives": negatives})(pair)[0].item(), abs=1e-3)


@pytest.mark.parametrize("negatives", ["within", "batch"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_gradient_is_close(negatives, autocast):
    spec = {"name": "sta", "negatives": negatives}
    exact, half = make_pair(dtype=torch.float32, seed=2), make_pair(dtype=torch.bfloat16, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = LOSSES.build(spec)(half)[0]
    assert loss.dtype == torch.float32
    ours = torch.autograd.grad(loss, [half.image.local, half.text.local])
    for one, right in zip(ours, gradients(spec, exact)[1:], strict=True):
        assert (one.float() - right).abs().max() <= 2e-2 * right.norm()


@pytest.mark.parametrize("negatives", ["within", "batch"])
def test_learns_which_patch_a_word_speaks_of(negatives):
    """A few steps on words that stand in one patch each: the loss falls and the right patches win."""
    reports = [[HEART, LUNG], [EDEMA, LEFT], [word_id("rib"), word_id("hila")]]
    pair = make_pair(reports, torch.float32)
    loss = LOSSES.build({"name": "sta", "negatives": negatives})
    optimizer = torch.optim.SGD([pair.image.local, pair.text.local], lr=0.3)
    first = loss(pair)[0].item()
    for _ in range(40):
        optimizer.zero_grad()
        loss(pair)[0].backward()
        optimizer.step()
    last, logs = loss(pair)
    assert last.item() < 0.2 * first
    assert logs["token_accuracy"].item() == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sigma": 1.5}, 'from 0 to 1, or "1/N"'),
        ({"sigma": "1/P"}, 'from 0 to 1, or "1/N"'),
        ({"sparsity": "treshold"}, "did you mean threshold"),
        ({"direction": "both"}, "known: word_to_patch"),
        ({"negatives": "bach"}, "did you mean batch"),
        ({"temperature": 0}, "above 0"),
        ({"group": 0}, "at least 1"),
        ({"skip_negated": "yes"}, "true or false"),
        ({"similarity": "cosin"}, "did you mean cosine"),
        ({"reduction": "sum"}, "known: report, word"),
    ],
)
def test_wrong_arguments_are_one_line(options, says):
    with pytest.raises(SistaError, match=says) as error:
        LOSSES.build({"name": "sta", **options})
    assert "\n" not in str(error.value)


def test_words_without_ids():
    pair = make_pair()
    pair.text.ids = None
    separate = {"name": "sta", "repeated_words": "separate"}
    assert LOSSES.build(separate)(pair)[0].item() == LOSSES.build(separate)(make_pair())[0].item()
    with pytest.raises(SistaError, match="no word ids"):
        LOSSES.build("sta")(pair)
