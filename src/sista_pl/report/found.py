"""What the stored predictions of a sweep say: `sista_pl.compare` on all of them, and finding by finding.

N images, K findings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sista_pl import compare
from sista_pl.metrics.classification import Classification
from sista_pl.report.swept import read_json
from sista_pl.stored import Family, Run, Setting


@dataclass
class Findings:
    """Differences of AUROC to the reference in one classification setting, a finding at a time.

    Args:
        setting: task, fraction, runs.
        rows: as `Comparison.rows` without those of the reference, and `finding`, `positives`, `negatives` beside them;
            p_holm is corrected for the rows of this setting.
        reference: the method that the others are set against.
        notes: findings that can't be compared, and why.
    """

    setting: Setting
    rows: list[dict[str, Any]]
    reference: str
    notes: list[str]


def kept(file: Path, runs: Sequence[Run], reference: str, draws: int, seed: int) -> compare.Comparison | None:
    """Return the comparison that `sista compare` left, or None where it is not of these predictions as they are now.

    Args:
        file: compare.json.
        runs: whose predictions are wanted.
        reference: to compare with.
        draws: resamples.
        seed: of the resampling.
    """
    told = read_json(file)
    if any(told.get(key) != value for key, value in (("schema", 2), ("reference", reference), ("draws", draws),
                                                     ("seed", seed))):  # fmt: skip
        return None
    made = file.stat().st_mtime_ns
    wanted = {(run.method, run.task, run.fraction, run.seed, run.subset, _place(run.file)) for run in runs}
    found = {(each["method"], each["task"], each["fraction"], each["seed"], each["subset"],
              _place(Path(each["predictions"]))) for each in told["files"]}  # fmt: skip
    if found != wanted or any(run.file.stat().st_mtime_ns > made for run in runs):
        return None
    rows, ranks = (
        [{key: np.nan if value is None and key != "fraction" else value for key, value in row.items()} for row in part]
        for part in (told["rows"], told["ranks"])
    )
    return compare.Comparison(rows, ranks, reference, draws, seed, told["comparisons"], told["notes"])


def _place(file: Path) -> tuple[str, ...]:
    """The end of a run's path that stays where the sweep's folder is moved: cell, number, test, file."""
    return file.parts[-4:]


def by_finding(setting: Setting) -> dict[str, Setting]:
    """Return a setting of one finding each, by name, its metric the AUROC; {} where it is no classification of several.

    The family of each has that finding alone, which makes its figure the same and K times as fast.
    """
    families = [family for family in setting.families if isinstance(family, Classification)]
    if len(families) < len(setting.families) or len(families[0].names) < 2:
        return {}
    found = {}
    for k, name in enumerate(families[0].names):
        alone: list[Family] = [
            Classification(_truth(family)[:, [k]], family.scores[:, [k]], [name], "binary") for family in families
        ]
        if "auroc_macro" in alone[0].figures():
            found[name] = replace(setting, metric=f"auroc/{name}", families=alone, notes=[])
    return found


def _truth(family: Classification) -> np.ndarray:
    return np.where(family.known, family.truth, np.nan)


def findings_of(
    setting: Setting, reference: str, draws: int, seed: int, advance: Callable[[], Any] = lambda: None
) -> Findings:
    """Return the differences to the reference, a finding at a time.

    Args:
        setting: a classification of several findings that has the reference and another method.
        reference: to compare with.
        draws: resamples.
        seed: of the resampling.
        advance: called `sista_pl.compare.work(by_finding(setting).values(), draws)` times.
    """
    parts = by_finding(setting)
    found = compare.compare(list(parts.values()), reference, draws, seed, advance)
    rows = []
    for row in found.rows:
        name = row["metric"].removeprefix("auroc/")
        family: Any = parts[name].families[0]
        positives, known = int(family.truth[:, 0].sum()), int(family.known[:, 0].sum())
        if row["method"] != reference:
            rows.append({"finding": name, "positives": positives, "negatives": known - positives, **row})
    absent = [line for line in setting.families[0].absent if line.partition(" has no ")[0] not in parts]
    return Findings(setting, rows, reference, [*absent, *found.notes])
