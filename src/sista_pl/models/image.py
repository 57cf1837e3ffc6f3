"""Image encoders: any timm model, its pooled vector and its patch tokens; `huggingface.py` has the other ones.

B images, C input channels, H W pixels, P patches, D dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from sista_pl.data.transforms import MEAN, STD
from sista_pl.errors import SistaError, did_you_mean
from sista_pl.models.attention import run_once, watching
from sista_pl.models.hub import offline_where_unreachable
from sista_pl.models.pyramid import stride_of
from sista_pl.models.tensors import MINIMUM, cover, read_tensors
from sista_pl.pair import Features
from sista_pl.registry import Registry, Spec


class ImageEncoder(nn.Module):
    """What an image encoder promises; subclass it and register a builder to add one.

    Attributes:
        dim: D of `pooled`.
        local_dim: D of `local`.
        channels: of each map of `pyramid`.
        strides: of the same, rising; the first is 1, the input itself.
        has_tokens: whether `tokens` works, as it does for vision transformers.
        needs_attention: whether `forward` gives `attention`, where it can; `ask_attention` sets it.
    """

    dim: int
    local_dim: int
    channels: list[int]
    strides: list[int]
    has_tokens = False
    needs_attention = False

    def ask_attention(self, image_size: int) -> None:
        """Let `forward` give the attention of the class token to the patches, where the encoder has such a token.

        Args:
            image_size: side of an input that it takes; it is tried at once.

        Raises:
            SistaError: a transformer whose attention can't be read.
        """
        self.needs_attention = True
        run_once(self, torch.zeros(1, 1, image_size, image_size))

    def forward(self, image: Tensor) -> Features:
        """Encode (B, 1, H, W) images, normalised to [-1, 1], into `pooled` (B, dim) and `local` (B, P, local_dim)."""
        raise NotImplementedError("an ImageEncoder defines forward(image) -> Features")

    def pyramid(self, image: Tensor) -> list[Tensor]:
        """(B, 1, H, W) → the input and the maps (B, channels, H / stride, W / stride), strides rising."""
        raise NotImplementedError("for dense tasks an ImageEncoder defines pyramid(image)")

    def tokens(self, image: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(B, 1, H, W) → of four evenly spaced blocks the map (B, D, h, w) and the prefix tokens (B, n, D)."""
        raise NotImplementedError("only a vision transformer has tokens(image)")


class Renormalise(nn.Module):
    """Brings our input, (x - 0.5) / 0.5, to the normalisation that foreign weights were trained with.

    Args:
        channels: C of the output; the grey channel is repeated.
        mean: of images in [0, 1], one number or one a channel.
        std: the same.
    """

    def __init__(self, channels: int, mean: float | Sequence[float] = MEAN, std: float | Sequence[float] = STD):
        super().__init__()
        try:
            numbers = [torch.as_tensor(value, dtype=torch.float64).reshape(-1) for value in (mean, std)]
            means, stds = (n.mean().reshape(1) if channels == 1 else n.expand(channels) for n in numbers)
        except (TypeError, ValueError, RuntimeError):
            raise SistaError(f"image encoder: mean {mean!r}, std {std!r}; give a number each, or {channels}") from None
        if not (stds > 0).all() or not torch.cat([means, stds]).isfinite().all():
            raise SistaError(f"image encoder: mean {mean!r}, std {std!r}; give finite numbers, std above 0")
        self.channels, self.mean, self.std = channels, means.tolist(), stds.tolist()
        self.ours = set(self.mean) == {MEAN} and set(self.std) == {STD}
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", (STD / stds).float()[:, None, None], persistent=False)
        self.register_buffer("shift", ((MEAN - means) / stds).float()[:, None, None], persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, H, W) → (B, C, H, W)."""
        image = image.expand(-1, self.channels, -1, -1)
        return image if self.ours else image * self.scale + self.shift


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
        mean: of images in [0, 1], as the weights were trained with; ours (0.5) where not given.
        std: the same.

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
        mean: float | Sequence[float] = MEAN,
        std: float | Sequence[float] = STD,
    ):
        super().__init__()
        if not timm.is_model(name):
            near = did_you_mean(name, [*timm.list_models(), *IMAGE_ENCODERS]) if name else "give a name"
            near = near if near.startswith("did") else "`sista list encoders` shows where to look"
            near = f"a model of Hugging Face is written {PREFIX}{name}" if "/" in name or Path(name).is_dir() else near
            raise SistaError(f"unknown image encoder {name!r}; {near}")
        if in_chans not in (1, 3):
            raise SistaError(f"image encoder {name!r}: in_chans is {in_chans}; X-rays have 1 channel, 3 repeats it")
        self.name, self.in_chans, self.weights = name, in_chans, weights
        self.renormalise = Renormalise(in_chans, mean, std)
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
        self.class_token = getattr(self.model, "has_class_token", getattr(self.model, "cls_token", None) is not None)
        training, probe = self.model.training, torch.zeros(1, 1, image_size, image_size)
        try:
            with torch.no_grad():
                features, maps = self.eval()(probe), self.pyramid(probe)
        except Exception as why:  # its own limits, each model's in its own words
            reason = (str(why).splitlines() or [type(why).__name__])[0][:160]
            raise SistaError(
                f"image encoder {name!r}: no token map of {image_size} px images ({reason}); change image_size, or "
                "choose another model"
            ) from why
        self.train(training)
        self.dim, self.local_dim = features.pooled.shape[1], features.local.shape[2]
        self.channels = [found.shape[1] for found in maps]
        self.strides = [round(image_size / m.shape[-1]) if self.has_tokens else stride_of(probe, m) for m in maps]

    def pyramid(self, image: Tensor) -> list[Tensor]:
        if self.has_tokens:
            return [image, *(found for found, _ in self.tokens(image))]
        return [image, *self.model.forward_intermediates(self.renormalise(image), intermediates_only=True)]

    def tokens(self, image: Tensor) -> list[tuple[Tensor, Tensor]]:
        depth = len(self.model.blocks)  # type: ignore[arg-type]
        blocks = [(i + 1) * depth // 4 - 1 for i in range(4)] if depth >= 4 else list(range(depth))
        found = self.model.forward_intermediates(
            self.renormalise(image), indices=blocks, return_prefix_tokens=True, norm=True, intermediates_only=True
        )
        if self.model.num_prefix_tokens:
            return found
        return [(m, m.new_zeros(len(m), 0, m.shape[1])) for m in found]  # timm leaves out what is not there

    def forward(self, image: Tensor) -> Features:
        image = self.renormalise(image)
        if self.has_tokens:
            with watching(self.needs_attention and self.class_token) as watched:
                tokens = self.model.forward_features(image)  # B (prefix + P) D
            pooled, prefix = self.model.forward_head(tokens, pre_logits=True), self.model.num_prefix_tokens
            attention = None
            if watched is not None:
                attention = watched.weights(f"image encoder {self.name!r}", tokens.shape[1])[:, prefix:]  # B P
            return Features(pooled, tokens[:, prefix:], attention=attention)
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
    from pytorch_lightning.utilities import rank_zero_info  # seconds, which nothing else here needs

    path = Path(weights)
    if not path.is_file():
        raise SistaError(f"image encoder {name!r}: weights {weights!r} is no file; write none, imagenet, or a path")
    model = timm.create_model(name, pretrained=False, **arguments)
    coverage = cover(model, read_tensors(path), [""], str(path))
    if coverage.share < MINIMUM:
        raise SistaError(
            f"image encoder {name!r}: {coverage}: less than {MINIMUM:.0%} is covered; is it of this model?"
        )
    coverage.load(model)
    rank_zero_info(str(coverage))
    return model


def freeze_unreached(encoder: ImageEncoder, image_size: int) -> None:
    """Stop the gradient of parameters that no map of `pyramid` depends on, as a pooling head's: they would stop DDP."""
    training, parameters = encoder.training, [p for p in encoder.parameters() if p.requires_grad]
    if parameters:
        with torch.enable_grad():
            maps = encoder.eval().pyramid(torch.zeros(1, 1, image_size, image_size))[1:]
            found = torch.autograd.grad([m.sum() for m in maps if m.requires_grad], parameters, allow_unused=True)
        encoder.train(training)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.requires_grad_(gradient is not None)


PREFIX = "hf:"


class ImageEncoders(Registry):
    """The registry of image encoders; `hf:FOLDER_OR_HUB_ID` is short for `{name: hf, path: FOLDER_OR_HUB_ID}`."""

    def split(self, spec: Spec) -> tuple[str, dict[str, Any]]:
        name, arguments = super().split(spec)
        if name.startswith(PREFIX):
            return "hf", {"path": name.removeprefix(PREFIX), **arguments}
        return name, arguments


IMAGE_ENCODERS = ImageEncoders("image encoder", fallback=TimmEncoder)
