"""Tasks whose test gathers what was said of each image, and states figures with intervals by patient.

B images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from pytorch_lightning.utilities import rank_zero_info

from sista_pl.atomic import writing
from sista_pl.errors import SistaError
from sista_pl.metrics.bootstrap import intervals
from sista_pl.predictions import Predicted, Predictions
from sista_pl.task import BaseTask


class Family(Protocol):
    """Figures of a set of predictions, as functions of the images' weights; `sista_pl.metrics`."""

    def figures(self, weights: np.ndarray | None = None) -> dict[str, float]: ...


class MeasuredTask(BaseTask):
    """A task with predictions by image: figures with intervals, predictions.parquet, pictures, `sista predict`.

    A subclass defines `family`, `table` and `prediction_table`.

    Args:
        losses, lr, weight_decay, warmup: see `BaseTask`.
        draws: bootstrap resamples of the test's intervals.
    """

    width = 0  # columns of `Predicted.items`
    mode = "max"

    def __init__(
        self,
        losses: Mapping[str, Any],
        lr: float = 5e-4,
        weight_decay: float = 1e-6,
        warmup: float = 0.0,
        draws: int = 1000,
    ):
        super().__init__(losses, lr, weight_decay, warmup)
        self.draws = draws
        self.intervals: dict[str, Any] = {}
        self.predicted: Predicted | None = None

    def configure_metrics(self) -> None:
        self.val_predictions, self.test_predictions = Predictions(self.width), Predictions(self.width)
        self.metrics = {"val": self.val_predictions, "test": self.test_predictions}

    # --- hooks -----------------------------------------------------------------

    def family(self, found: Predicted, stage: str) -> Family:
        """Return the figures of these predictions."""
        raise NotImplementedError("a task defines family(found, stage)")

    def table(self, found: Predicted) -> dict[str, list[Any]]:
        """Return the columns of predictions.parquet beyond image_id and patient_id, one value an image of `found`."""
        raise NotImplementedError("a task defines table(found)")

    def draw(self, found: Predicted, family: Any, folder: Path, notice: str) -> None:
        """Write pictures of the test into the folder; `notice` belongs on each of them."""

    # --- what is the same in all of them ---------------------------------------

    def figures(self, stage: str) -> Mapping[str, float]:
        found = self.metrics[stage].compute()
        if not np.isfinite(found.values).all():
            raise SistaError(f"{stage}: the model predicts NaN; lower model.lr, or set trainer.precision to 32-true")
        family = self.family(found, stage)
        figures = family.figures()
        if stage == "test":
            self.predicted = found
            if self.trainer.is_global_zero:
                patients = self.trainer.datamodule.store.manifest["patient_id"].to_numpy()[found.rows]
                self.intervals = intervals(family.figures, patients, draws=self.draws)
        elif self.monitor.removeprefix("val/") not in figures and not self.trainer.sanity_checking:
            why = "; ".join(getattr(family, "absent", [])) or "nothing to measure"
            raise SistaError(f"data: {self.monitor} is not defined on the validation split ({why}); give more data")
        for line in getattr(family, "absent", []):
            rank_zero_info(f"{stage}: {line}")
        return figures

    def report(self, stage: str) -> dict[str, Any]:
        return {f"test/{name}": value for name, value in self.intervals.items()} if stage == "test" else {}

    def write_test(self, folder: Path, notice: str) -> list[Path]:
        """Write predictions.parquet (ids, truth, scores, one row an image) and pictures of the test."""
        assert self.predicted is not None
        found, manifest = self.predicted, self.trainer.datamodule.store.manifest
        ids = {name: manifest[name].to_numpy()[found.rows] for name in ("image_id", "patient_id")}
        table = folder / "predictions.parquet"
        with writing(table) as partial:
            pd.DataFrame({**ids, **self.table(found)}).to_parquet(partial, index=False)
        self.draw(found, self.family(found, "test"), folder / "pictures", notice)
        return [table, *sorted((folder / "pictures").glob("*.png"))]

    def image_names(self, rows: Sequence[int]) -> list[str]:
        """Return the image ids of a prediction's rows: of the store, or the files of `data.inputs`."""
        data = self.trainer.datamodule
        if data.files:
            return [str(data.files[row]) for row in rows]
        return data.store.manifest["image_id"].to_numpy()[np.asarray(rows, int)].tolist()

    def original_sizes(self, batch: dict[str, Any]) -> list[tuple[int, int]]:
        """Return width and height in pixels of the upright originals of a batch of `predict_step`."""
        if "original_size" in batch:
            return [(int(width), int(height)) for width, height in batch["original_size"]]
        manifest = self.trainer.datamodule.store.manifest
        rows = batch["index"].cpu().numpy()
        return list(
            zip(manifest["width"].to_numpy()[rows].tolist(), manifest["height"].to_numpy()[rows].tolist(), strict=True)
        )

    def prediction_tables(self, batches: Sequence[dict[str, Any]]) -> dict[str, pd.DataFrame]:
        """Return the tables of `sista predict`: a row an image, and the files that could not be read."""
        tables = {"predictions": pd.concat([self.prediction_table(batch) for batch in batches], ignore_index=True)}
        if self.trainer.datamodule.files:
            bad = [(*self.image_names([row]), why) for batch in batches for row, why in batch["bad"]]
            tables["unreadable"] = pd.DataFrame(bad, columns=["image", "why"])
        return tables

    def prediction_table(self, batch: dict[str, Any]) -> pd.DataFrame:
        """Return the rows of one batch of `predict_step`: `image` and the predictions, in pixels of the original."""
        raise NotImplementedError("a task defines prediction_table(batch)")
