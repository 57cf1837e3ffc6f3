"""Token and prototype level of MGCA (Wang et al. 2022, arXiv 2210.06044); its instance level is `clip`.

B pairs of this rank, N pairs of all ranks, P patches, L words, D joint dimension, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sista_pl.distributed import gather, global_mean, rank
from sista_pl.errors import SistaError
from sista_pl.losses import LOSSES
from sista_pl.losses.arguments import number, switch, whole
from sista_pl.pair import Pair, at_least_float32

LOW, HIGH = 0.1, 0.9  # quantiles between which a token's attention counts as it is


@LOSSES.register("mgca_cta")
class CrossTokenAlignment(nn.Module):
    """MGCA's token-wise alignment: a word against what it attends to in the image, and a patch in the report.

    With unit words W and patches V, o = norm(softmax_p(W Vᵀ / temperature) V) and ℓ = W oᵀ / temperature, a word has
    ½ [CE(ℓ) + CE(ℓᵀ)] against the other words of its report. A report's loss is their weighted mean; the weights
    are the attention of the class token, clipped to its 10 % and 90 % quantiles over the words of the report. The
    same with the sides swapped for the patches, whose weights are 1 / P where the image encoder has no class token.
    The loss is the sum of both, mean over the reports with words. Padding takes no part anywhere.

    Logs: `word_loss`, `patch_loss`; `word_accuracy`, `patch_accuracy` how often a token's own partner wins, with the
    same weights, mean of both ways.

    Args:
        temperature: > 0; MGCA's 0.1.
        shuffled: a negative control, not for use: each image is given the report before its own in the rank's batch.

    Raises:
        SistaError: argument out of its range; in `forward`: a text encoder without attention.
    """

    needs_pooled = False
    needs_attention = True

    def __init__(self, temperature: float = 0.1, shuffled: bool = False):
        super().__init__()
        self.temperature = number("mgca_cta", "temperature", temperature, 0, above=True)
        self.shuffled = switch("mgca_cta", "shuffled", shuffled)

    def forward(self, pair: Pair) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean over the reports of all ranks, () fp32, and what to log."""
        image, text = pair.image, pair.text.shifted() if self.shuffled else pair.text
        if text.attention is None:
            raise SistaError(
                "loss 'mgca_cta': the text encoder gives no attention of its class token; use small-bert or a BERT"
            )
        with torch.autocast(image.local.device.type, enabled=False):
            v, w = (F.normalize(at_least_float32(side.local), dim=2) for side in (image, text))  # B P D, B L D
            used = torch.ones_like(w[..., 0], dtype=torch.bool) if text.mask is None else text.mask  # B L
            patches = torch.ones_like(v[..., 0], dtype=torch.bool)  # B P
            worded = used.any(1)  # B
            s = w @ v.transpose(1, 2) / self.temperature  # B L P
            # the patches of a report without words attend to its padding, so that all stays finite; its weight is 0
            seen = (used | ~worded[:, None])[..., None]  # B L 1
            to_words = s.masked_fill(~seen, -torch.inf).softmax(1).transpose(1, 2)  # B P L
            patch_weights = clipped(torch.ones_like(v[..., 0]) if image.attention is None else image.attention, patches)
            word_loss, word_hits = self._contrast(w, s.softmax(2) @ v, used, clipped(text.attention, used))
            patch_loss, patch_hits = self._contrast(v, to_words @ w, patches, patch_weights)
            loss = global_mean(word_loss + patch_loss, worded)
            values = {"word_loss": word_loss, "word_accuracy": word_hits,
                      "patch_loss": patch_loss, "patch_accuracy": patch_hits}  # fmt: skip
            count = worded.sum().clamp_min(1)
        return loss, {key: (value.detach() * worded).sum() / count for key, value in values.items()}

    def _contrast(self, tokens: Tensor, attended: Tensor, used: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Contrast the tokens (B, N, D) of a sample with what they attend to; loss and hits of a sample, each (B,)."""
        logits = tokens @ F.normalize(attended, dim=2).transpose(1, 2) / self.temperature  # B N N
        own = torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device)
        closed = ~(used[:, None, :] | own)  # rows of padding keep their own column and stay finite
        right = logits.diagonal(dim1=1, dim2=2)  # B N
        loss, hits = torch.zeros_like(right), torch.zeros_like(right)
        for one_way in (logits, logits.transpose(1, 2)):
            free = one_way.masked_fill(closed, -torch.inf)
            loss = loss + (free.logsumexp(2) - right) / 2
            hits = hits + (free.argmax(2) == torch.arange(logits.shape[1], device=logits.device)) / 2
        return (loss * weights).sum(1), (hits * weights).sum(1)


def clipped(attention: Tensor, used: Tensor) -> Tensor:
    """Clip weights to their 10 % and 90 % quantiles over the used tokens of a sample, and divide by their sum.

    Args:
        attention: (B, N) >= 0.
        used: (B, N) bool.

    Returns:
        (B, N) without gradient, 0 where not used; rows sum to 1, or to 0 where nothing is used or all weights are 0.
    """
    weights = at_least_float32(attention.detach())
    known = weights.masked_fill(~used, torch.nan)
    low, high = (known.nanquantile(share, dim=1, keepdim=True) for share in (LOW, HIGH))
    weights = weights.clamp(low, high).masked_fill(~used, 0)
    return weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


@LOSSES.register("mgca_cpa")
class CrossPrototypeAlignment(nn.Module):
    """MGCA's prototype level: the report's cluster is predicted from the image, and the image's from the report.

    With unit v, t and prototypes C (rows normalised in each step, inside `forward`: their length has no effect),
    codes q = sinkhorn(exp(v Cᵀ / epsilon)) over the global batch, without gradient, and p = softmax(v Cᵀ /
    temperature): ½ [sCE(p_v, q_t) + sCE(p_t, q_v)], SwAV's swapped prediction (Caron et al. 2020, arXiv 2006.09882).

    Logs: `agreement` how often image and report are nearest to the same prototype; `used_prototypes` number of
    prototypes that are the first in a code of the global batch.

    Args:
        prototypes: K >= 2.
        epsilon: > 0; smaller makes the codes harder.
        iterations: of Sinkhorn, >= 1.
        temperature: > 0, of the prediction.
        frozen_epochs: the prototypes stay as they are in the first n epochs, >= 0, with a gradient of zeros (without
            one DDP would stop).
        dim: D; the task gives its own.

    Raises:
        SistaError: argument out of its range; in `forward`: `dim` is not that of the pair.
    """

    needs_tokens = False

    def __init__(
        self,
        prototypes: int = 500,
        epsilon: float = 0.05,
        iterations: int = 3,
        temperature: float = 0.2,
        frozen_epochs: int = 1,
        dim: int = 128,
    ):
        super().__init__()
        count = whole("mgca_cpa", "prototypes", prototypes, 2)
        self.epsilon = number("mgca_cpa", "epsilon", epsilon, 0, above=True)
        self.iterations = whole("mgca_cpa", "iterations", iterations, 1)
        self.temperature = number("mgca_cpa", "temperature", temperature, 0, above=True)
        self.frozen_epochs = whole("mgca_cpa", "frozen_epochs", frozen_epochs, 0)
        self.prototypes = nn.Parameter(F.normalize(torch.randn(count, whole("mgca_cpa", "dim", dim, 1)), dim=1))

    def forward(self, pair: Pair) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean over the local pairs and both directions, () fp32, and what to log."""
        dim = pair.image.pooled.shape[1]
        if dim != self.prototypes.shape[1]:
            raise SistaError(
                f"loss 'mgca_cpa': dim is {self.prototypes.shape[1]}, the embeddings have {dim}; give `dim: {dim}`"
            )
        with torch.autocast(pair.image.pooled.device.type, enabled=False):
            prototypes = F.normalize(at_least_float32(self.prototypes), dim=1)  # K D
            if pair.epoch < self.frozen_epochs:
                prototypes = prototypes.detach() + 0 * prototypes
            scores = [F.normalize(at_least_float32(x.pooled), dim=1) @ prototypes.T for x in (pair.image, pair.text)]
            everyone = [sinkhorn(gather(s.detach()), self.epsilon, self.iterations) for s in scores]  # N K
            own = slice(rank() * len(scores[0]), (rank() + 1) * len(scores[0]))
            loss = torch.zeros_like(scores[0][:, 0])  # B
            for s, codes in zip(scores, reversed(everyone), strict=True):
                loss = loss - (codes[own] * (s / self.temperature).log_softmax(1)).sum(1) / 2
            nearest = [s.argmax(1) for s in scores]
            first = torch.cat([codes.argmax(1) for codes in everyone])
            diagnostics = {
                "agreement": (nearest[0] == nearest[1]).float().mean(),
                "used_prototypes": scores[0].new_zeros(len(prototypes)).index_fill(0, first, 1).sum(),
            }
        # alone it would leave the logit scale without a gradient, which stops DDP
        return loss.mean() + 0 * pair.scale, diagnostics


def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Return codes of samples over prototypes in which each prototype has the same share of the batch.

    Cuturi 2013, as SwAV uses it: by turns a prototype's and a sample's mass are brought to the same; in logarithms,
    where no small epsilon overflows or leaves a prototype without any mass.

    Args:
        scores: (N, K) similarities, at least fp32.
        epsilon: > 0.
        iterations: >= 1.

    Returns:
        (N, K) >= 0; rows sum to 1.
    """
    log = scores / epsilon
    for _ in range(iterations):
        log = log - log.logsumexp(0, keepdim=True)
        log = log - log.logsumexp(1, keepdim=True)
    return log.exp()
