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
from sista_pl.models.pyramid import aligned, stride_of
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
        SistaError: an encoder of one stride, as a vision transformer.
    """
    by_stride = dict(zip(encoder.strides, encoder.channels, strict=True))
    if len(by_stride) < 4:
        step = "use `decoder: dpt` or setr_pup" if encoder.has_tokens else "choose another encoder"
        raise SistaError(f"decoder {name!r}: the encoder has maps of one stride, as a ViT; {step}")
    return [by_stride.get(stride, 0) for stride in STRIDES]


def _check_channels(name: str, channels: Sequence[int]) -> None:
    right = isinstance(channels, Sequence) and all(isinstance(c, int) and c > 0 for c in channels)
    if not right or len(channels) != 5:
        raise SistaError(f"decoder {name!r}: channels is {channels}; give 5 numbers, of the strides 16 to 1")


def _check_size(name: str, image_size: int) -> None:
    if image_size % STRIDES[-1]:
        raise SistaError(
            f"decoder {name!r}: image_size is {image_size}, its maps double from stride 32; give a multiple of 32, or "
            "`decoder: unet`"
        )


@DECODERS.register("unet")
def unet(encoder: ImageEncoder, channels: Sequence[int] = (256, 128, 64, 32, 16)) -> PyramidDecoder:
    """U-Net, for convolutional encoders."""
    _check_channels("unet", channels)
    decoder = UnetDecoder(pyramid_channels(encoder, "unet"), list(channels), n_blocks=5)
    return PyramidDecoder(decoder, channels[-1], 1)


@DECODERS.register("unetplusplus")
def unetplusplus(
    encoder: ImageEncoder, image_size: int, channels: Sequence[int] = (256, 128, 64, 32, 16)
) -> PyramidDecoder:
    """U-Net++, for convolutional encoders with a map of stride 2 and inputs of a multiple of 32 pixels."""
    found = pyramid_channels(encoder, "unetplusplus")
    _check_channels("unetplusplus", channels)
    _check_size("unetplusplus", image_size)
    if 0 in found:
        raise SistaError("decoder 'unetplusplus': the encoder has no map of stride 2; use `decoder: unet` or fpn")
    return PyramidDecoder(UnetPlusPlusDecoder(found, list(channels), n_blocks=5), channels[-1], 1)


@DECODERS.register("fpn")
def fpn(encoder: ImageEncoder, image_size: int, channels: int = 128, dropout: float = 0.1) -> PyramidDecoder:
    """Feature pyramid network, for convolutional encoders and inputs of a multiple of 32 pixels; light and coarse."""
    found = pyramid_channels(encoder, "fpn")
    _check_size("fpn", image_size)
    if not isinstance(channels, int) or channels < 32 or channels % 32:
        raise SistaError(f"decoder 'fpn': channels is {channels!r}; give a multiple of 32, the groups of its norms")
    decoder = FPNDecoder(found, 5, 2 * channels, channels, dropout)
    return PyramidDecoder(decoder, channels, 4)


class TokenDecoder(nn.Module):
    """A decoder over the token maps of a vision transformer's blocks.

    Args:
        decoder: takes the maps and their prefix tokens.
        head: from the decoder's map to logits.
        multiple: of which the maps' sides have to be, so that what the decoder halves doubles to the same again.
    """

    def __init__(self, decoder: nn.Module, head: nn.Module, multiple: int):
        super().__init__()
        self.decoder, self.head, self.multiple = decoder, head, multiple

    def forward(self, encoder: ImageEncoder, image: Tensor) -> Tensor:
        """(B, 1, H, W) → logits (B, 1, H', W')."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and _trainable(encoder)):
            found = encoder.tokens(image)
        maps, prefixes = [self._even(m) for m, _ in found], [p if p.shape[1] else None for _, p in found]
        return self.head(self.decoder(maps, prefixes))

    def _even(self, tokens: Tensor) -> Tensor:
        size = [-(-side // self.multiple) * self.multiple for side in tokens.shape[-2:]]
        if size == list(tokens.shape[-2:]):
            return tokens
        return nn.functional.interpolate(tokens, size, mode="bilinear", align_corners=False)


def check_tokens(encoder: ImageEncoder, name: str) -> None:
    """Refuse a convolutional encoder.

    Raises:
        SistaError: the encoder has no tokens.
    """
    if not encoder.has_tokens:
        raise SistaError(f"decoder {name!r}: for vision transformers; use `decoder: unet` on a convolutional encoder")


@DECODERS.register("dpt")
def dpt(
    encoder: ImageEncoder, image_size: int, intermediate: Sequence[int] = (96, 192, 384, 384), fusion: int = 128
) -> TokenDecoder:
    """Dense prediction transformer, for vision transformers of four blocks or more."""
    check_tokens(encoder, "dpt")
    with torch.no_grad():
        found = encoder.tokens(torch.zeros(1, 1, image_size, image_size))
    if len(found) != len(intermediate):
        raise SistaError(
            f"decoder 'dpt': {len(found)} maps of the encoder for {len(intermediate)} channels; give `intermediate` "
            "as many"
        )
    prefix = found[0][1].shape[1] > 0
    # its scales are powers of two; a patch of 14 is taken for 16, the task brings the logits to the input's size
    stride = stride_of(torch.zeros(1, 1, image_size, image_size), found[0][0])
    decoder = DPTDecoder(
        [m.shape[1] for m, _ in found], [stride] * len(found), prefix, "cat" if prefix else "ignore",
        list(intermediate), fusion,
    )  # fmt: skip
    multiple = max(1, 2 ** (len(found) + 1) // stride)
    return TokenDecoder(decoder, SegmentationHead(fusion, 1, upsampling=2), multiple)


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
        """(B, 1, H, W) → logits (B, 1, 16 h, 16 w) of h × w tokens."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and _trainable(encoder)):
            last = encoder.pyramid(image)[-1]
        return self.head(self.blocks(last))


@DECODERS.register("setr_pup")
def setr_pup(encoder: ImageEncoder, channels: int = 256) -> SetrPup:
    """SETR's progressive upsampling, for vision transformers."""
    check_tokens(encoder, "setr_pup")
    return SetrPup(encoder.channels[-1], channels)


class Linear(nn.Module):
    """Linear in the encoder's maps: of each a batch norm without affine and a 1 × 1 convolution, upsampled and summed.

    What it finds the encoder has found; as for DINOv2 (Oquab et al. 2024), whose norm it takes over.

    Args:
        places: of the maps in the encoder's pyramid, the finest first.
        channels: of these maps.
    """

    def __init__(self, places: Sequence[int], channels: Sequence[int]):
        super().__init__()
        self.places = list(places)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c, affine=False) for c in channels)
        self.heads = nn.ModuleList(nn.Conv2d(c, 1, 1, bias=i == 0) for i, c in enumerate(channels))

    def forward(self, encoder: ImageEncoder, image: Tensor) -> Tensor:
        """(B, 1, H, W) → logits (B, 1, h, w) at the cells of the finest map."""
        maps = self._maps(encoder, image)
        found = [head(norm(m)) for m, norm, head in zip(maps, self.norms, self.heads, strict=True)]
        return torch.stack([_resized(each, found[0].shape[-2:]) for each in found]).sum(0)

    def cells(self, encoder: ImageEncoder, image: Tensor) -> Tensor:
        """(B, 1, H, W) → the maps' channels, all of them, at the cells of the finest map (B, D, h, w)."""
        maps = self._maps(encoder, image)
        return torch.cat([_resized(found, maps[0].shape[-2:]) for found in maps], 1)

    @torch.no_grad()
    def take(self, mean: Tensor, variance: Tensor, weight: Tensor, bias: float) -> None:
        """Take over a layer that was solved for: mean, variance and weight (D,) of the channels of `cells`."""
        sizes = [norm.num_features for norm in self.norms]
        parts = zip(self.norms, self.heads, *(v.split(sizes) for v in (mean, variance, weight)), strict=True)
        for norm, head, of_mean, of_variance, of_weight in parts:
            norm.running_mean.copy_(of_mean)
            norm.running_var.copy_(of_variance)
            head.weight.copy_(of_weight[None, :, None, None])
        self.heads[0].bias.fill_(bias)

    def _maps(self, encoder: ImageEncoder, image: Tensor) -> list[Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and _trainable(encoder)):
            maps = encoder.pyramid(image)
        return [maps[place] for place in self.places]


def _resized(found: Tensor, size: Sequence[int]) -> Tensor:
    if found.shape[-2:] == tuple(size):
        return found.float()
    return nn.functional.interpolate(found.float(), tuple(size), mode="bilinear", align_corners=False)


@DECODERS.register("linear")
def linear(encoder: ImageEncoder) -> Linear:
    """Linear probe of the maps of stride 8 and more, or of a vision transformer's last one."""
    last = len(encoder.strides) - 1
    places = [last] if encoder.has_tokens else [i for i, stride in enumerate(encoder.strides) if stride >= 8]
    return Linear(places, [encoder.channels[place] for place in places])
