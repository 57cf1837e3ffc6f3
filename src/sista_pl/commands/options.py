"""Arguments of more than one command: `--option KEY=VALUE` of a reader, `--seed`."""

from __future__ import annotations

import argparse
from typing import Any

import yaml

from sista_pl.errors import SistaError


def natural(text: str) -> int:
    """Return the whole number from 0 on, as a seed has to be; for argparse's `type`.

    Raises:
        ArgumentTypeError: it is none.
    """
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 0 on")
    return int(text)


def parse(options: list[str]) -> dict[str, Any]:
    """Return KEY=VALUE, KEY.INNER=VALUE as a dict of YAML values.

    Raises:
        SistaError: no KEY=VALUE, no YAML, or a key with a value and with inner keys.
    """
    parsed: dict[str, Any] = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or not key:
            raise SistaError(f"--option {option}: no KEY=VALUE; write for example --option labels=negbio")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise SistaError(f"--option {option}: the value is no YAML; put it in quotes") from None
        outer, dot, inner = key.partition(".")
        if dot:
            group = parsed.setdefault(outer, {})
            if not isinstance(group, dict):
                raise SistaError(f"--option {option}: {outer} has a plain value already; give one of the two")
            group[inner] = value
        else:
            parsed[key] = value
    return parsed
