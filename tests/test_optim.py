"""Parameter groups and schedule."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from sista_pl import optim
from sista_pl.errors import SistaError


def test_biases_norms_and_scalars_do_not_decay():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    model.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
    model[2].weight.requires_grad_(False)
    decay, rest = optim.parameter_groups(model, 0.1)
    assert [p.ndim for p in decay["params"]] == [4]
    assert decay["weight_decay"] == 0.1
    assert rest["weight_decay"] == 0
    assert len(rest["params"]) == 5


def test_warmup_then_cosine_to_zero():
    factors = [optim.warmup_cosine(step, 100, 10) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == pytest.approx(1.0)
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in pairwise(factors[10:]))


@pytest.mark.parametrize("change", [{"lr": 0}, {"weight_decay": -1}, {"warmup": 1.0}, {"total": float("inf")}])
def test_nonsense_is_refused(change):
    with pytest.raises(SistaError):
        optim.adamw(nn.Linear(2, 2), **({"lr": 1e-3, "weight_decay": 0.1, "warmup": 0.1, "total": 10} | change))
