"""The phantom as RSNA Pneumonia stage 2 lies on disk: square DICOM films, a row a box, repeated class rows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from sista_pl.data.phantom.cohort import LAYOUTS, Drawn, Layout
from sista_pl.data.phantom.dicom import write_dicom

POSITIVE = ("opacity", "pneumonia", "consolidation")


@LAYOUTS.register("rsna")
def rsna() -> Layout:
    """RSNA stage 2: a positive film shows an opacity, a pneumonia or a consolidation, with a box for each.

    Its lesions have twice the usual contrast: the release has boxes around what radiologists saw and agreed on.
    """
    return Layout(_write_study, _write_tables, aspect=False, contrast=2.0)


def _write_study(drawn: Drawn, root: Path) -> dict:
    # one film a patient: every study is another patient's
    name = f"{drawn.name()[:8]}-{drawn.name()[8:12]}-{drawn.name()[12:16]}-{drawn.name()[16:20]}-{drawn.name()[20:32]}"
    folder = root / "stage_2_train_images"
    folder.mkdir(exist_ok=True)
    write_dicom(folder / f"{name}.dcm", drawn.rendering.image, drawn.study.view, "MONOCHROME2")
    boxes = [box[1:] for box in drawn.rendering.boxes if box[0] in POSITIVE]
    kind = "Lung Opacity" if boxes else "Normal" if drawn.study.normal else "No Lung Opacity / Not Normal"
    return {"name": name, "boxes": boxes, "class": kind, "truth": drawn.truth(name)}


def _write_tables(root: Path, records: list[dict]) -> None:
    columns = ["patientId", "x", "y", "width", "height", "Target"]
    labels: list[dict] = [
        {
            "patientId": record["name"],
            **dict(zip(("x", "y", "width", "height"), map(float, box), strict=True)),
            "Target": 1,
        }
        for record in records
        for box in record["boxes"]
    ] + [{"patientId": record["name"], "Target": 0} for record in records if not record["boxes"]]
    pd.DataFrame(labels, columns=columns).sort_values("patientId", kind="stable").to_csv(
        root / "stage_2_train_labels.csv", index=False, lineterminator="\n"
    )
    # as released: the class of a film comes once for each of its boxes
    classes = [
        {"patientId": record["name"], "class": record["class"]}
        for record in records
        for _ in range(max(1, len(record["boxes"])))
    ]
    pd.DataFrame(classes).to_csv(root / "stage_2_detailed_class_info.csv", index=False, lineterminator="\n")
