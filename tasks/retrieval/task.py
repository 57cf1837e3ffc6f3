"""Retrieval: which report belongs to an image, which image to a report, and do the nearest reports say the same?

N pairs of the pool, B of a batch, D joint dimension, K findings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from sista_pl.data.findings import KINDS, NO_FINDING, extract_findings
from sista_pl.errors import SistaError, did_you_mean
from sista_pl.evaluation import EvaluationTask
from sista_pl.metrics.bootstrap import percentiles
from sista_pl.metrics.retrieval import RANKS, WAYS, RetrievalFigures, best_ranks, chance, draw, precision_at
from sista_pl.predictions import Predicted, Predictions

NEAREST = 5  # reports that a prediction names


class Pool(Predictions):
    """Predictions of a pool of pairs, drawn by a fixed seed from the split.

    Args:
        pool: pairs in it; all where None.
    """

    def __init__(self, pool: int | None = None):
        super().__init__()
        self.pool = pool

    def compute(self) -> Predicted:
        found = super().compute()
        keep = draw(len(found.rows), self.pool or len(found.rows), 0).numpy()
        return Predicted(found.rows[keep], found.values[keep], found.items, found.of)


class RetrievalTask(EvaluationTask):
    """Image and report found by each other among the pairs of a split.

    Recall at 1, 5 and 10 both ways, and the median rank; any image or report of an equal text is a hit. Chance is the
    mean of 100 permutations, who looks for whose report, and its interval the band of 95 % of them. Precision at k by
    finding asks for less than the very report: of the images whose report states a finding, which share of the k
    nearest reports, the own study's left out, states it too? What a report states are the findings that are read from
    it by rules (`sista_pl.data.findings`), neither denied nor doubtful; one that states none has "no finding".

    Args:
        weights: checkpoint of the pre-training, see `EvaluationTask`.
        pool: pairs that are searched, drawn by a fixed seed; all of the split where not given. Recall falls with it.
        k: of the precision.
        findings: which ones, as `[effusion, no finding]`; those that at least `rare` pairs state where not given.
        rare: see there.
        draws: bootstrap resamples of the intervals.
    """

    targets = ("pairs",)
    monitor = "val/R_mean"

    def __init__(
        self,
        weights: str | None = None,
        pool: int | None = None,
        k: int = 10,
        findings: list[str] | None = None,
        rare: int = 10,
        draws: int = 1000,
    ):
        super().__init__(weights, draws)
        for name, value, least in (("pool", pool, 2), ("k", k, 1), ("rare", rare, 1)):
            if value is not None and value < least:
                raise SistaError(f"model: {name} is {value}; give at least {least}")
        for finding in findings or []:
            if finding not in (*KINDS, NO_FINDING):
                raise SistaError(f"model: findings: unknown {finding!r}; {did_you_mean(finding, (*KINDS, NO_FINDING))}")
        self.pool, self.k, self.findings, self.rare = pool, k, findings, rare
        self.chances: dict[str, np.ndarray] = {}  # of each recall, one value a permutation
        self.save_hyperparameters()
        self.build()

    def configure_metrics(self) -> None:
        self.val_predictions, self.test_predictions = Pool(self.pool), Pool(self.pool)
        self.metrics = {"val": self.val_predictions, "test": self.test_predictions}

    def embed(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the unit vectors (B, D) of a batch's images and reports."""
        reports = [self.trainer.datamodule.reports[i] for i in batch["report"].tolist()]
        image, text = self.joint.encode_image(batch["image"]).pooled, self.joint.encode_text(reports).pooled
        return F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=1)

    def outputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"rows": batch["index"], "values": torch.cat(self.embed(batch), 1)}

    # --- the figures -------------------------------------------------------------

    def scores(self, found: Predicted) -> Tensor:
        """Return the cosines (N, N), image by report."""
        image, text = torch.from_numpy(found.values).chunk(2, 1)
        return image @ text.T

    def stated(self, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Return (N, K) which findings the reports of these rows state, and their names."""
        data = self.trainer.datamodule
        each = []
        for report in data.report_ids[rows]:
            kinds = {
                finding.kind for finding in extract_findings(data.reports[report]) if finding.polarity == "present"
            }
            each.append(kinds or {NO_FINDING})
        names = self.findings or [*KINDS, NO_FINDING]
        return np.array([[name in kinds for name in names] for kinds in each]).reshape(len(rows), len(names)), names

    def family(self, found: Predicted, stage: str) -> RetrievalFigures:
        data, scores = self.trainer.datamodule, self.scores(found)
        report = torch.from_numpy(data.report_ids[found.rows])
        positive = report[:, None] == report[None]
        ranks = {
            way: best_ranks(matrix, positive).numpy() for way, matrix in zip(WAYS, (scores, scores.T), strict=True)
        }
        self.chances = {
            f"{way}_R@{k}_chance": chance(matrix, report, k, 100, 0).numpy()
            for way, matrix in zip(WAYS, (scores, scores.T), strict=True) for k in RANKS
        }  # fmt: skip
        stated, names = self.stated(found.rows)
        common = stated.sum(0) >= (1 if self.findings else self.rare)
        study = pd.factorize(data.store.manifest["study_id"].to_numpy()[found.rows])[0]
        precision, random, _ = precision_at(scores, stated[:, common], study, self.k)
        kept = [name for name, there in zip(names, common, strict=True) if there]
        family = RetrievalFigures(ranks, precision, random, kept, self.k)
        seen = stated.sum(0) > 0
        few = [name for name, there, any_ in zip(names, common, seen, strict=True)
               if not there and (any_ or self.findings)]  # fmt: skip
        if few:
            family.absent.append(f"stated by too few of {len(stated)} reports for a precision: {', '.join(few)}")
        return family

    def figures(self, stage: str) -> dict[str, float]:
        found = dict(super().figures(stage))
        return found | {name: float(values.mean()) for name, values in self.chances.items()}

    def report(self, stage: str) -> dict[str, Any]:
        """Return the figures with their intervals, and chance with the band of its permutations."""
        told, size = super().report(stage), len(self.predicted.rows) if self.predicted else 0
        for name, values in self.chances.items() if told else ():
            told[f"test/{name}"] = {"value": float(values.mean()), "interval95": percentiles(values), "n": size}
        return told

    # --- what a test and a prediction leave --------------------------------------

    def table(self, found: Predicted) -> dict[str, list[Any]]:
        family = self.family(found, "test")
        columns: dict[str, list[Any]] = {f"rank_{way}": ranks.tolist() for way, ranks in family.ranks.items()}
        for c, name in enumerate(family.names):
            columns[f"precision@{self.k}/{name}"] = family.precision[:, c].tolist()
            columns[f"random@{self.k}/{name}"] = family.random[:, c].tolist()
        return columns

    def draw(self, found: Predicted, family: Any, folder: Path, notice: str) -> None:
        from sista_tasks.retrieval.pictures import draw_nearest

        draw_nearest(self, found, family, folder / "nearest.png", notice)

    def nearest(self, scores: Tensor, found: Predicted, count: int = NEAREST) -> np.ndarray:
        """Return (N, count) places of the nearest reports of different texts."""
        report = self.trainer.datamodule.report_ids[found.rows]
        _, first = np.unique(report, return_index=True)
        order = scores[:, first].topk(min(count, len(first)), dim=1).indices.numpy()
        return first[order]

    def predict_step(self, batch: dict[str, Any], index: int) -> dict[str, Any]:
        image, text = self.embed(batch)
        return {"index": batch["index"].cpu(), "values": torch.cat([image, text], 1).cpu()}

    def prediction_tables(self, batches: Sequence[dict[str, Any]]) -> dict[str, pd.DataFrame]:
        """Return for each image the nearest reports of the split, named by an image they belong to."""
        rows, values = (torch.cat([batch[key] for batch in batches]).numpy() for key in ("index", "values"))
        rows, first = np.unique(rows, return_index=True)
        found = Predicted(rows, values[first], np.zeros((0, 0)), np.zeros(0, int))
        scores = self.scores(found)
        places, names = self.nearest(scores, found), self.trainer.datamodule.store.manifest["image_id"].to_numpy()[rows]
        table = pd.DataFrame({"image": names})
        for i, place in enumerate(places.T, 1):
            table[f"report_{i}"] = names[place]
            table[f"cosine_{i}"] = scores[np.arange(len(rows)), place].numpy()
        return {"predictions": table}
