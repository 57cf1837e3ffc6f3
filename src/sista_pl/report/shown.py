"""The sections of the page with images: words over patches, and the cases that the tests left."""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from sista_pl.html import picture
from sista_pl.report import Contents, parts
from sista_pl.report.parts import named, number
from sista_pl.report.plots import Look, percent
from sista_pl.report.words import Study

MOST = 7_000_000  # characters of the cases' pictures; the rest of a page is far below 3 MB
WIDEST, FILM, MAP = 1100, 320, 200  # pixels


def words(found: Contents, look: dict[str, Look]) -> str:
    """Similarity maps of the same words under each method."""
    if found.words is None:
        return parts.missing(["left out, as --no-words says"])
    maps = found.words
    missing = [f"{escape(method)}: {escape(why)}" for method, why in maps.missing.items()]
    if not maps.maps:
        return parts.missing(missing)
    html = ""
    for place, study in enumerate(maps.studies):
        film = picture(_film(study.film, FILM), f"study {place + 1}: the image without a map")
        cells = ['<div class="corner"></div>', *(f'<div class="word">{escape(word)}</div>' for word in study.words)]
        for method, of in maps.maps.items():
            cells.append(f'<div class="label">{named(method, look)}</div>')
            cells += [_map(study, values, method, place, i) for i, values in enumerate(of[place])]
        html += (
            f'<div class="study"><div>{film}<p class="soft">{_report(study)}</p></div>'
            f'<div class="maps" style="--words: {len(study.words)}">{"".join(cells)}</div></div>'
        )
    told = (
        "Cosine of a word to each patch in the joint space of each pre-training, first seed, best checkpoint; brighter "
        "is more alike. Each map has its own scale, whose ends stand below it. The validation studies and their words "
        "were chosen by the reports alone, for the affirmed findings in them."
    )
    return parts.soft(told) + html + parts.missing(missing)


def _report(study: Study) -> str:
    """The report with the words that are shown marked."""
    html = [
        f"<mark>{escape(word)}</mark>" if word.strip(".,;:()") in study.words else escape(word)
        for word in study.report.split()
    ]
    return " ".join(html)


def _film(film: np.ndarray, side: int) -> Image.Image:
    grey = Image.fromarray((255 * np.clip(film, 0, 1)).astype(np.uint8))
    return grey.resize((side, side), Image.Resampling.BICUBIC)


def _map(study: Study, values: np.ndarray | None, method: str, place: int, word: int) -> str:
    """A film with a map over it, and the ends of its scale."""
    if values is None:
        return '<figure><figcaption class="soft">cut off by its tokenizer</figcaption></figure>'
    import matplotlib

    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    large = Image.fromarray(scaled.astype(np.float32)).resize((MAP, MAP), Image.Resampling.BICUBIC)
    colours = matplotlib.colormaps["inferno"](np.clip(np.asarray(large), 0, 1))[..., :3]
    grey = np.asarray(_film(study.film, MAP), np.float64)[..., None] / 255
    y, x = (3 * int(at) // len(values) for at in np.unravel_index(int(values.argmax()), values.shape))
    where = f"{('top', 'middle', 'bottom')[y]} {('left', 'centre', 'right')[x]}"
    ends = f"{number(low, '.2f')} to {number(high, '.2f')}"
    alt = f"{method}: {study.words[word]} over study {place + 1}, cosine {ends}, highest at the {where} of the picture"
    image = picture(Image.fromarray((255 * (0.5 * grey + 0.5 * colours)).astype(np.uint8)), alt)
    return f'<figure>{image}<figcaption class="num">{ends}</figcaption></figure>'


def cases(found: Contents, look: dict[str, Look]) -> str:
    """The pictures that the tests left: of the reference and the best other method, with the fewest labels."""
    swept, html, missing, spent = found.swept, "", [], 0
    for task in swept.tasks:
        share = min(share for name, share in swept.settings if name == task)
        name, figures = parts.setting(task, share), []
        methods = _whose(found, task, share)
        if not methods:
            missing.append(escape(f"{name}: nothing is tested yet"))
        for method in methods:
            cell = next(c for c in swept.done if (c.method, c.task, c.fraction) == (method, task, share))
            file = (swept.run(cell) or Path()) / "test" / "pictures" / "cases.png"
            if not file.is_file():
                missing.append(escape(f"{name}: the test of {method} left no {file.name}"))
                continue
            image = _smaller(file, f"{task} under {method}, {percent(share)} of the labels: films of the test")
            if spent + len(image) > MOST:
                missing.append(escape(f"{name}: no room for that of {method}; see {file.relative_to(swept.root)}"))
                continue
            spent += len(image)
            figures.append(parts.panel(f'{named(method, look)} <span class="soft">seed {cell.seed}</span>', image))
        if figures:
            html += f"<h3>{escape(name)}</h3>{parts.panels(figures, 'cases')}"
    told = (
        "As the tests left them, of the reference and of the best other method, with the fewest labels and the first "
        "seed. Those of the other cells lie in <code>runs/CELL/NUMBER/test/pictures/</code>."
    )
    return parts.soft(told) + html + parts.missing(missing)


def _whose(found: Contents, task: str, share: float) -> list[str]:
    """Return the reference and the best other method of a setting, as far as they are tested."""
    if found.comparison is None:
        tested = [cell.method for cell in found.swept.done if (cell.task, cell.fraction) == (task, share)]
        return tested[:1]
    rows = [row for row in found.comparison.rows if (row["task"], row["fraction"]) == (task, share)]
    others = sorted((row for row in rows if row["method"] != found.reference), key=lambda row: row["rank"])
    return [row["method"] for row in rows if row["method"] == found.reference] + [row["method"] for row in others[:1]]


def _smaller(file: Path, alt: str) -> str:
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    if image.width > WIDEST:
        image = image.resize((WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS)
    return picture(image, alt)
