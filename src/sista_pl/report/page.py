"""The page of a sweep: one HTML file with everything in it."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from sista_pl.html import opening, tiles
from sista_pl.report import Contents, made, parts, plots, results, shown
from sista_pl.report.plots import Look

_STYLE = """\
h2 { margin-top: 52px; font-size: 20px } h3 .soft { font-weight: 400 } .tile b { font-size: 19px; white-space: nowrap }
.text, .lead, dl { max-width: 90ch }
.lead { font-size: 16px } .card + p { margin-top: 10px } .over { margin: 0; font-size: 13px; color: var(--soft) }
nav { margin: 20px 0 0; font-size: 14px; display: flex; flex-wrap: wrap; gap: 4px 18px }
a { color: inherit; text-decoration-color: var(--soft); text-underline-offset: 3px }
.card { overflow-x: auto }
.missing { border-left: 3px solid var(--m6); border-radius: 4px; margin: 12px 0; font-size: 14px }
.missing ul { margin: 0; padding-left: 18px } .swatch { display: inline-block; width: 22px; height: 12px;
  margin-right: 8px; vertical-align: -1px } .glyph { width: 130px; height: 14px }
table { font-size: 14px } td, th { padding: 6px 10px 6px 0; vertical-align: middle } th { vertical-align: bottom }
td.num { white-space: nowrap; font-variant-numeric: tabular-nums } td b { font-weight: 650 }
td small, td .soft { font-size: 12.5px } td.soft { overflow-wrap: anywhere; font-size: 13px }
th button { all: unset; cursor: pointer } th button:focus-visible { outline: 2px solid var(--m1) }
th button::after { content: "\\a0↕"; opacity: .35 } th[aria-sort] button { color: var(--ink) }
th[aria-sort=ascending] button::after { content: "\\a0↑"; opacity: 1 }
th[aria-sort=descending] button::after { content: "\\a0↓"; opacity: 1 }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 16px }
.panels.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 230px), 1fr)) }
.panels.cases { grid-template-columns: 1fr; max-width: 940px }
.panels figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px }
.panels figcaption { margin: 0 0 6px; color: var(--ink); font-weight: 600; font-size: 14px }
.panels figcaption .soft { font-weight: 400 } .plot { max-width: 620px }
.small .plot { max-width: 330px } .cases img { width: 100%; border-radius: 4px }
details { margin: 12px 0 0 } summary { cursor: pointer; color: var(--soft); font-size: 14px; margin-bottom: 8px }
.mono { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere } dl { margin: 0 } dt { font-weight: 600; float: left; clear: left; margin-right: 8px }
dt::after { content: ":" } dd { margin: 0 0 4px }
.study { display: grid; grid-template-columns: 250px 1fr; gap: 28px; margin: 16px 0 32px } .study p { margin-top: 8px }
.maps { display: grid; grid-template-columns: minmax(110px, max-content) repeat(var(--words), minmax(0, 180px));
  gap: 6px; align-content: start; align-items: start } .word { font-weight: 600 } .maps .label { align-self: center }
.maps figcaption { font-size: 12px; margin: 1px 0 4px } .study img { width: 100%; border-radius: 4px; display: block }
mark { background: color-mix(in srgb, var(--m6) 28%, transparent); color: inherit; padding: 0 2px; border-radius: 3px }
@media screen and (max-width: 720px) { main { padding: 20px 14px 32px } h2 { margin-top: 40px }
  .study { grid-template-columns: 1fr; gap: 12px } .study > div:first-child img { max-width: 250px }
  .maps { grid-template-columns: repeat(var(--words), minmax(0, 1fr)) } .corner { display: none }
  .maps .label { grid-column: 1 / -1; margin-top: 6px } .tiles { grid-template-columns: repeat(3, 1fr); gap: 8px }
  .tile { padding: 8px 10px; font-size: 13px } .tile b { font-size: 18px } }
@media screen and (max-width: 1040px) { thead { display: none } tr { display: grid; gap: 4px 14px; padding: 10px 0;
    grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); border-bottom: 1px solid var(--line) }
  tr:last-child { border-bottom: 0 }
  td { border: 0; padding: 0 } td.num { white-space: normal } td:empty { display: none }
  td::before { content: attr(data-label); display: block; font-size: 12px; color: var(--soft) }
  td.name, td.soft, td.picture { grid-column: 1 / -1 } td.name::before, td.picture::before { display: none } }
@media print { body { font-size: 11px; background: #fff } main { max-width: none; padding: 0 } table { font-size: 10px }
  nav, th button::after { display: none } h2, h3, .lead { break-after: avoid } figure, tr, .tile { break-inside: avoid }
  .panels { grid-template-columns: 1fr 1fr } .panels.small { grid-template-columns: repeat(3, 1fr) } }
"""
# Sorts a table by the column whose head is pressed, the largest first; without it the tables stand as they were made.
_SCRIPT = """\
<script>
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.parentNode, body = head.closest("table").tBodies[0];
  const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
  for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  const value = row => parseFloat(row.cells[head.cellIndex].dataset.value);
  const order = (a, b) => isNaN(value(a)) - isNaN(value(b)) || sign * (value(a) - value(b)) || 0;
  body.append(...[...body.rows].sort(order));
});
</script>
"""
_SECTIONS: list[tuple[str, str, Callable[[Contents, dict[str, Look]], str]]] = [
    ("results", "Results", results.results),
    ("settings", "Each setting", results.settings),
    ("curves", "Few labels", results.curves),
    ("findings", "Finding by finding", results.findings),
    ("training", "Pre-training", made.training),
    ("words", "Words over patches", shown.words),
    ("cases", "Worst cases", shown.cases),
    ("methods", "What was swept", made.methods),
    ("how", "How it was computed", made.how),
]


def page(found: Contents) -> str:
    """Return the page of a sweep; parts that are not there are named on it."""
    look = plots.looks(found.swept.methods, found.reference or found.swept.reference)
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in _SECTIONS)
    body = "\n".join(
        f'<section id="{name}"><h2>{title}</h2>\n{make(found, look)}</section>' for name, title, make in _SECTIONS
    )
    told = "This page holds images and reports of the data: share it only as the data themselves may be shared."
    return (
        f"{opening(f'{found.swept.name}: sweep', plots.STYLE + _STYLE, found.phantom)}<main>{_head(found)}\n"
        f'<nav aria-label="contents">{links}</nav>\n{body}\n'
        f'<footer class="soft">{told} Not for clinical use.</footer></main>\n{_SCRIPT}</html>\n'
    )


def _head(found: Contents) -> str:
    """What was swept, how much of it is done, and what is missing."""
    swept = found.swept
    shares = ", ".join(f"{100 * share:g}" for share in sorted({share for _, share in swept.settings} - {0}))
    counts = [
        (f"{sum(swept.cells.values())} of {len(swept.cells)}", "cells done"),
        (str(len(swept.methods)), "methods"), (str(len(swept.tasks)), "task" if len(swept.tasks) == 1 else "tasks"),
        (f"{shares} %" if shares else "none", "of the labels"),
        (str(len(swept.seeds)), "seed" if len(swept.seeds) == 1 else "seeds"),
        (parts.duration(swept.seconds), "computed"),
    ]  # fmt: skip
    notes = [escape(note) for note in found.notes]
    if left := [cell.name for cell, done in swept.cells.items() if not done]:
        names = f"<details><summary>their names</summary>{escape(', '.join(left))}</details>"
        short = len(left) <= 6
        told = f": {escape(', '.join(left))}" if short else names
        notes.insert(0, f"{parts.several(len(left), 'cell is', 'cells are')} not done{told}")
    seeds = f"seed{'' if len(swept.seeds) == 1 else 's'} {', '.join(map(str, swept.seeds))}"
    about = f"{', '.join(swept.methods)} on {', '.join(swept.tasks)}; {seeds}"
    if found.reference:
        about += f"; differences are from {found.reference}"
    return (
        f'<header><p class="over">Sweep</p><h1>{escape(swept.name)}</h1><p class="soft">{escape(about)}</p></header>'
        f"{tiles(counts)}{parts.missing(notes)}"
    )
