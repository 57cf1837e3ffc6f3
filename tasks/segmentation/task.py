"""Segmentation: a decoder on the encoder's maps, one object class.

B images, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning.utilities import rank_zero_info
from sista_tasks.segmentation.decoders import DECODERS, Linear
from sista_tasks.segmentation.ridge import fit
from torch import Tensor

from sista_pl.data.images import film, unfit_mask
from sista_pl.data.masks import encode_rle
from sista_pl.metrics.segmentation import Segmentation
from sista_pl.models.image import freeze_unreached
from sista_pl.predictions import Predicted
from sista_pl.task import Step
from sista_pl.transfer import TransferTask

THRESHOLD = 0.5


class SegmentationTask(TransferTask):
    """Where an object is, as a mask; pixels of 127 in the truth count nowhere.

    Args:
        decoder: `unet`, `unetplusplus` or `fpn` on convolutional encoders, `dpt` or `setr_pup` on vision
            transformers, `linear`, a probe, on both; or with arguments, as
            `{name: unet, channels: [256, 128, 64, 32, 16]}`. `linear` on a frozen encoder under `protocol: standard`
            is not trained but solved: ridge regression, its strength and threshold chosen on validation.
        losses: `{mask: {name: dice_bce}}` where not given; `focal_logdice` under `protocol: mgca`.
        kwargs: see `TransferTask`.
    """

    target = "mask"
    monitor = "val/dice_positive"
    width = 2  # items: first pixel and length of a run of the predicted mask, column by column

    def __init__(self, decoder: str | dict[str, Any] = "unet", losses: Mapping[str, Any] | None = None, **kwargs: Any):
        usual = "focal_logdice" if kwargs.get("protocol") == "mgca" else "dice_bce"
        super().__init__(losses or {"mask": {"name": usual}}, **kwargs)
        self.decoder_spec = decoder
        self.save_hyperparameters()
        if self.protocol == "mgca":
            self.monitor = "val/dice_image_empty1"
        self.build()

    def configure_head(self) -> None:
        self.decoder = DECODERS.build(self.decoder_spec, encoder=self.image_encoder, image_size=self.image_size)
        freeze_unreached(self.image_encoder, self.image_size)

    # --- the dense probe ---------------------------------------------------------

    @property
    def solved(self) -> bool:
        """Whether the decoder is solved for instead of trained."""
        return isinstance(self.decoder, Linear) and self.frozen and self.protocol == "standard"

    def train(self, mode: bool = True) -> SegmentationTask:
        super().train(mode)
        if hasattr(self, "decoder") and self.solved:
            self.decoder.eval()  # its norms have been solved for, too
        return self

    def on_train_epoch_start(self) -> None:
        if self.solved:
            self._solve()

    def on_train_batch_end(self, *of_step: Any) -> None:
        if self.solved:
            self.trainer.should_stop = True  # nothing is left to learn

    @torch.no_grad()
    def _solve(self) -> None:
        decoder, data = self.decoder, self.trainer.datamodule
        assert isinstance(decoder, Linear)
        train, val = (
            ({k: batch[k].to(self.device) for k in ("image", "mask")} for batch in data.in_order(split, told))
            for split, told in (("train", "training images"), ("val", "validation images"))
        )
        goal = self.monitor.removeprefix("val/")
        layer, strength, threshold = fit(
            lambda image: decoder.cells(self.image_encoder, image), train, val, decoder.norms[0].eps,
            lambda family: family.figure(goal),
        )  # fmt: skip
        decoder.take(*(torch.as_tensor(part).to(self.device) for part in layer[:3]), bias=layer[3])
        rank_zero_info(
            f"dense probe: {len(data.rows['train'])} images; penalty {strength:g} and threshold {threshold:.2g} of the "
            f"share chosen on {len(data.rows['val'])} validation images"
        )

    def configure_optimizers(self):
        # the solver has set the layer: an optimizer that moves nothing, since Lightning keeps no checkpoint without one
        return torch.optim.SGD(self.decoder.parameters(), lr=0.0) if self.solved else super().configure_optimizers()

    # --- the step ----------------------------------------------------------------

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Return logits (B, 1, H, W) of the input's size."""
        logits = self.decoder(self.image_encoder, batch["image"])
        if logits.shape[-2:] != batch["image"].shape[-2:]:
            logits = torch.nn.functional.interpolate(
                logits.float(), batch["image"].shape[-2:], mode="bilinear", align_corners=False
            )
        return logits

    def step(self, batch: dict[str, Any]) -> Step:
        logits = self(batch)
        losses: dict[str, Tensor] = {}
        logs: dict[str, Tensor] = {}
        for name, loss in self.losses.items():
            losses[name], diagnostics = loss(logits, batch["mask"])
            logs |= {f"{name}/{key}": value for key, value in diagnostics.items()}
        outputs: dict[str, Any] = {}
        if not self.training:
            known, truth = batch["mask"] != 127, batch["mask"] == 255
            mask = (logits[:, 0].float().sigmoid() > THRESHOLD) & known
            counts = torch.stack([(part & known).flatten(1).sum(1) for part in (mask & truth, mask, truth)], 1)
            # a NaN says that the model broke, a comparison would hide it
            counts = counts.float() + 0 * logits.detach().float().mean((1, 2, 3))[:, None]
            outputs = {"rows": batch["index"], "values": counts}
            if self.trainer.testing:
                outputs |= dict(zip(("items", "of"), runs_of(mask), strict=True))
        return Step(losses, logs, outputs, len(batch["index"]))

    def family(self, found: Predicted, stage: str) -> Segmentation:
        return Segmentation(*found.values.astype(np.int64).T)

    # --- what a test and a prediction leave -------------------------------------

    def masks_of(self, found: Predicted, places: np.ndarray) -> list[np.ndarray]:
        """Return the predicted masks (H, W) bool of these places."""
        runs, masks = found.per_image(), []
        for place in places:
            flat = np.zeros(self.image_size**2, bool)
            for first, length in runs[place].astype(int):
                flat[first : first + length] = True
            masks.append(flat.reshape(self.image_size, self.image_size, order="F"))
        return masks

    def table(self, found: Predicted) -> dict[str, list[Any]]:
        intersection, predicted, truth = found.values.T
        texts = [" ".join(f"{int(first) + 1} {int(length)}" for first, length in runs) for runs in found.per_image()]
        total = np.maximum(predicted + truth, 1)
        dice = np.where(predicted + truth == 0, 1.0, 2 * intersection / total)
        return {
            "truth_pixels": truth.astype(int).tolist(), "predicted_pixels": predicted.astype(int).tolist(),
            "intersection_pixels": intersection.astype(int).tolist(), "dice": dice.tolist(), "mask_rle": texts,
            "mask_size": [self.image_size] * len(texts),
        }  # fmt: skip

    def draw(self, found: Predicted, family: Any, folder: Path, notice: str) -> None:
        from sista_tasks.segmentation.pictures import draw_cases

        draw_cases(self, found, folder / "cases.png", notice)

    def predict_step(self, batch: dict[str, Any], index: int) -> dict[str, Any]:
        scores = self(batch)[:, 0].float().sigmoid().cpu() if len(batch["index"]) else batch["image"][:, 0].cpu()
        found = {"index": batch["index"].cpu(), "scores": scores, "bad": batch.get("bad", [])}
        return found | ({"original_size": batch["original_size"].cpu()} if "original_size" in batch else {})

    def prediction_table(self, batch: dict[str, Any]) -> pd.DataFrame:
        data, rows = self.trainer.datamodule, []
        sizes = self.original_sizes(batch)
        names = self.image_names(batch["index"].tolist())
        for name, (width, height), scores in zip(names, sizes, batch["scores"].numpy(), strict=True):
            mask = unfit_mask(scores > THRESHOLD, width, height, data.size)
            score = scores[film(width, height, data.size, len(scores))].max()  # padding has no object
            rows.append((name, width, height, float(score), float(mask.mean()), encode_rle(mask)))
        return pd.DataFrame(rows, columns=["image", "width", "height", "score", "area", "mask_rle"])


def runs_of(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the runs of masks (B, H, W) bool, column by column: (M, 2) first pixel and length, (M,) their image."""
    flat = mask.transpose(1, 2).flatten(1).int()
    edges = torch.nn.functional.pad(flat, (1, 1)).diff(dim=1)
    of, first = (edges == 1).nonzero(as_tuple=True)
    end = (edges == -1).nonzero(as_tuple=True)[1]
    return torch.stack([first, end - first], 1).double(), of
