"""The normal chest as a map of attenuation: soft tissue, lungs, heart, mediastinum, ribs, spine, abdomen.

Body coordinates: x in -1 … 1 from the image's left to its right (so the patient's left is x > 0), y in -1 … 1 from
neck to abdomen; H W pixels. A function of y alone is a table that the pixels look up, which is what makes a film cheap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from sista_pl.data.phantom import knobs
from sista_pl.data.phantom.study import Study

SIGN = {"left": 1.0, "right": -1.0}
_TABLE = 512
_ROWS = np.linspace(-1.6, 1.6, _TABLE, dtype=np.float32)


def step(distance: np.ndarray, softness: float) -> np.ndarray:
    """0 outside, 1 inside, linear over `softness` about distance 0."""
    out = distance * np.float32(1 / softness)
    out += np.float32(0.5)
    return np.clip(out, 0, 1, out=out)


def bump(x: np.ndarray, centre: float, width: float) -> np.ndarray:
    return np.exp(-(((x - centre) / width) ** 2)).astype(np.float32)


class Frame:
    """Where the body lies on the film: a similarity from body to pixel coordinates.

    Args:
        size: H = W.
        scale, angle, shift: of the patient; angle in degrees, shift in half widths of the film.
    """

    def __init__(self, size: int, scale: float, angle: float, shift: tuple[float, float]):
        self.size, self.scale, self.shift = size, scale, shift
        cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        self._turn = np.array([[cos, -sin], [sin, cos]]) * scale
        back = np.linalg.inv(self._turn)
        line = ((np.arange(size) + 0.5) * 2 / size - 1).astype(np.float32)
        u, v = line - shift[0], (line - shift[1])[:, None]
        self.x = np.float32(back[0, 0]) * u + np.float32(back[0, 1]) * v
        self.y = np.float32(back[1, 0]) * u + np.float32(back[1, 1]) * v
        self._row = np.clip((self.y + 1.6) * (_TABLE / 3.2), 0, _TABLE - 1).astype(np.intp)

    def lookup(self, table: np.ndarray, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
        """(_TABLE,) a function of body y → (H, W), or a window of it."""
        return np.take(table.astype(np.float32), self._row[rows, columns])

    def pixels(self, points: np.ndarray, factor: int = 1) -> np.ndarray:
        """(N, 2) body x, y → (N, 2) pixel column, row on a canvas `factor` times as large."""
        return (np.asarray(points) @ self._turn.T + self.shift + 1) * (self.size * factor / 2)

    def length(self, value: float, factor: int = 1) -> float:
        """A length of the body in pixels."""
        return value * self.scale * self.size * factor / 2

    def window(self, x: float, y: float, radius: float) -> tuple[slice, slice]:
        """The square of pixels about a body point, clipped to the film; may be empty."""
        column, row = self.pixels(np.array([[x, y]]))[0]
        r = self.length(radius)
        clip = lambda value: int(np.clip(value, 0, self.size))  # noqa: E731
        return slice(clip(row - r), clip(row + r + 1)), slice(clip(column - r), clip(column + r + 1))


class Layer:
    """A drawing of lines and shapes at twice the resolution, averaged down: lines without jagged edges."""

    FACTOR = 2

    def __init__(self, frame: Frame):
        self.frame = frame
        side = frame.size * self.FACTOR
        self._image = Image.new("L", (side, side))
        self._draw = ImageDraw.Draw(self._image)

    def _flat(self, points: np.ndarray) -> list[float]:
        return self.frame.pixels(points, self.FACTOR).ravel().tolist()

    def line(self, points: np.ndarray, width: float, level: int) -> None:
        """A polyline through body points; width in body units, level 0 … 255."""
        pixels = max(1, round(self.frame.length(width, self.FACTOR)))
        self._draw.line(self._flat(points), fill=level, width=pixels, joint="curve" if pixels > 2 else None)

    def lines(self, points: np.ndarray, widths: np.ndarray, level: int) -> None:
        """N polylines of K points, (N, K, 2), each with its own width."""
        flat = self.frame.pixels(points.reshape(-1, 2), self.FACTOR).reshape(len(points), -1).tolist()
        pixels = np.maximum(1, np.rint(self.frame.length(1.0, self.FACTOR) * widths)).astype(int).tolist()
        for path, width in zip(flat, pixels, strict=True):
            self._draw.line(path, fill=level, width=width)

    def polygon(self, points: np.ndarray, level: int) -> None:
        self._draw.polygon(self._flat(points), fill=level)

    def disc(self, x: float, y: float, radius: float, level: int) -> None:
        (column, row), r = self.frame.pixels(np.array([[x, y]]), self.FACTOR)[0], self.frame.length(radius, self.FACTOR)
        self._draw.ellipse([column - r, row - r, column + r, row + r], fill=level)

    def array(self) -> np.ndarray:
        """(H, W) float32 0 … 1."""
        small = self._image.reduce(self.FACTOR)
        return np.asarray(small, np.float32) * np.float32(1 / 255)


@dataclass
class Heart:
    """The cardiac silhouette: y of its upper end and of the diaphragm below, reach to either side of the midline."""

    top: float
    bottom: float
    left: float
    right: float


@dataclass
class Anatomy:
    """Continuous shape of one chest on one film, in body units."""

    width: float
    apex: float
    spacing: float
    slope: float
    domes: dict[str, float]
    flat: float
    heart: Heart
    turn: float
    curve: float
    soft: float
    breast: float
    clavicle: float
    scapula: float
    bubble: float

    @classmethod
    def draw(cls, study: Study, rng: np.random.Generator) -> Anatomy:
        """Draw the shape: the patient's own from their seed, the breath and the turn of this film from `rng`."""
        patient = study.patient
        own = np.random.default_rng(patient.seed)

        def spread(mean: float, deviation: float) -> float:
            return float(mean + knobs.ANATOMY_SPREAD * deviation * np.clip(own.standard_normal(), -2.5, 2.5))

        width, apex = spread(0.68, 0.03), spread(-0.74, 0.03)
        spacing, slope = spread(0.128, 0.006), spread(0.16, 0.05)
        breath = knobs.BREATH[study.inspiration] + knobs.BREATH_SPREAD * float(rng.standard_normal())
        dome = spread(0.42, 0.03) + breath
        raised, _, side = patient.diaphragm.partition("/")
        domes = {"right": dome, "left": dome + spread(0.04, 0.012)}
        if raised == "elevated":
            domes[side] = min(domes.values()) - spread(0.13, 0.02)
        ratio = {"normal": 0.44, "mild": 0.535, "moderate": 0.605, "severe": 0.69}[patient.heart]
        ratio += knobs.HEART_SPREAD * float(own.standard_normal())
        across = 2 * width * ratio * (1.05 if study.view == "AP" else 1.0)
        across *= 1.06 if study.inspiration == "low" else 0.95 if study.inspiration == "hyper" else 1.0
        turn = (
            {"none": 0.0, "left": 1.0, "right": -1.0}[study.rotation]
            * knobs.ROTATION
            * (1 + 0.15 * float(rng.standard_normal()))
        )
        turn += 0.008 * float(rng.standard_normal())
        leftward = spread(0.71, 0.03)
        bottom = max(domes.values()) + 0.02
        heart = Heart(
            top=bottom - spread(0.30, 0.03) - 0.36 * across,
            bottom=bottom,
            left=leftward * across + 0.7 * turn,
            right=(1 - leftward) * across - 0.7 * turn,
        )
        bend = {"scoliosis/left": 1.0, "scoliosis/right": -1.0}.get(patient.spine, 0.0)
        return cls(
            width=width * (1.05 if study.inspiration == "hyper" else 1.0),
            apex=apex - 0.3 * max(breath, 0.0),
            spacing=spacing * (1 + 0.25 * breath),
            slope=slope,
            domes=domes,
            flat=0.5 if study.inspiration == "hyper" else 1.0,
            heart=heart,
            turn=turn,
            curve=bend * spread(knobs.SCOLIOSIS, 0.015) + spread(0.0, 0.008),
            soft={"thin": 0.85, "average": 1.0, "large": 1.2}[patient.habitus] + spread(0.0, 0.03),
            breast=max(0.03, spread(0.11, 0.05)) * {"thin": 0.7, "average": 1.0, "large": 1.4}[patient.habitus],
            clavicle=spread(0.10, 0.03) - (0.05 if study.view == "AP" else 0.0),
            scapula=(0.56 if study.view == "AP" else 0.76) + spread(0.0, 0.03),
            bubble=spread(0.10, 0.03),
        )

    def wall(self) -> np.ndarray:
        """(_TABLE,) half width of the thorax inside the ribs, 0 above the apex."""
        t = np.clip((_ROWS - self.apex) / (0.35 - self.apex), 0, None)
        return self.width * np.where(
            t < 1, np.sqrt(np.clip(1 - (1 - np.minimum(t, 1)) ** 2.6, 0, 1)), 1 - 0.05 * (t - 1)
        )

    def spine(self) -> np.ndarray:
        """(_TABLE,) x of the spine's centre."""
        return self.curve * np.sin(np.clip((_ROWS + 0.55) / 1.05, -0.2, 1.2) * np.pi)

    def diaphragm(self, x: np.ndarray) -> np.ndarray:
        """y of the diaphragm at body x."""
        r = (np.abs(x) - 0.33) * np.float32(1 / self.width)
        drop = r * r * np.float32(0.55 * self.flat)
        return np.where(x > 0, np.float32(self.domes["left"]), np.float32(self.domes["right"])) + drop

    def zone(self, name: str, side: str) -> tuple[float, float]:
        """y of the upper and lower end of a zone of a lung."""
        top, bottom = self.apex + 0.10, self.domes[side] - 0.02
        third = (bottom - top) / 3
        index = ("upper", "middle", "lower").index(name)
        return top + index * third, top + (index + 1) * third


class Scene:
    """A film in the making.

    Attributes:
        mu: (H, W) attenuation so far.
        lungs: (H, W) 0 … 1 aerated lung that nothing hides.
        thorax: (H, W) 0 … 1 lung with what lies behind heart and mediastinum.
        heart: (H, W) 0 … 1.
        markings: (H, W) factor on the vessels, which a lesion may wipe out.
        contrast: factor on the contrast of every lesion.
    """

    def __init__(self, study: Study, anatomy: Anatomy, frame: Frame, contrast: float = 1.0):
        self.study, self.anatomy, self.frame, self.contrast = study, anatomy, frame, contrast
        a, x, y = anatomy, frame.x, frame.y
        side = np.abs(x)
        wall = frame.lookup(a.wall())
        self.from_wall = wall - side
        self.above_dome = a.diaphragm(x) - y
        self.thorax = step(self.from_wall, 0.035) * step(self.above_dome, 0.03)
        self.relative = np.minimum(side / np.maximum(wall, np.float32(0.05)), np.float32(1.2))

        middle = self._mediastinum(x)
        self.heart, thickness = self._heart(x)
        hidden = np.maximum(middle, self.heart)
        self.lungs = self.thorax * (1 - hidden)
        self.markings = np.ones_like(x)

        # Products: a power of a float32 array is a hundred times as slow.
        squared = self.relative * self.relative
        depth = 1 - squared * squared
        air = self.lungs * (0.34 + 0.22 * depth)
        lucent = {"left": 0.06, "right": -0.06, "none": 0.0}[study.rotation]
        if lucent:
            air *= 1 - np.float32(lucent) * np.sign(x)
        self.air = air
        self.mu = self._soft_tissue(x, y, side) - air + 0.25 * middle + thickness
        self.below = 1 - step(self.above_dome, 0.05)
        self.mu += self.below * step(self.from_wall + 0.10, 0.12) * 0.32
        self._airway()
        self._spine()
        self._ribs(side, y)
        self._stomach(x, y)

    def _soft_tissue(self, x: np.ndarray, y: np.ndarray, side: np.ndarray) -> np.ndarray:
        a = self.anatomy
        shoulder = 0.17 + 1.05 / (1 + np.exp(-(_ROWS + 0.80) / 0.055))
        trunk = a.width + 0.13 * a.soft + 0.04 * np.clip(_ROWS, 0, 1)
        outline = np.minimum(shoulder, np.where(_ROWS > -0.35, trunk, trunk + (-0.35 - _ROWS) * 2.2))
        out = self.frame.lookup(outline)
        body = step(out - side, 0.04) * (0.62 + 0.33 * (1 - np.minimum(side / out, 1) ** 2)) * np.float32(a.soft)
        arms = step(0.16 - np.abs(side - np.float32(a.width + 0.13 * a.soft + 0.21)), 0.06) * step(y + 0.45, 0.2)
        body += 0.55 * arms * (1 - step(out - side, 0.02))
        if self.study.patient.sex == "F":
            down = np.float32(0.28 + 0.3 * a.breast)
            r = ((side - 0.40) / 0.30) ** 2 + ((y - down + 0.12) / np.float32(0.15 + a.breast)) ** 2
            body += step(1 - r, 0.22) * np.float32(0.10 + 0.7 * a.breast) * step(y - down + 0.25, 0.35)
        return body

    def _mediastinum(self, x: np.ndarray) -> np.ndarray:
        a, aorta = self.anatomy, self.study.patient.aorta
        wide = 1.0 if aorta != "tortuous" else 1.35
        shift = 0.6 * a.turn
        knob = 0.075 * wide * bump(_ROWS, -0.27, 0.085)
        descending = (0.05 if aorta == "tortuous" else 0.0) * bump(_ROWS, 0.08, 0.25)
        left = 0.10 + 0.5 * shift + knob + descending + 0.045 * bump(_ROWS, -0.08, 0.09) + 0.3 * a.spine()
        ascending = (0.05 if aorta == "tortuous" else 0.0) * bump(_ROWS, -0.22, 0.12)
        right = 0.10 - 0.5 * shift + 0.03 * bump(_ROWS, -0.35, 0.2) + ascending - 0.3 * a.spine()
        return step(self.frame.lookup(left) - x, 0.035) * step(self.frame.lookup(right) + x, 0.035)

    def _heart(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        h = self.anatomy.heart
        t = (_ROWS - h.top) / (h.bottom - h.top)
        # The left ventricle slopes out to the apex and rounds off below it, the right atrium is a shallow arc.
        ventricle = np.where(t < 0.78, np.sin(0.5 * np.pi * np.clip(t / 0.78, 0, 1)) ** 1.25, 1 - 1.6 * (t - 0.78) ** 2)
        atrium = np.clip(np.sin(np.pi * np.clip(0.12 + 0.72 * t, 0, 1)), 0, 1) ** 0.8 * (t > 0) * (t < 1.18)
        left = self.frame.lookup(0.07 * (t > 0) + (h.left - 0.07) * ventricle)
        right = self.frame.lookup(h.right * atrium)
        inside = step(left - x, 0.035) * step(right + x, 0.035) * step(self.frame.lookup(1.12 - t), 0.15)
        inside *= step(self.frame.lookup(t), 0.1)
        q = np.minimum(np.abs(2 * x - left + right) / np.maximum(left + right, 0.05), 1)
        return inside, inside * (0.10 + 0.26 * np.sqrt(1 - q * q))

    def _airway(self) -> None:
        a, rows, columns = self.anatomy, *self.frame.window(0.0, -0.55, 0.55)
        lookup = lambda table: self.frame.lookup(table, rows, columns)  # noqa: E731
        pushed = 0.04 if self.study.patient.aorta == "tortuous" else 0.0
        off = np.abs(
            self.frame.x[rows, columns] - lookup(0.7 * a.turn - pushed * bump(_ROWS, -0.3, 0.15) + 0.4 * a.spine())
        )
        y = self.frame.y[rows, columns]
        self.mu[rows, columns] -= 0.16 * step(lookup(0.035 * step(-0.17 - _ROWS, 0.08)) - off, 0.02)
        branch = np.abs(off - 0.75 * (y + 0.19))
        self.mu[rows, columns] -= 0.10 * step(0.022 - branch, 0.02) * step(0.10 - np.abs(y + 0.09), 0.03)

    def _spine(self) -> None:
        rows, columns = slice(None), self.frame.window(0.0, 0.0, 0.32)[1]
        lookup = lambda table: self.frame.lookup(table, rows, columns)  # noqa: E731
        worn = self.study.patient.spine == "degenerative"
        phase = (_ROWS / 0.098) % 1
        disc = np.clip(1.6 - np.abs(phase - 0.5) * 10, 0, 1)
        half = 0.066 + 0.02 * np.clip(_ROWS, -0.6, 0.8) + (0.034 * disc if worn else 0.0)
        body = 0.11 + 0.05 * (1 - disc) + (0.10 * disc if worn else 0.0)
        off = np.abs(self.frame.x[:, columns] - lookup(self.anatomy.spine()))
        bone = step(lookup(half) - off, 0.018) * lookup(body) * (1 - 0.45 * self.below[:, columns])
        bone += 0.08 * step(0.012 - off, 0.012) * lookup(np.clip(np.abs(phase - 0.2) * 8 - 1, 0, 1))
        self.mu[:, columns] += bone

    def _ribs(self, side: np.ndarray, y: np.ndarray) -> None:
        a, r = self.anatomy, self.relative
        high = np.clip((0.1 - _ROWS) / 0.8, 0, 1)
        bow = self.frame.lookup(0.10 + 0.25 * high)
        tip = r * r * r
        tip = tip * tip
        posterior = (y - a.slope * side - bow * (r * r - r) * 0.9 - 0.10 * tip) / np.float32(a.spacing)
        anterior = (y + np.float32(0.62) * (side - np.float32(0.1))) / np.float32(a.spacing * 1.18) + 0.4
        inside = step(self.from_wall + 0.03, 0.03)
        mid = inside * step(side - 0.07, 0.03)
        back = _BACK[(posterior * 256).astype(np.int32) & 255]
        shade = 1 - 0.65 * self.below
        self.mu += back * mid * shade * 0.165
        front = inside * step(side - np.float32(0.42 * a.width), 0.12)
        self.mu += _FRONT[(anterior * 256).astype(np.int32) & 255] * front * shade * 0.10
        edge = step(0.022 - np.abs(self.from_wall + 0.012), 0.02)
        self.mu += edge * (0.05 + 0.16 * back) * shade

    def _stomach(self, x: np.ndarray, y: np.ndarray) -> None:
        a = self.anatomy
        r = a.bubble
        if r < 0.05:
            return
        cx, cy = 0.30, a.domes["left"] + 0.06 + 0.7 * r
        rows, columns = self.frame.window(cx, cy, 2 * r)
        u, v = (x[rows, columns] - cx) / (1.3 * r), (y[rows, columns] - cy) / r
        self.mu[rows, columns] -= 0.22 * step(1 - u * u - v * v, 0.5)


def _rib_profile(share: float, cortex: float) -> np.ndarray:
    """(256,) attenuation over one rib and the gap below it: dense edges, a paler middle."""
    t = np.arange(256) / 256
    inside = step((share / 2 - np.abs(t - 0.5)).astype(np.float32), 0.08)
    rim = np.exp(-(((np.abs(t - 0.5) - share / 2 + 0.05) / 0.05) ** 2))
    return (inside * (1 - cortex) + cortex * rim).astype(np.float32)


_BACK = _rib_profile(0.46, 0.35)
_FRONT = _rib_profile(0.52, 0.3)
