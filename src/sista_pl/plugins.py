"""Plug-ins by entry points: `sista.tasks` names a task class, `sista.plugins` a module imported for its registrations.

A broken plug-in is one warning line, never fatal.
"""

from __future__ import annotations

import sys
from functools import cache
from hashlib import sha256
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TASKS, PLUGINS = "sista.tasks", "sista.plugins"
OURS = "sista-pl"


def task_entries() -> dict[str, EntryPoint]:
    """Return the installed tasks by name, from metadata alone: nothing is imported."""
    return {entry.name: entry for entry in sorted(entry_points(group=TASKS), key=lambda e: e.name)}


def plugin_entries() -> dict[str, EntryPoint]:
    """Return the installed plug-in modules by name, from metadata alone."""
    return {entry.name: entry for entry in sorted(entry_points(group=PLUGINS), key=lambda e: e.name)}


def sources() -> list[tuple[str, Path]]:
    """Return name and file of the Python sources of this package, the installed tasks and plug-ins, unimported."""
    found = []
    entries = [*task_entries().values(), *plugin_entries().values()]
    for package in sorted({__package__, *(entry.module.partition(".")[0] for entry in entries)}):
        spec = find_spec(package)
        if spec is None:  # its warning comes when it is loaded
            continue
        for folder in map(Path, spec.submodule_search_locations or ()):
            found += [(f"{package}/{p.relative_to(folder).as_posix()}", p) for p in sorted(folder.rglob("*.py"))]
        if not spec.submodule_search_locations and spec.origin:
            found.append((package, Path(spec.origin)))
    return found


@cache
def code_hash() -> str:
    """Return 12 digits of the SHA-256 of `sources()`: results of two hashes were made by code that differs."""
    digest = sha256()
    for name, path in sources():
        digest.update(f"{name}\0{sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


@cache
def load() -> dict[str, Any]:
    """Import every plug-in and task once, which registers them; return the task classes by name."""
    load_modules()
    tasks = {name: _load(entry) for name, entry in task_entries().items()}
    return {name: task for name, task in tasks.items() if task is not None}


def load_modules() -> None:
    """Import the plug-in modules alone, for the encoders and losses of others; tasks would bring Lightning, too."""
    for entry in plugin_entries().values():
        _load(entry)


def load_others() -> None:
    """Import what other packages bring: our own tasks register neither loss nor encoder, and would bring Lightning."""
    load_modules()
    for entry in task_entries().values():
        if entry.dist is None or entry.dist.name != OURS:
            _load(entry)


def _load(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as why:  # somebody else's code: whatever it raises, the rest must work
        source = entry.dist.name if entry.dist is not None else "unknown package"
        reason = (str(why).strip().splitlines() or [""])[0]
        print(
            f"sista: warning: plug-in {entry.name} of {source} ({entry.value}) is left out: "
            f"{type(why).__name__}: {reason}",
            file=sys.stderr,
        )
        return None
