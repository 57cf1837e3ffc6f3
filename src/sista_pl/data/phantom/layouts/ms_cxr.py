"""The phantom as MS-CXR lies on disk: films of MIMIC-CXR-JPG, a table of phrases and boxes."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from PIL import Image

from sista_pl.data.phantom.cohort import LAYOUTS, Drawn, Layout
from sista_pl.data.phantom.study import Finding

CATEGORY_OF = {
    "atelectasis": "Atelectasis", "cardiomegaly": "Cardiomegaly", "consolidation": "Consolidation", "edema": "Edema",
    "effusion": "Pleural Effusion", "opacity": "Lung Opacity", "pneumonia": "Pneumonia", "pneumothorax": "Pneumothorax",
}  # fmt: skip
_NOUN = {"cardiomegaly": "enlarged heart", "edema": "pulmonary edema", "effusion": "pleural effusion"}
_COLUMNS = [
    "dicom_id", "category_name", "label_text", "path", "x", "y", "w", "h", "image_width", "image_height", "split",
]  # fmt: skip


@LAYOUTS.register("ms_cxr")
def ms_cxr() -> Layout:
    """MS-CXR 1.1.0: the films that show one of its eight findings, a phrase and a box to each side of it."""
    return Layout(_write_study, _write_tables)


def phrase(finding: Finding) -> str:
    """Say what and where it is, as "small left pleural effusion"."""
    parts = [finding.severity, finding.side, _NOUN.get(finding.kind, finding.kind)]
    place = f"in the {finding.zone} zone" if finding.zone else None
    return " ".join(part for part in [*parts, place] if part)


def _write_study(drawn: Drawn, root: Path) -> dict:
    plan, image, name = drawn.plan, drawn.rendering.image, drawn.name()
    dicom = "-".join(name[i : i + 8] for i in range(0, 40, 8))
    subject = str(plan.subject_id)
    path = f"files/p{subject[:2]}/p{subject}/s{plan.study_id}/{dicom}.jpg"
    said = {f.kind: phrase(f) for f in drawn.study.findings if f.kind in CATEGORY_OF}
    height, width = image.shape
    lines = [
        [dicom, CATEGORY_OF[kind], said[kind], path, *place, width, height, plan.split]
        for kind, *place in drawn.rendering.boxes
        if kind in CATEGORY_OF
    ]
    if lines:
        (root / path).parent.mkdir(parents=True)
        Image.fromarray(image).save(root / path, quality=90)
    return {"lines": lines, "truth": drawn.truth(dicom, subject_id=plan.subject_id, phrases=len(lines))}


def _write_tables(root: Path, records: list[dict]) -> None:
    table = pd.DataFrame([line for record in records for line in record["lines"]], columns=_COLUMNS)
    table.to_csv(root / "MS_CXR_Local_Alignment_v1.1.0.csv", index=False, lineterminator="\n")
