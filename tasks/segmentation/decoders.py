"""From an encoder's maps to a map of logits: segmentation-models-pytorch's decoders on our encoders.

B images, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from segmentation_models_pytorch.base import SegmentationHead
from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder
from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
from segmentation_models_pytorch.decoders.unetplusplus.decoder import UnetPlusPlusDecoder
from torch import Tensor, nn

from sista_pl.errors import SistaError
from sista_pl.models import ImageEncoder
from sista_pl.models.pyramid import aligned
from sista_pl.registry import Registry

DECODERS = Registry("decoder")
STRIDES = (1, 2, 4, 8, 16, 32)


class PyramidDecoder(nn.Module):
    """A decoder over maps of the strides 1, 2, 4, 8, 16 and 32; what the encoder has none of is empty."""

    def __init__(self, decoder: nn.Module, channels: int, upsampling: int):
        super().__init__()
        self.decoder, self.head = decoder, SegmentationHead(channels, 1, upsampling=upsampling)

    def forward(self, encoder: ImageEncoder, image: Tensor) -> Tensor:
        """(B, 1, H, W) → logits (B, 1, H', W')."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and _trainable(encoder)):
            maps = aligned(encoder.pyramid(image), STRIDES)
        return self.head(self.decoder(maps))


def _trainable(encoder: nn.Module) -> bool:
    return any(p.requires_grad for p in encoder.parameters())


def pyramid_channels(encoder: ImageEncoder, name: str) -> list[int]:
    """Return the channels at the strides 1 … 32, 0 where the encoder has no map.

    Raises:
        SistaError: an encoder of one stride, a vision transformer.
    """
    by_stride = dict(zip(encoder.strides, encoder.channels, strict=True))
    if len(by_stride) < 4:
        raise SistaError(
            f"decoder {name!r}: the encoder has maps of one stride, as a ViT; use `decoder: dpt` or setr_pup"
        )
    return [by_stride.get(stride, 0) for stride in STRIDES]


@DECODERS.register("unet")
def unet(encoder: ImageEncoder, channels: Sequence[int] = (256, 128, 64, 32, 16)) -> PyramidDecoder:
    """U-Net, for convolutional encoders."""
    decoder = UnetDecoder(pyramid_channels(encoder, "unet"), list(channels), n_blocks=5)
    return PyramidDecoder(decoder, channels[-1], 1)


@DECODERS.register("unetplusplus")
def unetplusplus(encoder: ImageEncoder, channels: Sequence[int] = (256, 128, 64, 32, 16)) -> PyramidDecoder:
    """U-Net++, for convolutional encoders with a map of stride 2."""
    found = pyramid_channels(encoder, "unetplusplus")
    if 0 in found:
        raise SistaError("decoder 'unetplusplus': the encoder has no map of stride 2; use `decoder: unet` or fpn")
    return PyramidDecoder(UnetPlusPlusDecoder(found, list(channels), n_blocks=5), channels[-1], 1)


@DECODERS.register("fpn")
def fpn(encoder: ImageEncoder, channels: int = 128, dropout: float = 0.1) -> PyramidDecoder:
    """Feature pyramid network, for convolutional encoders: light, coarse to a quarter of the input."""
    decoder = FPNDecoder(pyramid_channels(encoder, "fpn"), 5, 2 * channels, channels, dropout)
    return PyramidDecoder(decoder, channels, 4)


class TokenDecoder(nn.Module):
    """A decoder over the token maps of a vision transformer's blocks."""

    def __init__(self, decoder: nn.Module, head: nn.Module):
        super().__init__()
        self.decoder, self.head = decoder, head

    def forward(self, encoder: ImageEncoder, image: Tensor) -> Tensor:
        """(B, 1, H, W) → logits (B, 1, H', W')."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and _trainable(encoder)):
            found = tokens_of(encoder, "dpt")(image)
        maps, prefixes = [m for m, _ in found], [p if p.shape[1] else None for _, p in found]
        return self.head(self.decoder(maps, prefixes))


def tokens_of(encoder: ImageEncoder, name: str):
    """Return the encoder's `tokens`.

    Raises:
        SistaError: a convolutional encoder, which has none.
    """
    if not getattr(encoder, "has_tokens", hasattr(encoder, "tokens")):
        raise SistaError(f"decoder {name!r}: for vision transformers; use `decoder: unet` on a convolutional encoder")
    return encoder.tokens


@DECODERS.register("dpt")
def dpt(encoder: ImageEncoder, intermediate: Sequence[int] = (96, 192, 384, 384), fusion: int = 128) -> TokenDecoder:
    """Dense prediction transformer, for vision transformers."""
    with torch.no_grad():
        size = getattr(encoder, "image_size", 64)
        found = tokens_of(encoder, "dpt")(torch.zeros(1, 1, size, size))
    prefix = found[0][1].shape[1] > 0
    decoder = DPTDecoder(
        [m.shape[1] for m, _ in found], [encoder.strides[-1]] * len(found), prefix, "cat" if prefix else "ignore",
        list(intermediate), fusion,
    )  # fmt: skip
    return TokenDecoder(decoder, SegmentationHead(fusion, 1, upsampling=2))


class SetrPup(nn.Module):
    """Progressive upsampling of the last token map: convolution and doubling, four times (Zheng et al. 2021)."""

    def __init__(self, dim: int, channels: int):
        super().__init__()
        blocks: list[nn.Module] = []
        for i in range(4):
            blocks += [
                nn.Conv2d(dim if i == 0 else channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            ]  # fmt: skip
        self.blocks, self.head = nn.Sequential(*blocks), nn.Conv2d(channels, 1, 1)

    def forward(self, encoder: ImageEncoder, image: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and _trainable(encoder)):
            last = encoder.pyramid(image)[-1]
        return self.head(self.blocks(last))


@DECODERS.register("setr_pup")
def setr_pup(encoder: ImageEncoder, channels: int = 256) -> SetrPup:
    """SETR's progressive upsampling, for vision transformers."""
    return SetrPup(encoder.channels[-1], channels)
