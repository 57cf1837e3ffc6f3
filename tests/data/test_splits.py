"""Splits and label fractions: pure functions of ids and a seed."""

import itertools

import numpy as np
import pandas as pd
import pytest

from sista_pl.data.splits import (
    NAMED_SPLITS,
    folds,
    grouped_split,
    label_fraction,
    shuffled_counts,
    split_hash,
    split_table,
)
from sista_pl.errors import SistaError

FRACTIONS = (0.01, 0.05, 0.1, 0.5, 1.0)


@pytest.fixture(scope="module")
def cohort():
    """3,000 images of 1,100 patients; label 1 is rare, label 2 often unknown."""
    rng = np.random.default_rng(0)
    patients = np.array([f"p{n}" for n in rng.integers(1100, size=3000)])
    labels = (rng.random((3000, 3)) < (0.4, 0.03, 0.2)).astype(float)
    labels[rng.random(3000) < 0.5, 2] = np.nan
    return patients, labels


def reference(patients, labels, fraction, seed):
    """The rule once more, patient by patient."""
    import hashlib

    names = sorted(set(patients))
    has = {n: [any(labels[i, k] == 1 for i in np.flatnonzero(patients == n)) for k in range(3)] for n in names}
    rarity = sorted(range(3), key=lambda k: sum(h[k] for h in has.values()))
    chance = {n: hashlib.blake2b(f"{seed}:{n}".encode(), digest_size=8).digest() for n in names}
    strata: dict = {}
    for n in names:
        strata.setdefault(next((k for k in rarity if has[n][k]), None), []).append(n)
    place = {}
    for members in strata.values():
        for r, n in enumerate(sorted(members, key=chance.get)):
            place[n] = (r + 0.5) / len(members)
    order = sorted(names, key=lambda n: (place[n], chance[n]))
    counts = np.cumsum([(patients == n).sum() for n in order])
    best = min(range(len(order)), key=lambda i: abs(counts[i] - fraction * len(patients)))
    return np.isin(patients, order[: best + 1])


@pytest.mark.parametrize("seed", [0, 7])
def test_a_fraction_is_nested_grouped_and_near_its_size(cohort, seed):
    patients, labels = cohort
    chosen = [label_fraction(patients, labels, fraction, seed) for fraction in FRACTIONS]
    for few, more in itertools.pairwise(chosen):
        assert (more | ~few).all()
    for fraction, mask in zip(FRACTIONS, chosen, strict=True):
        assert not set(patients[mask]) & set(patients[~mask])
        assert abs(mask.sum() - fraction * 3000) <= 4
    assert chosen[-1].all()
    np.testing.assert_array_equal(chosen[1], reference(patients, labels, 0.05, seed))


def test_a_fraction_holds_the_labels_in_their_shares(cohort):
    patients, labels = cohort
    for seed in range(5):
        mask = label_fraction(patients, labels, 0.1, seed)
        assert (labels[mask, 1] == 1).mean() == pytest.approx((labels[:, 1] == 1).mean(), abs=0.01)
        assert (labels[label_fraction(patients, labels, 0.01, seed), 1] == 1).any()


def test_a_fraction_follows_from_ids_and_seed_alone(cohort):
    patients, labels = cohort
    order = np.random.default_rng(1).permutation(3000)
    np.random.seed(5)  # noqa: NPY002  the global generator must not matter
    mask = label_fraction(patients, labels, 0.1, 3)
    np.testing.assert_array_equal(label_fraction(patients[order], labels[order], 0.1, 3), mask[order])
    assert (label_fraction(patients, labels, 0.1, 4) != mask).any()
    assert label_fraction(patients, np.empty((3000, 0)), 0.1).sum() == pytest.approx(300, abs=4)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_a_fraction_that_is_none(cohort, fraction):
    with pytest.raises(SistaError, match="give a share above 0 and at most 1"):
        label_fraction(*cohort, fraction)


def test_grouped_split_never_cuts_a_group_and_is_stable():
    groups = [f"g{n % 400}" for n in range(2000)]
    splits = np.array(grouped_split(groups, seed=1))
    assert all(len(set(splits[np.array(groups) == g])) == 1 for g in set(groups))
    assert grouped_split(groups[:100], seed=1) == list(splits[:100])
    assert np.mean(splits == "train") == pytest.approx(0.8, abs=0.06)
    with pytest.raises(ValueError, match="three shares of 1"):
        grouped_split(groups, fractions=(0.5, 0.5, 0.5))


def test_shuffled_counts_deals_exactly_and_in_shares_where_there_are_fewer():
    ids = [f"i{n}" for n in range(26684)]
    sizes = {"train": 16010, "val": 5337, "test": 5337}
    dealt = shuffled_counts(ids, sizes, 0)
    assert {name: list(dealt.values()).count(name) for name in sizes} == sizes
    assert dealt == shuffled_counts(ids[::-1], sizes, 0) != shuffled_counts(ids, sizes, 1)
    few = shuffled_counts(ids[:50], sizes, 0)
    assert {name: list(few.values()).count(name) for name in sizes} == {"train": 30, "val": 10, "test": 10}


def test_a_hash_of_a_split_knows_no_order():
    assert split_hash(["a", "b"], ["train", "val"]) == split_hash(["b", "a"], ["val", "train"])
    assert split_hash(["a", "b"], ["train", "val"]) != split_hash(["a", "b"], ["val", "train"])


def test_an_unknown_split_is_answered_with_the_nearest():
    @NAMED_SPLITS.register("test/even")
    def even(table: pd.DataFrame, test: str = "test") -> list[str]:
        return ["train" if int(name) % 2 else test for name in table["image_id"]]

    table = pd.DataFrame({"image_id": ["1", "2"], "patient_id": ["1", "2"]})
    try:
        assert split_table("test/even", table) == ["train", "test"]
        assert split_table("test/even", table, test="val") == ["train", "val"]
        with pytest.raises(SistaError, match="did you mean test/even"):
            split_table("test/evn", table)
    finally:
        del NAMED_SPLITS._builders["test/even"]


@pytest.mark.parametrize("count", [7, 100, 1234])
def test_counts_are_shares_where_there_are_more_or_fewer_ids(count):
    dealt = shuffled_counts([f"p{i}" for i in range(count)], {"train": 70, "val": 15, "test": 15}, 0)
    assert len(dealt) == count
    for name, share in (("train", 0.7), ("val", 0.15), ("test", 0.15)):
        assert abs(list(dealt.values()).count(name) - share * count) <= 1


def test_folds_keep_groups_whole_and_are_even():
    draw = np.random.default_rng(0)
    groups = np.repeat([f"p{i}" for i in range(40)], draw.integers(1, 5, 40))
    dealt = folds(groups, 5, seed=3)
    for group in set(groups):
        assert len(set(dealt[groups == group])) == 1
    counts = np.bincount(dealt, minlength=5)
    assert counts.max() - counts.min() <= 4
    order = draw.permutation(len(groups))
    assert np.array_equal(folds(groups[order], 5, seed=3), dealt[order])
    assert not np.array_equal(folds(groups, 5, seed=4), dealt)
    with pytest.raises(SistaError, match="5 folds of 2 patients"):
        folds(["a", "b", "b"], 5)
