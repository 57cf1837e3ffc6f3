"""The report of a study, in words, together with what those words state."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import numpy as np

from sista_pl.data.phantom import knobs, phrases
from sista_pl.data.phantom.study import NORMAL, Finding, Study, statements

# Order in which a reader goes through a film.
_DEVICES = ("pacemaker", "port", "sternotomy")
_LUNGS = ("granuloma", "scarring", "hilar_nodes", "diaphragm")
_BONES = ("spine", "rib_deformity", "shoulder", "clips")
_MAX_WORDS = 80


@dataclass(frozen=True)
class Report:
    """A report.

    Args:
        findings, impression: the text of the two sections, on one line each. Only one of them is filled where the
            radiologist wrote an impression alone, or "FINDINGS AND IMPRESSION" in one (then it is `findings`).
        states: statements that the text affirms, of those in `Study.attributes`; what it denies is not among them.
    """

    findings: str
    impression: str
    states: frozenset[str]

    @property
    def text(self) -> str:
        """Findings and impression in one line."""
        return f"{self.findings} {self.impression}".strip()


class _Writer:
    """Collects sentences and what they state; a macro always takes the first wording."""

    def __init__(self, rng: np.random.Generator, macro: bool):
        self.rng, self.macro = rng, macro
        self.states: set[str] = set()

    def pick(self, wordings: tuple[str, ...]) -> str:
        return wordings[0] if self.macro else wordings[int(self.rng.integers(len(wordings)))]

    def chance(self, share: float) -> bool:
        return self.macro or bool(self.rng.random() < share)

    def finding(self, finding: Finding, impression: bool = False) -> str:
        wordings = phrases.FINDINGS[finding.kind][impression]
        if not impression and finding.kind in phrases.HEDGED and self.rng.random() < knobs.HEDGE:
            wordings = phrases.HEDGED[finding.kind]
        wording = self.pick(wordings)
        grade = finding.severity if finding.severity and self.rng.random() < 0.9 else None
        zone = finding.zone if finding.zone and self.rng.random() < 0.9 else None
        if "in size" in wording or "in degree" in wording:
            grade = finding.severity
        graded = bool(grade) and "rade}" in wording
        self.states |= statements(finding, zone=bool(zone) and "{place}" in wording, severity=graded)
        if graded and finding.kind == "cardiomegaly":
            self.states.add(f"heart={grade}")
        return self._fill(wording, finding, zone, grade)

    def _fill(self, wording: str, finding: Finding, zone: str | None, grade: str | None) -> str:
        side = finding.side or ""
        word = self.pick(phrases.GRADES.get(grade, (grade,))) if grade else ""
        if "enlarged" in wording:
            word = phrases.ADVERBS.get(word, word)
        zone_word = self.pick(phrases.ZONE_WORDS[zone]) if zone else "lung"
        place = f"both {zone_word}s" if side == "bilateral" else f"the {side} {zone_word}"
        if side == "bilateral":
            for one, both in _PLURALS:
                wording = wording.replace(one, both)
        text = wording.format(
            side=side, Side=side.capitalize(), place=place, grade=f"{word} " if word else "",
            Grade=f"{word.capitalize()} " if word else "",
        )  # fmt: skip
        text = text.replace(" a extensive", " an extensive").replace(", in size", "")
        return text[0].upper() + text[1:]

    def incidental(self, study: Study, name: str) -> list[str]:
        value = study.patient.heart if name == "heart" else study.value(name)
        wordings = phrases.INCIDENTAL[name].get(value)
        share = knobs.SAY_VIEW if name == "view" else knobs.SAY_NORMAL if value in NORMAL else knobs.SAY_INCIDENTAL
        if wordings is None or not self.chance(share):
            return []
        self.states.add(f"{name}={value}")
        return [self.pick(wordings)]

    def denials(self, study: Study, share: float) -> list[str]:
        drawn, said = {f.kind for f in study.findings}, []
        denied: set[str] = set()
        for kinds, wordings in phrases.DENIALS:
            if drawn.isdisjoint(kinds) and not denied.issuperset(kinds) and self.rng.random() < share:
                denied.update(kinds)
                said.append(self.pick(wordings))
        return said


_PLURALS = (
    ("a {grade}{side}", "{grade}{side}"),
    ("A {grade}layering {side} effusion is", "{Grade}layering {side} effusions are"),
    ("There is {grade}{side} pleural effusion", "There are {grade}{side} pleural effusions"),
    ("pleural effusion is", "pleural effusions are"),
    ("pleural effusion", "pleural effusions"),
    ("pleural effusionss", "pleural effusions"),
    ("the {side} costophrenic angle", "both costophrenic angles"),
    ("a {grade}effusion", "{grade}{side} effusions"),
    ("at the {side} base", "at both bases"),
    ("on the {side}", "on both sides"),
    ("the {side} lateral pleura", "the lateral pleura on both sides"),
)


def write_report(study: Study, rng: np.random.Generator) -> Report:
    """Word a study as a radiologist would, 15 to 80 words.

    Args:
        study: only what was drawn is affirmed.
        rng: wording, hedging, omissions.
    """
    form = "both" if (u := rng.random()) < 0.78 else "impression" if u < 0.88 else "merged"
    macro = study.normal and not study.tubes and not study.objects and bool(rng.random() < knobs.MACRO)
    for shorter in range(4):
        report = _write(study, rng, form, macro, shorter)
        if len(report.text.split()) <= _MAX_WORDS:
            return report
    return report


def _write(study: Study, rng: np.random.Generator, form: str, macro: bool, shorter: int) -> Report:
    writer = _Writer(rng, macro)
    say = lambda names: [s for name in names for s in writer.incidental(study, name)]  # noqa: E731
    lungs = [f for f in study.findings if f.kind not in ("cardiomegaly", "hernia", "fracture")]
    body = say(("view", "rotation", "exposure"))
    body += [writer.finding(t) for t in study.tubes] + say(_DEVICES) + [writer.finding(o) for o in study.objects]
    body += say(("inspiration",)) if not any(f.kind == "emphysema" for f in lungs) else []
    body += [writer.finding(f) for f in lungs] if lungs else [writer.pick(phrases.CLEAR)]
    share = (0.75, 0.5, 0.25, 0.0)[shorter]
    body += [] if macro else writer.denials(study, share if study.normal else 0.6 * share)
    body += [phrases.DENIALS[0][1][0]] if macro else []
    body += say(_LUNGS)
    hearts = [f for f in study.findings if f.kind in ("cardiomegaly", "hernia")]
    body += [writer.finding(f) for f in hearts] if hearts else []
    body += [] if any(f.kind == "cardiomegaly" for f in hearts) else say(("heart",))
    body += say(("aorta",)) + [writer.finding(f) for f in study.findings if f.kind == "fracture"] + say(_BONES)
    text = " ".join(body)
    if form != "both":
        conclusion = " No acute cardiopulmonary process." if study.normal else ""
        states = frozenset(writer.states)
        return Report(text + conclusion, "", states) if form == "merged" else Report("", text + conclusion, states)
    if study.normal:
        summary = writer.pick(phrases.NORMAL_IMPRESSION)
    else:
        order = sorted(study.findings, key=lambda f: f.kind in ("cardiomegaly", "hernia", "pleural_thickening"))
        summary = " ".join(writer.finding(f, impression=True) for f in order[: (3, 2, 1, 1)[shorter]])
    return Report(text, summary, frozenset(writer.states))


def stated(study: Study, report: Report) -> frozenset[str]:
    """Return what the text of `report` affirms, as statements of `Study.attributes`.

    Raises:
        ValueError: the report states what the study does not have: it is another study's.
    """
    if wrong := report.states - study.attributes():
        raise ValueError(f"not the report of this study: it states {', '.join(sorted(wrong))}")
    return report.states


def document(study: Study, report: Report, rng: np.random.Generator) -> str:
    """The text file of a report as MIMIC-CXR has it: headers, wrapped lines, `___` for what was removed."""
    indication = phrases.INDICATIONS[int(rng.integers(len(phrases.INDICATIONS)))]
    parts = [f"EXAMINATION:  {phrases.EXAMINATIONS[study.view]}", f"INDICATION:  {indication}"]
    if rng.random() < 0.6:
        parts.append("COMPARISON:  Chest radiograph ___." if rng.random() < 0.6 else "COMPARISON:  None.")
    if report.findings and report.impression:
        parts += [f"FINDINGS:\n\n{report.findings}", f"IMPRESSION:\n\n{report.impression}"]
    elif report.findings:
        parts.append(f"FINDINGS AND IMPRESSION:  {report.findings}")
    else:
        parts.append(f"IMPRESSION:  {report.impression}")
    wrapped = ["\n ".join(_wrap(line) for line in part.split("\n")) for part in parts]
    return " " * 33 + "FINAL REPORT\n " + "\n\n ".join(wrapped) + "\n"


def _wrap(line: str) -> str:
    return "\n ".join(textwrap.wrap(line, 78))
