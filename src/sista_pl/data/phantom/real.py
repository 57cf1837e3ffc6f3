"""Real reports as a phantom takes them: where they are read, and the study that is drawn for one."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sista_pl.data.formats.open_i import TAKEN_OUT, TaggedReport, clean_text
from sista_pl.data.formats.open_i import read_reports as read_open_i_reports
from sista_pl.data.phantom.mesh import Tagged, findings_from_mesh
from sista_pl.data.phantom.study import (
    INCIDENTAL,
    OBJECTS,
    PATIENT,
    STUDY,
    ZONES,
    Finding,
    Study,
    choose,
    draw_patient,
    draw_study,
)
from sista_pl.errors import SistaError

# The kinds that have a zone, a side, a grade; those that persist from study to study.
_ZONED = ("opacity", "pneumonia", "consolidation", "nodule", "mass", "foreign_body")
_PAIRED = ("effusion", "pneumothorax", "atelectasis", "pleural_thickening", "fracture", "central_line")
_SIDED = (*_ZONED, *_PAIRED)
_GRADES = {
    "effusion": ("small", "moderate", "large"),
    "pneumothorax": ("small", "moderate", "large"),
    "edema": ("mild", "moderate", "severe"),
    "atelectasis": ("linear", "segmental"),
    "opacity": ("faint", "patchy"),
    "consolidation": ("focal", "extensive"),
    "emphysema": ("mild", "severe"),
}
_CHRONIC = ("cardiomegaly", "emphysema", "hernia", "pleural_thickening")


def study_from_mesh(tagged: Tagged, seed: int, patient: int) -> Study:
    """Draw the study of a tagged report: what its tags leave open, and how the film was taken, follow from the seed.

    An incidental attribute that no tag names is normal.
    """
    rng = np.random.default_rng([seed, patient, 1, 4])
    person = draw_patient(np.random.default_rng([seed, patient]))
    study = draw_study(np.random.default_rng([seed, patient, 1, 0]), person)
    chosen = {name: allowed[int(rng.integers(len(allowed)))] for name, allowed in sorted(tagged.values.items())}
    heart = chosen.pop("heart", "normal")
    findings = tuple(_complete(finding, rng) for finding in tagged.findings)
    if heart != "normal":
        findings = (Finding("cardiomegaly", severity=heart), *findings)
    inflated = "hyper" if any(finding.kind == "emphysema" for finding in findings) else "normal"
    film = {"inspiration": inflated} | {name: value for name, value in chosen.items() if name in STUDY}
    lasting: dict[str, Any] = {name: next(iter(PATIENT[name])) for name in INCIDENTAL if name in PATIENT}
    lasting |= {name: value for name, value in chosen.items() if name in PATIENT}
    chronic = tuple(finding for finding in findings if finding.kind in _CHRONIC)
    person = replace(person, sick=bool(findings), heart=heart, chronic=chronic, **lasting)
    tubes = tuple(_complete(tube, rng) for tube in tagged.tubes)
    objects = tuple(
        replace(_complete(thing, rng), kind=OBJECTS[int(rng.integers(len(OBJECTS)))]) for thing in tagged.objects
    )
    return replace(study, patient=person, findings=findings, tubes=tubes, objects=objects, **film)


def _complete(finding: Finding, rng: np.random.Generator) -> Finding:
    """Draw the side, zone and grade that the tags leave open."""
    kind, side, zone, grade = finding.kind, finding.side, finding.zone, finding.severity
    if side is None and kind in _SIDED:
        side = choose(rng, {"left": 0.5, "right": 0.5})
    if zone is None and kind in _ZONED:
        zone = choose(rng, dict.fromkeys(ZONES, 1.0))
    if grade is None and kind in _GRADES:
        grade = choose(rng, dict.fromkeys(_GRADES[kind], 1.0))
    return Finding(kind, side, zone, grade)


def real_document(report: TaggedReport) -> str:
    """The text file of a real report as MIMIC-CXR has it: its headers, and `___` where Open-i has `XXXX`.

    Each section is one line behind its header: wrapped, a word with a colon might stand where a header is looked for.
    """
    parts = {"INDICATION": report.indication, "COMPARISON": report.comparison}
    parts |= {"FINDINGS": report.findings, "IMPRESSION": report.impression}
    lines = [f"{name}:  {' '.join(TAKEN_OUT.sub('___', text).split())}" for name, text in parts.items() if text.strip()]
    return " " * 33 + "FINAL REPORT\n " + "\n\n ".join(lines) + "\n"


@dataclass(frozen=True)
class RealReports:
    """Reports with text and tags, in the order of their file.

    Args:
        reports: those that a phantom may take.
        left_out: why others were not taken → how many.
        sha256: of the file, or of the XML files in the order of their names.
    """

    reports: tuple[TaggedReport, ...]
    left_out: dict[str, int]
    sha256: str

    def coverage(self, studies: int | None = None) -> tuple[int, Counter[str]]:
        """Return how many tags of the first `studies` reports are drawn, and the headings of the others."""
        read = [findings_from_mesh(report.tags) for report in self.reports[:studies]]
        missing = Counter(tag.partition("/")[0] for tagged in read for tag in tagged.missing)
        return sum(len(tagged.drawn) for tagged in read), missing


def read_real_reports(source: str | Path) -> RealReports:
    """Read the reports for a phantom: a CSV with text and MeSH tags, or a folder of Open-i.

    Raises:
        SistaError: it cannot be read, or no report has both text and tags.
    """
    source = Path(source)
    if not source.exists():
        raise SistaError(f"reports: {source} does not exist; give a CSV of findings, impression and MeSH, or a folder")
    found, skipped, files = read_open_i_reports(source)
    kept: list[TaggedReport] = []
    left_out = Counter({"unreadable": len(skipped)} if skipped else {})
    for report in found:
        if not any(map(clean_text, (report.findings, report.impression))):
            left_out["no text"] += 1
        elif not report.tags:
            left_out["no tags"] += 1
        else:
            kept.append(report)
    if not kept:
        raise SistaError(f"reports: {source} has no report with text and MeSH tags; give another file")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return RealReports(tuple(kept), dict(left_out), digest.hexdigest())
