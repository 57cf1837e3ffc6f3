"""Hyper-parameters of each method, chosen on validation with the same budget for all.

Every setting pre-trains every method once and takes the encoder through one task, which is fitted and never tested;
its validation figure decides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from sista_pl import runs
from sista_pl.errors import SistaError


@dataclass(frozen=True)
class Tuning:
    """What is tried for each method.

    Args:
        options: values to try, by option of the pre-training; every combination is a setting.
        task: of the sweep, whose validation figure decides.
        fraction: of the labels that it is fitted on, in (0, 1].
    """

    options: dict[str, list[Any]]
    task: str
    fraction: float

    @property
    def settings(self) -> list[dict[str, Any]]:
        return [dict(zip(self.options, values, strict=True)) for values in product(*self.options.values())]

    def told(self) -> str:
        """Return the budget in a line."""
        tried = ", ".join(f"{key} of {json.dumps(values)}" for key, values in self.options.items())
        return (
            f"each method: {len(self.settings)} pre-trainings, {tried}; chosen by the validation figure of {self.task} "
            f"at {self.fraction:.3g} of the labels, first seed"
        )


def validated(root: Path, name: str) -> tuple[str, float]:
    """Return the name and the value of the validation figure that chose a run's checkpoint, higher being better.

    Args:
        root: folder of the runs.
        name: of the run.

    Raises:
        SistaError: it has not ended, or is one whose checkpoint was chosen by a loss.
    """
    for run in reversed(runs.runs_of(root, name)):
        if (run / "metrics.json").is_file():
            told = json.loads((run / "metrics.json").read_text())
            monitor, score = str(told["monitor"]), (told["best"] or {}).get("score")
            if "loss" in monitor or score is None:
                raise SistaError(f"tune: {name} was chosen by {monitor} = {score}; give a task that has a figure")
            return monitor, float(score)
    raise SistaError(f"tune: {name} has not ended under {root}; run the sweep")


def best(scores: Mapping[int, float]) -> int:
    """Return the setting of the highest score, the first of equal ones."""
    return max(scores, key=lambda setting: (scores[setting], -setting))
