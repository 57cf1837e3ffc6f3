"""The attention of the class token in the last layer, read where the model computes it.

B samples, H heads, T tokens (class token first), d dimension of a head.
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


class ClassAttention(TorchFunctionMode):
    """Sees each call of `scaled_dot_product_attention` that is made inside the context; the calls run as they are.

    The query of the class token and the keys are those of the model, with its norms, rotations and biases, whatever
    library it is of. Of the (T, T) weights, which the fused kernels never form, the first row alone is computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.last: tuple[Tensor, Tensor, Tensor | None, float | None] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._keep(*args, **kwargs)
        return func(*args, **kwargs)

    def _keep(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> None:  # fmt: skip
        # a causal model's first token sees itself alone
        self.last = None if is_causal else (query[..., :1, :].detach(), key.detach(), attn_mask, scale)

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
            scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)  # B H 1 T
            if mask is not None:
                row = mask[..., :1, :]
                scores = scores.masked_fill(~row, -torch.inf) if row.dtype == torch.bool else scores + row
            return scores.softmax(3).mean(1).squeeze(1)


def watching(wanted: bool) -> AbstractContextManager[ClassAttention | None]:
    """Return the context to run a model in: a `ClassAttention` where it is wanted, else one that does nothing."""
    return ClassAttention() if wanted else nullcontext()


def run_once(encoder: nn.Module, given: Any) -> None:
    """Run an encoder in eval mode and without gradient, so that what it can't do is said before the training."""
    training = encoder.training
    with torch.no_grad():
        encoder.eval()(given)
    encoder.train(training)
