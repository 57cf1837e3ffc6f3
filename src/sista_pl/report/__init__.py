"""The report of a sweep: what its folder holds, compared, drawn, and put on one page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sista_pl import compare, stored
from sista_pl.atomic import writing
from sista_pl.errors import SistaError
from sista_pl.report.found import Findings, by_finding, findings_of, kept
from sista_pl.report.swept import Swept, write_plan
from sista_pl.report.words import WordMaps, word_maps

__all__ = ["Contents", "Findings", "Swept", "WordMaps", "gather", "write_plan"]


@dataclass
class Contents:
    """What a report shows.

    Args:
        swept: the sweep's folder.
        phantom: whether any of it is drawn.
        reference: the method that the others are set against; None with fewer than two methods.
        comparison: of the methods, or None with fewer than two.
        findings: of the classification settings that have the reference and another method.
        words: word maps, or None where they were not asked for.
        notes: parts that are not there, and why.
    """

    swept: Swept
    phantom: bool = False
    reference: str | None = None
    comparison: compare.Comparison | None = None
    findings: list[Findings] = field(default_factory=list)
    words: WordMaps | None = None
    notes: list[str] = field(default_factory=list)


def gather(
    swept: Swept,
    draws: int = compare.DRAWS,
    seed: int = 0,
    words: bool = True,
    begin: Callable[[int], Callable[[], Any]] = lambda total: lambda: None,
) -> Contents:
    """Compute what a report shows; a comparison of the same predictions that is there already is taken as it is.

    Args:
        swept: the sweep's folder.
        draws: resamples.
        seed: of the resampling.
        words: whether to encode images for the word maps.
        begin: is given the number of steps, and returns what is called after each.

    Raises:
        SistaError: fewer than 100 draws, a file of a run that can't be read.
    """
    found = Contents(swept, phantom=any(bool(swept.facts(cell).get("phantom")) for cell in swept.done))
    settings = _load(swept.tested(), found.notes)
    runs = [run for setting in settings for run in setting.runs]
    methods = [method for method in swept.methods if any(run.method == method for run in runs)]
    if len(methods) < 2:
        told = f"only {methods[0]} is" if methods else "no method is"
        found.notes.append(f"{told} tested yet: nothing to compare, so no table, no curve and no difference")
    else:
        found.reference = reference = swept.reference if swept.reference in methods else methods[0]
        if swept.reference not in (None, reference):
            found.notes.append(f"the sweep's reference, {swept.reference}, is not tested yet: {reference} stands in")
        able = [each for each in settings if by_finding(each) and reference in each.methods and len(each.methods) > 1]
        old = kept(swept.root / "compare.json", runs, reference, draws, seed)
        total = sum(compare.work(list(by_finding(setting).values()), draws) for setting in able)
        advance = begin(total + (0 if old else compare.work(settings, draws)))
        found.comparison = old or compare.compare(settings, reference, draws, seed, advance)
        found.findings = [findings_of(setting, reference, draws, seed, advance) for setting in able]
    if words:
        found.words = word_maps(swept)
    return found


def _load(runs: list[stored.Run], notes: list[str]) -> list[stored.Setting]:
    """Return the settings whose predictions can be compared, and note why others can't."""
    groups: dict[tuple[str, float | None], list[stored.Run]] = {}
    for run in runs:
        groups.setdefault((run.task, run.fraction), []).append(run)
    found = []
    for (task, share), group in groups.items():
        try:
            found += stored.load(group)
        except SistaError as why:
            notes.append(f"{task} {share:g} is left out: {why}")
    return found


def write(path: Path, html: str) -> Path:
    """Write a page under another name and rename it.

    Raises:
        SistaError: it can't be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path) as partial:
            partial.write_text(html, encoding="utf-8")
    except OSError as why:
        raise SistaError(f"{path}: cannot be written ({why.strerror}); give --out another file") from None
    return path
