"""Configurations that come with the package or with a plug-in, found by name."""

from __future__ import annotations

from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from sista_pl import plugins
from sista_pl.errors import SistaError, did_you_mean


def plugin_folders() -> list[Path]:
    """Return the folders of the plug-ins' packages; they are found, not imported."""
    found: list[Path] = []
    entries = [*plugins.task_entries().values(), *plugins.plugin_entries().values()]
    for package in dict.fromkeys(entry.module.split(".")[0] for entry in entries):
        spec = find_spec(package)
        found += map(Path, (spec.submodule_search_locations or []) if spec is not None else [])
    return found


def folders() -> list[Path]:
    """Return the folders of packaged configurations: our own, then `configs` of each plug-in's package."""
    found = [Path(str(files("sista_pl.configs")))]
    for place in plugin_folders():
        folder = place / "configs"
        if folder.is_dir() and folder.resolve() not in [known.resolve() for known in found]:
            found.append(folder)
    return found


def files_by_name() -> dict[str, Path]:
    """Return the packaged configurations, as `--config` takes them; a name of ours is never another's."""
    found: dict[str, Path] = {}
    for folder in folders():
        for path in sorted(folder.rglob("*.yaml")):
            found.setdefault(path.relative_to(folder).as_posix(), path)
    return dict(sorted(found.items()))


def names() -> list[str]:
    """Return the names of the packaged configurations."""
    return list(files_by_name())


def find(name: str) -> Path:
    """Return the file that `--config NAME` means: a path, or a packaged configuration with or without `.yaml`.

    Raises:
        SistaError: neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = files_by_name()
    for candidate in (name, f"{name}.yaml"):
        if candidate in known:
            return known[candidate]
    raise SistaError(f"config {name!r}: no such file and no packaged configuration; {did_you_mean(name, known)}")
