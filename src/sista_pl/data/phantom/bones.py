"""Bones and devices drawn as lines and shapes, and the branching vessels of the lungs."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from sista_pl.data.phantom.anatomy import SIGN, Anatomy, Layer
from sista_pl.data.phantom.study import Study


def curve(*points: tuple[float, float], n: int = 24) -> np.ndarray:
    """(n, 2) points of the Bézier curve through the first and last control point."""
    control = np.repeat(np.array(points, dtype=np.float64)[:, None], n, axis=1)
    t = np.linspace(0, 1, n)[:, None]
    while len(control) > 1:
        control = np.stack([p * (1 - t) + q * t for p, q in pairwise(control)])
    return control[0]


def draw_bones(layer: Layer, study: Study, a: Anatomy) -> None:
    """Clavicles, scapulae, humeral heads, and a shoulder prosthesis."""
    for side, sign in SIGN.items():
        medial = 0.09 * sign + 1.5 * a.turn
        top = -0.58 - 0.4 * a.clavicle
        blade = np.array(
            [(a.scapula, -0.52), (a.scapula + 0.26, -0.64), (a.scapula + 0.22, -0.30), (a.scapula + 0.05, 0.02)]
        )
        layer.polygon(blade * (sign, 1), 44)
        layer.line(np.vstack([blade[1], blade[0], blade[3]]) * (sign, 1), 0.014, 74)
        layer.line(np.array([(a.scapula + 0.04, -0.55), (a.scapula + 0.30, -0.66)]) * (sign, 1), 0.03, 74)
        layer.disc(sign * (a.width + 0.36), -0.62, 0.11, 120)
        layer.line(np.array([(a.width + 0.37, -0.58), (a.width + 0.42, 0.1)]) * (sign, 1), 0.10, 105)
        bow = curve(
            (medial, top + 0.08),
            (0.30 * sign + a.turn, top + 0.10),
            (0.5 * sign, top - 0.06),
            ((a.width + 0.16) * sign, top - 0.08),
        )
        layer.line(bow, 0.056, 118)
        layer.line(bow[1:], 0.034, 88)
        layer.disc(medial, top + 0.08, 0.034, 112)
        if study.patient.shoulder == side:
            layer.disc(sign * (a.width + 0.34), -0.62, 0.10, 255)
            layer.line(np.array([(a.width + 0.36, -0.58), (a.width + 0.42, 0.0)]) * (sign, 1), 0.05, 255)


def draw_vessels(layer: Layer, a: Anatomy, rng: np.random.Generator, calibre: float) -> None:
    """Arteries and veins that fan out from the hila and fork, ever thinner; `calibre` is a factor on their width."""
    for side, sign in SIGN.items():
        hilum = np.array([sign * 0.13 + 0.5 * a.turn, -0.02 if side == "right" else -0.05])
        angles = np.linspace(-1.35, 1.25, 9) + 0.12 * rng.standard_normal(9)
        start = np.repeat(hilum[None], 9, 0) + 0.02 * rng.standard_normal((9, 2))
        width, length = np.full(9, 0.023 * calibre), np.full(9, 0.17)
        for level in range(5):
            angles = angles + 0.16 * rng.standard_normal(len(angles))
            step = np.stack([sign * np.cos(angles), np.sin(angles)], 1) * length[:, None]
            bend = 0.12 * length[:, None] * rng.standard_normal((len(angles), 2))
            middle, end = start + step / 2 + bend, start + step
            shade = (140, 120, 100, 80, 62)[level]
            layer.lines(np.stack([start, middle, end], 1), width, shade)
            if level == 4:
                break
            fork = rng.uniform(0.22, 0.5, len(angles))
            angles = np.concatenate([angles - fork, angles + 0.8 * fork])
            start, width = np.tile(end, (2, 1)), np.tile(width * 0.68, 2)
            length = np.tile(length * 0.72, 2) * rng.uniform(0.7, 1.25, 2 * len(length))
            if level >= 2:
                keep = rng.random(len(angles)) < 0.55
                angles, start, width, length = angles[keep], start[keep], width[keep], length[keep]


def draw_devices(layer: Layer, study: Study, a: Anatomy, rng: np.random.Generator) -> None:
    """Tubes, lines, implants, wires, clips and the loose leads of a portable film."""
    patient = study.patient
    wander = lambda scale=0.02: float(scale * rng.standard_normal())  # noqa: E731
    middle = 0.7 * a.turn
    for tube in study.tubes:
        sign = SIGN.get(tube.side or "right", 1.0)
        if tube.kind == "endotracheal_tube":
            tip = -0.30 + wander(0.03)
            path = curve((middle + wander(), -1.1), (middle, -0.7), (middle, tip))
            layer.line(path, 0.030, 85)
            layer.line(np.add(path, (0.012, 0)), 0.006, 215)
        elif tube.kind == "nasogastric_tube":
            down = a.domes["left"]
            path = curve(
                (middle + 0.03, -1.1),
                (middle + 0.02, -0.2),
                (0.02, down - 0.1),
                (0.10, down + 0.1),
                (0.36, down + 0.22),
            )
            layer.line(path, 0.014, 190)
        elif tube.kind == "central_line":
            path = curve((0.24 * sign, -1.05), (0.16 * sign, -0.7), (-0.10, -0.55), (-0.12, -0.1 + wander(0.04)))
            layer.line(path, 0.011, 200)
        elif tube.kind == "picc":
            path = curve((1.1 * sign, -0.1), (0.85 * sign, -0.62), (0.3 * sign, -0.58), (-0.10, -0.5), (-0.12, -0.06))
            layer.line(path, 0.007, 175)
        elif tube.kind == "chest_tube":
            path = curve(
                (1.0 * sign, 0.25), (0.72 * sign, 0.2), (0.5 * sign, -0.1), (0.42 * sign, -0.45 + wander(0.04))
            )
            layer.line(path, 0.030, 95)
            layer.line(path, 0.007, 215)
    if patient.pacemaker != "none":
        sign = SIGN[patient.pacemaker]
        x, y = sign * 0.55, -0.44 + wander()
        layer.polygon(
            np.array(
                [
                    (x - 0.07, y - 0.05),
                    (x + 0.07, y - 0.05),
                    (x + 0.075, y + 0.03),
                    (x, y + 0.075),
                    (x - 0.075, y + 0.03),
                ]
            ),
            235,
        )
        h = a.heart
        for target in ((-0.6 * h.right, h.bottom - 0.24), (0.55 * h.left, h.bottom - 0.08)):
            layer.line(curve((x, y - 0.05), (0.35 * sign, -0.72), (-0.16, -0.5), (-0.16, -0.1), target), 0.011, 225)
    if patient.port != "none":
        sign = SIGN[patient.port]
        x = sign * 0.46
        layer.disc(x, -0.36, 0.045, 190)
        layer.disc(x, -0.36, 0.022, 120)
        layer.line(curve((x, -0.38), (x, -0.75), (0.1 * sign, -0.75), (-0.12, -0.4), (-0.12, -0.08)), 0.009, 190)
    if patient.sternotomy == "present":
        for y in np.linspace(-0.42, 0.22, 6):
            x = middle * 1.3 + wander(0.008)
            layer.line(
                np.array([(x - 0.035, y - 0.012), (x, y + 0.016), (x + 0.035, y - 0.012), (x - 0.02, y + 0.012)]),
                0.009,
                225,
            )
        for _ in range(4):
            layer.disc(0.14 + wander(0.03), wander(0.1), 0.008, 225)
    if patient.clips != "none":
        for _ in range(4):
            if patient.clips == "right upper quadrant":
                x, y = -0.24 + wander(0.04), a.domes["right"] + 0.24 + wander(0.035)
            else:
                x, y = SIGN[patient.clips.split()[0]] * (a.width + 0.04 + wander(0.04)), -0.22 + wander(0.08)
            turn = rng.uniform(0, np.pi)
            reach = 0.017 * np.array([np.cos(turn), np.sin(turn)])
            layer.line(np.add([-reach, reach], (x, y)), 0.010, 235)
    if patient.aorta == "calcified":
        t = np.linspace(-1.9, 0.9, 14)
        knob = np.array([0.10 + 0.3 * a.turn, -0.27]) + 0.066 * np.stack([np.cos(t), np.sin(t)], 1)
        layer.line(knob, 0.012, 150)
    if study.view == "AP" and rng.random() < 0.6:
        for _ in range(int(rng.integers(1, 4))):
            begin, end = rng.uniform((-1, -0.5), (1, 0.2)), rng.uniform((-0.9, 0.3), (0.9, 1.0))
            layer.line(curve(tuple(begin), tuple(rng.uniform(-0.8, 0.8, 2)), tuple(end)), 0.008, 110)
            layer.disc(begin[0], begin[1], 0.022, 130)
