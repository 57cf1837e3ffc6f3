"""What is drawn: patients, their studies and the discrete attributes that an image shows and a report may state.

Sides are the patient's: "left" lies on the right of the image. Zones are upper, middle and lower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

_SIDES = ("left", "right")
ZONES = ("upper", "middle", "lower")
# What a patient forgets to take off.
OBJECTS = ("coin", "button", "plate", "pendant")

# Attribute of a patient → value → probability; the first value is the normal one.
PATIENT: dict[str, dict[str, float]] = {
    "sex": {"F": 0.5, "M": 0.5},
    "habitus": {"average": 0.6, "thin": 0.2, "large": 0.2},
    "aorta": {"normal": 0.62, "tortuous": 0.2, "calcified": 0.18},
    "spine": {"normal": 0.60, "degenerative": 0.22, "scoliosis/left": 0.09, "scoliosis/right": 0.09},
    "diaphragm": {"normal": 0.82, "elevated/right": 0.11, "elevated/left": 0.07},
    "granuloma": {"none": 0.76} | {f"{side}/{zone}": 0.04 for side in _SIDES for zone in ZONES},
    "rib_deformity": {"none": 0.86, "left": 0.07, "right": 0.07},
    "clips": {"none": 0.82, "right upper quadrant": 0.08, "left axilla": 0.05, "right axilla": 0.05},
    "sternotomy": {"none": 0.88, "present": 0.12},
    "shoulder": {"none": 0.9, "left": 0.05, "right": 0.05},
    "hilar_nodes": {"none": 0.9, "left": 0.05, "right": 0.05},
    "scarring": {"none": 0.86, "left": 0.05, "right": 0.05, "bilateral": 0.04},
    "pacemaker": {"none": 0.91, "left": 0.07, "right": 0.02},
    "port": {"none": 0.94, "right": 0.04, "left": 0.02},
}
STUDY: dict[str, dict[str, float]] = {
    "view": {"PA": 0.55, "AP": 0.45},
    "rotation": {"none": 0.74, "left": 0.13, "right": 0.13},
    "inspiration": {"normal": 0.58, "low": 0.25, "hyper": 0.17},
    "exposure": {"normal": 0.78, "under": 0.12, "over": 0.1},
}
NORMAL = frozenset({"none", "normal", "average"})
# Attributes that every report may mention; sex and habitus are nuisances (a report does not repeat them).
INCIDENTAL = tuple(name for name in {**STUDY, **PATIENT} if name not in ("sex", "habitus"))

# Sick patients have a chronic and mostly an acute finding; healthy ones seldom. The shares give 1 normal study in 3.
_SICK = 0.62
_HEART = {
    True: {"normal": 0.42, "mild": 0.22, "moderate": 0.2, "severe": 0.16},
    False: {"normal": 0.95, "mild": 0.05},
}
# The young and healthy have none of the incidental attributes: the source of near-identical normal reports.
_UNREMARKABLE = {True: 0.10, False: 0.45}
_CHRONIC = {"emphysema": 0.12, "hernia": 0.07, "pleural_thickening": 0.08}
_ACUTE_COUNT = {True: (0.18, 0.40, 0.28, 0.14), False: (0.90, 0.08, 0.02, 0.0)}
_ACUTE = {
    "effusion": 0.24,
    "atelectasis": 0.15,
    "opacity": 0.11,
    "pneumonia": 0.11,
    "consolidation": 0.08,
    "edema": 0.11,
    "nodule": 0.07,
    "mass": 0.04,
    "pneumothorax": 0.07,
    "fracture": 0.02,
}
# How severe, per kind; kinds that are not listed have no grade.
_SEVERITY = {
    "effusion": {"small": 0.5, "moderate": 0.3, "large": 0.2},
    "pneumothorax": {"small": 0.55, "moderate": 0.3, "large": 0.15},
    "edema": {"mild": 0.45, "moderate": 0.35, "severe": 0.2},
    "atelectasis": {"linear": 0.65, "segmental": 0.35},
    "opacity": {"faint": 0.6, "patchy": 0.4},
    "consolidation": {"focal": 0.6, "extensive": 0.4},
    "emphysema": {"mild": 0.5, "severe": 0.5},
}
_BILATERAL = {"effusion": 0.3, "atelectasis": 0.3, "opacity": 0.15, "pleural_thickening": 0.2}
_ZONED = {"opacity", "pneumonia", "consolidation", "nodule", "mass"}
_TUBES = {"endotracheal_tube": 0.3, "nasogastric_tube": 0.35, "central_line": 0.35, "picc": 0.2}


@dataclass(frozen=True)
class Finding:
    """A pathological finding, as it is drawn.

    Args:
        kind: "effusion", "nodule", …
        side: "left", "right", "bilateral", or None where it has none.
        zone: "upper", "middle", "lower", or None.
        severity: a grade that depends on the kind, or None.
    """

    kind: str
    side: str | None = None
    zone: str | None = None
    severity: str | None = None


@dataclass(frozen=True)
class Patient:
    """What persists from study to study; `seed` fixes the continuous anatomy, the values are keys of `PATIENT`."""

    seed: int
    sick: bool
    heart: str
    chronic: tuple[Finding, ...]
    sex: str
    habitus: str
    aorta: str
    spine: str
    diaphragm: str
    granuloma: str
    rib_deformity: str
    clips: str
    sternotomy: str
    shoulder: str
    hilar_nodes: str
    scarring: str
    pacemaker: str
    port: str


@dataclass(frozen=True)
class Study:
    """One film: the patient, how it was taken (values are keys of `STUDY`), what it shows."""

    patient: Patient
    view: str
    rotation: str
    inspiration: str
    exposure: str
    findings: tuple[Finding, ...]
    tubes: tuple[Finding, ...]
    objects: tuple[Finding, ...] = ()

    @property
    def normal(self) -> bool:
        """No pathological finding; incidental attributes, devices and foreign objects do not count."""
        return not self.findings

    def value(self, name: str) -> str:
        """The value of an attribute of the study or its patient."""
        return getattr(self, name) if name in STUDY else getattr(self.patient, name)

    def attributes(self) -> frozenset[str]:
        """Every statement that is true of the film, general and precise: "effusion", "effusion/left", "heart=mild"."""
        true = {f"{name}={self.value(name)}" for name in INCIDENTAL} | {f"heart={self.patient.heart}"}
        for finding in (*self.findings, *self.tubes, *self.objects):
            true |= statements(finding)
        return frozenset(true)


def statements(finding: Finding, side: bool = True, zone: bool = True, severity: bool = True) -> set[str]:
    """Return what naming a finding states, with those of its details that are named."""
    said = {finding.kind}
    if side and finding.side:
        said.add(f"{finding.kind}/{finding.side}")
    if zone and finding.zone:
        said.add(f"{finding.kind}/{finding.zone}")
    if severity and finding.severity:
        said.add(f"{finding.kind}/{finding.severity}")
    if finding.kind in OBJECTS:
        said |= statements(replace(finding, kind="foreign_body"), side, zone, severity)
    return said


def choose(rng: np.random.Generator, shares: Mapping[str, float]) -> str:
    """Draw a key with probability proportional to its value."""
    edges = np.cumsum(list(shares.values()))
    index = int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))
    return list(shares)[min(index, len(shares) - 1)]


def draw_patient(rng: np.random.Generator) -> Patient:
    """Draw a patient: anatomy, chronic findings, incidental attributes, implanted devices."""
    sick = bool(rng.random() < _SICK)
    heart = choose(rng, _HEART[sick])
    chronic = [] if heart == "normal" else [Finding("cardiomegaly", severity=heart)]
    for kind, share in _CHRONIC.items():
        if rng.random() < share and sick:
            side = choose(rng, {"left": 0.4, "right": 0.4, "bilateral": 0.2}) if kind == "pleural_thickening" else None
            grade = choose(rng, _SEVERITY[kind]) if kind in _SEVERITY else None
            chronic.append(Finding(kind, side, None, grade))
    drawn = {name: choose(rng, shares) for name, shares in PATIENT.items()}
    if rng.random() < _UNREMARKABLE[sick]:
        drawn |= {name: next(iter(PATIENT[name])) for name in PATIENT if name in INCIDENTAL}
    return Patient(int(rng.integers(2**32)), sick, heart, tuple(chronic), **drawn)


def draw_study(rng: np.random.Generator, patient: Patient | None = None) -> Study:
    """Draw the attributes of one study.

    Args:
        rng: the only source of chance.
        patient: whose study; None draws a new one.
    """
    patient = draw_patient(rng) if patient is None else patient
    drawn = {name: choose(rng, shares) for name, shares in STUDY.items()}
    if any(f.kind == "emphysema" for f in patient.chronic):
        drawn["inspiration"] = "hyper"
    count = int(choose(rng, {str(n): p for n, p in enumerate(_ACUTE_COUNT[patient.sick])}))
    kinds: list[str] = []
    while len(kinds) < count:
        kind = choose(rng, _ACUTE)
        if kind not in kinds:
            kinds.append(kind)
    findings = [_draw_finding(rng, kind) for kind in kinds]
    tubes = []
    if drawn["view"] == "AP" and patient.sick and rng.random() < 0.6:
        for kind, share in _TUBES.items():
            if rng.random() < share:
                tubes.append(
                    Finding(
                        kind, choose(rng, {"right": 0.6, "left": 0.4}) if kind in ("central_line", "picc") else None
                    )
                )
    for finding in findings:
        if finding.kind == "pneumothorax" and rng.random() < 0.4:
            tubes.append(Finding("chest_tube", finding.side))
    return Study(patient, findings=(*patient.chronic, *findings), tubes=tuple(tubes), objects=(), **drawn)


def with_share(study: Study, kind: str, share: float, rng: np.random.Generator) -> Study:
    """Return the study with or without an acute finding, so that this share of the studies has it.

    A pneumothorax goes with its chest tube.
    """
    wanted, new = bool(rng.random() < share), _draw_finding(rng, kind)
    if wanted == any(finding.kind == kind for finding in study.findings):
        return study
    if wanted:
        return replace(study, findings=(*study.findings, new))
    tubes = tuple(tube for tube in study.tubes if (tube.kind, kind) != ("chest_tube", "pneumothorax"))
    return replace(study, findings=tuple(f for f in study.findings if f.kind != kind), tubes=tubes)


def _draw_finding(rng: np.random.Generator, kind: str) -> Finding:
    side = None
    if kind != "edema":
        side = "bilateral" if rng.random() < _BILATERAL.get(kind, 0) else choose(rng, {"left": 0.5, "right": 0.5})
    zone = choose(rng, {"upper": 0.3, "middle": 0.25, "lower": 0.45}) if kind in _ZONED else None
    severity = choose(rng, _SEVERITY[kind]) if kind in _SEVERITY else None
    return Finding(kind, side, zone, severity)
