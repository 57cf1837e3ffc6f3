"""`sta` against slow loops, and the properties that it has to keep.

B pairs, P patches, L words, D joint dimension.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sista_pl.errors import SistaError
from sista_pl.losses import LOSSES
from sista_pl.losses.sparsity import weighting
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
WAYS = {
    "within": {"negatives": "within"},
    "batch": {"negatives": "batch"},
    "patches": {"direction": "patch_to_word"},
    "both": {"direction": "both"},
}
SPARSITIES: dict[str, dict] = {
    "threshold": {},
    "topk": {"sparsity": "topk", "top": 3},
    "sparsemax": {"sparsity": "sparsemax", "sparsity_temperature": 2.0},
    "softmax": {"sparsity": "softmax", "sparsity_temperature": 2.0},
}


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


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / ((a @ a) * (b @ b)).sqrt()


def slow_group(anchor: Tensor, tokens: list[Tensor], sigma=0.5, similarity="inner", **sparse) -> Tensor:
    """The tokens of the other side that one anchor looks at, weighted; sparsities have their own slow loops."""
    s = [anchor @ token if similarity == "inner" else cosine(anchor, token) for token in tokens]
    if sparse:
        weights = weighting("sta", **sparse)(torch.stack(s), None)
        return sum(a * token for a, token in zip(weights, tokens, strict=True))
    unit = [(x - min(s)) / (max(s) - min(s)) if max(s) > min(s) else torch.ones_like(x) for x in s]
    kept = [x if x >= sigma * max(unit) else x * 0 for x in unit]
    return sum(k / sum(kept) * token for k, token in zip(kept, tokens, strict=True))


def cross_entropy(logits: list[Tensor], targets: list[float]) -> Tensor:
    total = sum(z.exp() for z in logits)
    return -sum(y * (z.exp() / total).log() for z, y in zip(logits, targets, strict=True) if y)


def chosen(pair: Pair, skip: bool) -> list[list[tuple[int, Tensor]]]:
    stop = {THE}
    return [
        [
            (word, vector)
            for word, vector in zip(ids, vectors, strict=True)
            if word and not (skip and (word < 0 or word in stop))
        ]
        for ids, vectors in zip(pair.text.ids.tolist(), pair.text.local, strict=True)
    ]


def merged(words: list[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
    vectors: dict[int, list[Tensor]] = {}
    for name, vector in words:
        vectors.setdefault(name, []).append(vector)
    return [(name, sum(same) / len(same)) for name, same in vectors.items()]


def mean_loss(losses: list[list[Tensor]], reduction: str) -> Tensor:
    if reduction == "word":
        flat = [loss for report in losses for loss in report]
        return sum(flat) / len(flat)
    means = [sum(report) / len(report) for report in losses if report]
    return sum(means) / len(means)


def slow_within(pair, repeated_words="merge", skip=False, reduction="report", **group) -> Tensor:
    losses = []
    for words, patches in zip(chosen(pair, skip), pair.image.local, strict=True):
        grouped = [slow_group(w, list(patches), **group) for _, w in words]
        losses.append([])
        for i, (name, vector) in enumerate(words):
            same = [other == name if repeated_words == "merge" else j == i for j, (other, _) in enumerate(words)]
            target = [x / sum(same) for x in same]
            to_vision = [cosine(vector, c) / 0.1 for c in grouped]
            to_words = [cosine(other, grouped[i]) / 0.1 for _, other in words]
            losses[-1].append((cross_entropy(to_vision, target) + cross_entropy(to_words, target)) / 2)
    return mean_loss(losses, reduction)


def slow_batch(pair, repeated_words="merge", skip=True, reduction="report", context="own", size=32, **group) -> Tensor:
    images, losses = pair.image.local, []
    reports = [merged(words) if repeated_words == "merge" else words for words in chosen(pair, skip)]
    for i, words in enumerate(reports):
        members = range(i - i % size, min(i - i % size + size, len(images)))
        losses.append([])
        for name, vector in words:
            if context == "others":
                same = [v for j in members if j != i for other, v in reports[j] if other == name]
                if not same:
                    continue
                vector = sum(same) / len(same)
            open_images = [j for j in members if j == i or name not in pair.text.ids[j].tolist()]
            logits = [cosine(vector, slow_group(vector, list(images[j]), **group)) / 0.1 for j in open_images]
            losses[-1].append(cross_entropy(logits, [float(j == i) for j in open_images]))
    return mean_loss(losses, reduction)


def slow_patches(pair, repeated_words="merge", skip=False, reduction="report", sigma=0.5, **group) -> Tensor:
    losses = []
    for words, patches in zip(chosen(pair, skip), pair.image.local, strict=True):
        vectors = [vector for _, vector in (merged(words) if repeated_words == "merge" else words)]
        losses.append([])
        if not vectors:
            continue
        share = 1 / len(vectors) if sigma == "1/N" else sigma
        grouped = [slow_group(v, vectors, share, **group) for v in patches]
        for p, patch in enumerate(patches):
            target = [float(q == p) for q in range(len(patches))]
            to_language = [cosine(patch, c) / 0.1 for c in grouped]
            to_patches = [cosine(other, grouped[p]) / 0.1 for other in patches]
            losses[-1].append((cross_entropy(to_language, target) + cross_entropy(to_patches, target)) / 2)
    return mean_loss(losses, reduction)


SLOW = {"within": slow_within, "batch": slow_batch, "patches": slow_patches}
OPTIONS = [
    {},
    {"sigma": 0.0},
    {"sigma": 0.9},
    {"similarity": "cosine"},
    {"repeated_words": "separate"},
    {"reduction": "word"},
    *({**SPARSITIES[name], "similarity": s} for name in ("topk", "sparsemax", "softmax") for s in ("inner", "cosine")),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("way", SLOW)
def test_equals_slow_loop(options, skip, way):
    """Loss and gradient."""
    pair = make_pair()
    spec = {"name": "sta", "skip_negated": skip, "skip_stop_words": skip, **WAYS[way], **options}
    slow = SLOW[way](pair, skip=skip, **options)
    right = slow.detach(), *torch.autograd.grad(slow, [pair.image.local, pair.text.local])
    for ours, one in zip(gradients(spec, pair), right, strict=True):
        torch.testing.assert_close(ours, one, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"similarity": "cosine"}, {"reduction": "word"}, SPARSITIES["topk"]])
@pytest.mark.parametrize("group", [3, 32])
@pytest.mark.parametrize("skip", [False, True])
def test_words_of_the_other_reports_equal_slow_loop(options, group, skip):
    """Loss and gradient where a word stands for what the other reports mean by it."""
    pair = make_pair()
    spec = {"name": "sta", "negatives": "batch", "context": "others", "group": group, **options}
    spec |= {"skip_negated": skip, "skip_stop_words": skip}
    slow = slow_batch(pair, skip=skip, context="others", size=group, **options)
    right = slow.detach(), *torch.autograd.grad(slow, [pair.image.local, pair.text.local])
    for ours, one in zip(gradients(spec, pair), right, strict=True):
        torch.testing.assert_close(ours, one, rtol=0, atol=1e-10)


def test_a_word_of_one_report_alone_has_no_loss_where_the_others_speak_for_it():
    pair = make_pair([[HEART, LUNG], [EDEMA], [LUNG, LEFT]])
    loss, logs = LOSSES.build({"name": "sta", "negatives": "batch", "context": "others"})(pair)
    assert logs["words"].item() == pytest.approx(2 / 3)
    gradient = torch.autograd.grad(loss, pair.text.local)[0].abs().sum(2)
    assert (gradient > 0).tolist() == [[False, True], [False, False], [True, False]]
    alone = make_pair([[HEART, LUNG], [EDEMA]])
    assert LOSSES.build({"name": "sta", "negatives": "batch", "context": "others"})(alone)[0].item() == 0


@pytest.mark.parametrize("group", [1, 2, 3])
def test_groups_equal_slow_loop(group):
    pair = make_pair()
    loss = LOSSES.build({"name": "sta", "negatives": "batch", "group": group})(pair)[0]
    assert loss.item() == pytest.approx(slow_batch(pair, size=group).item(), abs=1e-10)
    assert (loss.item() == 0) == (group == 1)


def test_one_over_n_is_the_number_to_choose_from():
    """Patches of a word; words of a patch, each once or, `separate`, as often as it is said."""
    pair = make_pair()
    loss = LOSSES.build({"name": "sta", "sigma": "1/N"})(pair)[0]
    assert loss.item() == pytest.approx(slow_within(pair, sigma=1 / 7).item(), abs=1e-10)
    for repeated_words in ("merge", "separate"):
        options = {"sigma": "1/N", "repeated_words": repeated_words}
        loss = LOSSES.build({"name": "sta", "direction": "patch_to_word", **options})(pair)[0]
        assert loss.item() == pytest.approx(slow_patches(pair, **options).item(), abs=1e-10)


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


def test_higher_sigma_keeps_fewer_patches():
    pair = make_pair()
    kept = [LOSSES.build({"name": "sta", "sigma": x})(pair)[1]["kept_patches"].item() for x in (0.0, 0.5, 0.8, 1.0)]
    assert kept[0] == pytest.approx(6 / 7)
    assert kept[3] == pytest.approx(1 / 7)
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 4


@pytest.mark.parametrize("sigma", [0.0, 1.0, "1/N"])
def test_kept_words(sigma):
    """Of the distinct words of a report: 4, 4, 1 and 4; all but one, one, or those that a threshold of 1/N leaves."""
    pair = make_pair()
    logs = LOSSES.build({"name": "sta", "direction": "patch_to_word", "sigma": sigma})(pair)[1]
    if sigma == "1/N":
        assert (3 / 4 + 1) / 4 < logs["kept_words"].item() < (3 * 3 / 4 + 1) / 4
    else:
        share = 3 / 4 if sigma == 0 else 1 / 4
        assert logs["kept_words"].item() == pytest.approx((3 * share + 1) / 4)


@pytest.mark.parametrize("way", WAYS)
def test_each_direction_logs_its_own(way):
    logs = LOSSES.build({"name": "sta", **WAYS[way]})(make_pair())[1]
    of_words = {"kept_patches", "token_accuracy"} if way != "patches" else set()
    of_patches = {"kept_words", "patch_accuracy"} if way in ("patches", "both") else set()
    assert set(logs) == {"words"} | of_words | of_patches
    assert not any(value.requires_grad for value in logs.values())
    assert logs["words"].item() == pytest.approx((9 if way == "batch" else 16) / 5)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_both_is_the_mean_of_the_two(sparsity):
    specs = [
        {"name": "sta", "direction": d, **SPARSITIES[sparsity]} for d in ("both", "word_to_patch", "patch_to_word")
    ]
    for both, one, other in zip(*(gradients(spec, make_pair()) for spec in specs), strict=True):
        torch.testing.assert_close(both, (one + other) / 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_word_said_twice_has_no_double_weight(sparsity):
    """Among the words of a patch; `separate` counts it as often as it is said."""
    once = make_pair([[HEART, LUNG, EDEMA, LEFT]])
    twice = make_pair([[HEART, LUNG, EDEMA, LEFT, HEART, HEART]])
    twice.image.local = once.image.local
    twice.text.local = once.text.local[:, [0, 1, 2, 3, 0, 0]]
    spec = {"name": "sta", "direction": "patch_to_word", **SPARSITIES[sparsity]}
    right = LOSSES.build(spec)(once)[0].item()
    assert LOSSES.build(spec)(twice)[0].item() == pytest.approx(right, abs=1e-10)
    separate = LOSSES.build({**spec, "repeated_words": "separate"})
    assert separate(once)[0].item() == pytest.approx(right, abs=1e-10)
    assert separate(twice)[0].item() != pytest.approx(right, abs=1e-3)


def test_one_patch_has_nothing_to_win_against():
    pair = make_pair()
    pair = replace_patches(pair, pair.image.local[:, :1])
    assert LOSSES.build({"name": "sta", "direction": "patch_to_word"})(pair)[0].item() == pytest.approx(0, abs=1e-12)


def test_usual_temperature_follows_the_similarity():
    for similarity, usual in (("inner", 10.0), ("cosine", 0.1)):
        for sparsity in ("sparsemax", "softmax"):
            spec = {"name": "sta", "sparsity": sparsity, "similarity": similarity}
            ours, given = (gradients(x, make_pair()) for x in (spec, {**spec, "sparsity_temperature": usual}))
            assert all(torch.equal(a, b) for a, b in zip(ours, given, strict=True))


DEGENERATE = {
    "sigma 1": ({"sigma": 1.0}, lambda pair: pair),
    "constant similarities": ({}, lambda pair: replace_patches(pair, pair.image.local[:, :1].expand(-1, 7, -1))),
    "zero patches": ({}, lambda pair: replace_patches(pair, torch.zeros_like(pair.image.local))),
    "zero words": ({}, lambda pair: replace_words(pair, torch.zeros_like(pair.text.local))),
    "one-word reports": ({}, lambda _: make_pair([[HEART], [LUNG], [EDEMA]], torch.float32)),
    "no word that batch takes": ({}, lambda _: make_pair([[], [THE, -EDEMA], []], torch.float32)),
    "no word at all": ({}, lambda _: make_pair([[], []], torch.float32, pad=3)),
    "one pair": ({}, lambda _: make_pair([[HEART, LUNG]], torch.float32)),
    "the same words everywhere": ({}, lambda _: make_pair([[HEART, HEART], [HEART]], torch.float32)),
}


def replace_patches(pair: Pair, patches: Tensor) -> Pair:
    pair.image.local = patches.detach().clone().requires_grad_()
    return pair


def replace_words(pair: Pair, words: Tensor) -> Pair:
    pair.text.local = words.detach().clone().requires_grad_()
    return pair


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_batches_are_finite(case, sparsity, way):
    options, change = DEGENERATE[case]
    pair = change(make_pair(dtype=torch.float32))
    options = options if sparsity == "threshold" else SPARSITIES[sparsity]
    loss, logs = LOSSES.build({"name": "sta", **WAYS[way], **options})(pair)
    assert loss.isfinite()
    assert all(value.isfinite() for value in logs.values())
    for gradient in torch.autograd.grad(loss, [pair.image.local, pair.text.local]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("negatives", ["within", "batch"])
def test_nothing_to_contrast_is_zero(negatives):
    pair = make_pair([[HEART], [HEART]])
    assert LOSSES.build({"name": "sta", "negatives": negatives})(pair)[0].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("shuffled", [False, True])
def test_padding_does_not_matter(way, sparsity, shuffled):
    spec = {"name": "sta", "shuffled": shuffled, **WAYS[way], **SPARSITIES[sparsity]}
    loss, patches, words = gradients(spec, make_pair())
    longer = gradients(spec, make_pair(pad=5))
    torch.testing.assert_close(longer[0], loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(longer[1], patches, rtol=0, atol=1e-12)
    torch.testing.assert_close(longer[2][:, : words.shape[1]], words, rtol=0, atol=1e-12)
    assert (longer[2][:, words.shape[1] :] == 0).all()
    assert (words[make_pair().text.ids == 0] == 0).all()


@pytest.mark.parametrize("way", ["within", "patches", "both"])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_within_does_not_depend_on_the_other_samples(way, sparsity):
    """The gradient of a report with words is that of the report alone, divided by the number of such reports."""
    spec = {"name": "sta", **WAYS[way], **SPARSITIES[sparsity]}
    together = gradients(spec, make_pair())
    for i in (0, 1, 2, 4):
        alone = make_pair()
        alone.image.local = alone.image.local[i : i + 1].detach().requires_grad_()
        alone.text = Features(
            alone.text.pooled,
            alone.text.local[i : i + 1].detach().requires_grad_(),
            alone.text.mask[i : i + 1],
            alone.text.ids[i : i + 1],
        )
        for all_, one in zip(together[1:], gradients(spec, alone)[1:], strict=True):
            torch.testing.assert_close(all_[i], one[0] / 4, rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_skipped_words_get_no_gradient(way):
    pair = make_pair()
    spec = {"name": "sta", "skip_negated": True, "skip_stop_words": True, **WAYS[way]}
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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_detached_weights_change_the_gradient_alone(way, sparsity):
    spec = {"name": "sta", **WAYS[way], **(SPARSITIES[sparsity] or {"sigma": 0.3})}
    whole, detached = (gradients({**spec, "detach_weights": x}, make_pair()) for x in (False, True))
    assert whole[0].item() == detached[0].item()
    assert (whole[1] - detached[1]).abs().max() > 1e-4


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_gradient_is_the_slope(way, sparsity):
    spec = {"name": "sta", **WAYS[way], **(SPARSITIES[sparsity] or {"sigma": 0.3})}
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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_shuffled_gives_each_image_the_words_of_another_report(way, sparsity):
    spec = {"name": "sta", **WAYS[way], **SPARSITIES[sparsity]}
    pair, rolled = make_pair(), make_pair()
    order = [4, 0, 1, 2, 3]
    rolled.text = Features(
        rolled.text.pooled, rolled.text.local[order], rolled.text.mask[order], rolled.text.ids[order]
    )
    ours = LOSSES.build({**spec, "shuffled": True})(pair)[0].item()
    assert ours == LOSSES.build(spec)(rolled)[0].item()
    assert ours != pytest.approx(LOSSES.build(spec)(pair)[0].item(), abs=1e-3)


@pytest.mark.parametrize("way", ["within", "batch"])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_bf16_gradient_is_close(way, sparsity):
    spec = {"name": "sta", **WAYS[way], **SPARSITIES[sparsity]}
    exact, half = make_pair(dtype=torch.float32, seed=2), make_pair(dtype=torch.bfloat16, seed=2)
    for one, right in zip(gradients(spec, half)[1:], gradients(spec, exact)[1:], strict=True):
        assert (one.float() - right).abs().max() <= 2e-2 * right.norm()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_float32_inside(way, sparsity, autocast):
    """Against the same rounded tokens in float32: rounding itself may tip over which word a patch likes least."""
    spec = {"name": "sta", **WAYS[way], **SPARSITIES[sparsity]}
    half, rounded = make_pair(dtype=torch.bfloat16), make_pair(dtype=torch.bfloat16)
    rounded = replace_patches(replace_words(rounded, rounded.text.local.float()), rounded.image.local.float())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = LOSSES.build(spec)(half)[0]
    assert loss.dtype == torch.float32
    ours, right = torch.autograd.grad(loss, [half.image.local, half.text.local]), gradients(spec, rounded)
    assert loss.item() == right[0].item()
    for one, other in zip(ours, right[1:], strict=True):
        assert (one.float() - other).abs().max() <= 5e-3 * other.norm()


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


def test_learns_which_words_a_patch_shows():
    """Words mixed in each patch in shares of its own: the loss falls and the right patches win."""
    words = [word_id(word) for word in ("heart", "lung", "edema", "rib", "hila", "clavicle")]
    pair = make_pair([words, words[::-1]], torch.float32)
    loss = LOSSES.build({"name": "sta", "direction": "patch_to_word", "sparsity": "softmax"})
    optimizer = torch.optim.SGD([pair.image.local, pair.text.local], lr=1.0)
    first = loss(pair)[0].item()
    for _ in range(100):
        optimizer.zero_grad()
        loss(pair)[0].backward()
        optimizer.step()
    last, logs = loss(pair)
    assert last.item() < 0.2 * first
    assert logs["patch_accuracy"].item() == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sigma": 1.5}, 'from 0 to 1, or "1/N"'),
        ({"sigma": "1/P"}, 'from 0 to 1, or "1/N"'),
        ({"sparsity": "treshold"}, "did you mean threshold"),
        ({"direction": "patch_to_words"}, "did you mean patch_to_word"),
        ({"direction": "patch_to_word", "negatives": "batch"}, "use `negatives: within`"),
        ({"direction": "both", "negatives": "batch"}, "use `negatives: within`"),
        ({"sparsity": "topk", "top": 0}, "at least 1"),
        ({"sparsity": "topk", "top": 2.5}, "at least 1"),
        ({"sparsity": "sparsemax", "sparsity_temperature": 0}, "above 0"),
        ({"sparsity": "softmax", "sparsity_temperature": "low"}, "above 0"),
        ({"top": 8}, "`sparsity: threshold` has none; leave it out, or give sigma"),
        ({"sparsity_temperature": 1.0}, "`sparsity: threshold` has none"),
        ({"sparsity": "topk", "sigma": 0.5}, "sigma is 0.5, but `sparsity: topk` has none; leave it out, or give top"),
        ({"sparsity": "sparsemax", "top": 8}, "has none; leave it out, or give sparsity_temperature"),
        ({"sparsity": "softmax", "sigma": "1/N"}, "has none; leave it out, or give sparsity_temperature"),
        ({"negatives": "bach"}, "did you mean batch"),
        ({"temperature": 0}, "above 0"),
        ({"group": 0}, "at least 1"),
        ({"skip_negated": "yes"}, "true or false"),
        ({"similarity": "cosin"}, "did you mean cosine"),
        ({"reduction": "sum"}, "known: report, word"),
        ({"negatives": "batch", "context": "other"}, "did you mean others"),
        ({"context": "others"}, "it goes with `negatives: batch, repeated_words: merge`"),
    ],
)
def test_wrong_arguments_are_one_line(options, says):
    with pytest.raises(SistaError, match=says) as error:
        LOSSES.build({"name": "sta", **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("way", ["within", "patches", "both"])
def test_words_without_ids(way):
    pair = make_pair()
    pair.text.ids = None
    separate = {"name": "sta", "repeated_words": "separate", **WAYS[way]}
    assert LOSSES.build(separate)(pair)[0].item() == LOSSES.build(separate)(make_pair())[0].item()
    with pytest.raises(SistaError, match="no word ids"):
        LOSSES.build({"name": "sta", **WAYS[way]})(pair)
