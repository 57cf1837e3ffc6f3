"""Dice, IoU and specificity against loops over masks."""

import numpy as np
import pytest

from sista_pl.errors import SistaError
from sista_pl.metrics import Segmentation


@pytest.fixture
def masks():
    """30 pairs (prediction, truth) of 8 x 8, some empty on either side, some pixels ignored."""
    rng = np.random.default_rng(0)
    pairs = []
    for i in range(30):
        truth = rng.choice([0, 255], (8, 8), p=[0.7, 0.3]).astype(np.uint8) * (i % 3 > 0)
        truth[rng.random((8, 8)) < 0.1] = 127
        pairs.append((rng.random((8, 8)) < (0.3 if i % 5 else 0), truth))
    return pairs


def sets(prediction, truth):
    """Pixels as sets, the ignored left out."""
    known = {(y, x) for y in range(8) for x in range(8) if truth[y, x] != 127}
    said = {at for at in known if prediction[at]}
    return said, {at for at in known if truth[at] == 255}


def slow(pairs):
    """Every figure pixel by pixel; `pairs` may hold an image twice."""
    each = [sets(*pair) for pair in pairs]
    dice = [2 * len(p & t) / (len(p) + len(t)) if p or t else 1.0 for p, t in each]
    positive, empty = [i for i, (_, t) in enumerate(each) if t], [i for i, (_, t) in enumerate(each) if not t]
    return {
        "dice_image_empty1": np.mean(dice),
        "dice_positive": np.mean([dice[i] for i in positive]),
        "dice_dataset": 2 * sum(len(p & t) for p, t in each) / sum(len(p) + len(t) for p, t in each),
        "iou": np.mean([len(p & t) / len(p | t) if p | t else 1.0 for p, t in each]),
        "empty_specificity": np.mean([not each[i][0] for i in empty]),
    }


def counted(pairs):
    return np.array([(len(p & t), len(p), len(t)) for p, t in (sets(*pair) for pair in pairs)]).T


def test_figures_equal_the_loop(masks):
    family = Segmentation(*counted(masks))
    assert family.figures() == pytest.approx(slow(masks))
    assert 0 < family.figures()["empty_specificity"] < 1
    assert family.absent == []


def test_weights_are_repeats(masks):
    weights = np.random.default_rng(1).integers(0, 4, 30)
    repeated = [pair for pair, n in zip(masks, weights, strict=True) for _ in range(n)]
    assert Segmentation(*counted(masks)).figures(weights) == pytest.approx(slow(repeated))


def test_several_classes_stand_beside_their_mean(masks):
    one, two = counted(masks), counted(masks[::-1])[:, ::-1] * np.array([[1], [2], [1]])
    both = Segmentation(*np.stack([one, two], -1), names=["left", "right"]).figures()
    for figure, value in Segmentation(*one).figures().items():
        other = Segmentation(*two).figures()[figure]
        assert both[f"{figure}/left"] == pytest.approx(value)
        assert both[f"{figure}/right"] == pytest.approx(other)
        assert both[figure] == pytest.approx((value + other) / 2)


def test_a_class_without_an_object_is_left_out_of_the_mean():
    family = Segmentation(*np.array([[[3, 0]], [[4, 0]], [[4, 0]]]), names=["heart", "clip"])
    figures = family.figures()
    assert figures["dice_positive"] == figures["dice_positive/heart"] == 0.75
    assert "dice_positive/clip" not in figures
    assert figures["dice_image_empty1"] == (0.75 + 1) / 2
    assert family.absent == [
        "every image has an object of heart: no empty_specificity",
        "no image has an object of clip: no dice_positive, no dice_dataset",
    ]


def test_a_test_set_without_objects():
    family = Segmentation(np.zeros(4), np.array([0, 0, 0, 9]), np.zeros(4))
    assert family.figures() == {"dice_image_empty1": 0.75, "dice_dataset": 0, "iou": 0.75, "empty_specificity": 0.75}
    assert family.absent == ["no image has an object: no dice_positive"]
    silent = Segmentation(np.zeros(4), np.zeros(4), np.zeros(4))
    assert silent.figures() == {"dice_image_empty1": 1, "iou": 1, "empty_specificity": 1}
    assert "dice_dataset" in silent.absent[0]


def test_a_draw_of_empty_images_alone_leaves_dice_positive_out(masks):
    family = Segmentation(*counted(masks))
    assert "dice_positive" not in family.figures(np.arange(30) % 3 == 0)
    assert family.figures(np.zeros(30)) == {}


def test_counts_and_names_have_to_agree():
    with pytest.raises(SistaError, match="for 1 classes"):
        Segmentation(*np.zeros((3, 5, 2)))
    with pytest.raises(SistaError, match="for 1 classes"):
        Segmentation(np.zeros(5), np.zeros(4), np.zeros(5))
