"""`findings` against a slow loop, and the properties that it has to keep.

B pairs, D joint dimension, Ds semantic dimension.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sista_pl.data.findings import finding_vectors
from sista_pl.errors import SistaError
from sista_pl.losses import LOSSES
from sista_pl.pair import Features, Pair, Semantics

B, D, DS = 5, 6, 4


def make_pair(dtype: torch.dtype = torch.float64, seed: int = 0) -> Pair:
    draw = torch.Generator().manual_seed(seed)
    pooled = [torch.randn(B, D, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2)]
    stated = torch.rand(B, DS, generator=draw, dtype=torch.float64) * torch.tensor([[1.0, 0, 1, 1]]).double()
    image, text = (Features(x, x[:, None]) for x in pooled)
    return Pair(
        image, text, torch.tensor(1.0, requires_grad=True), Semantics(F.normalize(stated, dim=1).to(dtype), 0.1)
    )


def build(dtype: torch.dtype = torch.float64, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return LOSSES.build({"name": "findings", "prototypes": 7, "dim": D, **options}).to(dtype)


def inputs(pair: Pair, loss) -> list[Tensor]:
    return [pair.image.pooled, pair.text.pooled, loss.prototypes]


def slow(pair: Pair, prototypes: Tensor, sides: list[Tensor], tau: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for side in sides:
        for x, r in zip(side, pair.semantics.vectors, strict=True):
            scores = [torch.exp(x @ c / x.norm() / c.norm() / tau) for c in prototypes[:DS]]
            mass = sum(float(value) ** 2 for value in r)
            for score, value in zip(scores, r, strict=True):
                total = total - float(value) ** 2 / mass * torch.log(score / sum(scores)) / len(side) / len(sides)
    return total


@pytest.mark.parametrize("tau", [0.1, 0.7])
@pytest.mark.parametrize("sides", ["both", "image"])
def test_it_equals_a_slow_loop(sides, tau):
    pair, loss = make_pair(), build(sides=sides, temperature=tau)
    given = [pair.image.pooled, pair.text.pooled][: 2 if sides == "both" else 1]
    value, expected = loss(pair)[0], slow(pair, loss.prototypes, given, tau)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    wanted = [*given, loss.prototypes]
    for ours, right in zip(torch.autograd.grad(value, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-12)


def test_every_input_has_a_gradient_and_what_is_not_used_one_of_zeros():
    pair, loss = make_pair(), build(sides="image")
    _, text, prototypes, scale = torch.autograd.grad(loss(pair)[0], [*inputs(pair, loss), pair.scale])
    assert (text == 0).all()
    assert scale == 0
    assert (prototypes[DS:] == 0).all()
    assert (prototypes[:DS] != 0).any(1).all()


def test_of_more_coordinates_the_first_take_part():
    pair, loss = make_pair(), build(prototypes=3)
    short = make_pair()
    short.semantics = Semantics(pair.semantics.vectors[:, :3])
    torch.testing.assert_close(loss(pair)[0], loss(short)[0], rtol=0, atol=0)


def test_a_report_without_any_of_them_counts_nothing():
    pair, loss = make_pair(torch.float32), build(torch.float32)
    pair.semantics.vectors[1] = 0
    value = loss(pair)[0]
    assert value.isfinite()
    assert (torch.autograd.grad(value, pair.image.pooled)[0][1] == 0).all()


def test_reports_of_half_the_same_findings_are_drawn_half_as_near():
    """Three reports: a, b, and both; trained freely, the image of both lies between the other two."""
    r = torch.eye(3)[:, :2].clone()
    r[2] = 1
    pair = make_pair(torch.float32)
    free = torch.randn(3, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    pair.image = Features(free, free[:, None])
    pair.semantics = Semantics(F.normalize(r, dim=1))
    loss = build(torch.float32, sides="image")
    pair.text = Features(torch.zeros(3, D), torch.zeros(3, 1, D))
    optimizer = torch.optim.Adam([free, loss.prototypes], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss(pair)[0].backward()
        optimizer.step()
    cosine = F.normalize(free.detach(), dim=1) @ F.normalize(free.detach(), dim=1).T
    assert cosine[0, 2] > cosine[0, 1] + 0.2
    assert cosine[1, 2] > cosine[0, 1] + 0.2
    value, logs = loss(pair)
    assert value.item() == pytest.approx(math.log(2) / 3, abs=0.02), "two labels can't both have all the mass"
    assert logs["image_accuracy"] == 1


def test_accuracy_is_of_findings_that_the_report_has():
    pair, loss = make_pair(), build()
    with torch.no_grad():
        loss.prototypes.copy_(torch.eye(7, D))
        pair.semantics.vectors.copy_(torch.eye(DS)[[0, 1, 2, 3, 3]].double())
        pair.image.pooled.copy_(torch.eye(D)[[0, 1, 2, 3, 0]])
        pair.text.pooled.copy_(torch.eye(D)[[1, 1, 1, 1, 1]])
    logs = loss(pair)[1]
    assert logs["image_accuracy"].item() == pytest.approx(4 / 5)
    assert logs["text_accuracy"].item() == pytest.approx(1 / 5)


def test_a_model_that_only_says_no_finding_is_wrong_where_there_is_one():
    texts = ["Severe cardiomegaly.", "Clear lungs.", "Small left effusion and right lower lobe atelectasis."]
    vectors = torch.from_numpy(finding_vectors(texts)[0])
    pair, loss = make_pair(torch.float32), LOSSES.build({"name": "findings", "dim": D})
    pair.semantics = Semantics(vectors)
    normal = finding_vectors(["Clear lungs."])[0][0].argmax()
    for side in (pair.image, pair.text):
        side.pooled = loss.prototypes.detach()[normal].expand(3, D).clone()
    assert loss(pair)[1]["image_accuracy"].item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_gradient_is_close(autocast):
    exact, half, loss = make_pair(torch.float32), make_pair(torch.bfloat16), build(torch.float32)
    half.semantics = exact.semantics
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = loss(half)[0]
    assert value.dtype == torch.float32
    found = torch.autograd.grad(value, inputs(half, loss))
    for ours, right in zip(found, torch.autograd.grad(loss(exact)[0], inputs(exact, loss)), strict=True):
        assert (ours.float() - right).abs().max() <= 2e-2 * right.norm()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"temperature": 0}, "above 0"),
        ({"sides": "text"}, "sides is 'text'"),
        ({"prototypes": 1}, "at least 2"),
    ],
)
def test_arguments_out_of_their_range(spec, says):
    with pytest.raises(SistaError, match=says):
        build(**spec)


def test_what_the_data_must_bring():
    pair = make_pair()
    pair.semantics = None
    with pytest.raises(SistaError, match="the data bring no report similarity"):
        build()(pair)
    short = make_pair()
    short.image.pooled = short.image.pooled[:, :5]
    with pytest.raises(SistaError, match="dim is 6, the embeddings have 5"):
        build()(short)
    signed = make_pair()
    signed.semantics.vectors[0, 0] = -0.1
    with pytest.raises(SistaError, match="negative coordinates"):
        build()(signed)
