"""Losses of masks against loops over pixels; pixels of 127 count nowhere."""

import math

import pytest
import torch

from sista_pl.errors import SistaError
from sista_pl.losses import LOSSES


def draws(ignored=0.2, objects=0.3):
    """Logits (3, 1, 6, 5) and masks of background, objects and pixels to ignore; the last image has no object."""
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 1, 6, 5, generator=draw, dtype=torch.float64)
    chance = torch.rand(3, 6, 5, generator=draw)
    mask = torch.where(chance < objects, 255, 0).to(torch.uint8)
    mask[2] = 0
    mask[torch.rand(3, 6, 5, generator=draw) < ignored] = 127
    return logits, mask


def pixels(logits, mask):
    """(probability, truth) of each pixel that counts."""
    found = []
    for image in range(mask.shape[0]):
        for y in range(mask.shape[1]):
            for x in range(mask.shape[2]):
                if mask[image, y, x] != 127:
                    p = 1 / (1 + math.exp(-logits[image, 0, y, x].item()))
                    found.append((p, int(mask[image, y, x] == 255)))
    return found


def soft_dice(found):
    """Of all pixels of the batch together, smoothed by one pixel that both have."""
    both, total = sum(p * t for p, t in found), sum(p + t for p, t in found)
    return 2 * (both + 1) / (total + 2)


def slow_dice_bce(logits, mask, share=0.5):
    found = pixels(logits, mask)
    bce = sum(-math.log(p if t else 1 - p) for p, t in found) / max(1, len(found))
    dice = 1 - soft_dice(found) if any(t for _, t in found) else 0
    return share * dice + (1 - share) * bce


def slow_focal_logdice(logits, mask, weight=10.0, gamma=2.0):
    found = pixels(logits, mask)
    right = [p if t else 1 - p for p, t in found]
    focal = sum(-((1 - p) ** gamma) * math.log(p) for p in right) / max(1, len(right))
    return weight * focal + (-math.log(soft_dice(found)) if any(t for _, t in found) else 0)


SLOW = {"dice_bce": slow_dice_bce, "focal_logdice": slow_focal_logdice}


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("batch", [{}, {"ignored": 0.0}, {"objects": 0.0}, {"objects": 1.0}])
def test_equal_the_loop(name, batch):
    logits, mask = draws(**batch)
    loss, diagnostics = LOSSES.build(name)(logits, mask)
    assert loss.item() == pytest.approx(SLOW[name](logits, mask), rel=1e-4)
    assert all(not value.requires_grad for value in diagnostics.values())


@pytest.mark.parametrize(
    ("spec", "slow"),
    [
        ({"name": "dice_bce", "dice": 0.0}, lambda x, m: slow_dice_bce(x, m, 0.0)),
        ({"name": "dice_bce", "dice": 1.0}, lambda x, m: slow_dice_bce(x, m, 1.0)),
        ({"name": "focal_logdice", "focal": 0.0}, lambda x, m: slow_focal_logdice(x, m, 0.0)),
        ({"name": "focal_logdice", "focal": 3.0, "gamma": 0.5}, lambda x, m: slow_focal_logdice(x, m, 3.0, 0.5)),
    ],
)
def test_their_arguments(spec, slow):
    logits, mask = draws()
    assert LOSSES.build(spec)(logits, mask)[0].item() == pytest.approx(slow(logits, mask), rel=1e-4)


@pytest.mark.parametrize("name", SLOW)
def test_ignored_pixels_have_no_gradient_and_no_say(name):
    logits, mask = draws()
    moved = logits.clone()
    moved[:, 0][mask == 127] = 50
    first, second = (LOSSES.build(name)(x.requires_grad_(), mask)[0] for x in (logits, moved))
    assert first.item() == second.item()
    (gradient,) = torch.autograd.grad(first, logits)
    assert (gradient[:, 0][mask == 127] == 0).all()
    assert (gradient[:, 0][mask != 127] != 0).all()


@pytest.mark.parametrize("name", SLOW)
def test_a_batch_to_be_ignored_is_zero_and_logs_the_same(name):
    logits, mask = draws()
    logits.requires_grad_()
    loss, diagnostics = LOSSES.build(name)(logits, torch.full_like(mask, 127))
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, logits)[0] == 0).all()
    assert diagnostics.keys() == LOSSES.build(name)(logits, mask)[1].keys()


@pytest.mark.parametrize("name", SLOW)
def test_far_off_and_half_precision_logits_stay_finite(name):
    logits, mask = draws()
    for far in (torch.full_like(logits, 1e4), torch.full_like(logits, -1e4), logits.to(torch.bfloat16)):
        far = far.detach().requires_grad_()
        loss = LOSSES.build(name)(far, mask)[0]
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert torch.autograd.grad(loss, far)[0].isfinite().all()


@pytest.mark.parametrize("name", SLOW)
def test_masks_of_another_size_are_one_line(name):
    logits, mask = draws()
    with pytest.raises(SistaError, match=r"of \(3, 6, 4\), the logits of \(3, 1, 6, 5\)"):
        LOSSES.build(name)(logits, mask[..., :4])


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ({"name": "dice_bce", "dice": 1.5}, "dice is 1.5"),
        ({"name": "dice_bce", "focal": 1}, "no argument 'focal'"),
        ({"name": "focal_logdice", "gamma": -1}, "gamma is -1"),
        ({"name": "focal_logdice", "focal": "ten"}, "focal is 'ten'"),
    ],
)
def test_bad_arguments_are_one_line(spec, line):
    with pytest.raises(SistaError, match=line):
        LOSSES.build(spec)
