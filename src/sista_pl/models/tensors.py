"""Tensors of a file, by name, into an image encoder."""

from __future__ import annotations

import argparse
import math
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from sista_pl.errors import SistaError


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, wrappers (`state_dict`, `module.`) taken off.

    Raises:
        SistaError: no such file, one that can't be read, or holds more than plain values, or no tensors.
    """
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


@dataclass
class Coverage:
    """How weights fit an encoder.

    Args:
        source: the file.
        matched, missing, unexpected, mismatched: names of tensors.
        share: of the encoder's tensors that are matched, or of its numbers where that is less.
        found: the matched tensors in the encoder's shapes, by its own names.
    """

    source: str
    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]
    share: float
    found: dict[str, Tensor] = field(repr=False)

    def __str__(self) -> str:
        every = len(self.matched) + len(self.missing) + len(self.mismatched)
        return (
            f"weights: {self.source}: matched {len(self.matched)} of {every} tensors ({self.share:.1%} of it), "
            f"missing {len(self.missing)}, unexpected {len(self.unexpected)}, mismatched {len(self.mismatched)}"
        )

    def load(self, encoder: nn.Module) -> None:
        """Load what was found; the encoder's other tensors stay.

        Raises:
            SistaError: a value that is not finite.
        """
        bad = [name for name, value in self.found.items() if value.is_floating_point() and not value.isfinite().all()]
        if bad:
            raise SistaError(
                f"weights: {self.source}: {bad[0]} has values that are not finite; take another checkpoint"
            )
        encoder.load_state_dict(encoder.state_dict() | self.found)


MINIMUM = 0.95  # share of an encoder that weights have to cover, where nothing else is asked for


def cover(encoder: nn.Module, state: Mapping[str, Tensor], prefixes: Sequence[str], source: str) -> Coverage:
    """Return how tensors fit an encoder, under that of the prefixes which fits best; nothing is loaded."""
    own = encoder.state_dict()
    wanted = {k: v for k, v in own.items() if isinstance(v, Tensor) and not k.endswith("_extra_state")}
    inner = _inner(wanted)
    part = max((_under(state, prefix) for prefix in prefixes), key=lambda found: len(found.keys() & inner.keys()))
    found: dict[str, Tensor] = {}
    matched, mismatched = [], []
    for name, target in inner.items():
        if name in part:
            fitted = _fitted(name, part[name], wanted[target], encoder)
            if fitted is None:
                mismatched.append(name)
            else:
                found[target] = fitted
                matched.append(name)
    # counters of batches are no weights: torchvision's files of old have none
    missing = sorted(name for name in inner if name not in part and not name.endswith("num_batches_tracked"))
    by_name = len(found) / max(1, len(found) + len(missing) + len(mismatched))
    # the last stage holds most of a ResNet's numbers: 96 % of a resnet10t can come from a resnet18
    by_number = sum(v.numel() for v in found.values()) / max(1, sum(wanted[name].numel() for name in inner.values()))
    return Coverage(
        source, sorted(matched), missing, sorted(part.keys() - inner.keys()), sorted(mismatched),
        min(by_name, by_number), found,
    )  # fmt: skip


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _inner(wanted: Mapping[str, Tensor]) -> dict[str, str]:
    """Return {name as the library's own files have it: name in the encoder}; ours wrap the model as `model`."""
    if wanted and all(name.startswith("model.") for name in wanted):
        return {name.removeprefix("model."): name for name in wanted}
    return {name: name for name in wanted}


def _fitted(name: str, value: Tensor, target: Tensor, encoder: nn.Module) -> Tensor | None:
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
        grid, other = (math.isqrt(max(0, each.shape[1] - prefix)) for each in (target, value))
        if (prefix + grid * grid, prefix + other * other) == (target.shape[1], value.shape[1]):
            return resample_abs_pos_embed(value, [grid, grid], num_prefix_tokens=prefix).to(target.dtype)
    return None
