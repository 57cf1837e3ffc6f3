"""The folder of an encoder that was exported: written, compared with what was written, and what it says of itself."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from sista_pl.atomic import writing
from sista_pl.errors import SistaError
from sista_pl.models.image import ImageEncoder, TimmEncoder

MARK = "sista.json"  # in a folder that `sista export` wrote


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
    config = {
        "architecture": encoder.name, "num_classes": 0, "num_features": encoder.dim,
        "pretrained_cfg": {"input_size": [encoder.in_chans, image_size, image_size],
                           "mean": encoder.renormalise.mean, "std": encoder.renormalise.std},
    }  # fmt: skip
    with writing(folder / "model.safetensors") as partial:
        save_file(tensors, partial)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


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


def checked(path: Path) -> Path:
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


def exported_spec(folder: Path) -> dict[str, Any] | None:
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
