"""Zero-shot classification: an image is compared with texts that say a finding is there, and that it is not.

B images, K classes, D joint dimension.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sista_tasks.classification.pictures import draw_cases, draw_curves
from sista_tasks.zeroshot.prompts import ensembles
from torch import Tensor
from torch.nn import functional as F

from sista_pl.errors import SistaError
from sista_pl.evaluation import EvaluationTask
from sista_pl.metrics.classification import Classification
from sista_pl.predictions import Predicted


class ZeroShotTask(EvaluationTask):
    """Findings of an image without a label, asked for in words.

    Each class has an ensemble of positive and one of negative prompts; the mean of the normalised embeddings of an
    ensemble, normalised again, stands for it (as in CLIP; Radford et al. 2021). The score of a class is the softmax
    over its pair, exp(s cos⁺) / (exp(s cos⁺) + exp(s cos⁻)) with the logit scale s of the pre-training (as in CheXzero;
    Tiu et al. 2022): each class is a question of its own, and 0.5 is where both are equally near. A class without a
    positive or a negative image in the split is named and left out of the means.

    Args:
        weights: checkpoint of the pre-training, see `EvaluationTask`.
        prompts: by class `{positive: ["{severity} effusion"], severity: [small, large], negative: [no effusion]}`;
            each word of a place gives a prompt. Where not given, the packaged ones: the labels of CheXpert, MIMIC-CXR,
            ChestX-ray14, RSNA, SIIM and COVIDx.
        draws: bootstrap resamples of the intervals.
    """

    targets = ("labels",)
    monitor = "val/auroc_macro"

    def __init__(self, weights: str | None = None, prompts: dict[str, Any] | None = None, draws: int = 1000):
        super().__init__(weights, draws)
        self.prompts = prompts or {}
        self.classes: list[str] = []
        self.directions: Tensor
        self.register_buffer("directions", torch.zeros(0, 0), persistent=False)  # K D, of positive less negative
        self.save_hyperparameters()
        self.build()

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = self.trainer.datamodule
        self.classes = list(data.classes or data.wanted_labels or self.prompts)
        if not self.classes:
            raise SistaError("data: no classes for data.inputs; give data.labels, as [Edema, Pleural Effusion]")
        pairs = [(pair.positive, pair.negative) for pair in ensembles(self.classes, self.prompts)]
        self.directions = torch.stack([self._mean(positive) - self._mean(negative) for positive, negative in pairs])

    def _mean(self, texts: list[str]) -> Tensor:
        """Return the (D,) unit vector of an ensemble."""
        return F.normalize(F.normalize(self.joint.encode_text(texts).pooled.float(), dim=1).mean(0), dim=0)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Return logits (B, K), s (cos⁺ - cos⁻)."""
        pooled = self.joint.encode_image(batch["image"]).pooled
        with torch.autocast(pooled.device.type, enabled=False):  # half precision would tie scores
            return self.joint.scale * F.normalize(pooled.float(), dim=1) @ self.directions.T

    def outputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"rows": batch["index"], "values": self(batch)}

    @staticmethod
    def scores(logits: np.ndarray) -> np.ndarray:
        """Return scores in [0, 1], in float64: float32 would round those near 1 to ties."""
        return 1 / (1 + np.exp(-logits.astype(np.float64)))

    def family(self, found: Predicted, stage: str) -> Classification:
        truth = self.trainer.datamodule.labels[found.rows]
        return Classification(truth, self.scores(found.values), self.classes)

    def table(self, found: Predicted) -> dict[str, list[Any]]:
        truth, scores = self.trainer.datamodule.labels[found.rows], self.scores(found.values)
        columns: dict[str, list[Any]] = {}
        for k, name in enumerate(self.classes):
            columns |= {f"truth_{name}": truth[:, k].tolist(), f"score_{name}": scores[:, k].tolist()}
        return columns

    def draw(self, found: Predicted, family: Any, folder: Path, notice: str) -> None:
        data = self.trainer.datamodule
        truth, scores = data.labels[found.rows], self.scores(found.values)
        draw_curves(truth, scores, self.classes, folder / "curves.png", notice)
        draw_cases(data.store, found.rows, truth, scores, self.classes, folder / "cases.png", notice)

    def predict_step(self, batch: dict[str, Any], index: int) -> dict[str, Any]:
        logits = self(batch) if len(batch["index"]) else torch.zeros(0, len(self.classes))
        return {"index": batch["index"], "logits": logits.cpu(), "bad": batch.get("bad", [])}

    def prediction_table(self, batch: dict[str, Any]) -> pd.DataFrame:
        table = pd.DataFrame({"image": self.image_names(batch["index"].tolist())})
        scores = self.scores(batch["logits"].numpy())
        return table.assign(**{f"score_{name}": scores[:, k] for k, name in enumerate(self.classes)})
