"""`sista explain`: where in a film the words of a text light up, as overlays, arrays and one page."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sista_pl.errors import BadImage, SistaError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from sista_pl.embed import Joint, Preparation
    from sista_pl.explain import Frame, Maps, Query

_HELP = """\
Lays a text over films: the cosine of the text, and of each of its content words, with each patch of a film, in the
film's own pixels; the patches that the checkpoint's sparse token loss selects for a word; and, of a vision transformer,
its attention rolled out through all layers.

Writes to DIR, for each film: <film>/*.png, overlays of at most 1024 px; <film>/*.npy, the maps in original pixels
(float16; NaN where padding or crop hid the film from the encoder); and explain.html (one page, no network) and
explain.json (ranges, peaks, selected patches as boxes in original pixels).
"""
_EPILOG = """\
A map shows what the encoder finds alike. It is no proof that it looked at the finding, and not for clinical use.

examples:
  sista explain --ckpt_path runs/pretrain/0001/checkpoints/best.ckpt --image film.dcm --text "left pleural effusion"
  sista explain --ckpt_path best.ckpt --image films/ --text "right upper lobe opacity" --out opacity
"""
_PAGE = 480  # longest side of the page's pictures, in pixels
_STYLE = """\
h2 { overflow-wrap: anywhere } .note { border-left: 3px solid #d99100; padding-left: 10px }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 14px; align-items: start }
.row figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px }
img { width: 100%; display: block; background: #000; border-radius: 4px } figcaption b { color: var(--ink) }
.bar { display: inline-block; width: 120px; height: 9px; border-radius: 4px; vertical-align: middle;
  background: linear-gradient(90deg, #000004, #420a68, #932667, #dd513a, #fca50a, #fcffa4) }
"""


@dataclass
class Picture:
    """One overlay: its name, what it shows, and its caption and alternative text."""

    name: str
    image: Image
    caption: str
    alt: str


def main(argv: list[str]) -> int:
    """Write the folder and return 0.

    Raises:
        SistaError: a checkpoint, a text, a film or a folder that can't be used.
    """
    options = _parser().parse_args(argv)
    out: Path = options.out
    if out.exists() or out.is_symlink():
        raise SistaError(f"explain: {out} exists; give --out another folder, or delete it")
    if not options.image.exists():
        raise SistaError(f"explain: --image {options.image}: no such file or folder; check the path")

    from sista_pl.commands.embed import bar, choose_device
    from sista_pl.data.images import find_images
    from sista_pl.embed import open_joint, preparation
    from sista_pl.explain import ask

    files = find_images(options.image)
    joint = open_joint(options.ckpt_path, choose_device(options.device))
    how = preparation(options.ckpt_path, joint.image_size, options.size)
    query = ask(joint, options.text, how)
    query.notes += _told(joint)
    print(f"films: long side to {how.size} px ({how.told}), of which the encoder sees the middle {how.crop}")
    for note in query.notes:
        print(f"explain: {note}")
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.mkdir(parents=True)
        with bar(len(files), "explaining films") as advance:
            films, bad = _films(joint, query, how, files, partial, advance)
        if not films:
            raise SistaError(f"explain: {bad[0]['image']}: {bad[0]['why']}; JPEG, PNG and DICOM are read")
        facts = {"checkpoint": str(options.ckpt_path), "text": query.text, "notes": query.notes,
                 "size": how.size, "crop": how.crop, "films": films, "unreadable": bad}  # fmt: skip
        (partial / "explain.json").write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n")
        os.rename(partial, out)
    except OSError as why:
        raise SistaError(f"explain: {out} cannot be written ({why.strerror or why}); give another --out") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if bad:
        print(f"explain: {len(bad)} could not be read, as {bad[0]['image']}: {bad[0]['why']}; all in explain.json")
    print(f"explain: {out / 'explain.html'}, {len(films)} films")
    return 0


def _told(joint: Joint) -> list[str]:
    """Return what the checkpoint can't show, a line each."""
    from sista_pl.explain import selection

    if joint.tokens_trained and selection(joint) is None:
        return ["its token loss weights all patches, so that no selection is outlined"]
    return []


def _films(
    joint: Joint, query: Query, how: Preparation, files: list[Path], out: Path, advance: Any
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Write the folder of each film and the page; what was found, and the files that can't be read."""
    from sista_pl.data.images import image_size
    from sista_pl.explain import Frame, look, read_film, show_film

    films: list[dict[str, Any]] = []
    bad: list[dict[str, str]] = []
    names: set[str] = set()
    with (out / "explain.html").open("w", encoding="utf-8") as page:
        page.write(_head(query))
        for file in files:
            advance(1)
            try:
                image, (width, height) = read_film(file, how), image_size(file)
                film = show_film(file, width, height)
            except BadImage as why:
                bad.append({"image": str(file), "why": str(why)})
                continue
            maps, frame = look(joint, query, image), Frame(width, height, how)
            name = _unique(_safe(file.stem) or "film", names)
            (out / name).mkdir()
            facts, pictures = draw(query, maps, frame, film, file.name, out / name)
            films.append({"image": str(file), "folder": name, "width": width, "height": height, **facts})
            page.write(_section(f"{file.name}, {width} × {height} px", pictures))
        page.write(_foot(bad))
    return films, bad


def draw(
    query: Query, maps: Maps, frame: Frame, film: np.ndarray, name: str, out: Path
) -> tuple[dict[str, Any], list[Picture]]:
    """Write the maps of a film as .npy and its overlays as .png; what explain.json says of them, and the pictures.

    Args:
        query: the text.
        maps: of this film.
        frame: of this film.
        film: (rows, columns) uint8, the whole film as it is shown.
        name: of the film, for the alternative texts.
        out: its folder.
    """
    import numpy as np
    from PIL import Image

    shown: list[tuple[str, str, np.ndarray, np.ndarray | None]] = [("text", f"“{query.text}”", maps.whole, None)]
    names = {"text", "film", "attention"}
    for place, (word, negated) in enumerate(zip(query.words, query.negated, strict=True)):
        weights = None if maps.weights is None else maps.weights[place]
        title = f"{word} (negated)" if negated else word
        shown.append((_unique(f"word-{_safe(word) or place}", names), title, maps.words[place], weights))
    if maps.rollout is not None:
        shown.append(("attention", "attention, rolled out through all layers", maps.rollout, None))
    Image.fromarray(film).save(out / "film.png")
    pictures = [Picture("film", Image.fromarray(film), "the film", f"The film {name}")]
    found: dict[str, Any] = {}
    for key, title, values, weights in shown:
        whole = frame.unfit(values)
        np.save(out / f"{key}.npy", whole.astype(np.float16))
        peak = [int(x) for x in np.unravel_index(np.nanargmax(whole), whole.shape)][::-1]
        boxes = None if weights is None else frame.boxes(weights > 0)
        picture = overlay(film, frame.unfit(values, film.shape), boxes, frame.width)
        picture.save(out / f"{key}.png")
        low, high = float(values.min()), float(values.max())
        unit = "share" if key == "attention" else "cosine"
        kept = "" if weights is None else f"; {int((weights > 0).sum())} of {weights.size} patches selected"
        caption = f"<b>{escape(title)}</b><br>{unit} {low:.3g} to {high:.3g}{kept}"
        across, down = (peak[0] + 0.5) / frame.width, (peak[1] + 0.5) / frame.height
        alt = (
            f"{title} over {name}: {unit} {low:.2g} to {high:.2g}, highest {across:.0%} of the width from the left and "
            f"{down:.0%} of the height from the top"
        )
        pictures.append(Picture(key, picture, caption, alt))
        found[key] = {"title": title, "lowest": low, "highest": high, "peak": peak}
        if boxes is not None and weights is not None:
            found[key]["selected"] = [[round(float(x), 1) for x in box] for box in boxes]
    for key, pieces in zip([k for k in found if k.startswith("word-")], query.pieces, strict=True):
        found[key]["pieces"] = pieces
    return {"maps": found}, pictures


def overlay(film: np.ndarray, values: np.ndarray, boxes: np.ndarray | None, width: int) -> Image:
    """Return the film in grey with a map over it, dark to bright from its lowest to its highest value.

    What the encoder did not see is dimmed and has no colour.

    Args:
        film: (rows, columns) uint8.
        values: (rows, columns), NaN where nothing was seen.
        boxes: (M, 4) x0 y0 x1 y1 in pixels of the original, outlined; or None.
        width: pixels of the original's rows.
    """
    import numpy as np
    from matplotlib import colormaps
    from PIL import Image, ImageDraw

    seen = np.isfinite(values)
    low, high = np.nanmin(values), np.nanmax(values)
    level = np.nan_to_num((values - low) / (high - low if high > low else 1))
    heat = colormaps["inferno"](level)[..., :3] * 255
    grey = np.repeat(film[..., None], 3, 2).astype(np.float32)
    picture = Image.fromarray(np.where(seen[..., None], 0.5 * grey + 0.5 * heat, 0.5 * grey).astype(np.uint8))
    if boxes is not None:
        pen, scale, line = ImageDraw.Draw(picture), film.shape[1] / width, max(1, max(film.shape) // 400)
        for x0, y0, x1, y1 in boxes * scale:
            pen.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=(64, 214, 255), width=line)
    return picture


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:60]


def _unique(name: str, taken: set[str]) -> str:
    """Return the name, with a number where it is taken on any file system, and take it."""
    found, number = name, 1
    while found.lower() in taken:
        number += 1
        found = f"{name}-{number}"
    taken.add(found.lower())
    return found


def _head(query: Query) -> str:
    from sista_pl.html import opening

    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in query.notes)
    return (
        f"{opening(query.text, _STYLE, phantom=False)}<main><h1>“{escape(query.text)}”</h1>\n"
        '<p class="soft">Where a film is like the text, and like each of its words: <span class="bar"></span> from '
        "each map's lowest to its highest value. Outlined: the patches that the sparse token loss selects. Dimmed: "
        f"what the encoder does not see. A likeness is no proof. Not for clinical use.</p>{notes}\n"
    )


def _section(title: str, pictures: list[Picture]) -> str:
    from sista_pl.html import picture

    figures = []
    for shown in pictures:
        small = shown.image.copy()
        small.thumbnail((_PAGE, _PAGE))
        figures.append(f"<figure>{picture(small, shown.alt)}<figcaption>{shown.caption}</figcaption></figure>")
    return f'<h2>{escape(title)}</h2><div class="row">{"".join(figures)}</div>\n'


def _foot(bad: list[dict[str, str]]) -> str:
    lines = "".join(f"<li>{escape(found['image'])}: {escape(found['why'])}</li>" for found in bad)
    listed = f"<h2>Not read</h2><ul>{lines}</ul>" if bad else ""
    return f'{listed}<p class="soft">This page holds films: share it only as they may be shared.</p></main></html>\n'


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "sista explain", description=_HELP, epilog=_EPILOG, formatter_class=raw, allow_abbrev=False
    )
    parser.add_argument("--ckpt_path", type=Path, required=True, metavar="CKPT", help="checkpoint of a pre-training")
    parser.add_argument("--image", type=Path, required=True, help="JPEG, PNG or DICOM, a folder of them, or a CSV")
    parser.add_argument("--text", required=True, help="what to look for, in the words of a report")
    parser.add_argument(
        "--out", type=Path, default=Path("explain"), metavar="DIR",
        help="folder to make, which is not there (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=int, metavar="PX", help="long side of a film before the crop (default: as the run's config.yaml)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda … or auto (default: %(default)s)")
    return parser
