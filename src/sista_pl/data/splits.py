"""Splits that are pure functions of an id and a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sista_pl.errors import SistaError
from sista_pl.registry import Registry

if TYPE_CHECKING:
    import pandas as pd


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
        position = int.from_bytes(_digest(f"{seed}:{group}"), "big") / 2**64
        return "train" if position < train else "val" if position < train + val else "test"

    by_group = {group: split(group) for group in dict.fromkeys(groups)}
    return [by_group[group] for group in groups]


NAMED_SPLITS = Registry("split")


def split_table(name: str, table: pd.DataFrame, **options: Any) -> list[str]:
    """Return the split of each row by a named rule, a pure function of what the table's columns say.

    Args:
        name: `format/rule`, as in "rsna/mgca"; registered in `NAMED_SPLITS` beside the reader that offers it, as a
            function of the table (and of `seed`, say).
        table: (N) one row an image: `image_id`, `patient_id` and what else the rule's docstring asks for.
        options: of the rule.

    Returns:
        (N) "train", "val", "test", or "" for an image that the rule leaves out.

    Raises:
        SistaError: an unknown name or option.
    """
    return NAMED_SPLITS.build({"name": name, **options}, table=table)


def split_hash(image_ids: Sequence[str], splits: Sequence[str]) -> str:
    """Return the SHA-256 of a split, whatever the order of its rows."""
    digest = hashlib.sha256()
    for name, split in sorted(zip(image_ids, splits, strict=True)):
        digest.update(f"{name}\t{split}\n".encode())
    return digest.hexdigest()


def ordered_by_hash(ids: Sequence[str], seed: int) -> list[str]:
    """Return the distinct ids in an order that depends on them and the seed alone."""
    return sorted(set(ids), key=lambda name: _digest(f"{seed}:{name}"))


def shuffled_counts(ids: Sequence[str], sizes: Mapping[str, int], seed: int) -> dict[str, str]:
    """Deal distinct ids to splits of the given sizes, in an order that depends on the ids and the seed alone.

    Args:
        ids: the units (patients); their order does not matter.
        sizes: how many go to each split, in turn; where there are not as many ids as their sum, in the same shares.
        seed: another seed, another order.

    Returns:
        {id: split}
    """
    order = ordered_by_hash(ids, seed)
    dealt: dict[str, str] = {}
    total, start = sum(sizes.values()), 0.0
    for name, size in sizes.items():
        end = start + size * len(order) / total
        dealt |= dict.fromkeys(order[round(start) : round(end)], name)
        start = end
    return dealt


def folds(groups: Sequence[str], count: int, seed: int = 0) -> np.ndarray:
    """Deal whole groups to folds of nearly equal numbers of rows, for cross-validation.

    Groups go, in an order of their ids and the seed alone, each to the fold that has the fewest rows so far.

    Args:
        groups: (N) group of each row (the patient, usually); the order of the rows changes nothing.
        count: of folds.
        seed: another seed, other folds.

    Returns:
        (N,) 0 to count - 1.

    Raises:
        SistaError: fewer groups than folds.
    """
    names, of, sizes = np.unique(np.asarray(groups, dtype=str), return_inverse=True, return_counts=True)
    if count < 2 or len(names) < count:
        raise SistaError(f"{count} folds of {len(names)} patients: give at least 2, and a patient for each")
    size, held, fold = dict(zip(names.tolist(), sizes.tolist(), strict=True)), [0] * count, dict[str, int]()
    for name in ordered_by_hash(names.tolist(), seed):
        fold[name] = held.index(min(held))
        held[fold[name]] += size[name]
    return np.array([fold[name] for name in names.tolist()])[of]


def label_fraction(patients: Sequence[str], labels: np.ndarray, fraction: float, seed: int = 0) -> np.ndarray:
    """Choose a share of the labelled images by whole patients: nested, stratified, a function of ids and seed alone.

    Patients are ordered once for each seed, such that every beginning of the order holds the strata in their shares;
    a fraction is a beginning, so that 1 % lies within 10 %. A patient's stratum is the rarest label that any of
    their images has. The order of the rows changes nothing.

    Args:
        patients: (N) patient of each image.
        labels: (N, K) 1 present, 0 absent, NaN unknown; K may be 0.
        fraction: in (0, 1]; as many images as come nearest to it, of one patient at least.
        seed: another seed, another choice.

    Returns:
        (N,) bool.

    Raises:
        SistaError: a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise SistaError(f"label fraction {fraction}: give a share above 0 and at most 1, as 0.01")
    names, of = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    present = np.zeros((len(names), labels.shape[1]), bool)
    np.logical_or.at(present, of, labels == 1)
    by_rarity = np.argsort(present.sum(0), kind="stable")
    stratum = np.where(present.any(1), present[:, by_rarity].argmax(1), -1) if labels.shape[1] else np.zeros(len(names))
    chance = np.array([int.from_bytes(_digest(f"{seed}:{name}"), "big") for name in names], dtype=np.uint64)
    place = np.empty(len(names))
    for value in np.unique(stratum):
        members = np.flatnonzero(stratum == value)
        place[members[np.argsort(chance[members])]] = (np.arange(len(members)) + 0.5) / len(members)
    order = np.lexsort((chance, place))
    taken = np.cumsum(np.bincount(of, minlength=len(names))[order])
    count = 1 + int(np.abs(taken - fraction * len(of)).argmin())
    return np.isin(of, order[:count])


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
