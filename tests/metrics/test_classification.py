"""Classification against scikit-learn and loops over pairs; curves against the figures."""

import numpy as np
import pytest
from sklearn import metrics as sk

from sista_pl.errors import SistaError
from sista_pl.metrics import Classification, best_thresholds
from sista_pl.metrics.curves import precision_recall, roc

NAMES = ["Edema", "Effusion", "Mass"]


@pytest.fixture(params=range(4))
def labelled(request):
    """Truth with unknown entries, scores with many ties (and 0 and 1), weights with zeros."""
    rng = np.random.default_rng(request.param)
    truth = (rng.random((80, 3)) < (0.4, 0.2, 0.1)).astype(float)
    truth[0], truth[1] = 1, 0
    scores = np.round(np.clip(0.3 * truth + rng.random((80, 3)) - 0.1, 0, 1), 1 + request.param)
    truth[rng.random((80, 3)) < (0, 0.3, 0.1)] = np.nan
    truth[0], truth[1] = 1, 0
    weights = rng.integers(0, 4, 80).astype(float)
    weights[:2] = 1
    return truth, scores, weights


def slow_auroc(truth, scores, weights):
    """Over all pairs of a positive and a negative."""
    won = total = 0.0
    for i in np.flatnonzero(truth == 1):
        for j in np.flatnonzero(truth == 0):
            w = weights[i] * weights[j]
            won += w * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
            total += w
    return won / total


def slow_ece(scores, truth, weights):
    gap = 0.0
    for b in range(15):
        inside = [i for i, s in enumerate(scores) if b / 15 <= s < (b + 1) / 15 or (b == 14 and s == 1)]
        w = sum(weights[i] for i in inside)
        if w:
            confidence = sum(weights[i] * scores[i] for i in inside) / w
            gap += w * abs(confidence - sum(weights[i] * truth[i] for i in inside) / w)
    return gap / sum(weights)


def test_multilabel_figures_equal_scikit_learn_and_the_loops(labelled):
    truth, scores, weights = labelled
    thresholds = np.array([0.5, 0.3, 0.62])
    figures = Classification(truth, scores, NAMES, thresholds=thresholds).figures(weights)
    right = total = 0.0
    calibration = []
    for k, name in enumerate(NAMES):
        known = ~np.isnan(truth[:, k])
        t, s, w = truth[known, k], scores[known, k], weights[known]
        said = s >= thresholds[k]
        assert figures[f"auroc/{name}"] == pytest.approx(slow_auroc(t, s, w), abs=1e-12)
        assert figures[f"auroc/{name}"] == pytest.approx(sk.roc_auc_score(t, s, sample_weight=w), abs=1e-12)
        assert figures[f"auprc/{name}"] == pytest.approx(sk.average_precision_score(t, s, sample_weight=w), abs=1e-12)
        assert figures[f"f1/{name}"] == pytest.approx(sk.f1_score(t, said, sample_weight=w), abs=1e-12)
        right, total = right + w[said == t].sum(), total + w.sum()
        calibration.append(slow_ece(s, t, w))
    for figure in ("auroc", "auprc", "f1"):
        assert figures[f"{figure}_macro"] == pytest.approx(np.mean([figures[f"{figure}/{name}"] for name in NAMES]))
    assert figures["accuracy"] == pytest.approx(right / total)
    assert figures["ece"] == pytest.approx(np.mean(calibration), abs=1e-12)
    assert len(figures) == 14


@pytest.mark.parametrize("kind", ["multilabel", "multiclass"])
def test_weights_are_repeats(labelled, kind):
    truth, scores, weights = labelled
    if kind == "multiclass":
        truth = np.eye(3)[np.arange(80) % 3]
    repeated = np.repeat(np.arange(80), weights.astype(int))
    weighted = Classification(truth, scores, NAMES, kind).figures(weights)
    assert weighted == pytest.approx(Classification(truth[repeated], scores[repeated], NAMES, kind).figures())


def test_multiclass_figures_equal_scikit_learn():
    rng = np.random.default_rng(0)
    label, weights = rng.integers(0, 3, 90), rng.integers(0, 3, 90).astype(float)
    scores = np.round(rng.dirichlet([1, 1, 1], 90) * 0.6 + 0.4 * np.eye(3)[label] * (rng.random((90, 1)) < 0.4), 2)
    truth = np.eye(3)[label]
    truth[5] = np.nan  # an image of unknown class
    truth[6, 0] = np.nan
    figures = Classification(truth, scores, NAMES, "multiclass").figures(weights)
    kept = np.delete(np.arange(90), [5, 6])
    t, s, w = label[kept], scores[kept], weights[kept]
    said = s.argmax(1)
    assert figures["accuracy"] == pytest.approx(sk.accuracy_score(t, said, sample_weight=w))
    assert figures["f1_macro"] == pytest.approx(sk.f1_score(t, said, sample_weight=w, average="macro"))
    assert figures["ece"] == pytest.approx(slow_ece(s.max(1), said == t, w), abs=1e-12)
    for k, name in enumerate(NAMES):
        assert figures[f"auroc/{name}"] == pytest.approx(sk.roc_auc_score(t == k, s[:, k], sample_weight=w))
        assert figures[f"auprc/{name}"] == pytest.approx(sk.average_precision_score(t == k, s[:, k], sample_weight=w))


def test_binary_is_one_column(labelled):
    truth, scores, _ = labelled
    one = Classification(truth[:, :1], scores[:, :1], ["Edema"], "binary").figures()
    assert one["auroc/Edema"] == one["auroc_macro"] == pytest.approx(sk.roc_auc_score(truth[:, 0], scores[:, 0]))
    assert one["accuracy"] == pytest.approx(((scores[:, 0] >= 0.5) == truth[:, 0]).mean())


def test_absent_classes_are_named_and_left_out_of_the_means(labelled):
    truth, scores, _ = labelled
    truth = truth.copy()
    truth[:, 1] = np.where(np.isnan(truth[:, 1]), np.nan, 0)
    truth[:, 2] = 1
    family = Classification(truth, scores, NAMES)
    figures = family.figures()
    assert family.absent == [
        "Effusion has no positive image: no AUROC, average precision and F1",
        "Mass has no negative image: no AUROC and average precision",
    ]
    assert figures["auroc_macro"] == figures["auroc/Edema"]
    assert figures["auprc_macro"] == figures["auprc/Edema"]
    assert figures["f1_macro"] == pytest.approx((figures["f1/Edema"] + figures["f1/Mass"]) / 2)
    assert not {"auroc/Effusion", "auprc/Effusion", "f1/Effusion", "auroc/Mass", "auprc/Mass"} & set(figures)
    assert all(np.isfinite(value) for value in figures.values())


def test_a_draw_may_leave_a_class_or_everything_undefined(labelled):
    truth, scores, _ = labelled
    family = Classification(truth, scores, NAMES)
    assert "auroc/Edema" not in family.figures(truth[:, 0] == 0)
    assert family.figures(np.zeros(80)) == {}
    assert Classification(np.zeros((0, 3)), np.zeros((0, 3)), NAMES).figures() == {}


def test_all_negative_has_accuracy_and_calibration_alone():
    figures = Classification(np.zeros((5, 3)), np.full((5, 3), 0.25), NAMES).figures()
    assert figures == pytest.approx({"accuracy": 1.0, "ece": 0.25})


def test_all_unknown_is_nothing():
    assert Classification(np.full((5, 3), np.nan), np.full((5, 3), 0.25), NAMES).figures() == {}
    eye = np.full((5, 3), np.nan)
    assert Classification(eye, np.full((5, 3), 0.25), NAMES, "multiclass").figures() == {}


def test_best_thresholds_equal_a_search(labelled):
    truth, scores, _ = labelled
    found = best_thresholds(truth, scores)
    for k in range(3):
        known = ~np.isnan(truth[:, k])
        t, s = truth[known, k], scores[known, k]
        cuts = [(np.r_[np.unique(s)[::-1], 0][i : i + 2]).mean() for i in range(len(np.unique(s)))]
        worth = [sk.f1_score(t, s >= cut) for cut in cuts]
        assert sk.f1_score(t, s >= found[k]) == pytest.approx(max(worth))
        assert found[k] == pytest.approx(cuts[int(np.argmax(np.round(worth, 12)))], abs=1e-6)


def test_thresholds_of_odd_classes():
    truth = np.array([[0, 1, np.nan], [0, 1, 1.0], [0, 1, 0]])
    scores = np.array([[0.2, 0.4, 0.99], [0.3, 0.6, 0.8], [0.4, 0.8, 0.4]])
    assert best_thresholds(truth, scores) == pytest.approx([0.5, 0.2, 0.6])


def test_a_threshold_cuts_between_neighbouring_numbers():
    above = np.float32(0.5)
    for low, high in ((np.nextafter(above, np.float32(0)), above), (above, np.nextafter(above, np.float32(1)))):
        scores = np.array([[low], [high]], np.float32)
        cut = best_thresholds(np.array([[0.0], [1.0]]), scores).astype(np.float32)
        assert (scores >= cut).tolist() == [[False], [True]]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"scores": [[0.1, np.nan], [np.inf, 0.2]]}, "2 of 4 scores are not finite"),
        ({"scores": [[0.1, -3.0], [4.0, 0.2]]}, "2 of 4 scores are outside 0 to 1; give probabilities"),
        ({"truth": [[1, -1], [0, 1]]}, "1 of 4 labels are not 1, 0 or NaN"),
        ({"truth": [[1, 1], [0, 1]], "kind": "multiclass"}, "1 of 2 images have no class or several"),
        ({"kind": "binary"}, "binary has one column, not 2"),
        ({"kind": "multilable"}, "did you mean multilabel"),
        ({"names": ["a"]}, r"truth is \(2, 2\), scores are \(2, 2\), names 1"),
    ],
)
def test_bad_input_is_one_line(change, line):
    given = {"truth": [[1, 0], [0, 1]], "scores": [[0.5, 0.5], [0.5, 0.5]], "names": ["a", "b"], "kind": "multilabel"}
    given |= change
    with pytest.raises(SistaError, match=line):
        Classification(np.array(given["truth"], float), np.array(given["scores"]), given["names"], given["kind"])


def test_curves_are_those_of_scikit_learn(labelled):
    truth, scores, _ = labelled
    known = ~np.isnan(truth[:, 1])
    t, s = truth[known, 1], scores[known, 1]
    x, y, _ = sk.roc_curve(t, s, drop_intermediate=False)
    assert np.allclose(roc(truth[:, 1], scores[:, 1]), (x, y))
    precision, recall, _ = sk.precision_recall_curve(t, s)
    assert np.allclose(precision_recall(truth[:, 1], scores[:, 1]), (recall[::-1], precision[::-1]))
    figures = Classification(truth, scores, NAMES).figures()
    x, y = roc(truth[:, 1], scores[:, 1])
    assert np.trapezoid(y, x) == pytest.approx(figures["auroc/Effusion"])
    x, y = precision_recall(truth[:, 1], scores[:, 1])
    assert np.diff(x) @ y[1:] == pytest.approx(figures["auprc/Effusion"])


def test_curves_of_one_kind_of_image_are_empty():
    for curve in (roc, precision_recall):
        x, y = curve(np.array([1.0, np.nan, 1.0]), np.array([0.1, 0.2, 0.3]))
        assert len(x) == len(y) == 0
