"""The phantom exactly as MIMIC-CXR-JPG 2.1.0 and the reports of MIMIC-CXR lie on disk."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from sista_pl.data.phantom.cohort import LAYOUTS, Drawn, Layout, Plan
from sista_pl.data.phantom.film import render_lateral
from sista_pl.data.phantom.study import Study

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
_LATERAL = 0.25
_JPEG_QUALITY = 90
_METADATA = [
    "dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows", "Columns",
    "StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning", "ViewCodeSequence_CodeMeaning",
    "PatientOrientationCodeSequence_CodeMeaning",
]  # fmt: skip


@LAYOUTS.register("mimic_cxr")
def mimic_cxr() -> Layout:
    """MIMIC-CXR-JPG 2.1.0: a lateral film to every fourth study, labels of CheXpert and of a radiologist, reports."""
    return Layout(_write_study, _write_tables)


def _folder(plan: Plan) -> str:
    subject = str(plan.subject_id)
    return f"files/p{subject[:2]}/p{subject}"


def _write_study(drawn: Drawn, root: Path) -> dict:
    """Write the films and the report of one study, return its rows."""
    plan, study, extra = drawn.plan, drawn.study, drawn.extra
    films = [(study.view, drawn.rendering.image)]
    if extra.random() < _LATERAL:
        films.append(("LATERAL" if extra.random() < 0.7 else "LL", render_lateral(study, drawn.size, extra)))

    folder = root / _folder(plan) / f"s{plan.study_id}"
    folder.mkdir(parents=True)
    text = root / "mimic-cxr-reports" / _folder(plan) / f"s{plan.study_id}.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text(drawn.document(), encoding="utf-8", newline="\n")
    images = []
    for number, (view, image) in enumerate(films):
        dicom = _dicom_id(drawn, number)
        Image.fromarray(image).save(folder / f"{dicom}.jpg", quality=_JPEG_QUALITY)
        images.append(_image_row(dicom, plan, study, view, image.shape, extra))
    first = images[0]["dicom_id"]
    truth = drawn.truth(first, study_id=plan.study_id, dicom_id=first, subject_id=plan.subject_id)
    return {"plan": plan, "images": images, "labels": chexpert_labels(study), "truth": truth}


def _dicom_id(drawn: Drawn, number: int) -> str:
    name = drawn.name(number)
    return "-".join(name[i : i + 8] for i in range(0, 40, 8))


def _image_row(dicom: str, plan: Plan, study: Study, view: str, shape: tuple, rng: np.random.Generator) -> dict:
    portable = study.view == "AP"
    meaning = {"PA": "postero-anterior", "AP": "antero-posterior"}.get(view, "lateral")
    values = [
        dicom, plan.subject_id, plan.study_id, "CHEST (PORTABLE AP)" if portable else "CHEST (PA AND LAT)", view,
        shape[0], shape[1], f"21{rng.integers(10, 90)}{rng.integers(1, 13):02d}{rng.integers(1, 29):02d}",
        f"{rng.integers(0, 24):02d}{rng.integers(0, 60):02d}{rng.integers(0, 60):02d}.{rng.integers(0, 1000):03d}",
        "CHEST (PORTABLE AP)" if portable else "CHEST (PA AND LAT)", meaning, "Erect" if not portable else "",
    ]  # fmt: skip
    return dict(zip(_METADATA, values, strict=True))


def chexpert_labels(study: Study) -> dict[str, float | None]:
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
    folders = {record["plan"].study_id: _folder(record["plan"]) for record in records}
    names = [f"{folders[r['study_id']]}/s{r['study_id']}/{r['dicom_id']}.jpg" for r in images]
    (root / "IMAGE_FILENAMES").write_text("\n".join(names) + "\n", newline="\n")


def _gzip_csv(path: Path, table: pd.DataFrame) -> None:
    # Without a file name and a time in the header, equal tables are equal bytes.
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=buffer, mode="wb", mtime=0) as file:
        file.write(table.to_csv(index=False, lineterminator="\n").encode())
    path.write_bytes(buffer.getvalue())
