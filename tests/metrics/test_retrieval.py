"""Retrieval against a slow reference; chance; intervals."""

import numpy as np
import pandas as pd
import pytest
import torch

from sista_pl.errors import SistaError
from sista_pl.metrics import Retrieval, RetrievalFigures, best_ranks, chance, precision_at


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


def test_nan_embeddings_are_refused_and_never_first(pairs):
    image, text, report, sample = pairs
    metric = Retrieval(pool=100)
    metric.update(torch.full_like(image, float("nan")), text, report, sample)
    with pytest.raises(SistaError, match=r"embeddings are NaN; lower model\.lr"):
        metric.compute()


# --- precision by finding, and the figures as functions of weights ----------------


@pytest.mark.parametrize("k", [1, 3, 40])
def test_precision_against_a_slow_loop(k):
    generator = np.random.default_rng(k)
    scores = torch.from_numpy(generator.normal(size=(20, 20)))
    stated, study = generator.random((20, 3)) < [0.5, 0.2, 0.05], generator.integers(0, 15, 20)
    near, random, order = precision_at(scores, stated, study, k)
    for i in range(20):
        others = sorted((j for j in range(20) if study[j] != study[i]), key=lambda j: -scores[i, j])
        assert order[i, : min(k, len(others))].tolist() == others[:k]
        for c in range(3):
            if stated[i, c]:
                assert near[i, c] == pytest.approx(np.mean([stated[j, c] for j in others[:k]]))
                assert random[i, c] == pytest.approx(np.mean([stated[j, c] for j in others]))
            else:
                assert np.isnan(near[i, c])
                assert np.isnan(random[i, c])


def family() -> RetrievalFigures:
    generator = np.random.default_rng(0)
    ranks = {way: generator.integers(1, 30, 25) for way in ("i2t", "t2i")}
    precision = np.where(generator.random((25, 3)) < [0.6, 0.3, 0], generator.random((25, 3)), np.nan)
    return RetrievalFigures(ranks, precision, precision / 2, ["effusion", "edema", "mass"], 5)


def test_weights_are_repeats_of_a_pair():
    found, weights = family(), np.random.default_rng(3).integers(0, 4, 25)
    rows = np.repeat(np.arange(25), weights)
    ranks = {way: values[rows] for way, values in found.ranks.items()}
    again = RetrievalFigures(ranks, found.precision[rows], found.random[rows], found.names, 5)
    assert found.figures(weights) == pytest.approx(again.figures())
    figures = again.figures()
    assert figures["t2i_R@10"] == pytest.approx(np.mean(ranks["t2i"] <= 10))
    assert figures["i2t_median_rank"] == np.sort(ranks["i2t"])[(len(rows) - 1) // 2]
    assert figures["precision@5_macro"] == pytest.approx(np.mean(np.nanmean(again.precision[:, :2], 0)))
    assert figures["precision@5_above_chance_macro"] == pytest.approx(figures["precision@5_macro"] / 2)
    assert "precision@5/mass" not in figures


def test_a_table_of_ranks_has_the_same_figures():
    found = family()
    columns = {f"rank_{way}": ranks for way, ranks in found.ranks.items()}
    for c, name in enumerate(found.names):
        columns |= {f"precision@5/{name}": found.precision[:, c], f"random@5/{name}": found.random[:, c]}
    table = pd.DataFrame(columns)
    assert RetrievalFigures.from_table(table).figures() == pytest.approx(found.figures())
    with pytest.raises(SistaError, match=r"there is no random@5/edema"):
        RetrievalFigures.from_table(table.drop(columns="random@5/edema"))
    with pytest.raises(SistaError, match="hold no numbers"):
        RetrievalFigures.from_table(table.assign(rank_i2t="first"))
    ranks_alone = RetrievalFigures.from_table(table[["rank_i2t", "rank_t2i"]])
    assert not any(name.startswith("precision") for name in ranks_alone.figures())
