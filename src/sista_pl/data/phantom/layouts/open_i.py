"""The phantom as Open-i / IU X-ray lies on disk: the two tables of Kaggle's mirror, or the XML of the library."""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ET
from pathlib import Path

from PIL import Image

from sista_pl.data.phantom.cohort import LAYOUTS, Drawn, Layout
from sista_pl.data.phantom.film import render_lateral
from sista_pl.data.phantom.study import OBJECTS, Finding, Study
from sista_pl.errors import SistaError

# Most studies of the collection have a lateral film.
_LATERAL = 0.8
_TEXTS = ("indication", "comparison", "findings", "impression")
_HEADINGS = {
    "opacity": "Opacity/lung",
    "pneumonia": "Pneumonia",
    "consolidation": "Consolidation/lung",
    "nodule": "Nodule/lung",
    "mass": "Mass/lung",
    "effusion": "Pleural Effusion",
    "pneumothorax": "Pneumothorax",
    "atelectasis": "Pulmonary Atelectasis/base",
    "edema": "Pulmonary Edema",
    "emphysema": "Pulmonary Emphysema",
    "hernia": "Hernia, Hiatal",
    "cardiomegaly": "Cardiomegaly",
    "pleural_thickening": "Thickening/pleura",
    "fracture": "Fractures, Bone/ribs",
    "endotracheal_tube": "Tube, Inserted/trachea",
    "nasogastric_tube": "Tube, Inserted/abdomen",
    "chest_tube": "Tube, Inserted/thorax",
    "central_line": "Catheters, Indwelling",
    "picc": "Catheters, Indwelling",
    **dict.fromkeys(OBJECTS, "Foreign Bodies/thorax"),
}
_GRADES = {"linear": "streaky", "segmental": "focal", "faint": "mild", "extensive": "diffuse"}
_ZONES = {"upper": "upper lobe", "lower": "base"}
# Attribute → value → its tag; one whose values are sides (and zones) has a tag to which they are added.
_VALUES: dict[str, dict[str, str] | str] = {
    "inspiration": {"low": "Lung/hypoinflation", "hyper": "Lung/hyperdistention"},
    "aorta": {"tortuous": "Aorta/tortuous", "calcified": "Calcinosis/aorta"},
    "spine": {
        "degenerative": "Thoracic Vertebrae/degenerative",
        "scoliosis/left": "Scoliosis/thoracic vertebrae/left",
        "scoliosis/right": "Scoliosis/thoracic vertebrae/right",
    },
    "diaphragm": {"elevated/left": "Diaphragm/left/elevated", "elevated/right": "Diaphragm/right/elevated"},
    "clips": {
        "right upper quadrant": "Surgical Instruments/abdomen/right",
        "left axilla": "Surgical Instruments/left",
        "right axilla": "Surgical Instruments/right",
    },
    "sternotomy": {"present": "Surgical Instruments/mediastinum"},
    "granuloma": "Calcified Granuloma/lung",
    "rib_deformity": "Deformity/ribs",
    "shoulder": "Implanted Medical Device/humerus",
    "hilar_nodes": "Calcinosis/lung/hilum/lymph nodes",
    "scarring": "Cicatrix/lung/apex",
    "pacemaker": "Implanted Medical Device",
    "port": "Catheters, Indwelling",
}


@LAYOUTS.register("open_i")
def open_i(form: str = "tables") -> Layout:
    """Open-i: a lateral film to four studies of five.

    Args:
        form: "tables" (`indiana_reports.csv`, `indiana_projections.csv`, `images/images_normalized/`), or "xml"
            (`ecgen-radiology/1.xml`, `CXR1_….png`), which does not tell frontal from lateral.
    """
    if form not in ("tables", "xml"):
        raise SistaError(f"phantom layout open_i: form {form!r}; give tables or xml")
    if form == "xml":
        return Layout(_write_xml_study, _write_xml, single=True)
    return Layout(_write_study, _write_tables, single=True)


def tags_of(study: Study) -> list[str]:
    """The MeSH tags that an indexer would give a study, "normal" where there are none."""
    tags = [_tag(finding) for finding in (*study.findings, *study.tubes, *study.objects)]
    inflated = any(finding.kind == "emphysema" for finding in study.findings)
    for name, known in _VALUES.items():
        value = study.value(name)
        if value in ("none", "normal") or (name == "inspiration" and inflated):
            continue
        tags.append(known[value] if isinstance(known, dict) else "/".join([known, *_place(*value.split("/"))]))
    return list(dict.fromkeys(tags)) or ["normal"]


def _place(side: str | None, zone: str | None = None) -> list[str]:
    middle = {"left": "lingula", "right": "middle lobe", "bilateral": "hilum"}
    words = [_ZONES.get(zone) or middle[str(side)]] if zone else []
    return words + [side] if side else words


def _tag(finding: Finding) -> str:
    grade = finding.severity and _GRADES.get(finding.severity, finding.severity)
    return "/".join([_HEADINGS[finding.kind], *_place(finding.side, finding.zone), *([grade] if grade else [])])


def _write_xml_study(drawn: Drawn, root: Path) -> dict:
    return _write_study(drawn, root, xml=True)


def _write_study(drawn: Drawn, root: Path, xml: bool = False) -> dict:
    uid = str(drawn.plan.patient + 1)
    films = [("Frontal", drawn.rendering.image)]
    if drawn.extra.random() < _LATERAL:
        films.append(("Lateral", render_lateral(drawn.study, drawn.size, drawn.extra)))
    names = [f"{uid}_IM-{int(uid):04d}-{1001 + 1000 * number}" for number in range(len(films))]
    folder = root if xml else root / "images/images_normalized"
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, image) in zip(names, films, strict=True):
        Image.fromarray(image).save(folder / (f"CXR{name}.png" if xml else f"{name}.dcm.png"))
    real = drawn.real
    texts = {
        "indication": real.indication if real else "XXXX-year-old with XXXX.",
        "comparison": real.comparison if real else "None.",
        "findings": drawn.report.findings,
        "impression": drawn.report.impression,
    }
    tags = list(real.tags) if real else tags_of(drawn.study)
    views = [view for view, _ in films]
    return {"uid": uid, "texts": texts, "tags": tags, "images": names, "views": views,
            "truth": drawn.truth(names[0], uid=uid)}  # fmt: skip


def _write_tables(root: Path, records: list[dict]) -> None:
    def write(name: str, header: str, rows: list[list[str]]) -> None:
        with (root / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header.split(","), *rows])

    reports, projections = [], []
    for record in records:
        problems = dict.fromkeys(tag.split("/")[0] for tag in record["tags"])
        texts = [record["texts"][name] for name in _TEXTS]
        reports.append(
            [record["uid"], ";".join(record["tags"]), ";".join(problems), "Xray Chest PA and Lateral", *texts]
        )
        for name, view in zip(record["images"], record["views"], strict=True):
            projections.append([record["uid"], f"{name}.dcm.png", view])
    write("indiana_reports.csv", "uid,MeSH,Problems,image,indication,comparison,findings,impression", reports)
    write("indiana_projections.csv", "uid,filename,projection", projections)


def _write_xml(root: Path, records: list[dict]) -> None:
    folder = root / "ecgen-radiology"
    folder.mkdir()
    for record in records:
        uid = record["uid"]
        tree = ET.Element("eCitation")
        ET.SubElement(tree, "uId", id=f"CXR{uid}")
        abstract = ET.SubElement(ET.SubElement(ET.SubElement(tree, "MedlineCitation"), "Article"), "Abstract")
        for name in _TEXTS:
            ET.SubElement(abstract, "AbstractText", Label=name.upper()).text = record["texts"][name]
        mesh = ET.SubElement(tree, "MeSH")
        for tag in record["tags"]:
            ET.SubElement(mesh, "major").text = tag
        for number, name in enumerate(record["images"], start=1):
            image = ET.SubElement(tree, "parentImage", id=f"CXR{name}")
            ET.SubElement(image, "figureId").text = f"F{number}"
        ET.indent(tree)
        ET.ElementTree(tree).write(folder / f"{uid}.xml", encoding="utf-8", xml_declaration=True)
