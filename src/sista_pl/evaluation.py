"""The base of the tasks that evaluate a pre-trained image-text encoder as it is: nothing is trained.

B images, V values an image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sista_pl.embed import preparation
from sista_pl.errors import SistaError
from sista_pl.joint import load_joint
from sista_pl.measured import MeasuredTask


class EvaluationTask(MeasuredTask):
    """What both encoders of a pre-training are worth without further training, with intervals by patient.

    `sista test --config NAME --model.weights CHECKPOINT` makes a run of its own; `sista fit` is refused.
    A subclass says what data it takes in `targets`, embeds its texts in `configure_texts`, and defines `outputs`,
    `family`, `table` and `prediction_table`.

    Args:
        weights: checkpoint of `sista fit --config pretrain.yaml`: both encoders and both projections.
        draws: bootstrap resamples of the intervals.
    """

    trains = False
    targets: tuple[str, ...] = ("labels",)  # of the data group; `PairDataModule` gives "pairs"

    def __init__(self, weights: str | None = None, draws: int = 1000):
        super().__init__({}, draws=draws)
        if not weights:
            raise SistaError(
                f"model: {type(self).__name__} needs a pre-training; give --model.weights "
                "runs/pretrain/0001/checkpoints/best.ckpt"
            )
        if Path(weights).is_dir() or Path(weights).suffix == ".safetensors":
            raise SistaError(
                f"model: weights {weights} holds an image encoder alone; both encoders are in a checkpoint of the "
                "pre-training, checkpoints/best.ckpt"
            )
        self.joint = load_joint(weights)
        self.how = preparation(weights, self.joint.image_size)

    def configure_models(self) -> None:
        self.configure_texts()
        self.train(False)

    def configure_texts(self) -> None:
        """Embed the texts that images are compared with, by `self.joint`, as buffers."""

    def train(self, mode: bool = True) -> EvaluationTask:
        nn.Module.train(self, False)
        return self

    def outputs(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return what `Predictions.update` takes of a batch: `rows` (B,) and `values` (B, V)."""
        raise NotImplementedError("an evaluation task defines outputs(batch)")

    def setup(self, stage: str) -> None:
        data, name = self.trainer.datamodule, type(self).__name__
        if stage == "fit":
            raise SistaError(f"{name}: it evaluates a pre-trained encoder, there is nothing to fit; test it")
        given = getattr(data, "target", "pairs")
        if given not in self.targets:
            how = "use PairDataModule" if "pairs" in self.targets else f"set data.target: {self.targets[0]}"
            raise SistaError(f"data: {name} needs {' or '.join(self.targets)}, the data group gives {given}; {how}")
        if data.crop != self.joint.image_size:
            raise SistaError(
                f"data: crop is {data.crop}, but the encoder was pre-trained on images of {self.joint.image_size} px; "
                f"set data.crop: {self.joint.image_size}, and data.size and data.store to what it was trained with"
            )
        if self.how.of_run and data.size != self.how.size:
            raise SistaError(
                f"data: size is {data.size}, but the films of the pre-training had {self.how.size} px, of which the "
                f"encoder saw the middle {self.how.crop}; set data.size: {self.how.size}, and data.store to such a one"
            )

    def _run(self, stage: str, batch: dict[str, Any]) -> Tensor:
        self.metrics[stage].update(**self.outputs(batch))
        return torch.zeros(())
