"""Retrieval through the command line: ranks, precision and chance are those of slow loops."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from sista_tasks.retrieval import RetrievalTask

from sista_pl.cli import main
from sista_pl.data.findings import extract_findings
from sista_pl.data.pairs import PairDataModule
from sista_pl.errors import SistaError
from sista_pl.joint import load_joint


@pytest.fixture(scope="module")
def run(tested, phantom_store):
    return tested("retrieval_mimic", phantom_store, "--data.batch_size", "5", "--model.rare", "2", "--model.k", "3")


@pytest.fixture(scope="module")
def pairs(phantom_store, pretrained):
    """The test split, by hand: image ids, studies, reports, and cosines of images and reports."""
    data = PairDataModule(phantom_store, size=64, crop=48, similarity=None)
    data.setup("test")
    rows, joint = data.rows["test"], load_joint(pretrained)
    images = torch.from_numpy(data.store.images(rows))[:, None, 8:-8, 8:-8].float() / 127.5 - 1
    reports = [data.reports[i] for i in data.report_ids[rows]]
    image = torch.nn.functional.normalize(joint.encode_image(images).pooled, dim=1)
    text = torch.cat([torch.nn.functional.normalize(joint.encode_text([r]).pooled, dim=1) for r in reports])
    table = data.store.manifest.iloc[rows]
    return table["image_id"].tolist(), table["study_id"].tolist(), reports, (image @ text.T).numpy()


def kinds(report):
    return {f.kind for f in extract_findings(report) if f.polarity == "present"} or {"no finding"}


def test_ranks_and_precision_are_those_of_loops(run, pairs):
    ids, studies, reports, cosines = pairs
    table = pd.read_parquet(run / "test/predictions.parquet").set_index("image_id")
    assert set(table.index) == set(ids)
    assert len(table) == len(ids)
    for i, name in enumerate(ids):
        for column, line in (("rank_i2t", cosines[i]), ("rank_t2i", cosines[:, i])):
            equal = [report == reports[i] for report in reports]
            best = max(value for value, same in zip(line, equal, strict=True) if same)
            assert table[column][name] == 1 + sum(
                value >= best for value, same in zip(line, equal, strict=True) if not same
            )
        others = sorted((j for j in range(len(ids)) if studies[j] != studies[i]), key=lambda j: -cosines[i, j])[:3]
        for column in (c for c in table if c.startswith("precision@3/")):
            kind = column.partition("/")[2]
            share = np.mean([kind in kinds(reports[j]) for j in others]) if kind in kinds(reports[i]) else np.nan
            assert table[column][name] == pytest.approx(share, nan_ok=True)


def test_figures_chance_and_the_rare_are_told(run, pairs):
    metrics = json.loads((run / "test/metrics.json").read_text())
    table, figures = pd.read_parquet(run / "test/predictions.parquet"), metrics["intervals"]
    recalls = [(table[f"rank_{way}"] <= k).mean() for way in ("i2t", "t2i") for k in (1, 5, 10)]
    assert figures["test/R_mean"]["value"] == pytest.approx(np.mean(recalls))
    assert figures["test/i2t_median_rank"]["value"] == table["rank_i2t"].sort_values().iloc[(len(table) - 1) // 2]
    reports = pairs[2]
    for way in ("i2t", "t2i"):
        chance = figures[f"test/{way}_R@5_chance"]
        low, high = chance["interval95"]
        assert low <= chance["value"] <= high
        # among n different texts a random one is among 5 in 5 of n times; equal ones are hits, too
        assert chance["value"] == pytest.approx(5 / len(set(reports)), abs=0.15)
    stated = pd.Series([kind for report in reports for kind in kinds(report)]).value_counts()
    told = (run / "told.txt").read_text()
    for kind, count in stated.items():
        assert (f"test/precision@3/{kind}" in figures) == (count >= 2)
        assert (kind in told) == (count < 2 or any(kind in other and n < 2 for other, n in stated.items()))
    assert (run / "test/pictures/nearest.png").is_file()


def test_a_pool_is_searched_alone(tested, phantom_store, pairs):
    more = ["--model.pool", "6", "--model.findings", "[pleural effusion, no finding]"]
    table = pd.read_parquet(tested("retrieval_mimic", phantom_store, *more) / "test/predictions.parquet")
    ids, _, reports, cosines = pairs
    places = [ids.index(name) for name in table["image_id"]]
    assert len(set(places)) == 6
    for i, rank in zip(places, table["rank_i2t"], strict=True):
        assert rank == 1 + sum(cosines[i, j] >= cosines[i, i] and reports[j] != reports[i] for j in places)


def test_predict_names_the_nearest_reports(evaluation, pretrained, phantom_store, pairs, workdir):
    assert main(["predict", *evaluation("retrieval_mimic", phantom_store, pretrained)]) == 0
    table = pd.read_csv(workdir / "runs/retrieval_mimic/0001/predictions.csv").set_index("image")
    ids, _, reports, cosines = pairs
    for i, name in enumerate(ids):
        distinct = {report: j for j, report in reversed(list(enumerate(reports)))}
        order = sorted(distinct.values(), key=lambda j: -cosines[i, j])[:5]
        assert [reports[ids.index(table[f"report_{n}"][name])] for n in range(1, 6)] == [reports[j] for j in order]
        assert table["cosine_1"][name] == pytest.approx(cosines[i, order[0]], abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"k": 0}, "k is 0; give at least 1"),
        ({"pool": 1}, "pool is 1; give at least 2"),
        ({"rare": 0}, "rare is 0; give at least 1"),
        ({"findings": ["pleural efusion"]}, "did you mean pleural effusion"),
    ],
)
def test_arguments_that_make_no_sense(arguments, line, pretrained):
    with pytest.raises(SistaError, match=line):
        RetrievalTask(str(pretrained), **arguments)


def test_labelled_images_are_no_pairs(evaluation, pretrained, phantom_store, workdir, capsys):
    command = evaluation("retrieval_mimic", phantom_store, pretrained)
    more = ["--data", "TransferDataModule", "--data.target", "labels", *command[2:]]
    assert main(["test", *command, *more]) == 2
    assert "RetrievalTask needs pairs, the data group gives labels; use PairDataModule" in capsys.readouterr().err
