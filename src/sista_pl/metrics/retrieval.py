"""Retrieval between images and reports, and chance.

N pairs, D joint dimension, k ranks, K findings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from sista_pl.errors import SistaError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

RANKS = (1, 5, 10)
WAYS = ("i2t", "t2i")


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
        for way in WAYS:
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


def precision_at(
    scores: Tensor, stated: np.ndarray, same: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return how many of the k nearest reports state what the image's own report states.

    Args:
        scores: (N, N) image by text, higher is nearer.
        stated: (N, K) bool, which findings each report states.
        same: (N,) ids; a report of the image's own id (its study) is not among those that are looked at.
        k: how many; fewer where there are no more.

    Returns:
        (N, K) share of the k nearest that state the finding, NaN where the own report does not state it; the same of
        reports drawn at random; (N, k) places of the nearest reports.
    """
    own = torch.from_numpy(same[:, None] == same[None])
    order = scores.cpu().float().masked_fill(own, -torch.inf).topk(min(k, len(scores)), dim=1).indices.numpy()  # N k
    others = len(same) - own.sum(1).numpy()  # N
    counted = np.arange(order.shape[1]) < np.minimum(k, others)[:, None]  # N k
    near = np.einsum("nk,nkc->nc", counted.astype(float), stated[order].astype(float))
    near /= np.maximum(1, counted.sum(1))[:, None]
    there = stated.sum(0) - own.float().numpy() @ stated
    random = there / np.maximum(1, others)[:, None]
    lacks = ~stated | (others == 0)[:, None]
    return np.where(lacks, np.nan, near), np.where(lacks, np.nan, random), order


class RetrievalFigures:
    """Figures of retrieval as functions of the pairs' weights; the pool that is searched stays the same.

    Args:
        ranks: `i2t` and `t2i`, (N,) from 1, of `best_ranks`.
        precision: (N, K) of `precision_at`, NaN where the own report does not state the finding.
        random: likewise, of reports drawn at random.
        names: of the K findings.
        k: of the precision.
    """

    def __init__(
        self,
        ranks: dict[str, np.ndarray],
        precision: np.ndarray,
        random: np.ndarray,
        names: Sequence[str],
        k: int = 10,
    ):
        self.ranks = {way: np.asarray(ranks[way], np.int64) for way in WAYS}
        self.precision, self.random = np.asarray(precision, np.float64), np.asarray(random, np.float64)
        self.names, self.k = list(names), k
        self.absent: list[str] = []
        self._order = {way: np.argsort(values, kind="stable") for way, values in self.ranks.items()}

    @classmethod
    def from_table(cls, table: pd.DataFrame) -> RetrievalFigures:
        """Return the family of a table of predictions, as `sista test` writes it.

        Args:
            table: `rank_i2t`, `rank_t2i`, and `precision@<k>/<finding>` and `random@<k>/<finding>` of each finding,
                empty where the report does not state it.

        Raises:
            SistaError: a column is missing or holds no numbers.
        """
        found = [str(column) for column in table if str(column).startswith("precision@")]
        heads = {column.partition("/")[0] for column in found} or {"precision@10"}
        names = [column.partition("/")[2] for column in found]
        k = int(min(heads).removeprefix("precision@"))
        for column in ("rank_i2t", "rank_t2i", *(f"random@{k}/{name}" for name in names)):
            if column not in table:
                raise SistaError(f"there is no {column}; {did_you_mean(column, map(str, table))}")
        try:
            precision = table[found].to_numpy(np.float64)
            random = table[[f"random@{k}/{name}" for name in names]].to_numpy(np.float64)
            ranks = {way: table[f"rank_{way}"].to_numpy(np.int64) for way in WAYS}
        except (TypeError, ValueError) as why:
            raise SistaError(f"the columns of ranks hold no numbers ({why}); give figures") from None
        return cls(ranks, precision, random, names, k)

    def figure(self, name: str, weights: np.ndarray | None = None) -> float:
        """Return one of the `figures`, NaN where it is not defined."""
        return self.figures(weights).get(name, float("nan"))

    def figures(self, weights: np.ndarray | None = None) -> dict[str, float]:
        """Return the figures by name, one that is not defined left out:

        * `i2t_R@k` and `t2i_R@k` for k of 1, 5, 10, `R_mean`, their mean, `i2t_median_rank` and `t2i_median_rank`,
        * `precision@k/<finding>`, and `precision@k_macro`, the mean over the findings,
        * `precision@k_chance_macro` of reports drawn at random, and `precision@k_above_chance_macro`, what is gained.

        Args:
            weights: (N,) >= 0 of the pairs; all 1 where not given.
        """
        w = np.ones(len(self.precision)) if weights is None else np.asarray(weights, np.float64)
        found: dict[str, float] = {}
        for way in WAYS:
            found |= {f"{way}_R@{k}": float(w @ (self.ranks[way] <= k) / w.sum()) for k in RANKS}
        found["R_mean"] = float(np.mean(list(found.values())))
        for way in WAYS:
            order = self._order[way]
            middle = np.searchsorted(np.cumsum(w[order]), w.sum() / 2)
            found[f"{way}_median_rank"] = float(self.ranks[way][order[middle]])
        known = ~np.isnan(self.precision)
        total = w @ known
        there = np.flatnonzero(total > 0)
        head = f"precision@{self.k}"
        near, random = ((w @ np.where(known, x, 0))[there] / total[there] for x in (self.precision, self.random))
        found |= {f"{head}/{self.names[c]}": float(value) for c, value in zip(there, near, strict=True)}
        if len(there):
            found |= {f"{head}_macro": float(near.mean()), f"{head}_chance_macro": float(random.mean())}
            found[f"{head}_above_chance_macro"] = float((near - random).mean())
        return found
