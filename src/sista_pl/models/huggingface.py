"""Image encoders of Hugging Face: plain vision transformers by hub id or folder, and the timm towers of open_clip.

B images, C input channels, H W pixels, h w patches, D dimension.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sista_pl.data.transforms import MEAN, STD
from sista_pl.errors import SistaError
from sista_pl.models.attention import watching
from sista_pl.models.hub import fetch, offline_where_unreachable
from sista_pl.models.image import IMAGE_ENCODERS, PREFIX, ImageEncoder, Renormalise, TimmEncoder
from sista_pl.models.tensors import cover, read_tensors
from sista_pl.pair import Features

NORMS = ("layernorm", "post_layernorm", "norm")  # what the families call the one behind the last block
OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# of a configuration, what says where the model was and not what it is
_ELSEWHERE = ("_name_or_path", "architectures", "dtype", "id2label", "label2id", "transformers_version")


class SelfContained(ImageEncoder):
    """An encoder whose configuration is in its state dict (as bytes): a checkpoint rebuilds it without the folder.

    Attributes:
        config: what `{name: hf, path: …, config: …}` builds it from.
    """

    config: dict[str, Any]
    renormalise: Renormalise

    def get_extra_state(self) -> Tensor:
        return torch.frombuffer(bytearray(json.dumps(self.config, sort_keys=True).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the normalisation of the weights that come with it, whatever the folder says."""
        self.config = json.loads(bytes(state.cpu().numpy().tobytes()))
        before = self.renormalise
        own = Renormalise(before.channels, self.config["mean"], self.config["std"])
        self.renormalise = own.to(before.scale.device)


class HuggingFaceEncoder(SelfContained):
    """A vision transformer of the transformers library: ViT, DeiT, DINOv2 (RAD-DINO), DINOv3, CLIP, SigLIP.

    `pooled` is what the model itself pools (DINOv2's class token, CLIP's normalised one, SigLIP's attention pooling);
    a classifier's dense pooler is dropped, its class token taken. `local` is the last hidden state without class and
    register tokens. Position embeddings are interpolated to the input.

    Args:
        model: of `AutoModel`, its vision tower alone.
        mean: of images in [0, 1], as the model was trained with.
        std: the same.
        image_size: side of the input in pixels.
        weights: where they come from, or `none`.

    Raises:
        SistaError: a model that is no plain vision transformer, an input smaller than a patch.
    """

    has_tokens = True

    def __init__(self, model: nn.Module, mean: Any, std: Any, image_size: int, weights: str = "none"):
        super().__init__()
        config: Any = model.config
        self.name, self.weights, self.image_size = str(config.model_type), weights, image_size
        norm = next((name for name in NORMS if isinstance(getattr(model, name, None), nn.Module)), None)
        patch = getattr(config, "patch_size", None)
        if norm is None or not isinstance(patch, int):
            raise SistaError(
                f"image encoder: {self.name!r} is no plain vision transformer; ViT, DINOv2, CLIP and SigLIP are, and "
                "timm has others by name"
            )
        if hasattr(getattr(model, "pooler", None), "dense"):
            setattr(model, "pooler", None)  # noqa: B010  trained for other classes; None is no module to mypy
        for name, parameter in model.named_parameters():
            if name.endswith("mask_token"):
                parameter.requires_grad_(False)  # of its pre-training alone; unused, it would stop DDP
        self.model, self.norm_name, self.patch = model, norm, patch
        self.options = {"interpolate_pos_encoding": True} if _interpolates(model) else {}
        self.renormalise = Renormalise(getattr(config, "num_channels", 3), mean, std)
        self.config = {
            "model": {k: v for k, v in config.to_dict().items() if k not in _ELSEWHERE},
            "mean": self.renormalise.mean, "std": self.renormalise.std,
        }  # fmt: skip
        if image_size < patch:
            raise SistaError(f"image encoder {self.name!r}: image_size is {image_size}, a patch alone has {patch}")
        with torch.no_grad():
            training, probe = self.training, torch.zeros(1, 1, image_size, image_size)
            pooled = self.eval()(probe).pooled
            self.train(training)
        self.dim, self.local_dim, blocks = pooled.shape[1], config.hidden_size, min(4, config.num_hidden_layers)
        self.channels, self.strides = [1] + [self.local_dim] * blocks, [1] + [patch] * blocks

    def _run(self, image: Tensor, hidden: bool = False) -> tuple[Any, int]:
        """Return the model's outputs and the number of prefix tokens."""
        found = self.model(self.renormalise(image), output_hidden_states=hidden, **self.options)
        last, patches = found.last_hidden_state, (image.shape[-2] // self.patch) * (image.shape[-1] // self.patch)
        if last.ndim != 3 or last.shape[1] < patches:
            raise SistaError(
                f"image encoder: {self.name!r} gives {tuple(last.shape[1:])} for {patches} patches, it is no plain "
                "vision transformer; ViT, DINOv2, CLIP and SigLIP are, and timm has others by name"
            )
        return found, last.shape[1] - patches

    def forward(self, image: Tensor) -> Features:
        with watching(self.needs_attention) as watched:
            found, prefix = self._run(image)
        last, pooled = found.last_hidden_state, getattr(found, "pooler_output", None)
        if pooled is None:
            pooled = last[:, 0] if prefix else last.mean(1)
        attention = None
        if watched is not None and prefix:  # the class token is the first of them
            attention = watched.weights(f"image encoder {self.name!r}", last.shape[1])[:, prefix:]  # B P
        return Features(pooled, last[:, prefix:], attention=attention)

    def tokens(self, image: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(B, 1, H, W) → of four blocks the map (B, D, h, w) and the prefix tokens (B, n, D), each normalised."""
        found, prefix = self._run(image, hidden=True)
        norm, depth = getattr(self.model, self.norm_name), len(found.hidden_states) - 1
        blocks = [(i + 1) * depth // 4 for i in range(4)] if depth >= 4 else list(range(1, depth + 1))
        states = [norm(found.hidden_states[i]) for i in blocks[:-1]]
        # CLIP normalises its class token alone, the others all tokens
        last = found.last_hidden_state
        states.append(norm(last) if hasattr(self.model, "pre_layrnorm") else last)
        grid = (image.shape[-2] // self.patch, image.shape[-1] // self.patch)
        return [(s[:, prefix:].transpose(1, 2).unflatten(2, grid), s[:, :prefix]) for s in states]

    def pyramid(self, image: Tensor) -> list[Tensor]:
        return [image, *(found for found, _ in self.tokens(image))]


class OpenClipEncoder(TimmEncoder, SelfContained):
    """The timm tower of an open_clip model (BiomedCLIP), without its projection; arguments as `TimmEncoder`."""

    def __init__(self, name: str, mean: Any, std: Any, image_size: int):
        super().__init__(name, in_chans=3, mean=mean, std=std, image_size=image_size)
        self.config = {"timm": name, "mean": self.renormalise.mean, "std": self.renormalise.std}


def _interpolates(model: nn.Module) -> bool:
    return "interpolate_pos_encoding" in inspect.signature(model.forward).parameters


@IMAGE_ENCODERS.register("hf")
def hugging_face(path: str = "", image_size: int = 224, config: Mapping[str, Any] | None = None) -> ImageEncoder:
    """A vision transformer of Hugging Face (RAD-DINO, SigLIP, CLIP, ViT, BiomedCLIP): hf:FOLDER_OR_HUB_ID.

    Args:
        path: hub id (`microsoft/rad-dino`) or local folder, of the tower or of the whole two-tower model; or a folder
            of open_clip whose tower is timm's.
        image_size: side of the input in pixels.
        config: what a checkpoint holds in place of the folder; the weights are random then.

    Raises:
        SistaError: no such folder or hub not reached, weights that don't cover the model, no plain vision transformer.
    """
    if config is not None:
        mean, std = config["mean"], config["std"]
        if "timm" in config:
            return OpenClipEncoder(config["timm"], mean, std, image_size)
        from transformers import AutoConfig, AutoModel

        return HuggingFaceEncoder(_tower(AutoModel.from_config(AutoConfig.for_model(**config["model"]))),
                                  mean, std, image_size)  # fmt: skip
    if not path:
        raise SistaError(f"image encoder 'hf': no path; write {PREFIX}FOLDER, or {PREFIX}microsoft/rad-dino")
    return _open_clip(path, image_size) or _transformers(path, image_size)


def _transformers(path: str, image_size: int) -> HuggingFaceEncoder:
    from transformers import AutoConfig, AutoModel

    told = f"image encoder {PREFIX + path!r}"
    try:
        with offline_where_unreachable(), _quiet():
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            config = getattr(config, "vision_config", config)
            model, info = AutoModel.from_pretrained(
                path, config=config, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
            )
    except Exception as why:  # a folder of any content
        reason = (str(why).strip().splitlines() or [type(why).__name__])[0][:160]
        if fetch(path, "config.json") is not None:
            raise SistaError(f"{told}: it can't be loaded ({reason}); is it a vision model, whole?") from why
        raise SistaError(
            f"{told}: no folder with a config.json, and the hub is no help ({reason}); where there is a network run "
            f"`hf download {path} --local-dir DIR`, then write {PREFIX}DIR"
        ) from why
    lost = sorted(name for name in info["missing_keys"] if "pooler." not in name and "mask_token" not in name)
    if lost:
        raise SistaError(f"{told}: its weights lack {len(lost)} tensors (first: {lost[0]}); is it of this model?")
    file = fetch(path, "preprocessor_config.json") or fetch(path, "processor_config.json")
    stated = _read(file) if file is not None else {}
    stated = stated.get("image_processor", stated)
    if stated.get("do_normalize", True):
        mean, std = stated.get("image_mean") or MEAN, stated.get("image_std") or STD
    else:
        mean, std = 0.0, 1.0
    return HuggingFaceEncoder(_tower(model), mean, std, image_size, weights=path)


def _tower(model: nn.Module) -> nn.Module:
    return getattr(model, "vision_model", model)  # some versions wrap it once more


def _open_clip(path: str, image_size: int) -> OpenClipEncoder | None:
    """Return the tower of an open_clip folder or repository, or None where it is none with a timm tower."""
    file = fetch(path, "open_clip_config.json")
    found = {} if file is None else _read(file)
    name = found.get("model_cfg", {}).get("vision_cfg", {}).get("timm_model_name")
    if name is None:
        return None
    stated = found.get("preprocess_cfg", {})
    encoder = OpenClipEncoder(name, stated.get("mean") or MEAN, stated.get("std") or STD, image_size)
    weights = next((file for file in (fetch(path, name) for name in OPEN_CLIP) if file is not None), None)
    if weights is None:
        raise SistaError(f"image encoder {PREFIX + path!r}: it has no weights; one of {', '.join(OPEN_CLIP)} is needed")
    coverage = cover(encoder, read_tensors(weights), ["visual.trunk."], str(weights))
    if coverage.share < 1:
        raise SistaError(f"image encoder {PREFIX + path!r}: {coverage}; copy the folder again")
    coverage.load(encoder)
    encoder.weights = path
    return encoder


def _read(file: Any) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as why:
        raise SistaError(f"image encoder: {file} can't be read ({type(why).__name__}); copy it again") from None
    return found if isinstance(found, dict) else {}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's bars and its table of the other tower's keys from the user; what is missing we say."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
