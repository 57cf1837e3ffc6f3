"""`sista bench startup`: how long a fresh process takes to answer, against one that only imports Lightning's CLI."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from typing import Any

from sista_pl.errors import SistaError

IMPORTED = "pytorch_lightning.cli"
IMPORT = f"import of {IMPORTED}"
# the most times the import that each may take; a test has what the first five must not import
BOUNDS = {
    "list": 0.1, "list tasks": 0.1, "list configs": 0.1, "list datasets": 0.1, "--help": 0.1,
    "list losses": 0.8, "list encoders": 0.8, "fit --help": 1.3,
}  # fmt: skip


def measure(rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Start each command and the import in turn, `rounds` times after one warm-up.

    Returns:
        by command the wall seconds and the CPU seconds (user and system) of its process, a value a round. On a machine
        with other work the second is the steadier.

    Raises:
        SistaError: a command fails.
    """
    commands = {IMPORT: ["-c", f"import {IMPORTED}"]}
    commands |= {name: ["-m", "sista_pl", *name.split()] for name in BOUNDS}
    wall: dict[str, list[float]] = {name: [] for name in commands}
    cpu: dict[str, list[float]] = {name: [] for name in commands}
    for round_ in range(rounds + 1):
        for name, words in commands.items():
            before, start = _children(), time.perf_counter()
            done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
            took = time.perf_counter() - start
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise SistaError(f"bench startup: {name}: exit code {done.returncode} ({last}); run it by hand")
            if round_:
                wall[name].append(took)
                cpu[name].append(_children() - before)
    return wall, cpu


def over(figures: dict[str, Any]) -> list[str]:
    """Return the commands whose median ratio is over its bound."""
    return [name for name, bound in BOUNDS.items() if figures[name]["ratio"]["median"] > bound]


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
