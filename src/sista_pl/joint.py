"""A pre-trained image-text encoder out of a checkpoint, as evaluations and pictures use it; no Trainer, no loss.

B images or texts, D joint dimension, P patches, L words.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sista_pl.checkpoint import image_encoder_of, read_checkpoint, text_encoder_of
from sista_pl.errors import SistaError
from sista_pl.losses import LOSSES
from sista_pl.models import ImageEncoder, ProjectionHead, TextEncoder
from sista_pl.pair import Features


class JointEncoder(nn.Module):
    """Both encoders of a pre-training with their projection heads, in eval mode and without a gradient.

    Args:
        image_encoder, text_encoder, image_head, text_head: as in `PretrainTask`.
        scale: the logit scale s that the pre-training ended with, at most 100.
        image_size: side of the images that it was trained on, in pixels.
        tokens_trained: whether a loss looked at patches and words; else their projections are as they were drawn.
    """

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        image_head: ProjectionHead,
        text_head: ProjectionHead,
        scale: float,
        image_size: int,
        tokens_trained: bool,
    ):
        super().__init__()
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        self.image_head, self.text_head = image_head, text_head
        self.scale, self.image_size, self.tokens_trained = scale, image_size, tokens_trained
        self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> JointEncoder:
        return super().train(False)

    @torch.no_grad()
    def encode_image(self, image: Tensor) -> Features:
        """(B, 1, H, W) in [-1, 1] → joint-space features: pooled (B, D), local (B, P, D), row by row of the grid."""
        return self.image_head(self.image_encoder(image))

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Features:
        """B texts → joint-space features: pooled (B, D), local (B, L, D) with mask and signed word identities."""
        device = next(self.parameters()).device
        batch = self.text_encoder.tokenize(texts).batch(range(len(texts)))
        return self.text_head(self.text_encoder({key: value.to(device) for key, value in batch.items()}))


def load_joint(path: str | Path) -> JointEncoder:
    """Return the image-text encoder of a checkpoint of pre-training.

    Args:
        path: a `.ckpt` of `sista fit --config pretrain.yaml`.

    Raises:
        SistaError: not such a checkpoint, or tensors that do not fit what it names.
    """
    checkpoint = read_checkpoint(path)
    hyper, state = checkpoint["hyper_parameters"], checkpoint["state_dict"]
    if "text_encoder" not in hyper:
        held = checkpoint.get("task", "another task")
        raise SistaError(
            f"weights: {path} is a checkpoint of {held}, without a text encoder; give one of `sista fit --config "
            "pretrain.yaml`, as runs/pretrain/0001/checkpoints/best.ckpt"
        )
    parts: dict[str, Any] = {"image": image_encoder_of(checkpoint, path), "text": text_encoder_of(checkpoint, path)}
    shape: dict[str, Any] = {"out": hyper["embed_dim"], "hidden": hyper["head_hidden"], "norm": hyper["head_norm"]}
    heads = {side: ProjectionHead(encoder.dim, encoder.local_dim, **shape) for side, encoder in parts.items()}
    for name, head in ((f"{side}_head", head) for side, head in heads.items()):
        try:
            head.load_state_dict({k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")})
        except RuntimeError as why:
            first = str(why).strip().splitlines()[-1].strip()[:200]
            raise SistaError(f"checkpoint {path}: its {name} does not fit what it says of itself ({first})") from why
    names = [LOSSES.split(spec)[0] for spec in hyper["losses"].values()]
    trained = any(name not in LOSSES or getattr(LOSSES[name], "needs_tokens", True) for name in names)
    scale = float(state["log_scale"].exp().clamp(max=100.0))
    return JointEncoder(
        parts["image"], parts["text"], heads["image"], heads["text"], scale, hyper["image_size"], trained
    )  # fmt: skip
