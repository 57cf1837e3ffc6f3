"""What a perfect reader would score: the upper bound of retrieval on a phantom.

N studies, A distinct statements.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sista_pl.data.phantom.report import Report, stated
from sista_pl.data.phantom.study import NORMAL, Study

# Against the information (in nats) of a statement that is true: one that is false, and one that could have been made.
_CONTRADICTION = 6.0
_OMISSION = 0.9


def oracle_scores(studies: Sequence[Study], reports: Sequence[Report]) -> np.ndarray:
    """Score every image against every report, from drawn attributes and stated ones alone.

    A true statement counts by how rare it is, a false one against the pair, and so does a finding of the image
    about which the report is silent.

    Args:
        studies: N, what each image shows.
        reports: N, the report of each study.

    Returns:
        (N, N) rows are images, columns are reports.
    """
    shown = [study.attributes() for study in studies]
    said = [stated(study, report) for study, report in zip(studies, reports, strict=True)]
    names = sorted(frozenset().union(*shown))
    column = {name: i for i, name in enumerate(names)}
    drawn, states = (np.zeros((len(studies), len(names))) for _ in range(2))
    for matrix, rows in ((drawn, shown), (states, said)):
        for i, row in enumerate(rows):
            matrix[i, [column[name] for name in row]] = 1
    share = drawn.mean(0)
    weight = np.log(1 / np.clip(share, 1 / len(studies), 1))
    abnormal = np.array([name.partition("=")[2] not in NORMAL and not name.startswith("view=") for name in names])
    right = drawn @ (states * weight).T
    wrong = (1 - drawn) @ states.T
    silent = (drawn * abnormal) @ (1 - states).T
    return right - _CONTRADICTION * wrong - _OMISSION * silent


def recall_at(scores: np.ndarray, texts: Sequence[str], k: int = 10) -> float:
    """Recall@k from image to report, where equal texts count as right and equal scores in expectation.

    Args:
        scores: (N, N) images × reports.
        texts: N; text i is the report of image i.
        k: how many reports are looked at.

    Returns:
        mean probability that at least one of the k best is right, ties broken at random.
    """
    texts_of = np.array(texts, dtype=object)
    hits = []
    for i, row in enumerate(scores):
        positive = texts_of == texts_of[i]
        best = row[positive].max()
        above, level = int((row > best).sum()), row == best
        right, tied, room = int((level & positive).sum()), int(level.sum()), k - above
        hits.append(0.0 if room <= 0 else _at_least_one(tied, right, min(room, tied)))
    return float(np.mean(hits))


def _at_least_one(tied: int, right: int, drawn: int) -> float:
    """Probability that `drawn` of `tied` without replacement hold one of `right`."""
    miss = 1.0
    for i in range(drawn):
        miss *= max(tied - right - i, 0) / (tied - i)
    return 1 - miss
