"""Retrieval between images and reports, and chance.

N pairs, D joint dimension, k ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from sista_pl.errors import SistaError

RANKS = (1, 5, 10)


def best_ranks(scores: Tensor, positive: Tensor) -> Tensor:
    """Return the rank (from 1) of the best positive of each row.

    Args:
        scores: (N, M) higher is nearer.
        positive: (N, M) bool, at least one a row.

    Returns:
        (N,) int64: 1 + the number of non-positives that score at least as high as the best positive, so that a
        collapsed encoder, which scores all alike, comes last and not first.
    """
    best = scores.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
    return 1 + ((scores >= best) & ~positive).sum(1)


class Retrieval(Metric):
    """Recall at 1, 5 and 10 and median rank, from image to text and back; equal reports are all positives.

    The recall is taken in one pool of pairs, drawn by a fixed seed from the split, so that figures of different runs
    compare. On several devices the pairs are gathered by id and duplicates dropped.

    Args:
        pool: number of pairs in the pool; all where the split has fewer.
        seed: of the draw.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, pool: int = 512, seed: int = 0, permutations: int = 100):
        super().__init__()
        self.pool, self.seed, self.permutations = pool, seed, permutations
        for name in ("image", "text", "report", "sample"):
            self.add_state(name, [], dist_reduce_fx="cat")
        self.ranks: dict[str, Tensor] = {}

    def update(self, image: Tensor, text: Tensor, report: Tensor, sample: Tensor) -> None:
        """Add pairs.

        Args:
            image: (B, D) embeddings.
            text: (B, D).
            report: (B,) id of the report's text; equal texts have equal ids.
            sample: (B,) id of the pair in the split.
        """
        unit = torch.nn.functional.normalize
        self.image.append(unit(image.detach().float(), dim=1))
        self.text.append(unit(text.detach().float(), dim=1))
        self.report.append(report)
        self.sample.append(sample)

    def compute(self) -> dict[str, Tensor]:
        """Return `i2t_R@k`, `t2i_R@k`, `i2t_median_rank`, `t2i_median_rank`, `R_mean`, `R@10_chance` and `pool`."""
        image, text, report, sample = (
            dim_zero_cat(getattr(self, name)) for name in ("image", "text", "report", "sample")
        )
        sample, first = _first_of_each(sample)
        image, text, report = image[first], text[first], report[first]
        keep = draw(len(sample), self.pool, self.seed).to(sample.device)
        image, text, report = image[keep], text[keep], report[keep]
        scores, positive = image @ text.T, report[:, None] == report[None]
        if not scores.isfinite().all():  # every comparison with NaN is false: all pairs would be first
            raise SistaError("the model's embeddings are NaN; lower model.lr, or set trainer.precision to 32-true")
        self.ranks = {"i2t": best_ranks(scores, positive).cpu(), "t2i": best_ranks(scores.T, positive).cpu(),
                      "sample": sample[keep].cpu()}  # fmt: skip
        figures: dict[str, Tensor] = {}
        for way in ("i2t", "t2i"):
            ranks = self.ranks[way].to(scores.device)
            figures |= {f"{way}_R@{k}": (ranks <= k).float().mean() for k in RANKS}
            figures[f"{way}_median_rank"] = ranks.float().median()
        figures["R_mean"] = torch.stack([v for name, v in figures.items() if "_R@" in name]).mean()
        figures["R@10_chance"] = chance(scores, report, 10, self.permutations, self.seed).mean()
        figures["pool"] = torch.tensor(float(len(keep)))
        return figures


def _first_of_each(sample: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct ids, sorted, and where each stands first: a distributed sampler pads with repeats."""
    order = torch.argsort(sample, stable=True)
    ordered = sample[order]
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return ordered[new], order[new]


def draw(n: int, pool: int, seed: int) -> Tensor:
    """Return `min(n, pool)` of n places, sorted: the same for the same three numbers."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:pool].sort().values


def chance(scores: Tensor, report: Tensor, k: int, permutations: int, seed: int) -> Tensor:
    """Recall at k where each image is asked to find another image's report: the permutation distribution.

    Args:
        scores: (N, N) image by text.
        report: (N,) ids of the reports' texts.
        k: rank.
        permutations: number of shuffles.
        seed: of the shuffles.

    Returns:
        (permutations,) recall of each shuffle; its mean is chance.
    """
    top = report[scores.topk(min(k, scores.shape[1]), dim=1).indices]  # N k
    generator = torch.Generator().manual_seed(seed)
    recalls = []
    for _ in range(permutations):
        shuffled = report[torch.randperm(len(report), generator=generator).to(report.device)]
        recalls.append((top == shuffled[:, None]).any(1).float().mean())
    return torch.stack(recalls)
