"""From a stored uint8 image to the encoder's input.

No flip: left and right are findings. H W pixels.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from sista_pl.data.images import IGNORE
from sista_pl.errors import SistaError

T = TypeVar("T")

# (x - 0.5) / 0.5, as MGCA does: [0, 255] → [-1, 1]
MEAN, STD = 0.5, 0.5


def build(size: int, crop: int, train: bool, rotate: float = 0.0, contrast: float = 0.0) -> v2.Compose:
    """Return the augmentation from (…, 1, size, size) to (…, 1, crop, crop), both uint8; `normalise` comes after it.

    A dict of `tv_tensors` (image, mask, boxes) is moved as one; what turns into a mask's corners is to be ignored.

    Args:
        size: side of the stored image in pixels.
        crop: side of the crop; random in training, centred elsewhere.
        train: whether to draw at random.
        rotate: training only, largest rotation in degrees.
        contrast: training only, largest relative change of brightness and of contrast, in [0, 1).

    Raises:
        SistaError: a crop larger than the stored image.
    """
    if not 1 <= crop <= size:
        raise SistaError(f"data: crop is {crop} but the store holds {size} px images; crop <= size, or prepare again")
    steps: list[torch.nn.Module] = []
    if train and rotate:
        steps.append(
            v2.RandomRotation(rotate, v2.InterpolationMode.BILINEAR, fill={tv_tensors.Mask: IGNORE, "others": 0})
        )
    steps.append(v2.RandomCrop(crop) if train else v2.CenterCrop(crop))
    if train and contrast:
        steps.append(v2.ColorJitter(brightness=contrast, contrast=contrast))
    return v2.Compose(steps)


def normalise(images: Tensor) -> Tensor:
    """(…, 1, H, W) uint8 → float in [-1, 1]."""
    return v2.functional.normalize(v2.functional.to_dtype(images, torch.float32, scale=True), [MEAN], [STD])


def seeded(transform: v2.Compose, image: T, seed: int) -> T:
    """Apply a random transform as a pure function of (image, seed); the global generator stays as it was."""
    state = torch.get_rng_state()
    # not torch.manual_seed: it seeds every device too, which takes longer than the transform
    torch.default_generator.manual_seed(seed)
    try:
        return transform(image)
    finally:
        torch.set_rng_state(state)
