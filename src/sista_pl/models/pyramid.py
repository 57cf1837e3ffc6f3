"""Maps of several strides, as decoders and detectors want them.

B images, D channels, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn


def stride_of(image: Tensor, found: Tensor) -> int:
    """Return the power of two that a map of a convolutional encoder is smaller by, whatever the rounding."""
    return 2 ** round(math.log2(image.shape[-1] / found.shape[-1]))


def aligned(maps: Sequence[Tensor], strides: Sequence[int]) -> list[Tensor]:
    """Return a map for each stride, one without channels where the encoder has none, as smp's timm encoders do.

    Args:
        maps: of an encoder's `pyramid`, the input first.
        strides: wanted, rising.
    """
    image, by_stride = maps[0], {stride_of(maps[0], found): found for found in maps}
    height, width = image.shape[-2:]
    return [by_stride.get(s, image.new_zeros(len(image), 0, -(-height // s), -(-width // s))) for s in strides]


class SimpleFeaturePyramid(nn.Module):
    """Strides 4, 8, 16 and 32 from the one map of a vision transformer (ViTDet, Li et al. 2022).

    Args:
        dim: D of the map.
        out_channels: of the four maps.
    """

    scales = (4.0, 2.0, 1.0, 0.5)

    def __init__(self, dim: int, out_channels: int):
        super().__init__()
        self.stages = nn.ModuleList()
        for scale in self.scales:
            steps: list[nn.Module] = []
            width = dim
            if scale == 4.0:
                steps += [nn.ConvTranspose2d(dim, dim // 2, 2, 2), nn.GroupNorm(1, dim // 2), nn.GELU()]
                steps += [nn.ConvTranspose2d(dim // 2, dim // 4, 2, 2)]
                width = dim // 4
            elif scale == 2.0:
                steps += [nn.ConvTranspose2d(dim, dim // 2, 2, 2)]
                width = dim // 2
            elif scale == 0.5:
                steps += [nn.MaxPool2d(2, 2)]
            steps += [nn.Conv2d(width, out_channels, 1, bias=False), nn.GroupNorm(1, out_channels)]
            steps += [nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), nn.GroupNorm(1, out_channels)]
            self.stages.append(nn.Sequential(*steps))

    def forward(self, last: Tensor) -> list[Tensor]:
        """(B, D, h, w) → four maps (B, out_channels, 4h … h/2, 4w … w/2)."""
        return [stage(last) for stage in self.stages]
