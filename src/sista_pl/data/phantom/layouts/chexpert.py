"""The phantom as CheXpert-v1.0-small lies on disk: blank, -1.0 and lateral rows included."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from PIL import Image

from sista_pl.data.phantom.cohort import LAYOUTS, Drawn, Layout
from sista_pl.data.phantom.film import render_lateral
from sista_pl.data.phantom.layouts.mimic_cxr import chexpert_labels

NAME = "CheXpert-v1.0-small"
_ORDER = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
)  # fmt: skip
_LATERAL = 0.15


@LAYOUTS.register("chexpert")
def chexpert() -> Layout:
    """CheXpert-v1.0-small: the test patients are the official validation set, labelled by people, without blanks."""
    return Layout(_write_study, _write_tables)


def _write_study(drawn: Drawn, root: Path) -> dict:
    part = "valid" if drawn.plan.split == "test" else "train"
    folder = f"{part}/patient{drawn.plan.patient + 1:05d}/study{drawn.plan.study + 1}"
    films = [("frontal", drawn.rendering.image)]
    if drawn.extra.random() < _LATERAL:
        films.append(("lateral", render_lateral(drawn.study, drawn.size, drawn.extra)))
    (root / folder).mkdir(parents=True)
    sex = "Female" if drawn.study.patient.sex == "F" else "Male"
    labels, rows = chexpert_labels(drawn.study), []
    if part == "valid":
        labels = {name: float(value == 1) for name, value in labels.items()}
    for number, (side, film) in enumerate(films, start=1):
        name = f"{folder}/view{number}_{side}.jpg"
        Image.fromarray(film).save(root / name, quality=90)
        view = drawn.study.view if side == "frontal" else ""
        rows.append([f"{NAME}/{name}", sex, 20 + drawn.plan.patient % 70, side.capitalize(), view,
                     *(labels[label] for label in _ORDER)])  # fmt: skip
    return {"part": part, "rows": rows, "truth": drawn.truth(f"{folder}/view1_frontal.jpg")}


def _write_tables(root: Path, records: list[dict]) -> None:
    columns = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *_ORDER]
    for part in ("train", "valid"):
        rows = [row for record in records if record["part"] == part for row in record["rows"]]
        table = pd.DataFrame(rows, columns=columns)
        table.to_csv(root / f"{part}.csv", index=False, lineterminator="\n")
