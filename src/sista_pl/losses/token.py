"""Token level: words of a report against the few image patches that they speak of, and patches against their words.

B pairs of this rank, P patches, L words, D joint dimension, G pairs of a group, n words of a group.

The sparse grouping and the loss within a report are SPARC's (Bica et al. 2024, arXiv 2401.09865, eq. 2-6) with guards
where they divide by zero; no equation of the SISTA paper (Bui et al., arXiv 2601.08165) was at hand, so that the
formulas, the contrast against other studies, the direction from patches to words, the other sparsities and all
defaults are our documented choice.
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
from sista_pl.losses.sparsity import weighting
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

    `word_to_patch`: s = W Vᵀ, brought to [0, 1] over the patches of an image; what is below `sigma` of the maximum is
    dropped, the rest divided by its sum weights the patches: c = a V. Then, with ℓ = cos(W, c) / temperature:

    * `negatives: within` (SPARC): a word against the other words of its report, both ways, mean of the two.
    * `negatives: batch`: a word with its patches in its own image against the same word with its patches in the other
      images of a group, weighted in each image by the same formula; images whose report has the same word are left out.

    `patch_to_word`: the same with the sides changed. A patch weights the words of its own report that take part (the
    others are masked before minimum and maximum): c = a W, (P, D). Then a patch against the other patches of its image
    with ℓ = cos(V, c) / temperature, (P, P), both ways, mean of the two; the mean over patches, then over reports with
    words. Patches that weight the same words alike have the same c, so that short reports can't bring it to 0.

    Within a report the loss can be solved without looking at the image; each figure reported with it needs its
    `shuffled` control. Logs: `words` that take part, a pair; of `word_to_patch` `kept_patches`, mean share of the
    patches with a weight, and `token_accuracy`, how often the right words or image win, over words that have a
    competitor; of `patch_to_word` `kept_words`, mean share of a report's words with a weight, repeats counted once
    where they are merged, and `patch_accuracy`, how often the right patch wins.

    Args:
        sparsity: how similarities become weights a; see `sista_pl.losses.sparsity`. `threshold` as above; `topk` keeps
            the `top` most similar; `sparsemax` of s / `sparsity_temperature`; `softmax` of it keeps all, a control.
        sigma: of `threshold`, as a share of the maximum, 0 (all but the least similar) to 1 (the maximum alone), or
            "1/N", SPARC's, with N = P, or the words that a patch chooses from; it drops hardly any patch, real sparsity
            begins near 0.5, the default.
        top: of `topk`, >= 1; default 8.
        sparsity_temperature: of `sparsemax` and `softmax`, > 0; default 10 for `inner` and 0.1 for `cosine`, our
            choice: about the spread of s between unrelated tokens of D = 128 as the projection heads return them, of
            length √D. At 1, sparsemax of `inner` keeps little more than the maximum.
        direction: `word_to_patch`, `patch_to_word`, or `both`, the mean of the two losses.
        negatives: `within` or `batch`; `batch` for `word_to_patch` alone, since a patch has no identity by which to
            leave out the images that show the same.
        repeated_words: `merge` makes the repeats of a word in a report one: within, they share the target in equal
            parts; in a batch and for `patch_to_word`, their mean embedding stands for them, so that a word said twice
            has no double weight. A negated word is another word than the affirmed one. `separate` takes each repeat as
            a word of its own (SPARC).
        detach_weights: no gradient through the weights a.
        skip_negated: leave out words inside a negation, whose finding is not in the image; by default in `batch` only.
        skip_stop_words: leave out function words and boilerplate; by default in `batch` only.
        temperature: > 0; 0.1 is the field's.
        group: consecutive pairs of a rank that are contrasted in `batch`, >= 1. The last group may be smaller; the
            loss of a group of one is 0.
        similarity: `inner` product of the tokens as they are (SPARC) or `cosine`, for the weights.
        reduction: `report` takes the mean over the words of a report, then over reports with words; `word` over all
            words. For `patch_to_word` they are the same: all images have as many patches.
        context: whose embedding of a word is compared, of `batch` alone. `own`: of its report, which holds some of the
            report's other words, so that a word may win by the most visible of them. `others`: the mean over the other
            reports of the group with that word, which holds what these have in common; a word that no other report of
            the group has is left out.
        shuffled: a negative control, not for use: each image is given the words of the previous report of the rank's
            batch, so that nothing about its content can be learned. Needs at least two pairs a rank.

    Raises:
        SistaError: unknown option, argument out of its range or of another sparsity, `batch` with patches as anchors;
            in `forward`: words without ids where these are needed.
    """

    needs_pooled = False

    def __init__(
        self,
        sparsity: str = "threshold",
        sigma: float | str | None = None,
        top: int | None = None,
        sparsity_temperature: float | None = None,
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
        context: str = "own",
        shuffled: bool = False,
    ):
        super().__init__()
        self.direction = choice("sta", "direction", direction, ("word_to_patch", "patch_to_word", "both"))
        self.negatives = choice("sta", "negatives", negatives, ("within", "batch"))
        self.merge = choice("sta", "repeated_words", repeated_words, ("merge", "separate")) == "merge"
        self.detach_weights = switch("sta", "detach_weights", detach_weights)
        in_batch = self.negatives == "batch"
        if in_batch and self.direction != "word_to_patch":
            raise SistaError(
                f"loss 'sta': direction is {direction!r} with `negatives: batch`, but a patch has no identity by which "
                "to leave out the images that show the same; use `negatives: within`"
            )
        self.skip_negated = in_batch if skip_negated is None else switch("sta", "skip_negated", skip_negated)
        self.skip_stop_words = (
            in_batch if skip_stop_words is None else switch("sta", "skip_stop_words", skip_stop_words)
        )
        self.temperature = number("sta", "temperature", temperature, 0, above=True)
        self.group = whole("sta", "group", group, 1)
        self.cosine = choice("sta", "similarity", similarity, ("inner", "cosine")) == "cosine"
        usual = 0.1 if self.cosine else 10.0
        self.sparse = weighting("sta", sparsity, sigma, top, sparsity_temperature, usual)
        self.reduction = choice("sta", "reduction", reduction, ("report", "word"))
        self.others = choice("sta", "context", context, ("own", "others")) == "others"
        if self.others and not (in_batch and self.merge):
            raise SistaError("loss 'sta': context is 'others'; it goes with `negatives: batch, repeated_words: merge`")
        self.shuffled = switch("sta", "shuffled", shuffled)
        self.stop_ids: Tensor
        self.register_buffer("stop_ids", torch.tensor(sorted(map(word_id, STOP_WORDS))), persistent=False)

    def forward(self, pair: Pair) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean over the reports (or words) of all ranks, () fp32, and what to log."""
        with torch.autocast(pair.image.local.device.type, enabled=False):
            patches = at_least_float32(pair.image.local)  # B P D
            words = self._words(pair.text.shifted() if self.shuffled else pair.text)
            ways = []
            if self.direction != "patch_to_word":
                ways.append(self._word_to_patch(words, patches))
            if self.direction != "word_to_patch":
                ways.append(self._patch_to_word(words, patches))
        logs = {key: value.detach() for _, diagnostics in ways for key, value in diagnostics.items()}
        return torch.stack([loss for loss, _ in ways]).mean(), logs

    def _word_to_patch(self, words: Words, patches: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of words against patches, (), and what to log."""
        if self.negatives == "within":
            found = self._within(words, patches)
        else:
            words = self._unique(words) if self.merge else words
            spans = range(0, len(patches), self.group)
            parts = [Words(*(x[i : i + self.group] for x in words)) for i in spans]
            parts = [_from_others(part) for part in parts] if self.others else parts
            words = words._replace(used=torch.cat([part.used for part in parts]))
            groups = [self._across(part, patches[i : i + self.group]) for part, i in zip(parts, spans, strict=True)]
            found = Alignment(*(torch.cat(each) for each in zip(*groups, strict=True)))  # B L
        count = words.used.sum()
        contested = words.used & found.contested
        return self._reduce(found.loss, words.used), {
            "kept_patches": (found.kept * words.used).sum() / count.clamp_min(1),
            "words": count / len(patches),
            "token_accuracy": (found.hit * contested).sum() / contested.sum().clamp_min(1),
        }

    def _patch_to_word(self, words: Words, patches: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the patches of an image among themselves, by the words that each groups, and what to log.

        The count of words is the one before repeats are merged, as in the other direction.
        """
        said = words.used.sum()
        words = self._unique(words) if self.merge else words
        weights = self._weights(patches, words.local, words.used[:, None, :])  # B P L
        language = weights @ words.local  # B P D
        logits = F.normalize(patches, dim=2) @ F.normalize(language, dim=2).transpose(1, 2) / self.temperature
        loss = (logits.logsumexp(2) + logits.logsumexp(1)) / 2 - logits.diagonal(dim1=1, dim2=2)  # B P
        each = torch.arange(patches.shape[1], device=patches.device)
        hit = ((logits.argmax(2) == each).float() + (logits.argmax(1) == each).float()) / 2  # B P
        count = words.used.sum(1)  # B
        spoken = count > 0
        reports = spoken.sum().clamp_min(1)
        return global_mean(loss.mean(1), spoken), {
            "kept_words": ((weights > 0).sum(2).float().mean(1) / count.clamp_min(1) * spoken).sum() / reports,
            "words": said / len(patches),
            "patch_accuracy": (hit.mean(1) * spoken).sum() / reports,
        }

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

    def _weights(self, anchors: Tensor, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the sparse weights (..., M, N) of anchors (..., M, D) over tokens (..., N, D) of the other side."""
        if self.cosine:
            anchors, tokens = F.normalize(anchors, dim=-1), F.normalize(tokens, dim=-1)
        weights = self.sparse(anchors @ tokens.transpose(-1, -2), valid)
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
        logits = _cosines(F.normalize(w, dim=1), weights, patches).T / self.temperature  # n G
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


def _cosines(words: Tensor, weights: Tensor, patches: Tensor) -> Tensor:
    """Return (G, n) the cosine of each word with its patches of each image, `normalize(weights @ patches)`.

    Made of products between patches instead, since G n D numbers take longer to read and write than to compute.

    Args:
        words: (n, D) of length 1.
        weights: (G, n, P).
        patches: (G, P, D).
    """
    along = (weights * (words @ patches.transpose(1, 2))).sum(2)
    square = (weights @ (patches @ patches.transpose(1, 2)) * weights).sum(2)
    return along / square.clamp_min(1e-24).sqrt()


def _from_others(words: Words) -> Words:
    """Give each word the mean of its embeddings in the other reports; a word of one report alone is left out."""
    used, local = words.used, words.local[words.used]  # n D
    _, place, count = words.ids[used].unique(return_inverse=True, return_counts=True)
    total = local.new_zeros(len(count), local.shape[1]).index_add(0, place, local)
    count = count[place]  # n, reports that have the word
    others = (total[place] - local) / (count - 1).clamp_min(1).unsqueeze(1)
    rows = used.unsqueeze(2).expand_as(words.local)
    shared = used.new_zeros(used.shape).masked_scatter(used, count > 1)
    return Words(words.local.masked_scatter(rows, others), words.ids, used & shared)


def _same(words: Words) -> Tensor:
    """Return (B, L, L) bool: two used places that hold the same word, and each place with itself."""
    ids, used = words.ids, words.used
    same = (ids[:, :, None] == ids[:, None, :]) & used[:, :, None] & used[:, None, :]
    return same | torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)


def _shares(which: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide each row's mass equally among its True places, of which it has one at least."""
    shares = which.to(dtype)
    return shares / shares.sum(-1, keepdim=True)
