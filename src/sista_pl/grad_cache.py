"""A large batch in the memory of a small one: the encoders see chunks of it, the losses see it whole.

B pairs, b of a chunk, N tokens, D dimension.

Gradient caching (Gao et al. 2021, arXiv 2101.06983): each chunk is encoded without keeping its activations, the losses
of the whole batch give the gradient of every embedding, and each chunk is encoded again to carry it on to the
parameters. That is what `torch.utils.checkpoint` does to a chunk, together with the random numbers of dropout and the
autocast of mixed precision; autograd takes the chunks one after the other, and hands a parameter the sum of them once,
so that DDP synchronises once, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sista_pl.errors import SistaError
from sista_pl.models.heads import MaskedBatchNorm
from sista_pl.pair import Features


def encode_in_chunks(
    encode: Callable[..., Features], batch: Tensor | Mapping[str, Tensor], chunk: int, tokens: bool = True
) -> Features:
    """Encode a batch whole, with the activations of one chunk at a time in the backward pass.

    Args:
        encode: (b, …) → features, each row for itself.
        batch: (B, …) tensor, or tensors by name.
        chunk: b >= 1.
        tokens: keep the features of patches and words; without, there are none (N = 0).

    Returns:
        the features of the batch; those of `encode(batch)`, but for the random numbers of dropout.
    """

    def part(rows: Any) -> Features:
        features = encode(rows)
        return features if tokens else Features(features.pooled, features.local.new_zeros(len(features.local), 0, 1))

    parts = _split(batch, chunk)
    if len(parts) == 1 or not torch.is_grad_enabled():
        return encode(batch)
    found = [checkpoint(part, rows, use_reentrant=False) for rows in parts]
    columns: dict[str, Any] = {}
    for field in fields(Features):
        values = [getattr(features, field.name) for features in found]
        columns[field.name] = None if values[0] is None else torch.cat(values)
    return Features(**columns)


def refuse_batch_statistics(modules: Mapping[str, nn.Module]) -> None:
    """Check that an embedding does not depend on the others of its batch, which chunks would change.

    Args:
        modules: encoders and heads by their argument's name.

    Raises:
        SistaError: a batch normalisation is among them.
    """
    steps = {
        "head_norm": "set `head_norm: layer`",
        "image_encoder": "choose an encoder that normalises each image for itself, as vit_* and convnext_* do",
        "text_encoder": "choose another text encoder",
    }
    for argument, module in modules.items():
        for name, part in module.named_modules():
            if isinstance(part, (MaskedBatchNorm, nn.modules.batchnorm._BatchNorm)):
                raise SistaError(
                    f"model: grad_cache encodes a batch in chunks, whose statistics {argument} ({name}: "
                    f"{type(part).__name__}) would take for the batch's; {steps[argument]}, or leave grad_cache out"
                )


def _split(batch: Any, chunk: int) -> list[Any]:
    if isinstance(batch, Tensor):
        return list(batch.split(chunk))
    columns = {key: values.split(chunk) for key, values in batch.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
