"""Instance level without a softmax: each image-report pair of the global batch is judged alone.

B pairs of this rank, N pairs of all ranks, b rows of a chunk, D joint dimension, k wanted positives an anchor.

The local images are compared with all reports: memory B x N. One direction is the whole matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sista_pl.distributed import gather, rank
from sista_pl.errors import SistaError
from sista_pl.losses import LOSSES
from sista_pl.losses.arguments import number, switch, whole
from sista_pl.losses.instance import by_rows
from sista_pl.losses.semantic import Calibration, Reports, count_positives
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
        chunk: rows that are kept at once, as in `clip`.

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
        self.chunk = None if chunk is None else whole("siglip", "chunk", chunk, 1)

    def forward(self, pair: Pair) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean over the local rows of their sums over all columns, () fp32, and what to log."""
        with torch.autocast(pair.image.pooled.device.type, enabled=False):
            v, t = (F.normalize(at_least_float32(side.pooled), dim=1) for side in (pair.image, pair.text))  # B D
            t_all, v_all = gather(t), gather(v.detach())  # N D; the images of other ranks count in `accuracy` only
            scale, bias = at_least_float32(pair.scale), at_least_float32(self.bias)
            first, columns = rank() * len(v), torch.arange(len(t_all), device=v.device)
            reports = Reports.of(pair, "siglip") if self.semantic else None
            delta = self.calibration(reports.sample, len(columns))[0] if reports else None

            def block(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                positive = diagonal = (rows + first)[:, None] == columns  # b N
                diagnostics: dict[str, Tensor] = {}
                if reports is not None:
                    s = reports.calibrate(reports.raw(rows), diagonal)
                    positive = (s >= delta) | diagonal
                    diagnostics = count_positives(positive & ~diagonal, s, diagonal)
                z = scale * v[rows] @ t_all.T  # b N
                loss = -F.logsigmoid(torch.where(positive, z + bias, -z - bias)).sum(1)  # b
                back = t[rows].detach() @ v_all.T  # b N
                hits = torch.stack([way.argmax(1) == rows + first for way in (z, back)]).float().mean(0)
                return loss, diagnostics | {"accuracy": hits}

            loss, diagnostics = by_rows(block, torch.arange(len(v), device=v.device), self.chunk)
        diagnostics["bias"] = self.bias.detach().clone()
        if delta is not None:
            diagnostics["delta"] = loss.new_tensor(delta)
        return loss, diagnostics
