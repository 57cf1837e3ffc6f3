"""COVIDx: the lists of COVID-Net (V7 to V9, CXR-3) and of Kaggle's mirror, CXR-4 with its `val.txt` among them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd

from sista_pl.data.formats import READERS, Release, Row, is_phantom
from sista_pl.data.reports import BadReport, decode_text
from sista_pl.data.splits import NAMED_SPLITS, grouped_split, split_hash, split_table
from sista_pl.errors import SistaError, did_you_mean

CLASSES = ("normal", "pneumonia", "COVID-19")
_PLAIN = "train.txt"
_LIST = re.compile(r"(train|val|test)(?:_COVIDx(\d+[AB]?|_CXR-\d+[AB]?))?\.txt")
# class in the list → the class that is meant; of lists of three classes, and of two
_THREE = {**dict(zip(CLASSES, CLASSES, strict=True)), "positive": "COVID-19"}
_TWO = {"negative": "negative", "positive": "COVID-19"}


@NAMED_SPLITS.register("covidx/official")
def covidx_official(table: pd.DataFrame, seed: int = 0) -> list[str]:
    """The lists of the release as they are (`list`: "train", "val" or "test"); without a val list, 10 % of train.

    These are whole patients. The release itself may have a patient in several lists; nobody is moved.
    """
    places = table["list"].tolist()
    if "val" in places:
        return places
    dealt = grouped_split(table["patient_id"].tolist(), seed, (0.9, 0.1, 0.0))
    return [place if place != "train" or part == "train" else "val" for place, part in zip(places, dealt, strict=True)]


@READERS.register("covidx")
def read_covidx(root: Path, split: str = "covidx/official", version: str | None = None) -> Release:
    """Read COVIDx: labels `normal`, `pneumonia` and `COVID-19`, one of them 1; with two classes `COVID-19` alone.

    A line is `patient file class source`. Numbers of patients are only unique within a source, so that a patient is
    `source:patient`. Some lists of three classes hold rows of the class `positive`: they are COVID-19. No image file is
    touched.

    Args:
        root: the folder with `train_COVIDx9A.txt` and `test_COVIDx9A.txt`, say, or `train.txt` and `test.txt`, and the
            images in `train/`, `test/` and, of CXR-4, `val/`.
        split: "covidx/official".
        version: "V9A", "V8B", "CXR-3A", … or "train.txt"; needed where the lists of several versions lie there.

    Raises:
        SistaError: no list, several versions, an unknown class or an image of two classes, an unknown option.
    """
    if split not in (own := [name for name in NAMED_SPLITS if name.startswith("covidx/")]):
        raise SistaError(f"covidx: split {split!r}; {did_you_mean(split, own)}")
    root = Path(root)
    version, files = _choose(root, version)
    lines = {place: _lines(file) for place, file in files.items()}
    known = _classes(version, lines)
    skipped: list[tuple[str, str]] = []
    rows: dict[str, Row] = {}
    first: dict[str, tuple[int, str]] = {}
    for place, file in files.items():
        folder = root / place
        for number, line in lines[place]:
            source = f"{file.name}:{number}"
            if (fields := _fields(line)) is None:
                skipped.append((source, f"{source}: {line[:100]!r} is no line of patient, file, class and source"))
                continue
            patient, name, kind, origin = fields
            if kind not in known:
                raise SistaError(f"{file}: row {number}: class {kind!r}; known: {', '.join(known)}")
            image = f"{place}/{name}"
            if image in first:
                before, other = first[image]
                if other != known[kind]:
                    raise SistaError(
                        f"{file}: row {number}: {name} is {known[kind]}, in row {before} it is {other}; remove one"
                    )
                skipped.append((image, f"{source}: repeats the image {name!r}"))
                continue
            first[image] = number, known[kind]
            names = CLASSES if known is _THREE else CLASSES[2:]
            labels = {label: float(label == known[kind]) for label in names}
            rows[image] = Row(image, f"{origin}:{patient}", image, folder / name, "", place, "", "", labels,
                              source=source)  # fmt: skip
    ids = pd.DataFrame({
        "image_id": list(rows), "patient_id": [row.patient_id for row in rows.values()],
        "list": [row.split for row in rows.values()],
    })  # fmt: skip
    parts = split_table(split, ids)
    for row, part in zip(rows.values(), parts, strict=True):
        row.split = part
    options: dict[str, Any] = {"split": split, "version": version, "split_sha256": split_hash(list(rows), parts)}
    told = f"COVIDx {version}" if version != _PLAIN else f"COVIDx ({', '.join(file.name for file in files.values())})"
    if version == _PLAIN and "val" in files:
        told = told.replace("COVIDx", "COVIDx CXR-4")
    return Release("covidx", told, list(rows.values()), skipped, is_phantom(root), root, options, split)


def _choose(root: Path, version: str | None) -> tuple[str, dict[str, Path]]:
    """Return the version and its lists, {"train": file, "val": …, "test": …}."""
    if not root.is_dir():
        raise SistaError(f"{root}: no such folder; give the folder of COVIDx as root")
    found: dict[str, dict[str, Path]] = {}
    for file in sorted(root.glob("*.txt")):
        if match := _LIST.fullmatch(file.name):
            suffix = match[2]
            name = _PLAIN if suffix is None else suffix.lstrip("_") if suffix.startswith("_") else f"V{suffix}"
            found.setdefault(name, {})[match[1]] = file
    if not found:
        raise SistaError(f"{root}: neither train.txt nor train_COVIDx9A.txt found; give the folder of COVIDx as root")
    if version is not None:
        if version not in found:
            raise SistaError(f"{root}: no lists of version {version!r}; {did_you_mean(str(version), found)}")
        found = {version: found[version]}
    whole = {name: files for name, files in found.items() if {"train", "test"} <= files.keys()}
    if len(whole) > 1:
        raise SistaError(f"{root}: lists of {', '.join(whole)}; choose one with the option version")
    if not whole:
        name, files = next(iter(found.items()))
        lone = next(iter(files.values())).name
        raise SistaError(f"{root}: {lone} without its train and test lists; download both of {name}")
    name, files = next(iter(whole.items()))
    return name, {place: files[place] for place in ("train", "val", "test") if place in files}


def _lines(file: Path) -> list[tuple[int, str]]:
    try:
        text = decode_text(file.read_bytes())
    except (BadReport, OSError) as why:
        raise SistaError(f"{file}: not a readable list ({why}); download it again") from None
    return [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _fields(line: str) -> tuple[str, str, str, str] | None:
    """Return patient, file, class and source, or None; only the name of the file may hold blanks."""
    patient, _, rest = line.strip().partition(" ")
    fields = rest.rsplit(maxsplit=2)
    if len(fields) != 3:
        return None
    name = fields[0].strip()
    if len(name.encode()) > 255 or name in (".", "..") or Path(name).name != name:
        return None
    return patient, name, fields[1], fields[2]


def _classes(version: str, lines: dict[str, list[tuple[int, str]]]) -> dict[str, str]:
    """Return the classes that the lists may hold: by the letter of the version, else by what they do hold."""
    if version.endswith(("A", "B")):
        return _THREE if version.endswith("A") else _TWO
    kinds = {fields[2] for part in lines.values() for _, line in part if (fields := _fields(line))}
    return _THREE if kinds & set(CLASSES) else _TWO
