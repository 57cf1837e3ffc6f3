"""The linear probe: what it solves, that it is kept, that frozen is frozen, and what a test leaves."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sista_tasks.classification import ClassificationTask
from sista_tasks.classification.probe import STRENGTHS, fit_probe

from sista_pl.cli import main
from sista_pl.data.store import Store
from sista_pl.errors import SistaError
from sista_pl.features import encoder_hash


def best(workdir, name="cls_rsna", number="0001"):
    return workdir / "runs" / name / number / "checkpoints" / "best.ckpt"


def draws(seed=0, n=80, d=6):
    draw = np.random.default_rng(seed)
    features = draw.normal(3, 2, (n, d)) * draw.uniform(0.1, 50, d)
    score = features @ draw.normal(0, 1 / features.std(0)) + draw.normal(0, 1, n)
    return features.astype(np.float32), (score > np.median(score)).astype(float)


@pytest.mark.parametrize("d", [6, 90])  # fewer features than images, and more
@pytest.mark.parametrize("strength", [0.001, 1.0, 100.0])
def test_the_probe_minimises_the_penalised_loss(strength, d):
    """The slow reference: gradient descent on standardised features until nothing moves."""
    features, labels = draws(d=d)
    wanted = STRENGTHS.index(strength)
    counter = iter(range(len(STRENGTHS)))
    weight, bias, chosen = fit_probe(features, labels[:, None], False, lambda w, b: float(next(counter) == wanted))
    assert chosen == strength
    x = torch.tensor((features - features.mean(0)) / features.std(0), dtype=torch.float64)
    w, b = (torch.zeros(size, dtype=torch.float64, requires_grad=True) for size in (x.shape[1], 1))
    solver = torch.optim.LBFGS([w, b], max_iter=2000, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(
            x @ w + b, torch.tensor(labels), reduction="sum"
        ) * strength + 0.5 * w.square().sum()  # fmt: skip
        value.backward()
        return value

    solver.step(loss)
    expected = (x @ w + b).detach().numpy()
    assert np.allclose(features @ weight[0] + bias[0], expected, atol=1e-3 * np.abs(expected).max())


def test_the_probe_leaves_unknown_labels_out_and_takes_one_class_as_it_is():
    features, labels = draws()
    many = np.stack([labels, np.where(np.arange(80) % 2, labels, np.nan), np.ones(80), np.full(80, np.nan)], 1)
    weight, bias, _ = fit_probe(features, many, False, lambda w, b: 0.0)
    half, half_bias, _ = fit_probe(features[1::2], labels[1::2, None], False, lambda w, b: 0.0)
    mean, scale = features.mean(0), features.std(0)  # standardised by all images, so alike but not equal
    assert np.corrcoef(weight[1] * scale, half[0] * scale)[0, 1] > 0.98
    assert not weight[2:].any()
    assert bias[2] > 3
    assert bias[3] == 0
    assert np.isfinite([*half_bias, *mean]).all()


@pytest.mark.parametrize("classes", [3, 2, 1])
def test_exclusive_classes_even_where_some_never_come(classes):
    features, _ = draws(1)
    target = np.arange(80) % classes
    features[:, 0] += 100 * target
    weight, bias, _ = fit_probe(features, np.eye(4)[target], True, lambda w, b: float(np.abs(w).sum()))
    assert ((features @ weight.T + bias).argmax(1) == target).mean() > 0.9


def test_the_run_is_scored_as_scikit_learn_scores_it(cls, workdir):
    from sklearn.metrics import average_precision_score, roc_auc_score

    assert main(["fit", *cls]) == 0
    assert main(["test", *cls]) == 0
    folder = workdir / "runs/cls_rsna/0001/test"
    metrics = json.loads((folder / "metrics.json").read_text())
    table = pd.read_parquet(folder / "predictions.parquet")
    truth, score = table["truth_Pneumonia"], table["score_Pneumonia"]
    assert metrics["test"]["test/auroc_macro"] == pytest.approx(roc_auc_score(truth, score), abs=1e-6)
    assert metrics["test"]["test/auprc_macro"] == pytest.approx(average_precision_score(truth, score), abs=1e-6)
    assert metrics["data"]["split"]["name"] == "rsna/mgca"
    # the threshold was chosen on validation and is in the checkpoint
    threshold = torch.load(best(workdir), weights_only=True)["state_dict"]["thresholds"].item()
    said = score >= threshold
    f1 = 2 * (said & (truth == 1)).sum() / (said.sum() + (truth == 1).sum())
    assert metrics["test"]["test/f1_macro"] == pytest.approx(f1, abs=1e-6)
    assert {p.name for p in (folder / "pictures").iterdir()} == {"curves.png", "cases.png"}


@pytest.mark.parametrize("frozen", ["true", "false"])
def test_frozen_means_every_parameter_and_buffer(cls, workdir, frozen):
    more = ["--model.protocol", "mgca", "--model.cache", "false", "--model.frozen", frozen, "--trainer.max_epochs", "1"]
    assert main(["fit", *cls, *more]) == 0
    after = torch.load(best(workdir), weights_only=True)["state_dict"]
    torch.manual_seed(0)
    from pytorch_lightning import seed_everything

    seed_everything(0, workers=True)
    task = ClassificationTask(1, "binary", image_encoder="resnet10t", image_size=64, frozen=frozen == "true")
    before = {k: v for k, v in task.state_dict().items() if k.startswith("image_encoder.")}
    same = [torch.equal(value, after[name]) for name, value in before.items()]
    assert all(same) == (frozen == "true")
    assert len(same) > 50


def test_kept_features_give_what_images_give(cls, workdir):
    """The same epochs on both sides, no augmentation: the same layer, from one pass instead of one an epoch."""
    layers = {}
    for cache in ("true", "false"):
        more = ["--model.protocol", "mgca", "--model.cache", cache, "--trainer.max_epochs", "3", "--model.lr", "0.01"]
        assert main(["fit", *cls, *more, "--name", cache]) == 0
        layers[cache] = torch.load(best(workdir, cache), weights_only=True)["state_dict"]["head.weight"]
    assert torch.allclose(layers["true"], layers["false"], atol=1e-5)
    assert (layers["true"] - ClassificationTask(1, image_encoder="resnet10t").head.weight).abs().max() > 0.01


def test_features_are_kept_by_the_encoders_weights(cls, workdir, rsna_store):
    folder = rsna_store.parent / "features"
    shutil.rmtree(folder, ignore_errors=True)
    assert main(["fit", *cls]) == 0
    (first,) = folder.iterdir()
    stamp = first.stat().st_mtime_ns
    assert main(["fit", *cls, "--data.label_fraction", "0.5"]) == 0
    assert [f.name for f in folder.iterdir()] == [first.name]
    assert first.stat().st_mtime_ns == stamp, "nothing was encoded again"
    assert main(["fit", *cls, "--seed_everything", "7"]) == 0
    assert len(list(folder.iterdir())) == 2, "other weights, other features"
    a, b = (ClassificationTask(1, image_encoder="resnet10t").image_encoder for _ in range(2))
    assert encoder_hash(a) != encoder_hash(b)
    assert encoder_hash(a) == encoder_hash(a)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cls", "seg"])
def test_two_processes_test_as_one(config, workdir, request):
    command = request.getfixturevalue(config)
    name = "cls_rsna" if config == "cls" else "seg_siim"
    assert main(["fit", *command, "--trainer.max_epochs", "1"]) == 0
    tables, metrics = [], []
    for devices in ("1", "2"):
        run = [sys.executable, "-m", "sista_pl", "test", *command, "--trainer.devices", devices,
               *(["--trainer.strategy", "ddp"] if devices == "2" else [])]  # fmt: skip
        done = subprocess.run(run, cwd=workdir, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        folder = workdir / "runs" / name / "0001/test"
        tables.append(pd.read_parquet(folder / "predictions.parquet"))
        metrics.append(json.loads((folder / "metrics.json").read_text()))
    assert len(tables[0]) % 2, "a test set that two processes can't halve"
    assert tables[0]["image_id"].tolist() == tables[1]["image_id"].tolist()
    for column in tables[0].select_dtypes("number"):
        assert np.allclose(tables[0][column], tables[1][column], atol=1e-5), column
    for figure, value in metrics[0]["test"].items():
        # a mean over batches, of a loss or of its parts, counts padding; no figure of ours does
        if "loss" not in figure and not figure.startswith("test/mask/"):
            assert value == pytest.approx(metrics[1]["test"][figure], abs=1e-6), figure


def test_predict_reads_a_folder_of_jpeg_png_and_dicom(cls, workdir, rsna_store):
    assert main(["fit", *cls]) == 0
    folder = workdir / "new"
    folder.mkdir()
    store = Store.open(rsna_store)
    Image.fromarray(store.image(0)).save(folder / "a.png")
    Image.fromarray(store.image(1)).save(folder / "b.jpg", quality=95)
    raw = next((rsna_store.parent / "rsna").rglob("*.dcm"))
    shutil.copy(raw, folder / "c.dcm")
    (folder / "d.jpg").write_bytes(b"broken")
    assert main(["predict", *cls, "--data.inputs", str(folder)]) == 0
    run = workdir / "runs/cls_rsna/0001"
    table, bad = pd.read_csv(run / "predictions.csv"), pd.read_csv(run / "unreadable.csv")
    assert [name.rsplit("/", 1)[-1] for name in table["image"]] == ["a.png", "b.jpg", "c.dcm"]
    assert table["score_Pneumonia"].between(0, 1).all()
    assert [name.rsplit("/", 1)[-1] for name in bad["image"]] == ["d.jpg"]
    assert pd.read_parquet(run / "predictions.parquet")["image"].tolist() == table["image"].tolist()
    assert main(["test", *cls]) == 0
    scores = pd.read_parquet(run / "test/predictions.parquet").set_index("image_id")["score_Pneumonia"]
    assert scores.get(raw.stem, table["score_Pneumonia"][2]) == pytest.approx(table["score_Pneumonia"][2], abs=1e-4)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--model.num_classes", "2", "--model.kind", "multilabel"], "num_classes is 2, the data group has 1 labels"),
        (["--model.num_classes", "2"], "num_classes is 2 for binary"),
        (["--model.kind", "binry"], "did you mean binary"),
        (["--model.losses", "{labels: {name: dice_bce}}"], "'dice_bce' is for mask, this task has labels"),
        (["--model.losses", "{labels: {name: clip}}"], "'clip' is for pair, this task has labels"),
        (["--data.target", "boxes"], "needs labels, the data group gives boxes"),
        (["--data.label_fraction", "0.001"], "without a positive one; raise data.label_fraction"),
        (["--model.weights", "nothing.ckpt"], "nothing.ckpt: no such file"),
        (["--model.image_size", "32"], "image_size is 32 but the data group crops to 64"),
        (["--model.protocol", "standrd"], "did you mean standard"),
    ],
)
def test_mistakes_are_one_line(cls, workdir, capsys, more, line):
    assert main(["fit", *cls, *more]) == 2
    told = [text for text in capsys.readouterr().err.splitlines() if text.startswith("sista: ")]
    assert len(told) == 1
    assert line in told[0]


def test_weights_of_another_architecture_name_the_flag(cls, workdir, capsys):
    assert main(["fit", *cls, "--model.image_encoder", "resnet18"]) == 0
    assert main(["fit", *cls, "--model.weights", str(best(workdir))]) == 2
    assert "it holds resnet18; --model.image_encoder null builds it" in capsys.readouterr().err


def test_weights_say_which_encoder_they_are_and_are_loaded(cls, workdir, caplog):
    assert main(["fit", *cls, "--model.image_encoder", "resnet18"]) == 0
    weights = ["--model.image_encoder", "null", "--model.weights", str(best(workdir))]
    assert main(["fit", *cls, *weights]) == 0
    assert "matched 120 of 120 tensors (100.0% of it)" in caplog.text
    states = [torch.load(best(workdir, number=n), weights_only=True)["state_dict"] for n in ("0001", "0002")]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0] if k.startswith("image_encoder."))


def test_a_checkpoint_of_another_task_is_one_line(cls, seg, workdir, capsys):
    assert main(["fit", *cls]) == 0
    assert "waiting for batches: " in capsys.readouterr().out
    assert main(["test", *seg, "--ckpt_path", str(best(workdir))]) == 2
    told = [text for text in capsys.readouterr().err.splitlines() if text.startswith("sista: ")]
    assert len(told) == 1
    assert "a checkpoint of ClassificationTask, the configuration is of SegmentationTask" in told[0]


@pytest.mark.parametrize("order", [["Edema", "Effusion"], ["Effusion", "Edema"], []])
def test_a_checkpoint_keeps_the_order_of_its_classes(order):
    """External data, whose columns have another order: each score would be held against another's truth."""
    task, checkpoint = ClassificationTask(2, image_encoder="resnet10t", image_size=32), {}
    data = SimpleNamespace(classes=["Edema", "Effusion"], wanted_labels=None)
    task._trainer = SimpleNamespace(datamodule=data)
    task.check_classes(2, "labels")
    task.on_save_checkpoint(checkpoint)
    data.classes, data.wanted_labels = [], order  # of `data.inputs`, which have no store
    task.check_classes(2, "labels")
    if order == ["Effusion", "Edema"]:
        told = r"labels are Effusion, Edema, but .* trained on Edema, Effusion.*; set data\.labels: \[Edema, Effusion\]"
        with pytest.raises(SistaError, match=told):
            task.on_load_checkpoint(checkpoint)
    else:
        task.on_load_checkpoint(checkpoint)
        assert task.classes == ["Edema", "Effusion"]
    task.classes = order
    task.on_load_checkpoint({})  # of before: no names
    assert task.classes == order


def test_a_checkpoint_of_other_classes_or_another_size_is_one_line(cls, workdir, capsys):
    assert main(["fit", *cls]) == 0
    other = torch.load(best(workdir), weights_only=True)
    assert other["classes"] == ["Pneumonia"]
    torch.save(other | {"classes": ["Edema"]}, "other.ckpt")
    for verb in ("test", "predict"):
        assert main([verb, *cls, "--ckpt_path", "other.ckpt"]) == 2
        told = [text for text in capsys.readouterr().err.splitlines() if text.startswith("sista: ")]
        assert len(told) == 1
        assert "labels are Pneumonia, but the checkpoint was trained on Edema" in told[0]
    assert main(["test", *cls, "--model.image_encoder", "resnet18", "--ckpt_path", str(best(workdir))]) == 2
    told = [text for text in capsys.readouterr().err.splitlines() if text.startswith("sista: ")]
    assert len(told) == 1
    assert "does not fit the configured model" in told[0]
