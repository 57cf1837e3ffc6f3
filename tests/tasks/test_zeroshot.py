"""Zero-shot classification through the command line: its scores are those of a slow loop, its prompts what they say."""

import hashlib
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sista_tasks.zeroshot import ZeroShotTask
from sista_tasks.zeroshot.prompts import PROMPTS, ensembles
from sklearn.metrics import average_precision_score, roc_auc_score

from sista_pl.cli import main
from sista_pl.data.findings import extract_findings
from sista_pl.data.formats.chestxray14 import LABELS
from sista_pl.data.phantom.layouts.mimic_cxr import LABELS as CHEXPERT
from sista_pl.data.store import Store
from sista_pl.errors import SistaError
from sista_pl.joint import load_joint

CLASSES = ["Edema", "Pleural Effusion", "Fracture", "Cardiomegaly"]
WORDS = {
    "Edema": {"positive": ["{grade} edema", "edema"], "grade": ["", "mild"], "negative": "no edema"},
    "Cardiomegaly": {"positive": "the heart is enlarged", "negative": ["heart size is normal", "no cardiomegaly"]},
}


@pytest.fixture(scope="module")
def store(phantom_store, tmp_path_factory):
    """The labels of a phantom, all its images for the test, and no fracture in any."""
    import shutil

    copy = tmp_path_factory.mktemp("labels") / "store"
    shutil.copytree(phantom_store, copy)
    table = pd.read_parquet(copy / "manifest.parquet")
    table["split"] = "test"
    table["label_Fracture"] = 0.0
    table.to_parquet(copy / "manifest.parquet")
    told, contents = (json.loads((copy / f"{name}.json").read_text()) for name in ("store", "files"))
    contents["files"]["manifest.parquet"]["bytes"] = (copy / "manifest.parquet").stat().st_size
    (copy / "files.json").write_text(json.dumps(contents))
    told["contents"] = hashlib.sha256((copy / "files.json").read_bytes()).hexdigest()
    (copy / "store.json").write_text(json.dumps(told))
    return copy


@pytest.fixture(scope="module")
def run(tested, store):
    options = ["--data.labels", json.dumps(CLASSES), "--model.prompts", json.dumps(WORDS)]
    return tested("zeroshot_chexpert", store, *options)


def test_scores_are_those_of_a_slow_loop(run, store, pretrained):
    table, joint = pd.read_parquet(run / "test/predictions.parquet"), load_joint(pretrained)
    texts = {
        "Edema": (["edema", "mild edema"], ["no edema"]),
        "Cardiomegaly": (["the heart is enlarged"], ["heart size is normal", "no cardiomegaly"]),
    }
    assert set(table["image_id"]) == set(Store.open(store).manifest["image_id"])
    rows = {name: row for row, name in enumerate(Store.open(store).manifest["image_id"])}
    for line in table.sample(5, random_state=0).to_dict("records"):
        pixels = Store.open(store).image(rows[line["image_id"]])[8:-8, 8:-8]
        image = joint.encode_image((torch.from_numpy(pixels)[None, None].float() / 255 - 0.5) / 0.5).pooled[0].numpy()
        for name, sides in texts.items():
            cosines = []
            for side in sides:
                vectors = [joint.encode_text([text]).pooled[0].numpy() for text in side]
                mean = np.mean([v / np.linalg.norm(v) for v in vectors], 0)
                cosines.append(mean @ image / np.linalg.norm(mean) / np.linalg.norm(image))
            yes, no = (np.exp(joint.scale * cosine) for cosine in cosines)
            assert line[f"score_{name}"] == pytest.approx(yes / (yes + no), abs=1e-5)


def test_figures_are_those_of_the_table_and_an_absent_class_is_left_out(run):
    metrics = json.loads((run / "test/metrics.json").read_text())
    figures, table = metrics["intervals"], pd.read_parquet(run / "test/predictions.parquet")
    aurocs = []
    for name in ("Edema", "Pleural Effusion", "Cardiomegaly"):
        known = table[f"truth_{name}"].notna()
        truth, score = table[f"truth_{name}"][known], table[f"score_{name}"][known]
        aurocs.append(roc_auc_score(truth, score))
        assert figures[f"test/auroc/{name}"]["value"] == pytest.approx(aurocs[-1])
        assert figures[f"test/auprc/{name}"]["value"] == pytest.approx(average_precision_score(truth, score))
    low, high = figures["test/auroc_macro"]["interval95"]
    assert figures["test/auroc_macro"]["value"] == pytest.approx(np.mean(aurocs))
    assert low <= np.mean(aurocs) <= high
    assert "Fracture has no positive image" in (run / "told.txt").read_text()
    assert not any("auroc/Fracture" in name for name in (*figures, *metrics["test"]))
    assert "PHANTOM" in metrics["phantom"]
    assert {file.name for file in (run / "test/pictures").iterdir()} == {"cases.png", "curves.png"}
    assert (run / "config.yaml").is_file(), "the test is a run, its configuration kept"


def test_a_folder_of_films_is_asked_too(pretrained, evaluation, workdir, capsys):
    (workdir / "films").mkdir()
    for name, shape in (("a.png", (60, 90)), ("b.png", (80, 80))):
        pixels = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
        Image.fromarray(pixels).save(workdir / "films" / name)
    (workdir / "films" / "c.png").write_bytes(b"no image")
    command = [*evaluation("zeroshot_chexpert", workdir / "none", pretrained), "--data.inputs", "films"]
    assert main(["predict", *command, "--data.labels", "[Edema, Pneumonia]"]) == 0, capsys.readouterr().err
    run = workdir / "runs/zeroshot_chexpert/0001"
    table = pd.read_csv(run / "predictions.csv")
    assert list(table) == ["image", "score_Edema", "score_Pneumonia"]
    assert [name.rsplit("/")[-1] for name in table["image"]] == ["a.png", "b.png"]
    assert table.drop(columns="image").to_numpy().min() >= 0
    assert len(pd.read_csv(run / "unreadable.csv")) == 1


# --- the prompts -----------------------------------------------------------------


def test_a_grammar_stands_for_each_combination_once():
    grammar = {"positive": ["{size} {side} effusion", "effusion"], "size": ["", "small"], "side": ["", "left"],
               "negative": "no effusion"}  # fmt: skip
    found = ensembles(["A"], {"A": grammar})[0]
    assert found.positive == ["effusion", "left effusion", "small effusion", "small left effusion"]
    assert found.negative == ["no effusion"]


@pytest.mark.parametrize("name", sorted({*CHEXPERT, *LABELS, "normal", "pneumonia", "COVID-19"}))
def test_packaged_prompts_say_what_they_should(name):
    found = ensembles([name])[0]
    assert not set(found.positive) & set(found.negative)
    assert len(found.positive) >= 3
    if name in ("No Finding", "normal"):
        assert all(any(f.polarity == "present" for f in extract_findings(text)) for text in found.negative)
        return
    denied = [text for text in found.positive for f in extract_findings(text) if f.polarity == "absent"]
    stated = [text for text in found.negative for f in extract_findings(text) if f.polarity == "present"]
    assert not denied
    assert not stated


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"B": {}}, "prompts of 'B', which is no class here"),
        ({}, "no prompts of 'A'; give model.prompts"),
        ({"A": {"positive": ["a"]}}, "no negative"),
        ({"A": ["a"]}, "no positive"),
        ({"A": {"positive": ["{size} a"], "sise": ["b"], "negative": "no"}}, "did you mean sise?"),
        ({"A": {"positive": ["{x}"], "x": [""], "negative": "no"}}, "positive is empty"),
        ({"A": {"positive": [1], "negative": "no"}}, "give a text or a list"),
        ({"A": {"positive": ["{x} {y}"], "x": [*"abcdefgh"] * 9, "y": [str(i) for i in range(200)], "negative": "no"}},
         "more than 1000"),
    ],
)  # fmt: skip
def test_prompts_that_make_no_sense(given, line):
    with pytest.raises(SistaError) as error:
        ensembles(["A"], given)
    assert line in str(error.value)


def test_every_place_of_the_packaged_grammars_is_used():
    for name, grammar in PROMPTS.items():
        said = " ".join([*grammar["positive"], *grammar["negative"]])
        assert all(f"{{{key}}}" in said for key in grammar if key not in ("positive", "negative")), name


# --- what evaluations refuse -------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "more", "line"),
    [
        ("fit", [], "there is nothing to fit; sista test --config zeroshot_chexpert.yaml --model.weights"),
        ("test", ["--ckpt_path", "best"], "zeroshot_chexpert trains nothing; give the pre-training as --model.weights"),
        ("test", ["--model.weights", "null"], "needs a pre-training; give --model.weights"),
        ("test", ["--data.crop", "64"], "pre-trained on images of 48 px; set data.crop: 48"),
        ("test", ["--data.labels", "[Edemaa]"], "did you mean Edema?"),
        ("test", ["--model.prompts", "{Hernia: {positive: a, negative: b}}"], "which is no class here"),
    ],
)
def test_mistakes_are_one_line(verb, more, line, evaluation, pretrained, phantom_store, workdir, capsys):
    assert main([verb, *evaluation("zeroshot_chexpert", phantom_store, pretrained), *more]) == 2
    told = [text for text in capsys.readouterr().err.splitlines() if text.startswith("sista: ")]
    assert len(told) == 1
    assert line in told[0]


def test_films_of_another_size_than_the_pre_trainings_are_one_line(
    evaluation, pretrained, phantom_store, workdir, capsys
):
    (workdir / "runs/a/0001/checkpoints").mkdir(parents=True)
    own = shutil.copy(pretrained, workdir / "runs/a/0001/checkpoints/best.ckpt")
    (workdir / "runs/a/0001/config.yaml").write_text("data: {init_args: {size: 56}}")
    assert main(["test", *evaluation("zeroshot_chexpert", phantom_store, own)]) == 2
    told = [text for text in capsys.readouterr().err.splitlines() if text.startswith("sista: ")]
    assert len(told) == 1
    assert "size is 64, but the films of the pre-training had 56 px" in told[0]
    assert "set data.size: 56" in told[0]


def test_weights_that_are_no_pre_training(pretrained, tmp_path):
    other, broken = tmp_path / "other.ckpt", tmp_path / "broken.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"num_classes": 2}, "task": "ClassificationTask"}, other)
    checkpoint = torch.load(pretrained, weights_only=True)
    checkpoint["hyper_parameters"]["embed_dim"] = 24
    torch.save(checkpoint, broken)
    for weights, line in (
        (other, "a checkpoint of ClassificationTask, without a text encoder"), (tmp_path, "an image encoder alone"),
        (tmp_path / "none.ckpt", "no such file"), (broken, "image_head does not fit"),
    ):  # fmt: skip
        with pytest.raises(SistaError, match=line):
            ZeroShotTask(str(weights))
