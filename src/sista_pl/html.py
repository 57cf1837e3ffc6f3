"""Pages that are one file each: a common look for light, dark and print, pictures inside, nothing from the network."""

from __future__ import annotations

import base64
import io
from html import escape

from PIL import Image

STYLE = """\
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --ink: #17171a; --soft: #5d5e63; --line: #e3e3df }
@media screen and (prefers-color-scheme: dark) { :root { --page: #131315; --card: #1c1c1f; --ink: #f0f0ee;
  --soft: #a2a3a8; --line: #323236 } }
* { box-sizing: border-box } body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 48px }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em }
h2 { font-size: 18px; margin: 40px 0 12px } h3 { font-size: 15px; margin: 24px 0 8px }
p { margin: 0 0 8px } .soft, figcaption { color: var(--soft) } .num { font-variant-numeric: tabular-nums }
.phantom { background: #6b3fa0; color: #fff; text-align: center; font-weight: 700; letter-spacing: .14em;
  padding: 8px 16px } .phantom span { font-weight: 400; letter-spacing: 0; opacity: .9 }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 12px; margin: 24px 0 0 }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px }
.tile b { display: block; font-size: 22px; line-height: 1.25 }
table { border-collapse: collapse; width: 100% } th { text-align: left; font-size: 13px; color: var(--soft);
  font-weight: 500 } td, th { padding: 9px 12px 9px 0; border-bottom: 1px solid var(--line); vertical-align: top }
tr:last-child td { border-bottom: 0 } td.r, th.r { text-align: right } td:last-child, th:last-child { padding-right: 0 }
td.name { font-weight: 600; white-space: nowrap }
figure { margin: 0 } figcaption { font-size: 13px; margin-top: 4px; overflow-wrap: anywhere }
.key { display: flex; gap: 18px; flex-wrap: wrap; font-size: 13px; color: var(--soft); margin: 0 0 10px }
svg { display: block; width: 100%; height: auto } svg text { fill: var(--ink); font-size: 13px }
footer { margin-top: 40px; font-size: 13px }
"""
_PHANTOM = '<div class="phantom">PHANTOM DATA <span>drawn, not taken from patients</span></div>\n'


def opening(title: str, style: str, phantom: bool) -> str:
    """Return the beginning of a page, up to its `<main>`, which the caller opens and closes.

    Args:
        title: of the window, as plain text.
        style: CSS beyond `STYLE`.
        phantom: whether to say so in a band on top.
    """
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title><style>\n{STYLE}{style}</style>\n{_PHANTOM if phantom else ''}"
    )


def tiles(figures: list[tuple[str, str]]) -> str:
    """Return a row of large numbers, each (number, what it counts), as plain text."""
    shown = "".join(
        f'<div class="tile"><b class="num">{escape(number)}</b><span class="soft">{escape(what)}</span></div>'
        for number, what in figures
    )
    return f'<div class="tiles">{shown}</div>'


def picture(image: Image.Image, alt: str) -> str:
    """Return an image of the page with its pixels inside, as JPEG.

    Args:
        image: grey or RGB.
        alt: what it shows, as plain text.
    """
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escape(alt)}">'
