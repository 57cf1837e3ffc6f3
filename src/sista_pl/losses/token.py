"""Token level: words of a report against the few image patches that they speak of.

B pairs of this rank, P patches, L words, D joint dimension, G pairs of a group, n words of a group.

The sparse grouping and the loss within a report are SPARC's (Bica et al. 2024, arXiv 2401.09865, eq. 2-6) with guards
where they divide by zero; no equation of the SISTA paper (Bui et al., arXiv 2601.08165) was at hand, so that the
formulas, the contrast against other studies and all defaults are our documented choice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sista_pl.distributed import global_mean
from sista_pl.errors import SistaError
from sista_pl.losses import LOSSES
from sista_pl.losses.arguments import choice, number, switch, whole
from sista_pl.pair import Features, Pair, at_least_float32
from sista_pl.words import STOP_WORDS, word_id


class Words(NamedTuple):
    """The words of B reports that take part.

    Args:
        local: (B, L, D) embeddings, at least fp32.
        ids: (B, L) signed identities, 0 for padding.
        used: (B, L) bool, True for words that have a loss.
    """

    local: Tensor
    ids: Tensor
    used: Tensor


class Alignment(NamedTuple):
    """What a set of negatives makes of the words; each (B, L), only meaningful where `words.used`.

    Args:
        loss: cross-entropy of a word.
        kept: share of the patches of its own image that have a weight.
        hit: how often the right patches won, 0 to 1.
        contested: True where there was anything to win against.
    """

    loss: Tensor
    kept: Tensor
    hit: Tensor
    contested: Tensor


@LOSSES.register("sta")
class SparseTokenAlignment(nn.Module):
    """Sparse token alignment: a word is compared with the patches that it is most like, and those with other words.

    s = W Vᵀ, brought to [0, 1] over the patches of an image; what is below `sigma` of the maximum is dropped, the rest
    divided by its sum weights the patches: c = a V. Then, with ℓ = cos(W, c) / temperature:

    * `negatives: within` (SPARC): a word against the other words of its report, both ways, mean of the two.
    * `negatives: batch`: a word with its patches in its own image against the same word with its patches in the other
      images of a group, weighted in each image by the same formula; images whose report has the same word are left out.

    Within a report the loss can be solved without looking at the image; each figure reported with it needs its
    `shuffled` control. Logs: `kept_patches` mean share of the patches with a weight; `words` an anchor;
    `token_accuracy` how often the right words or image win, over words that have a competitor.

    Args:
        sparsity: `threshold`, the only one so far.
        sigma: threshold as a share of a word's maximum, 0 (all but the least similar patch) to 1 (the maximum alone),
            or "1/N", SPARC's, with N = P; it drops hardly any patch, real sparsity begins near 0.5.
        direction: `word_to_patch`, the only one so far.
        negatives: `within` or `batch`.
        repeated_words: `merge` makes the repeats of a word in a report one: within, they share the target in equal
            parts; in a batch, their mean embedding stands for them. A negated word is another word than the affirmed
            one. `separate` takes each repeat as a word of its own (SPARC).
        detach_weights: no gradient through the patch weights a.
        skip_negated: leave out words inside a negation, whose finding is not in the image; by default in `batch` only.
        skip_stop_words: leave out function words and boilerplate; by default in `batch` only.
        temperature: > 0; 0.1 is the field's.
        group: consecutive pairs of a rank that are contrasted in `batch`, >= 1. The last group may be smaller; the
            loss of a group of one is 0.
        similarity: `inner` product of the tokens as they are (SPARC) or `cosine`, for the patch weights.
        reduction: `report` takes the mean over the words of a report, then over reports with words; `word` over all
            words.
        shuffled: a negative control, not for use: each image is given the words of the previous report of the rank's
            batch, so that nothing about its content can be learned. Needs at least two pairs a rank.

    Raises:
        SistaError: unknown option, argument out of its range; in `forward`: words without ids where these are needed.
    """

    needs_pooled = False

    def __init__(
        self,
        sparsity: str = "threshold",
        sigma: float | str = 0.5,
        direction: str = "word_to_patch",
        negatives: str = "within",
        repeated_words: str = "merge",
        detach_weights: bool = False,
        skip_negated: bool | None = None,
        skip_stop_words: bool | None = None,
        temperature: float = 0.1,
        group: int = 32,
        similarity: str = "inner",
        reduction: str = "report",
        shuffled: bool = False,
    ):
        super().__init__()
        choice("sta", "sparsity", sparsity, ("threshold",))
        choice("sta", "direction", direction, ("word_to_patch",))
        self.sigma = None if sigma == "1/N" else number("sta", "sigma", sigma, 0, 1, or_else=', or "1/N"')
        self.negatives = choice("sta", "negatives", negatives, ("within", "batch"))
        self.merge = choice("sta", "repeated_words", repeated_words, ("merge", "separate")) == "merge"
        self.detach_weights = switch("sta", "detach_weights", detach_weights)
        in_batch = self.negatives == "batch"
        self.skip_negated = in_batch if skip_negated is None else switch("sta", "skip_negated", skip_negated)
        self.skip_stop_words = (
            in_batch if skip_stop_words is None else switch("sta", "skip_stop_words", skip_stop_words)
        )
        self.temperature = number("sta", "temperature", temperature, 0, above=True)
        self.group = whole("sta", "group", group, 1)
        self.cosine = choice("sta", "similarity", similarity, ("inner", "cosine")) == "cosine"
        self.reduction = choice("sta", "reduction", reduction, ("report", "word"))
        self.shuffled = switch("sta", "shuffled", shuffled)
        self.stop_ids: Tensor
        self.register_buffer("stop_ids", torch.tensor(sorted(map(word_id, STOP_WORDS))), persistent=False)

    def forward(self, pair: Pair) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean over the reports (or words) of all ranks, () fp32, and what to log."""
        with torch.autocast(pair.image.local.device.type, enabled=False):
            patches = at_least_float32(pair.image.local)  # B P D
            words = self._words(pair.text)
            if self.negatives == "within":
                found = self._within(words, patches)
            else:
                words = self._unique(words) if self.merge else words
                spans = range(0, len(patches), self.group)
                groups = [
                    self._across(Words(*(x[i : i + self.group] for x in words)), patches[i : i + self.group])
                    for i in spans
                ]
                found = Alignment(*(torch.cat(parts) for parts in zip(*groups, strict=True)))  # B L
            loss = self._reduce(found.loss, words.used)
            count = words.used.sum()
            contested = words.used & found.contested
            diagnostics = {
                "kept_patches": found.kept[words.used].sum() / count.clamp_min(1),
                "words": count / len(patches),
                "token_accuracy": found.hit[contested].sum() / contested.sum().clamp_min(1),
            }
        return loss, {key: value.detach() for key, value in diagnostics.items()}

    def _words(self, text: Features) -> Words:
        """Choose the words that take part."""
        local, ids = at_least_float32(text.local), text.ids
        used = torch.ones(local.shape[:2], dtype=torch.bool, device=local.device) if text.mask is None else text.mask
        if ids is None:
            if self.merge or self.skip_negated or self.skip_stop_words or self.negatives == "batch":
                raise SistaError(
                    "loss 'sta': the text encoder gives no word ids; use `negatives: within, repeated_words: separate` "
                    "without skip options"
                )
            ids = used.long()
        if self.shuffled:
            local, ids, used = (x.roll(1, 0) for x in (local, ids, used))
        if self.skip_negated:
            used = used & (ids > 0)
        if self.skip_stop_words:
            used = used & ~torch.isin(ids.abs(), self.stop_ids)
        return Words(local, ids, used)

    @staticmethod
    def _unique(words: Words) -> Words:
        """Put the mean of a word's repeats at its first place in the report, and leave the other places out."""
        same = _same(words)  # B L L
        local = _shares(same, words.local.dtype) @ words.local  # B L D
        return Words(local, words.ids, words.used & ~same.tril(-1).any(2))

    def _weights(self, words: Tensor, patches: Tensor) -> Tensor:
        """Return the sparse weights (..., L, P) of words (..., L, D) over patches (..., P, D)."""
        if self.cosine:
            words, patches = F.normalize(words, dim=-1), F.normalize(patches, dim=-1)
        sigma = 1 / patches.shape[-2] if self.sigma is None else self.sigma
        weights = sparse_weights(words @ patches.transpose(-1, -2), sigma)
        return weights.detach() if self.detach_weights else weights

    def _within(self, words: Words, patches: Tensor) -> Alignment:
        """Contrast the words of a report among themselves."""
        weights = self._weights(words.local, patches)  # B L P
        vision = weights @ patches  # B L D
        logits = F.normalize(words.local, dim=2) @ F.normalize(vision, dim=2).transpose(1, 2) / self.temperature
        own = torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device).expand_as(logits)  # B L L
        target = _same(words) if self.merge else own
        mass = _shares(target, logits.dtype)
        # each row keeps its own column, so that rows of padding stay finite; they have no weight in the mean
        closed = ~(words.used[:, None, :] | own)
        loss, hit = logits.new_zeros(logits.shape[:2]), logits.new_zeros(logits.shape[:2])  # B L
        for one_way in (logits, logits.transpose(1, 2)):
            free = one_way.masked_fill(closed, -torch.inf)
            loss = loss + (free.logsumexp(2) - (mass * one_way).sum(2)) / 2  # B L
            hit = hit + target.gather(2, free.argmax(2, keepdim=True)).squeeze(2).float() / 2
        kept = (weights > 0).float().mean(2)
        return Alignment(loss, kept, hit, (~closed & ~target).any(2))

    def _across(self, words: Words, patches: Tensor) -> Alignment:
        """Contrast the words of a group's reports with their patches in the group's images."""
        used = words.used
        report = used.nonzero()[:, 0]  # n
        w = words.local[used]  # n D
        weights = self._weights(w, patches)  # G n P
        vision = F.normalize(weights @ patches, dim=2)  # G n D
        logits = torch.einsum("nd,gnd->ng", F.normalize(w, dim=1), vision) / self.temperature
        own = report[:, None] == torch.arange(len(patches), device=w.device)  # n G
        # a report that names the same word is no evidence against its image
        named = (words.ids[used][:, None, None] == words.ids).any(2)  # n G
        free = logits.masked_fill(named & ~own, -torch.inf)
        each = torch.arange(len(w), device=w.device)

        def back(values: Tensor) -> Tensor:
            return values.new_zeros(used.shape).masked_scatter(used, values)  # n → G L

        return Alignment(
            back(free.logsumexp(1) - logits[own]),
            back((weights[report, each] > 0).float().mean(1)),
            back((free.argmax(1) == report).float()),
            back((~named & ~own).any(1)),
        )

    def _reduce(self, loss: Tensor, used: Tensor) -> Tensor:
        if self.reduction == "word":
            return global_mean(loss, used)
        count = used.sum(1)  # B
        return global_mean((loss * used).sum(1) / count.clamp_min(1), count > 0)


def sparse_weights(similarity: Tensor, sigma: float) -> Tensor:
    """Turn similarities into sparse weights: min-max over the patches, threshold, divided by the sum.

    SPARC (arXiv 2401.09865), eq. 2-4, with the threshold relative to the maximum, so that the maximum survives always.

    Args:
        similarity: (..., P) of a word to the patches.
        sigma: 0 to 1; patches below `sigma` of the maximum, after min-max, get weight 0.

    Returns:
        (..., P) >= 0, rows sum to 1; 1 / P each where all similarities are equal up to rounding.
    """
    low, high = similarity.amin(-1, keepdim=True), similarity.amax(-1, keepdim=True)
    rounding = 16 * torch.finfo(similarity.dtype).eps * similarity.detach().abs().amax(-1, keepdim=True)
    constant = high - low <= rounding
    above = (similarity - low).masked_fill(constant, 1.0)
    threshold = (sigma * (high - low)).detach().masked_fill(constant, 0.0)
    # the division by the range cancels in the division by the sum, so it is left out
    kept = above.masked_fill(above < threshold, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def _same(words: Words) -> Tensor:
    """Return (B, L, L) bool: two used places that hold the same word, and each place with itself."""
    ids, used = words.ids, words.used
    same = (ids[:, :, None] == ids[:, None, :]) & used[:, :, None] & used[:, None, :]
    return same | torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)


def _shares(which: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide each row's mass equally among its True places, of which it has one at least."""
    shares = which.to(dtype)
    return shares / shares.sum(-1, keepdim=True)
