"""Figures as inline SVG: few-label curves, forests of differences, training curves.

A colour is a CSS variable of the page, so that one drawing serves light and dark; a method keeps its own throughout.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

# matplotlib is given these, the page reads those
INKS = {"#010101": "var(--ink)", "#020202": "var(--soft)", "#030303": "var(--line)", "#040404": "var(--m0)"}
HUES = 6
INKS |= {f"#0505{hue:02x}": f"var(--m{hue})" for hue in range(1, HUES + 1)}
INK, SOFT, LINE = list(INKS)[:3]
DASHES: list[Any] = ["-", (0, (4, 2)), (0, (1, 1.6))]
MARKERS = ["o", "s", "^"]
# Okabe & Ito's colours (2008), told apart by the colour-blind, without black and yellow; lighter where the page is dark
STYLE = """\
:root { --m0: #17171a; --m1: #0072b2; --m2: #d55e00; --m3: #009e73; --m4: #b0578d; --m5: #3f9bd6; --m6: #c98500 }
@media screen and (prefers-color-scheme: dark) { :root { --m0: #f0f0ee; --m1: #4d9fe0; --m2: #f0813d; --m3: #2fbf94;
  --m4: #d98fbb; --m5: #8ccbf2; --m6: #efb83c } }
svg text { font-family: inherit !important }
"""


@dataclass(frozen=True)
class Look:
    """How a method is drawn: one of `HUES` colours, 0 that of the reference, and a dash and marker by turn."""

    hue: int
    turn: int = 0

    @property
    def colour(self) -> str:
        return list(INKS)[3 + self.hue]

    @property
    def dash(self) -> Any:
        return DASHES[self.turn % len(DASHES)]

    @property
    def marker(self) -> str:
        return MARKERS[self.turn % len(MARKERS)]

    def swatch(self) -> str:
        """Return a small inline picture of it, for tables and keys."""
        colour = f"var(--m{self.hue})"
        dash = ("", ' stroke-dasharray="4 2"', ' stroke-dasharray="1.5 2"')[self.turn % 3]
        mark = ('<circle cx="11" cy="6" r="3.2"/>', '<rect x="8" y="3" width="6" height="6"/>',
                '<path d="M11 2.4 15 9.4 7 9.4z"/>')[self.turn % 3]  # fmt: skip
        return (f'<svg class="swatch" viewBox="0 0 22 12" aria-hidden="true" style="fill:{colour};stroke:{colour}">'
                f'<path d="M0 6H22" stroke-width="1.6"{dash}/>{mark}</svg>')  # fmt: skip


def looks(methods: Sequence[str], reference: str | None) -> dict[str, Look]:
    """Return each method's look; the reference has the ink of the text."""
    others = [method for method in methods if method != reference]
    found = {method: Look(1 + place % HUES, place // HUES) for place, method in enumerate(others)}
    return {method: found.get(method, Look(0)) for method in methods}


# --- the figures -----------------------------------------------------------------


def curves(rows: Sequence[dict[str, Any]], look: dict[str, Look], name: str, alt: str) -> str:
    """Draw the metric of one task against the share of labels, a line a method, with intervals.

    Up to four methods have bands; more would cover each other and have bars, side by side.

    Args:
        rows: of a `Comparison`, of one task and metric.
        look: by method.
        name: prefix of the ids in the SVG, another in each figure of a page.
        alt: what the figure shows, in words.
    """
    methods = [method for method in look if any(row["method"] == method for row in rows)]
    shares = sorted({row["fraction"] if row["fraction"] is not None else 1.0 for row in rows})
    place = {share: float(i) for i, share in enumerate(shares)}
    bands = len(methods) <= 4 and len(shares) > 1
    step = 0.0 if bands else min(0.06, 0.5 / max(1, len(methods) - 1))

    def draw(axis: Any) -> None:
        ends = []
        for turn, method in enumerate(methods):
            mine = sorted((row for row in rows if row["method"] == method), key=lambda row: row["fraction"] or 1.0)
            x = np.array([place[row["fraction"] if row["fraction"] is not None else 1.0] for row in mine])
            x = x + step * (turn - (len(methods) - 1) / 2)
            y, low, high = (np.array([row[key] for row in mine], float) for key in ("value", "low", "high"))
            style = look[method]
            if bands:
                axis.fill_between(x, low, high, color=style.colour, alpha=0.13, linewidth=0)
            else:
                axis.vlines(x, low, high, color=style.colour, linewidth=1, alpha=0.7)
            axis.plot(x, y, color=style.colour, linestyle=style.dash, marker=style.marker, markersize=4, linewidth=1.5)
            ends.append((method, float(x[-1]), float(y[-1])))
        axis.set_xlim(-0.35, len(shares) - 0.65)
        axis.set_xticks(range(len(shares)), [percent(share) for share in shares])
        axis.set_xlabel("share of the training labels")
        _name(axis, ends, look)

    return _svg(draw, (4.7, max(2.9, 0.17 * len(methods) + 0.8)), name, alt, names=methods)


def forest(rows: Sequence[dict[str, Any]], look: dict[str, Look], reference: str, name: str, alt: str) -> str:
    """Draw differences to the reference, a finding after the other and a line a method, with intervals.

    Args:
        rows: of `Findings`.
        look: by method.
        reference: what the differences are from.
        name: prefix of the ids in the SVG.
        alt: what the figure shows, in words.
    """
    findings = list(dict.fromkeys(row["finding"] for row in rows))
    lines = len(rows) + 1.25 * len(findings)
    ends = np.array([[row["difference_low"], row["difference_high"], row["difference"]] for row in rows], float)
    reach = 1.08 * float(np.nanmax(np.abs(ends), initial=0.01))

    def draw(axis: Any) -> None:
        axis.axvline(0, color=look[reference].colour, linewidth=1)
        y = 0.0
        for finding in findings:
            mine = [row for row in rows if row["finding"] == finding]
            axis.text(-0.02, y, finding, transform=axis.get_yaxis_transform(), ha="right", va="center", fontsize=9,
                      fontweight="bold", color=INK)  # fmt: skip
            counted = f"{mine[0]['positives']} with, {mine[0]['negatives']} without"
            axis.text(0.01, y, counted, transform=axis.get_yaxis_transform(), ha="left", va="center", fontsize=7.5,
                      color=SOFT)  # fmt: skip
            y += 1
            for row in mine:
                style = look[row["method"]]
                axis.hlines(y, row["difference_low"], row["difference_high"], color=style.colour, linewidth=1.6)
                axis.plot([row["difference"]], [y], color=style.colour, marker=style.marker, markersize=4.5)
                axis.text(-0.02, y, row["method"], transform=axis.get_yaxis_transform(), ha="right", va="center",
                          fontsize=8.5, color=SOFT)  # fmt: skip
                y += 1
            y += 0.25
        axis.set_ylim(y - 0.4, -0.7)
        axis.set_xlim(-reach, reach)
        axis.set_yticks([])
        axis.set_xlabel(f"difference of AUROC from {reference}")
        axis.grid(axis="x", color=LINE, linewidth=0.7)

    return _svg(draw, (4.7, 0.175 * lines + 0.6), name, alt, left=0.32)


def training(
    lines: Sequence[tuple[str, np.ndarray, np.ndarray, Look, Any]], name: str, alt: str, label: bool = False,
    size: tuple[float, float] = (4.7, 2.9),
) -> str:  # fmt: skip
    """Draw curves over epochs.

    Args:
        lines: name, epochs (E,), values (E,), look, and its dash where it is not the look's.
        name: prefix of the ids in the SVG.
        alt: what the figure shows, in words.
        label: whether the names stand at the ends of the lines, each name once.
        size: in inches; 4.7 is the width of a panel.
    """

    def draw(axis: Any) -> None:
        ends: dict[str, tuple[str, float, float]] = {}
        for text, x, y, style, dash in lines:
            axis.plot(x, y, color=style.colour, linestyle=dash or style.dash, linewidth=1.3,
                      marker=style.marker if len(x) == 1 else None, markersize=4,
                      markerfacecolor="none" if dash else style.colour)  # fmt: skip
            ends.setdefault(text, (text, float(x[-1]), float(y[-1])))
        last = max((int(x[-1]) for _, x, *_ in lines), default=1)
        axis.set_xlim(0.5, last + 0.5 if last > 1 else 1.5)
        step = max(1, math.ceil(last / 6))
        axis.set_xticks(range(1, last + 1, step))
        axis.set_xlabel("epoch")
        if label:
            _name(axis, list(ends.values()), {text: style for text, _, _, style, _ in lines})

    names = list({text for text, *_ in lines}) if label else []
    return _svg(draw, (size[0], max(size[1], 0.17 * len(names) + 0.8)), name, alt, 0.11 * 4.7 / size[0], names)


def percent(share: float | None) -> str:
    """Return a share of the labels as a reader says it, "" of an evaluation, which has none."""
    return f"{100 * share:g}\u00a0%" if share else ""


# --- what they have in common ----------------------------------------------------


def _name(axis: Any, ends: Sequence[tuple[str, float, float]], look: dict[str, Look]) -> None:
    """Write each line's name at its end, apart from each other, and tie it to the end where it had to move."""
    low, high = axis.get_ylim()
    axis.set_ylim(low, high)  # lines to names must not move it
    height = (high - low) * 10 / (72 * axis.figure.get_figheight() * axis.get_position().height)
    order = sorted(ends, key=lambda end: end[2])
    places = spread([y for *_, y in order], height, low, high)
    left, right = axis.get_xlim()
    edge = right + 0.03 * (right - left)
    for (text, x, y), place in zip(order, places, strict=True):
        axis.plot([x, edge], [y, place], color=look[text].colour, linewidth=0.6, alpha=0.55, clip_on=False)
        axis.text(edge + 0.01 * (right - left), place, text, va="center", fontsize=8.5, color=INK)


def spread(values: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Return rising places at least `least` apart, near the rising values: groups that collide share their middle.

    They stay between `low` and `high` where there is room for all.
    """
    groups: list[list[float]] = []  # [sum of the values, count]; its places are centred on the mean
    for value in values:
        groups.append([value, 1])
        while len(groups) > 1:
            (a, m), (b, n) = groups[-2:]
            if b / n - a / m >= least * (m + n) / 2:
                break
            groups[-2:] = [[a + b, m + n]]
    places = [total / n + least * (i - (n - 1) / 2) for total, n in groups for i in range(int(n))]
    for i in range(len(places)):
        places[i] = max(places[i], low + least * i)
    for i in range(len(places)):
        places[-1 - i] = min(places[-1 - i], high - least * i)
    return places


def _svg(
    draw: Callable[[Any], None], size: tuple[float, float], name: str, alt: str, left: float = 0.11,
    names: Sequence[str] = (),
) -> str:  # fmt: skip
    """Return what `draw` puts on an axis as inline SVG: ids of its own, the page's colours, room for `names`."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    width, height = size
    room = min(0.4, (5 * max(map(len, names)) + 12) / (72 * width)) if names else 0.0  # 5 points a letter
    settings: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "font.size": 8.5,
        "axes.edgecolor": SOFT, "axes.labelcolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT, "text.color": INK,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size)
        FigureCanvasSVG(figure)
        axis = figure.subplots()
        figure.subplots_adjust(left, 0.44 / height, 0.97 - room, 1 - 0.12 / height)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_facecolor("none")
        axis.grid(axis="y", color=LINE, linewidth=0.7)
        axis.set_axisbelow(True)
        draw(axis)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return inline(file.getvalue(), name, alt)


def inline(text: str, name: str, alt: str) -> str:
    """Return an SVG file as a part of a page: no prologue, no metadata, ids with a prefix, inks as variables."""
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", text)
    for ink, variable in INKS.items():
        text = text.replace(ink, variable)
    box = re.search(r'viewBox="[^"]*"', text)
    head = f'<svg class="plot" {box[0] if box else ""} role="img" aria-label="{escape(alt)}">'
    return head + text[text.index(">") + 1 :]
