"""Instance level: whole images against whole reports of the global batch.

B pairs of this rank, N pairs of all ranks, b rows of a chunk, D joint dimension, Ds semantic dimension, M studies in
the sample of training similarities, k wanted positives an anchor.

The local rows are compared with all columns, in both directions: memory B x N, and exactly the loss of one process.
S is the similarity of two reports, S' = (S - offset) / (1 - offset) the calibrated one, 1 on the diagonal.
What is more precise here than "inter-report similarity removes false negatives" is our documented choice, not the
equations of the SISTA paper (Bui et al., arXiv 2601.08165).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sista_pl.distributed import gather, rank
from sista_pl.errors import SistaError
from sista_pl.losses import LOSSES
from sista_pl.losses.arguments import choice, number, whole
from sista_pl.pair import Pair, Semantics, at_least_float32

MODES = ("soft", "mask", "multi_positive")
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 1.0
# Equal reports have S' = 1 up to rounding: they stay positives however few are wanted, and count as identical.
HIGHEST_THRESHOLD, IDENTICAL = 0.999, 0.9999


class Target(NamedTuple):
    """What some rows of the batch should be close to.

    Args:
        mass: (b, N) rows that sum to 1.
        dropped: (b, N) bool, True for columns outside the denominator; None where there are none.
        diagnostics: (b,) values to log the mean of.
    """

    mass: Tensor
    dropped: Tensor | None
    diagnostics: dict[str, Tensor]


@LOSSES.register("clip")
class Clip(nn.Module):
    """Image-report contrast in which only the own report is right: ½ [CE(z, I) + CE(zᵀ, I)], z = s v tᵀ.

    Radford et al. 2021 (CLIP); Zhang et al. 2022 (ConVIRT). Logs `accuracy`: how often the own partner of a row has
    the highest of N similarities, mean of both directions.

    Args:
        chunk: rows of z that are kept at once, >= 1, for batches whose (B, N) does not fit; None for all. The value
            and the gradients stay the same, the backward pass computes the rows again.

    Raises:
        SistaError: `chunk` is no whole number >= 1.
    """

    needs_tokens = False

    def __init__(self, chunk: int | None = None):
        super().__init__()
        self.chunk = None if chunk is None else whole("clip", "chunk", chunk, 1)

    def forward(self, pair: Pair) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean over the local rows of both directions, () fp32, and what to log."""

        def own(rows: Tensor, diagonal: Tensor) -> Target:
            return Target(diagonal.to(torch.float32), None, {})

        return contrast(pair, own, self.chunk)


@LOSSES.register("sia")
class SemanticInstanceAlignment(nn.Module):
    """Semantic-aware instance alignment: report similarity S' decides what is no negative.

    * `soft`: targets Y = (1 - alpha) I + alpha softmax_row(S' / tau); ½ [sCE(z, Y) + sCE(zᵀ, Y)].
    * `mask`: pairs with S' >= delta leave the denominator; hard cross-entropy on the own pair.
    * `multi_positive`: Y ∝ 1[i = j or S' >= delta], the supervised contrast of Khosla et al. 2020.

    The modes, their formulas and all defaults are our documented choice; no equation of the SISTA paper was at hand.
    `alpha: 1.0`, since a smaller one keeps a part of each false negative (with 0.5, four equal reports leave 0.625 of
    the mass on the own pair instead of 0.25). `positives: 4`, since with it, in batches of 144 chest X-ray reports of
    which a third are normal, equal reports share the mass and a report without an equal keeps 0.76 of its own; with 8
    it keeps 0.30.

    Logs: `true_pair_mass` target mass of the own pair (1 in `mask`); `false_negatives` others with S' >= delta, mean
    over the anchors; `identical_reports` share of anchors with another report of S' >= 0.9999 in the batch; `delta`;
    `tau` (`soft` only); `accuracy` as in `clip`.

    Args:
        mode: `soft`, `mask` or `multi_positive`.
        alpha: share a of the semantic target in `soft`, 0 (equals `clip`) to 1.
        positives: wanted positives k an anchor, > 0, in the global batch of N pairs; `delta` and `tau` are solved for
            it, again for each N, so that the target keeps its sharpness as the batch grows.
            `delta` is the 1 - k / (N - 1) quantile of training similarities, at most 0.999, so that equal reports are
            positives always, and at least 0, the mean S' of any two reports.
            `tau` is the one in 0.01 ... 1 for which the mean over anchors of log(1 / mass of the own pair) is
            log(1 + k); 0.01 where equal reports alone take more.
        delta: threshold on S', > 0, instead of the solved one; above 1 no other pair is a positive.
        tau: temperature of the semantic target, > 0, instead of the solved one.
        chunk: rows that are kept at once, as in `clip`.

    Raises:
        SistaError: unknown mode, argument out of its range; in `forward`: no report similarity configured.
    """

    needs_tokens = False

    def __init__(
        self,
        mode: str = "soft",
        alpha: float = 1.0,
        positives: float = 4.0,
        delta: float | None = None,
        tau: float | None = None,
        chunk: int | None = None,
    ):
        super().__init__()
        self.mode = choice("sia", "mode", mode, MODES)
        self.alpha = number("sia", "alpha", alpha, 0, 1)
        self.positives = number("sia", "positives", positives, 0, above=True)
        self.delta = None if delta is None else number("sia", "delta", delta, 0, above=True)
        self.tau = None if tau is None else number("sia", "tau", tau, 0, above=True)
        self.chunk = None if chunk is None else whole("sia", "chunk", chunk, 1)
        self._solved: dict[int, tuple[float, float]] = {}

    def forward(self, pair: Pair) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean over the local rows of both directions, () fp32, and what to log."""
        if pair.semantics is None:
            raise SistaError(
                "loss 'sia': the data bring no report similarity; set `similarity: findings` in the data group"
            )
        r = at_least_float32(pair.semantics.vectors.detach())  # B Ds
        r_all = gather(r)  # N Ds
        offset = pair.semantics.offset
        delta, tau = self.calibrate(pair.semantics, len(r_all))

        def semantic(rows: Tensor, diagonal: Tensor) -> Target:
            s = ((r[rows] @ r_all.T - offset) / (1 - offset)).masked_fill(diagonal, 1)  # b N
            others = (s >= delta) & ~diagonal
            mass, dropped = diagonal.to(s.dtype), None
            if self.mode == "soft":
                mass = (1 - self.alpha) * mass + self.alpha * (s / tau).softmax(1)
            elif self.mode == "mask":
                dropped = others
            else:
                mass = (others | diagonal).to(s.dtype)
                mass = mass / mass.sum(1, keepdim=True)
            return Target(
                mass,
                dropped,
                {
                    "true_pair_mass": mass[diagonal],
                    "false_negatives": others.sum(1).float(),
                    "identical_reports": ((s >= IDENTICAL) & ~diagonal).any(1).float(),
                },
            )

        loss, diagnostics = contrast(pair, semantic, self.chunk)
        diagnostics["delta"] = loss.new_tensor(delta)
        if self.mode == "soft":
            diagnostics["tau"] = loss.new_tensor(tau)
        return loss, diagnostics

    def calibrate(self, semantics: Semantics, n: int) -> tuple[float, float]:
        """Return delta and tau for a global batch of n pairs: as given, or else solved on the sample, once for each n.

        Raises:
            SistaError: there is no sample to solve on.
        """
        delta, tau = self.delta, self.tau if self.mode == "soft" else 1.0
        if n not in self._solved:
            if delta is not None and tau is not None:
                self._solved[n] = (delta, tau)
            elif semantics.sample is None:
                raise SistaError(
                    "loss 'sia': the report similarity has no sample to solve delta and tau on; give both, as in "
                    "`delta: 0.95, tau: 0.1`"
                )
            else:
                sample = semantics.sample.detach().double().cpu()
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


def contrast(
    pair: Pair, target: Callable[[Tensor, Tensor], Target], chunk: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Contrast local images with all reports and local reports with all images.

    Args:
        pair: of this rank.
        target: called with the local row numbers (b,) and their place (b, N) bool in the global batch.
        chunk: rows that are kept at once; None for all.

    Returns:
        () mean over the local rows and both directions, and the detached means of the target's diagnostics and of
        `accuracy`.
    """
    with torch.autocast(pair.image.pooled.device.type, enabled=False):
        v, t = (F.normalize(at_least_float32(side.pooled), dim=1) for side in (pair.image, pair.text))  # B D
        v_all, t_all = gather(v), gather(t)  # N D
        scale = at_least_float32(pair.scale)
        first, columns = rank() * len(v), torch.arange(len(v_all), device=v.device)

        def block(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            diagonal = (rows + first)[:, None] == columns  # b N
            mass, dropped, diagnostics = target(rows, diagonal)
            loss, hits = torch.zeros_like(v[rows, 0]), torch.zeros(len(rows), device=v.device)  # b
            for anchors, others in ((v, t_all), (t, v_all)):
                z = scale * anchors[rows] @ others.T  # b N
                free = z if dropped is None else z.masked_fill(dropped, -torch.inf)
                loss = loss + (free.logsumexp(1) - (mass * z).sum(1)) / 2  # b
                hits = hits + (z.argmax(1) == rows + first).float() / 2
            return loss, diagnostics | {"accuracy": hits}

        rows = torch.arange(len(v), device=v.device)
        if chunk is None or chunk >= len(rows):
            parts = [block(rows)]
        else:
            parts = [
                checkpoint(block, part, use_reentrant=False, preserve_rng_state=False) for part in rows.split(chunk)
            ]
        loss = torch.cat([part for part, _ in parts]).mean()
        diagnostics = {key: torch.cat([logs[key] for _, logs in parts]).detach().mean() for key in parts[0][1]}
    return loss, diagnostics
