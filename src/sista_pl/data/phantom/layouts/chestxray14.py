"""The phantom as ChestX-ray14 lies on disk: two image folders, brackets in the header, a few RGBA films."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from sista_pl.data.phantom.cohort import LAYOUTS, Drawn, Layout

LABEL_OF = {
    "atelectasis": "Atelectasis", "cardiomegaly": "Cardiomegaly", "consolidation": "Consolidation", "edema": "Edema",
    "effusion": "Effusion", "emphysema": "Emphysema", "hernia": "Hernia", "opacity": "Infiltration", "mass": "Mass",
    "nodule": "Nodule", "pleural_thickening": "Pleural_Thickening", "pneumonia": "Pneumonia",
    "pneumothorax": "Pneumothorax",
}  # fmt: skip
_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)


@LAYOUTS.register("chestxray14")
def chestxray14() -> Layout:
    """ChestX-ray14 v2020: every other test film that shows something has boxes."""
    return Layout(_write_study, _write_tables, aspect=False)


def _write_study(drawn: Drawn, root: Path) -> dict:
    plan, study, image = drawn.plan, drawn.study, drawn.rendering.image
    name = f"{plan.patient + 1:08d}_{plan.study:03d}.png"
    folder = root / f"images_{1 + plan.patient % 2:03d}" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    film = Image.fromarray(image)
    if drawn.extra.random() < 0.1:
        film = Image.fromarray(np.dstack([image, image, image, np.full_like(image, 255)]))
    film.save(folder / name)
    labels = sorted({LABEL_OF[finding.kind] for finding in study.findings if finding.kind in LABEL_OF})
    boxes = [(LABEL_OF[kind], *place) for kind, *place in drawn.rendering.boxes if kind in LABEL_OF]
    boxed = plan.split == "test" and plan.patient % 2 == 0 and bool(boxes)
    line = (
        f"{name},{'|'.join(labels) or 'No Finding'},{plan.study},{plan.patient + 1},{20 + plan.patient % 70},"
        f"{study.patient.sex},{study.view},{image.shape[1]},{image.shape[0]},0.14,0.14"
    )
    return {"name": name, "line": line, "split": plan.split, "boxes": boxes if boxed else [],
            "truth": drawn.truth(name, labels="|".join(labels), boxed=boxed)}  # fmt: skip


def _write_tables(root: Path, records: list[dict]) -> None:
    def write(name: str, lines: list[str]) -> None:
        (root / name).write_text("".join(f"{line}\n" for line in lines), newline="\n")

    write("Data_Entry_2017_v2020.csv", [_HEADER, *(record["line"] for record in records)])
    write("train_val_list.txt", [record["name"] for record in records if record["split"] != "test"])
    write("test_list.txt", [record["name"] for record in records if record["split"] == "test"])
    boxes = [
        f"{record['name']},{'Infiltrate' if label == 'Infiltration' else label},{x}.0,{y}.0,{w}.0,{h}.0,,,"
        for record in records
        for label, x, y, w, h in record["boxes"]
    ]
    write("BBox_List_2017.csv", ["Image Index,Finding Label,Bbox [x,y,w,h],,,", *boxes])
