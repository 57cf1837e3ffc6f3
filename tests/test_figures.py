"""What is drawn over a film lies where it is on the film."""

import numpy as np
import pytest
from PIL import Image

from sista_pl.figures import Case, WordMaps, draw_cases, draw_word_maps

GREEN, ORANGE, SQUARE = (44, 160, 44), (255, 127, 14), (200, 200, 200)
HEAD = 70  # pixels of a sheet's title


def extent(pixels, colour, within):
    """Return left, top, right and bottom of a colour, of which a row or column has more than three pixels."""
    found = (np.abs(pixels[HEAD:].astype(int) - colour) <= within).all(-1)
    rows, columns = np.flatnonzero(found.sum(1) > 3), np.flatnonzero(found.sum(0) > 3)
    return np.array([columns[0], rows[0], columns[-1], rows[-1]])


def pixels_of(path):
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (64, 64)])
@pytest.mark.parametrize(
    ("colour", "shown"),
    [
        (GREEN, {"truth_boxes": np.array([[10, 20, 21, 11]])}),
        (ORANGE, {"predicted_boxes": np.array([[10, 20, 21, 11]])}),
        (GREEN, {"truth": True}),
        (ORANGE, {"point": (20, 25)}),
    ],
    ids=["truth boxes", "predicted boxes", "mask", "point"],
)
def test_it_lies_on_its_pixels(colour, shown, height, width, tmp_path):
    """On the second film of the second row: an area's outline around it, a point in its middle."""
    image = np.full((height, width), 60, np.uint8)
    image[20:31, 10:31] = 200
    if "truth" in shown:
        shown = {"truth": image == 200}
    empty, sheets = Case(np.full_like(image, 60), ""), []
    for case in (Case(image, ""), Case(image, "", **shown)):
        path = draw_cases([("", [empty] * 3), ("", [empty, case])], tmp_path / "cases.png", "title")
        sheets.append(pixels_of(path))
    area, found = extent(sheets[0], SQUARE, 0), extent(sheets[1], colour, 60)
    assert np.abs((found - area)[:2] + (found - area)[2:]).max() / 2 <= 1  # a pixel of the film is over two here
    if "point" not in shown:
        assert np.abs(found - area).max() <= 3.5  # a line has a width


def test_a_report_with_dollars_is_no_formula(tmp_path):
    study = WordMaps(np.zeros((8, 8)), r"coins of $5 and \frac{ of $6", ["$x_{$"], [np.zeros((2, 2))])
    assert draw_word_maps([study], tmp_path / "words.png", "title").is_file()


def test_a_map_fills_its_film(tmp_path):
    """A map of one bright row of patches: it is brighter there, and of the film's width and height."""
    values = np.zeros((4, 4))
    values[2] = 1
    study = WordMaps(np.full((64, 48), 0.5), "words of a report", ["heart"], [values])
    pixels = pixels_of(draw_word_maps([study], tmp_path / "words.png", "title"))[HEAD:].astype(int)
    left, right = np.split(pixels, 2, axis=1)
    film = (left == left[60, left.shape[1] // 2]).all(-1)  # the film is of one grey
    rows, columns = np.flatnonzero(film.sum(1) > 20), np.flatnonzero(film.sum(0) > 20)
    shown = right[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert (shown.sum(-1) < 3 * 250).all()  # none of it is the sheet's white
    quarters = [part.mean() for part in np.array_split(shown, 4)]
    assert int(np.argmax(quarters)) == 2
