"""Weights against slow loops over each row, and what all sparsities keep.

N places.
"""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from sista_pl.losses.sparsity import weighting

CASES = {
    "threshold 0.5": {"sparsity": "threshold"},
    "threshold 0": {"sparsity": "threshold", "sigma": 0},
    "threshold 0.9": {"sparsity": "threshold", "sigma": 0.9},
    "threshold 1": {"sparsity": "threshold", "sigma": 1.0},
    "threshold 1/N": {"sparsity": "threshold", "sigma": "1/N"},
    "topk 1": {"sparsity": "topk", "top": 1},
    "topk 3": {"sparsity": "topk", "top": 3},
    "topk 8": {"sparsity": "topk"},
    "sparsemax": {"sparsity": "sparsemax"},
    "sparsemax 0.3": {"sparsity": "sparsemax", "sparsity_temperature": 0.3},
    "softmax": {"sparsity": "softmax"},
    "softmax 0.3": {"sparsity": "softmax", "sparsity_temperature": 0.3},
}


def weights(case: str, similarity: Tensor, valid: Tensor | None = None) -> Tensor:
    return weighting("sta", **CASES[case])(similarity, valid)


def make_rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Random similarities, and which are valid: at least one a row, in the first row no more."""
    draw = torch.Generator().manual_seed(seed)
    similarity = torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)
    valid = torch.rand(*shape, generator=draw) < 0.6
    valid.view(-1, shape[-1])[0] = False
    valid[..., 2] = True
    return similarity.requires_grad_(), valid


def slow_row(s: list[Tensor], sparsity: str, sigma=0.5, top=8, sparsity_temperature=1.0) -> list[Tensor]:
    """The weights of the valid places of one row, from scalars."""
    if sparsity in ("threshold", "topk"):
        sigma = 1 / len(s) if sigma == "1/N" else sigma
        low, high = min(s), max(s)
        unit = [(x - low) / (high - low) if high > low else torch.ones_like(x) for x in s]
        order = sorted(range(len(s)), key=lambda i: (-s[i].item(), i))
        if sparsity == "topk":
            kept = [u if i in order[:top] else u * 0 for i, u in enumerate(unit)]
        else:
            kept = [u if u >= sigma else u * 0 for u in unit]
        return [k / sum(kept) for k in kept]
    z = [x / sparsity_temperature for x in s]
    if sparsity == "softmax":
        return [x.exp() / sum(y.exp() for y in z) for x in z]
    # the nearest point of the simplex, of those on each of its faces
    nearest, found = float("inf"), []
    for size in range(1, len(z) + 1):
        for face in combinations(range(len(z)), size):
            shift = (sum(z[i] for i in face) - 1) / size
            point = [x - shift if i in face else x * 0 for i, x in enumerate(z)]
            distance = sum((p - x).item() ** 2 for p, x in zip(point, z, strict=True))
            if min(point) >= 0 and distance < nearest:
                nearest, found = distance, point
    return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_slow_loop(case, masked):
    """Weights and gradient, row by row; what is not valid has neither."""
    similarity, valid = make_rows(2, 3, 6)
    factors = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slow = torch.zeros(())
    ours = weights(case, similarity, valid if masked else None)
    for i in range(2):
        for j in range(3):
            places = [n for n in range(6) if not masked or valid[i, j, n]]
            row = slow_row([similarity[i, j, n] for n in places], **CASES[case])
            for n in range(6):
                right = row[places.index(n)] if n in places else torch.zeros(())
                assert ours[i, j, n].item() == pytest.approx(right.item(), abs=1e-12)
                slow = slow + factors[i, j, n] * right
    right = torch.autograd.grad(slow, similarity)[0]
    torch.testing.assert_close(torch.autograd.grad((factors * ours).sum(), similarity)[0], right, rtol=0, atol=1e-12)
    if masked:
        assert (right[~valid] == 0).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_sum_to_one_and_keep_the_maximum(case, masked, scale):
    similarity, valid = make_rows(4, 9, 25, dtype=torch.float32)
    valid = valid if masked else None
    ours = weights(case, similarity * scale, valid)
    torch.testing.assert_close(ours.sum(-1), torch.ones(4, 9))
    assert (ours >= 0).all()
    best = similarity if valid is None else similarity.masked_fill(~valid, -torch.inf)
    assert (ours.gather(-1, best.argmax(-1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_valid_does_not_matter(case):
    similarity, valid = make_rows(5, 12)
    ours = weights(case, similarity, valid)
    for value in (-1e30, 0.0, 1e30, torch.nan):
        assert torch.equal(weights(case, similarity.masked_fill(~valid, value), valid), ours)
    longer = torch.nn.functional.pad(similarity, (0, 4), value=3.0), torch.nn.functional.pad(valid, (0, 4))
    torch.testing.assert_close(weights(case, *longer)[:, :12], ours, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_valid_is_broadcast(case):
    similarity, valid = make_rows(3, 4, 7)
    shared = valid[:, :1]
    assert torch.equal(weights(case, similarity, shared), weights(case, similarity, shared.expand(3, 4, 7)))


@pytest.mark.parametrize("case", CASES)
def test_row_without_a_valid_place_is_zero(case):
    similarity = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    valid = torch.tensor([[False], [True]]).expand(2, 5)
    ours = weights(case, similarity, valid)
    assert (ours[0] == 0).all()
    assert ours[1].sum().item() == pytest.approx(1)
    gradient = torch.autograd.grad(ours.square().sum(), similarity)[0]
    assert gradient.isfinite().all()
    assert (gradient[0] == 0).all()


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("case", CASES)
def test_constant_similarities_are_uniform(case, scale):
    """Up to rounding, which min-max would blow up to 0 and 1."""
    similarity = torch.full((2, 9), scale).requires_grad_()
    noisy = similarity + torch.tensor([0.0, 1e-7, 0.0, 1e-7, 1e-7, 0.0, 0.0, 1e-7, 0.0]) * scale
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 4] = False
    ours = weights(case, noisy, valid)
    for row, places in enumerate((9, 8)):
        count = min(places, CASES[case].get("top", 8)) if case.startswith("topk") else places
        kept = ours[row][ours[row] > 0]
        torch.testing.assert_close(kept, torch.full((count,), 1 / count), rtol=0, atol=1e-3)
    ours.square().sum().backward()
    assert similarity.grad.isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
def test_one_over_n_counts_the_valid_places(masked):
    """Five valid places: 0.2 of the maximum, of which 0.21 is above and 0.19 below; of ten it would be 0.1."""
    similarity = torch.tensor([0.0, 1.0, 0.21, 0.19, 0.5, 0.6, 0.7, 0.8, 0.9, 0.3])
    valid = torch.arange(10) < 5
    kept = weights("threshold 1/N", similarity, valid if masked else None) > 0
    assert kept.tolist() == [False, True, True, not masked, True] + [not masked] * 5


@pytest.mark.parametrize("top", [1, 2, 3, 4])
def test_topk_keeps_the_first_of_equals(top):
    similarity = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 3.0])
    kept = weighting("sta", "topk", top=top)(similarity, None).nonzero().flatten().tolist()
    assert kept == sorted([1, 3, 5, 2][:top])


def test_topk_of_all_is_a_threshold_of_zero():
    similarity, valid = make_rows(6, 8)
    for mask in (None, valid):
        assert torch.equal(weights("topk 8", similarity, mask), weights("threshold 0", similarity, mask))


def test_sparsemax_by_hand():
    """1.0 and 0.8 share the mass: (1.8 - 1) / 2 = 0.4 is taken off each, and 0.1 stays below."""
    similarity = torch.tensor([0.8, 0.1, 1.0], dtype=torch.float64, requires_grad=True)
    ours = weights("sparsemax", similarity)
    torch.testing.assert_close(ours, torch.tensor([0.4, 0.0, 0.6], dtype=torch.float64))
    jacobian = torch.stack([torch.autograd.grad(w, similarity, retain_graph=True)[0] for w in ours])
    right = torch.tensor([[0.5, 0.0, -0.5], [0.0, 0.0, 0.0], [-0.5, 0.0, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(jacobian, right)


def test_sparsemax_of_nan_is_nan_and_no_error():
    """An overflow in half precision: the scaler of gradients skips such a step."""
    similarity = torch.tensor([[0.1, float("nan"), 0.3], [0.1, 0.2, 0.3]])
    found = weights("sparsemax", similarity)
    assert found[0].isnan().any()
    assert found[1].isfinite().all()


def test_sparsemax_of_many_is_the_projection():
    """What the projection onto the simplex is known by: kept places lie above the threshold by their weight."""
    similarity = torch.randn(50, 300, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 0.05
    ours = weights("sparsemax", similarity)
    kept = ours > 0
    threshold = (similarity - ours).masked_fill(~kept, torch.nan).nanmean(-1, keepdim=True)
    assert 20 < kept.sum(-1).float().mean() < 200
    torch.testing.assert_close(similarity - threshold, ours + (similarity - threshold).clamp(max=0))
    torch.testing.assert_close(ours.sum(-1), torch.ones(50, dtype=torch.float64))


@pytest.mark.parametrize("case", ["sparsemax", "sparsemax 0.3", "softmax", "softmax 0.3"])
def test_a_constant_shift_changes_nothing(case):
    similarity, valid = make_rows(6, 20)
    for mask in (None, valid):
        for shift in (-100.0, 100.0):
            shifted = weights(case, similarity + shift, mask)
            torch.testing.assert_close(shifted, weights(case, similarity, mask), rtol=0, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", ["sparsemax", "sparsemax 0.3", "softmax", "softmax 0.3"])
def test_large_values_are_finite(case, masked):
    similarity = torch.tensor([[3e38, -3e38, 1.0, 3e38], [-3e38, -3e38, -3e38, -3e38]]).requires_grad_()
    ours = weights(case, similarity, torch.ones(2, 4, dtype=torch.bool) if masked else None)
    torch.testing.assert_close(ours, torch.tensor([[0.5, 0.0, 0.0, 0.5], [0.25] * 4]))
    assert torch.autograd.grad(ours.square().sum(), similarity)[0].isfinite().all()


def test_lower_temperature_is_sparser():
    similarity, _ = make_rows(10, 50)
    kept = [(weighting("sta", "sparsemax", None, None, t)(similarity, None) > 0).sum().item() for t in (0.01, 1, 999)]
    assert kept[0] == 10
    assert kept[0] < kept[1] < kept[2] == 500
