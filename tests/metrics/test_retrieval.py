"""Retrieval against a slow reference; chance; intervals."""

import numpy as np
import pytest
import torch

from sista_pl.errors import SistaError
from sista_pl.metrics import Retrieval, best_ranks, bootstrap_interval, chance


def slow_recall(image, text, report, k):
    hits = 0
    for i in range(len(image)):
        scores = [float(torch.cosine_similarity(image[i], text[j], dim=0)) for j in range(len(text))]
        best = max(s for j, s in enumerate(scores) if report[j] == report[i])
        better = sum(1 for j, s in enumerate(scores) if report[j] != report[i] and s >= best)
        hits += better < k
    return hits / len(image)


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(40, 8, generator=generator)
    text = image + 1.2 * torch.randn(40, 8, generator=generator)
    return image, text, torch.arange(40) // 2, torch.arange(40)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recall_equals_the_loop(pairs, k):
    image, text, report, sample = pairs
    metric = Retrieval(pool=100)
    metric.update(image[:25], text[:25], report[:25], sample[:25])
    metric.update(image[25:], text[25:], report[25:], sample[25:])
    figures = metric.compute()
    assert figures[f"i2t_R@{k}"].item() == pytest.approx(slow_recall(image, text, report, k))
    assert figures[f"t2i_R@{k}"].item() == pytest.approx(slow_recall(text, image, report, k))


def test_duplicates_of_a_distributed_sampler_are_dropped(pairs):
    once, twice = Retrieval(pool=100), Retrieval(pool=100)
    once.update(*pairs)
    twice.update(*(x[torch.randperm(40, generator=torch.Generator().manual_seed(1))] for x in pairs))
    twice.update(*(x[:7] for x in pairs))
    expected = once.compute()
    for name, value in twice.compute().items():
        assert torch.equal(value, expected[name]), name


def test_pool_is_fixed_by_its_seed(pairs):
    a, b = Retrieval(pool=10, seed=4), Retrieval(pool=10, seed=4)
    a.update(*pairs)
    b.update(*pairs)
    a.compute(), b.compute()
    assert torch.equal(a.ranks["sample"], b.ranks["sample"])
    assert len(a.ranks["sample"]) == 10


def test_a_collapsed_encoder_comes_last():
    metric = Retrieval()
    metric.update(torch.ones(30, 4), torch.ones(30, 4), torch.arange(30), torch.arange(30))
    figures = metric.compute()
    assert figures["i2t_R@10"] == 0
    assert figures["i2t_median_rank"] == 30


def test_best_rank_of_several_positives():
    scores = torch.tensor([[0.9, 0.8, 0.1]])
    assert best_ranks(scores, torch.tensor([[False, True, True]])).tolist() == [2]


def test_chance_of_distinct_reports_is_k_over_n():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(200, 200, generator=generator)
    assert chance(scores, torch.arange(200), 10, 200, 0).mean().item() == pytest.approx(0.05, abs=0.01)


def test_interval_widens_with_clusters_and_holds_the_mean():
    values = np.tile([0.0, 1.0], 50)
    low, high = bootstrap_interval(values, np.arange(100))
    assert low < 0.5 < high
    clustered = bootstrap_interval(np.repeat(values[:20], 5), np.repeat(np.arange(20), 5))
    assert clustered[1] - clustered[0] > 1.5 * (high - low)


def test_nan_embeddings_are_refused_and_never_first(pairs):
    image, text, report, sample = pairs
    metric = Retrieval(pool=100)
    metric.update(torch.full_like(image, float("nan")), text, report, sample)
    with pytest.raises(SistaError, match=r"embeddings are NaN; lower model\.lr"):
        metric.compute()
