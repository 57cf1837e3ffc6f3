"""The base of the downstream tasks: a pre-trained encoder and a head.

B images, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from sista_pl.errors import SistaError, did_you_mean
from sista_pl.measured import MeasuredTask
from sista_pl.models import IMAGE_ENCODERS
from sista_pl.registry import Spec
from sista_pl.weights import encoder_spec, load_weights

PROTOCOLS = ("standard", "mgca")


class TransferTask(MeasuredTask):
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
        super().__init__(losses, lr, weight_decay, warmup, draws)
        if protocol not in PROTOCOLS:
            raise SistaError(f"model: protocol is {protocol!r}; {did_you_mean(protocol, PROTOCOLS)}")
        self.encoder_weights, self.frozen, self.protocol = weights, frozen, protocol
        self.image_size = image_size
        encoder = image_encoder or (encoder_spec(weights) if weights else None)
        if encoder is None:
            raise SistaError("model: image_encoder is not set, and weights do not say which it is; give both")
        self.encoder: Spec = encoder
        self.classes: list[str] = []  # in the order of the outputs; kept in the checkpoint

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
        """Take the data group's classes, `what` it calls them; a checkpoint keeps them, and is refused with others.

        Raises:
            SistaError: their number is not `count`.
        """
        data = self.trainer.datamodule
        classes = data.classes or (data.wanted_categories if self.target == "boxes" else data.wanted_labels) or []
        if classes and len(classes) != count:
            raise SistaError(
                f"model: num_classes is {count}, the data group has {len(classes)} {what} ({_some(classes)}); set both "
                "alike"
            )
        self.classes = list(classes)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.classes:
            checkpoint["classes"] = self.classes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = checkpoint.get("classes") or self.classes  # a checkpoint of before has no names
        if self.classes and self.classes != trained:
            key = "categories" if self.target == "boxes" else "labels"
            raise SistaError(
                f"data: {key} are {_some(self.classes)}, but the checkpoint was trained on {_some(trained)}, in this "
                f"order; set data.{key}: [{', '.join(trained)}]"
            )
        self.classes = trained


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (" …" if len(names) > 6 else "")
