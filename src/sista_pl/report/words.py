"""The same words of the same reports over the patches of their images, under each method of a sweep.

P patches on a square grid, D joint dimension, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sista_pl.errors import SistaError
from sista_pl.report.swept import Swept

if TYPE_CHECKING:
    from sista_pl.data.store import Store
    from sista_pl.joint import JointEncoder

POOL = 512  # validation studies that are looked at


@dataclass
class Study:
    """A study that is shown.

    Args:
        row: of the store.
        report: its text, as the encoders are given it.
        words: of the report, in its order.
        film: (H, W) float32 in [0, 1], the crop of the first method that is shown.
    """

    row: int
    report: str
    words: list[str]
    film: np.ndarray


@dataclass
class WordMaps:
    """Word maps of a sweep.

    Args:
        studies: that are shown.
        maps: by method, a study after the other: (h, w) cosine of each of its words to each patch, None where the
            method's tokenizer cut the word off.
        missing: by method, why it has none.
    """

    studies: list[Study]
    maps: dict[str, list[list[np.ndarray | None]]]
    missing: dict[str, str]


def word_maps(swept: Swept, studies: int = 2, words: int = 3) -> WordMaps:
    """Encode the same validation studies by each method's pre-training with the first seed.

    Studies and words are chosen by the reports alone: those with the most different words that name a finding and are
    not negated.

    Args:
        swept: the sweep's folder.
        studies: how many are shown.
        words: at most, of a study.
    """
    from sista_pl.joint import load_joint

    found = WordMaps([], {}, {})
    data: tuple[str, Store] | None = None
    for method in swept.methods:
        cells = [cell for cell in swept.wanted if cell.method == method and cell.task is None]
        if not cells:
            found.missing[method] = "no pre-training, so no space of words and patches"
            continue
        run = swept.run(cells[0]) if cells[0] in swept.done else None
        checkpoint = None if run is None else run / "checkpoints" / "best.ckpt"
        if checkpoint is None or not checkpoint.is_file():
            found.missing[method] = f"{cells[0].name} has no checkpoint" if run else f"{cells[0].name} is not done"
            continue
        try:
            joint = load_joint(checkpoint)
            if not joint.tokens_trained:
                raise SistaError("no loss looks at words and patches, so its token projections are not trained")
            arguments = _data(swept.config(cells[0]))
            if data is None:
                data = _open(swept.here(str(arguments.get("store")), cells[0]))
                found.studies = _choose(data[1], arguments, studies, words, joint.image_size)
            elif data[0] != str(swept.here(str(arguments.get("store")), cells[0])):
                raise SistaError(f"pre-trained on {arguments.get('store')}, other images than the first method's")
            found.maps[method] = [_maps(joint, data[1], study) for study in found.studies]
        except SistaError as why:
            found.missing[method] = str(why)
    return found


def _data(config: dict[str, Any]) -> dict[str, Any]:
    given = config.get("data") or {}
    return dict(given.get("init_args") or {}) if isinstance(given, dict) else {}


def _open(path: Path) -> tuple[str, Store]:
    from sista_pl.data.store import Store

    if not path.exists():
        raise SistaError(f"its images, {path}, are not there; make the report where the sweep was run")
    return str(path), Store.open(path)


# --- which studies and words -----------------------------------------------------


def _choose(store: Store, data: dict[str, Any], count: int, most: int, size: int) -> list[Study]:
    """Return the validation studies with the most finding words, each with words that the ones before it lack."""
    from sista_pl.data.reports import NORMALISE

    normalise = NORMALISE[str((data.get("text") or {}).get("normalize", "unicode"))]
    table = store.manifest[store.manifest["split"] == "val"].iloc[:POOL]
    offered = []
    for row, impression, findings in zip(table.index, table["impression"], table["findings"], strict=True):
        # as `PairDataModule` joins them
        parts = [part if isinstance(part, str) else "" for part in (impression, findings)]
        report = normalise(" ".join(parts).strip())
        offered.append((int(row), report, finding_words(report)))
    chosen: list[Study] = []
    shown: set[str] = set()
    while offered and len(chosen) < count:
        new = [len({word.lower() for word in words} - shown) for _, _, words in offered]
        row, report, words = offered.pop(int(np.argmax([min(most, n) - 1e-4 * len(o[1]) for n, o in
                                                        zip(new, offered, strict=True)])))  # fmt: skip
        words = sorted(words, key=lambda word: word.lower() in shown)[:most]
        if not words:
            break
        shown |= {word.lower() for word in words}
        ordered = sorted(words, key=report.index)
        chosen.append(Study(row, report, ordered, _crop(store, row, size)[0].numpy() * 0.5 + 0.5))
    if not chosen:
        raise SistaError(f"{store.path}: no validation report names a finding in a word that the lexicon knows")
    return chosen


def finding_words(report: str) -> list[str]:
    """Return the words of a report that name a finding by themselves and are not negated, each once, in its order."""
    from sista_pl.data import lexicon
    from sista_pl.data.negation import negated_spans, tokens

    names = {phrase for phrases in lexicon.FINDINGS.values() for phrase in phrases.split("|") if " " not in phrase}
    negated = negated_spans(report)
    found: dict[str, str] = {}
    for word, start, end in tokens(report):
        if lexicon.singular(word) in names and not any(a <= start < b for a, b in negated):
            found.setdefault(word, report[start:end])
    return list(found.values())


# --- the maps of a method --------------------------------------------------------


def _crop(store: Store, row: int, size: int) -> Any:
    """Return the centre crop of an image as the encoder is given it, (1, size, size) in [-1, 1]."""
    import torch

    from sista_pl.data import transforms

    cropped = transforms.build(store.size, size, train=False)(torch.from_numpy(store.image(row))[None])
    return transforms.normalise(cropped)


def _maps(joint: JointEncoder, store: Store, study: Study) -> list[np.ndarray | None]:
    """Return the cosine of each of a study's words to each patch, (h, w); see `WordMaps.maps`."""
    from sista_pl.models.tokens import surfaces
    from sista_pl.similarity_map import similarity_map

    patches = joint.encode_image(_crop(store, study.row, joint.image_size)[None]).local[0]  # P D
    if round(len(patches) ** 0.5) ** 2 != len(patches):
        raise SistaError(f"its {len(patches)} patches are no square grid")
    read, tokenizer = joint.encode_text([study.report]), joint.text_encoder.tokenizer
    assert read.ids is not None and tokenizer is not None  # noqa: PT018  a checkpoint brings both
    written = [word.lower() for word in surfaces(tokenizer, study.report)]
    affirmed = [word if known > 0 else "" for word, known in zip(written, read.ids[0].tolist(), strict=False)]
    places = [affirmed.index(word.lower()) if word.lower() in affirmed else None for word in study.words]
    return [None if at is None else similarity_map(read.local[0, at : at + 1], patches).numpy() for at in places]
