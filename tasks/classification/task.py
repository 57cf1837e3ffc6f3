"""Classification of findings by a linear probe on a frozen encoder, or by fine-tuning all of it.

B images, K classes, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning.utilities import rank_zero_info
from sista_tasks.classification.probe import fit_probe
from torch import Tensor, nn

from sista_pl.errors import SistaError, did_you_mean
from sista_pl.features import cached
from sista_pl.metrics.classification import Classification, best_thresholds
from sista_pl.predictions import Predicted
from sista_pl.task import Step
from sista_pl.transfer import TransferTask

KINDS = ("multilabel", "binary", "multiclass")


class ClassificationTask(TransferTask):
    """Findings of an image.

    Frozen, it is a linear probe: features are computed once and kept beside the store. `protocol: standard` then fits
    a logistic regression whose strength is chosen on validation; `protocol: mgca` trains a linear layer by AdamW on
    the same features. Not frozen, the encoder is fine-tuned with the layer.

    Args:
        num_classes: K; has to be the number of the data group's labels.
        kind: `multilabel` (K questions, NaN is unknown), `binary` (one question), or `multiclass` (one of K).
        losses: `{labels: {name: bce}}` where not given, `cross_entropy` for `multiclass`.
        cache: whether a frozen encoder sees each image once instead of once an epoch.
        kwargs: see `TransferTask`.
    """

    target = "labels"

    def __init__(
        self,
        num_classes: int,
        kind: str = "multilabel",
        losses: Mapping[str, Any] | None = None,
        cache: bool = True,
        **kwargs: Any,
    ):
        if kind not in KINDS:
            raise SistaError(f"model: kind is {kind!r}; {did_you_mean(kind, KINDS)}")
        if num_classes < (2 if kind == "multiclass" else 1) or (kind == "binary" and num_classes != 1):
            raise SistaError(f"model: num_classes is {num_classes} for {kind}; binary has 1, multiclass 2 or more")
        usual = "cross_entropy" if kind == "multiclass" else "bce"
        super().__init__(losses or {"labels": {"name": usual}}, **kwargs)
        self.num_classes, self.kind, self.cache = num_classes, kind, cache and self.frozen
        self.solved = self.frozen and self.protocol == "standard"
        if self.solved and not cache:
            raise SistaError("model: protocol standard fits on kept features; set cache: true, or protocol: mgca")
        self.save_hyperparameters()
        self.monitor = "val/accuracy" if kind == "multiclass" else "val/auroc_macro"
        self.build()

    def configure_head(self) -> None:
        self.head = nn.Linear(self.image_encoder.dim, self.num_classes)
        # chosen on validation, kept in the checkpoint, used by the test
        self.register_buffer("thresholds", torch.full((self.num_classes,), 0.5))

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.check_classes(self.num_classes, "labels")

    # --- the probe -------------------------------------------------------------

    def on_fit_start(self) -> None:
        self._keep_features("train", "val")

    def on_test_start(self) -> None:
        self._keep_features("test")

    def on_validation_start(self) -> None:
        if not self.trainer.training:
            self._keep_features("val")

    def _keep_features(self, *splits: str) -> None:
        """Encode the images of these splits once; from then on the loaders give vectors instead of images."""
        data = self.trainer.datamodule
        if self.cache and data.kept.features is None:
            rows = np.concatenate([data.rows[split] for split in splits])
            data.kept.features = cached(self.image_encoder, data.store, rows, data.crop, max(32, data.batch_size))

    def on_train_epoch_start(self) -> None:
        if self.solved:
            self._solve()

    def on_train_epoch_end(self) -> None:
        if self.solved:
            self.trainer.should_stop = True  # nothing is left to learn

    def _solve(self) -> None:
        data = self.trainer.datamodule
        train, val = data.rows["train"], data.rows["val"]

        def worth(weight: np.ndarray, bias: np.ndarray) -> float:
            scores = self._scores(torch.from_numpy(data.kept.features[val] @ weight.T + bias)).numpy()
            figures = Classification(data.labels[val], scores, data.classes, self.kind).figures()
            return figures.get(self.monitor.removeprefix("val/"), -np.inf)

        weight, bias, strength = fit_probe(
            data.kept.features[train], data.labels[train], self.kind == "multiclass", worth
        )
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(weight))
            self.head.bias.copy_(torch.from_numpy(bias))
        rank_zero_info(f"linear probe: {len(train)} images, C = {strength:g} chosen on {len(val)} validation images")

    def configure_optimizers(self):
        # the solver has set the layer: an optimizer that moves nothing, since Lightning keeps no checkpoint without one
        return torch.optim.SGD(self.head.parameters(), lr=0.0) if self.solved else super().configure_optimizers()

    # --- the step --------------------------------------------------------------

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Return logits (B, K)."""
        features = batch["features"] if "features" in batch else self.encode(batch["image"]).pooled
        return self.head(features)

    def step(self, batch: dict[str, Any]) -> Step:
        logits = self(batch)
        losses = {name: loss(logits, batch["labels"])[0] for name, loss in self.losses.items()}
        return Step(losses, {}, {"rows": batch["index"], "values": self._scores(logits)}, len(batch["index"]))

    def _scores(self, logits: Tensor) -> Tensor:
        logits = logits.detach().float()
        return logits.softmax(1) if self.kind == "multiclass" else logits.sigmoid()

    def family(self, found: Predicted, stage: str) -> Classification:
        data = self.trainer.datamodule
        truth = data.labels[found.rows]
        if stage == "val" and self.kind != "multiclass":
            self.thresholds.copy_(torch.from_numpy(best_thresholds(truth, found.values)))
        return Classification(truth, found.values, data.classes, self.kind, self.thresholds.cpu().numpy())

    # --- what a test and a prediction leave -------------------------------------

    def table(self, found: Predicted) -> dict[str, list[Any]]:
        data = self.trainer.datamodule
        truth = data.labels[found.rows]
        columns: dict[str, list[Any]] = {}
        for k, name in enumerate(data.classes):
            columns[f"truth_{name}"] = truth[:, k].tolist()
            columns[f"score_{name}"] = found.values[:, k].tolist()
        return columns

    def draw(self, found: Predicted, family: Any, folder: Path, notice: str) -> None:
        from sista_tasks.classification.pictures import draw_cases, draw_curves

        data = self.trainer.datamodule
        truth = data.labels[found.rows]
        draw_curves(truth, found.values, data.classes, folder / "curves.png", notice)
        draw_cases(data.store, found.rows, truth, found.values, data.classes, folder / "cases.png", notice)

    def predict_step(self, batch: dict[str, Any], index: int) -> dict[str, Any]:
        scores = self._scores(self(batch)) if len(batch["index"]) else torch.zeros(0, self.num_classes)
        return {"index": batch["index"], "scores": scores.cpu(), "bad": batch.get("bad", [])}

    def prediction_table(self, batch: dict[str, Any]) -> pd.DataFrame:
        names = self.classes or [str(k) for k in range(self.num_classes)]
        table = pd.DataFrame({"image": self.image_names(batch["index"].tolist())})
        for k, name in enumerate(names):
            table[f"score_{name}"] = batch["scores"][:, k].numpy()
        return table
