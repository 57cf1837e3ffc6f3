"""The phantom as COVIDx V9A lies on disk: PNG and JPEG, lists with repeated rows and some `positive`."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from sista_pl.data.phantom.cohort import LAYOUTS, Drawn, Layout
from sista_pl.data.phantom.study import Study

AIRSPACE = frozenset({"opacity", "pneumonia", "consolidation"})
WHITE = AIRSPACE | {"atelectasis", "effusion", "mass", "nodule"}
SOURCES = ("cohen", "fig1", "actmed", "sirm", "rsna", "ricord")
_JPEG_QUALITY = 92
_REPEATED = 0.06


@LAYOUTS.register("covidx")
def covidx() -> Layout:
    """COVIDx V9A, awkward parts included.

    Every sixth patient has the same number in another source, files of `sirm` have a blank in their name, some rows of
    train are `positive` or come twice.
    """
    return Layout(_write_study, _write_tables)


def kind_of(study: Study) -> str:
    """The class by what whitens the lungs.

    COVID-19 is diffuse: an edema, an airspace finding that is bilateral or extensive, or two of them. Pneumonia is
    anything else that is white in a lung or its pleura. Normal films have clear lungs, whatever heart and bones show.
    """
    airspace = [finding for finding in study.findings if finding.kind in AIRSPACE]
    kinds = {finding.kind for finding in study.findings}
    wide = any(finding.side == "bilateral" or finding.severity == "extensive" for finding in airspace)
    if "edema" in kinds or wide or len(airspace) > 1:
        return "COVID-19"
    return "pneumonia" if kinds & WHITE else "normal"


def _write_study(drawn: Drawn, root: Path) -> dict:
    plan, extra = drawn.plan, drawn.extra
    place = "test" if plan.split == "test" else "train"
    # numbers are only unique within a source
    source, patient = SOURCES[plan.patient % len(SOURCES)], plan.patient // len(SOURCES) + 1
    name = f"{'CXR ' if source == 'sirm' else ''}{drawn.name()[:16]}.{'png' if extra.random() < 0.5 else 'jpg'}"
    (root / place).mkdir(exist_ok=True)
    Image.fromarray(drawn.rendering.image).save(root / place / name, quality=_JPEG_QUALITY)
    kind = word = kind_of(drawn.study)
    if place == "train" and kind == "COVID-19" and extra.random() < 0.25:
        word = "positive"
    line = f"{patient} {name} {word} {source}"
    times = 2 if place == "train" and extra.random() < _REPEATED else 1
    return {"place": place, "lines": [line] * times, "truth": drawn.truth(f"{place}/{name}", kind=kind)}


def _write_tables(root: Path, records: list[dict]) -> None:
    for place in ("train", "test"):
        lines = [line for record in records if record["place"] == place for line in record["lines"]]
        (root / f"{place}_COVIDx9A.txt").write_text("".join(f"{line}\n" for line in lines), newline="\n")
