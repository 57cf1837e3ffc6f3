"""Encoders out of checkpoints, and foreign weights into encoders: no CLI, no hub."""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from sista_pl.errors import SistaError, did_you_mean
from sista_pl.models import IMAGE_ENCODERS, TEXT_ENCODERS, ImageEncoder, TextEncoder
from sista_pl.models.image import PREFIX, TimmEncoder
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
    spec, size = _hyper(checkpoint, path, "image_encoder"), checkpoint["hyper_parameters"].get("image_size", 224)
    name, arguments = IMAGE_ENCODERS.split(_without_folder(spec, checkpoint))
    arguments.pop("weights", None)  # they would be overwritten, and may need a hub
    encoder = IMAGE_ENCODERS.build({"name": name, **arguments}, image_size=size)
    _load(encoder, checkpoint["state_dict"], "image_encoder.", path)
    return encoder.eval()


def _without_folder(spec: Any, checkpoint: Mapping[str, Any]) -> Any:
    """Return the spec of the image encoder of a checkpoint, with the configuration of one of Hugging Face in it."""
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


# Where other projects keep the image encoder, as their key names say; tried on made-up keys only, no such file was at
# hand. Prefixes in the order in which they are looked for. MRM's file needs none: timm's names under `model`.
PRESETS = {
    "mgca": ("img_encoder_q.model.",),
    "gloria": ("gloria.img_encoder.model.", "img_encoder.model."),
}
_KEYS = ("path", "prefix", "preset", "minimum")
_PREFIXES = ("image_encoder.model.", "image_encoder.", "backbone.", "visual.trunk.", "encoder.", "model.", "")


@dataclass
class Coverage:
    """How weights fit an encoder.

    Args:
        source: the file.
        matched, missing, unexpected, mismatched: names of tensors.
        share: of the encoder's tensors that are matched, or of its numbers where that is less.
    """

    source: str
    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]
    share: float

    def __str__(self) -> str:
        every = len(self.matched) + len(self.missing) + len(self.mismatched)
        return (
            f"weights: {self.source}: matched {len(self.matched)} of {every} tensors ({self.share:.1%} of it), "
            f"missing {len(self.missing)}, unexpected {len(self.unexpected)}, mismatched {len(self.mismatched)}"
        )


def load_weights(encoder: ImageEncoder, weights: str | Path | Mapping[str, Any], minimum: float = 0.95) -> Coverage:
    """Load pre-trained weights into an image encoder; nothing is loaded where they cover too little of it.

    Args:
        encoder: which they are for.
        weights: a checkpoint of `sista fit`, a folder of it or of `sista export`, a file of timm's or torchvision's
            keys (`.safetensors`, `.pth`, `.bin`), or for a checkpoint of another project
            `{path: FILE, prefix: backbone.}`, `{path: FILE, preset: mgca | gloria}`, each with `minimum: 0.95` where it
            should be another.
        minimum: share of the encoder that must be found.

    Raises:
        SistaError: no such file, one that can't be read, or less than `minimum` of the encoder in it.
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
    path = _checked(Path(spec["path"]))
    state = _tensors(path)
    own = encoder.state_dict()
    wanted = {k: v for k, v in own.items() if isinstance(v, Tensor) and not k.endswith("_extra_state")}
    inner = _inner(encoder, wanted)
    candidates = _prefixes(spec)
    part = max(
        (_under(state, prefix) for prefix in candidates),
        key=lambda found: len(found.keys() & inner.keys()),
    )
    loaded: dict[str, Tensor] = {}
    matched, mismatched = [], []
    for name, target in inner.items():
        if name in part:
            fitted = _fitted(name, part[name], wanted[target], encoder)
            if fitted is None:
                mismatched.append(name)
            else:
                loaded[target] = fitted
                matched.append(name)
    missing = sorted(name for name in inner if name not in part)
    # counters of batches are no weights: torchvision's files of old have none
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    numbers = sum(wanted[target].numel() for target in inner.values())
    found = len(loaded) / max(1, len(loaded) + len(missing) + len(mismatched))
    # the last stage holds most of a ResNet's numbers: 96 % of a resnet10t can come from a resnet18
    share = min(found, sum(value.numel() for value in loaded.values()) / max(1, numbers))
    coverage = Coverage(
        str(path),
        sorted(matched),
        missing,
        sorted(part.keys() - inner.keys()),
        sorted(mismatched),
        share,
    )
    if share < minimum:
        holds = _architecture(path)
        told = f"it holds {holds}; --model.image_encoder {holds}" if holds else "is it of this model? see `prefix`"
        first = ", ".join((mismatched + missing)[:3])
        raise SistaError(f"{coverage}: less than {minimum:.0%} is covered (first: {first}); {told}")
    bad = [name for name, value in loaded.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise SistaError(f"weights: {path}: {bad[0]} has values that are not finite; take another checkpoint")
    encoder.load_state_dict(own | loaded)
    return coverage


def encoder_spec(weights: str | Path | Mapping[str, Any]) -> Any:
    """Return the image encoder's spec that a SISTA checkpoint or an exported folder holds, or None."""
    path = Path((weights.get("path") or "") if isinstance(weights, Mapping) else weights)
    if path.is_dir():
        return _exported_spec(path)
    if path.suffix != ".ckpt":
        return None
    try:
        checkpoint = read_checkpoint(path)
    except SistaError:
        return None
    spec = checkpoint["hyper_parameters"].get("image_encoder")
    return None if spec is None else _without_folder(spec, checkpoint)


MARK = "sista.json"  # in a folder that `sista export` wrote


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def encoder_hash(encoder: ImageEncoder) -> str:
    """SHA-256 over an encoder's class, the normalisation of its input, names, shapes and values."""
    digest = hashlib.sha256(f"{type(encoder).__module__}.{type(encoder).__qualname__}".encode())
    digest.update(str(getattr(encoder, "name", "")).encode())
    if hasattr(encoder, "renormalise"):
        digest.update(str((encoder.renormalise.mean, encoder.renormalise.std)).encode())
    for name, value in sorted(encoder.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file or an exported folder, wrappers taken off."""
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise SistaError(f"weights: {file}: no such file; give a checkpoint of `sista fit`, or a file of weights")
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except Exception as why:  # the library has an exception of its own
            raise SistaError(f"weights: {file} can't be read ({type(why).__name__}); copy it again") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as why:
        with file.open("rb") as opened:
            if opened.read(2) not in (b"PK", b"\x80\x02"):  # torch.save's two forms
                raise SistaError(f"weights: {file} is no file of torch.save; copy it again, whole") from None
        raise SistaError(
            f"weights: {file} holds more than tensors ({' '.join(str(why).split())[:80]}…); keep the tensors alone, "
            "where you trust it: torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'weights.pth')"
        ) from None
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, KeyError, ValueError) as why:
        raise SistaError(f"weights: {file} can't be read ({type(why).__name__}); copy it again") from None
    for key in ("state_dict", "model", "teacher", "params"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not any(isinstance(v, Tensor) for v in found.values()):
        told = f"only {', '.join(map(str, list(found)[:5]))}" if isinstance(found, dict) and found else "nothing"
        raise SistaError(f"weights: {file} has no tensors by name ({told}); keep them alone: torch.save(state_dict, …)")
    return {str(k).removeprefix("module."): v for k, v in found.items() if isinstance(v, Tensor)}


def _prefixes(spec: Mapping[str, Any]) -> tuple[str, ...]:
    if "preset" in spec:
        if spec["preset"] not in PRESETS:
            raise SistaError(f"weights: preset {spec['preset']!r}; {did_you_mean(str(spec['preset']), PRESETS)}")
        return PRESETS[spec["preset"]]
    if "prefix" in spec:
        prefix = str(spec["prefix"] or "").rstrip(".")
        return (f"{prefix}." if prefix else "",)
    return _PREFIXES


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _inner(encoder: ImageEncoder, wanted: Mapping[str, Tensor]) -> dict[str, str]:
    """Return {name as the library's own files have it: name in the encoder}; ours wrap the model as `model`."""
    if wanted and all(name.startswith("model.") for name in wanted):
        return {name.removeprefix("model."): name for name in wanted}
    return {name: name for name in wanted}


def _fitted(name: str, value: Tensor, target: Tensor, encoder: ImageEncoder) -> Tensor | None:
    """Return a tensor in the shape of the encoder's, or None where it is of another model."""
    if value.shape == target.shape:
        return value.to(target.dtype)
    if value.ndim == 4 and value.shape[0] == target.shape[0] and value.shape[2:] == target.shape[2:]:
        if (value.shape[1], target.shape[1]) == (3, 1):
            return value.sum(1, keepdim=True).to(target.dtype)  # grey, repeated, gives the same sum
        if (value.shape[1], target.shape[1]) == (1, 3):
            return (value / 3).expand(-1, 3, -1, -1).to(target.dtype).contiguous()
    if name.endswith("pos_embed") and value.ndim == 3 == target.ndim and value.shape[2] == target.shape[2]:
        model = getattr(encoder, "model", encoder)
        # some models add class and registers after the positions
        prefix = 0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 1)
        grid = round((target.shape[1] - prefix) ** 0.5)
        if prefix + grid * grid == target.shape[1]:
            return resample_abs_pos_embed(value, [grid, grid], num_prefix_tokens=prefix).to(target.dtype)
    return None


def _architecture(path: Path) -> str | None:
    """Return what a checkpoint or an exported folder says that it holds, as the configuration would have it."""
    spec = encoder_spec(path)
    if spec is None:
        return None
    name, arguments = IMAGE_ENCODERS.split(spec)
    return f"{PREFIX}{arguments.get('path', '')}" if name == "hf" else name


def _facts(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the folder that `sista export` wrote, and what it says of it; `path` is the folder, or its `image`."""
    for root in (path, path.parent) if path.name == "image" else (path,):
        if (root / MARK).is_file():
            try:
                facts = json.loads((root / MARK).read_text())
                facts["format"], facts["files"].items(), facts["needs"].items(), facts["image"]["encoder"]["name"]
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                raise SistaError(f"weights: {root / MARK} can't be read; export again") from None
            return root, facts
    return None


def _checked(path: Path) -> Path:
    """Return where the image encoder of an exported folder lies, its files compared; another path is as it is.

    Raises:
        SistaError: a file that was changed, a form without weights, another major version of the library.
    """
    found = _facts(path) if path.is_dir() else None
    if found is None:
        return path
    root, facts = found
    if facts["format"] == "onnx":
        raise SistaError(f"weights: {root} is of ONNX, which is run and not trained; export again, --to timm")
    for library, number in facts["needs"].items():
        if version(library).split(".")[0] != str(number).split(".")[0]:
            raise SistaError(
                f"weights: {root} was exported with {library} {number}, {version(library)} is installed; install "
                f"'{library}=={number}', or export again"
            )
    for name, told in facts["files"].items():
        if name == "README.md":
            continue  # its owner may write into it
        if not (root / name).is_file() or file_hash(root / name) != told["sha256"]:
            state = "was changed" if (root / name).is_file() else "is missing"
            raise SistaError(f"weights: {root / name} {state} since it was exported; copy the folder again, or export")
    return root / "image" if facts["format"] == "hf" else root


def _exported_spec(folder: Path) -> dict[str, Any] | None:
    """Return the spec of what `sista export` or `export_timm` wrote."""
    if found := _facts(folder):
        return found[1]["image"]["encoder"]
    try:
        config = json.loads((folder / "config.json").read_text())
        pretrained = config["pretrained_cfg"]
        return {"name": config["architecture"], "in_chans": pretrained["input_size"][0],
                "mean": pretrained["mean"], "std": pretrained["std"]}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def export_timm(encoder: ImageEncoder, folder: Path, image_size: int) -> Path | None:
    """Write a timm encoder as `model.safetensors` (timm's own keys) and `config.json`.

    `timm.create_model(architecture, checkpoint_path=…, num_classes=0, in_chans=…)` loads it.

    Returns:
        the folder, or None where the encoder is not timm's.
    """
    if not isinstance(encoder, TimmEncoder):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in encoder.model.state_dict().items()}
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial)
    config = {
        "architecture": encoder.name, "num_classes": 0, "num_features": encoder.dim,
        "pretrained_cfg": {"input_size": [encoder.in_chans, image_size, image_size],
                           "mean": encoder.renormalise.mean, "std": encoder.renormalise.std},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    partial.replace(folder / "model.safetensors")
    return folder
