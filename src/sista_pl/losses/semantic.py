"""Instance level with semantic targets: reports or labels say which other pairs of the batch are no negatives.

B pairs of this rank, N pairs of all ranks, b x c a block of images and reports, Ds semantic dimension, M studies in the
sample of training similarities, k wanted positives an anchor, K labels.

S is the similarity of two reports, S' = (S - offset) / (1 - offset) the calibrated one, 1 on the diagonal.
What is more precise here than "inter-report similarity removes false negatives" is our documented choice, not the
equations of the SISTA paper (Bui et al., arXiv 2601.08165).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sista_pl.distributed import gather
from sista_pl.errors import SistaError
from sista_pl.losses import LOSSES
from sista_pl.losses.arguments import choice, number
from sista_pl.losses.chunked import Block, own_pairs, side
from sista_pl.losses.instance import Alike, Likeness, contrast
from sista_pl.pair import Pair, at_least_float32

MODES = ("soft", "mask", "multi_positive", "triage")
SOURCES = ("data", "online")
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 1.0
# Equal reports have S' = 1 up to rounding: they stay positives however few are wanted, and count as identical.
HIGHEST_THRESHOLD, IDENTICAL = 0.999, 0.9999
# A new batch is a tenth of the running mean, as in batch normalisation. Nearer to 1, where all reports look alike,
# the division by 1 - center would leave equal reports no longer equal in float32.
MOMENTUM, HIGHEST_CENTER = 0.1, 0.99


class Reports(NamedTuple):
    """The reports of a global batch, as a similarity source sees them.

    Args:
        local: (B, Ds) unit rows of this rank.
        every: (N, Ds) those of all ranks.
        offset: mean similarity of two different reports, a number or () tensor.
        sample: (M, n') S' of training studies to others, or None.
    """

    local: Tensor
    every: Tensor
    offset: float | Tensor
    sample: Tensor | None = None

    @classmethod
    def of(cls, pair: Pair, loss: str) -> Reports:
        """Return the reports of a batch by the similarity source of the data.

        Raises:
            SistaError: there is none.
        """
        if pair.semantics is None:
            raise SistaError(
                f"loss {loss!r}: the data bring no report similarity; set `similarity: findings` in the data group"
            )
        r = at_least_float32(pair.semantics.vectors.detach())
        return cls(r, gather(r), pair.semantics.offset, pair.semantics.sample)

    def raw(self, block: Block) -> Tensor:
        """Return S (b, c) of a block."""
        return self.local[block.rows] @ self.every[block.columns].T

    def calibrate(self, raw: Tensor, block: Block) -> Tensor:
        """Return S' (b, c) of the S of a block."""
        return own_pairs((raw - self.offset).div_(1 - self.offset), block, 1)


class Calibration:
    """delta and tau for a global batch of n pairs: as given, or else solved on the sample, once for each n.

    Args:
        loss: its name, for the errors.
        positives: wanted positives k an anchor, > 0.
        delta: threshold on S', > 0, or None.
        tau: temperature of the semantic target, > 0, or None.

    Raises:
        SistaError: argument out of its range.
    """

    def __init__(self, loss: str, positives: float, delta: float | None, tau: float | None):
        self.loss = loss
        self.positives = number(loss, "positives", positives, 0, above=True)
        self.delta = None if delta is None else number(loss, "delta", delta, 0, above=True)
        self.tau = None if tau is None else number(loss, "tau", tau, 0, above=True)
        self._solved: dict[int, tuple[float, float]] = {}

    def unsolved(self, source: str) -> SistaError:
        """Return the error that names what is not given, where `source` has no sample to solve it on."""
        examples = {"delta": 0.95, "tau": 0.1}
        missing = {name: value for name, value in examples.items() if getattr(self, name) is None}
        give = ", ".join(f"{name}: {value}" for name, value in missing.items())
        return SistaError(
            f"loss {self.loss!r}: {source} has no sample to solve {' and '.join(missing)} on; give "
            f"{'both' if len(missing) == 2 else 'it'}, as in `{give}`"
        )

    def __call__(self, sample: Tensor | None, n: int) -> tuple[float, float]:
        """Return delta and tau.

        Raises:
            SistaError: one is not given, and there is no sample to solve it on.
        """
        delta, tau = self.delta, self.tau
        if delta is not None and tau is not None:
            return delta, tau
        if sample is None:
            raise self.unsolved("the report similarity")
        if n not in self._solved:
            sample = sample.detach().double().cpu()
            self._solved[n] = (
                solve_threshold(sample, self.positives, n) if delta is None else delta,
                solve_temperature(sample, self.positives, n) if tau is None else tau,
            )
        return self._solved[n]


def solve_threshold(sample: Tensor, positives: float, n: int) -> float:
    """Return the S' that `positives` of an anchor's n - 1 others reach on average, from 0 to 0.999.

    Args:
        sample: (M, n') S' of training studies to others.
        positives: wanted number k.
        n: size of the global batch.
    """
    share = min(positives / max(n - 1, 1), 1.0)
    return min(max(torch.quantile(sample.flatten(), 1 - share).item(), 0.0), HIGHEST_THRESHOLD)


def solve_temperature(sample: Tensor, positives: float, n: int) -> float:
    """Return the tau in 0.01 ... 1 at which the own pair keeps 1 / (1 + k) of the soft target, in the geometric mean.

    An anchor's mass on its own pair is e^{1/tau} / (e^{1/tau} + (n - 1) mean_j e^{S'_j/tau}), which falls as tau
    grows. Where the wanted one lies outside, the nearer end of the range is returned.

    Args:
        sample: (M, n') S' of training studies to others.
        positives: wanted number k.
        n: size of the global batch.
    """
    if n < 2:
        return LOWEST_TEMPERATURE
    below = sample.clamp(max=1) - 1
    low, high = LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE

    def spread(tau: float) -> float:
        others = (below / tau).logsumexp(1) + math.log((n - 1) / below.shape[1])  # M
        return F.softplus(others).mean().item()

    wanted = math.log1p(positives)
    if spread(low) >= wanted:
        return low
    if spread(high) <= wanted:
        return high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if spread(middle) < wanted else (low, middle)
    return (low + high) / 2


def count_positives(others: Tensor, s: Tensor, block: Block) -> dict[str, Tensor]:
    """Return what every loss with semantic targets counts in the rows of a block, each (b,).

    Args:
        others: (b, c) 1 for positives beside the own pair, else 0.
        s: (b, c) similarities that are 1 for equals.
        block: where they are.
    """
    return {"false_negatives": others.sum(1), "identical_reports": reaching(s, IDENTICAL, block, 0).sum(1)}


def reaching(s: Tensor, threshold: float, block: Block, own: float) -> Tensor:
    """Return (b, c) 1 where s reaches the threshold, else 0, and `own` for own pairs.

    In the type of s: to compare to bools and change these to numbers takes a CPU ten times as long.
    """
    return own_pairs(torch.ge(s, threshold, out=torch.empty_like(s)), block, own)


def tell(logs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the means to log of the local rows' values and counts, each (B,)."""
    # of equals, whether there are any
    told = {key: value.gt(0).to(value.dtype) if key == "identical_reports" else value for key, value in logs.items()}
    return {key: value.mean() for key, value in told.items()}


@LOSSES.register("sia")
class SemanticInstanceAlignment(nn.Module):
    """Semantic-aware instance alignment: report similarity S' decides what is no negative.

    * `soft`: targets Y = (1 - alpha) I + alpha softmax_row(S' / tau); ½ [sCE(z, Y) + sCE(zᵀ, Y)].
    * `mask`: pairs with S' >= delta leave the denominator; hard cross-entropy on the own pair.
    * `multi_positive`: Y ∝ 1[i = j or S' >= delta], the supervised contrast of Khosla et al. 2020.
    * `triage`: on S as it is, without the offset. Positives are the own pair and S > positive_threshold, negatives
      S <= negative_threshold, the pairs between are ignored; each positive is contrasted alone with the negatives,
      -log(e^{z_ij} / (e^{z_ij} + Σ_negatives e^{z_ik})), the mean over an anchor's positives, then over anchors, ½ of
      both directions; 0 for an anchor without negatives. Liu et al. 2023 (SAT).

    The modes, their formulas and all defaults are our documented choice; no equation of the SISTA paper was at hand.
    `alpha: 1.0`, since a smaller one keeps a part of each false negative (with 0.5, four equal reports leave 0.625 of
    the mass on the own pair instead of 0.25). `positives: 4`, since with it, in batches of 144 chest X-ray reports of
    which a third are normal, equal reports share the mass and a report without an equal keeps 0.76 of its own; with 8
    it keeps 0.30.

    Logs: `true_pair_mass` target mass of the own pair (1 in `mask`); `false_negatives` positives beside the own pair,
    S' >= delta or S > positive_threshold, mean over the anchors; `identical_reports` share of anchors with another
    report of S' >= 0.9999 in the batch; `ignored` share of an anchor's others that are neither positive nor negative
    (`triage` only); `delta` (not in `triage`); `tau` (`soft` only); `ema_center` (`online` only); `accuracy` as in
    `clip`.

    Args:
        mode: `soft`, `mask`, `multi_positive` or `triage`.
        alpha: share a of the semantic target in `soft`, 0 (equals `clip`) to 1.
        positives: wanted positives k an anchor, > 0, in the global batch of N pairs; `delta` and `tau` are solved for
            it, again for each N, so that the target keeps its sharpness as the batch grows.
            `delta` is the 1 - k / (N - 1) quantile of training similarities, at most 0.999, so that equal reports are
            positives always, and at least 0, the mean S' of any two reports.
            `tau` is the one in 0.01 ... 1 for which the mean over anchors of log(1 / mass of the own pair) is
            log(1 + k); 0.01 where equal reports alone take more.
        delta: threshold on S', > 0, instead of the solved one; above 1 no other pair is a positive.
        tau: temperature of the semantic target, > 0, instead of the solved one.
        positive_threshold: of `triage`, on S, -1 to 1: a pair above it is a positive. 0.98 and 0.97 are SAT's, on the
            cosine of frozen Bio_ClinicalBERT embeddings; another similarity source may need others.
        negative_threshold: of `triage`, on S, -1 to `positive_threshold`: a pair at or below it is a negative.
        source: `data`, the similarity source of the data group, or `online`, the pooled report embeddings of the
            encoder that is being trained, as the losses see them (behind the projection head), normalised and
            detached. There is no sample of training similarities then: `delta`, in `soft` also `tau`, have to be
            given. The offset is `ema_center`, the running mean of the off-diagonal S of the training's global
            batches, the n-th with a weight of 1 / n, at least 0.1; an offset is at most 0.99. It is updated in training
            only, before it is used, and kept in the checkpoint. So the loss of a batch depends on those before it.
        chunk: side of the blocks of z, as in `clip`.

    Raises:
        SistaError: unknown mode or source, argument out of its range, `online` without `delta` or `tau`; in
            `forward`: no report similarity configured.
    """

    needs_tokens = False

    def __init__(
        self,
        mode: str = "soft",
        alpha: float = 1.0,
        positives: float = 4.0,
        delta: float | None = None,
        tau: float | None = None,
        positive_threshold: float = 0.98,
        negative_threshold: float = 0.97,
        source: str = "data",
        chunk: int | None = None,
    ):
        super().__init__()
        self.mode = choice("sia", "mode", mode, MODES)
        self.alpha = number("sia", "alpha", alpha, 0, 1)
        self.calibration = Calibration("sia", positives, delta, tau)
        if mode != "soft":
            self.calibration.tau = 1.0  # no other mode has one to solve
        self.positive_threshold = number("sia", "positive_threshold", positive_threshold, -1, 1)
        at_most, which = self.positive_threshold, " (positive_threshold)"
        self.negative_threshold = number("sia", "negative_threshold", negative_threshold, -1, at_most, or_else=which)
        self.source = choice("sia", "source", source, SOURCES)
        self.chunk = side("sia", chunk)
        self.ema_center: Tensor
        self.ema_batches: Tensor
        if source == "online":
            if mode != "triage" and None in (self.calibration.delta, self.calibration.tau):
                raise self.calibration.unsolved("`source: online`")
            self.register_buffer("ema_center", torch.zeros(()))
            self.register_buffer("ema_batches", torch.zeros((), dtype=torch.long))

    def forward(self, pair: Pair) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean over the local rows of both directions, () fp32, and what to log."""
        reports = Reports.of(pair, "sia") if self.source == "data" else self._online(pair)
        n = len(reports.every)
        delta, tau = (math.nan, math.nan) if self.mode == "triage" else self.calibration(reports.sample, n)

        def semantic(block: Block) -> Alike:
            s = reports.calibrate(reports.raw(block), block)  # b c

            def counts() -> dict[str, Tensor]:
                return count_positives(reaching(s, delta, block, own=0), s, block)

            if self.mode == "soft":  # own pairs have the highest, 1
                return Alike((s - 1).div_(tau).exp_(), None, counts)
            if self.mode == "mask":
                return Alike(None, reaching(s, delta, block, own=0), counts)
            return Alike(reaching(s, delta, block, own=1), None, counts)

        def triage(block: Block) -> Alike:
            raw = reports.raw(block)
            above = torch.gt(raw, self.positive_threshold, out=torch.empty_like(raw))
            positive = own_pairs(above, block, 1)
            ignored = own_pairs(torch.gt(raw, self.negative_threshold, out=torch.empty_like(raw)), block, 1) - positive

            def counts() -> dict[str, Tensor]:
                others = own_pairs(positive.clone(), block, 0)
                return count_positives(others, reports.calibrate(raw, block), block) | {"ignored": ignored.sum(1)}

            return Alike(positive, ignored, counts)

        if self.mode == "triage":
            likeness = Likeness(triage, share=1.0, alone=True)
        else:
            likeness = Likeness(semantic, share={"soft": self.alpha, "mask": 0.0}.get(self.mode, 1.0))
        loss, logs = contrast(pair, likeness, self.chunk)
        diagnostics = tell(logs)
        if self.mode == "triage":
            diagnostics["ignored"] /= max(n - 1, 1)
        else:
            diagnostics["delta"] = loss.new_full((), delta)
        if self.mode == "soft":
            diagnostics["tau"] = loss.new_full((), tau)
        if isinstance(reports.offset, Tensor):
            diagnostics["ema_center"] = reports.offset
        return loss, diagnostics

    @torch.no_grad()
    def _online(self, pair: Pair) -> Reports:
        """Return the reports as the encoder in training sees them; in training, move the running mean first."""
        r = F.normalize(at_least_float32(pair.text.pooled), dim=1)  # B D
        every = gather(r)  # N D
        n = len(every)
        if self.training and n > 1:
            mean = (every.sum(0).square().sum() - n) / (n * (n - 1))
            self.ema_batches += 1
            self.ema_center += (mean - self.ema_center) * (1 / self.ema_batches.to(mean.dtype)).clamp_min(MOMENTUM)
        # a copy by clamp, since a block is computed again after the next batch may have moved the mean
        return Reports(r, every, at_least_float32(self.ema_center).clamp(max=HIGHEST_CENTER))


@LOSSES.register("medclip")
class MedClip(nn.Module):
    """Semantic matching on labels: Y = softmax_row(cos(label_i, label_j) / tau), ½ [sCE(z, Y) + sCE(zᵀ, Y)].

    Wang et al. 2022 (MedCLIP, arXiv 2210.10163). An unknown label counts as 0. A row without any positive label has no
    direction; it gets a coordinate of its own, "no finding", so that such rows are alike to each other and to no
    other. That, and `tau`, which the paper's target goes without (1, nearly uniform over a batch), is our documented
    choice: with 0.1 a pair of equal labels has 22,026 times the mass of one that shares none.

    Logs: `true_pair_mass` target mass of the own pair; `false_negatives` others of the same labels, mean over the
    anchors; `identical_reports` share of anchors with such another; `no_finding` share of rows without a positive
    label; `accuracy` as in `clip`.

    Args:
        tau: temperature of the target, > 0.
        chunk: side of the blocks of z, as in `clip`.

    Raises:
        SistaError: argument out of its range; in `forward`: the batch brings no labels.
    """

    needs_tokens = False

    def __init__(self, tau: float = 0.1, chunk: int | None = None):
        super().__init__()
        self.tau = number("medclip", "tau", tau, 0, above=True)
        self.chunk = side("medclip", chunk)

    def forward(self, pair: Pair) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean over the local rows of both directions, () fp32, and what to log."""
        if pair.labels is None:
            raise SistaError("loss 'medclip': the data bring no labels; set `labels: [...]` in the data group")
        labels = at_least_float32(pair.labels.detach()).nan_to_num(0)  # B K
        empty = (labels == 0).all(1, keepdim=True)  # B 1
        unit = F.normalize(torch.cat([labels, empty.to(labels.dtype)], dim=1), dim=1)  # B K+1
        every = gather(unit)  # N K+1

        def alike(block: Block) -> Alike:
            s = unit[block.rows] @ every[block.columns].T  # b c

            def counts() -> dict[str, Tensor]:
                return count_positives(reaching(s, IDENTICAL, block, own=0), s, block)

            return Alike((s - 1).div_(self.tau).exp_(), None, counts)

        loss, logs = contrast(pair, Likeness(alike, share=1.0), self.chunk)
        return loss, tell(logs) | {"no_finding": empty.float().mean()}
