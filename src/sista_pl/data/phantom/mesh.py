"""The MeSH tags of real reports in the terms of `study.py`: what is there to draw, and what a report states.

A tag of Open-i is a heading with qualifiers, "Opacity/lung/base/left/patchy". Most headings name what the phantom
draws. Some name what looks like something that it draws (`_LIKE`): a scar at the base is a band like one of
atelectasis. These are drawn as well, but are not among what the report states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from sista_pl.data.phantom.study import ZONES, Finding, statements

_SIDES = ("left", "right")
_ZONE_OF = {
    **dict.fromkeys(("upper lobe", "apex"), "upper"),
    **dict.fromkeys(("middle lobe", "lingula", "hilum"), "middle"),
    **dict.fromkeys(("base", "lower lobe", "costophrenic angle", "retrocardiac"), "lower"),
}
# Where the side goes without saying; what is behind the heart and is seen lies left of the spine.
_SIDE_OF = {"lingula": "left", "middle lobe": "right", "retrocardiac": "left"}
# A qualifier that puts a finding outside the lungs.
_ELSEWHERE = frozenset(
    (
        "abdomen", "aorta", "breast", "breast implants", "bronchi", "cervical vertebrae", "clavicle", "diaphragm",
        "heart", "heart ventricles", "humerus", "lumbar vertebrae", "lymph nodes", "mediastinum", "neck",
        "paratracheal", "pleura", "ribs", "shoulder", "spine", "sternum", "thoracic vertebrae", "trachea",
    )
)  # fmt: skip
_VOLUME = {
    **dict.fromkeys(("small", "mild", "borderline"), "small"),
    "moderate": "moderate",
    **dict.fromkeys(("large", "severe"), "large"),
}
_DEGREE = {"borderline": "mild", "mild": "mild", "moderate": "moderate", "severe": "severe"}
# Kind (or attribute) → qualifier → grade, the first that is there.
_GRADES = {
    "effusion": _VOLUME,
    "pneumothorax": _VOLUME,
    "edema": _DEGREE,
    "heart": _DEGREE,
    "atelectasis": {"streaky": "linear", "focal": "segmental"},
    "opacity": {
        **dict.fromkeys(("patchy", "diffuse", "large", "severe"), "patchy"),
        **dict.fromkeys(("mild", "small"), "faint"),
    },
    "consolidation": {
        **dict.fromkeys(("diffuse", "multilobar", "large", "severe"), "extensive"),
        **dict.fromkeys(("focal", "small"), "focal"),
    },
    "emphysema": {"mild": "mild", "moderate": "severe", "severe": "severe"},
}


class Tag(NamedTuple):
    """The qualifiers of a tag, with the side and zone that they name."""

    words: frozenset[str]
    side: str | None
    zone: str | None

    def grade(self, kind: str) -> str | None:
        return next((grade for word, grade in _GRADES.get(kind, {}).items() if word in self.words), None)

    def sides(self) -> tuple[str, ...]:
        """The sides that an attribute with one side may take."""
        return (self.side,) if self.side in _SIDES else _SIDES


class Value(NamedTuple):
    """An attribute, and the values of it that a tag allows."""

    name: str
    allowed: tuple[str, ...]


Drawing = Finding | Value
Rule = Callable[[Tag], "tuple[Drawing, ...]"]


class Tagged(NamedTuple):
    """What the tags of a report say.

    Args:
        findings, tubes, objects: a side, zone or grade that no tag tells is None; the kind of an object,
            "foreign_body", never is told.
        values: attribute of patient or study (`heart` too) → the values that the tags allow, one or several.
        states: what the tags affirm, in the terms of `Study.attributes`.
        drawn, missing: the tags that are drawn, and those that nothing here draws.
    """

    findings: tuple[Finding, ...]
    tubes: tuple[Finding, ...]
    objects: tuple[Finding, ...]
    values: dict[str, tuple[str, ...]]
    states: frozenset[str]
    drawn: tuple[str, ...]
    missing: tuple[str, ...]


def _lesion(kind: str) -> Rule:
    def rule(tag: Tag) -> tuple[Drawing, ...]:
        if tag.words & _ELSEWHERE:
            return ()
        drawn = "nodule" if kind == "opacity" and "round" in tag.words else kind
        return (Finding(drawn, tag.side, tag.zone, tag.grade(drawn)),)

    return rule


def _diffuse(kind: str, grade: str | None = None) -> Rule:
    return lambda tag: () if tag.side in _SIDES else (Finding(kind, severity=tag.grade(kind) or grade),)


def _pleural(*kinds: str) -> Rule:
    def rule(tag: Tag) -> tuple[Drawing, ...]:
        # fluid that is not at the base is loculated, which nothing draws; air is at the apex anyhow
        if "effusion" in kinds and tag.zone in ("upper", "middle") and len(kinds) == 1:
            return ()
        return tuple(Finding(kind, tag.side, None, tag.grade(kind)) for kind in kinds)

    return rule


def _atelectasis(tag: Tag) -> tuple[Drawing, ...]:
    """Bands above the diaphragm, beside the heart for middle lobe and lingula; an upper lobe's is not drawn."""
    if tag.zone == "upper" or "hilum" in tag.words:
        return ()
    grade = "linear" if tag.zone == "middle" else tag.grade("atelectasis")
    return (Finding("atelectasis", tag.side, None, grade),)


def _value(name: str, *values: str, where: Iterable[str] = ()) -> Rule:
    """An attribute, if one of the words `where` is there (or none is asked for)."""
    return lambda tag: (Value(name, values),) if not where or tag.words & set(where) else ()


def _heart(tag: Tag) -> tuple[Drawing, ...]:
    grade = tag.grade("heart")
    return (Value("heart", (grade,) if grade else tuple(dict.fromkeys(_DEGREE.values()))),)


def _granuloma(tag: Tag) -> tuple[Drawing, ...]:
    if "hilum" in tag.words:
        return (Value("hilar_nodes", tag.sides()),)
    if tag.words & _ELSEWHERE:
        return ()
    zones = (tag.zone,) if tag.zone else ZONES
    return (Value("granuloma", tuple(f"{side}/{zone}" for side in tag.sides() for zone in zones)),)


def _calcinosis(tag: Tag) -> tuple[Drawing, ...]:
    if tag.words & {"aorta", "aorta, thoracic"}:
        return (Value("aorta", ("calcified",)),)
    nodes = "lymph nodes" in tag.words and tag.words <= {"lymph nodes", *_SIDES, "bilateral"}
    if nodes or "hilum" in tag.words:
        return (Value("hilar_nodes", tag.sides()),)
    return ()


def _apical(tag: Tag) -> tuple[Drawing, ...]:
    """A scar, or a cap of pleura, at the apex."""
    side = (tag.side,) if tag.side else ("left", "right", "bilateral")
    return (Value("scarring", side),) if "apex" in tag.words else ()


def _thickening(tag: Tag) -> tuple[Drawing, ...]:
    if "pleura" not in tag.words:
        return ()
    return _apical(tag) or (Finding("pleural_thickening", tag.side),)


def _ribs(tag: Tag) -> tuple[Drawing, ...]:
    if not tag.words & {"ribs"}:
        return ()
    return (Value("rib_deformity", tag.sides()),)


def _fracture(tag: Tag) -> tuple[Drawing, ...]:
    if tag.words & {"healed", "chronic"}:
        return _ribs(tag)
    return (Finding("fracture", tag.side),) if "ribs" in tag.words else ()


def _spine(*values: str) -> Rule:
    elsewhere = {"lumbar vertebrae", "cervical vertebrae", "shoulder", "humerus"}
    return lambda tag: () if tag.words & elsewhere else (Value("spine", values),)


def _scoliosis(tag: Tag) -> tuple[Drawing, ...]:
    return _spine(*(f"scoliosis/{side}" for side in tag.sides()))(tag)


def _degenerative(tag: Tag) -> tuple[Drawing, ...]:
    return _spine("degenerative")(tag) if "degenerative" in tag.words else ()


def _diaphragm(tag: Tag) -> tuple[Drawing, ...]:
    if "elevated" not in tag.words or tag.side == "bilateral":
        return ()
    return (Value("diaphragm", tuple(f"elevated/{side}" for side in tag.sides())),)


def _tube(tag: Tag) -> tuple[Drawing, ...]:
    if tag.words & {"trachea", "trachea, carina"}:
        return (Finding("endotracheal_tube"),)
    if "abdomen" in tag.words:
        return (Finding("nasogastric_tube"),)
    return (Finding("chest_tube", tag.side),) if tag.side in _SIDES else ()


def _line(tag: Tag) -> tuple[Drawing, ...]:
    """A line that ends in the vena cava: whether by a port or from the arm the tags do not say."""
    if tag.words - {*_SIDES, "bilateral", "thorax", "anterior"}:
        return ()
    return (Finding("central_line", tag.side if tag.side in _SIDES else None),)


def _implant(tag: Tag) -> tuple[Drawing, ...]:
    if tag.words & {"humerus", "shoulder"}:
        return (Value("shoulder", tag.sides()),)
    plain = tag.words <= {"left", "right", "thorax", "heart", "heart atria"}
    return (Value("pacemaker", tag.sides()),) if plain else ()


def _clips(tag: Tag) -> tuple[Drawing, ...]:
    if tag.words & {"mediastinum", "heart", "sternum"}:
        return (Value("sternotomy", ("present",)),)
    if "abdomen" in tag.words:
        return (Value("clips", ("right upper quadrant",)),) if tag.side != "left" else ()
    if tag.words - {"breast", "left", "right"}:
        return ()
    below = () if tag.words else ("right upper quadrant",)
    return (Value("clips", (*below, *(f"{side} axilla" for side in tag.sides()))),)


_NAMED: dict[str, Rule] = {
    "normal": lambda tag: (),
    "opacity": _lesion("opacity"),
    "infiltrate": _lesion("opacity"),
    "airspace disease": _lesion("opacity"),
    "density": _lesion("opacity"),
    "consolidation": _lesion("consolidation"),
    "pneumonia": _lesion("pneumonia"),
    "nodule": _lesion("nodule"),
    "mass": _lesion("mass"),
    "pulmonary atelectasis": _atelectasis,
    "pleural effusion": _pleural("effusion"),
    "pneumothorax": _pleural("pneumothorax"),
    "hydropneumothorax": _pleural("pneumothorax", "effusion"),
    "pulmonary edema": lambda tag: (Finding("edema", severity=tag.grade("edema")),),
    "emphysema": _diffuse("emphysema"),
    "pulmonary emphysema": _diffuse("emphysema"),
    "bullous emphysema": _diffuse("emphysema"),
    "hernia, hiatal": lambda tag: (Finding("hernia"),),
    "thickening": _thickening,
    "cardiomegaly": _heart,
    "cardiac shadow": lambda tag: _heart(tag) if tag.words & {"enlarged", "borderline"} else (),
    "lung": lambda tag: (
        _value("inspiration", "low", where=["hypoinflation"])(tag)
        or _value("inspiration", "hyper", where=["hyperdistention"])(tag)
    ),
    "calcified granuloma": _granuloma,
    "granuloma": _granuloma,
    "calcinosis": _calcinosis,
    "atherosclerosis": _value("aorta", "calcified"),
    "aorta": _value("aorta", "tortuous", where=["tortuous"]),
    "aorta, thoracic": _value("aorta", "tortuous", where=["tortuous"]),
    "cicatrix": _apical,
    "spine": _degenerative,
    "thoracic vertebrae": _degenerative,
    "osteophyte": _spine("degenerative"),
    "spondylosis": _spine("degenerative"),
    "hyperostosis, diffuse idiopathic skeletal": _spine("degenerative"),
    "arthritis": lambda tag: _spine("degenerative")(tag) if tag.words & {"spine", "thoracic vertebrae"} else (),
    "scoliosis": _scoliosis,
    "diaphragm": _diaphragm,
    "deformity": _ribs,
    "fractures, bone": _fracture,
    "tube, inserted": _tube,
    "foreign bodies": _lesion("foreign_body"),
}
_LIKE: dict[str, Rule] = {
    "pulmonary congestion": lambda tag: (Finding("edema", severity="mild"),),
    "heart failure": lambda tag: (Finding("edema", severity=tag.grade("edema") or "mild"),),
    "pulmonary disease, chronic obstructive": _diffuse("emphysema", "mild"),
    "lung, hyperlucent": _diffuse("emphysema", "mild"),
    "diaphragm": _value("inspiration", "hyper", where=["flattened"]),
    "diaphragmatic eventration": lambda tag: _diaphragm(tag._replace(words=tag.words | {"elevated"})),
    # fluid enough to blunt the angle
    **dict.fromkeys(
        ("costophrenic angle", "sulcus", "pleura"),
        lambda tag: (Finding("effusion", tag.side, severity="small"),) if "blunted" in tag.words else (),
    ),
    "granulomatous disease": _granuloma,
    "calcinosis": lambda tag: _granuloma(tag) if "lung" in tag.words else (),
    "cicatrix": lambda tag: _thickening(tag) or _atelectasis(tag._replace(words=tag.words | {"streaky"})),
    "catheters, indwelling": _line,
    "implanted medical device": _implant,
    "surgical instruments": _clips,
    "sutures": lambda tag: _value("sternotomy", "present", where=["mediastinum", "sternum"])(tag),
    "technical quality of image unsatisfactory": _value("exposure", "under", "over"),
}
_TUBES = frozenset(("endotracheal_tube", "nasogastric_tube", "chest_tube", "central_line"))


def parse_tag(text: str) -> tuple[str, Tag]:
    """ "Opacity/lung/base/left" → its heading in lower case, and its qualifiers."""
    head, *qualifiers = (part.strip().lower() for part in text.split("/"))
    side = next((word for word in qualifiers if word in (*_SIDES, "bilateral")), None)
    side = side or next((_SIDE_OF[word] for word in qualifiers if word in _SIDE_OF), None)
    zone = next((_ZONE_OF[word] for word in qualifiers if word in _ZONE_OF), None)
    return head, Tag(frozenset(qualifiers), side, zone)


def findings_from_mesh(tags: str | Iterable[str]) -> Tagged:
    """Read the MeSH tags of a report.

    Args:
        tags: a list, or a text with `|` or `;` between them.

    Returns:
        what to draw. Of tags that exclude each other here (an aorta is drawn tortuous or calcified, not both) the
        later one is missing.
    """
    listed = tags.replace(";", "|").split("|") if isinstance(tags, str) else tags
    listed = [tag.strip() for tag in listed if tag.strip()]
    findings: list[Finding] = []
    values: dict[str, tuple[str, ...]] = {}
    drawn = [False] * len(listed)
    states: set[str] = set()
    for named, rules in ((True, _NAMED), (False, _LIKE)):
        for index, text in enumerate(listed):
            head, tag = parse_tag(text)
            if drawn[index] or head not in rules:
                continue
            drawings = rules[head](tag)
            drawn[index] = head == "normal" or (bool(drawings) and all([
                _add(findings, one, named) if isinstance(one, Finding) else _narrow(values, one) for one in drawings
            ]))  # fmt: skip
        if named:
            states = _states(findings, values)
    return Tagged(
        tuple(finding for finding in findings if finding.kind not in (*_TUBES, "foreign_body")),
        tuple(finding for finding in findings if finding.kind in _TUBES),
        tuple(finding for finding in findings if finding.kind == "foreign_body"),
        values,
        frozenset(states),
        tuple(tag for tag, done in zip(listed, drawn, strict=True) if done),
        tuple(tag for tag, done in zip(listed, drawn, strict=True) if not done),
    )


def _add(findings: list[Finding], new: Finding, named: bool) -> bool:
    """Add a finding, or merge it with one that it may be the same as; what only looks like one changes none."""
    for index, old in enumerate(findings):
        sides = {side for side in (old.side, new.side) if side}
        zones = {zone for zone in (old.zone, new.zone) if zone}
        if old.kind == new.kind and len(zones) <= 1 and (len(sides) <= 1 or "bilateral" in sides):
            if named:
                side = "bilateral" if "bilateral" in sides else next(iter(sides), None)
                findings[index] = Finding(old.kind, side, next(iter(zones), None), old.severity or new.severity)
            return True
    findings.append(new)
    return True


def _narrow(values: dict[str, tuple[str, ...]], new: Value) -> bool:
    """Keep the values that all tags allow; False where none is left, which changes nothing."""
    left = tuple(value for value in values.get(new.name, new.allowed) if value in new.allowed)
    if left:
        values[new.name] = left
    return bool(left)


def _states(findings: Iterable[Finding], values: dict[str, tuple[str, ...]]) -> set[str]:
    said = set().union(*(statements(finding) for finding in findings))
    said |= {f"{name}={allowed[0]}" for name, allowed in values.items() if len(allowed) == 1}
    if "heart" in values:
        said |= {"cardiomegaly"} | ({f"cardiomegaly/{values['heart'][0]}"} if len(values["heart"]) == 1 else set())
    return said
