"""Foreign objects over a film: coins, buttons, plates and pendants, which the patient wore or had in a pocket.

They lie on the film as it is, not in the body: where on it, its thirds and halves tell.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from sista_pl.data.phantom import knobs
from sista_pl.data.phantom.study import OBJECTS, ZONES, Finding

# (type, points) in pixels, as Object-CXR has it: 0 rectangle and 1 ellipse by two corners, 2 polygon by its corners.
Shape = tuple[int, list[int]]
# Kind → type; a coin is a disc, a button a ring.
_TYPES = {"plate": 0, "coin": 1, "button": 1, "pendant": 2}
# The centre of an object as a share of the film: down from its upper edge, and away from its middle.
_DOWN = {"upper": (0.12, 0.32), "middle": (0.32, 0.52), "lower": (0.52, 0.84)}
_ASIDE = (0.06, 0.40)
_SCALE = 4  # drawn larger and reduced, so that edges are soft
_CONTRAST = 30  # of an object against the film under it, in grey values
_TRIES = 20


def draw_objects(rng: np.random.Generator, share: float, most: int) -> tuple[Finding, ...]:
    """Draw which objects lie on a film, each in a place of its own.

    Args:
        rng: the only source of chance.
        share: of the films that have any.
        most: on one film, 1 to 6.
    """
    count = int(rng.integers(1, most + 1)) if rng.random() < share else 0
    places = [(side, zone) for side in ("left", "right") for zone in ZONES]
    chosen = [places[index] for index in rng.permutation(len(places))[:count]]
    return tuple(Finding(OBJECTS[int(rng.integers(len(OBJECTS)))], side, zone) for side, zone in chosen)


def put_objects(
    film: np.ndarray, objects: Sequence[Finding], rng: np.random.Generator
) -> tuple[np.ndarray, list[Shape]]:
    """Put objects on a film, each in its third of it and on its side.

    An object lies where the film is darker than it, as far as there is such a place, so that what is annotated can be
    seen.

    Args:
        film: (H, W) uint8.
        objects: kinds of `OBJECTS` with side and zone.
        rng: place, size, tone and form.

    Returns:
        the film with the objects, (H, W) uint8, and the shape of each.
    """
    height, width = film.shape
    layer, ground, shapes = Image.new("L", (width * _SCALE, height * _SCALE)), film.copy(), list[Shape]()
    draw = ImageDraw.Draw(layer)
    for thing in objects:
        w, h = (max(5, int(side * rng.uniform(*knobs.OBJECT_SIZE))) for side in (width, height))
        tone = int(rng.integers(150, 256))
        x, y, under = _place(ground, thing, w, h, tone, rng)
        tone = max(tone, min(255, under + _CONTRAST))
        corners = [x * _SCALE, y * _SCALE, (x + w) * _SCALE - 1, (y + h) * _SCALE - 1]
        points = [x, y, x + w, y + h]
        if thing.kind == "plate":
            draw.rectangle(corners, fill=tone)
        elif thing.kind == "pendant":
            points = _pentagon(x, y, w, h, rng)
            draw.polygon([value * _SCALE for value in points], fill=tone)
        else:
            draw.ellipse(corners, fill=tone if thing.kind == "coin" else None, outline=tone, width=2 * _SCALE)
        shapes.append((_TYPES[thing.kind], points))
        ground[y : y + h, x : x + w] = 255
    bright = np.asarray(layer.resize((width, height), Image.Resampling.BOX))
    return np.maximum(film, bright), shapes


def _place(
    ground: np.ndarray, thing: Finding, w: int, h: int, tone: int, rng: np.random.Generator
) -> tuple[int, int, int]:
    """Return the left upper corner, and how bright the film is there: the first place that is dark enough, or the
    darkest."""
    height, width = ground.shape
    tried = []
    for _ in range(_TRIES):
        aside = float(rng.uniform(*_ASIDE)) * (1 if thing.side == "left" else -1)
        x = int(np.clip((0.5 + aside) * width - w / 2, 0, width - w))
        y = int(np.clip(rng.uniform(*_DOWN[str(thing.zone)]) * height - h / 2, 0, height - h))
        under = int(np.percentile(ground[y : y + h, x : x + w], 95))
        if under < tone - _CONTRAST:
            return x, y, under
        tried.append((under, x, y))
    under, x, y = min(tried)
    return x, y, under


def _pentagon(x: int, y: int, w: int, h: int, rng: np.random.Generator) -> list[int]:
    """Five corners on the ellipse in a box, at random or even angles: x y x y …"""
    even = np.linspace(0, 2 * np.pi, 6)[:-1]
    for angles in (np.sort(rng.uniform(0, 2 * np.pi, 5)) if rng.random() < 0.5 else even, even):
        xs = np.rint(x + w / 2 + w / 2 * np.cos(angles)).astype(int)
        ys = np.rint(y + h / 2 + h / 2 * np.sin(angles)).astype(int)
        area = abs(np.dot(xs, np.roll(ys, 1)) - np.dot(ys, np.roll(xs, 1))) / 2
        if area >= 0.3 * w * h:  # else a sliver, which is hardly seen
            break
    return [int(value) for pair in zip(xs, ys, strict=True) for value in pair]


def outline(shape: Shape) -> tuple[int, int, int, int]:
    """Return the box of a shape: x, y, width, height in pixels."""
    xs, ys = shape[1][::2], shape[1][1::2]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
