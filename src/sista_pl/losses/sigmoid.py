"""Instance level without a softmax: each image-report pair of the global batch is judged alone.

B pairs of this rank, N pairs of all ranks, b x c a block of images and reports, D joint dimension, k wanted positives
an anchor.

The local images are compared with all reports, block by block: see `sista_pl.losses.chunked`. One direction is the
whole matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sista_pl.errors import SistaError
from sista_pl.losses import LOSSES
from sista_pl.losses.arguments import number, switch
from sista_pl.losses.chunked import Block, Counts, Logits, Winners, side, softplus
from sista_pl.losses.semantic import Calibration, Reports, count_positives, reaching, tell
from sista_pl.pair import Pair, at_least_float32


@LOSSES.register("siglip")
class Siglip(nn.Module):
    """Sigmoid contrast, each pair judged alone: (1/N) Σ_ij softplus(-y_ij (s v_i · t_j + b)), b learnable.

    y is 1 for the own pair and -1 for the others: Zhai et al. 2023 (SigLIP, arXiv 2303.15343). With `semantic`, y is 1
    for S' >= delta, too (as in FaNe). SigLIP starts at s = 10 and b = -10, where N - 1 negatives to a positive cost
    little; s is the model's: `temperature: 0.1` in the model group.

    Logs: `accuracy` as in `clip`; `bias` b; with `semantic` also `false_negatives`, `identical_reports` and `delta` as
    in `sia`.

    Args:
        semantic: reports of S' >= delta are positives, and no negatives.
        positives: wanted positives k an anchor, > 0, for which `delta` is solved as in `sia`; only for `semantic`.
        delta: threshold on S', > 0, instead of the solved one; only for `semantic`.
        bias: where b starts, -100 to 100.
        chunk: side of the blocks of z, as in `clip`.

    Raises:
        SistaError: argument out of its range, `delta` without `semantic`; in `forward`: `semantic` without a report
            similarity.
    """

    needs_tokens = False

    def __init__(
        self,
        semantic: bool = False,
        positives: float = 4.0,
        delta: float | None = None,
        bias: float = -10.0,
        chunk: int | None = None,
    ):
        super().__init__()
        self.semantic = switch("siglip", "semantic", semantic)
        if delta is not None and not semantic:
            raise SistaError("loss 'siglip': delta is a threshold on report similarity; set `semantic: true` as well")
        self.calibration = Calibration("siglip", positives, delta, tau=1.0)  # of which delta alone is used
        self.bias = nn.Parameter(torch.tensor(number("siglip", "bias", bias, -100, 100)))
        self.chunk = side("siglip", chunk)

    def forward(self, pair: Pair) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean over the local images of their sums over all reports, () fp32, and what to log."""
        with torch.autocast(pair.image.pooled.device.type, enabled=False):
            logits = Logits.of(pair, self.chunk, at_least_float32(self.bias).squeeze())
            reports = Reports.of(pair, "siglip") if self.semantic else None
            delta = self.calibration(reports.sample, len(logits.t))[0] if reports else math.nan

            def like(block: Block) -> tuple[Tensor, Tensor] | None:
                """Return S' and the other positives of a block, each (b, c); None where there are no others."""
                if reports is None:
                    return None
                s = reports.calibrate(reports.raw(block), block)
                return s, reaching(s, delta, block, own=0)

            def flip(z: Tensor, block: Block, alike: tuple[Tensor, Tensor] | None) -> Tensor:
                """Change the sign of positives, in place."""
                if alike is not None:
                    z.mul_(1 - 2 * alike[1])
                if block.own is not None:
                    z.diagonal(block.own).neg_()
                return z

            def slope(block: Block, z: Tensor) -> Tensor:
                alike = like(block)
                return flip(flip(z, block, alike).sigmoid_(), block, alike)

            with torch.no_grad():
                loss, winners, logs = torch.zeros_like(logits.v[:, 0]), Winners(logits), Counts(logits)
                for block, z in logits.blocks():
                    alike = like(block)
                    winners.add(block, z)
                    if alike is not None:
                        logs.add(block, count_positives(alike[1], alike[0], block))
                    loss[block.rows] += softplus(flip(z, block, alike)).sum(1)
            value = logits.attach(loss.mean(), slope, 1 / len(loss))
        diagnostics = tell({**logs.value, "accuracy": winners.value()}) | {"bias": self.bias.detach().clone()}
        return value, diagnostics | {"delta": value.detach().new_full((), delta)} if reports else diagnostics
