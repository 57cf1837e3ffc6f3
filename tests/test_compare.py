"""Paired statistics against slow loops, corrections by hand, and what can't be compared."""

import hashlib
import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from sista_pl.compare import cohen, compare, holm, paired, ranks, resample, work
from sista_pl.errors import SistaError
from sista_pl.metrics import Classification, intervals
from sista_pl.metrics.bootstrap import MOST, degrees_of_freedom, left_out, resamples
from sista_pl.stored import Run, Setting, find_runs, load, of_phantom, read_runs

PATIENTS = np.array([f"p{n:02}" for n in np.random.default_rng(0).integers(25, size=60)])
TRUTH = (np.random.default_rng(1).random(60) < 0.3).astype(float)


def predictions(seed=0, signal=0.2, **columns) -> pd.DataFrame:
    """60 images of some 25 patients, scores with ties."""
    rng = np.random.default_rng(seed)
    scores = np.round(np.clip(TRUTH * signal + 0.8 * rng.random(60), 0, 1), 1)
    table = {"image_id": [f"{n:03}" for n in range(60)], "patient_id": PATIENTS, "truth_Edema": TRUTH,
             "score_Edema": scores}  # fmt: skip
    return pd.DataFrame(table | columns)


@pytest.fixture
def write(tmp_path):
    """Write predictions, return the run."""

    def of(method, table, name=None, **facts):
        file = tmp_path / (name or f"{method}-{len(list(tmp_path.iterdir()))}.parquet")
        table.to_csv(file, index=False) if file.suffix == ".csv" else table.to_parquet(file)
        return Run(method, file, **facts)

    return of


@pytest.fixture
def four(write):
    """Two methods with two seeds each."""
    return [write("clip", predictions(0)), write("clip", predictions(1)),
            write("sista", predictions(2, 0.4)), write("sista", predictions(3, 0.4))]  # fmt: skip


def drawn_patients(patients, draws, seed):
    """Names of the patients of each draw, by the rule of the docstring."""
    names = sorted(set(patients))
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=8).digest()
    rng = np.random.default_rng([seed, int.from_bytes(digest, "big")])
    return [[names[i] for i in rng.integers(len(names), size=len(names))] for _ in range(draws)]


def slow_freedom(values):
    deviations = [value - sum(values) / len(values) for value in values]
    total = sum(d**2 for d in deviations)
    return min(2 * total**2 / (sum(d**4 for d in deviations) - total**2 / len(values)), len(values) - 1)


def same(found, expected):
    """Whether two lists of rows agree, NaN with NaN."""
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        assert one == pytest.approx(two, nan_ok=True)


def test_the_paired_bootstrap_equals_loops_over_literally_repeated_patients(four):
    found = compare(load(four), draws=200, seed=5)
    tables = [pd.read_parquet(run.file) for run in four]

    def means(rows):
        auroc = [roc_auc_score(TRUTH[rows], table["score_Edema"].to_numpy()[rows]) for table in tables]
        return (auroc[0] + auroc[1]) / 2, (auroc[2] + auroc[3]) / 2

    draws = [means([i for name in names for i in range(60) if PATIENTS[i] == name])
             for names in drawn_patients(PATIENTS, 200, 5)]  # fmt: skip
    without = [means([i for i in range(60) if PATIENTS[i] != name]) for name in sorted(set(PATIENTS))]
    clip, sista = means(list(range(60)))
    first, second = found.rows
    assert (first["method"], second["method"]) == ("clip", "sista")
    assert (first["value"], second["value"]) == pytest.approx((clip, sista), abs=1e-11)
    for row, m in ((first, 0), (second, 1)):
        freedom = slow_freedom([each[m] for each in without])
        t = stats.t.ppf(0.975, freedom) * np.sqrt((freedom + 1) / freedom)
        ends = np.quantile([draw[m] for draw in draws], [stats.norm.cdf(-t), stats.norm.cdf(t)])
        assert (row["low"], row["high"]) == pytest.approx(ends, abs=1e-9)
    apart = [b - a for a, b in draws]
    error, freedom = np.std(apart, ddof=1), slow_freedom([b - a for a, b in without])
    z = (sista - clip) / error
    assert second["difference"] == pytest.approx(sista - clip, abs=1e-11)
    assert second["freedom"] == pytest.approx(freedom)
    reach = stats.t.ppf(0.975, freedom) * error
    assert second["difference_low"] == pytest.approx(sista - clip - reach, abs=1e-9)
    assert second["difference_high"] == pytest.approx(sista - clip + reach, abs=1e-9)
    assert second["z"] == pytest.approx(z)
    assert second["p"] == pytest.approx(2 * stats.t.sf(abs(z), freedom))
    assert second["p_holm"] == second["p"]
    each = [roc_auc_score(TRUTH, table["score_Edema"]) for table in tables]
    assert first["seed_sd"] == pytest.approx(abs(each[0] - each[1]) / np.sqrt(2))
    spread = np.sqrt((np.var(each[:2], ddof=1) + np.var(each[2:], ddof=1)) / 2)
    assert second["d"] == pytest.approx((sista - clip) / spread)
    assert np.isnan([first[name] for name in ("difference", "p", "p_holm", "z", "d", "freedom")]).all()
    assert {(row["images"], row["patients"], row["draws"], row["seeds"]) for row in found.rows} == {
        (60, len(set(PATIENTS)), 200, 2)
    }
    assert (found.reference, found.comparisons, found.notes) == ("clip", 1, [])


def test_a_seed_is_the_mean_over_its_subsets(write):
    """Five runs of `b`: two seeds, one with two subsets and one with three."""
    facts = [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1"), ("1", "2")]
    runs = [write("a", predictions(n), seed=str(n)) for n in range(2)]
    runs += [write("b", predictions(5 + n, 0.4), seed=seed, subset=subset) for n, (seed, subset) in enumerate(facts)]
    tables = [pd.read_parquet(run.file) for run in runs]

    def mean(rows):
        b = [roc_auc_score(TRUTH[rows], table["score_Edema"].to_numpy()[rows]) for table in tables[2:]]
        return ((b[0] + b[1]) / 2 + (b[2] + b[3] + b[4]) / 3) / 2, (b[0] + b[1]) / 2 - (b[2] + b[3] + b[4]) / 3

    row = compare(load(runs), draws=200, seed=5).rows[1]
    value, apart = mean(list(range(60)))
    assert row["value"] == pytest.approx(value, abs=1e-11)
    assert (row["seeds"], row["subsets"]) == (2, 2)
    assert row["seed_sd"] == pytest.approx(abs(apart) / np.sqrt(2))
    draws = [mean([i for name in names for i in range(60) if PATIENTS[i] == name])[0]
             for names in drawn_patients(PATIENTS, 200, 5)]  # fmt: skip
    freedom = slow_freedom([mean([i for i in range(60) if PATIENTS[i] != name])[0] for name in sorted(set(PATIENTS))])
    t = stats.t.ppf(0.975, freedom) * np.sqrt((freedom + 1) / freedom)
    ends = np.quantile(draws, [stats.norm.cdf(-t), stats.norm.cdf(t)])
    assert (row["low"], row["high"]) == pytest.approx(ends, abs=1e-9)


def test_the_order_of_rows_files_and_methods_changes_no_figure(four, write):
    expected = compare(load(four), "clip", draws=100)
    shuffled = [write(run.method, pd.read_parquet(run.file).sample(frac=1, random_state=n))
                for n, run in enumerate(four)]  # fmt: skip
    same(compare(load(shuffled), "clip", draws=100).rows, expected.rows)
    turned = compare(load(shuffled[::-1]), "clip", draws=100)
    same(turned.rows[::-1], expected.rows)
    assert turned.reference == "clip"


def test_the_reference_decides_the_sign_and_the_seed_the_draws(four):
    one, turned = (compare(load(four), name, draws=100).rows for name in ("clip", "sista"))
    assert turned[0]["difference"] == -one[1]["difference"]
    assert turned[0]["difference_low"] == -one[1]["difference_high"]
    assert turned[0]["p"] == one[1]["p"]
    assert compare(load(four), draws=100, seed=1).rows[1]["p"] != one[1]["p"]


def test_one_seed_has_no_sd_and_no_cohen(four):
    first, second = compare(load([four[0], four[2]]), draws=100).rows
    assert np.isnan([first["seed_sd"], second["seed_sd"], second["d"]]).all()
    assert 0 < second["p"] < 1
    assert np.isnan(compare(load(four[:3]), draws=100).rows[1]["d"])


def test_equal_predictions_are_no_difference(write):
    found = compare(load([write("a", predictions(0)), write("b", predictions(0))]), draws=100)
    row = found.rows[1]
    assert (row["difference"], row["difference_low"], row["difference_high"], row["p"]) == (0, 0, 0, 1)
    assert np.isnan(row["z"])
    assert [(r["rank"], r["low"], r["high"]) for r in found.ranks] == [(1.5, 1.5, 1.5)] * 2


def test_a_difference_without_spread_has_no_p():
    assert paired(0.5, np.full(100, 0.5), 9) == pytest.approx((0.5, 0.5, np.nan, np.nan), nan_ok=True)
    assert paired(0.1, np.full(2000, 0.1), 9)[3] != 0


def test_p_is_below_0_05_where_the_interval_leaves_out_0():
    drawn = np.random.default_rng(0).normal(0.5, 0.3, 500)
    for difference in np.linspace(-1, 1, 41):
        low, high, _, p = paired(difference, drawn, 12.5)
        assert (p < 0.05) == (low > 0 or high < 0)


# --- pieces ----------------------------------------------------------------------


def test_holm_equals_the_computation_by_hand():
    # sorted 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1, which 0.03 x 2 pulls up
    given, expected = [0.01, 0.04, np.nan, 0.03, 0.005], [0.03, 0.06, np.nan, 0.06, 0.02]
    assert holm(np.array(given)) == pytest.approx(expected, nan_ok=True)
    assert holm(np.array([0.4, 0.9])) == pytest.approx([0.8, 0.9])
    assert holm(np.array([0.6, 0.7])).tolist() == [1, 1]
    assert len(holm(np.zeros(0))) == 0


def test_ranks_share_ties():
    assert ranks(np.array([0.8, 0.9, 0.8, 0.1])).tolist() == [2.5, 1, 2.5, 4]
    assert ranks(np.array([0.8, 0.9, 0.8, 0.1]), lower=True).tolist() == [2.5, 4, 2.5, 1]
    values = np.random.default_rng(0).integers(0, 4, (50, 6)).astype(float)
    assert (ranks(values) == stats.rankdata(-values, axis=1)).all()


def test_cohen_needs_two_seeds_and_a_spread():
    a, b = np.array([0.8, 0.9, 0.7]), np.array([0.5, 0.6])
    pooled = np.sqrt((2 * a.var(ddof=1) + b.var(ddof=1)) / 3)
    assert cohen(a, b) == pytest.approx((a.mean() - b.mean()) / pooled)
    assert np.isnan(cohen(a, b[:1]))
    assert np.isnan(cohen(np.ones(2), np.zeros(2)))


def test_degrees_of_freedom_count_those_who_matter():
    rng = np.random.default_rng(0)
    assert degrees_of_freedom(rng.normal(size=20000)) == pytest.approx(20000, rel=0.1)
    few = np.zeros(1000)
    few[:10] = np.tile([1.0, -1.0], 5)  # ten of a thousand, all alike: about 10 x 2, by the formula
    assert degrees_of_freedom(few) == pytest.approx(slow_freedom(few.tolist()))
    assert degrees_of_freedom(few) < 25
    few[0] = 30
    assert degrees_of_freedom(few) == pytest.approx(2, abs=0.1)
    assert degrees_of_freedom(np.ones(7)) == 6
    assert degrees_of_freedom(np.tile([1.0, -1.0], 5)) == 9  # never more than the patients
    assert np.isnan(degrees_of_freedom(np.array([1.0, np.nan, 2.0])))
    assert np.isnan(degrees_of_freedom(np.ones(1)))


def test_each_patient_is_left_out_once_and_many_in_groups():
    weights = list(left_out(PATIENTS))
    for name, weight in zip(sorted(set(PATIENTS)), weights, strict=True):
        assert (weight == (name != PATIENTS)).all()
    grouped = list(left_out(np.repeat(np.arange(10), 3), most=4))
    assert len(grouped) == 4
    assert (sum(1 - weight for weight in grouped) == 1).all()
    assert all(len(set(weight[n * 3 : n * 3 + 3])) == 1 for weight in grouped for n in range(10))
    assert len(list(left_out(np.arange(MOST + 7)))) == MOST


def test_resamples_are_those_of_the_intervals_of_a_test():
    family = Classification.from_table(predictions())
    values = [family.figure("auroc_macro", weights) for weights in resamples(PATIENTS, 100, 3)]
    ends = intervals(family.figures, PATIENTS, 100, 3)["auroc_macro"]["interval95"]
    assert ends == pytest.approx(np.quantile(values, [0.025, 0.975]))


# --- settings and ranks -------------------------------------------------------------


def test_average_ranks_over_cells_share_the_resamples_of_the_same_patients(write):
    runs = []
    for fraction in (0.1, 1.0):
        for n, method in enumerate(("a", "b", "c")):
            table = predictions(int(10 * fraction) + n, 0.3)
            runs.append(write(method, table, task="cls", fraction=fraction))
    other = {"image_id": [f"o{n}" for n in range(60)], "patient_id": [f"o{p}" for p in PATIENTS]}
    runs += [write(method, predictions(n, 0.3, **other), task="other") for n, method in enumerate("abc")]
    settings = load(runs)
    assert [setting.name for setting in settings] == ["cls 0.1", "cls 1", "other"]
    found = compare(settings, draws=150, seed=2)
    drawn = [resample(setting, 150, 2) for setting in settings]
    names = [drawn_patients(setting.patients, 150, 2) for setting in settings]
    assert names[0] == names[1]
    assert [[name[1:] for name in draw] for draw in names[2]] != [[name[1:] for name in draw] for draw in names[0]]
    average = []
    for b in range(150):
        each = [stats.rankdata(-np.round(setting.draws[b], 12)) for setting in drawn]
        average.append(np.mean(each, 0))
    for m, row in enumerate(found.ranks):
        now = np.mean([stats.rankdata(-np.round(setting.figures, 12))[m] for setting in drawn])
        assert row == pytest.approx({
            "method": "abc"[m], "rank": now, "low": np.quantile([a[m] for a in average], 0.025),
            "high": np.quantile([a[m] for a in average], 0.975), "settings": 3,
        })  # fmt: skip
    assert found.comparisons == 6
    p = np.array([row["p"] for row in found.rows])
    assert [row["p_holm"] for row in found.rows] == pytest.approx(holm(p), nan_ok=True)


def test_the_lower_calibration_error_is_the_better(write):
    sure, unsure = (predictions(score_Edema=np.clip(TRUTH, 1 - s, s)) for s in (0.95, 0.6))
    found = compare(load([write("unsure", unsure), write("sure", sure)], "ece"), draws=100)
    assert [(row["rank"], row["value"]) for row in found.rows] == [(2, pytest.approx(0.4)), (1, pytest.approx(0.05))]
    assert found.rows[1]["difference"] == pytest.approx(-0.35)


def retrieved(rank: int, k: int = 10) -> pd.DataFrame:
    """60 pairs, each found at about this rank."""
    ranks = rank + np.arange(60) % 3
    columns = {"rank_i2t": ranks, "rank_t2i": ranks, f"precision@{k}/edema": 1 / ranks, f"random@{k}/edema": 0.0}
    return predictions()[["image_id", "patient_id"]].assign(**columns)


@pytest.mark.parametrize("metric", ["i2t_median_rank", "t2i_median_rank"])
def test_the_lower_median_rank_is_the_better(write, metric):
    runs = [write("far", retrieved(20), task="x"), write("near", retrieved(2), task="x")]
    found = compare(load(runs, metric), draws=100)
    assert [(row["value"], row["rank"]) for row in found.rows] == [(21, 2), (3, 1)]
    assert [row["rank"] for row in found.ranks] == [2, 1]


def test_a_cell_that_lacks_a_method_is_left_out_of_the_ranks(write):
    runs = [write("a", predictions(0), task="x"), write("b", predictions(1), task="x"),
            write("b", predictions(2), task="y"), write("c", predictions(3), task="y")]  # fmt: skip
    found = compare(load(runs), draws=100)
    assert found.ranks == []
    assert found.notes == [
        "x: no c; left out of the average ranks",
        "y: no a; left out of the average ranks, and without differences",
    ]
    assert [np.isnan(row["difference"]) for row in found.rows] == [True, False, True, True]
    assert found.comparisons == 1


def test_undefined_draws_are_counted_out_and_said(write):
    truth = np.zeros(60)
    truth[[np.flatnonzero(name == PATIENTS)[0] for name in sorted(set(PATIENTS))[:2]]] = 1
    runs = [write(name, predictions(n, truth_Edema=truth)) for n, name in enumerate("ab")]
    found = compare(load(runs), draws=300)
    kept = found.rows[0]["draws"]
    patients = len(set(PATIENTS))
    assert kept == pytest.approx(300 * (1 - (1 - 2 / patients) ** patients), abs=25)
    assert found.notes == [f"auroc_macro: {300 - kept} of 300 draws leave auroc_macro undefined and are left out"]
    truth[np.flatnonzero(truth)[0]] = 0
    runs = [write(name, predictions(n, truth_Edema=truth)) for n, name in enumerate("ab")]
    found = compare(load(runs), draws=100)
    assert found.notes == ["auroc_macro: without one of the patients auroc_macro is not defined: no interval and no p"]
    assert np.isnan([found.rows[1][name] for name in ("low", "difference_low", "p", "p_holm", "z")]).all()
    assert found.comparisons == 0


def test_one_patient_has_figures_alone(write):
    runs = [write(name, predictions(n, patient_id="p")) for n, name in enumerate("ab")]
    settings = load(runs)
    found = compare(settings, draws=100)
    assert found.notes == ["auroc_macro: one patient alone, no interval and no p"]
    assert found.rows[1]["difference"] == pytest.approx(found.rows[1]["value"] - found.rows[0]["value"])
    assert np.isnan([found.rows[1]["low"], found.rows[1]["p"], found.ranks[0]["low"]]).all()
    assert work(settings, 100) == 0


def test_the_work_is_announced(four):
    settings, told = load(four), []
    compare(settings, draws=100, advance=lambda: told.append(1))
    assert len(told) == work(settings, 100) == 100 + len(set(PATIENTS))


# --- files -----------------------------------------------------------------------


def test_a_foreign_csv_takes_the_patients_of_the_others(four, write):
    table = pd.read_parquet(four[2].file)
    expected = compare(load([four[0], four[2]]), draws=100).rows
    with_ids, without = table.assign(notes="x"), table.drop(columns="patient_id")[::-1]
    for foreign in (with_ids, without):
        run = write("sista", foreign, "peer.csv")
        found = compare(load([four[0], run]), draws=100)
        same(found.rows, expected)
        assert found.notes == []
    first = write("clip", pd.read_parquet(four[0].file).drop(columns="patient_id"))
    found = compare(load([first, run]), draws=100)
    assert found.notes == ["auroc_macro: no file has patient_id, each image counts as a patient of its own"]
    assert found.rows[0]["patients"] == 60
    assert found.rows[0]["value"] == expected[0]["value"]


def test_an_unknown_truth_is_left_out_in_csv_and_parquet(write):
    truth = np.where(np.arange(60) % 7, TRUTH, np.nan)
    one, two = write("a", predictions(0, truth_Edema=truth)), write("b", predictions(1, truth_Edema=truth), "b.csv")
    found = compare(load([one, two]), draws=100)
    known = ~np.isnan(truth)
    assert found.rows[1]["value"] == pytest.approx(
        roc_auc_score(truth[known], predictions(1)["score_Edema"].to_numpy()[known])
    )


def test_masks_and_boxes_have_their_metric(write):
    pixels = {"intersection_pixels": TRUTH * 3, "predicted_pixels": 4, "truth_pixels": TRUTH * 5}
    masks = predictions().drop(columns=["truth_Edema", "score_Edema"]).assign(**pixels)
    better = masks.assign(intersection_pixels=TRUTH * 4)
    first, second = compare(load([write("a", masks), write("b", better)]), draws=100).rows
    assert first["metric"] == "dice_positive"
    assert (first["value"], second["value"]) == pytest.approx((6 / 9, 8 / 9))
    box = [json.dumps([{"category": "o", "x": 1, "y": 1, "w": 5, "h": 5, "score": 0.9}] * int(t)) for t in TRUTH]
    boxes = masks[["image_id", "patient_id"]].assign(truth_boxes=box, predicted_boxes=box)
    found = compare(load([write("a", boxes), write("b", boxes.assign(predicted_boxes="[]"))]), draws=100)
    assert [(row["metric"], row["value"]) for row in found.rows] == [("map_40_75", 1), ("map_40_75", 0)]


def two_classes(seed, flip=False):
    score = predictions(seed)["score_Edema"].to_numpy()
    columns = {"truth_None": 1 - TRUTH, "score_None": 1 - score}
    table = predictions(seed, **columns)
    return table[["image_id", *reversed(list(table)[1:])]] if flip else table


def test_the_order_of_the_classes_does_not_matter(write):
    one = compare(load([write("a", two_classes(0)), write("b", two_classes(1))]), draws=100)
    two = compare(load([write("a", two_classes(0)), write("b", two_classes(1, flip=True))]), draws=100)
    same(one.rows, two.rows)


def test_what_hides_is_said(write, tmp_path):
    absent = {"truth_Mass": 0.0, "score_Mass": 0.5}
    runs = [write(name, predictions(n, **absent)) for n, name in (*enumerate("ab"), (1, "b"))]
    found = compare(load(runs, "accuracy"), draws=100)
    assert "accuracy: Mass has no positive image: no AUROC, average precision and F1" in found.notes
    assert "accuracy: accuracy at the threshold 0.5; predictions hold no other" in found.notes
    same = [note for note in found.notes if "predict exactly the same" in note]
    assert len(same) == 1
    assert str(runs[1].file) in same[0]
    assert str(runs[2].file) in same[0]
    assert not of_phantom(runs)
    (tmp_path / "metrics.json").write_text('{"phantom": "PHANTOM DATA"}')
    assert of_phantom(runs)


BAD = [
    (lambda t: t[:-3], "b.parquet lacks 3 of the 60 images of .*a.parquet \\(057, 058, 059\\)"),
    (lambda t: pd.concat([t, t.assign(image_id="x" + t["image_id"])]),
     "a.parquet lacks 60 of the 120 images of .*b.parquet \\(x000, x001, x002 …\\)"),
    (lambda t: t.assign(truth_Edema=np.where(t.index == 7, 1 - TRUTH, TRUTH)),
     "truth_Edema of .*b.parquet and of .*a.parquet differs in 1 of 60 images \\(first 007\\)"),
    (lambda t: t.assign(truth_Edema=np.where(t.index < 9, np.nan, TRUTH)), "differs in 9 of 60 images"),
    (lambda t: t.rename(columns={"truth_Edema": "truth_edema", "score_Edema": "score_edema"}),
     "a.parquet has truth_Edema, .*b.parquet has not"),
    (lambda t: t.assign(patient_id="p"), "patient_id of .*b.parquet and of .*a.parquet differs in"),
    (lambda t: t.assign(patient_id=[None, *PATIENTS[1:]]), "b.parquet: patient_id is empty in 1 of 60 rows"),
    (lambda t: pd.concat([t, t[:2]]), "b.parquet: '000' is there twice \\(2 such rows\\)"),
    (lambda t: t[:0], "b.parquet: it has no rows"),
    (lambda t: t.drop(columns="image_id"), "b.parquet: no column image_id; it has patient_id"),
    (lambda t: t.assign(score_Edema=t["score_Edema"] * 9), "b.parquet: .*outside 0 to 1; give probabilities"),
    (lambda t: t.drop(columns="score_Edema"), "b.parquet: there is not both truth_Edema and score_Edema"),
    (lambda t: t[["image_id"]], "b.parquet: it has no truth \\(image_id\\)"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "line"), BAD)
def test_what_can_not_be_compared_is_one_line(write, change, line):
    runs = [write("a", predictions(0), "a.parquet"), write("b", change(predictions(1)), "b.parquet")]
    with pytest.raises(SistaError, match=line) as error:
        load(runs)
    assert "\n" not in str(error.value)


def test_a_metric_that_is_not_there_is_one_line(four, write):
    with pytest.raises(SistaError, match=r"has no auroc_macr; did you mean auroc_macro\?"):
        load(four, "auroc_macr")
    none = [write(name, predictions(n, truth_Edema=0.0)) for n, name in enumerate("ab")]
    with pytest.raises(SistaError, match="no auroc_macro \\(Edema has no positive image"):
        load(none)
    apart = [write("a", retrieved(2), "ten.parquet"), write("b", retrieved(3, k=5), "five.parquet")]
    with pytest.raises(SistaError, match=r"five.parquet: it has no precision@10_macro; did you mean precision@5_macro"):
        load(apart, "precision@10_macro")
    mixed = [write("a", predictions(0), metric="ece"), write("b", predictions(1), metric="auroc/Edema")]
    with pytest.raises(SistaError, match="has the metrics auroc/Edema, ece; give it one"):
        load(mixed)
    assert load(mixed, "auroc_macro")[0].metric == "auroc_macro"
    exclusive = [write("a", two_classes(0)), write("b", two_classes(1).assign(score_None=0.5))]
    with pytest.raises(SistaError, match="sum to 1 over the classes"):
        load(exclusive, "accuracy")
    assert load(exclusive)[0].metric == "auroc_macro"


def test_a_comparison_needs_two_methods_and_draws(four):
    with pytest.raises(SistaError, match="clip alone; give a second method"):
        compare(load(four[:2]))
    with pytest.raises(SistaError, match="no method 'clop'; did you mean clip"):
        compare(load(four), "clop")
    with pytest.raises(SistaError, match="the seed is -1; give 0 or more"):
        compare(load(four), draws=100, seed=-1)
    with pytest.raises(SistaError, match="99 draws give no interval"):
        compare(load(four), draws=99)


def test_broken_files_are_one_line(tmp_path):
    (tmp_path / "a.parquet").write_text("PAR1 not all of it")
    (tmp_path / "b.csv").write_text("")
    (tmp_path / "c.txt").write_text("x")
    (tmp_path / "d.csv").write_bytes(b"image_id\n\xff\xfe\n")
    lines = {"a.parquet": "cannot be read", "b.csv": "cannot be read", "c.txt": "neither .csv nor .parquet",
             "d.csv": "cannot be read", "e.csv": "no such file"}  # fmt: skip
    for name, line in lines.items():
        with pytest.raises(SistaError, match=line) as error:
            load([Run("a", tmp_path / name)])
        assert "\n" not in str(error.value)


# --- which files -------------------------------------------------------------------


def put(folder, name="predictions.parquet"):
    folder.mkdir(parents=True, exist_ok=True)
    if folder.name == "test":
        (folder / "metrics.json").write_text("{}")  # a test writes it last
    (folder / name).write_text("")
    return folder / name


def test_the_newest_tested_run_of_each_match_is_taken(tmp_path):
    put(tmp_path / "clip-0/0001/test")
    newest = put(tmp_path / "clip-0/0010/test")
    put(tmp_path / "clip-0/0009")  # of `sista predict`
    other = put(tmp_path / "clip-1/0001/test")
    put(tmp_path / "clip-1/0001")
    (tmp_path / "clip-1/0002").mkdir()
    runs, notes = find_runs({"clip": f"{tmp_path}/clip-*"})
    assert [run.file for run in runs] == [newest, other]
    assert [(run.method, run.seed) for run in runs] == [("clip", ""), ("clip", "")]
    assert notes == [f"{tmp_path}/clip-1: run 0002 has no test, 0001 is taken"]


def test_a_match_may_be_a_run_a_folder_or_a_file(tmp_path):
    run, folder = put(tmp_path / "a/0003/test"), put(tmp_path / "b")
    peer = put(tmp_path, "peer.csv")
    for pattern, file in {"a/0003": run, "a/0003/test": run, "b": folder, "*.csv": peer, "**/peer.csv": peer}.items():
        assert find_runs({"m": f"{tmp_path}/{pattern}"})[0][0].file == file


def test_matches_without_predictions_are_refused(tmp_path):
    put(tmp_path / "a/0001/test")
    (tmp_path / "a2/0001").mkdir(parents=True)
    for methods, line in (
        ({"x": f"{tmp_path}/z*"}, "x: nothing matches"),
        ({"x": f"{tmp_path}/a*"}, "x: .*a2 has no test/predictions.parquet; run `sista test`"),
        ({"x": f"{tmp_path}/a", "y": f"{tmp_path}/a/0001"}, "is taken for x and for y"),
    ):
        with pytest.raises(SistaError, match=line):
            find_runs(methods)


def test_a_table_of_cells_is_read(tmp_path):
    table = tmp_path / "cells.csv"
    table.write_text(
        "method,task,fraction,seed,predictions,metric\nNA,cls,0.10,0,r/p.parquet,\nclip,cls,,007,/q.csv,ece\n"
    )
    assert read_runs(table) == [
        Run("NA", tmp_path / "r/p.parquet", "0", "cls", 0.1),
        Run("clip", tmp_path / "/q.csv", "007", "cls", None, "ece"),
    ]
    table.write_text("method,task,fraction,seed,subset,predictions\na,cls,0.1,0,0,p.csv\na,cls,0.1,0,1,q.csv\n")
    assert [(run.seed, run.subset) for run in read_runs(table)] == [("0", "0"), ("0", "1")]


HEAD = "method,task,fraction,seed,predictions\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("method,task,fraction,seed,prediction\n", "no column 'predictions'; did you mean prediction"),
        (HEAD, "cells.csv: no line"),
        (HEAD + "a,t,0.1,0,p.csv\na,t,0.10,0,q.csv\n", "lines 2 and 3 are the same setting and seed"),
        (HEAD + "a,t,all,0,p.csv\n", "line 2: fraction is 'all'; give a number"),
        (HEAD + "a,t,1,0,p.csv\n,t,1,0,q.csv\n", "line 3: method is empty"),
        (HEAD + "a,t,1,0,\n", "line 2: predictions is empty"),
    ],
)
def test_a_bad_table_is_one_line(tmp_path, text, line):
    (tmp_path / "cells.csv").write_text(text)
    with pytest.raises(SistaError, match=line):
        read_runs(tmp_path / "cells.csv")
    with pytest.raises(SistaError, match=r"not \.csv"):
        read_runs(tmp_path / "cells.parquet")


# --- whether it keeps its word -------------------------------------------------------


def study(rng, clustered):
    """300 patients with 1 to 3 studies, 30 positive ones; two methods of the same true AUROC."""
    patients = np.repeat(np.arange(300), rng.integers(1, 4, 300))
    truth = np.zeros(len(patients))
    if clustered:  # on average: of the patients a tenth is ill, which half of their studies show
        truth[:] = (rng.random(300) < 0.1)[patients] & (rng.random(len(patients)) < 0.5)
    else:
        truth[rng.permutation(len(patients))[:30]] = 1
    shared = 1.2 * truth + 0.6 * rng.normal(size=300)[patients] + 0.5 * rng.normal(size=len(patients))
    noise = np.sqrt(1 - 0.6**2 - 0.5**2)
    scores = [stats.norm.cdf(shared + noise * rng.normal(size=len(patients))) for _ in range(2)]
    families = [Classification(truth[:, None], score[:, None], ["x"], "binary") for score in scores]
    runs = [Run(name, None) for name in "ab"]
    return Setting("", None, "auroc_macro", runs, families, patients.astype(str))


@pytest.mark.slow
@pytest.mark.parametrize("clustered", [False, True])
def test_intervals_cover_and_the_test_holds_its_level(clustered):
    rng, true = np.random.default_rng(2), stats.norm.cdf(1.2 / np.sqrt(2))
    covered = covered_difference = rejected = 0
    for n in range(1000):
        first, second = compare([study(rng, clustered)], draws=200, seed=n).rows
        covered += first["low"] <= true <= first["high"]
        covered_difference += second["difference_low"] <= 0 <= second["difference_high"]
        rejected += second["p"] <= 0.05
    print(f"\nclustered {clustered}: the interval covers {covered / 10} %, p <= 0.05 in {rejected / 10} % of null data")
    assert 930 <= covered <= 970
    assert 30 <= rejected <= 70
    assert covered_difference == 1000 - rejected
