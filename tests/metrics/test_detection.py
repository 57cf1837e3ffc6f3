"""Detection against faster-coco-eval, a slow FROC, and literally repeated images."""

import numpy as np
import pytest
from faster_coco_eval import COCO, COCOeval_faster

from sista_pl.errors import SistaError
from sista_pl.metrics import Detection
from sista_pl.metrics.curves import froc

NAMES = ["opacity", "device", "node"]
NONE = np.zeros((0, 4))


def some_boxes(rng, count):
    return np.column_stack([rng.integers(0, 40, (count, 2)), rng.integers(4, 20, (count, 2))]).astype(float)


def draw(seed, images=12, classes=3, most=8, grid=True):
    """Images, some without truth, some without detections, as arguments of `Detection`.

    On the grid, IoUs are often equal and scores tied; else no two scores are.
    """
    rng = np.random.default_rng(seed)
    lists: list = [[], [], [], [], []]
    for _ in range(images):
        truth = some_boxes(rng, int(rng.integers(5)) * (rng.random() > 0.3))
        kinds = rng.integers(0, classes, len(truth))
        near = np.repeat(truth, 2, 0) + rng.integers(-2, 3, (2 * len(truth), 4))
        near[:, 2:] = np.maximum(near[:, 2:], 1)
        found = np.concatenate([near, some_boxes(rng, int(rng.integers(most)))]) if rng.random() > 0.2 else NONE
        said = np.concatenate([np.repeat(kinds, 2), rng.integers(0, classes, len(found))])[: len(found)]
        scores = rng.random(len(found))
        for part, value in zip(lists, (truth, kinds, found, said, scores.round(1) if grid else scores), strict=True):
            part.append(value)
    return lists


def coco(case, ious, classes=3):
    """Mean average precision by faster-coco-eval, nothing where it has none."""
    truth, kinds, found, said, scores = case
    boxes = [
        {"image_id": i + 1, "category_id": int(kind) + 1, "bbox": box.tolist(), "area": box[2] * box[3], "iscrowd": 0}
        for i, (each, labels) in enumerate(zip(truth, kinds, strict=True))
        for box, kind in zip(each, labels, strict=True)
    ]
    reference = COCO()
    reference.dataset = {
        "info": {},
        "images": [{"id": i + 1, "width": 100, "height": 100} for i in range(len(truth))],
        "annotations": [box | {"id": n + 1} for n, box in enumerate(boxes)],
        "categories": [{"id": k + 1, "name": str(k)} for k in range(classes)],
    }
    reference.createIndex()
    detections = reference.loadRes(
        [
            {"image_id": i + 1, "category_id": int(kind) + 1, "bbox": box.tolist(), "score": float(score)}
            for i, each in enumerate(zip(found, said, scores, strict=True))
            for box, kind, score in zip(*each, strict=True)
        ]
    )
    judge = COCOeval_faster(reference, detections, "bbox")
    judge.params.iouThrs = np.asarray(ious)
    judge.evaluate()
    judge.accumulate()
    precision = judge.eval["precision"][:, :, :, 0, -1]
    return float(precision[precision > -1].mean())


def published(case):
    """What MGCA's code keeps: sure detections, then images that have both one and a true box."""
    truth, kinds, found, said, scores = case
    sure = [score >= 0.5 for score in scores]
    kept = [i for i in range(len(truth)) if len(truth[i]) and sure[i].any()]
    return (
        [truth[i] for i in kept], [kinds[i] for i in kept], [found[i][sure[i]] for i in kept],
        [said[i][sure[i]] for i in kept], [scores[i][sure[i]] for i in kept],
    )  # fmt: skip


def repeat(case, weights):
    return [[value for value, n in zip(part, weights, strict=True) for _ in range(n)] for part in case]


def iou(a, b):
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(0, width) * max(0, height)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def slow_sensitivity(case, kind, rate):
    """The best sensitivity at a threshold with at most `rate` false positives an image: every threshold anew."""
    truth, kinds, found, said, scores = case
    total = sum(int((k == kind).sum()) for k in kinds)
    best = 0.0
    for cut in {score for each in scores for score in each}:
        hits = alarms = 0
        for boxes, labels, each, of, sure in zip(truth, kinds, found, said, scores, strict=True):
            free = [box for box, label in zip(boxes, labels, strict=True) if label == kind]
            for d in sorted(range(len(each)), key=lambda d: -sure[d]):
                if of[d] != kind or sure[d] < cut:
                    continue
                near = [iou(each[d], box) for box in free]
                if near and max(near) >= 0.4:
                    hits += 1
                    # the last among equals
                    free.pop(len(near) - 1 - near[::-1].index(max(near)))
                else:
                    alarms += 1
        if alarms <= rate * len(truth):
            best = max(best, hits / total)
    return best


@pytest.mark.parametrize("seed", range(12))
def test_average_precision_equals_faster_coco_eval(seed):
    case = draw(seed)
    figures = Detection(*case, NAMES).figures()
    assert figures["map_coco"] == pytest.approx(coco(case, np.linspace(0.5, 0.95, 10)), abs=1e-12)
    low = np.r_[np.linspace(0.4, 0.45, 2), np.linspace(0.5, 0.95, 10)[:6]]
    assert figures["map_40_75"] == pytest.approx(coco(case, low), abs=1e-12)
    assert figures["ap_50"] == pytest.approx(coco(case, [0.5]), abs=1e-12)
    assert figures["map_mgca"] == pytest.approx(coco(published(case), low), abs=1e-12)
    for k, name in enumerate(NAMES):
        mine = [[part[i][case[1][i] == k] for i in range(12)] for part in case[:2]]
        mine += [[part[i][case[3][i] == k] for i in range(12)] for part in case[2:]]
        assert figures[f"ap_50/{name}"] == pytest.approx(coco(mine, [0.5]), abs=1e-12)


def test_only_the_hundred_surest_of_a_class_count():
    case = draw(0, images=4, classes=1, most=400, grid=False)
    assert max(map(len, case[2])) > 200
    found = Detection(*case, ["opacity"])
    assert np.bincount(found.ranked[0].image).max() == 100
    assert found.figures()["map_coco"] == pytest.approx(coco(case, np.linspace(0.5, 0.95, 10), 1), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_froc_equals_the_slow_one(seed):
    case = draw(seed, images=8)
    figures = Detection(*case, NAMES).figures()
    rates = [1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8]
    present = [k for k in range(3) if any((kinds == k).any() for kinds in case[1])]
    slow = np.array([[slow_sensitivity(case, k, rate) for rate in rates] for k in present])
    assert [figures[f"sensitivity@{rate:g}fp"] for rate in rates] == pytest.approx(slow.mean(0))
    assert figures["froc"] == pytest.approx(slow.mean())
    assert [figures[f"froc/{NAMES[k]}"] for k in present] == pytest.approx(slow.mean(1))
    assert 0.1 < figures["froc"] < 0.9


@pytest.mark.parametrize("seed", range(6))
def test_weights_are_repeats(seed):
    case = draw(seed, grid=False)
    if seed % 2:  # ties between images, none within one
        case[4] = [np.argsort(np.argsort(scores)) / 20 for scores in case[4]]
    weights = np.random.default_rng(seed).integers(0, 4, 12)
    repeated = repeat(case, weights)
    figures = Detection(*case, NAMES).figures(weights)
    assert figures == pytest.approx(Detection(*repeated, NAMES).figures(), abs=1e-12)
    assert figures["map_coco"] == pytest.approx(coco(repeated, np.linspace(0.5, 0.95, 10)), abs=1e-12)


BOX, ELSEWHERE = np.array([[10.0, 10.0, 20.0, 20.0]]), np.array([[60.0, 60.0, 20.0, 20.0]])


def by_hand(*images):
    """(true boxes, detections, scores) an image, of one class."""
    truth, found, scores = zip(*images, strict=True)
    kinds = [[np.zeros(len(each), int) for each in part] for part in (truth, found)]
    return Detection(truth, kinds[0], found, kinds[1], [np.array(each) for each in scores], ["opacity"])


def test_map_mgca_leaves_out_what_the_published_code_leaves_out():
    """Missed, false alarm on a normal image, found but unsure: none of them counts, and the rest is perfect."""
    found = (BOX, BOX, [0.9])
    missed, alarm, unsure = (BOX, NONE, []), (NONE, BOX, [0.95]), (BOX, BOX, [0.4])
    figures = by_hand(found, missed, alarm, unsure).figures()
    assert figures["map_mgca"] == 1.0
    # alarm, found, unsure by score: precision 2/3 up to a recall of 2/3, which 67 of the 101 points lie below
    assert figures["map_40_75"] == pytest.approx(67 / 101 * 2 / 3)
    # a false alarm on an image with a true box is the one mistake that it sees
    both = (BOX, np.concatenate([ELSEWHERE, BOX]), [0.95, 0.9])
    assert by_hand(both, missed, alarm, unsure).figures()["map_mgca"] == pytest.approx(0.5)
    # nothing sure anywhere: a defined 0, so that early epochs can be compared
    assert by_hand(missed, unsure).figures()["map_mgca"] == 0


def test_a_box_is_found_once_and_by_the_surest():
    figures = by_hand((BOX, np.concatenate([BOX + [1, 0, 0, 0], BOX]), [0.9, 0.8])).figures()
    assert figures["ap_50"] == 1.0
    assert figures["sensitivity@0.125fp"] == 1.0
    # at IoU .95 the first is none, the second stands behind it
    assert figures["map_coco"] == pytest.approx((9 + 0.5) / 10)


def test_a_threshold_takes_all_equal_scores():
    images = (BOX, BOX, [0.5]), (NONE, ELSEWHERE, [0.5])
    figures = by_hand(*images).figures()
    assert figures["sensitivity@0.25fp"] == 0
    assert figures["sensitivity@0.5fp"] == 1
    assert np.array(froc(by_hand(*images))).tolist() == [[0, 0.5], [0, 1]]


def test_the_froc_curve_passes_through_the_figures():
    family = Detection(*draw(1), NAMES)
    for k, name in enumerate(NAMES):
        x, y = froc(family, k)
        rates = [y[x <= rate][-1] for rate in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)]
        assert family.figures()[f"froc/{name}"] == pytest.approx(np.mean(rates))
        assert (np.diff(x) >= 0).all()
        assert (np.diff(y) >= 0).all()


def test_without_a_true_box_nothing_is_defined():
    family = by_hand((NONE, BOX, [0.9]), (NONE, NONE, []))
    assert family.figures() == {}
    assert family.absent == ["no image has a true box: no mAP, FROC and sensitivity"]
    assert all(len(part) == 0 for part in froc(family))
    some = by_hand((NONE, BOX, [0.9]), (BOX, BOX, [0.9]))
    assert some.figures(np.array([1.0, 0.0])) == {}
    assert some.absent == []


def test_without_a_detection_all_is_zero():
    family = by_hand((BOX, NONE, []), (NONE, NONE, []))
    assert len(family.figures()) == 12
    assert set(family.figures().values()) == {0.0}
    assert family.absent == []


def test_an_absent_class_is_named_and_left_out_of_the_means():
    ones, zeros = np.ones(1, int), np.zeros(1, int)
    family = Detection([BOX, NONE], [zeros, zeros[:0]], [BOX, BOX], [zeros, ones], [np.ones(1)] * 2, NAMES[:2])
    assert family.absent == ["device has no true box: left out of the means"]
    figures = family.figures()
    assert figures["map_coco"] == figures["map_coco/opacity"] == 1.0
    assert not any(name.endswith("device") for name in figures)


def test_empty_lists_of_any_shape_are_read():
    family = Detection([np.array([])], [np.array([])], [[]], [[]], [[]], NAMES)
    assert family.figures() == {}
    assert Detection([], [], [], [], [], NAMES).figures() == {}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"scores": [np.array([np.nan])]}, "1 of 1 scores are not finite"),
        ({"predictions": [BOX * np.inf]}, "1 of 1 prediction boxes are not finite"),
        ({"labels": [np.array([3])]}, "prediction labels run from 3 to 3; there are 3 classes"),
        ({"truth_labels": [np.array([-1])]}, "truth labels run from -1 to -1"),
        ({"scores": [np.ones(2)]}, "image 0 has 1 prediction boxes but another number"),
        ({"truth": [BOX, BOX]}, "of different numbers of images"),
    ],
)
def test_bad_input_is_one_line(change, line):
    given = {"truth": [BOX], "truth_labels": [np.zeros(1, int)], "predictions": [BOX], "labels": [np.zeros(1, int)],
             "scores": [np.ones(1)], "names": NAMES}  # fmt: skip
    with pytest.raises(SistaError, match=line):
        Detection(**(given | change))
