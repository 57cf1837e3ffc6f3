"""Configurations that come with the package or with a plug-in, found by name."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

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


def said(name: str) -> dict[str, str]:
    """Return by name the SHA-256 of what a configuration says, comments left out, and each that it refers to.

    One refers to another as `data: data/x.yaml`, seen from its own folder.

    Raises:
        SistaError: no such file, or not YAML.
    """
    found: dict[str, str] = {}
    todo = [(name, Path(name) if Path(name).is_file() else _installed(name))]
    while todo:
        name, path = todo.pop()
        try:
            given = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as why:
            raise SistaError(f"config {path}: not YAML: {' '.join(str(why).split())[:200]}; check that place") from None
        found[name] = sha256(json.dumps(given, default=str).encode()).hexdigest()
        for word in _words(given):
            other = posixpath.normpath(posixpath.join(posixpath.dirname(name), word))
            if word.endswith(".yaml") and other not in found and (path.parent / word).is_file():
                todo.append((other, path.parent / word))
    return found


@cache
def _installed(name: str) -> Path:
    """`find` a packaged configuration: it is where it is as long as the process lives, whatever it says."""
    return find(name)


def _words(given: Any) -> Iterator[str]:
    """Yield the texts among the values of YAML."""
    if isinstance(given, str):
        yield given
    elif isinstance(given, (dict, list)):
        for value in given.values() if isinstance(given, dict) else given:
            yield from _words(value)
