"""What a detector promises, and the maps that all of them stand on.

B images, M boxes and D detections of one image, K classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sista_pl.errors import SistaError
from sista_pl.models import ImageEncoder
from sista_pl.models.pyramid import SimpleFeaturePyramid
from sista_pl.registry import Registry

DETECTORS = Registry("detector")
STRIDES = (8, 16, 32)
MOST, LEAST_SCORE = 100, 0.01  # detections of an image, and the score that each of them has at least


@dataclass
class Detections:
    """What was found on one image.

    Args:
        boxes: (D, 4) x0 y0 x1 y1 in pixels of the input.
        labels: (D,) class, from 0.
        scores: (D,) falling.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor


class Detector(nn.Module):
    """A detector on an encoder's maps; subclass it and register it in `DETECTORS` to add one.

    Attributes:
        components: names of the losses that it computes.
    """

    components: tuple[str, ...] = ()

    def forward(
        self, maps: Sequence[Tensor], boxes: Sequence[Tensor] | None = None, labels: Sequence[Tensor] | None = None
    ) -> tuple[dict[str, Tensor], list[Detections]]:
        """Return the losses by name, where there is a truth, and the detections, where it is not training.

        An image with outputs that are not finite has the one detection of `broken`, not none.

        Args:
            maps: of the encoder's `pyramid`, the input (B, 1, H, W) first.
            boxes: of each image (M, 4) x0 y0 x1 y1 in pixels of the input.
            labels: of each image (M,) class, from 0.
        """
        raise NotImplementedError("a Detector defines forward(maps, boxes, labels) -> (losses, detections)")


def broken(like: Tensor) -> Detections:
    """Return what an image has whose outputs are not finite: one detection of NaN, for thresholds would drop them all.

    Args:
        like: of its device, fp32.
    """
    return Detections(like.new_full((1, 4), torch.nan), like.new_zeros(1).long(), like.new_full((1,), torch.nan))


class _Three(SimpleFeaturePyramid):
    scales = (2.0, 1.0, 0.5)  # type: ignore[assignment]  # half, once and twice the patch


class Levels(nn.Module):
    """Three maps of rising stride: 8, 16 and 32 of a convolutional encoder, or made of a vision transformer's last one.

    Args:
        encoder: whose `pyramid` is given to `forward`.
        image_size: side of the input in pixels.
        channels: of the maps that are made.

    Raises:
        SistaError: an encoder without these strides, a size that they do not divide.
    """

    def __init__(self, encoder: ImageEncoder, image_size: int, channels: int):
        super().__init__()
        places = {stride: place for place, stride in enumerate(encoder.strides)}
        self.make = None
        if all(stride in places for stride in STRIDES):
            self.places, self.strides = [places[stride] for stride in STRIDES], list(STRIDES)
            self.channels = [encoder.channels[place] for place in self.places]
        elif len(places) == 2 and encoder.strides[-1] % 2 == 0:
            self.make, patch = _Three(encoder.channels[-1], channels), encoder.strides[-1]
            self.strides, self.channels = [patch // 2, patch, 2 * patch], [channels] * 3
        else:
            known = ", ".join(map(str, encoder.strides[1:]))
            raise SistaError(f"detector: the encoder has maps of the strides {known}; 8, 16 and 32 are needed")
        if image_size % self.strides[-1]:
            raise SistaError(
                f"model: image_size is {image_size}; detection on this encoder needs a multiple of {self.strides[-1]}"
            )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [maps[place] for place in self.places] if self.make is None else self.make(maps[-1])
