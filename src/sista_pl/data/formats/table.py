"""Any table of image paths and texts: CSV, TSV or Parquet, one row an image."""

from __future__ import annotations

import csv
import gzip
import io
import math
import os
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sista_pl.data.formats import READERS, Release, Row, is_phantom, need_columns, refuse_duplicates
from sista_pl.data.reports import MAX_REPORT_BYTES, BadReport, clean, decode_text, split_sections
from sista_pl.data.splits import grouped_split
from sista_pl.errors import SistaError, did_you_mean

_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
# What a column may be called where `columns` does not say it; compared in lower case.
_GUESSES = {
    "image": ("image", "image_path", "path", "filename", "file_name", "file", "img_path"),
    "id": ("image_id", "dicom_id", "id"),
    "report": ("report", "report_text", "text", "caption"),
    "findings": ("findings",),
    "impression": ("impression",),
    "patient": ("patient_id", "patient", "patientid", "subject_id"),
    "group": ("group_id", "group"),
    "study": ("study_id", "study"),
    "split": ("split",),
    "view": ("view", "view_position", "viewposition"),
    "mask": ("mask", "mask_path"),
}
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "val"),
    "test": "test",
}
_LABELS = {
    **dict.fromkeys(("1", "1.0", "true", "yes"), 1.0),
    **dict.fromkeys(("0", "0.0", "false", "no"), 0.0),
    **dict.fromkeys(("", "nan", "-1", "-1.0"), math.nan),
}


@READERS.register("table")
def read_table(
    root: Path,
    table: str | None = None,
    columns: Mapping[str, Any] | None = None,
    images: str | None = None,
    where: Mapping[str, Any] | None = None,
    require_report: bool = True,
    boxes: str | None = None,
    seed: int = 0,
) -> Release:
    """Read a table with one row an image.

    Args:
        root: the table's file, or its folder.
        table: file name of the table in `root`; needed where the folder holds several.
        columns: which column holds what, {image: path, report: text, …}. Known: image, id (default: the image's
            path), report, or findings and impression, patient, group (patients that belong together), study, split,
            view, mask, labels (a list; default: the columns `label_…`). A usual name need not be given; null leaves
            out the column that has it. Rows that share a patient or a group are one unit of the split, and so are those
            that others join; a row with neither is left out. Only a table with a split and without such columns has
            each image as a unit of its own.
        images: folder that relative image and mask paths start from (default: the table's); none may leave it.
        where: keep rows that have this value, or one of these, in these columns.
        require_report: drop (and count) rows without a text.
        boxes: a second table beside the first, one row a box: image_id, category, x, y, w, h in pixels of the image; an
            image without a row there has boxes that nobody looked for.
        seed: of the 80/10/10 split by group, or else patient, that a table without a split column gets.

    Raises:
        SistaError: no table, an unknown column, a repeated id, a value that is no split or no label; neither
            split nor patient is known.
    """
    file = _find(Path(root), table)
    frame = _load(file)
    roles = _roles(file, list(frame.columns), dict(columns or {}))
    if require_report and not {"report", "findings", "impression"} & roles.keys():
        raise SistaError(f"{file}: no column of texts; name it under columns.report or set require_report to false")
    if not {"split", "patient", "group"} & roles.keys():
        raise SistaError(
            f"{file}: no column of patients, so that a split might cut one; name columns.patient, columns.group or "
            "columns.split (columns.patient may be the image column if each image is another patient's)"
        )
    grouped = bool({"patient", "group"} & roles.keys())
    if not grouped:
        warnings.warn(
            f"{file}: no column of patients; each image counts as another patient's in intervals and folds",
            stacklevel=2,
        )

    def column(role: str) -> list[str]:
        return frame[roles[role]].str.strip().tolist() if role in roles else [""] * len(frame)

    def image_ids() -> list[str]:
        return [name or path for name, path in zip(column("id"), column("image"), strict=True)]

    # before `where`, which could take the row that joins two patients, or the image of a box
    units = pd.Series(_units(column("patient"), column("group")) if grouped else image_ids(), frame.index, dtype=object)
    boxes_of, skipped = _boxes(_find(file.parent, boxes), file.name, set(image_ids())) if boxes else ({}, [])
    frame = _filter(file, frame, where or {})
    numbers, ids, patients = [i + 2 for i in frame.index], image_ids(), units[frame.index].tolist()
    refuse_duplicates(file, ids, numbers)
    studies = [study or name for study, name in zip(column("study"), ids, strict=True)]
    splits = _splits(file, column("split"), numbers) if "split" in roles else grouped_split(patients, seed)
    labels = _labels(file, frame, roles.get("labels", []), numbers)
    folder = file.parent if images is None else file.parent / images

    rows = []
    fields = zip(
        ids, patients, studies, column("image"), column("view"), splits, column("report"), column("findings"),
        column("impression"), labels, column("mask"), numbers, strict=True,
    )  # fmt: skip
    for name, patient, study, path, view, split, report, findings, impression, values, mask, number in fields:
        source = f"{file.name}:{number}"
        try:
            image_path, mask_path = _inside(folder, path), _inside(folder, mask) if mask else None
            if not patient:
                raise _Unusable("neither a patient nor a group")
            text = _text(report, findings, impression)
            if require_report and not any(text):
                raise BadReport("empty report")
        except (BadReport, _Unusable) as why:
            skipped.append((name or source, f"{source}: {why}"))
            continue
        rows.append(
            Row(name, patient, study, image_path, view, split, *text, values, mask_path, boxes_of.get(name), source)
        )
    options = {"where": {str(k): _listed(v) for k, v in (where or {}).items()}, "require_report": require_report}
    if "split" not in roles:
        options["split_seed"] = seed
    if boxes:
        options["boxes"] = boxes
    return Release(
        "table",
        file.name,
        rows,
        skipped,
        phantom=is_phantom(file.parent, folder),
        root=Path(os.path.abspath(folder)),
        options={**options, "columns": roles},
        split="official" if "split" in roles else "table/grouped",
    )


class _Unusable(Exception):
    """Of a row; the message is the reason."""


def _find(root: Path, table: str | None) -> Path:
    if root.is_file():
        return root
    if not root.is_dir():
        raise SistaError(f"{root}: no such file or folder; give the table or its folder as root")
    if table is not None:
        if not (root / table).is_file():
            present = [f.name for f in root.iterdir() if f.name.endswith(_SUFFIXES)]
            raise SistaError(f"{root / table}: no such table; {did_you_mean(table, present)}")
        return root / table
    found = sorted(f for f in root.iterdir() if f.name.endswith(_SUFFIXES))
    if len(found) != 1:
        names = ", ".join(f.name for f in found)
        raise SistaError(f"{root}: {f'several tables ({names})' if found else 'no table'}; name one with table=FILE")
    return found[0]


def _load(file: Path) -> pd.DataFrame:
    """Return the table with all values as text, blank as ""."""
    try:
        if file.name.endswith(".parquet"):
            frame = pd.read_parquet(file)
            if clash := [c for c in frame.columns if not isinstance(c, str)]:
                raise ValueError(f"column {clash[0]!r} has no name")
            return pd.DataFrame({c: [_plain(v) for v in frame[c].tolist()] for c in frame.columns}, dtype=str)
        if not file.name.endswith(_SUFFIXES):
            raise ValueError(f"known: {', '.join(_SUFFIXES)}")
        raw = file.read_bytes()
        text = decode_text(gzip.decompress(raw) if file.name.endswith(".gz") else raw)
        header = text.split("\n", 1)[0]
        # Excel writes ; where the comma is the decimal mark
        comma = ";" if header.count(";") > header.count(",") else ","
        separator = "\t" if ".tsv" in file.suffixes else comma
        with warnings.catch_warnings():
            # pandas would cut a first row that is longer than the header: a text with an unquoted comma, usually
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(io.StringIO(text), sep=separator, dtype=str, keep_default_na=False, index_col=False)
    except pd.errors.ParserWarning:
        raise SistaError(
            f"{file}: row 2 has more values than the header; quote texts that hold the separator"
        ) from None
    except (ValueError, OSError, EOFError, csv.Error, zlib.error) as why:
        raise SistaError(f"{file}: not a readable table ({' '.join(str(why).split())}); save it again") from None


def _plain(value: Any) -> str:
    """A Parquet value as a CSV would show it."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _roles(file: Path, present: list[str], given: dict[str, Any]) -> dict[str, Any]:
    """Return {role: column}, the given ones checked, the others guessed."""
    for role in given:
        if role not in _GUESSES and role != "labels":
            raise SistaError(f"{file}: columns.{role} is no role; {did_you_mean(role, [*_GUESSES, 'labels'])}")
    roles: dict[str, Any] = {}
    lower = {name.lower(): name for name in present}
    for role, names in _GUESSES.items():
        if role in given and given[role] is None:
            continue
        if role in given:
            need_columns(file, present, [str(given[role])])
            roles[role] = str(given[role])
        elif role == "report" and {"findings", "impression"} & given.keys():
            continue
        elif found := next((lower[name] for name in names if name in lower), None):
            roles[role] = found
    if "image" not in roles:
        raise SistaError(f"{file}: no column of image paths; name one of {', '.join(present)} under columns.image")
    labels = given.get("labels", [name for name in present if name.startswith("label_")])
    roles["labels"] = [str(name) for name in _listed(labels or [])]
    need_columns(file, present, roles["labels"])
    return roles


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _filter(file: Path, frame: pd.DataFrame, where: Mapping[str, Any]) -> pd.DataFrame:
    for name, wanted in where.items():
        need_columns(file, list(frame.columns), [str(name)])
        values = frame[str(name)].map(_comparable)
        kept = values.isin([_comparable(v) for v in _listed(wanted)])
        if len(frame) and not kept.any():
            seen = ", ".join(repr(v) for v in frame[str(name)].unique()[:8])
            raise SistaError(f"{file}: no row where {name} is {wanted!r}; it has {seen}")
        frame = frame[kept]
    return frame


def _comparable(value: Any) -> str:
    """1, 1.0, "1" and "1.0" are one value, and so are true and True."""
    text = "" if value is None else str(value).strip()
    try:
        return repr(float(text))
    except ValueError:
        return text.casefold()


def _units(patients: Sequence[str], groups: Sequence[str]) -> list[str]:
    """Return the unit of each row that no split may cut, "" for a row of no patient and no group.

    Rows that share one are in one unit, also by way of other rows. It has the name of its first group in order, or of
    its patient.
    """
    above: dict[tuple[str, str], tuple[str, str]] = {}

    def top(node: tuple[str, str]) -> tuple[str, str]:
        while (up := above.setdefault(node, node)) != node:
            above[node] = node = above[up]
        return node

    named = [
        [node for node in (("group", group), ("patient", patient)) if node[1]]
        for patient, group in zip(patients, groups, strict=True)
    ]
    for nodes in named:
        first, *others = sorted({top(node) for node in nodes}) or [("", "")]
        above |= dict.fromkeys(others, first)
    return [top(nodes[0])[1] if nodes else "" for nodes in named]


def _splits(file: Path, values: Sequence[str], numbers: Sequence[int]) -> list[str]:
    for value, number in zip(values, numbers, strict=True):
        if value.lower() not in _SPLITS:
            raise SistaError(f"{file}: row {number}: unknown split {value!r}; {did_you_mean(value.lower(), _SPLITS)}")
    return [_SPLITS[value.lower()] for value in values]


def _labels(file: Path, frame: pd.DataFrame, names: Sequence[str], numbers: Sequence[int]) -> list[dict[str, float]]:
    columns = []
    for name in names:
        values = frame[name].str.strip().str.lower().map(_LABELS.get)
        texts = frame[name].tolist()
        for text, number in zip(texts, numbers, strict=True):
            if text.strip().lower() not in _LABELS:
                raise SistaError(f"{file}: row {number}: {name} is {text!r}; 1, 0, -1 or blank is known")
        columns.append(values.tolist())
    keys = [name.removeprefix("label_") for name in names]
    return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)] or [{} for _ in numbers]


def _boxes(file: Path, table: str, known: set[str]) -> tuple[dict[str, list[dict[str, Any]]], list[tuple[str, str]]]:
    """Return the boxes of each of the `known` images of the table, and what was left out.

    Boxes that leave their image are cut in preparation.
    """
    frame = _load(file)
    need_columns(file, list(frame.columns), ["image_id", "category", "x", "y", "w", "h"])
    found: dict[str, list[dict[str, Any]]] = {}
    skipped = []
    places = frame[["x", "y", "w", "h"]].apply(pd.to_numeric, errors="coerce").to_numpy(float)
    names = zip(frame["image_id"].str.strip(), frame["category"].str.strip(), places.tolist(), strict=True)
    for number, (name, category, place) in enumerate(names, start=2):
        if name not in known:
            skipped.append((name, f"{file.name}:{number}: {name!r} is not in {table}"))
            continue
        if not all(map(math.isfinite, place)) or place[2] <= 0 or place[3] <= 0:
            skipped.append((name, f"{file.name}:{number}: box {place} is no rectangle"))
            continue
        found.setdefault(name, []).append({"category": category, **dict(zip("xywh", place, strict=True))})
    if len(frame) and not frame["image_id"].str.strip().isin(known).any():
        raise SistaError(
            f"{file}: row 2: {frame['image_id'][0]!r} is no image of {table}, nor is any other; write the ids of the "
            "images there, which are their paths where it has no column of ids"
        )
    return found, skipped


def _inside(folder: Path, path: str) -> Path:
    if not path:
        raise _Unusable("no image path")
    whole = os.path.abspath(folder / path)
    base = os.path.abspath(folder)
    if os.path.commonpath([base, whole]) != base or whole == base:
        raise _Unusable(f"{path} points outside {folder.name or 'the folder'}; set images to the folder of all images")
    return Path(whole)


def _text(report: str, findings: str, impression: str) -> tuple[str, str]:
    """Return findings and impression; a report without such headers is taken whole, as findings."""
    if len(report) + len(findings) + len(impression) > MAX_REPORT_BYTES:
        raise BadReport(f"report of more than {MAX_REPORT_BYTES} characters")
    if not findings and not impression and report:
        sections = split_sections(report)
        if "last_paragraph" in sections or not sections:
            return clean(report), ""
        return sections.get("findings", ""), sections.get("impression", "")
    return clean(findings), clean(impression)
