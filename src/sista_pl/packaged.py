"""Configurations that come with the package, found by name."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from sista_pl.errors import SistaError, did_you_mean


def folder() -> Path:
    """Return the folder of the packaged configurations."""
    return Path(str(files("sista_pl.configs")))


def names() -> list[str]:
    """Return the packaged configurations, as `--config` takes them."""
    root = folder()
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*.yaml"))


def find(name: str) -> Path:
    """Return the file that `--config NAME` means: a path, or a packaged configuration with or without `.yaml`.

    Raises:
        SistaError: neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    for candidate in (name, f"{name}.yaml"):
        if candidate in names():
            return folder() / candidate
    raise SistaError(f"config {name!r}: no such file and no packaged configuration; {did_you_mean(name, names())}")
