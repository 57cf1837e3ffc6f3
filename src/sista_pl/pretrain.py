"""Pre-training: an image encoder and a text encoder learn one space from image-report pairs.

B pairs, D joint dimension, P patches, L words.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn

from sista_pl.errors import SistaError
from sista_pl.grad_cache import encode_in_chunks, refuse_batch_statistics
from sista_pl.metrics import Retrieval, RetrievalFigures, intervals
from sista_pl.metrics.retrieval import WAYS
from sista_pl.models import IMAGE_ENCODERS, TEXT_ENCODERS, ProjectionHead
from sista_pl.models.tokens import TokenTable
from sista_pl.pair import Features, Pair, Semantics
from sista_pl.task import BaseTask, Step

MAX_SCALE = 100.0


class PretrainTask(BaseTask):
    """Image-report pre-training with any weighted sum of alignment losses.

    SISTA is `sia` (semantic-aware instance alignment) plus `sta` (sparse token alignment); CLIP is `clip` alone.

    Args:
        losses: components by name, as in `{instance: {name: sia}, token: {name: sta, weight: 1.0}}`.
        image_encoder: a timm name, or `{name: resnet50, weights: imagenet}`; `sista list encoders`.
        text_encoder: `small-bert`, or a hub id or folder of Hugging Face, as in `{name: path, layers: 6}`.
        embed_dim: D of the joint space.
        head_hidden: width of the projection heads' inner layer.
        head_norm: `batch` (padding left out, statistics over all ranks) or `layer`.
        image_size: side of the images that the encoder is given, in pixels; the data group's crop.
        lr: peak learning rate.
        weight_decay: on matrices and kernels.
        warmup: share of all steps.
        temperature: where the learnable temperature 1/s starts; s stays <= 100.
        pool: pairs in the retrieval pool.
        grad_cache: pairs that the encoders see at once in training, >= 1, for batches whose activations do not fit;
            None for all. The gradient is exactly that of the whole batch, for every loss: the embeddings, those of
            patches and words too, are kept for all pairs, the encoders' activations for one chunk, which costs a
            second forward pass. Needs `head_norm: layer` and an image encoder without batch normalisation (vit_*,
            convnext_*). With DDP, of each rank's batch.
    """

    monitor = "val/R_mean"
    mode = "max"

    def __init__(
        self,
        losses: dict[str, Any],
        image_encoder: str | dict[str, Any] = "resnet50",
        text_encoder: str | dict[str, Any] = "small-bert",
        embed_dim: int = 128,
        head_hidden: int = 2048,
        head_norm: str = "batch",
        image_size: int = 224,
        lr: float = 2e-5,
        weight_decay: float = 0.05,
        warmup: float = 0.05,
        temperature: float = 0.07,
        pool: int = 512,
        grad_cache: int | None = None,
    ):
        super().__init__(losses, lr, weight_decay, warmup)
        self.save_hyperparameters()
        if not 1 / MAX_SCALE <= temperature < math.inf:
            raise SistaError(f"model: temperature is {temperature}; give a number of at least {1 / MAX_SCALE}")
        for name, value, least in (("embed_dim", embed_dim, 1), ("head_hidden", head_hidden, 1), ("pool", pool, 2)):
            if value < least:
                raise SistaError(f"model: {name} is {value}; give at least {least}")
        if grad_cache is not None and (isinstance(grad_cache, bool) or grad_cache < 1):
            raise SistaError(f"model: grad_cache is {grad_cache!r}; give a whole number of pairs of at least 1")
        self.build()
        self.tokens: TokenTable | None = None

    def configure_models(self) -> None:
        h = self.hparams
        self.image_encoder = IMAGE_ENCODERS.build(h.image_encoder, image_size=h.image_size)
        self.text_encoder = TEXT_ENCODERS.build(h.text_encoder)
        head = {"out": h.embed_dim, "hidden": h.head_hidden, "norm": h.head_norm}
        self.image_head = ProjectionHead(self.image_encoder.dim, self.image_encoder.local_dim, **head)
        self.text_head = ProjectionHead(self.text_encoder.dim, self.text_encoder.local_dim, **head)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / h.temperature)))
        if h.grad_cache is not None:
            heads = nn.ModuleList([self.image_head, self.text_head])
            refuse_batch_statistics(
                {"head_norm": heads, "image_encoder": self.image_encoder, "text_encoder": self.text_encoder}
            )

    def configure_losses(self, **context: Any) -> None:
        super().configure_losses(dim=self.hparams.embed_dim, **context)
        if any(getattr(loss, "needs_attention", False) for loss in self.losses.values()):
            self.image_encoder.ask_attention(self.hparams.image_size)
            self.text_encoder.ask_attention()
        if not any(getattr(loss, "needs_pooled", True) for loss in self.losses.values()):
            raise SistaError("model: no loss compares whole images and reports; add one, as `instance: {name: clip}`")
        # a head that no loss looks at would have no gradient, which stops DDP
        self.needs_tokens = any(getattr(loss, "needs_tokens", True) for loss in self.losses.values())
        if not self.needs_tokens:
            for head in (self.image_head, self.text_head):
                head.local.requires_grad_(False)

    def configure_metrics(self) -> None:
        self.val_retrieval = Retrieval(self.hparams.pool)
        self.test_retrieval = Retrieval(self.hparams.pool)
        self.metrics = {"val": self.val_retrieval, "test": self.test_retrieval}

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        if not hasattr(data, "reports"):
            raise SistaError("data: pre-training needs image-report pairs; use PairDataModule")
        if data.crop != self.hparams.image_size:
            raise SistaError(
                f"model: image_size is {self.hparams.image_size} but the data group crops to {data.crop}; "
                "set both alike"
            )
        self.tokens = None

    def _tokenize(self) -> TokenTable:
        """Tokenize all reports once; not before the first batch, since a checkpoint may bring another tokenizer."""
        data = self.trainer.datamodule
        self.text_encoder.fit(data.corpus())
        return self.text_encoder.tokenize(data.reports)

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Add tokens and report semantics, on the CPU and before the copy to the device."""
        if self.tokens is None:
            self.tokens = self._tokenize()
        batch |= self.tokens.batch(batch["report"].tolist())
        similarity = self.trainer.datamodule.similarity
        if similarity is not None:
            batch["semantics"] = torch.from_numpy(similarity.vectors[batch["report"].numpy()])
        return batch

    def callbacks(self) -> list[Callback]:
        from sista_pl.pictures import WordMapPicture

        return [WordMapPicture()]

    def on_fit_start(self) -> None:
        if getattr(self.image_encoder, "weights", "none") in ("none", "") and self.trainer.ckpt_path is None:
            rank_zero_info("image encoder: random initialisation")

    def scale(self) -> Tensor:
        """Return s = exp(s')."""
        return self.log_scale.exp().squeeze()  # one dimension under FSDP

    def optimizer_step(self, *of_step: Any, **named: Any) -> None:
        """Make the step and bring s back to 100: a clamp within the graph would leave s' there without a gradient."""
        super().optimizer_step(*of_step, **named)
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(MAX_SCALE))

    def encode_image(self, image: Tensor) -> Features:
        """(B, 1, H, W) → joint-space features."""
        return self.image_head(self.image_encoder(image), self.needs_tokens)

    def encode_text(self, tokens: dict[str, Tensor]) -> Features:
        """A batch of a `TokenTable` → joint-space features."""
        return self.text_head(self.text_encoder(tokens), self.needs_tokens)

    def forward(self, batch: dict[str, Any]) -> Pair:
        """Encode both sides of a batch into the `Pair` that the losses see."""
        semantics = None
        if "semantics" in batch:
            similarity = self.trainer.datamodule.similarity
            # the sample stays on the CPU, where thresholds are solved on it, once for each size of batch
            semantics = Semantics(batch["semantics"], similarity.offset, torch.from_numpy(similarity.sample))
        chunk = self.hparams.grad_cache or len(batch["image"])
        image = encode_in_chunks(self.encode_image, batch["image"], chunk, self.needs_tokens)
        text = encode_in_chunks(self.encode_text, batch, chunk, self.needs_tokens)
        return Pair(image, text, self.scale(), semantics, labels=batch.get("labels"), epoch=self.current_epoch)

    def step(self, batch: dict[str, Any]) -> Step:
        pair = self(batch)
        losses, logs = {}, {"temperature": 1 / pair.scale.detach()}
        for name, loss in self.losses.items():
            losses[name], diagnostics = loss(pair)
            logs |= {f"{name}/{key}": value for key, value in diagnostics.items()}
        outputs = {"image": pair.image.pooled, "text": pair.text.pooled,
                   "report": batch["report"], "sample": batch["index"]}  # fmt: skip
        return Step(losses, logs, outputs, len(batch["index"]))

    def predict_step(self, batch: dict[str, Any], index: int) -> dict[str, Tensor]:
        """Return the normalised joint-space embeddings (B, D) of images and reports, and their rows in the store."""
        pair = self(batch)
        unit = torch.nn.functional.normalize
        return {"index": batch["index"], "image": unit(pair.image.pooled, dim=1), "text": unit(pair.text.pooled, dim=1)}

    def log_progress(self, stage: str, figures) -> None:
        self.log(f"{stage}/R@10", figures["i2t_R@10"], prog_bar=True, sync_dist=True)

    def report(self, stage: str) -> dict[str, Any]:
        """Return recall and median rank with their intervals by patient."""
        ranks = self.metrics[stage].ranks
        if not ranks:
            return {}
        patients = self.trainer.datamodule.store.manifest["patient_id"].to_numpy()[ranks["sample"].numpy()]
        none = np.zeros((len(patients), 0))  # findings
        family = RetrievalFigures({way: ranks[way].numpy() for way in WAYS}, none, none, [])
        return {f"{stage}/{name}": figure for name, figure in intervals(family.figures, patients).items()}
