"""Splits that are pure functions of an id and a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def grouped_split(
    groups: Sequence[str], seed: int = 0, fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
) -> list[str]:
    """Send each group to train, val or test by the hash of its id, so that no group is cut.

    A group's split depends on its id and the seed alone: more data later moves nobody. The shares of the splits are
    therefore near the fractions, not equal to them.

    Args:
        groups: (N) group id of each row (the patient, usually).
        seed: another seed, another split.
        fractions: of train, val and test; they sum to 1.

    Returns:
        (N) "train", "val" or "test".

    Raises:
        ValueError: the fractions are not three shares of 1.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"fractions {fractions} are not three shares of 1")
    train, val, _ = fractions

    def split(group: str) -> str:
        digest = hashlib.blake2b(f"{seed}:{group}".encode(), digest_size=8).digest()
        position = int.from_bytes(digest, "big") / 2**64
        return "train" if position < train else "val" if position < train + val else "test"

    by_group = {group: split(group) for group in dict.fromkeys(groups)}
    return [by_group[group] for group in groups]
