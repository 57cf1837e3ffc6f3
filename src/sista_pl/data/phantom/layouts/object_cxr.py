"""The phantom as Object-CXR lies on disk: coins, plates, buttons and chains on every other film."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sista_pl.data.phantom.cohort import LAYOUTS, Drawn, Layout

_SCALE = 4  # drawn larger and reduced, so that edges are soft
_CONTRAST = 30  # of an object against the film under it, in gray values
_TRIES = 20


@LAYOUTS.register("object_cxr")
def object_cxr() -> Layout:
    """Object-CXR: foreign objects as rectangle (0), ellipse (1) and polygon (2); half of the films have none."""
    return Layout(_write_study, _write_tables)


def _write_study(drawn: Drawn, root: Path) -> dict:
    part = "dev" if drawn.plan.split == "test" else "train"
    name = f"{drawn.plan.patient:05d}{drawn.plan.study}.jpg"
    film, shapes = add_objects(drawn.rendering.image, drawn.extra)
    (root / part).mkdir(exist_ok=True)
    Image.fromarray(film).save(root / part / name, quality=92)
    text = ";".join(f"{kind} {' '.join(map(str, points))}" for kind, points in shapes)
    return {"part": part, "name": name, "annotation": text, "truth": drawn.truth(f"{part}/{name}", annotation=text)}


def add_objects(film: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, list[int]]]]:
    """Put up to four bright objects on a film (H, W); return it and (type, points) of each, in pixels.

    An object lies where the film is darker than it, so that what is annotated can be seen.
    """
    height, width = film.shape
    layer, ground = Image.new("L", (width * _SCALE, height * _SCALE)), film.copy()
    draw, shapes = ImageDraw.Draw(layer), list[tuple[int, list[int]]]()
    for _ in range(int(rng.integers(1, 5)) if rng.random() < 0.5 else 0):
        kind = int(rng.integers(3))
        w, h = (max(4, int(side * rng.uniform(0.05, 0.14))) for side in (width, height))
        tone = int(rng.integers(150, 256))
        for _ in range(_TRIES):
            x = int(rng.integers(width // 12, width - w - width // 12))
            y = int(rng.integers(height // 12, height - h - 4))
            if np.percentile(ground[y : y + h, x : x + w], 90) < tone - _CONTRAST:
                break
        else:
            continue
        corners = [x * _SCALE, y * _SCALE, (x + w) * _SCALE - 1, (y + h) * _SCALE - 1]
        if kind == 0:
            draw.rectangle(corners, fill=tone)
            shapes.append((0, [x, y, x + w, y + h]))
        elif kind == 1:
            # a coin, or a button: a ring
            draw.ellipse(corners, fill=tone if rng.random() < 0.5 else None, outline=tone, width=2 * _SCALE)
            shapes.append((1, [x, y, x + w, y + h]))
        else:
            angles = np.sort(rng.uniform(0, 2 * np.pi, 5)) if rng.random() < 0.5 else np.linspace(0, 2 * np.pi, 6)[:-1]
            xs = np.clip(np.rint(x + w / 2 + w / 2 * np.cos(angles)), 0, width).astype(int)
            ys = np.clip(np.rint(y + h / 2 + h / 2 * np.sin(angles)), 0, height).astype(int)
            if np.ptp(xs) < 3 or np.ptp(ys) < 3:
                continue
            points = [int(value) for pair in zip(xs, ys, strict=True) for value in pair]
            draw.polygon([value * _SCALE for value in points], fill=tone)
            shapes.append((2, points))
        ground[y : y + h, x : x + w] = 255
    bright = np.asarray(layer.resize((width, height), Image.Resampling.BOX))
    return np.maximum(film, bright), shapes


def _write_tables(root: Path, records: list[dict]) -> None:
    for part in ("train", "dev"):
        (root / part).mkdir(exist_ok=True)
        lines = [f"{record['name']},{record['annotation']}" for record in records if record["part"] == part]
        text = "".join(f"{line}\n" for line in ("image_name,annotation", *lines))
        (root / f"{part}.csv").write_text(text, newline="\n")
