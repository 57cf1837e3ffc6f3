"""Raw releases, as they are distributed, become rows; a reader is a function `(root, **options) -> Release`."""

from __future__ import annotations

import inspect
import os
import re
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from sista_pl.data.masks import Rle
from sista_pl.errors import SistaError, did_you_mean
from sista_pl.registry import Registry, Spec

# What an annotation asks of a value that YAML has read.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "None": ("null", lambda value: value is None),
    "str": ("a text", lambda value: isinstance(value, str)),
    "Path": ("a path", lambda value: isinstance(value, str | Path)),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "int": ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "float": ("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool)),
    "Sequence[str]": (
        "a list of texts",
        lambda value: isinstance(value, str | list | tuple) and all(isinstance(each, str) for each in value),
    ),
    "Mapping[str, Any]": ("a mapping, {key: value}", lambda value: isinstance(value, Mapping)),
}


class _Readers(Registry):
    """Readers by name; what YAML made of an option is checked where its annotation is one of `_KINDS`."""

    def build(self, spec: Spec, **context: Any) -> Any:
        name, options = self.split(spec)
        parameters = inspect.signature(self[name]).parameters
        for option in options.keys() & parameters.keys():
            value, asked = options[option], parameters[option].annotation
            asked = asked if isinstance(asked, str) else inspect.formatannotation(asked)
            kinds = [_KINDS.get(re.sub(r"[\w.]+\.", "", kind)) for kind in asked.split(" | ")]
            if not any(kind is None or kind[1](value) for kind in kinds):
                wanted = " or ".join(kind[0] for kind in kinds if kind)
                raise SistaError(f"{name}: {option} is {'null' if value is None else repr(value)}; give {wanted}")
        return super().build(spec, **context)


READERS = _Readers("data format")
SPLITS = ("train", "val", "test")


@dataclass(slots=True)
class Row:
    """One image with all that the release says of it.

    Args:
        image_id: unique in the release.
        patient_id: the unit that no split may cut: the patient, or the group of patients where a release names one.
        study_id: the examination; its images share a report.
        image: path of the image file.
        view: PA, AP, LATERAL … as the release writes it, "" where unknown.
        split: "train", "val" or "test".
        findings: that section of the report, cleaned; "" where absent.
        impression: the same.
        labels: 1 present, 0 absent, NaN unknown or uncertain, by finding.
        mask: path of an 8-bit mask (0 background, 127 ignore, 255 object), run lengths, or None.
        boxes: `{"category", "x", "y", "w", "h"}` in pixels of the upright image, x and y the top left corner;
            [] says that there is none, None that nobody looked; with a `"phrase"` where the release has one.
        source: "file:row" that it came from.
    """

    image_id: str
    patient_id: str
    study_id: str
    image: Path
    view: str
    split: str
    findings: str
    impression: str
    labels: dict[str, float] = field(default_factory=dict)
    mask: Path | Rle | None = None
    boxes: list[dict[str, Any]] | None = None
    source: str = ""


@dataclass
class Release:
    """What a reader found.

    Args:
        name: the reader's name.
        version: the detected release, "MIMIC-CXR-JPG 2.1.0".
        rows: in the order of the release.
        skipped: what was left out (image or row) and why.
        phantom: True where the images are drawn and not taken from patients.
        root: the folder that the paths of the rows lie in; where it stands is no property of the data.
        options: the options that chose the rows, as plain values without paths; kept in the store.
        split: name of the rule that split them, "official" where the release says it; `data/splits.py`.
    """

    name: str
    version: str
    rows: list[Row]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    phantom: bool = False
    root: Path = Path()
    options: dict[str, Any] = field(default_factory=dict)
    split: str = "official"


def is_phantom(*folders: Path) -> bool:
    """True where one of the folders carries the mark that the phantom's writers leave."""
    return any((folder / "phantom" / "phantom.json").is_file() for folder in folders)


def need_columns(file: Path, present: Sequence[str], needed: Sequence[str]) -> None:
    """Raise a SistaError that names the file and the first of the `needed` columns that is not `present`."""
    for column in needed:
        if column not in present:
            raise SistaError(f"{file}: no column {column!r}; {did_you_mean(column, present)}")


def refuse_duplicates(file: Path, ids: Sequence[str], rows: Sequence[int]) -> None:
    """Raise a SistaError where an id comes twice; `rows` are the row numbers, the header being row 1."""
    first: dict[str, int] = {}
    for name, row in zip(ids, rows, strict=True):
        if first.setdefault(name, row) != row:
            raise SistaError(f"{file}: row {row} repeats the image id {name!r} of row {first[name]}; remove one")


def inside(root: Path, name: str) -> Path | None:
    """Return the path of a file that a table names, or None where the name is none or leads out of the folder."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or "\0" in name or parts[0] == "/" or ".." in parts or ":" in parts[0]:
        return None
    return root.joinpath(*parts)


def index_images(folder: Path, suffixes: Sequence[str] = (".png", ".jpg", ".jpeg")) -> dict[str, Path]:
    """Return {file name: path} of the images below a folder; of two of a name the first in order."""
    found: dict[str, Path] = {}
    seen: set[str] = set()
    # large releases are often linked into place, a part at a time
    for base, folders, names in os.walk(folder, followlinks=True):
        if (place := os.path.realpath(base)) in seen:
            folders.clear()
            continue
        seen.add(place)
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith(tuple(suffixes)):
                found.setdefault(name, Path(base, name))
    return found


def read_csv(file: Path) -> pd.DataFrame:
    """Read a `.csv` or `.csv.gz` with every value as text, blank as ""."""
    try:
        with warnings.catch_warnings():
            # where row 2 is longer than the header, pandas would shift all columns by one
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(file, dtype=str, keep_default_na=False, index_col=False)
    except pd.errors.ParserWarning:
        raise SistaError(f"{file}: row 2 has more values than the header; download it again") from None
    except (ValueError, EOFError, OSError, zlib.error) as why:
        reason = " ".join(str(why).split())
        raise SistaError(f"{file}: not a readable CSV ({reason}); download it again") from None


from sista_pl.data.formats import (  # noqa: E402, F401  their import is their registration
    chestxray14,
    chexpert,
    covidx,
    mimic_cxr,
    ms_cxr,
    object_cxr,
    open_i,
    rsna,
    siim,
    table,
)
