"""Token level of GLoRIA (Huang et al. 2021, ICCV): the words of each report against the patches of each image.

B pairs of this rank, N pairs of all ranks, b reports of a chunk, P patches, L words, D joint dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sista_pl.distributed import gather, global_mean, rank
from sista_pl.losses import LOSSES
from sista_pl.losses.arguments import choice, number, switch, whole
from sista_pl.pair import Pair, at_least_float32


@LOSSES.register("gloria")
class LocalContrast(nn.Module):
    """GLoRIA's local contrast: an image and a report are as alike as the words are to the patches they attend to.

    For report i and image b, with the tokens as they are: A = softmax_words(V Wᵀ), A' = softmax_patches(
    attention_scale · A), c = A'ᵀ V, r = cos(W, c), z_bi = scale · log Σ_words exp(word_scale · r);
    ½ [CE(z, I) + CE(zᵀ, I)].
    Padding is no word. A report without words is no candidate and its pair has no loss. The published loss is the sum
    of both directions, twice this one; its global part is `clip`.

    Logs `accuracy`: how often the own partner is the most alike of N, mean of both directions.

    Args:
        attention_scale: > 0, on the attention over patches (the code's temp1).
        word_scale: > 0, on the similarity of a word (temp2).
        scale: > 0, on that of a report (temp3).
        aggregation: `sum` over words, in which a longer report is more alike to every image (the published code), or
            `mean`.
        chunk: reports that are compared with the N images at once, >= 1; an intermediate has N · chunk · P · L
            numbers. None for all. The value and the gradients stay the same; with several chunks, the backward pass
            computes each again.
        shuffled: a negative control, not for use: each image is given the report before its own in the rank's batch.

    Raises:
        SistaError: unknown aggregation, argument out of its range.
    """

    needs_pooled = False

    def __init__(
        self,
        attention_scale: float = 4.0,
        word_scale: float = 5.0,
        scale: float = 10.0,
        aggregation: str = "sum",
        chunk: int | None = 16,
        shuffled: bool = False,
    ):
        super().__init__()
        self.attention_scale = number("gloria", "attention_scale", attention_scale, 0, above=True)
        self.word_scale = number("gloria", "word_scale", word_scale, 0, above=True)
        self.scale = number("gloria", "scale", scale, 0, above=True)
        self.mean = choice("gloria", "aggregation", aggregation, ("sum", "mean")) == "mean"
        self.chunk = None if chunk is None else whole("gloria", "chunk", chunk, 1)
        self.shuffled = switch("gloria", "shuffled", shuffled)

    def forward(self, pair: Pair) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean over the local pairs with words and both directions, () fp32, and what to log."""
        with torch.autocast(pair.image.local.device.type, enabled=False):
            v = gather(at_least_float32(pair.image.local))  # N P D
            text = pair.text.shifted() if self.shuffled else pair.text
            w = at_least_float32(text.local)  # B L D
            used = torch.ones_like(w[..., 0], dtype=torch.bool) if text.mask is None else text.mask  # B L

            def block(words: Tensor, real: Tensor) -> Tensor:
                return self._similarity(v, words, real)

            if self.chunk is None or self.chunk >= len(w):
                mine = block(w, used)  # B N
            else:
                parts = zip(w.split(self.chunk), used.split(self.chunk), strict=True)
                mine = torch.cat([checkpoint(block, *part, use_reentrant=False, preserve_rng_state=False)
                                  for part in parts])  # fmt: skip
            z = gather(mine)  # N N: reports, images
            worded = gather(used.any(1).to(z.dtype)) > 0  # N
            rows = torch.arange(len(w), device=z.device) + rank() * len(w)  # B
            own = rows[:, None] == torch.arange(len(z), device=z.device)  # B N
            right = z[rows, rows]
            loss, hits = torch.zeros_like(right), torch.zeros_like(right)
            for one_way, open_ in ((z[:, rows].T, worded | own), (z[rows], torch.ones_like(own))):
                free = one_way.masked_fill(~open_, -torch.inf)
                loss = loss + (free.logsumexp(1) - right) / 2
                hits = hits + (free.argmax(1) == rows) / 2
            counted = worded[rows]
            accuracy = (hits * counted).sum() / counted.sum().clamp_min(1)
            return global_mean(loss, counted), {"accuracy": accuracy.detach()}

    def _similarity(self, v: Tensor, w: Tensor, used: Tensor) -> Tensor:
        """Return how alike reports w (b, L, D) and images v (N, P, D) are: (b, N)."""
        used = used | ~used.any(1, keepdim=True)  # a report without words stays finite; `forward` leaves it out
        s = torch.einsum("bld,npd->bnpl", w, v)
        over_words = s.masked_fill(~used[:, None, None], -torch.inf).softmax(3)
        weights = (self.attention_scale * over_words).softmax(2)
        context = torch.einsum("bnpl,npd->bnld", weights, v)
        r = F.cosine_similarity(w[:, None], context, dim=3)  # b N L
        z = (self.word_scale * r).masked_fill(~used[:, None], -torch.inf).logsumexp(2)
        if self.mean:
            z = z - used.sum(1, keepdim=True, dtype=z.dtype).log()
        return self.scale * z
