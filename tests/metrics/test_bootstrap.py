"""Intervals against literally repeated samples, and where something is undefined."""

import json
import time

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from sista_pl.metrics import Classification, Detection, intervals


@pytest.fixture(scope="module")
def cohort():
    """60 images of some 25 patients: patient, truth, score."""
    rng = np.random.default_rng(0)
    patients = np.array([f"p{n}" for n in rng.integers(25, size=60)])
    truth = (rng.random((60, 1)) < 0.3).astype(float)
    return patients, truth, np.round(np.clip(truth * 0.2 + rng.random((60, 1)), 0, 1), 1)


def mean(values):
    return lambda weights: {"mean": float(weights @ values / weights.sum())}


def test_intervals_equal_those_of_literally_repeated_patients(cohort):
    patients, truth, score = cohort
    family = Classification(truth, score, ["Edema"], "binary")
    found = intervals(family.figures, patients, draws=200, seed=3)["auroc/Edema"]
    names, rng, values = sorted(set(patients)), np.random.default_rng(3), []
    for _ in range(200):
        drawn = [names[i] for i in rng.integers(len(names), size=len(names))]
        rows = [i for name in drawn for i in range(60) if patients[i] == name]
        if 0 < truth[rows].sum() < len(rows):
            values.append(roc_auc_score(truth[rows, 0], score[rows, 0]))
    assert found["interval95"] == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=1e-12)
    assert found["value"] == pytest.approx(roc_auc_score(truth[:, 0], score[:, 0]))
    assert found["n"] == 60
    assert found.get("draws", 200) == len(values)


def test_the_images_of_a_patient_are_drawn_together(cohort):
    patients = cohort[0]
    seen = []
    intervals(lambda weights: seen.append(weights) or {"size": 1.0}, patients, draws=20)
    assert (seen[0] == 1).all()
    assert len(seen) == 21
    for weights in seen[1:]:
        each = [set(weights[patients == name]) for name in set(patients)]
        assert max(map(len, each)) == 1
        assert sum(map(sum, each)) == len(each)
    assert len({tuple(weights) for weights in seen}) == 21


def test_repeated_patients_widen_the_interval():
    values = np.random.default_rng(0).normal(size=100)
    one = intervals(mean(values), np.arange(100))["mean"]["interval95"]
    four = intervals(mean(np.repeat(values, 4)), np.repeat(np.arange(100), 4))["mean"]["interval95"]
    apart = intervals(mean(np.repeat(values, 4)), np.arange(400))["mean"]["interval95"]
    assert four == pytest.approx(one)
    assert apart[1] - apart[0] == pytest.approx((one[1] - one[0]) / 2, rel=0.15)
    assert one[1] - one[0] == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.1)


def test_the_seed_decides_and_the_level_widens(cohort):
    values = cohort[2][:, 0]
    one, again, other = (intervals(mean(values), cohort[0], seed=seed)["mean"] for seed in (1, 1, 2))
    assert one == again
    assert one["interval95"] != other["interval95"]
    wide = intervals(mean(values), cohort[0], seed=1, level=0.99)["mean"]["interval95"]
    assert wide[0] < one["interval95"][0] < one["interval95"][1] < wide[1]
    json.dumps(one)


def test_a_draw_without_a_positive_is_counted_out():
    truth = np.zeros((20, 1))
    truth[0] = 1
    family = Classification(truth, np.linspace(0, 1, 20)[:, None], ["Hernia"], "binary")
    found = intervals(family.figures, np.arange(20), draws=400)
    share = 1 - (1 - 1 / 20) ** 20  # of the draws that hold the one positive image
    assert found["auroc/Hernia"]["draws"] == pytest.approx(400 * share, abs=40)
    assert found["auroc/Hernia"]["value"] == 0
    assert "draws" not in found["accuracy"]


def test_one_patient_has_no_interval():
    found = intervals(mean(np.arange(5.0)), np.zeros(5))
    assert found == {"mean": {"value": 2.0, "interval95": None, "n": 5}}


def test_a_thousand_draws_of_a_large_test_set_take_seconds():
    rng = np.random.default_rng(0)
    truth = (rng.random((5000, 14)) < 0.1).astype(float)
    labels = Classification(truth, rng.random((5000, 14)), [f"c{k}" for k in range(14)])
    boxes = [np.abs(rng.normal(50, 20, (int(m), 4))) for m in rng.integers(0, 4, 2000)]
    said = [np.abs(rng.normal(50, 20, (100, 4))) for _ in boxes]
    kinds = [np.zeros(100, int)] * 2000
    found = Detection(boxes, [np.zeros(len(b), int) for b in boxes], said, kinds, list(rng.random((2000, 100))), ["a"])
    for family, size in ((labels, 5000), (found, 2000)):
        start = time.process_time()
        intervals(family.figures, np.arange(size) // 2, draws=30)
        assert time.process_time() - start < 0.03 * 30
