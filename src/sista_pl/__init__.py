"""Pre-train a chest X-ray image-report encoder and carry it into downstream tasks.

The public nouns: `Registry`, `Features`, `Pair`, `ImageEncoder`, `TextEncoder`, `BaseTask`, `BaseDataModule`, and
`load_encoder`. Importing the package imports none of them, so that light verbs stay light.
"""

from __future__ import annotations

from typing import Any

_PUBLIC = {
    "BaseDataModule": "sista_pl.data.module",
    "BaseTask": "sista_pl.task",
    "Features": "sista_pl.pair",
    "ImageEncoder": "sista_pl.models",
    "IMAGE_ENCODERS": "sista_pl.models",
    "LOSSES": "sista_pl.losses",
    "Pair": "sista_pl.pair",
    "Registry": "sista_pl.registry",
    "Step": "sista_pl.task",
    "TEXT_ENCODERS": "sista_pl.models",
    "TextEncoder": "sista_pl.models",
    "load_encoder": "sista_pl.checkpoint",
    "load_text_encoder": "sista_pl.checkpoint",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sista_pl' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)
