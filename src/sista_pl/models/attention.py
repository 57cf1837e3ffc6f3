"""Attention, read where the model computes it: of the class token in the last layer, and through all layers.

B samples, H heads, T tokens (class token first), d dimension of a head, P patches.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sista_pl.errors import SistaError
from sista_pl.pair import at_least_float32


class Attention(TorchFunctionMode):
    """Sees each call of `scaled_dot_product_attention` that is made inside the context; the calls run as they are.

    Queries and keys are those of the model, with its norms, rotations and biases, whatever library it is of.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._call(*args, **kwargs)
        return func(*args, **kwargs)

    def _call(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> None:  # fmt: skip
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        self.keep(query.detach(), key.detach(), attn_mask, is_causal, scale)

    def keep(self, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float) -> None:
        """Take note of a call."""
        raise NotImplementedError("a kind of Attention defines keep(query, key, mask, causal, scale)")


class ClassAttention(Attention):
    """Reads what the class token attends to: of the (T, T) weights, which the fused kernels never form, one row."""

    def __init__(self) -> None:
        super().__init__()
        self.last: tuple[Tensor, Tensor, Tensor | None, float] | None = None

    def keep(self, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float) -> None:
        # a causal model's first token sees itself alone
        self.last = None if causal else (query[..., :1, :], key, mask, scale)

    def weights(self, encoder: str, tokens: int) -> Tensor:
        """Return the mean over the heads of the last call, before dropout: (B, T), rows sum to 1, no gradient.

        Args:
            encoder: whose name the error gives.
            tokens: T.

        Raises:
            SistaError: no call was seen, or the last one was not over all tokens.
        """
        if self.last is None or self.last[1].ndim != 4 or self.last[1].shape[2] != tokens:
            raise SistaError(
                f"{encoder}: the attention of its class token can't be read, since its last layer does not call "
                "scaled_dot_product_attention over all tokens; BERT and ViT do, choose such an encoder, or a loss "
                "that weights no tokens"
            )
        query, key, mask, scale = self.last
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            query, key = at_least_float32(query), at_least_float32(key)
            scores = query @ key.transpose(2, 3) * scale  # B H 1 T
            if mask is not None:
                row = mask[..., :1, :]
                scores = scores.masked_fill(~row, -torch.inf) if row.dtype == torch.bool else scores + row
            return scores.softmax(3).mean(1).squeeze(1)


class AllAttention(Attention):
    """Reads what each token attends to, layer by layer, of one image.

    Attributes:
        seen: a layer each, (T, T), mean over the heads; rows sum to 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def keep(self, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float) -> None:
        # a pooling head asks with one token; windows and masks have no single row for a patch
        if query.ndim != 4 or query.shape != key.shape or len(query) != 1 or mask is not None or causal:
            return
        scores = query[0].float() @ key[0].float().transpose(1, 2)  # H T T
        self.seen.append((scores * scale).softmax(2).mean(0))


def roll_out(layers: list[Tensor], patches: int, class_token: bool = True) -> Tensor | None:
    """Return how much of each patch reaches the class token, or the mean token, through all layers: (P,).

    Abnar & Zuidema 2020 (arXiv 2005.00928): the product over the layers of (A + I) / 2.

    Args:
        layers: (T, T) attention, the first layer first; class and register tokens before the patches.
        patches: P.
        class_token: whether the first token is pooled; else the patches' mean is.

    Returns:
        None where the layers have no attention over all tokens, or not the same one.
    """
    if not layers or len({len(layer) for layer in layers}) != 1 or len(layers[0]) < patches:
        return None
    prefix = len(layers[0]) - patches
    rolled = torch.eye(len(layers[0]), device=layers[0].device)
    for layer in layers:
        rolled = (layer + torch.eye(len(layer), device=layer.device)) / 2 @ rolled
    row = rolled[0] if class_token and prefix else rolled[prefix:].mean(0)
    return row[prefix:]


def watching(wanted: bool) -> AbstractContextManager[ClassAttention | None]:
    """Return the context to run a model in: a `ClassAttention` where it is wanted, else one that does nothing."""
    return ClassAttention() if wanted else nullcontext()


def run_once(encoder: nn.Module, given: Any) -> None:
    """Run an encoder in eval mode and without gradient, so that what it can't do is said before the training."""
    training = encoder.training
    with torch.no_grad():
        encoder.eval()(given)
    encoder.train(training)
