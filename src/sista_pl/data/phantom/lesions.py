"""Pathology painted into a scene: each painter adds attenuation and returns where, H W pixels."""

from __future__ import annotations

import numpy as np
from PIL import Image

from sista_pl.data.phantom import knobs
from sista_pl.data.phantom.anatomy import SIGN, Scene, bump, step
from sista_pl.data.phantom.study import Finding

# A pixel belongs to a lesion where it adds at least this share of the lesion's own peak.
_EDGE = 0.25
_SIDES = {"left": ("left",), "right": ("right",), "bilateral": ("right", "left"), None: ("right", "left")}


def cloud(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """(H, W) smooth noise of mean 0, deviation about 1, with `cells` cells a side."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) * np.float32(1.25)


def paint(scene: Scene, finding: Finding, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Add a finding to the scene.

    Returns:
        side → (H, W) bool mask, one entry a side that it lies on; empty for what has no outline of its own.
    """
    if finding.kind == "cardiomegaly":
        return {"left": scene.heart > 0.5}
    if finding.kind == "emphysema":
        return {"both": _emphysema(scene, finding, rng)}
    if finding.kind == "edema":
        return {"both": _edema(scene, finding, rng)}
    if finding.kind == "hernia":
        return {"left": _hernia(scene)}
    painter = _PAINTERS[finding.kind]
    masks = {}
    for side in _SIDES[finding.side]:
        added = painter(scene, finding, side, rng)
        masks[side] = np.abs(added) > _EDGE * max(float(np.abs(added).max()), 1e-6)
    return masks


def _contrast(scene: Scene, kind: str) -> float:
    return knobs.CONTRAST[kind] * knobs.LESION_CONTRAST * scene.contrast


def _half(scene: Scene, side: str) -> np.ndarray:
    return step(SIGN[side] * scene.frame.x, 0.02)


def _place(scene: Scene, finding: Finding, side: str, rng: np.random.Generator) -> tuple[float, float]:
    """A point in the finding's zone, between the hilum and the chest wall."""
    top, bottom = scene.anatomy.zone(finding.zone or "lower", side)
    y = float(rng.uniform(top + 0.03, bottom - 0.03))
    wall = float(np.interp(y, np.linspace(-1.6, 1.6, 512), scene.anatomy.wall()))
    inner = 0.20 if side == "right" else max(0.22, 0.75 * scene.anatomy.heart.left * (y > 0))
    return SIGN[side] * float(rng.uniform(min(inner, 0.7 * wall), 0.85 * wall)), y


def _patch(scene: Scene, finding: Finding, side: str, rng: np.random.Generator) -> np.ndarray:
    x0, y0 = _place(scene, finding, side, rng)
    wide = finding.severity in ("extensive", "patchy")
    radius = knobs.LESION_SIZE * float(rng.uniform(0.11, 0.17)) * (1.45 if wide else 1.0)
    x, y = scene.frame.x - np.float32(x0), scene.frame.y - np.float32(y0)
    q = (x * x * np.float32(rng.uniform(0.8, 1.6)) + y * y * np.float32(rng.uniform(1.0, 2.2))) / np.float32(radius**2)
    shape = np.exp(-q)
    rough = {"opacity": 0.35, "pneumonia": 0.7, "consolidation": 0.45}[finding.kind]
    cells = max(4, scene.frame.size // 16) if finding.kind != "opacity" else 14
    texture = np.clip(1 + rough * cloud(rng, scene.frame.size, cells), 0.1, 2)
    added = np.clip(shape * texture, 0, 1.2) * scene.lungs * np.float32(_contrast(scene, finding.kind))
    scene.mu += added
    return added


def _ball(scene: Scene, finding: Finding, side: str, rng: np.random.Generator) -> np.ndarray:
    low, high = knobs.NODULE_RADIUS if finding.kind == "nodule" else knobs.MASS_RADIUS
    radius = knobs.LESION_SIZE * float(rng.uniform(low, high))
    x0, y0 = _place(scene, finding, side, rng)
    added = np.zeros_like(scene.mu)
    rows, columns = scene.frame.window(x0, y0, 2.2 * radius)
    x, y = scene.frame.x[rows, columns] - x0, scene.frame.y[rows, columns] - y0
    angle, distance = np.arctan2(y, x), np.hypot(x, y)
    lobes = 1 + 0.10 * np.cos(2 * angle + rng.uniform(0, 6)) + 0.07 * np.cos(3 * angle + rng.uniform(0, 6))
    q = distance / (radius * lobes)
    profile = step(1.1 - q, 0.4) * (0.6 + 0.4 * np.sqrt(np.clip(1 - q * q, 0, 1)))
    # A nodule is seen through the heart's edge too, only fainter.
    added[rows, columns] = profile * (0.35 + 0.65 * scene.lungs[rows, columns]) * _contrast(scene, finding.kind)
    scene.mu += added
    return added


def _effusion(scene: Scene, finding: Finding, side: str, rng: np.random.Generator) -> np.ndarray:
    height = {"small": 0.06, "moderate": 0.22, "large": 0.46}[finding.severity or "small"] * float(
        rng.uniform(0.85, 1.15)
    )
    a = scene.anatomy
    level = a.domes[side] - height + {"small": 0.11, "moderate": 0.06, "large": 0.04}[finding.severity or "small"]
    # The meniscus climbs along the chest wall and, less, along the mediastinum.
    surface = level - (0.10 + 0.35 * height) * np.clip((scene.relative - 0.45) / 0.55, 0, 1) ** 2
    region = step(scene.frame.y - surface, 0.05) * _half(scene, side)
    within = step(scene.from_wall, 0.03) * step(scene.above_dome + 0.10, 0.06)
    fluid = region * within
    added = fluid * (0.25 * (1 - scene.lungs) + scene.lungs) * np.float32(_contrast(scene, "effusion"))
    scene.mu += added
    scene.markings *= 1 - fluid
    if finding.severity == "large":
        scene.mu += 0.06 * _half(scene, side) * scene.thorax
    return fluid * scene.thorax


def _pneumothorax(scene: Scene, finding: Finding, side: str, rng: np.random.Generator) -> np.ndarray:
    gap = {"small": 0.05, "moderate": 0.13, "large": 0.28}[finding.severity or "small"] * float(rng.uniform(0.85, 1.2))
    y = scene.frame.y
    top = scene.anatomy.apex
    # Air collects at the apex of an upright patient.
    share = np.clip(1.25 - (y - top) * np.float32(0.9 if finding.severity != "large" else 0.45), 0.12, 1.25)
    depth = gap * share - scene.from_wall + np.clip(1.6 * gap * (1 - (y - top) / 0.25), 0, None) * 0.6
    free = step(depth, 0.02) * scene.thorax * _half(scene, side)
    line = step(0.008 - np.abs(depth), 0.012) * scene.lungs * _half(scene, side)
    collapse = {"small": 0.02, "moderate": 0.06, "large": 0.15}[finding.severity or "small"]
    scene.mu += 0.11 * line - 0.09 * free + collapse * scene.lungs * _half(scene, side) * (1 - free)
    scene.markings *= 1 - free
    return free


def _atelectasis(scene: Scene, finding: Finding, side: str, rng: np.random.Generator) -> np.ndarray:
    sign, base = SIGN[side], scene.anatomy.domes[side]
    x, y = scene.frame.x * np.float32(sign), scene.frame.y
    added = np.zeros_like(scene.mu)
    if finding.severity == "linear":
        for _ in range(int(rng.integers(1, 3))):
            slope, at = float(rng.uniform(-0.35, 0.35)), base - float(rng.uniform(0.05, 0.20))
            centre, reach = float(rng.uniform(0.30, 0.48)), float(rng.uniform(0.10, 0.18))
            thick = float(rng.uniform(0.010, 0.018)) * knobs.LESION_SIZE
            band = bump(y - np.float32(slope) * (x - np.float32(centre)), at, thick)
            added += band * step(np.float32(reach) - np.abs(x - np.float32(centre)), 0.06)
    else:
        # A collapsed lower segment: a wedge against the spine, its lateral edge sharp.
        edge = 0.14 + 0.9 * np.clip(y - np.float32(base - 0.30), 0, 0.4)
        added += step(edge - x, 0.03) * step(y - np.float32(base - 0.28), 0.08) * _half(scene, side)
    added = np.clip(added, 0, 1) * scene.thorax * np.float32(_contrast(scene, "atelectasis"))
    scene.mu += added
    return added


def _pleural_thickening(scene: Scene, finding: Finding, side: str, rng: np.random.Generator) -> np.ndarray:
    thick = float(rng.uniform(0.035, 0.055)) * knobs.LESION_SIZE
    middle, reach = float(rng.uniform(-0.15, 0.2)), float(rng.uniform(0.22, 0.32))
    band = step(thick * (1 + 0.3 * np.sin(scene.frame.y * 17)) - scene.from_wall, 0.02) * scene.thorax
    added = band * _half(scene, side) * step(reach - np.abs(scene.frame.y - np.float32(middle)), 0.1)
    added = added * np.float32(_contrast(scene, "pleural_thickening"))
    scene.mu += added
    return added


def _fracture(scene: Scene, finding: Finding, side: str, rng: np.random.Generator) -> np.ndarray:
    """A displaced rib: a gap with a step, in the lateral third."""
    y = float(rng.uniform(-0.2, 0.25))
    wall = float(np.interp(y, np.linspace(-1.6, 1.6, 512), scene.anatomy.wall()))
    return break_rib(scene, SIGN[side] * 0.84 * wall, y, 0.045, -_contrast(scene, "fracture"))


def break_rib(scene: Scene, x0: float, y0: float, radius: float, contrast: float) -> np.ndarray:
    """Thin a rib (contrast < 0: a fracture line) or thicken it (callus of an old one) about a body point."""
    added = np.zeros_like(scene.mu)
    rows, columns = scene.frame.window(x0, y0, 3 * radius)
    x, y = scene.frame.x[rows, columns] - x0, scene.frame.y[rows, columns] - y0
    spot = np.exp(-(x * x / radius**2 + y * y / (1.2 * radius) ** 2)).astype(np.float32)
    if contrast < 0:
        cut = np.exp(-(((x + 0.4 * y) / (0.22 * radius)) ** 2)).astype(np.float32)
        added[rows, columns] = spot * (contrast * cut - 0.35 * contrast * (1 - cut))
    else:
        added[rows, columns] = contrast * spot
    scene.mu += added
    return added


def _edema(scene: Scene, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    strength = {"mild": 0.45, "moderate": 0.75, "severe": 1.2}[finding.severity or "mild"] * _contrast(scene, "edema")
    haze = np.exp(-(((np.abs(scene.frame.x) - 0.26) / 0.24) ** 2) - ((scene.frame.y - 0.0) / 0.33) ** 2)
    texture = np.clip(1 + 0.45 * cloud(rng, scene.frame.size, max(8, scene.frame.size // 9)), 0.2, 2)
    added = haze * texture * scene.lungs * np.float32(strength)
    scene.mu += added
    return haze * scene.lungs > 0.4


def _emphysema(scene: Scene, finding: Finding, rng: np.random.Generator) -> np.ndarray:
    severe = finding.severity == "severe"
    upper = np.clip(0.6 - scene.frame.y, 0.2, 1.2)
    holes = np.clip(cloud(rng, scene.frame.size, 9), 0, None)
    scene.mu -= scene.lungs * upper * np.float32(0.10 if severe else 0.05) * (0.6 + 0.6 * holes)
    scene.markings *= 1 - upper * np.float32(0.6 if severe else 0.35)
    return scene.lungs > 0.5


def _hernia(scene: Scene) -> np.ndarray:
    a = scene.anatomy
    x0, y0, radius = 0.05 + 0.5 * a.turn, a.domes["left"] - 0.10, 0.12 * knobs.LESION_SIZE
    added = np.zeros_like(scene.mu)
    rows, columns = scene.frame.window(x0, y0, 1.5 * radius)
    x, y = (scene.frame.x[rows, columns] - x0) / (1.15 * radius), (scene.frame.y[rows, columns] - y0) / radius
    inside = step(1 - x * x - y * y, 0.3)
    # The air in the stomach stands above the fluid.
    air = inside * step(0.1 - y, 0.1) * step(0.8 - x * x - y * y, 0.2)
    scene.mu[rows, columns] += inside * _contrast(scene, "hernia") - 1.5 * air * _contrast(scene, "hernia")
    added[rows, columns] = inside
    return added > 0.5


def paint_scars(scene: Scene) -> None:
    """The incidental marks: granuloma, calcified hilar nodes, apical scarring, the callus of an old rib fracture."""
    patient = scene.study.patient
    own = np.random.default_rng(patient.seed + 1)
    if patient.granuloma != "none":
        side, zone = patient.granuloma.split("/")
        x, y = _place(scene, Finding("granuloma", side, zone), side, own)
        _dot(scene, x, y, float(own.uniform(*knobs.GRANULOMA_RADIUS)) * knobs.LESION_SIZE)
    if patient.hilar_nodes != "none":
        for _ in range(5):
            x, y = (
                SIGN[patient.hilar_nodes] * (0.17 + 0.025 * own.standard_normal()),
                -0.02 + 0.035 * own.standard_normal(),
            )
            _dot(scene, x, y, float(own.uniform(*knobs.GRANULOMA_RADIUS)))
    for side in _SIDES[patient.scarring] if patient.scarring != "none" else ():
        cap = step(0.075 - (scene.from_wall + 0.25 * (scene.frame.y - scene.anatomy.apex)), 0.04) * _half(scene, side)
        streaks = np.clip(0.9 + 0.5 * cloud(own, scene.frame.size, max(8, scene.frame.size // 10)), 0, 2)
        scene.mu += cap * step(-0.36 - scene.frame.y, 0.08) * scene.thorax * streaks * np.float32(0.22)
    if patient.rib_deformity != "none":
        for y in (0.02, 0.02 + scene.anatomy.spacing):
            wall = float(np.interp(y, np.linspace(-1.6, 1.6, 512), scene.anatomy.wall()))
            break_rib(
                scene, SIGN[patient.rib_deformity] * 0.92 * wall, y + 0.02 * float(own.standard_normal()), 0.035, 0.30
            )


def _dot(scene: Scene, x: float, y: float, radius: float) -> None:
    rows, columns = scene.frame.window(x, y, 2 * radius + 2 / scene.frame.size)
    distance = np.hypot(scene.frame.x[rows, columns] - x, scene.frame.y[rows, columns] - y)
    scene.mu[rows, columns] += step(radius - distance, max(0.01, 2 / scene.frame.size)) * np.float32(
        _contrast(scene, "granuloma")
    )


_PAINTERS = {
    "opacity": _patch,
    "pneumonia": _patch,
    "consolidation": _patch,
    "nodule": _ball,
    "mass": _ball,
    "effusion": _effusion,
    "pneumothorax": _pneumothorax,
    "atelectasis": _atelectasis,
    "pleural_thickening": _pleural_thickening,
    "fracture": _fracture,
}
