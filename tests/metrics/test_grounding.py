"""The figures of grounding against slow loops over pixels."""

import numpy as np
import pandas as pd
import pytest

from sista_pl.errors import SistaError
from sista_pl.metrics.grounding import Grounding, contrast, mean_iou, pointing


@pytest.fixture(params=range(4))
def drawn(request):
    generator = np.random.default_rng(request.param)
    values = generator.normal(0.2, 0.3, (7, 9))
    return values, generator.random((7, 9)) < 0.3, generator.random((7, 9)) < 0.8


def pixels(region, known):
    every = [(y, x) for y in range(7) for x in range(9) if known[y, x]]
    return every, [place for place in every if region[place]], [place for place in every if not region[place]]


def test_against_loops_over_pixels(drawn):
    values, region, known = drawn
    every, inside, outside = pixels(region, known)
    assert pointing(values, region, known) == (max(every, key=lambda place: values[place]) in inside)
    of = {name: [values[place] for place in part] for name, part in (("in", inside), ("out", outside))}
    mean = {name: sum(numbers) / len(numbers) for name, numbers in of.items()}
    noise = sum(sum((n - mean[name]) ** 2 for n in numbers) / len(numbers) for name, numbers in of.items()) ** 0.5
    assert contrast(values, region, known) == pytest.approx((mean["in"] - mean["out"]) / noise)
    ious = []
    for threshold in (0.1, 0.2, 0.3, 0.4, 0.5):
        said = {place for place in every if values[place] > threshold}
        ious.append(len(said & set(inside)) / len(said | set(inside)))
    assert mean_iou(values, region, known) == pytest.approx(np.mean(ious))


def test_a_map_without_contrast_hits_as_a_random_point_and_has_no_contrast(drawn):
    _, region, known = drawn
    flat = np.full(region.shape, 0.7)
    assert pointing(flat, region, known) == pytest.approx((region & known).sum() / known.sum())
    assert contrast(flat, region, known) == 0
    assert contrast(np.where(region, 1.0, 0.0), region, np.ones_like(region)) == 0, "no noise at all"
    assert contrast(flat, np.ones_like(region), known) == 0, "nothing outside"


def test_the_wrong_way_round_is_below_zero(drawn):
    values, region, known = drawn
    values = values + region
    assert contrast(values, region, known) > 0 > contrast(-values, region, known)


@pytest.fixture
def family():
    generator = np.random.default_rng(1)
    present = generator.random((40, 3)) < [0.5, 0.2, 0.0]
    return Grounding(generator.random((40, 3, 7)) * present[..., None], present, ["a", "b", "c"])


def test_weights_are_repeats(family):
    weights = np.random.default_rng(2).integers(0, 4, 40)
    rows = np.repeat(np.arange(40), weights)
    again = Grounding(family.measured[rows], family.present[rows], family.names).figures()
    assert family.figures(weights) == pytest.approx(again)


def test_means_are_over_the_images_that_show_a_class(family):
    figures = family.figures()
    shows = family.present[:, 0]
    assert figures["pointing/a"] == pytest.approx(family.measured[shows, 0, 1].mean())
    assert figures["miou_macro"] == pytest.approx((figures["miou/a"] + figures["miou/b"]) / 2)
    assert figures["pointing_above_random/b"] == pytest.approx(figures["pointing/b"] - figures["pointing_random/b"])
    assert figures["cnr_above_prior_macro"] == pytest.approx(figures["cnr_macro"] - figures["cnr_prior_macro"])
    assert family.absent == ["c is in no image: no pointing game, CNR and mIoU"]
    assert not any(name.endswith("/c") for name in figures)
    assert np.isnan(family.figure("cnr/c"))
    assert family.figures(~family.present.any(1)) == {}, "a draw without a region has no figure"


def test_a_table_has_the_same_figures(family):
    columns = {}
    for k, name in enumerate(family.names):
        values = np.where(family.present[:, k, None], family.measured[:, k], np.nan)
        keys = ["truth_share", "hit", "cnr", "iou", "prior_hit", "prior_cnr", "prior_iou"]
        columns |= {f"{key}_{name}": values[:, i] for i, key in enumerate(keys)}
    table = pd.DataFrame(columns)
    assert Grounding.from_table(table).figures() == pytest.approx(family.figures())
    with pytest.raises(SistaError, match="there is no cnr_b"):
        Grounding.from_table(table.drop(columns="cnr_b"))
    with pytest.raises(SistaError, match="hold no numbers"):
        Grounding.from_table(table.assign(iou_a="wide"))


@pytest.mark.parametrize(
    ("measured", "present", "line"),
    [((2, 1, 6), np.ones((2, 1)), "give .N, K, 7."), ((2, 1, 7), np.zeros((2, 1)), "no image shows a")],
)
def test_what_makes_no_sense(measured, present, line):
    with pytest.raises(SistaError, match=line):
        Grounding(np.zeros(measured), present, ["a"])
