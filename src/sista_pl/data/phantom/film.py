"""From a study to a film: scene, lesions, bones and devices, then exposure, noise, collimation and side marker."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageFilter

from sista_pl.data.phantom import knobs
from sista_pl.data.phantom.anatomy import Anatomy, Frame, Layer, Scene, step
from sista_pl.data.phantom.bones import draw_bones, draw_devices, draw_vessels
from sista_pl.data.phantom.lesions import cloud, paint, paint_scars
from sista_pl.data.phantom.study import Study


@dataclass
class Rendering:
    """A film and the truth about it.

    Args:
        image: (H, W) uint8, 0 air … 255 bone.
        masks: "lungs", "heart" and one a finding ("effusion.0", numbered as in `Study.findings`), (H, W) bool.
        boxes: (kind, x, y, width, height) in pixels, top-left corner, one for each side that a finding lies on.
    """

    image: np.ndarray
    masks: dict[str, np.ndarray] = field(default_factory=dict)
    boxes: list[tuple[str, int, int, int, int]] = field(default_factory=list)

    def crop(self, rows: slice, columns: slice) -> Rendering:
        """Cut out a window; a box that falls outside goes, one on the edge is cut."""
        height, width = self.image[rows, columns].shape
        top, left = rows.start, columns.start
        boxes = []
        for kind, x, y, w, h in self.boxes:
            x0, y0, x1, y1 = max(x - left, 0), max(y - top, 0), min(x - left + w, width), min(y - top + h, height)
            if x1 > x0 and y1 > y0:
                boxes.append((kind, x0, y0, x1 - x0, y1 - y0))
        masks = {name: mask[rows, columns] for name, mask in self.masks.items()}
        return Rendering(self.image[rows, columns], masks, boxes)


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """(H, W) bool → x, y, width, height in pixels, or None where it is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)


def render(study: Study, size: int, rng: np.random.Generator, contrast: float = 1.0) -> Rendering:
    """Draw the frontal film of a study.

    Args:
        study: what to draw.
        size: H = W in pixels.
        rng: pose, breath, texture, noise. The patient's anatomy comes from their own seed.
        contrast: factor on that of every lesion.
    """
    # A stream for each part, so that the same film with and without a finding differs in nothing else.
    pose, lesions, branches, wires, exposure = (np.random.default_rng(key) for key in rng.integers(2**63, size=5))
    anatomy = Anatomy.draw(study, pose)
    scale = 1.02 * float(np.exp(knobs.POSE_SCALE * pose.standard_normal()))
    shift = tuple(knobs.POSE_SHIFT * pose.standard_normal(2) + (0.0, 0.06))
    frame = Frame(size, scale, knobs.POSE_ANGLE * float(pose.standard_normal()), shift)
    scene = Scene(study, anatomy, frame, contrast)
    masks = {"lungs": scene.lungs > 0.5, "heart": scene.heart > 0.5}
    boxes = []
    for index, finding in enumerate(study.findings):
        sides = paint(scene, finding, lesions)
        masks[f"{finding.kind}.{index}"] = np.logical_or.reduce(list(sides.values()))
        found = [(finding.kind, *box) for mask in sides.values() if (box := bounding_box(mask))]
        boxes += found
    paint_scars(scene)

    vessels, bones, devices = Layer(frame), Layer(frame), Layer(frame)
    congested = next((f.severity for f in study.findings if f.kind == "edema"), None)
    draw_vessels(vessels, anatomy, branches, {None: 1.0, "mild": 1.15, "moderate": 1.25, "severe": 1.35}[congested])
    draw_bones(bones, study, anatomy)
    draw_devices(devices, study, anatomy, wires)
    grain = cloud(exposure, size, max(8, size // 5))
    mu = scene.mu
    mu += (0.34 * vessels.array() * scene.markings + 0.012 * grain) * (0.25 * scene.thorax + 0.75 * scene.lungs)
    mu += 0.035 * cloud(exposure, size, 7) * scene.mu
    mu += 0.42 * bones.array() + knobs.DEVICE_CONTRAST * devices.array()
    return Rendering(_expose(mu, study, exposure), masks, boxes)


def _expose(mu: np.ndarray, study: Study, rng: np.random.Generator) -> np.ndarray:
    """Attenuation → grey values: scatter, noise, film curve, collimation, side marker."""
    size = mu.shape[0]
    jitter = knobs.EXPOSURE_JITTER * rng.standard_normal(2)
    offset = {"normal": 0.80, "under": 0.62, "over": 0.98}[study.exposure] + jitter[0]
    width = 0.27 * float(np.exp(1.5 * jitter[1])) * (1.1 if study.view == "AP" else 1.0)
    noise = knobs.NOISE * size / knobs.NOISE_SIZE * {"normal": 1.0, "under": 2.0, "over": 0.8}[study.exposure]
    mu = mu + noise * rng.standard_normal(mu.shape, dtype=np.float32)
    grey = 255 / (1 + np.exp((np.float32(offset) - mu) * np.float32(1 / width)))
    image = Image.fromarray(grey.astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(0.0022 * size * (1.3 if study.view == "AP" else 1.0)))
    grey = np.asarray(image).copy()
    _marker(grey, rng)
    _collimate(grey, rng)
    return grey


_LETTERS = {
    "L": np.array(["10000", "10000", "10000", "10000", "10000", "10000", "11111"]),
    "R": np.array(["11110", "10001", "10001", "11110", "10100", "10010", "10001"]),
}


def _marker(grey: np.ndarray, rng: np.random.Generator) -> None:
    """A lead letter near the upper corner: L on the image's right, R on its left."""
    size = grey.shape[0]
    letter = "L" if rng.random() < 0.6 else "R"
    shape = np.array([[int(c) for c in row] for row in _LETTERS[letter]], bool)
    dot = max(1, round(size * float(rng.uniform(0.005, 0.009))))
    shape = np.kron(shape, np.ones((dot, dot), bool))
    height, width = shape.shape
    top = int(size * rng.uniform(0.05, 0.16))
    left = int(size * rng.uniform(0.02, 0.07))
    left = size - left - width if letter == "L" else left
    if rng.random() < 0.85:
        grey[top : top + height, left : left + width][shape] = 245


def _collimate(grey: np.ndarray, rng: np.random.Generator) -> None:
    """Black borders where the beam was narrowed, on some sides of some films."""
    size = grey.shape[0]
    for side in range(4):
        if rng.random() < 0.15:
            depth = int(size * rng.uniform(0.01, 0.05))
            view = np.rot90(grey, side)
            view[:depth] = rng.integers(0, 8)


def render_lateral(study: Study, size: int, rng: np.random.Generator) -> np.ndarray:
    """A crude lateral silhouette, (size, size) uint8: readers of pairs leave laterals out, they only have to exist."""
    frame = Frame(size, 1.0 + 0.04 * float(rng.standard_normal()), 0.0, (0.0, 0.05))
    x, y = frame.x, frame.y
    body = step(0.78 - np.abs(x), 0.08) * (0.75 + 0.2 * (1 - x * x)) * step(y + 0.95, 0.1)
    dome = 0.45 + 0.5 * (x - 0.1) ** 2
    lung = step(0.62 - np.abs(x + 0.08 * y), 0.1) * step(dome - y, 0.05) * step(y + 0.68 - 0.3 * x * x, 0.08)
    enlarged = {"normal": 1.0, "mild": 1.15, "moderate": 1.25, "severe": 1.4}[study.patient.heart]
    heart = step(1 - ((x + 0.22) / (0.30 * enlarged)) ** 2 - ((y - 0.2) / (0.30 * enlarged)) ** 2, 0.3)
    vertebrae = step(0.10 - np.abs(x - 0.52 - 0.08 * np.sin(2 * y)), 0.03) * (0.20 + 0.08 * np.sign(np.sin(y * 50)))
    mu = (
        body - 0.45 * lung + 0.30 * heart * lung + vertebrae + 0.3 * step(y - dome, 0.05) * step(0.78 - np.abs(x), 0.08)
    )
    return _expose(mu.astype(np.float32), study, rng)
