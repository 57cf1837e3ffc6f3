"""Encoders out of the checkpoints of `sista fit`: no CLI, no hub."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sista_pl.errors import SistaError
from sista_pl.models import IMAGE_ENCODERS, TEXT_ENCODERS, ImageEncoder, TextEncoder
from sista_pl.models.text import from_state


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a Lightning checkpoint, plain values only.

    Raises:
        SistaError: absent, cut short, or not a checkpoint of a SISTA task.
    """
    path = Path(path)
    if not path.is_file():
        raise SistaError(f"checkpoint {path}: no such file; `sista list runs` shows what there is")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile, KeyError, ValueError) as why:
        raise SistaError(
            f"checkpoint {path}: it can't be read, it is cut short or no checkpoint ({type(why).__name__}); "
            "copy it again, or take another one of the run"
        ) from why
    if not isinstance(checkpoint, dict) or not {"state_dict", "hyper_parameters"} <= set(checkpoint):
        raise SistaError(f"checkpoint {path}: it has no state_dict with hyper_parameters; is it from `sista fit`?")
    return checkpoint


def load_encoder(path: str | Path) -> ImageEncoder:
    """Return the pre-trained image encoder of a checkpoint, in eval mode.

    Args:
        path: a `.ckpt` of `sista fit --config pretrain.yaml`.

    Raises:
        SistaError: not such a checkpoint, or weights that don't cover the encoder.
    """
    return image_encoder_of(read_checkpoint(path), path)


def image_encoder_of(checkpoint: Mapping[str, Any], path: str | Path) -> ImageEncoder:
    """Return the image encoder of a checkpoint that is read already; `path` is for the messages."""
    size = checkpoint["hyper_parameters"].get("image_size", 224)
    name, arguments = IMAGE_ENCODERS.split(image_spec(checkpoint, path))
    arguments.pop("weights", None)  # they would be overwritten, and may need a hub
    encoder = IMAGE_ENCODERS.build({"name": name, **arguments}, image_size=size)
    _load(encoder, checkpoint["state_dict"], "image_encoder.", path)
    return encoder.eval()


def image_spec(checkpoint: Mapping[str, Any], path: str | Path) -> Any:
    """Return the spec of a checkpoint's image encoder, with the configuration of one of Hugging Face in it.

    Raises:
        SistaError: the checkpoint names no image encoder.
    """
    spec = _hyper(checkpoint, path, "image_encoder")
    state = checkpoint["state_dict"].get("image_encoder._extra_state")
    name, arguments = IMAGE_ENCODERS.split(spec)
    if name != "hf" or state is None:
        return spec
    return {"name": name, **arguments, "config": json.loads(bytes(state.cpu().numpy().tobytes()))}


def load_text_encoder(path: str | Path) -> TextEncoder:
    """Return the text encoder of a checkpoint with its tokenizer, in eval mode; arguments as `load_encoder`."""
    return text_encoder_of(read_checkpoint(path), path)


def text_encoder_of(checkpoint: Mapping[str, Any], path: str | Path) -> TextEncoder:
    """Return the text encoder of a checkpoint that is read already; `path` is for the messages."""
    name, arguments = TEXT_ENCODERS.split(_hyper(checkpoint, path, "text_encoder"))
    state = checkpoint["state_dict"].get("text_encoder._extra_state")
    if name in TEXT_ENCODERS and name != "small-bert":
        encoder = TEXT_ENCODERS.build({"name": name, **arguments})
    elif state is not None:
        options = {k: v for k, v in arguments.items() if k in ("max_tokens", "pooling")}
        if name == "small-bert":
            options.setdefault("pooling", "mean")
        encoder = from_state(state, **options)
    else:
        raise SistaError(
            f"checkpoint {path}: it holds no text encoder configuration; was it written by an older version?"
        )
    _load(encoder, checkpoint["state_dict"], "text_encoder.", path)
    return encoder.eval()


def _hyper(checkpoint: Mapping[str, Any], path: str | Path, key: str) -> Any:
    if key not in checkpoint["hyper_parameters"]:
        known = ", ".join(sorted(checkpoint["hyper_parameters"]))
        raise SistaError(f"checkpoint {path}: it has no {key} (it has {known}); give one of a pre-training")
    return checkpoint["hyper_parameters"][key]


def _load(module: nn.Module, state: Mapping[str, Any], prefix: str, path: str | Path) -> None:
    part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    try:
        module.load_state_dict(part)
    except RuntimeError as why:
        first = str(why).strip().splitlines()[-1].strip()[:200]
        raise SistaError(f"checkpoint {path}: its {prefix}* does not fit the encoder it names ({first})") from why
