"""Families rebuilt from predictions.parquet, as the tasks write it, and single figures."""

import json
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sista_tasks.classification.task import ClassificationTask
from sista_tasks.detection.task import DetectionTask
from sista_tasks.segmentation.task import SegmentationTask

from sista_pl.errors import SistaError
from sista_pl.metrics import Classification, Detection, Segmentation
from sista_pl.predictions import Predicted

NONE = np.zeros(0, np.int64)


def labelled(seed=0, kind="multilabel", images=40):
    rng = np.random.default_rng(seed)
    if kind == "multiclass":
        return np.eye(3)[rng.integers(3, size=images)], rng.dirichlet([1, 1, 1], images)
    truth = (rng.random((images, 3)) < 0.4).astype(float)
    truth[rng.random((images, 3)) < 0.2] = np.nan
    return truth, rng.random((images, 3))


def boxes(seed=0, images=12):
    """N times items (M, 6) of the truth, and of the predictions, on a grid that two decimals hold."""
    rng = np.random.default_rng(seed)
    truth, said = [], []
    for count in rng.integers(0, 4, images):
        place = rng.integers(2, 30, (count, 4)).astype(float)
        truth.append(np.column_stack([rng.integers(0, 2, count), np.ones(count), place]))
        near = np.repeat(place, 2, 0) + rng.integers(-1, 2, (2 * count, 4))
        said.append(np.column_stack([np.repeat(truth[-1][:, 0], 2), rng.random(2 * count).round(5), near]))
    return truth, said


def family(truth, said, names):
    return Detection(
        [t[:, 2:] for t in truth], [t[:, 0].astype(int) for t in truth], [s[:, 2:] for s in said],
        [s[:, 0].astype(int) for s in said], [s[:, 1] for s in said], names,
    )  # fmt: skip


@pytest.fixture(params=["multilabel", "multiclass", "masks", "boxes", "one class of boxes"])
def any_family(request):
    if request.param == "masks":
        both, more, other = np.random.default_rng(0).integers(0, 9, (3, 30))
        some = np.arange(30) % 2
        return Segmentation(both * some, (both + more) * (np.arange(30) % 6 > 1), (both + other + 1) * some)
    if request.param.endswith("boxes"):
        truth, said = boxes()
        if request.param.startswith("one"):
            for part in (*truth, *said):
                part[:, 0] = 0
        return family(truth, said, ["mass", "nodule"][: 1 if request.param.startswith("one") else 2])
    return Classification(*labelled(kind=request.param), ["a", "b", "c/d"], request.param)


def test_a_figure_is_that_of_all_figures(any_family):
    size = len(any_family.truth) if isinstance(any_family, Segmentation) else any_family.size
    for weights in (None, np.random.default_rng(1).integers(0, 3, size).astype(float)):
        figures = any_family.figures(weights)
        assert len(figures) > 3
        assert {name: any_family.figure(name, weights) for name in figures} == figures
        assert np.isnan(any_family.figure("auroc/none", weights))
        assert np.isnan(any_family.figure("map_coco/none", weights))
        assert np.isnan(any_family.figure("nonsense", weights))
    nothing = any_family.figures(np.zeros(size))
    for name in figures:
        assert any_family.figure(name, np.zeros(size)) == pytest.approx(nothing.get(name, np.nan), nan_ok=True)


@pytest.mark.parametrize("kind", ["multilabel", "multiclass", "binary"])
def test_classification_comes_back_from_the_task_s_table(kind):
    truth, scores = labelled(3, kind)
    names = ["Edema", "Pleural Effusion", "score_x"]
    if kind == "binary":
        truth, scores, names = truth[:, :1], scores[:, :1], names[:1]
    data = SimpleNamespace(labels=truth, classes=names)
    found = Predicted(np.arange(40), scores.astype(np.float32), np.zeros((0, 0)), NONE)
    told = ClassificationTask.table(SimpleNamespace(trainer=SimpleNamespace(datamodule=data)), found)
    again = Classification.from_table(pd.DataFrame(told))
    assert (again.names, again.exclusive) == (names, kind == "multiclass")
    assert again.figures() == Classification(truth, found.values, names, kind).figures()


def test_segmentation_comes_back_from_the_task_s_table():
    values = np.array([[3, 5, 6], [0, 0, 0], [0, 4, 0]], np.float32)
    found = Predicted(np.arange(3), values, np.zeros((0, 2)), NONE)
    again = Segmentation.from_table(pd.DataFrame(SegmentationTask.table(SimpleNamespace(image_size=8), found)))
    assert again.figures() == Segmentation(*values.T).figures()


def test_detection_comes_back_from_the_task_s_table():
    truth, said = boxes()
    names = ["nodule", "mass"]  # not in the order of the alphabet
    task = SimpleNamespace(truth=lambda rows: truth, classes=names, image_size=64)
    task.as_json = partial(DetectionTask.as_json, task)
    place = np.repeat(np.arange(12), [len(s) for s in said])
    told = DetectionTask.table(task, Predicted(np.arange(12), np.zeros((12, 1)), np.concatenate(said), place))
    again = Detection.from_table(pd.DataFrame(told))
    assert again.names == ["mass", "nodule"]
    assert again.figures() == pytest.approx(family(truth, said, names).figures())
    empty = Detection.from_table(pd.DataFrame({"truth_boxes": ["[]"], "predicted_boxes": ["[]"]}))
    assert empty.figures() == {}


BOX = {"category": "a", "x": 1, "y": 1, "w": 2, "h": 2}


@pytest.mark.parametrize(
    ("kind", "columns", "line"),
    [
        (Classification, {"truth_a": [1, 0], "score_b": [0.5, 0.5]}, "not both truth_a and score_a"),
        (Classification, {"truth_a": [1, 0], "score_a": [0.5, 0.5], "score_b": [0, 1]}, "not both truth_b and score_b"),
        (Classification, {"dice": [1, 0]}, "not both truth_<class> and score_<class>"),
        (Classification, {"truth_a": ["yes", "no"], "score_a": [0.5, 0.5]}, "column truth_a holds no numbers"),
        (Classification, {"truth_a": [1, 0], "score_a": [0.5, 7]}, "1 of 2 scores are outside 0 to 1"),
        (Segmentation, {"intersection_pixels": [3], "predicted_pixels": [2], "truth_pixels": [4]}, "1 of 1 rows"),
        (Segmentation, {"intersection_pixels": [1], "predicted_pixels": [None], "truth_pixels": [4]}, "1 of 1 rows"),
        (Segmentation, {"intersection_pixels": ["x"], "predicted_pixels": [2], "truth_pixels": [4]}, "no numbers"),
        (Detection, {"truth_boxes": ["[]"], "predicted_boxes": [json.dumps([BOX])]}, "no JSON of category"),
        (Detection, {"truth_boxes": ["[{]"], "predicted_boxes": ["[]"]}, "no JSON of category"),
        (Detection, {"truth_boxes": [None], "predicted_boxes": ["[]"]}, "no JSON of category"),
        (Detection, {"truth_boxes": [json.dumps([BOX | {"x": "?"}])], "predicted_boxes": ["[]"]}, "no JSON of"),
    ],
)
def test_a_table_that_is_none_is_one_line(kind, columns, line):
    with pytest.raises(SistaError, match=line) as error:
        kind.from_table(pd.DataFrame(columns))
    assert "\n" not in str(error.value)


def test_a_macro_auroc_of_fourteen_classes_takes_less_than_a_millisecond():
    rng = np.random.default_rng(0)
    truth = (rng.random((2000, 14)) < 0.1).astype(float)
    found = Classification(truth, rng.random((2000, 14)), [f"c{k}" for k in range(14)])
    weights = rng.integers(0, 3, 2000).astype(float)
    start = time.process_time()
    for _ in range(100):
        found.figure("auroc_macro", weights)
    assert time.process_time() - start < 0.1
