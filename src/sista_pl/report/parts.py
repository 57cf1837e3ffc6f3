"""Small parts of the page: tables, panels, numbers as a reader has them. All return HTML; names are escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from sista_pl.report.plots import Look, percent

Entry = tuple[str, Any, str]  # HTML, what to sort by or None, class


def table(heads: Sequence[tuple[str, str]], lines: Sequence[Sequence[Entry]], sort: bool = True) -> str:
    """Return a table; on a narrow screen each row becomes a block, so that nothing has to be scrolled.

    A column that is empty in all lines is left out.

    Args:
        heads: (text, class) of each column.
        lines: a cell a column.
        sort: whether columns that have something to sort by get a button for it.
    """
    kept = [i for i in range(len(heads)) if any(line[i][0] for line in lines)]
    head = body = ""
    for i in kept:
        text, name = heads[i]
        inner = escape(text)
        if sort and len(lines) > 2 and any(known(line[i][1]) for line in lines):
            inner = f'<button type="button">{inner}</button>'
        head += f'<th scope="col" class="{name}">{inner}</th>'
    for line in lines:
        cells = ""
        for i in kept:
            html, value, name = line[i]
            data = f' data-value="{float(value):.9g}"' if known(value) else ""
            cells += f'<td class="{name}" data-label="{escape(heads[i][0])}"{data}>{html}</td>'
        body += f"<tr>{cells}</tr>"
    return f'<div class="card"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def panel(caption: str, inside: str) -> str:
    """Return a figure; both are HTML."""
    return f"<figure><figcaption>{caption}</figcaption>{inside}</figure>"


def panels(figures: Sequence[str], kind: str = "") -> str:
    """Return figures side by side, as many as the page is wide."""
    return f'<div class="panels {kind}">{"".join(figures)}</div>' if figures else ""


def missing(notes: Sequence[str]) -> str:
    """Return what is not there, a line each as HTML; nothing where all is."""
    return f'<div class="card missing"><ul>{"".join(f"<li>{note}</li>" for note in notes)}</ul></div>' if notes else ""


def soft(text: str) -> str:
    """Return a paragraph that explains what stands beside it."""
    return f'<p class="soft text">{text}</p>'


def named(method: str, look: dict[str, Look]) -> str:
    """Return a method's name with its line and marker."""
    return f"{look[method].swatch()}{escape(method)}"


def setting(task: str, share: float | None) -> str:
    """Return what a setting is called, as plain text."""
    return f"{task}, {percent(share)} of the labels" if share else task


def glyph(row: dict[str, Any], reach: float, look: Look) -> str:
    """Return a difference with its interval as a small picture, 0 in the middle; the numbers stand beside it."""
    keys = ("difference_low", "difference", "difference_high")
    low, value, high = (65 + 60 * row[key] / reach if known(row[key]) else 65.0 for key in keys)
    colour = f"var(--m{look.hue})"
    return (
        f'<svg class="glyph" viewBox="0 0 130 14" aria-hidden="true"><path d="M65 0V14" stroke="var(--soft)" '
        f'stroke-width=".8"/><path d="M{low:.1f} 7H{high:.1f}" stroke="{colour}" stroke-width="2"/>'
        f'<circle cx="{value:.1f}" cy="7" r="3.4" fill="{colour}"/></svg>'
    )


def known(value: Any) -> bool:
    """Whether there is a number: neither None nor NaN."""
    return value is not None and value == value


def number(value: Any, form: str = ".3f") -> str:
    """Return a number with a true minus, or nothing."""
    return f"{value:{form}}".replace("-", "−") if known(value) else ""


def interval(value: Any, low: Any, high: Any, form: str = ".3f") -> str:
    """Return a number and its interval in brackets, where it has one."""
    ends = f" [{number(low, form)}, {number(high, form)}]" if known(low) and known(high) else ""
    return f"{number(value, form)}{ends}"


def apart(row: dict[str, Any]) -> str:
    """Return a row's difference with its interval."""
    return interval(row["difference"], row["difference_low"], row["difference_high"], "+.3f")


def probability(value: float) -> str:
    """Return a p-value."""
    return "&lt;0.001" if value < 0.001 else number(value)


def several(count: int, one: str, more: str) -> str:
    """Return a count with its noun."""
    return f"{count:,} {one if count == 1 else more}"


def duration(seconds: float | None) -> str:
    """Return a time in the unit that suits it."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
