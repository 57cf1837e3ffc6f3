"""Checks of the losses' YAML arguments, each with its one line."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from sista_pl.errors import SistaError, did_you_mean


def number(
    loss: str, name: str, value: Any, low: float, high: float = math.inf, above: bool = False, or_else: str = ""
) -> float:
    """Return an argument that has to be a number from `low` to `high`; with `above`, more than `low`."""
    right = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not right or not low <= value <= high or (above and value == low):
        wanted = f"from {low} to {high}" if high < math.inf else f"above {low}" if above else f"of at least {low}"
        raise SistaError(f"loss {loss!r}: {name} is {value!r}; give a number {wanted}{or_else}")
    return float(value)


def whole(loss: str, name: str, value: object, low: int) -> int:
    """Return an argument that has to be a whole number of at least `low`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise SistaError(f"loss {loss!r}: {name} is {value!r}; give a whole number of at least {low}")
    return value


def choice(loss: str, name: str, value: object, known: Collection[str]) -> str:
    """Return an argument that has to be one of a few words."""
    if value not in known:
        raise SistaError(f"loss {loss!r}: {name} is {value!r}; {did_you_mean(str(value), known)}")
    return str(value)


def switch(loss: str, name: str, value: object) -> bool:
    """Return an argument that has to be true or false."""
    if not isinstance(value, bool):
        raise SistaError(f"loss {loss!r}: {name} is {value!r}; write true or false")
    return value
