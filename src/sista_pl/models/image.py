"""Image encoders: any timm model, its pooled vector and its patch tokens.

B images, C input channels, H W pixels, P patches, D dimension.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from sista_pl.errors import SistaError, did_you_mean
from sista_pl.models.hub import offline_where_unreachable
from sista_pl.models.pyramid import stride_of
from sista_pl.pair import Features
from sista_pl.registry import Registry


class ImageEncoder(nn.Module):
    """What an image encoder promises; subclass it and register a builder to add one.

    Attributes:
        dim: D of `pooled`.
        local_dim: D of `local`.
        channels: of each map of `pyramid`.
        strides: of the same, rising; the first is 1, the input itself.
        has_tokens: whether `tokens` works, as it does for vision transformers.
    """

    dim: int
    local_dim: int
    channels: list[int]
    strides: list[int]
    has_tokens = False

    def forward(self, image: Tensor) -> Features:
        """Encode (B, 1, H, W) images, normalised to [-1, 1], into `pooled` (B, dim) and `local` (B, P, local_dim)."""
        raise NotImplementedError("an ImageEncoder defines forward(image) -> Features")

    def pyramid(self, image: Tensor) -> list[Tensor]:
        """(B, 1, H, W) → the input and the maps (B, channels, H / stride, W / stride), strides rising."""
        raise NotImplementedError("for dense tasks an ImageEncoder defines pyramid(image)")

    def tokens(self, image: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(B, 1, H, W) → of four evenly spaced blocks the map (B, D, h, w) and the prefix tokens (B, n, D)."""
        raise NotImplementedError("only a vision transformer has tokens(image)")


class TimmEncoder(ImageEncoder):
    """A timm model without its head.

    A convolutional network (or any model with a pyramid) gives the map of stride 16 as tokens, which is stage 3 of
    a ResNet, and its pooled last stage; a vision transformer gives its last layer's patch tokens, and its class token
    (or the mean of the tokens, where it has none).

    Args:
        name: timm's name of the model, such as `resnet50` or `vit_base_patch16_224`.
        weights: `none`, `imagenet` (timm's default weights, from the hub), or the path of a file of timm's keys.
        in_chans: 1, or 3 to repeat the grey channel; timm folds 3-channel weights into 1 by summing.
        image_size: side of the input in pixels; only models with a fixed input size care.
        drop_path_rate: stochastic depth, passed on where it is not 0.

    Raises:
        SistaError: unknown name, weights that can't be reached or don't fit.
    """

    def __init__(
        self,
        name: str,
        weights: str = "none",
        in_chans: int = 1,
        image_size: int = 224,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if not timm.is_model(name):
            near = did_you_mean(name, [*timm.list_models(), *IMAGE_ENCODERS]) if name else "give a name"
            near = near if near.startswith("did") else "`sista list encoders` shows where to look"
            raise SistaError(f"unknown image encoder {name!r}; {near}")
        if in_chans not in (1, 3):
            raise SistaError(f"image encoder {name!r}: in_chans is {in_chans}; X-rays have 1 channel, 3 repeats it")
        self.name, self.in_chans, self.weights = name, in_chans, weights
        arguments: dict[str, Any] = {"num_classes": 0, "in_chans": in_chans}
        config = timm.get_pretrained_cfg(name)
        if config is not None and config.fixed_input_size:
            arguments["img_size"] = image_size
        if drop_path_rate:
            arguments["drop_path_rate"] = drop_path_rate
        self.model = create(name, weights, arguments)
        if not hasattr(self.model, "forward_intermediates"):
            raise SistaError(f"image encoder {name!r}: timm gives no token map for it; choose another model")
        if not hasattr(self.model, "num_prefix_tokens"):
            # convolutions run 1.3 to 1.5 times as fast, on CPUs and on accelerators
            self.model.to(memory_format=torch.channels_last)
        self.has_tokens = hasattr(self.model, "num_prefix_tokens")
        with torch.no_grad():
            training, probe = self.model.training, torch.zeros(1, 1, image_size, image_size)
            features, maps = self.eval()(probe), self.pyramid(probe)
            self.train(training)
        self.dim, self.local_dim = features.pooled.shape[1], features.local.shape[2]
        self.channels = [found.shape[1] for found in maps]
        self.strides = [round(image_size / m.shape[-1]) if self.has_tokens else stride_of(probe, m) for m in maps]

    def _input(self, image: Tensor) -> Tensor:
        return image.expand(-1, 3, -1, -1) if self.in_chans == 3 else image

    def pyramid(self, image: Tensor) -> list[Tensor]:
        if self.has_tokens:
            return [image, *(found for found, _ in self.tokens(image))]
        return [image, *self.model.forward_intermediates(self._input(image), intermediates_only=True)]

    def tokens(self, image: Tensor) -> list[tuple[Tensor, Tensor]]:
        depth = len(self.model.blocks)  # type: ignore[arg-type]
        blocks = [(i + 1) * depth // 4 - 1 for i in range(4)] if depth >= 4 else list(range(depth))
        return self.model.forward_intermediates(
            self._input(image), indices=blocks, return_prefix_tokens=True, norm=True, intermediates_only=True
        )

    def forward(self, image: Tensor) -> Features:
        image = self._input(image)
        if self.has_tokens:
            tokens = self.model.forward_features(image)  # B (prefix + P) D
            pooled = self.model.forward_head(tokens, pre_logits=True)
            return Features(pooled, tokens[:, self.model.num_prefix_tokens :])
        last, maps = self.model.forward_intermediates(image, output_fmt="NCHW")
        stride16 = [m for m in maps if m.shape[-1] >= -(-image.shape[-1] // 16)][-1]
        pooled = self.model.forward_head(last, pre_logits=True)
        return Features(pooled, stride16.flatten(2).transpose(1, 2))  # B P D


def create(name: str, weights: str, arguments: dict[str, Any]) -> nn.Module:
    """Create a timm model, with its weights; each failure is one line with the next step."""
    if weights in ("none", ""):
        return timm.create_model(name, pretrained=False, **arguments)
    if weights == "imagenet":
        try:
            with offline_where_unreachable():
                return timm.create_model(name, pretrained=True, **arguments)
        except Exception as why:
            raise SistaError(
                f"image encoder {name!r}: its weights can't be loaded from the hub ({type(why).__name__}); give a "
                "local file as `weights: path/to/model.safetensors`, or `weights: none`"
            ) from why
    path = Path(weights)
    if not path.is_file():
        raise SistaError(f"image encoder {name!r}: weights {weights!r} is no file; write none, imagenet, or a path")
    try:
        return timm.create_model(name, pretrained=False, checkpoint_path=str(path), **arguments)
    except Exception as why:
        reason = str(why).splitlines()[0][:160] if str(why) else type(why).__name__
        raise SistaError(f"image encoder {name!r}: {path} does not fit ({reason}); is it of this model?") from why


IMAGE_ENCODERS = Registry("image encoder", fallback=TimmEncoder)
