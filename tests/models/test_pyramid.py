"""Maps of several strides: which there are, and what is made of a vision transformer's one."""

import pytest
import torch

from sista_pl.models import IMAGE_ENCODERS
from sista_pl.models.image import freeze_unreached
from sista_pl.models.pyramid import SimpleFeaturePyramid, aligned, stride_of

ENCODERS = {
    "resnet10t": ([1, 2, 4, 8, 16, 32], set()),
    "convnext_atto": ([1, 4, 8, 16, 32], {"head"}),
    "efficientnet_b0": ([1, 2, 4, 8, 16, 32], {"conv_head", "bn2"}),
    "swin_tiny_patch4_window7_224": ([1, 4, 8, 16, 32], {"norm"}),
    "vit_tiny_patch16_224": ([1, 16, 16, 16, 16], set()),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_what_an_encoder_says_of_its_maps_is_so(name):
    encoder = IMAGE_ENCODERS.build(name, image_size=64).eval()
    image = torch.randn(2, 1, 64, 64)
    maps = encoder.pyramid(image)
    assert encoder.strides == ENCODERS[name][0]
    assert torch.equal(maps[0], image)
    for found, channels, stride in zip(maps, encoder.channels, encoder.strides, strict=True):
        assert found.shape == (2, channels, 64 // stride, 64 // stride)


@pytest.mark.parametrize("name", ENCODERS)
def test_what_no_map_depends_on_is_frozen_and_nothing_else(name):
    encoder = IMAGE_ENCODERS.build(name, image_size=64).train()
    buffers = {key: value.clone() for key, value in encoder.named_buffers()}
    freeze_unreached(encoder, 64)
    assert encoder.training
    assert all(torch.equal(value, buffers[key]) for key, value in encoder.named_buffers()), "no statistics moved"
    frozen = {key.split(".")[1] for key, p in encoder.named_parameters() if not p.requires_grad}
    assert frozen == ENCODERS[name][1]
    sum(found.square().sum() for found in encoder.pyramid(torch.randn(2, 1, 64, 64))[1:]).backward()
    assert [key for key, p in encoder.named_parameters() if p.requires_grad and p.grad is None] == []
    encoder.requires_grad_(False)
    freeze_unreached(encoder, 64)
    assert not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("size", [64, 100, 72])
def test_maps_are_put_at_their_strides_and_empty_ones_between(size):
    image = torch.randn(2, 1, size, size)
    encoder = IMAGE_ENCODERS.build("convnext_atto", image_size=size).eval()
    maps = encoder.pyramid(image)
    found = aligned(maps, [1, 2, 4, 8, 16, 32])
    assert torch.equal(found[0], image)
    assert found[1].shape == (2, 0, -(-size // 2), -(-size // 2))
    assert all(torch.equal(a, b) for a, b in zip(found[2:], maps[1:], strict=True))


def test_strides_are_powers_of_two_whatever_the_rounding():
    image = torch.zeros(1, 1, 100, 100)
    assert [stride_of(image, torch.zeros(1, 1, n, n)) for n in (100, 50, 25, 13, 7, 6, 4)] == [1, 2, 4, 8, 16, 16, 32]


def test_four_strides_from_one_map():
    pyramid = SimpleFeaturePyramid(32, 8)
    last = torch.randn(2, 32, 4, 6, requires_grad=True)
    maps = pyramid(last)
    assert [tuple(found.shape) for found in maps] == [(2, 8, 16, 24), (2, 8, 8, 12), (2, 8, 4, 6), (2, 8, 2, 3)]
    sum(found.square().sum() for found in maps).backward()
    assert [key for key, p in pyramid.named_parameters() if p.grad is None] == []
