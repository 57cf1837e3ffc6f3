"""MIMIC-CXR-JPG 2.0.0 and 2.1.0 with the reports of the MIMIC-CXR project."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pandas as pd

from sista_pl.data.formats import READERS, Release, Row, is_phantom, need_columns, read_csv, refuse_duplicates
from sista_pl.data.reports import MAX_REPORT_BYTES, BadReport, clean, decode, split_sections
from sista_pl.errors import SistaError, did_you_mean

# Release 2.1.0 keeps this prefix.
_TABLE = "mimic-cxr-2.0.0-{}"
_SPLITS = {"train": "train", "validate": "val", "test": "test"}
_JPG_FOLDERS = [
    f"{above}mimic-cxr-jpg{version}" for above in ("physionet.org/files/", "") for version in ("/2.1.0", "/2.0.0", "")
]
_REPORT_FOLDERS = ["", "mimic-cxr-reports", "mimic-cxr", "mimic-cxr/2.1.0", "mimic-cxr/2.0.0"]
_NUMBER = r"[0-9]{1,12}"
_LABELS = ("chexpert", "negbio", "none")
_RADIOLOGIST = "mimic-cxr-2.1.0-test-set-labeled.csv"
_TEST_LABELS = ("same", "radiologist")
# What zipfile raises of a damaged file: one bit asks for a password (RuntimeError), for an unknown method (the same), …
_BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, RuntimeError, OSError, EOFError, UnicodeDecodeError)


@READERS.register("mimic_cxr")
def read_mimic_cxr(
    root: Path,
    reports: str | Path | None = None,
    views: Sequence[str] | None = ("PA", "AP"),
    labels: str = "chexpert",
    test_labels: str = "same",
    hold_out: str | Path | None = None,
) -> Release:
    """Read MIMIC-CXR-JPG: one row an image whose study has a report, in the official split (validate = val).

    No image file is touched: one that is missing shows when the store is prepared.

    Args:
        root: the folder with `files/` and `mimic-cxr-2.0.0-metadata.csv[.gz]`, or one that holds it as
            `physionet.org/files/mimic-cxr-jpg/2.1.0`.
        reports: `mimic-cxr-reports.zip` (read as it is), a folder that holds `files/p10/…/s….txt`, or
            `mimic_cxr_sectioned.csv`; by default searched in and beside `root`.
        views: keep these values of ViewPosition; None keeps all.
        labels: "chexpert" or "negbio", whose -1 (uncertain) and blank (not mentioned) become NaN, or "none".
        test_labels: "same", or "radiologist": the test split has those of `mimic-cxr-2.1.0-test-set-labeled.csv`
            (release 2.1.0), and NaN where the radiologist read no report of the study.
        hold_out: a table whose patients take no part in training and validation, by its column `subject_id`, or by
            `path` (files/p10/p10000032/…): MS-CXR's, whose films come from all three splits.

    Raises:
        SistaError: a table, a column or the reports are missing, an image id comes twice.
    """
    root = Path(root)
    if not root.is_dir():
        raise SistaError(f"{root}: no such folder; give the folder of MIMIC-CXR-JPG as root")
    if labels not in _LABELS:
        raise SistaError(f"mimic_cxr: labels {labels!r}; {did_you_mean(labels, _LABELS)}")
    if test_labels not in _TEST_LABELS:
        raise SistaError(f"mimic_cxr: test_labels {test_labels!r}; {did_you_mean(test_labels, _TEST_LABELS)}")
    views = [views] if isinstance(views, str) else views
    jpg = next((d for d in [root, *(root / f for f in _JPG_FOLDERS)] if _find_table(d, "metadata")), root)

    metadata_file, images = _read_table(jpg, "metadata", ["dicom_id", "subject_id", "study_id", "ViewPosition"])
    refuse_duplicates(metadata_file, images["dicom_id"].tolist(), range(2, len(images) + 2))
    split_file, split = _read_table(jpg, "split", ["dicom_id", "split"])
    refuse_duplicates(split_file, split["dicom_id"].tolist(), range(2, len(split) + 2))
    for row, value in enumerate(split["split"], start=2):
        if value in _SPLITS:
            continue
        raise SistaError(f"{split_file}: row {row}: unknown split {value!r}; {did_you_mean(value, _SPLITS)}")

    images["row"] = range(2, len(images) + 2)
    images["split"] = images["dicom_id"].map(split.set_index("dicom_id")["split"].map(_SPLITS))
    if views is not None:
        kept = images["ViewPosition"].isin([str(v) for v in views])
        if len(images) and not kept.any():
            seen = ", ".join(sorted(set(images["ViewPosition"])))
            raise SistaError(f"{metadata_file}: no image of the views {', '.join(views)}; known: {seen}")
        images = images[kept]
    skipped = [(name, f"not in {split_file.name}") for name in images.loc[images["split"].isna(), "dicom_id"]]
    images = images.dropna(subset="split")
    # they become paths: what is no number is no id, and might lead elsewhere or nowhere
    numbers = images["subject_id"].str.fullmatch(_NUMBER) & images["study_id"].str.fullmatch(_NUMBER)
    wrong = images[~numbers.astype(bool)]
    skipped += [
        (name, f"{metadata_file.name}:{row}: no number of a subject and a study")
        for name, row in zip(wrong["dicom_id"], wrong["row"], strict=True)
    ]
    images = images[numbers.astype(bool)]
    if hold_out is not None:
        held = images["subject_id"].isin(_patients(Path(hold_out))) & (images["split"] != "test")
        skipped += [(name, f"its patient is in {Path(hold_out).name}") for name in images.loc[held, "dicom_id"]]
        images = images[~held]

    studies = dict(zip(images["study_id"], images["subject_id"], strict=True))
    texts = dict(_read_reports(_find_reports(root, jpg, reports, studies), studies))
    findings_of = _read_labels(jpg, labels)
    unknown = dict.fromkeys(next(iter(findings_of.values()), {}), float("nan"))
    read_by_people = _read_radiologist(jpg, list(unknown)) if test_labels == "radiologist" else None

    files, table, rows = jpg / "files", metadata_file.name, []
    columns = ["dicom_id", "subject_id", "study_id", "ViewPosition", "split", "row"]
    for dicom, subject, study, view, part, row in images[columns].itertuples(index=False, name=None):
        text = texts[study]
        if isinstance(text, str):
            skipped.append((dicom, f"report s{study}: {text}"))
            continue
        path = files / f"p{subject[:2]}/p{subject}/s{study}/{dicom}.jpg"
        by = findings_of if read_by_people is None or part != "test" else read_by_people
        known = by.get(study, unknown)
        rows.append(Row(dicom, subject, study, path, view, part, *text, known, source=f"{table}:{row}"))
    return Release(
        "mimic_cxr",
        f"MIMIC-CXR-JPG {_version(jpg)}",
        rows,
        skipped,
        phantom=is_phantom(root, jpg),
        root=jpg,
        options={
            "views": None if views is None else [str(v) for v in views],
            "labels": labels,
            "test_labels": test_labels,
            **({} if hold_out is None else {"hold_out": Path(hold_out).name}),
        },
    )


def _patients(file: Path) -> set[str]:
    """Return the patients that a table names."""
    if not file.is_file():
        raise SistaError(f"mimic_cxr: hold_out {file}: no such file; give MS_CXR_Local_Alignment_v1.1.0.csv")
    table = read_csv(file)
    if "subject_id" in table:
        named = table["subject_id"]
    else:
        need_columns(file, list(table.columns), ["path"])
        named = table["path"].str.extract(rf"p[0-9]{{2}}/p({_NUMBER})/", expand=False)
    if not len(found := set(named.dropna())):
        raise SistaError(f"{file}: its column path names no patient as files/p10/p10000032/; give subject_id")
    return found


def _version(jpg: Path) -> str:
    newer = any((jpg / name).is_file() for name in ("mimic-cxr-2.1.0-test-set-labeled.csv", "RECORDS"))
    return "2.1.0" if newer or "2.1.0" in jpg.resolve().parts else "2.0.0"


def _find_table(folder: Path, name: str) -> Path | None:
    stem = _TABLE.format(name)
    return next((f for f in (folder / f"{stem}.csv.gz", folder / f"{stem}.csv") if f.is_file()), None)


def _read_table(folder: Path, name: str, columns: Sequence[str] | None = None) -> tuple[Path, pd.DataFrame]:
    file = _find_table(folder, name)
    if file is None:
        missing = f"{_TABLE.format(name)}.csv[.gz]"
        raise SistaError(f"{folder}: {missing} not found; give the folder of MIMIC-CXR-JPG as root")
    table = read_csv(file)
    need_columns(file, list(table.columns), columns or ["study_id"])
    return file, table


def _read_labels(jpg: Path, source: str) -> dict[str, dict[str, float]]:
    """Return {study: {finding: 1, 0 or NaN}}."""
    if source == "none":
        return {}
    return _labels_of(*_read_table(jpg, source))


def _read_radiologist(jpg: Path, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the same of the radiologist's table, for the findings `names`; all of them where there are none."""
    file = jpg / _RADIOLOGIST
    if not file.is_file():
        raise SistaError(f"{jpg}: {_RADIOLOGIST} not found; it is part of release 2.1.0, or set test_labels to same")
    # copies in the wild write Lung_Lesion, and Airspace Opacity for Lung Opacity
    table = read_csv(file).rename(columns=lambda name: name if name.endswith("_id") else name.replace("_", " "))
    table = table.rename(columns={"Airspace Opacity": "Lung Opacity"})
    need_columns(file, list(table.columns), ["study_id", *names])
    if names:
        table = table[["study_id", *names]]
    return _labels_of(file, table)


def _labels_of(file: Path, table: pd.DataFrame) -> dict[str, dict[str, float]]:
    names = [c for c in table.columns if c not in ("subject_id", "study_id")]
    values = table[names].apply(pd.to_numeric, errors="coerce")
    wrong = values.isna() & (table[names] != "") | values.notna() & ~values.isin([1, 0, -1])
    for row in wrong.index[wrong.any(axis=1)]:
        name = next(n for n in names if wrong.at[row, n])
        raise SistaError(f"{file}: row {row + 2}: {name} is {table.at[row, name]!r}; 1, 0, -1 or blank is known")
    values = values.where(values != -1)
    return {
        study: dict(zip(names, row, strict=True))
        for study, row in zip(table["study_id"], values.to_numpy(float).tolist(), strict=True)
    }


def _text_file(subject: str, study: str) -> str:
    return f"files/p{subject[:2]}/p{subject}/s{study}.txt"


def _find_reports(root: Path, jpg: Path, given: str | Path | None, studies: dict[str, str]) -> Path:
    """Return the sectioned table, the zip, or the folder that holds `files/p10/…`."""
    if given is not None:
        above = [Path(given)]
        if above[0].is_file():
            return above[0]
    else:
        above = list(dict.fromkeys([jpg, jpg.parent, jpg.parent.parent, root]))
    folders = [a / f for a in above for f in _REPORT_FOLDERS]
    # A partial download is usual, so that any one of the first reports will do.
    probes = [_text_file(subject, study) for study, subject in list(studies.items())[:200]]

    def candidates() -> Iterator[Path]:
        yield from (f / "mimic_cxr_sectioned.csv" for f in folders)
        yield from (f / "mimic_cxr_sectioned.csv.gz" for f in folders)
        yield from (f / "mimic-cxr-reports.zip" for f in folders)

    if found := next((file for file in candidates() if file.is_file()), None):
        return found
    for folder in folders:
        if (folder / "files").is_dir() and any((folder / probe).is_file() for probe in probes):
            return folder
    raise SistaError(
        f"{given or jpg}: MIMIC-CXR reports not found; download mimic-cxr-reports.zip from the mimic-cxr project on "
        "PhysioNet, put it beside the images or give its path as the option reports"
    )


def _read_reports(source: Path, studies: dict[str, str]) -> Iterable[tuple[str, tuple[str, str] | str]]:
    """Yield (study, (findings, impression)), or (study, why it cannot be used)."""
    if source.is_dir():
        for study, subject in studies.items():
            file = source / _text_file(subject, study)
            try:
                if file.stat().st_size > MAX_REPORT_BYTES:
                    yield study, f"{file.stat().st_size} bytes, more than {MAX_REPORT_BYTES}"
                else:
                    yield study, _sections(file.read_bytes())
            except FileNotFoundError:
                yield study, "not found"
    elif source.suffix == ".zip":
        yield from _read_zip(source, studies)
    elif source.name.endswith((".csv", ".csv.gz")):
        yield from _read_sectioned(source, studies)
    else:
        raise SistaError(f"{source}: neither a .zip, a .csv nor a folder; give mimic-cxr-reports.zip as reports")


def _read_zip(source: Path, studies: dict[str, str]) -> Iterator[tuple[str, tuple[str, str] | str]]:
    try:
        archive = zipfile.ZipFile(source)
    except _BROKEN_ZIP as why:
        raise SistaError(f"{source}: not a whole zip file ({why}); download it again") from None
    with archive:
        members = {info.filename.rsplit("/", 1)[-1]: info for info in archive.infolist()}
        for study in studies:
            info = members.get(f"s{study}.txt")
            if info is None:
                yield study, "not found"
            elif info.file_size > MAX_REPORT_BYTES:
                yield study, f"{info.file_size} bytes, more than {MAX_REPORT_BYTES}"
            else:
                try:
                    raw = archive.read(info)
                except _BROKEN_ZIP as why:
                    raise SistaError(f"{source}: {info.filename} is broken ({why}); download it again") from None
                yield study, _sections(raw)


def _read_sectioned(source: Path, studies: dict[str, str]) -> Iterator[tuple[str, tuple[str, str] | str]]:
    table = read_csv(source)
    columns = ["study", "findings", "impression", "last_paragraph"]
    need_columns(source, list(table.columns), columns)
    by_study = {row[0].removeprefix("s"): row[1:] for row in table[columns].itertuples(index=False, name=None)}
    for study in studies:
        if study not in by_study:
            yield study, "not found"
            continue
        findings, impression, last = map(clean, by_study[study])
        yield (
            study,
            (findings or ("" if impression else last), impression) if findings or impression or last else ("empty"),
        )


def _sections(raw: bytes) -> tuple[str, str] | str:
    """Return findings and impression; the last paragraph stands for the findings of a report that has neither."""
    try:
        sections = split_sections(decode(raw))
    except BadReport as why:
        return str(why)
    if not sections:
        return "empty"
    return sections.get("findings", sections.get("last_paragraph", "")), sections.get("impression", "")
