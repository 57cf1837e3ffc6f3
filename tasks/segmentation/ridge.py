"""The dense probe: ridge regression of the object's share of each cell on a frozen encoder's maps there.

Solved from sums over the cells, so that each training image is encoded once and none is kept.

B images, h w cells of the finest map, D channels of all maps, S strengths, T thresholds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from sista_pl.metrics.segmentation import IGNORED, OBJECT, Segmentation

STRENGTHS = np.geomspace(1e-4, 1e2, 7)  # of the penalty, in units of a standardised channel's sum of squares
THRESHOLDS = np.geomspace(0.01, 0.9, 40)  # of the predicted share
STEEPNESS = 10.0  # of the logit: what a share above the threshold counts


class Moments:
    """Weighted sums of products of (x, y, 1) over cells: all that a ridge regression needs.

    The first cells' mean is taken off before, so that fp32 products keep their digits; they are summed in fp64.
    """

    def __init__(self) -> None:
        self.products: np.ndarray | None = None
        self.origin: Tensor

    def add(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add cells: x (n, D), their shares y (n,) and weights (n,), those of weight 0 left out."""
        x, y, weight = (part[weight > 0].float() for part in (x, y, weight))
        if self.products is None:
            self.origin = x.mean(0) if len(x) else x.new_zeros(x.shape[1])
            self.products = np.zeros((x.shape[1] + 2, x.shape[1] + 2))
        rows = torch.cat([x - self.origin, y[:, None], torch.ones_like(y)[:, None]], 1)
        self.products += (rows.T @ (rows * weight[:, None])).cpu().numpy().astype(np.float64)

    def solve(self, strengths: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the channels' mean (D,) and variance (D,), and of the standardised ones weight (S, D) and bias (S,).

        Args:
            strengths: (S,) of the penalty, a share of the cells' total weight; the bias is free of it.
            eps: added to the variance, as a batch norm adds it.
        """
        assert self.products is not None
        total = self.products[-1, -1]
        means = self.products[-1, :-1] / total
        covariance = self.products[:-1, :-1] / total - np.outer(means, means)
        variance = np.diag(covariance)[:-1].clip(min=0)
        scale = np.sqrt(variance + eps)
        values, vectors = np.linalg.eigh(covariance[:-1, :-1] / np.outer(scale, scale))
        target = vectors.T @ (covariance[:-1, -1] / scale)
        weight = (target / (values.clip(min=0) + strengths[:, None])) @ vectors.T
        mean = means[:-1] + self.origin.cpu().numpy()
        return mean, variance, weight, np.full(len(strengths), means[-1])


def shares(mask: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(B, H, W) of 0, 127 and 255 → the object's share of each cell (B, h, w), and the cell's share of known pixels."""
    known = torch.nn.functional.adaptive_avg_pool2d((mask != IGNORED).float(), size)
    inside = torch.nn.functional.adaptive_avg_pool2d((mask == OBJECT).float(), size)
    return inside / known.clamp(min=1e-6), known


class Counts:
    """Pixels in the truth, in the prediction and in both, of each image, strength and threshold."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []

    def add(self, score: Tensor, mask: Tensor) -> None:
        """Add images: predicted shares (B, S, H, W) and masks (B, H, W)."""
        images, strengths = score.shape[:2]
        above = torch.bucketize(score.contiguous(), torch.as_tensor(THRESHOLDS, dtype=score.dtype, device=score.device))
        bins = len(THRESHOLDS) + 1  # the k-th holds the pixels that exceed k thresholds
        place = above + bins * torch.arange(images * strengths, device=score.device).view(images, strengths, 1, 1)
        counts = []
        for kind in (mask == OBJECT, mask != IGNORED):
            chosen = place[kind[:, None].expand_as(place)]
            found = torch.bincount(chosen, minlength=images * strengths * bins).view(images, strengths, bins)
            counts.append(found.flip(2).cumsum(2).flip(2))
        self.parts.append(torch.stack(counts, -1).cpu().numpy())  # B S (T + 1) 2; of the first bin everything counts

    def best(self, worth: Callable[[Segmentation], float]) -> tuple[int, int]:
        """Return the places of the strength and the threshold of the highest worth."""
        counts = np.concatenate(self.parts)
        truth = counts[:, 0, 0, 0]
        found = np.array([
            [worth(Segmentation(counts[:, s, t, 0], counts[:, s, t, 1], truth)) for t in range(1, counts.shape[2])]
            for s in range(counts.shape[1])
        ])  # fmt: skip
        strength, threshold = np.unravel_index(np.argmax(found), found.shape)
        return int(strength), int(threshold)


Cells = Callable[[Tensor], Tensor]  # images (B, 1, H, W) → channels at the cells (B, D, h, w)


def fit(
    cells: Cells, train: Iterable[dict], val: Iterable[dict], eps: float, worth: Callable[[Segmentation], float]
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray, float], float, float]:
    """Fit the probe on training batches, choose strength and threshold on validation batches.

    Args:
        cells: the maps' channels at the cells of the finest map.
        train: batches of `image` (B, 1, H, W) and `mask` (B, H, W).
        val: likewise.
        eps: see `Moments.solve`.
        worth: of a validation; higher is better.

    Returns:
        the layer as mean (D,), variance (D,), weight (D,) and bias of the logit; the strength, and the threshold.
    """
    moments, counts = Moments(), Counts()
    for batch in train:
        x = cells(batch["image"])
        y, known = shares(batch["mask"], (x.shape[2], x.shape[3]))
        moments.add(x.movedim(1, -1).flatten(0, 2), y.flatten(), known.flatten())
    mean, variance, weight, bias = moments.solve(STRENGTHS, eps)
    for batch in val:
        x = cells(batch["image"])
        heads = torch.as_tensor(weight / np.sqrt(variance + eps), dtype=x.dtype, device=x.device)
        start = torch.as_tensor(bias, dtype=x.dtype, device=x.device) - heads @ torch.as_tensor(mean).to(x)
        score = torch.einsum("bdhw,sd->bshw", x, heads) + start[:, None, None]
        size = batch["mask"].shape[-2:]
        counts.add(torch.nn.functional.interpolate(score, size, mode="bilinear", align_corners=False), batch["mask"])
    strength, place = counts.best(worth)
    threshold = float(THRESHOLDS[place])
    layer = mean, variance, STEEPNESS * weight[strength], STEEPNESS * (bias[strength] - threshold)
    return layer, float(STRENGTHS[strength]), threshold
