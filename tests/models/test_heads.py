"""Projection heads: padding stays out of the statistics."""

import pytest
import torch

from sista_pl.errors import SistaError
from sista_pl.models import MaskedBatchNorm, ProjectionHead
from sista_pl.pair import Features


def test_without_padding_it_is_batch_norm():
    torch.manual_seed(0)
    ours, torchs = MaskedBatchNorm(5), torch.nn.BatchNorm1d(5)
    for _ in range(3):
        x = torch.randn(7, 5) * 3 + 1
        assert torch.allclose(ours(x), torchs(x), atol=1e-5)
    ours.eval(), torchs.eval()
    assert torch.allclose(ours(x), torchs(x), atol=1e-5)
    assert torch.allclose(ours.running_var, torchs.running_var, atol=1e-6)


def test_padding_changes_nothing():
    torch.manual_seed(0)
    x, mask = torch.randn(3, 4, 5), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    torchs = torch.nn.BatchNorm1d(5)
    ours = MaskedBatchNorm(5)
    y = ours(torch.where(mask[..., None], x, 1e4), mask)
    assert torch.allclose(y[mask], torchs(x[mask]), atol=1e-5)
    assert (y[~mask] == 0).all()


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_head_is_independent_of_padding_length(norm):
    torch.manual_seed(0)
    head = ProjectionHead(6, 5, out=4, hidden=8, norm=norm)
    local, mask = torch.randn(3, 4, 5), torch.ones(3, 4, dtype=torch.bool)
    short = head(Features(torch.randn(3, 6), local, mask)).local
    longer = torch.cat([local, torch.full((3, 2, 5), 9.0)], 1)
    padded = head(Features(torch.randn(3, 6), longer, torch.cat([mask, torch.zeros(3, 2).bool()], 1))).local
    assert torch.allclose(short, padded[:, :4], atol=1e-5)


def test_padding_costs_nothing_and_comes_out_as_zeros():
    """Against the projection of all rows, with padding outside the statistics."""
    torch.manual_seed(0)
    head = ProjectionHead(6, 5, out=4, hidden=8).local
    x, mask = torch.randn(3, 4, 5, requires_grad=True), torch.rand(3, 4) < 0.6
    sizes = []
    hook = head.inner.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    found = head(x, mask)
    hook.remove()
    assert sizes == [int(mask.sum())]
    assert (found[~mask] == 0).all()
    expected = head._project(x, mask)
    assert torch.allclose(found, expected, atol=1e-5)
    wanted = [x, *head.parameters()]
    weights = torch.randn_like(found)
    for one, two in zip(*(torch.autograd.grad((y * weights).sum(), wanted) for y in (found, expected)), strict=True):
        assert torch.allclose(one, two, atol=1e-4)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_a_graph_gives_what_it_gives_without_one(norm, monkeypatch):
    """Where a number of rows must not depend on the data, all rows are computed; padding is zero all the same."""
    torch.manual_seed(0)
    head = ProjectionHead(6, 5, out=4, hidden=8, norm=norm).eval().local
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    x, mask = torch.randn(3, 4, 5), torch.rand(3, 4) < 0.6
    expected = head(x, mask)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = head(x, mask)
    assert (found[~mask] == 0).all()
    torch.testing.assert_close(found, expected)


def test_unknown_norm():
    with pytest.raises(SistaError, match="head_norm is 'group'"):
        ProjectionHead(4, 4, norm="group")
