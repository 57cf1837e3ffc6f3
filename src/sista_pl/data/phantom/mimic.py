"""Write a phantom exactly as MIMIC-CXR-JPG 2.1.0 and the reports of MIMIC-CXR lie on disk."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from sista_pl.allocator import keep_memory
from sista_pl.data.phantom.film import Rendering, render, render_lateral
from sista_pl.data.phantom.report import document, stated, write_report
from sista_pl.data.phantom.study import Patient, Study, draw_patient, draw_study
from sista_pl.errors import SistaError

PHANTOM_VERSION = "1.0"
NOTICE = "PHANTOM DATA: drawn by a program, no patient"
LABELS = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum", "Fracture", "Lung Lesion",
    "Lung Opacity", "No Finding", "Pleural Effusion", "Pleural Other", "Pneumonia", "Pneumothorax", "Support Devices",
)  # fmt: skip
_LABEL_OF = {
    "atelectasis": ("Atelectasis",),
    "cardiomegaly": ("Cardiomegaly",),
    "consolidation": ("Consolidation", "Lung Opacity"),
    "edema": ("Edema",),
    "fracture": ("Fracture",),
    "nodule": ("Lung Lesion",),
    "mass": ("Lung Lesion",),
    "opacity": ("Lung Opacity",),
    "pneumonia": ("Pneumonia", "Lung Opacity"),
    "effusion": ("Pleural Effusion",),
    "pleural_thickening": ("Pleural Other",),
    "pneumothorax": ("Pneumothorax",),
}
# Patient-disjoint and even from the first patients on: the golden ratio spreads patients over [0, 1).
_SPLITS = (("train", 0.76), ("validate", 0.91), ("test", 1.0))
_STUDIES_A_PATIENT = (0.45, 0.27, 0.17, 0.11)
_LATERAL = 0.25
_JPEG_QUALITY = 90
_METADATA = [
    "dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows", "Columns",
    "StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning", "ViewCodeSequence_CodeMeaning",
    "PatientOrientationCodeSequence_CodeMeaning",
]  # fmt: skip


def generator_hash() -> str:
    """SHA-256 over the version and the source files of this package: another generator, another hash."""
    digest = hashlib.sha256(PHANTOM_VERSION.encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Plan:
    """Which study is drawn: all else follows from the seed and these two numbers."""

    patient: int
    study: int

    @property
    def subject_id(self) -> int:
        return 10_000_000 + (self.patient * 6_180_339 + 32) % 10_000_000

    @property
    def study_id(self) -> int:
        return 50_000_000 + ((4 * self.patient + self.study) * 4_142_137 + 414_267) % 10_000_000

    @property
    def split(self) -> str:
        u = (self.patient + 0.5) * 0.6180339887498949 % 1
        return next(name for name, edge in _SPLITS if u < edge)

    @property
    def folder(self) -> str:
        subject = str(self.subject_id)
        return f"files/p{subject[:2]}/p{subject}"


def _plans(studies: int, seed: int) -> Iterator[_Plan]:
    patient = 0
    while studies > 0:
        u = np.random.default_rng([seed, patient, 9]).random()
        count = min(studies, 1 + int(np.searchsorted(np.cumsum(_STUDIES_A_PATIENT), u)))
        yield from (_Plan(patient, study) for study in range(count))
        studies, patient = studies - count, patient + 1


def phantom_study(seed: int, patient: int, study: int) -> Study:
    """The drawn attributes of one study, a pure function of its three numbers."""
    person: Patient = draw_patient(np.random.default_rng([seed, patient]))
    return draw_study(np.random.default_rng([seed, patient, study + 1, 0]), person)


def write_mimic_cxr(
    root: str | Path, studies: int, seed: int = 0, size: int = 320, workers: int = 0, progress: bool = True
) -> Path:
    """Draw a phantom in the layout of MIMIC-CXR-JPG 2.1.0, with its reports and the truth (`phantom/`).

    A study depends on (seed, patient, study) alone, so that the bytes do not depend on `workers`, and a larger
    phantom of the same seed begins with the smaller one.

    Args:
        root: folder to make. One that holds the same phantom already is returned as it is.
        studies: number of studies, one frontal film each and a lateral one to every fourth.
        seed: another seed, other patients.
        size: longer side of the films in pixels.
        workers: processes; 0 is one a core.
        progress: show a bar on standard error.

    Raises:
        SistaError: `root` holds something else, or the numbers make no sense.
    """
    root = Path(root)
    if studies < 1 or size < 32 or workers < 0:
        raise SistaError(f"phantom: studies={studies} size={size} workers={workers}; give 1, 32 and 0 or more")
    told: dict[str, str | int] = {"notice": NOTICE, "version": PHANTOM_VERSION, "generator": generator_hash()}
    told |= {"seed": seed, "studies": studies, "size": size}
    if _is_there(root, told):
        return root
    # A name of its own for each process: two that start together do not write into one folder.
    part = root.with_name(f".{root.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        plans = list(_plans(studies, seed))
        records = _draw_all(plans, part, seed, size, workers or os.cpu_count() or 1, progress)
        _write_tables(part, records)
        (part / "phantom").mkdir()
        truth = pd.DataFrame([record["truth"] for record in records])
        truth.to_parquet(part / "phantom/truth.parquet", index=False)
        (part / "phantom/phantom.json").write_text(json.dumps(told, indent=2) + "\n")
        _move(part, root, told)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return root


def _is_there(root: Path, told: dict) -> bool:
    """True where `root` is this phantom; an error where it is something else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    file = root / "phantom/phantom.json"
    if not file.is_file():
        raise SistaError(f"{root}: not empty and not a phantom; choose another folder")
    try:
        there = json.loads(file.read_text())
    except ValueError:
        there = {}
    if there == told:
        return True
    differs = ", ".join(f"{k} {there.get(k)}" for k, v in told.items() if there.get(k) != v and k != "notice")
    raise SistaError(f"{root}: holds another phantom ({differs}); remove it or choose another folder")


def _move(part: Path, root: Path, told: dict) -> None:
    if root.is_dir() and not any(root.iterdir()):
        root.rmdir()
    try:
        part.rename(root)
    except OSError:
        # Another process was faster; the same phantom is as good as ours.
        if not _is_there(root, told):
            raise


def _draw_all(plans: list[_Plan], root: Path, seed: int, size: int, workers: int, progress: bool) -> list[dict]:
    from rich.console import Console
    from rich.progress import track

    job = partial(_write_study, root=root, seed=seed, size=size)

    def tracked(records: Iterable[dict]) -> list[dict]:
        console = Console(stderr=True)
        return list(track(records, "drawing phantom", total=len(plans), console=console, disable=not progress))

    if workers == 1:
        keep_memory()
        return tracked(map(job, plans))
    # Not fork: a caller with threads (torch, a progress bar) may hold locks that a forked child never gets.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(plans)), mp_context=context, initializer=keep_memory) as pool:
        return tracked(pool.map(job, plans, chunksize=8))


def _write_study(plan: _Plan, root: Path, seed: int, size: int) -> dict:
    """Draw one study, write its files, return its rows."""
    study = phantom_study(seed, plan.patient, plan.study)
    key = [seed, plan.patient, plan.study + 1]
    words, pixels, extra = (np.random.default_rng([*key, n]) for n in (1, 2, 3))
    report = write_report(study, words)
    rendering = _crop(render(study, size, pixels), pixels)
    films = [(study.view, rendering.image)]
    if extra.random() < _LATERAL:
        films.append(("LATERAL" if extra.random() < 0.7 else "LL", render_lateral(study, size, extra)))

    folder = root / plan.folder / f"s{plan.study_id}"
    folder.mkdir(parents=True)
    text = root / "mimic-cxr-reports" / plan.folder / f"s{plan.study_id}.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text(document(study, report, words), encoding="ascii", newline="\n")
    images = []
    for number, (view, image) in enumerate(films):
        dicom = _dicom_id(seed, plan, number)
        Image.fromarray(image).save(folder / f"{dicom}.jpg", quality=_JPEG_QUALITY)
        images.append(_image_row(dicom, plan, study, view, image.shape, extra))
    truth = {
        "study_id": plan.study_id,
        "dicom_id": images[0]["dicom_id"],
        "subject_id": plan.subject_id,
        "split": plan.split,
        "attributes": json.dumps(sorted(study.attributes())),
        "drawn": json.dumps(asdict(study)),
        "stated": json.dumps(sorted(stated(study, report))),
        "boxes": json.dumps(rendering.boxes),
        "masks": json.dumps({name: encode_rle(mask) for name, mask in rendering.masks.items()}),
        "rows": rendering.image.shape[0],
        "columns": rendering.image.shape[1],
    }
    return {"plan": plan, "images": images, "labels": _labels(study), "truth": truth}


def _crop(rendering: Rendering, rng: np.random.Generator) -> Rendering:
    """Cut the square to the aspect of a real film: a little off the sides or off the abdomen."""
    size = rendering.image.shape[0]
    lost = int(size * rng.uniform(0, 0.14))
    if rng.random() < 0.5:
        rows, columns = slice(0, size - lost), slice(0, size)
    else:
        lost //= 2
        rows, columns = slice(0, size), slice(lost, size - lost)
    return rendering.crop(rows, columns)


def _dicom_id(seed: int, plan: _Plan, number: int) -> str:
    name = hashlib.sha256(f"{seed} {plan.patient} {plan.study} {number}".encode()).hexdigest()
    return "-".join(name[i : i + 8] for i in range(0, 40, 8))


def _image_row(dicom: str, plan: _Plan, study: Study, view: str, shape: tuple, rng: np.random.Generator) -> dict:
    portable = study.view == "AP"
    meaning = {"PA": "postero-anterior", "AP": "antero-posterior"}.get(view, "lateral")
    values = [
        dicom, plan.subject_id, plan.study_id, "CHEST (PORTABLE AP)" if portable else "CHEST (PA AND LAT)", view,
        shape[0], shape[1], f"21{rng.integers(10, 90)}{rng.integers(1, 13):02d}{rng.integers(1, 29):02d}",
        f"{rng.integers(0, 24):02d}{rng.integers(0, 60):02d}{rng.integers(0, 60):02d}.{rng.integers(0, 1000):03d}",
        "CHEST (PORTABLE AP)" if portable else "CHEST (PA AND LAT)", meaning, "Erect" if not portable else "",
    ]  # fmt: skip
    return dict(zip(_METADATA, values, strict=True))


def _labels(study: Study) -> dict[str, float | None]:
    """The 14 labels of CheXpert: 1 drawn, 0 not drawn, -1 uncertain, blank where no report would speak of it."""
    positive = {label for finding in study.findings for label in _LABEL_OF.get(finding.kind, ())}
    if study.tubes or study.patient.pacemaker != "none" or study.patient.port != "none":
        positive.add("Support Devices")
    if study.patient.aorta == "tortuous" and study.patient.heart == "severe":
        positive.add("Enlarged Cardiomediastinum")
    labels: dict[str, float | None] = {name: 1.0 if name in positive else 0.0 for name in LABELS}
    labels["No Finding"] = 1.0 if positive <= {"Support Devices"} and study.normal else None
    for name in ("Fracture", "Lung Lesion", "Pleural Other", "Support Devices", "Enlarged Cardiomediastinum"):
        labels[name] = labels[name] or None
    if "Pneumonia" not in positive and any(f.kind == "opacity" for f in study.findings):
        # An opacity is read as "may represent pneumonia".
        labels["Pneumonia"] = -1.0
    return labels


def encode_rle(mask: np.ndarray) -> str:
    """(H, W) bool → "start length start length …", column by column, pixels counted from 1 (Kaggle's form)."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    starts, ends = edges[::2], edges[1::2]
    return " ".join(f"{start + 1} {end - start}" for start, end in zip(starts, ends, strict=True))


def decode_rle(text: str, shape: tuple[int, int]) -> np.ndarray:
    """The inverse of `encode_rle`: (H, W) bool."""
    flat = np.zeros(shape[0] * shape[1], bool)
    numbers = [int(n) for n in text.split()]
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        flat[start - 1 : start - 1 + length] = True
    return flat.reshape(shape, order="F")


def _write_tables(root: Path, records: list[dict]) -> None:
    images = [row for record in records for row in record["images"]]
    split = {record["plan"].study_id: record["plan"].split for record in records}
    _gzip_csv(root / "mimic-cxr-2.0.0-metadata.csv.gz", pd.DataFrame(images, columns=_METADATA))
    rows = [
        {
            "dicom_id": r["dicom_id"],
            "study_id": r["study_id"],
            "subject_id": r["subject_id"],
            "split": split[r["study_id"]],
        }
        for r in images
    ]
    _gzip_csv(root / "mimic-cxr-2.0.0-split.csv.gz", pd.DataFrame(rows))
    labels = pd.DataFrame(
        [{"subject_id": r["plan"].subject_id, "study_id": r["plan"].study_id, **r["labels"]} for r in records]
    )
    _gzip_csv(root / "mimic-cxr-2.0.0-chexpert.csv.gz", labels)
    test = labels[labels["study_id"].map(split) == "test"].drop(columns="subject_id")
    test.to_csv(root / "mimic-cxr-2.1.0-test-set-labeled.csv", index=False, lineterminator="\n")
    folders = {record["plan"].study_id: record["plan"].folder for record in records}
    names = [f"{folders[r['study_id']]}/s{r['study_id']}/{r['dicom_id']}.jpg" for r in images]
    (root / "IMAGE_FILENAMES").write_text("\n".join(names) + "\n", newline="\n")


def _gzip_csv(path: Path, table: pd.DataFrame) -> None:
    # Without a file name and a time in the header, equal tables are equal bytes.
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=buffer, mode="wb", mtime=0) as file:
        file.write(table.to_csv(index=False, lineterminator="\n").encode())
    path.write_bytes(buffer.getvalue())
