"""Losses of labels against loops; what is unknown counts nowhere."""

import math

import pytest
import torch

from sista_pl.losses import LOSSES

NAN = float("nan")


def slow_bce(logits, labels):
    each = []
    for row, known in zip(logits.tolist(), labels.tolist(), strict=True):
        for x, y in zip(row, known, strict=True):
            if not math.isnan(y):
                p = 1 / (1 + math.exp(-x))
                each.append(-math.log(p if y == 1 else 1 - p))
    return sum(each) / max(1, len(each))


def slow_cross_entropy(logits, labels):
    each = []
    for row, known in zip(logits.tolist(), labels.tolist(), strict=True):
        if not any(math.isnan(y) for y in known):
            each.append(math.log(sum(math.exp(x) for x in row)) - row[known.index(1)])
    return sum(each) / max(1, len(each))


SLOW = {"bce": slow_bce, "cross_entropy": slow_cross_entropy}


def draws(name):
    """Logits (8, 4) and labels with unknown ones: single for `bce`, whole rows for `cross_entropy`."""
    draw = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(8, 4, generator=draw)
    if name == "bce":
        labels = torch.randint(0, 2, (8, 4), generator=draw).float()
        labels[torch.rand(8, 4, generator=draw) < 0.3] = NAN
        labels[1] = NAN
    else:
        labels = torch.eye(4)[torch.randint(0, 4, (8,), generator=draw)]
        labels[::3] = NAN
    return logits, labels


@pytest.mark.parametrize("name", SLOW)
def test_equal_the_loop(name):
    logits, labels = draws(name)
    assert labels.isnan().any()
    assert LOSSES.build(name)(logits, labels)[0].item() == pytest.approx(SLOW[name](logits, labels), rel=1e-5)


@pytest.mark.parametrize("name", SLOW)
def test_the_unknown_has_no_gradient(name):
    logits, labels = draws(name)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(LOSSES.build(name)(logits, labels)[0], logits)
    unknown = labels.isnan()
    assert (gradient[unknown] == 0).all()
    assert (gradient[~unknown] != 0).all()


@pytest.mark.parametrize("name", SLOW)
def test_nothing_known_is_zero(name):
    logits = torch.randn(3, 4, requires_grad=True)
    loss = LOSSES.build(name)(logits, torch.full((3, 4), NAN))[0]
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, logits)[0] == 0).all()


@pytest.mark.parametrize("name", SLOW)
def test_far_off_and_half_precision_logits_stay_finite(name):
    logits, labels = draws(name)
    for far in (1e4 * logits, logits.to(torch.bfloat16)):
        loss = LOSSES.build(name)(far, labels)[0]
        assert loss.dtype == torch.float32
        assert loss.isfinite()
