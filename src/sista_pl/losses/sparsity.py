"""From similarities to weights: which of N places a token looks at, and how much at each.

N places (patches of an image, or words of a report). All functions have one interface:

    similarity (..., N), valid (..., N) bool or None  →  weights (..., N)

Weights are >= 0 and sum to 1 over the valid places; the most similar one always has a weight. A place that is not
valid has weight 0 and no influence, and a row without a valid place has weights 0 throughout. `valid` may be of any
shape that broadcasts; None says that all are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sista_pl.errors import SistaError
from sista_pl.losses.arguments import choice, number, whole

Weighting = Callable[[Tensor, Tensor | None], Tensor]
OWN = {
    "threshold": "sigma",
    "topk": "top",
    "sparsemax": "sparsity_temperature",
    "softmax": "sparsity_temperature",
}


def weighting(
    loss: str,
    sparsity: str,
    sigma: float | str | None = None,
    top: int | None = None,
    sparsity_temperature: float | None = None,
    temperature: float = 1.0,
) -> Weighting:
    """Return one of the functions below with its argument set; only that argument may be given.

    Args:
        loss: name of the loss that asks, for the messages.
        sparsity: `threshold`, `topk`, `sparsemax` or `softmax`.
        sigma: of `threshold`, 0 to 1 or "1/N"; None is 0.5.
        top: of `topk`, >= 1; None is 8.
        sparsity_temperature: of `sparsemax` and `softmax`, > 0; None is `temperature`.
        temperature: what is usual for the scale of the loss's similarities.

    Raises:
        SistaError: unknown sparsity, argument out of its range, or of another sparsity.
    """
    own = OWN[choice(loss, "sparsity", sparsity, OWN)]
    given = {"sigma": sigma, "top": top, "sparsity_temperature": sparsity_temperature}
    for name, value in given.items():
        if value is not None and name != own:
            raise SistaError(
                f"loss {loss!r}: {name} is {value!r}, but `sparsity: {sparsity}` has none; leave it out, or give {own}"
            )
    if sparsity == "threshold":
        if sigma == "1/N":
            return partial(threshold_weights, sigma=None)
        share = number(loss, "sigma", 0.5 if sigma is None else sigma, 0, 1, or_else=', or "1/N"')
        return partial(threshold_weights, sigma=share)
    if sparsity == "topk":
        return partial(topk_weights, top=8 if top is None else whole(loss, "top", top, 1))
    if sparsity_temperature is not None:
        temperature = number(loss, "sparsity_temperature", sparsity_temperature, 0, above=True)
    return partial(sparsemax_weights if sparsity == "sparsemax" else softmax_weights, temperature=temperature)


def threshold_weights(similarity: Tensor, valid: Tensor | None = None, sigma: float | None = 0.5) -> Tensor:
    """Min-max over the places, threshold, divided by the sum.

    SPARC (Bica et al. 2024, arXiv 2401.09865), eq. 2-4, with the threshold relative to the maximum, so that the
    maximum survives always. Where all similarities are equal up to rounding, all valid places have the same weight.

    Args:
        similarity: (..., N).
        valid: (..., N) bool, or None.
        sigma: 0 to 1; places below `sigma` of the maximum, after min-max, get weight 0. None is SPARC's 1/N, with N
            the number of valid places.
    """
    above, span = _above(similarity, valid)
    share: float | Tensor
    if sigma is not None:
        share = sigma
    elif valid is None:
        share = 1 / similarity.shape[-1]
    else:
        share = 1 / valid.sum(-1, keepdim=True, dtype=span.dtype).clamp_min(1)
    return _divided(above.masked_fill(above < share * span, 0.0))


def topk_weights(similarity: Tensor, valid: Tensor | None = None, top: int = 8) -> Tensor:
    """Min-max over the places as in `threshold_weights`, the `top` most similar kept, divided by the sum.

    Of equally similar places the first ones are kept, so that never more than `top` remain. With `top` >= the number
    of valid places the weights are those of `sigma = 0`: all but the least similar place have one.

    Args:
        similarity: (..., N).
        valid: (..., N) bool, or None.
        top: >= 1.
    """
    above, _ = _above(similarity, valid)
    ranked = similarity.detach()
    if valid is not None:
        ranked = ranked.masked_fill(~valid, -torch.inf)
    # torch.topk breaks ties as the device likes
    first = ranked.argsort(dim=-1, descending=True, stable=True)[..., :top]
    return _divided(above * torch.zeros_like(above).scatter(-1, first, 1.0))


def sparsemax_weights(similarity: Tensor, valid: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """The point of the simplex nearest to similarity / temperature, which has exact zeros.

    Martins & Astudillo 2016 (arXiv 1602.02068), algorithm 1. A constant added to a row changes nothing. Places that
    are `temperature` or more below the maximum have weight 0.

    Args:
        similarity: (..., N).
        valid: (..., N) bool, or None.
        temperature: > 0; lower is sparser.
    """
    # what is 1 below the maximum has no weight; so the clamp changes nothing and keeps the sums finite
    z = (_below_maximum(similarity, valid) / temperature).clamp_min(-2)
    with torch.no_grad():
        ordered = z.sort(dim=-1, descending=True).values
        place = torch.arange(1, z.shape[-1] + 1, device=z.device)
        total = ordered.cumsum(-1)
        count = (1 + place * ordered > total).sum(-1, keepdim=True).clamp_min(1)  # 0 of NaN
        support = z > (total.gather(-1, count - 1) - 1) / count
    # given the support, the threshold is a mean: the gradient needs no sorting
    threshold = ((z * support).sum(-1, keepdim=True) - 1) / support.sum(-1, keepdim=True)
    weights = ((z - threshold) * support).relu()
    return weights if valid is None else weights * valid


def softmax_weights(similarity: Tensor, valid: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Softmax of similarity / temperature: every valid place has a weight; the control without sparsity.

    Args:
        similarity: (..., N).
        valid: (..., N) bool, or None.
        temperature: > 0.
    """
    weights = (_below_maximum(similarity, valid) / temperature).softmax(-1)
    return weights if valid is None else weights * valid


def _above(similarity: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return how far each place lies above its row's minimum, and the range of the row, without gradient.

    A constant row has 1 at its valid places, and range 0. The division by the range is left out: it cancels in the
    division by the sum.
    """
    lower = upper = similarity
    if valid is not None:
        most = torch.finfo(similarity.dtype).max
        lower, upper = similarity.masked_fill(~valid, most), similarity.masked_fill(~valid, -most)
    low, high = lower.amin(-1, keepdim=True), upper.amax(-1, keepdim=True)
    rounding = 16 * torch.finfo(similarity.dtype).eps * torch.maximum(low.detach().abs(), high.detach().abs())
    constant = high - low <= rounding
    above = (similarity - low).masked_fill(constant, 1.0)
    if valid is not None:
        above = above.masked_fill(~valid, 0.0)
    return above, (high - low).detach().masked_fill(constant, 0.0)


def _below_maximum(similarity: Tensor, valid: Tensor | None) -> Tensor:
    """Return similarity less its row's maximum, which no weight depends on; far below where it is not valid."""
    if valid is not None:
        similarity = similarity.masked_fill(~valid, torch.finfo(similarity.dtype).min)
    return similarity - similarity.detach().amax(-1, keepdim=True)


def _divided(kept: Tensor) -> Tensor:
    total = kept.sum(-1, keepdim=True)
    return kept / total.masked_fill(total == 0, 1.0)
