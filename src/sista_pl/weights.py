"""Pre-trained weights, of whatever source, into an image encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sista_pl.checkpoint import image_spec, read_checkpoint
from sista_pl.data.transforms import MEAN, STD
from sista_pl.errors import SistaError, did_you_mean
from sista_pl.exported import checked, exported_spec
from sista_pl.models import IMAGE_ENCODERS, ImageEncoder
from sista_pl.models.image import PREFIX, Renormalise
from sista_pl.models.tensors import MINIMUM, Coverage, cover, read_tensors

# Where other projects keep the image encoder, as their key names say; tried on made-up keys only, no such file was at
# hand. Prefixes in the order in which they are looked for. MRM's file needs none: timm's names under `model`.
PRESETS = {
    "mgca": ("img_encoder_q.model.",),
    "gloria": ("gloria.img_encoder.model.", "img_encoder.model."),
}
_KEYS = ("path", "prefix", "preset", "minimum")
_BUILD_IT = "--model.image_encoder null builds it as it was trained"
_PREFIXES = ("image_encoder.model.", "image_encoder.", "backbone.", "visual.trunk.", "encoder.", "model.", "")


def load_weights(encoder: ImageEncoder, weights: str | Path | Mapping[str, Any], minimum: float = MINIMUM) -> Coverage:
    """Load pre-trained weights into an image encoder; nothing is loaded where they cover too little of it.

    Args:
        encoder: which they are for.
        weights: a checkpoint of `sista fit`, a folder of it or of `sista export`, a file of timm's or torchvision's
            keys (`.safetensors`, `.pth`, `.bin`), or for a checkpoint of another project
            `{path: FILE, prefix: backbone.}`, `{path: FILE, preset: mgca | gloria}`, each with `minimum: 0.95` where it
            should be another.
        minimum: share of the encoder that must be found.

    Raises:
        SistaError: no such file, one that can't be read, less than `minimum` of the encoder in it, or weights that
            were trained with another normalisation of images.
    """
    spec: dict[str, Any] = dict(weights) if isinstance(weights, Mapping) else {"path": weights}
    for key in spec:
        if key not in _KEYS:
            raise SistaError(f"weights: no key {key!r}; {did_you_mean(str(key), _KEYS)}")
    if not spec.get("path"):
        raise SistaError("weights: no path; write {path: FILE, prefix: backbone.}")
    if "prefix" in spec and "preset" in spec:
        raise SistaError("weights: prefix and preset, where a preset is a prefix by name; give one of them")
    minimum = spec.get("minimum", minimum)
    if isinstance(minimum, bool) or not isinstance(minimum, (int, float)) or not 0 <= minimum <= 1:
        raise SistaError(f"weights: minimum is {minimum!r}; give a share from 0 to 1, as 0.95")
    path = checked(Path(spec["path"]))
    file = path / "model.safetensors" if path.is_dir() else path
    coverage = cover(encoder, read_tensors(file), _prefixes(spec), str(path))
    if coverage.share < minimum:
        holds = _architecture(path)
        told = f"it holds {holds}; {_BUILD_IT}" if holds else "is it of this model? see `prefix`"
        first = ", ".join((coverage.mismatched + coverage.missing)[:3])
        raise SistaError(f"{coverage}: less than {minimum:.0%} is covered (first: {first}); {told}")
    trained, own = _normalisation(encoder_spec(spec)), getattr(encoder, "renormalise", None)
    if trained is not None and isinstance(own, Renormalise) and not _alike(trained, own):
        raise SistaError(
            f"weights: {path} was trained on images of mean {trained.mean} and std {trained.std}, the image encoder "
            f"has {own.mean} and {own.std}; {_BUILD_IT}"
        )
    coverage.load(encoder)
    return coverage


def encoder_spec(weights: str | Path | Mapping[str, Any]) -> Any:
    """Return the image encoder's spec that a SISTA checkpoint or an exported folder holds, or None."""
    path = Path((weights.get("path") or "") if isinstance(weights, Mapping) else weights)
    if path.is_dir():
        return exported_spec(path)
    if path.suffix != ".ckpt":
        return None
    try:
        return image_spec(read_checkpoint(path), path)
    except SistaError:
        return None


def _prefixes(spec: Mapping[str, Any]) -> tuple[str, ...]:
    if "preset" in spec:
        if spec["preset"] not in PRESETS:
            raise SistaError(f"weights: preset {spec['preset']!r}; {did_you_mean(str(spec['preset']), PRESETS)}")
        return PRESETS[spec["preset"]]
    if "prefix" in spec:
        prefix = str(spec["prefix"] or "").rstrip(".")
        return (f"{prefix}." if prefix else "",)
    return _PREFIXES


def _architecture(path: Path) -> str | None:
    """Return what a checkpoint or an exported folder says that it holds."""
    spec = encoder_spec(path)
    if spec is None:
        return None
    name, arguments = IMAGE_ENCODERS.split(spec)
    if name != "hf":
        return name
    model = arguments.get("config", {}).get("model", {})
    return f"{PREFIX}{arguments['path']}" if arguments.get("path") else model.get("model_type", "a tower of open_clip")


def _normalisation(spec: Any) -> Renormalise | None:
    """Return the normalisation that a spec states or means, or None where there is no spec, or a folder has it."""
    if spec is None:
        return None
    name, arguments = IMAGE_ENCODERS.split(spec)
    if name == "hf" and "config" not in arguments:
        return None
    stated = arguments.get("config", arguments)
    return Renormalise(3 if name == "hf" else arguments.get("in_chans", 1), stated.get("mean", MEAN),
                       stated.get("std", STD))  # fmt: skip


def _alike(one: Renormalise, other: Renormalise) -> bool:
    """Whether a grey image comes out alike, once repeated in three channels and once in one."""
    pairs = ((one.mean, other.mean), (one.std, other.std))
    return all(np.allclose(np.broadcast_to(a, 3), np.broadcast_to(b, 3), rtol=1e-5) for a, b in pairs)
