"""The base of the downstream tasks: a pre-trained encoder, a head, and figures with intervals.

B images, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from sista_pl.errors import SistaError, did_you_mean
from sista_pl.metrics.bootstrap import intervals
from sista_pl.models import IMAGE_ENCODERS
from sista_pl.predictions import Predicted, Predictions
from sista_pl.registry import Spec
from sista_pl.task import BaseTask
from sista_pl.weights import encoder_spec, load_weights

PROTOCOLS = ("standard", "mgca")


class Family(Protocol):
    """Figures of a set of predictions, as functions of the images' weights; `sista_pl.metrics`."""

    def figures(self, weights: np.ndarray | None = None) -> dict[str, float]: ...


class TransferTask(BaseTask):
    """A downstream task on a pre-trained image encoder.

    A subclass sets `target`, builds its head in `configure_head` and defines `step`, `family` and `table`.

    Args:
        losses: components by name, see `BaseTask`.
        image_encoder: a timm name, `hf:FOLDER_OR_HUB_ID` or `{name: …}`; null takes what `weights` holds.
        weights: pre-trained weights of the encoder: a checkpoint of `sista fit`, an exported folder, a timm or
            torchvision file, or `{path: FILE, prefix: backbone., preset: mgca | gloria}`; null starts at random.
        frozen: whether the encoder stays as it is, its batch statistics included.
        protocol: `standard`, or `mgca` for the published one with its defects.
        image_size: side of the encoder's input in pixels; the data group's crop.
        lr: peak learning rate of what is trained.
        weight_decay: on matrices and kernels.
        warmup: share of all steps.
        draws: bootstrap resamples of the test's intervals.
    """

    target = "labels"  # of `TransferDataModule`, and what the losses look at
    width = 0  # columns of `Predicted.items`
    mode = "max"

    def __init__(
        self,
        losses: Mapping[str, Any],
        image_encoder: str | dict[str, Any] | None = None,
        weights: str | dict[str, Any] | None = None,
        frozen: bool = True,
        protocol: str = "standard",
        image_size: int = 224,
        lr: float = 5e-4,
        weight_decay: float = 1e-6,
        warmup: float = 0.0,
        draws: int = 1000,
    ):
        super().__init__(losses, lr, weight_decay, warmup)
        if protocol not in PROTOCOLS:
            raise SistaError(f"model: protocol is {protocol!r}; {did_you_mean(protocol, PROTOCOLS)}")
        self.encoder_weights, self.frozen, self.protocol = weights, frozen, protocol
        self.image_size, self.draws = image_size, draws
        encoder = image_encoder or (encoder_spec(weights) if weights else None)
        if encoder is None:
            raise SistaError("model: image_encoder is not set, and weights do not say which it is; give both")
        self.encoder: Spec = encoder
        self.intervals: dict[str, Any] = {}
        self.predicted: Predicted | None = None

    def build(self) -> None:
        super().build()
        self.hparams.image_encoder = self.encoder
        self.train()

    def configure_models(self) -> None:
        self.image_encoder = IMAGE_ENCODERS.build(self.encoder, image_size=self.image_size)
        if self.frozen:
            self.image_encoder.requires_grad_(False)
        self.configure_head()

    def configure_head(self) -> None:
        """Build what stands on the encoder."""
        raise NotImplementedError("a transfer task builds its head in configure_head()")

    def configure_metrics(self) -> None:
        self.val_predictions, self.test_predictions = Predictions(self.width), Predictions(self.width)
        self.metrics = {"val": self.val_predictions, "test": self.test_predictions}

    # --- hooks -----------------------------------------------------------------

    def family(self, found: Predicted, stage: str) -> Family:
        """Return the figures of these predictions."""
        raise NotImplementedError("a transfer task defines family(found, stage)")

    def table(self, found: Predicted) -> dict[str, list[Any]]:
        """Return the columns of predictions.parquet beyond image_id and patient_id, one value an image of `found`."""
        raise NotImplementedError("a transfer task defines table(found)")

    def draw(self, found: Predicted, family: Any, folder: Path, notice: str) -> None:
        """Write pictures of the test into the folder; `notice` belongs on each of them."""

    # --- what is the same in all of them ---------------------------------------

    def train(self, mode: bool = True) -> TransferTask:
        super().train(mode)
        if self.frozen and hasattr(self, "image_encoder"):
            self.image_encoder.eval()  # frozen batch statistics, too
        return self

    def encode(self, image: Tensor):
        """(B, 1, H, W) → `Features`, without a graph where the encoder is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.image_encoder(image)

    def pyramid(self, image: Tensor) -> list[Tensor]:
        """(B, 1, H, W) → the encoder's maps, without a graph where it is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.image_encoder.pyramid(image)

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        if getattr(data, "target", None) != self.target:
            raise SistaError(
                f"data: {type(self).__name__} needs {self.target}, the data group gives "
                f"{getattr(data, 'target', 'image-report pairs')}; set data.target: {self.target}"
            )
        if data.crop != self.image_size:
            raise SistaError(
                f"model: image_size is {self.image_size} but the data group crops to {data.crop}; set both alike"
            )
        if stage == "fit" and self.trainer.ckpt_path is None:
            if self.encoder_weights:
                rank_zero_info(str(load_weights(self.image_encoder, self.encoder_weights)))
            elif getattr(self.image_encoder, "weights", "none") in ("none", ""):
                rank_zero_info("image encoder: random initialisation")

    def check_classes(self, count: int, what: str) -> None:
        """Refuse a number of classes that is not the data group's; `what` it calls them.

        Raises:
            SistaError: the two disagree.
        """
        classes = self.trainer.datamodule.classes
        if classes and len(classes) != count:
            raise SistaError(
                f"model: num_classes is {count}, the data group has {len(classes)} {what} "
                f"({', '.join(classes[:6])}{' …' if len(classes) > 6 else ''}); set both alike"
            )

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
        pd.DataFrame({**ids, **self.table(found)}).to_parquet(table, index=False)
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
        raise NotImplementedError("a transfer task defines prediction_table(batch)")
