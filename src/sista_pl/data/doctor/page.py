"""The doctor's page: one HTML file with everything in it, no script, no network."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from sista_pl.data.doctor.reports import BATCHES
from sista_pl.data.doctor.subject import LEVELS, Check, Subject, worst
from sista_pl.data.formats import SPLITS
from sista_pl.html import opening, picture, tiles

_STYLE = """\
:root { --ok: #0a7d33; --note: #2563b8; --warning: #9a5b00; --problem: #c02626; --tint: 9%;
  --train: #2a78d6; --val: #1baf7a; --test: #d99100; }
@media screen and (prefers-color-scheme: dark) { :root { --ok: #4cc475; --note: #78aef5; --warning: #f0b04e;
  --problem: #ff7b72; --tint: 16%; --train: #3987e5; --val: #199e70; --test: #c98500; } }
header { display: flex; gap: 16px; justify-content: space-between; align-items: flex-start; flex-wrap: wrap }
.badge, .level { display: inline-block; border-radius: 999px; font-weight: 600; white-space: nowrap;
  color: var(--c); background: color-mix(in srgb, var(--c) var(--tint), transparent) }
.badge { padding: 8px 16px; border: 1px solid var(--c); border-radius: 10px; line-height: 1.4 }
.badge .soft { font-weight: 400; font-size: 13px } .level { padding: 1px 10px; font-size: 13px }
.ok { --c: var(--ok) } .note { --c: var(--note) } .warning { --c: var(--warning) } .problem { --c: var(--problem) }
.card { overflow-x: auto } .next { color: var(--soft); font-size: 14px } .next::before { content: "→ " }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 14px }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(310px, 1fr)); gap: 14px }
figure > div { display: flex; gap: 4px } img { width: 100%; min-width: 0; aspect-ratio: 1; background: #000;
  border-radius: 6px; display: block } figure > div img { width: 50% } .one figure > div img { width: 100% }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px }
svg .faint { fill: var(--soft) } svg .axis { stroke: var(--line) } .f-train { fill: var(--train) }
.f-val { fill: var(--val) } .f-test { fill: var(--test) } .i-train { background: var(--train) }
.i-val { background: var(--val) } .i-test { background: var(--test) }
"""
_SIGNS = {"ok": "✓", "note": "i", "warning": "!", "problem": "✕"}
_VERDICTS = {
    "ok": "Ready for training", "note": "Ready for training", "warning": "Look before training",
    "problem": "Repair before training",
}  # fmt: skip
_MASK, _BOX = (255, 122, 48), (64, 214, 255)
_SAMPLES, _SIDE = 12, 256


def page(subject: Subject, checks: Sequence[Check], title: str, name: Callable[[int], str], seed: int = 0) -> str:
    """Return the page of what the checks found.

    Args:
        subject: what was examined.
        checks: of `diagnose`.
        title: of the page, the folder's name.
        name: row → what may be shown of the image's id.
        seed: of the sample images.
    """
    parts = [_head(subject, checks, title), _table(checks)]
    by_name = {check.name: check for check in checks}
    if (labels := by_name.get("labels")) and labels.figures:
        parts.append(_labels(labels.figures))
    if (length := by_name.get("length of reports")) and length.figures:
        parts.append(_reports(length.figures, by_name.get("reports that say the same")))
    if len(subject.rows):
        parts += [_offenders(subject, checks, name), _samples(subject, name, seed)]
    told = "This page holds images of the data set: share it only as the data themselves may be shared."
    parts.append(f'<footer class="soft">{told} Patient ids are not shown.</footer></main></html>\n')
    return "\n".join(part for part in parts if part)


def _head(subject: Subject, checks: Sequence[Check], title: str) -> str:
    level = worst(checks)
    counted = [(sum(check.level == name for check in checks), name) for name in reversed(LEVELS[1:])]
    told = " · ".join(f"{count} {name}{'' if count == 1 else 's'}" for count, name in counted)
    table = subject.table
    counts: list[tuple[int, str]] = [
        (len(table), "images"), (table["study_id"].nunique(), "studies"), (table["patient_id"].nunique(), "patients"),
    ]  # fmt: skip
    counts += [(int((table["split"] == split).sum()), split) for split in SPLITS if (table["split"] == split).any()]
    counts.append((len(subject.skipped), "left out"))
    shown = tiles([(f"{count:,}", what) for count, what in counts])
    about = f"{subject.kind}, {subject.name}: {subject.version}; split {subject.split}"
    return (
        f"{opening(f'{title}: data doctor', _STYLE, subject.phantom)}<main><header><div><h1>{escape(title)}</h1>"
        f'<p class="soft">{escape(about)}</p></div>\n'
        f'<div class="badge {level}">{_SIGNS[level]}&ensp;{_VERDICTS[level]}<br>'
        f'<span class="soft num">{told}</span>\n</div></header>{shown}'
    )


def _table(checks: Sequence[Check]) -> str:
    lines = []
    for check in sorted(checks, key=lambda check: -LEVELS.index(check.level)):
        step = f'<div class="next">{escape(check.step)}</div>' if check.step else ""
        lines.append(
            f'<tr><td><span class="level {check.level}">{_SIGNS[check.level]} {check.level}</span></td>'
            f'<td class="name">{escape(check.name)}</td><td>{escape(check.text)}{step}</td></tr>'
        )
    return f'<h2>Checks</h2><div class="card"><table>{"".join(lines)}</table></div>'


def _labels(figures: dict[str, Any]) -> str:
    """Bars of the prevalence in each split, of the known."""
    splits = [split for split in SPLITS if any(split in by_split for by_split in figures.values())]
    shares = [c["present"] / max(1, c["present"] + c["absent"]) for f in figures.values() for c in f.values()]
    top, marks, y = max([0.01, *shares]), [], 18.0
    for label, by_split in figures.items():
        start = y
        for split in splits:
            if split not in by_split:
                continue
            counts = by_split[split]
            present, absent, unknown = (counts[key] for key in ("present", "absent", "unknown"))
            known = present + absent
            width, share = 500 * (present / max(1, known)) / top, present / max(1, known)
            gone = unknown / max(1, known + unknown)
            marks.append(
                f"<g><title>{escape(label)}, {split}: {present} present, {absent} absent, {unknown} unknown</title>"
                f'<rect class="f-{split}" x="231" y="{y:.0f}" width="{width:.1f}" height="10" rx="2"/>'
                f'<text x="{236 + width:.1f}" y="{y + 10:.0f}">{share:.1%} of {known:,}</text>'
                f'<text class="faint" x="1000" y="{y + 10:.0f}" text-anchor="end">{gone:.1%}</text></g>'
            )
            y += 15
        marks.append(f'<text x="0" y="{(start + y) / 2 + 2:.0f}">{escape(label[:30])}</text>')
        y += 10
    key = "".join(f'<span><i class="i-{split}"></i>{split}</span>' for split in splits)
    return (
        f'<h2>Labels</h2><p class="key">{key}</p><div class="card"><svg viewBox="0 0 1000 {y:.0f}" role="img" '
        'aria-label="prevalence"><text class="faint" x="230" y="10">present, of the known</text>'
        '<text class="faint" x="1000" y="10" text-anchor="end">unknown</text>'
        f'<line class="axis" x1="230" x2="230" y1="16" y2="{y - 8:.0f}"/>{"".join(marks)}</svg></div>'
    )


def _reports(figures: dict[str, Any], same: Check | None) -> str:
    """The histogram of the reports' lengths, and how many others in a batch say the same."""
    counts, edges = figures["histogram"]["counts"], figures["histogram"]["edges"]
    width, top, marks = 960 / len(counts), max([1, *counts]), []
    for i, count in enumerate(counts):
        height = 120 * count / top
        marks.append(
            f'<rect class="f-train" x="{21 + i * width:.1f}" y="{140 - height:.1f}" width="{width - 2:.1f}" '
            f'height="{height:.1f}" rx="2"><title>{edges[i]:.0f} to {edges[i + 1]:.0f} words: {count}</title></rect>'
        )
    for i in range(0, len(edges), 4):
        place = f'x="{20 + i * width:.0f}" y="158" text-anchor="middle"'
        marks.append(f'<text class="faint" {place}>{edges[i]:.0f}</text>')
    told = (
        f"Words per report, {figures['reports']:,} reports: median {figures['words_median']:.0f}, 95% below "
        f"{figures['words_p95']:.0f}; {figures['truncated']:,} longer than {figures['max_tokens']} tokens "
        f"({figures['tokens']})."
    )
    html = (
        f'<h2>Reports</h2><div class="card"><p class="soft">{escape(told)}</p><svg viewBox="0 0 1000 164" role="img" '
        f'aria-label="words per report">{"".join(marks)}<line class="axis" x1="20" x2="980" y1="140.5" y2="140.5"/>'
        "</svg></div>"
    )
    groups = same.figures.get("groups", {}) if same else {}
    if not groups:
        return html
    head = "".join(f'<th class="r">expected in a batch of {b}</th>' for b in BATCHES)
    lines = []
    for key, what in (("equal_text", "the same words"), ("equal_findings", "the same findings")):
        expected = groups[key]["expected_false_negatives"]
        cells = "".join(f'<td class="r num">{"–" if n is None else f"{n:.2f}"}</td>' for n in expected.values())
        share = groups[key]["share_of_studies"]
        lines.append(f'<tr><td>{what}</td><td class="r num">{share:.1%}</td>{cells}</tr>')
    return html + (
        '<h3>False negatives</h3><p class="soft">How many other pairs of a random training batch say the same as a '
        f'given one.</p><div class="card"><table><tr><th>reports with</th><th class="r">share of studies</th>{head}'
        f"</tr>{''.join(lines)}</table></div>"
    )


def _offenders(subject: Subject, checks: Sequence[Check], name: Callable[[int], str]) -> str:
    """The images of the checks' examples, side by side."""
    seen, parts = set(subject.rows.tolist()), []
    for check in sorted(checks, key=lambda check: -LEVELS.index(check.level)):
        shown = [(rows, note) for rows, note in check.examples if set(rows) <= seen]
        if not shown:
            continue
        kind = "pairs" if max(len(rows) for rows, _ in shown) > 1 else "grid one"
        figures = "".join(_figure(subject, rows, f"{note} ({', '.join(map(name, rows))})") for rows, note in shown)
        parts.append(f'<h3>{escape(check.name)}</h3><div class="{kind}">{figures}</div>')
    return f"<h2>Worst offenders</h2>{''.join(parts)}" if parts else ""


def _samples(subject: Subject, name: Callable[[int], str], seed: int) -> str:
    rows = subject.rows[np.random.default_rng(seed).permutation(len(subject.rows))[:_SAMPLES]]
    table = subject.table
    figures = ""
    for row in rows.tolist():
        view = str(table["view"].iat[row] or "")
        figures += _figure(subject, [row], " ".join(filter(None, (str(table["split"].iat[row]), view, name(row)))))
    key = f'<span><i style="background:rgb{_MASK}"></i>mask</span><span><i style="background:rgb{_BOX}"></i>box</span>'
    return f'<h2>Samples</h2><p class="key">{key}</p><div class="grid one">{figures}</div>'


def _figure(subject: Subject, rows: Sequence[int], caption: str) -> str:
    images = "".join(picture(_drawn(subject, row), caption) for row in rows)
    return f"<figure><div>{images}</div><figcaption>{escape(caption)}</figcaption></figure>"


def _drawn(subject: Subject, row: int) -> Image.Image:
    """The image with the outline of its mask and its boxes."""
    side = max(_SIDE, subject.size)
    image = Image.fromarray(subject.image(row)).resize((side, side), Image.Resampling.BILINEAR).convert("RGB")
    if subject.mask and bool(subject.table["has_mask"].iat[row]):
        mask = Image.fromarray((subject.mask(row) == 255).astype(np.uint8)).resize(
            (side, side), Image.Resampling.NEAREST
        )
        inside = np.asarray(mask) > 0
        padded = np.pad(inside, 2)
        core = np.logical_and.reduce([np.roll(padded, shift, axis) for shift in (-2, 2) for axis in (0, 1)])[2:-2, 2:-2]
        pixels = np.array(image)
        pixels[inside & ~core] = _MASK
        image = Image.fromarray(pixels)
    boxes = subject.table["boxes"].iat[row]
    draw, scale = ImageDraw.Draw(image), side / subject.size
    for box in json.loads(boxes) if isinstance(boxes, str) else ():
        corners = [scale * v for v in (box["x"], box["y"], box["x"] + box["w"], box["y"] + box["h"])]
        draw.rectangle(corners, outline=_BOX, width=max(1, side // 128))
    return image
