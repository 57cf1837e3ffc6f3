"""`sia` and `medclip` against slow loops, and the properties that each has to keep.

B pairs, D joint dimension, Ds semantic dimension, K labels.
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

OFFSET, NAN = 0.2, float("nan")
# thresholds between which pairs of `make_pair` lie
TRIAGE = {"name": "sia", "mode": "triage", "positive_threshold": 0.9, "negative_threshold": 0.6}
GIVEN = {"name": "sia", "delta": 0.5, "tau": 0.3}
SIA = [*({**GIVEN, "mode": mode} for mode in ("soft", "mask", "multi_positive")), TRIAGE]
ONLINE = [{**spec, **GIVEN, "source": "online"} for spec in SIA]
LOSS = [*SIA, *ONLINE, {"name": "medclip"}]


def named(spec) -> str:
    return " ".join([spec["name"], spec.get("mode", ""), spec.get("source", "")]).strip()


def make_pair(
    size: int = 7, dtype: torch.dtype = torch.float64, seed: int = 0, equal: tuple[int, ...] = (1, 4)
) -> Pair:
    """Random embeddings; the reports in `equal` have the same semantics and labels, the last has no label."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    image, text, semantics = normal(size, 5), normal(size, 5), normal(size, 4).abs()
    labels = torch.tensor([1, 0, 0, NAN], dtype=dtype)[torch.randint(4, (size, 4), generator=draw)]
    labels[-1] = torch.tensor([0, NAN, 0, 0], dtype=dtype)
    for row in equal:
        semantics[row], labels[row] = semantics[equal[0]], labels[equal[0]]
    sample = normal(32, 64).clamp(-0.3, 1)
    return Pair(
        image=Features(image.requires_grad_(), torch.zeros(size, 1, 5)),
        text=Features(text.requires_grad_(), torch.zeros(size, 1, 5)),
        scale=torch.tensor(6.0, dtype=dtype, requires_grad=True),
        semantics=Semantics(F.normalize(semantics, dim=1), OFFSET, sample),
        labels=labels,
    )


def inputs(pair: Pair) -> list[Tensor]:
    return [pair.image.pooled, pair.text.pooled, pair.scale]


def loss_and_gradients(spec, pair: Pair) -> list[Tensor]:
    loss = LOSSES.build(spec)(pair)[0]
    return [loss.detach(), *torch.autograd.grad(loss, inputs(pair))]


def assert_equal(ours: list[Tensor], right: list[Tensor], atol: float = 1e-12) -> None:
    for one, other in zip(ours, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (sum(x * x for x in a) * sum(y * y for y in b)).sqrt()


def slow_similarity(r: Tensor, offset: float = 0.0) -> list[list[float]]:
    n = len(r)
    s = [[cosine(r[i], r[j]).item() for j in range(n)] for i in range(n)]
    return [[1.0 if i == j else (s[i][j] - offset) / (1 - offset) for j in range(n)] for i in range(n)]


def slow_contrast(pair: Pair, row_loss) -> tuple[Tensor, float]:
    """The mean of `row_loss(i, z_i)` over both directions, and the accuracy."""
    v, t, n = pair.image.pooled, pair.text.pooled, len(pair.image.pooled)
    total, hits = torch.zeros((), dtype=torch.float64), 0.0
    for i in range(n):
        for anchor, others in ((v[i], t), (t[i], v)):
            z = [pair.scale * cosine(anchor, other) for other in others]
            total = total + row_loss(i, z) / 2 / n
            hits += (max(range(n), key=lambda j, z=z: z[j].item()) == i) / 2 / n
    return total, hits


def slow_soft(y: list[float], z: list[Tensor], free: list[int]) -> Tensor:
    denominator = sum(z[j].exp() for j in free)
    return sum(-y[j] * (z[j].exp() / denominator).log() for j in range(len(z)) if y[j] > 0)


def slow_sia(pair: Pair, mode: str, alpha: float = 1.0, delta: float = 0.5, tau: float = 0.3) -> dict[str, float]:
    """The formulas, pair by pair."""
    raw, s = (slow_similarity(pair.semantics.vectors, offset) for offset in (0.0, OFFSET))
    n = len(s)
    if mode == "triage":
        positive = [[j for j in range(n) if j == i or raw[i][j] > 0.9] for i in range(n)]
        negative = [[j for j in range(n) if j != i and raw[i][j] <= 0.6] for i in range(n)]
    else:
        positive = [[j for j in range(n) if j == i or s[i][j] >= delta] for i in range(n)]
        negative = [[j for j in range(n) if j not in positive[i]] for i in range(n)]
    y = []
    for i in range(n):
        weights = [math.exp(x / tau) for x in s[i]]
        y.append({
            "soft": [alpha * w / sum(weights) + (1 - alpha) * (i == j) for j, w in enumerate(weights)],
            "mask": [float(i == j) for j in range(n)],
        }.get(mode, [(j in positive[i]) / len(positive[i]) for j in range(n)]))  # fmt: skip

    def row_loss(i: int, z: list[Tensor]) -> Tensor:
        if mode == "triage":
            others = sum((z[k].exp() for k in negative[i]), torch.zeros(()).double())
            return sum((z[j].exp() + others).log() - z[j] for j in positive[i]) / len(positive[i])
        return slow_soft(y[i], z, [i, *negative[i]] if mode == "mask" else list(range(n)))

    loss, hits = slow_contrast(pair, row_loss)
    found = {
        "loss": loss,
        "true_pair_mass": sum(y[i][i] for i in range(n)) / n,
        "false_negatives": sum(len(positive[i]) - 1 for i in range(n)) / n,
        "identical_reports": sum(any(s[i][j] >= 0.9999 for j in range(n) if j != i) for i in range(n)) / n,
        "accuracy": hits,
    }
    if mode == "triage":
        found["ignored"] = sum(n - len(positive[i]) - len(negative[i]) for i in range(n)) / n / (n - 1)
    return found


def slow_medclip(pair: Pair, tau: float = 0.1) -> dict[str, float]:
    labels = [[0.0 if math.isnan(x) else x for x in row] for row in pair.labels.tolist()]
    unit = torch.tensor([[*row, float(not any(row))] for row in labels], dtype=torch.float64)
    s, n = slow_similarity(unit), len(unit)
    y = [[math.exp(x / tau) / sum(math.exp(x / tau) for x in s[i]) for x in s[i]] for i in range(n)]
    loss, hits = slow_contrast(pair, lambda i, z: slow_soft(y[i], z, list(range(n))))
    same = [sum(labels[i] == labels[j] for j in range(n)) - 1 for i in range(n)]
    return {
        "loss": loss,
        "true_pair_mass": sum(y[i][i] for i in range(n)) / n,
        "false_negatives": sum(same) / n,
        "identical_reports": sum(map(bool, same)) / n,
        "no_finding": sum(not any(row) for row in labels) / n,
        "accuracy": hits,
    }


def assert_equals_loop(spec, pair: Pair, expected: dict[str, float]) -> None:
    loss = expected.pop("loss")
    logs = LOSSES.build(spec)(pair)[1]
    assert_equal(loss_and_gradients(spec, pair), [loss.detach(), *torch.autograd.grad(loss, inputs(pair))], 1e-10)
    assert expected.keys() <= logs.keys()
    for key, value in expected.items():
        assert logs[key].item() == pytest.approx(value, abs=1e-6), key


@pytest.mark.parametrize("spec", SIA, ids=named)
@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_sia_equals_slow_loop(spec, alpha):
    pair = make_pair()
    expected = slow_sia(pair, spec["mode"], alpha)
    assert expected["identical_reports"] == pytest.approx(2 / 7)
    assert expected["false_negatives"] >= (2 / 7 if spec is TRIAGE else 0.5)
    assert spec is not TRIAGE or 0.1 < expected["ignored"] < 0.9
    assert_equals_loop({**spec, "alpha": alpha}, pair, expected)


@pytest.mark.parametrize("tau", [0.1, 0.7])
def test_medclip_equals_slow_loop(tau):
    pair = make_pair()
    expected = slow_medclip(pair, tau)
    assert expected["no_finding"] > 0
    assert expected["false_negatives"] > 0
    assert_equals_loop({"name": "medclip", "tau": tau}, pair, expected)


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "sia", "mode": "soft", "alpha": 0.0},
        {"name": "sia", "mode": "mask", "delta": 1.01},
        {"name": "sia", "mode": "multi_positive", "delta": 1.01},
        {"name": "sia", "mode": "triage", "positive_threshold": 0.9999, "negative_threshold": 0.9999},
        {"name": "medclip", "tau": 0.01},
    ],
    ids=named,
)
def test_where_no_two_reports_are_alike_it_is_clip(spec):
    pair = make_pair(size=4, equal=())
    pair.labels = torch.eye(4)
    assert_equal(loss_and_gradients(spec, pair), loss_and_gradients("clip", pair))


def test_soft_goes_to_clip_with_alpha():
    pair = make_pair()
    clip = LOSSES.build("clip")(pair)[0]
    gaps = [(LOSSES.build({"name": "sia", "alpha": a})(pair)[0] - clip).abs().item() for a in (1.0, 0.1, 0.001)]
    assert gaps[0] > 0.1
    assert gaps[1] == pytest.approx(gaps[0] / 10, rel=1e-6)
    assert gaps[2] == pytest.approx(gaps[0] / 1000, rel=1e-6)


@pytest.mark.parametrize("name", ["multi_positive", "soft", "medclip"])
def test_equal_reports_share_mass_equally(name):
    pair = make_pair(size=6, equal=(0, 2, 3, 5), dtype=torch.float32)
    pair.semantics.vectors[[1, 4]] = torch.eye(4)[:2]
    pair.semantics.vectors[[0, 2, 3, 5]] = torch.eye(4)[2]
    # the four have no finding, in two ways of saying so
    pair.labels = torch.tensor([[0.0, NAN], [1.0, 0.0], [0.0, 0.0], [NAN, NAN], [0.0, 1.0], [0.0, 0.0]])
    spec = {"name": "sia", "mode": name, "delta": 0.9, "tau": 0.01}
    spec = {"name": "medclip", "tau": 0.01} if name == "medclip" else spec
    logs = LOSSES.build(spec)(pair)[1]
    assert logs["true_pair_mass"].item() == pytest.approx((4 * 0.25 + 2) / 6, abs=1e-6)
    assert logs["identical_reports"].item() == pytest.approx(4 / 6)
    # and the loss does not care which of the equal reports is the own one
    swapped = make_pair(size=6, equal=(0, 2, 3, 5), dtype=torch.float32)
    swapped.semantics, swapped.labels = pair.semantics, pair.labels
    swapped.text.pooled = pair.text.pooled[[2, 1, 0, 3, 4, 5]].detach().requires_grad_()
    assert LOSSES.build(spec)(swapped)[0].item() == pytest.approx(LOSSES.build(spec)(pair)[0].item(), abs=1e-5)


def test_equal_reports_are_positives_in_float32_whatever_the_offset():
    pair = make_pair(size=8, equal=(1, 4), dtype=torch.float32)
    pair.semantics.offset = 0.9
    for spec in SIA:
        assert LOSSES.build(spec)(pair)[1]["identical_reports"].item() == pytest.approx(2 / 8)


@pytest.mark.parametrize("offset", [0.0, 0.7])
def test_triage_is_on_similarity_as_it_is(offset):
    pair, other = make_pair(), make_pair()
    other.semantics = Semantics(pair.semantics.vectors, offset)  # and it needs no sample
    assert_equal(loss_and_gradients(TRIAGE, other), loss_and_gradients(TRIAGE, pair), 0)


def test_triage_ignores_what_lies_between():
    pair = make_pair(size=3, equal=())
    # 0 and 1 are no more alike than 0.28, 2 is to both of them 0.8
    pair.semantics.vectors = torch.tensor([[1.0, 0, 0, 0], [0.28, 0.96, 0, 0], [0.8, 0.6, 0, 0]], dtype=torch.float64)
    loss, image, text, _ = loss_and_gradients(TRIAGE, pair)
    assert loss > 0.01
    assert image[2].abs().max() == text[2].abs().max() == 0
    assert min(image[:2].abs().max(), text[:2].abs().max()) > 1e-3


@pytest.mark.parametrize("threshold", [-1.0, 0.999])
def test_triage_without_negatives_is_zero_with_zero_gradient(threshold):
    pair = make_pair(dtype=torch.float32)
    pair.semantics.vectors = torch.eye(4)[[0] * 7]
    spec = {**TRIAGE, "positive_threshold": threshold, "negative_threshold": -1.0}
    for value in loss_and_gradients(spec, pair):
        assert torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize("spec", LOSS, ids=named)
def test_gradient_stops_at_what_says_who_is_alike(spec):
    pair = make_pair()
    pair.semantics.vectors.requires_grad_()
    pair.labels = pair.labels.nan_to_num().requires_grad_()
    wanted = [pair.semantics.vectors, pair.labels, pair.image.pooled]
    gradients = torch.autograd.grad(LOSSES.build(spec)(pair)[0], wanted, allow_unused=True)
    assert gradients[0] is gradients[1] is None
    assert gradients[2].abs().max() > 0


@pytest.mark.parametrize("spec", LOSS, ids=named)
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_are_exact(spec, chunk):
    pair = make_pair(dtype=torch.float32)
    whole, chunked = LOSSES.build(spec), LOSSES.build({**spec, "chunk": chunk})
    assert_equal(loss_and_gradients({**spec, "chunk": chunk}, pair), loss_and_gradients(spec, pair), 2e-6)
    logs = chunked(pair)[1]
    for key, value in whole(pair)[1].items():
        assert logs[key].item() == pytest.approx(value.item(), abs=1e-6), key


@pytest.mark.parametrize("spec", LOSS, ids=named)
def test_one_pair_is_zero_with_finite_gradient(spec):
    loss, *gradients = loss_and_gradients(spec, make_pair(size=1, equal=(0,)))
    assert loss.item() == 0
    assert all(g.isfinite().all() and g.abs().max() < 1e-12 for g in gradients)


@pytest.mark.parametrize("spec", LOSS, ids=named)
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_gradient_is_close(spec, autocast):
    exact = make_pair(size=16, dtype=torch.float32, seed=3)
    half = make_pair(size=16, dtype=torch.bfloat16, seed=3)
    exact.text.pooled = half.text.pooled.detach().float().requires_grad_()  # the same reports, where they are `online`
    half.semantics = exact.semantics
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = LOSSES.build(spec)(half)[0]
    assert loss.dtype == torch.float32
    reference = torch.autograd.grad(LOSSES.build(spec)(exact)[0], inputs(exact)[:2])
    for ours, right in zip(torch.autograd.grad(loss, inputs(half)[:2]), reference, strict=True):
        assert (ours.float() - right).abs().max() <= 2e-2 * right.norm()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"name": "sia", "mode": "maks"}, "did you mean mask"),
        ({"name": "sia", "mode": "triag"}, "did you mean triage"),
        ({"name": "sia", "source": "onlin"}, "did you mean online"),
        ({"name": "sia", "alpha": 1.5}, "from 0 to 1"),
        ({"name": "sia", "alpha": "high"}, "from 0 to 1"),
        ({"name": "sia", "positives": 0}, "above 0"),
        ({"name": "sia", "tau": -0.1}, "above 0"),
        ({"name": "sia", "mode": "mask", "tau": -0.1}, "above 0"),
        ({"name": "sia", "delta": math.nan}, "above 0"),
        ({"name": "sia", "chunk": 0}, "at least 1"),
        ({"name": "sia", "positive_threshold": 1.01}, "from -1 to 1"),
        (
            {"name": "sia", "positive_threshold": 0.9},
            r"negative_threshold is 0.97.*from -1 to 0.9 \(positive_threshold",
        ),
        ({"name": "sia", "negative_threshold": "low"}, "from -1 to 0.98"),
        (
            {"name": "sia", "source": "online"},
            "no sample to solve delta and tau on; give both, as in `delta: 0.95, tau",
        ),
        ({"name": "sia", "source": "online", "delta": 0.9}, "to solve tau on; give it, as in `tau: 0.1`"),
        ({"name": "sia", "source": "online", "mode": "mask", "tau": 1}, "solve delta on; give it, as in `delta: 0.95`"),
        ({"name": "medclip", "tau": 0}, "above 0"),
        ({"name": "medclip", "chunk": -1}, "at least 1"),
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
    with pytest.raises(SistaError, match="delta on; give it"):
        LOSSES.build({"name": "sia", "mode": "mask"})(pair)
    pair.semantics = None
    for spec in SIA:
        with pytest.raises(SistaError, match="similarity: findings"):
            LOSSES.build(spec)(pair)


def test_missing_labels_name_the_next_step():
    pair = make_pair()
    pair.labels = None
    with pytest.raises(SistaError, match=r"the data bring no labels; set `labels: \[\.\.\.\]` in the data group"):
        LOSSES.build("medclip")(pair)
