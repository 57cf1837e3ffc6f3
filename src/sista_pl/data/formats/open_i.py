"""Open-i / IU X-ray: the XML reports of the National Library of Medicine, and the two tables of Kaggle's mirror."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from sista_pl.data.formats import READERS, Release, Row, index_images, is_phantom, need_columns, read_csv
from sista_pl.data.reports import BadReport, clean, decode
from sista_pl.data.splits import NAMED_SPLITS, grouped_split, split_hash, split_table
from sista_pl.errors import SistaError, did_you_mean

REPORTS, PROJECTIONS = "indiana_reports.csv", "indiana_projections.csv"
# label → the main headings, one of which is among the tags of a report
LABELS = {
    "Atelectasis": ("Pulmonary Atelectasis",),
    "Calcified Granuloma": ("Calcified Granuloma",),
    "Cardiomegaly": ("Cardiomegaly",),
    "Consolidation": ("Consolidation",),
    "Edema": ("Pulmonary Edema",),
    "Effusion": ("Pleural Effusion",),
    "Emphysema": ("Emphysema", "Pulmonary Emphysema"),
    "Fibrosis": ("Pulmonary Fibrosis",),
    "Fracture": ("Fractures, Bone",),
    "Granuloma": ("Granuloma",),
    "Hernia": ("Hernia, Hiatal",),
    "Infiltration": ("Infiltrate",),
    "Mass": ("Mass",),
    "Nodule": ("Nodule",),
    "Opacity": ("Opacity",),
    "Pneumonia": ("Pneumonia",),
    "Pneumothorax": ("Pneumothorax",),
    "No Finding": ("normal",),
}
NO_TAGS = "no indexing"
# Words that de-identification took out; MIMIC-CXR writes `___`.
TAKEN_OUT = re.compile(r"X{4,}")
_COLUMNS = {"uid": ("uid", "report_id"), "tags": ("MeSH", "mesh")}
_SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm")
_TEXTS = ("indication", "comparison", "findings", "impression")


@dataclass(frozen=True)
class TaggedReport:
    """A report as the collection has it, of whatever layout.

    Args:
        uid: "CXR12".
        tags: of its indexer, "Opacity/lung/base/left" or "normal"; empty where nobody indexed it.
        source: the file, or "file:row".
        indication, comparison, findings, impression: their text, with `XXXX` for what was taken out.
        images: their names, "12_IM-0002-1001"; only the XML has them, a table of their own the other layout.
    """

    uid: str
    tags: tuple[str, ...]
    source: str
    indication: str = ""
    comparison: str = ""
    findings: str = ""
    impression: str = ""
    images: tuple[str, ...] = ()


@NAMED_SPLITS.register("open_i/grouped")
def open_i_grouped(table: pd.DataFrame, seed: int = 0) -> list[str]:
    """80 / 10 / 10 % by report, the finest unit that is known: the collection names no patients."""
    return grouped_split(table["patient_id"].tolist(), seed)


@READERS.register("open_i")
def read_open_i(root: Path, views: Sequence[str] | None = ("frontal", ""), split: str = "open_i/grouped") -> Release:
    """Read Open-i: one row an image whose report has a text; a patient is a report, with all of its films.

    `XXXX`, where de-identification took a word out, is dropped as `___` is from MIMIC-CXR. A label (`LABELS`) is 1
    where the report's MeSH tags have that heading, 0 where they have not, NaN where nobody indexed the report; a
    finding that the indexer passed over is therefore 0.

    Args:
        root: the folder with `indiana_reports.csv` and `indiana_projections.csv` (Kaggle), or else with
            `ecgen-radiology/*.xml`; tables, XML and images may lie anywhere below it.
        views: keep images of these projections, "frontal" or "lateral", "" where it is unknown; None keeps all. The XML
            does not tell the projection: the view of every image is then "", and by default the lateral films are
            among the rows; with `indiana_projections.csv` beside the XML it is known.
        split: "open_i/grouped".

    Raises:
        SistaError: no reports, a missing column, a report that comes twice, no image of the views.
    """
    root = Path(root)
    views = [views] if isinstance(views, str) else views
    if not root.is_dir():
        raise SistaError(f"{root}: no such folder; give the folder of Open-i as root")
    if split not in (own := [name for name in NAMED_SPLITS if name.startswith("open_i/")]):
        raise SistaError(f"open_i: split {split!r}; {did_you_mean(split, own)}")
    reports, skipped, files = read_reports(root)
    tables, projections = files[0].suffix == ".csv", find(root, PROJECTIONS)
    if tables and not projections:
        raise SistaError(f"{root}: {PROJECTIONS} not found; download it, it says which images a report has")
    images, view_of = _projections(projections, skipped) if projections else ({}, {})
    if tables:
        for uid in sorted(images.keys() - {report.uid for report in reports}):
            skipped += [(image, f"{PROJECTIONS}: no report {uid!r}") for image in images[uid]]
    films = [(report, image) for report in reports for image in report.images or images.get(report.uid, ())]
    if views is not None:
        wanted = {str(view).lower() for view in views}
        kept = [(report, image) for report, image in films if view_of.get(image, "").lower() in wanted]
        if films and not kept:
            known = ", ".join(sorted({repr(view_of.get(image, "")) for _, image in films}))
            raise SistaError(f"{root}: no image of the views {', '.join(map(repr, views))}; known: {known}")
        films = kept

    where = {image_key(name): path for name, path in reversed(index_images(root, _SUFFIXES).items())}
    rows: dict[str, Row] = {}
    for report, image in films:
        texts = (clean_text(report.findings), clean_text(report.impression))
        if not any(texts):
            skipped.append((image, f"{report.source}: no findings and no impression"))
        elif image not in where:
            skipped.append((image, f"{report.source}: no image of that name below the root"))
        elif image in rows:
            skipped.append((image, f"{report.source}: repeats an image of {rows[image].source}"))
        else:
            rows[image] = Row(image, report.uid, report.uid, where[image], view_of.get(image, ""), "", *texts,
                              labels_of(report.tags), source=report.source)  # fmt: skip
    ids = pd.DataFrame({"image_id": list(rows), "patient_id": [row.patient_id for row in rows.values()]})
    parts = split_table(split, ids)
    for row, part in zip(rows.values(), parts, strict=True):
        row.split = part
    version = f"Open-i / IU X-ray, {'tables' if tables else 'XML'}"
    if not view_of:
        version += " (projections unknown: lateral films are among the rows)"
    options = {
        "views": None if views is None else [str(view) for view in views],
        "split": split,
        "split_sha256": split_hash(list(rows), parts),
    }
    return Release("open_i", version, list(rows.values()), skipped, is_phantom(root), root, options, split)


def clean_text(text: str) -> str:
    """`reports.clean`, and without `XXXX`."""
    return clean(TAKEN_OUT.sub(" ", text))


_PREFIX = re.compile(r"^CXR(?:(\d+)_(?=\1_))?(?=\d)", re.IGNORECASE)
_ENDINGS = re.compile(r"(?:\.(?:png|jpg|jpeg|dcm))+$", re.IGNORECASE)


def image_key(name: str) -> str:
    """Return what names an image in every layout: "CXR12_IM-0002-1001.png" and "12_IM-0002-1001.dcm.png" are one.

    The XML puts CXR before the uid, or the uid with CXR once more: "CXR1_1_IM-0001-3001".
    """
    return _ENDINGS.sub("", _PREFIX.sub("", name.strip()))


def labels_of(tags: Sequence[str]) -> dict[str, float]:
    """1, 0 or NaN (no tags) for each of `LABELS`."""
    heads = {tag.partition("/")[0].lower() for tag in tags}
    return {
        label: float(any(name.lower() in heads for name in names)) if heads else float("nan")
        for label, names in LABELS.items()
    }


def find(root: Path, name: str) -> Path | None:
    """Return the file of that name in `root`, or else the first below it."""
    return root / name if (root / name).is_file() else next((f for f in sorted(root.rglob(name)) if f.is_file()), None)


def read_reports(source: Path) -> tuple[list[TaggedReport], list[tuple[str, str]], list[Path]]:
    """Read the reports of a table, or of a folder of either layout.

    Args:
        source: a CSV with the columns `uid` (or `report_id`), `MeSH` (or `mesh`), `findings` and `impression`, or a
            folder that holds `indiana_reports.csv` or XML reports.

    Returns:
        reports, what was left out and why, and the files that were read.

    Raises:
        SistaError: no reports, a missing column, a uid that comes twice.
    """
    file = source if source.is_file() else find(source, REPORTS)
    if file is not None:
        return *_read_table(file), [file]
    files = sorted(source.rglob("*.xml"))
    if not files:
        raise SistaError(f"{source}: neither {REPORTS} nor ecgen-radiology/*.xml found; give the folder of Open-i")
    reports: dict[str, TaggedReport] = {}
    skipped = []
    for file in files:
        try:
            report = _read_xml(file)
        except (BadReport, ET.ParseError, OSError) as why:
            skipped.append((file.name, f"{file.name}: not a readable report ({why})"))
            continue
        if report.uid in reports:
            skipped.append((file.name, f"{file.name}: repeats the report {report.uid} of {reports[report.uid].source}"))
        else:
            reports[report.uid] = report
    return list(reports.values()), skipped, files


def _read_table(file: Path) -> tuple[list[TaggedReport], list[tuple[str, str]]]:
    table = read_csv(file)
    names = {key: next((c for c in known if c in table), known[0]) for key, known in _COLUMNS.items()}
    need_columns(file, list(table.columns), [*names.values(), "findings", "impression"])
    texts = [table[name] if name in table else [""] * len(table) for name in _TEXTS]
    first: dict[str, int] = {}
    reports: list[TaggedReport] = []
    skipped: list[tuple[str, str]] = []
    for row, (name, tags, *parts) in enumerate(zip(table[names["uid"]], table[names["tags"]], *texts, strict=True), 2):
        if not (uid := _uid(name)):
            skipped.append((f"{file.name}:{row}", f"{file.name}:{row}: no uid"))
            continue
        if first.setdefault(uid, row) != row:
            raise SistaError(f"{file}: row {row} repeats the report {uid!r} of row {first[uid]}; remove one")
        sections = dict(zip(_TEXTS, parts, strict=True))
        reports.append(TaggedReport(uid, tags=_tags(re.split(r"[|;]", tags)), source=f"{file.name}:{row}", **sections))
    return reports, skipped


def _uid(text: str) -> str:
    return f"CXR{text.strip()}" if text.strip().isdecimal() else text.strip()


def _tags(tags: Sequence[str]) -> tuple[str, ...]:
    kept = tuple(tag.strip() for tag in tags if tag.strip())
    return () if [tag.lower() for tag in kept] == [NO_TAGS] else kept


def _read_xml(file: Path) -> TaggedReport:
    text = decode(file.read_bytes())
    # Entities are declared in a DOCTYPE alone, and no report has one: nothing can be expanded or fetched.
    if "<!DOCTYPE" in text:
        raise BadReport("it has a DOCTYPE")
    tree = ET.fromstring(text)
    parts = dict.fromkeys(_TEXTS, "")
    for node in tree.iter("AbstractText"):
        if (name := (node.get("Label") or "").strip().lower()) in parts:
            parts[name] = f"{parts[name]} {''.join(node.itertext())}".strip()
    tags = _tags(["".join(node.itertext()) for mesh in tree.iter("MeSH") for node in mesh.iter("major")])
    images = tuple(dict.fromkeys(image_key(node.get("id") or "") for node in tree.iter("parentImage")))
    uid = next((name for node in tree.iter("uId") if (name := _uid(node.get("id") or ""))), _uid(file.stem))
    return TaggedReport(uid, tags=tags, images=tuple(filter(None, images)), source=file.name, **parts)


def _projections(file: Path, skipped: list[tuple[str, str]]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return {uid: images} and {image: projection}."""
    table = read_csv(file)
    need_columns(file, list(table.columns), ["uid", "filename", "projection"])
    images: dict[str, list[str]] = {}
    views: dict[str, str] = {}
    columns = zip(table["uid"], table["filename"], table["projection"], strict=True)
    for row, (uid, name, view) in enumerate(columns, start=2):
        image = image_key(name)
        if not image:
            skipped.append((f"{file.name}:{row}", f"{file.name}:{row}: no filename"))
            continue
        views[image] = view.strip()
        if image not in images.setdefault(_uid(uid), []):
            images[_uid(uid)].append(image)
    return images, views
