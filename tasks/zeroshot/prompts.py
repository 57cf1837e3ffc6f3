"""Prompts that say that a finding is there, and that it is not: a small grammar, and the findings of the releases.

A template such as "{severity} {location} pleural effusion" stands for each combination of the words of its places.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from sista_pl.errors import SistaError, did_you_mean

SIDES = ["", "left", "right", "bilateral"]
GRADES = ["", "mild", "moderate", "severe"]
SIZES = ["", "small", "moderate", "large"]
LOBES = ["", "left lower lobe", "right lower lobe", "left upper lobe", "right upper lobe"]
PLACES = ["", "at the left base", "at the right base", "in the left lung", "in the right lung"]

_EFFUSION = {
    "positive": ["{severity} {location} pleural effusion"], "severity": SIZES, "location": SIDES,
    "negative": ["no pleural effusion", "no effusion", "the costophrenic angles are sharp"],
}  # fmt: skip
_LESION = {"location": ["", "in the left lung", "in the right lung", "in the upper lobe", "in the lower lobe"]}
_OPACITY = {
    "positive": ["{severity} opacity {location}", "{severity} {location} opacity"],
    "severity": ["", "faint", "patchy", "hazy"], "location": PLACES,
    "negative": ["the lungs are clear", "no air space disease", "no opacity"],
}  # fmt: skip

_THICKENING = {
    "positive": ["{severity} {location} pleural thickening"], "severity": GRADES, "location": SIDES,
    "negative": ["no pleural thickening"],
}  # fmt: skip
_NORMAL = {
    "positive": ["no acute cardiopulmonary {kind}", "normal chest radiograph", "the lungs are clear"],
    "kind": ["process", "abnormality"],
    "negative": ["pleural effusion", "opacity", "consolidation", "pulmonary edema", "cardiomegaly", "atelectasis",
                 "pneumonia", "pneumothorax"],
}  # fmt: skip
_PNEUMONIA = {
    "positive": ["{location} pneumonia", "{severity} opacity {place} concerning for pneumonia"],
    "severity": ["", "patchy", "ill-defined"], "location": LOBES, "place": PLACES,
    "negative": ["no evidence of pneumonia", "no focal consolidation", "the lungs are clear"],
}  # fmt: skip

# Label of CheXpert, MIMIC-CXR, ChestX-ray14, RSNA, SIIM, COVIDx → what is said of it; words of the reports, our choice.
PROMPTS: dict[str, dict[str, list[str]]] = {
    "Atelectasis": {
        "positive": ["{severity} {location} atelectasis", "{severity} atelectasis {place}"],
        "severity": ["", "mild", "linear", "subsegmental"],
        "location": ["", "left basilar", "right basilar", "bibasilar"],
        "place": ["at the left base", "at the right base"], "negative": ["no atelectasis", "the lungs are clear"],
    },
    "Cardiomegaly": {
        "positive": ["{severity} cardiomegaly", "the heart is {degree} enlarged",
                     "{severity} enlargement of the heart"],
        "severity": GRADES, "degree": ["", "mildly", "moderately", "severely"],
        "negative": ["heart size is normal", "the heart is normal in size", "normal cardiac silhouette"],
    },
    "Consolidation": {
        "positive": ["{severity} consolidation {location}", "{location} air space consolidation"],
        "severity": ["", "focal", "dense", "extensive"], "location": PLACES,
        "negative": ["no focal consolidation", "no consolidation", "the lungs are clear"],
    },
    "Edema": {
        "positive": ["{severity} pulmonary edema", "{severity} edema with perihilar haze"], "severity": GRADES,
        "negative": ["no pulmonary edema", "the pulmonary vasculature is normal"],
    },
    "Pleural Effusion": _EFFUSION,
    "Effusion": _EFFUSION,
    "Emphysema": {
        "positive": ["{severity} emphysema", "hyperinflated lungs with {severity} emphysema"], "severity": GRADES,
        "negative": ["no emphysema", "lung volumes are normal"],
    },
    "Enlarged Cardiomediastinum": {
        "positive": ["{severity} widening of the mediastinum", "the mediastinum is {degree} enlarged"],
        "severity": GRADES, "degree": ["", "mildly", "markedly"],
        "negative": ["mediastinal contours are normal", "normal mediastinum"],
    },
    "Fibrosis": {
        "positive": ["{severity} {location} fibrosis", "{location} scarring"], "severity": GRADES,
        "location": ["", "apical", "basilar", "interstitial"], "negative": ["no fibrosis", "no scarring"],
    },
    "Fracture": {
        "positive": ["{severity} {location} rib fracture"], "severity": ["", "acute", "displaced"],
        "location": ["", "left", "right"], "negative": ["no acute fracture", "no rib fracture", "the bones are intact"],
    },
    "Hernia": {
        "positive": ["{severity} hiatal hernia", "{severity} hiatus hernia behind the heart"],
        "severity": ["", "small", "moderate", "large"], "negative": ["no hiatal hernia"],
    },
    "Infiltration": {
        "positive": ["{severity} {location} infiltrate", "{severity} infiltrate {place}"],
        "severity": ["", "patchy", "ill-defined"], "location": SIDES, "place": PLACES,
        "negative": ["no infiltrate", "the lungs are clear"],
    },
    "Lung Lesion": {
        "positive": ["{severity} {kind} {location}"], "severity": ["", "small", "large"], "kind": ["nodule", "mass"],
        **_LESION, "negative": ["no nodule or mass", "no suspicious nodule"],
    },
    "Lung Opacity": _OPACITY,
    "Mass": {
        "positive": ["{severity} mass {location}"], "severity": ["", "large", "rounded", "lobulated"], **_LESION,
        "negative": ["no mass", "no nodule or mass"],
    },
    "No Finding": _NORMAL,
    "normal": _NORMAL,
    "Nodule": {
        "positive": ["{severity} nodule {location}", "nodular density {location}"],
        "severity": ["", "small", "subcentimeter"], **_LESION, "negative": ["no nodule", "no suspicious nodule"],
    },
    "Pleural Other": _THICKENING,
    "Pleural_Thickening": _THICKENING,
    "Pneumonia": _PNEUMONIA,
    "pneumonia": _PNEUMONIA,
    "Pneumothorax": {
        "positive": ["{severity} {location} pneumothorax"], "severity": SIZES,
        "location": ["", "left", "right", "left apical", "right apical"],
        "negative": ["no pneumothorax", "there is no pneumothorax"],
    },
    "Support Devices": {
        "positive": ["{kind} in place"],
        "kind": ["endotracheal tube", "enteric tube", "central venous catheter", "pacemaker", "chest tube"],
        "negative": ["no lines or tubes"],
    },
    "COVID-19": {
        "positive": ["{severity} {location} opacities, concerning for viral pneumonia"],
        "severity": ["", "patchy", "hazy", "ground-glass"], "location": ["", "bilateral", "peripheral", "multifocal"],
        "negative": ["no evidence of pneumonia", "the lungs are clear"],
    },
}  # fmt: skip

SIDES_OF_A_PAIR = ("positive", "negative")
_PLACE = re.compile(r"\{(\w+)\}")
MOST = 1000  # prompts of a class


@dataclass(frozen=True)
class Ensemble:
    """The prompts of a class.

    Args:
        positive: texts that say that the finding is there.
        negative: texts that say that it is not.
    """

    positive: list[str]
    negative: list[str]


def ensembles(names: list[str], given: Mapping[str, Any] | None = None) -> list[Ensemble]:
    """Return the prompts of each class, those of `given` before the packaged ones.

    Args:
        names: of the classes.
        given: by class, a mapping with `positive` and `negative`, lists of templates (or one), and under any other
            key the words of the place of that name; a template without places stands for itself.

    Raises:
        SistaError: a class without prompts, an unknown class, a place without words, no template, too many prompts.
    """
    given = given or {}
    for name in given:
        if name not in names:
            raise SistaError(f"model: prompts of {name!r}, which is no class here; {did_you_mean(str(name), names)}")
    found = []
    for name in names:
        grammar = given.get(name, PROMPTS.get(name))
        if grammar is None:
            raise SistaError(
                f"model: no prompts of {name!r}; give model.prompts: {{{name}: {{positive: ['{{severity}} finding'], "
                "severity: [mild, severe], negative: [no finding]}}"
            )
        found.append(Ensemble(*(_expand(name, grammar, side) for side in SIDES_OF_A_PAIR)))
    return found


def _expand(name: str, grammar: Any, side: str) -> list[str]:
    """Return the texts of one side of a grammar, each once."""
    where = f"model: prompts of {name!r}"
    if not isinstance(grammar, Mapping) or side not in grammar:
        raise SistaError(f"{where}: no {side}; write {{positive: [...], negative: [...]}}")
    words = {key: _texts(value, f"{where}: {key}") for key, value in grammar.items()}
    texts: dict[str, None] = {}
    for template in words[side]:
        places = list(dict.fromkeys(_PLACE.findall(template)))
        for place in places:
            if place not in words or place in SIDES_OF_A_PAIR:
                known = [key for key in words if key not in SIDES_OF_A_PAIR]
                raise SistaError(f"{where}: {template!r} has the place {place!r}; {did_you_mean(place, known)}")
        for choice in product(*(words[place] for place in places)):
            filled = template
            for place, word in zip(places, choice, strict=True):
                filled = filled.replace(f"{{{place}}}", word)
            if text := " ".join(filled.split()):
                texts[text] = None
            if len(texts) > MOST:
                raise SistaError(f"{where}: more than {MOST} {side} prompts; give fewer words")
    if not texts:
        raise SistaError(f"{where}: {side} is empty; give at least one text")
    return list(texts)


def _texts(value: Any, where: str) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        raise SistaError(f"{where} is {value!r}; give a text or a list of them")
    return values
