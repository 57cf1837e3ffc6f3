"""Pre-training through the real command on a tiny phantom."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import mlflow
import pandas as pd
import pytest
import torch

from sista_pl import load_encoder, load_text_encoder
from sista_pl.checkpoint import read_checkpoint
from sista_pl.cli import main
from sista_pl.errors import SistaError

FIT = ["fit", "--config", "pretrain.yaml"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, phantom_store, mlflow_tables):
    """A finished run of two epochs, and the folder it ran in."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copy(mlflow_tables, folder / "mlflow.db")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    overrides = [
        "--data.store", str(phantom_store), "--data.root", "null", "--data.phantom", "null", "--data.format", "null",
        "--data.size", "64", "--data.crop", "64", "--data.batch_size", "8", "--model.head_hidden", "32",
        "--model.embed_dim", "16", "--trainer.max_epochs", "2", "--trainer.enable_progress_bar", "false",
        "--model.text_encoder", "{name: small-bert, layers: 1, dim: 32, vocab_size: 500}",
    ]  # fmt: skip
    assert main([*FIT, *overrides]) == 0
    yield folder, overrides
    patch.undo()


def test_run_folder_is_complete(finished):
    run = finished[0] / "runs" / "pretrain" / "0001"
    found = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()}
    assert {
        "config.yaml", "metrics.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt", "encoder/model.safetensors",
        "encoder/config.json", "pictures/words-epoch-000.png", "pictures/words-epoch-001.png",
    } <= found  # fmt: skip
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["phantom"].startswith("PHANTOM DATA")
    assert [row["epoch"] for row in metrics["history"]] == [0, 1]
    assert len(metrics["data"]["hash"]) == 64
    interval = metrics["best"]["intervals"]["val/i2t_R@10"]
    assert interval["interval95"][0] <= interval["value"] <= interval["interval95"][1]
    for key in ("val/instance/true_pair_mass", "val/instance/false_negatives", "val/instance/identical_reports",
                "val/token/kept_patches", "val/temperature", "train/grad_norm"):  # fmt: skip
        assert key in metrics["history"][0], key


def test_mlflow_run_is_complete(finished):
    folder = finished[0]
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    run_id = (folder / "runs" / "pretrain" / "0001" / "mlflow_run_id").read_text()
    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert "lr" in run.data.params
    history = json.loads((folder / "runs/pretrain/0001/metrics.json").read_text())["history"]
    figures = [name for name in history[0] if name.startswith("val/")]
    assert len(figures) > 20
    steps = [row.step for row in client.get_metric_history(run_id, "val/R_mean")]
    for name in figures:  # MLflow has no @ in a name
        told = client.get_metric_history(run_id, name.replace("@", ""))
        assert [row.value for row in told] == pytest.approx([row[name] for row in history]), name
        assert [row.step for row in told] == steps, name
    assert run.data.tags["version.torch"] == torch.__version__.split("+")[0]
    assert run.data.tags["data.phantom"] == "True"
    artifacts = {a.path for a in client.list_artifacts(run_id)}
    assert {"config.yaml", "metrics.json", "checkpoints", "pictures"} <= artifacts


def test_checkpoint_is_plain_values_and_rebuilds_the_encoders(finished):
    path = finished[0] / "runs" / "pretrain" / "0001" / "checkpoints" / "best.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    encoder = load_encoder(path)
    features = encoder(torch.zeros(1, 1, 64, 64))
    assert features.pooled.shape == (1, encoder.dim)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, state[f"image_encoder.{name}"]), name
    text = load_text_encoder(path)
    assert text(text.tokenize(["no pleural effusion"]).batch([0])).pooled.shape == (1, 32)


def test_exported_encoder_is_timms(finished):
    import timm

    run = finished[0] / "runs" / "pretrain" / "0001"
    config = json.loads((run / "encoder" / "config.json").read_text())
    model = timm.create_model(
        config["architecture"], num_classes=0, in_chans=1, checkpoint_path=str(run / "encoder" / "model.safetensors")
    ).eval()
    image = torch.randn(2, 1, 64, 64)
    ours = load_encoder(run / "checkpoints" / "best.ckpt")(image).pooled
    assert torch.allclose(model(image), ours, atol=1e-5)


def test_test_without_a_path_takes_the_best_and_says_so(finished, capsys):
    folder, overrides = finished
    assert main(["test", "--config", "pretrain.yaml", *overrides]) == 0
    told = capsys.readouterr().out
    assert "checkpoint: runs/pretrain/0001/checkpoints/best.ckpt" in told
    assert told.count("test/i2t_R@10 ") == 1  # with its interval, and no second table without
    metrics = json.loads((folder / "runs" / "pretrain" / "0001" / "test/metrics.json").read_text())
    assert "test/i2t_R@10" in metrics["test"]
    assert main(["validate", "--config", "pretrain.yaml", *overrides]) == 0
    # what the run told to type next: its own configuration, whatever it was put together from
    assert main(["test", "--config", "runs/pretrain/0001/config.yaml"]) == 0
    assert "checkpoint: runs/pretrain/0001/checkpoints/best.ckpt" in capsys.readouterr().out


def test_predict_writes_unit_embeddings(finished):
    import numpy as np

    folder, overrides = finished
    assert main(["predict", "--config", "pretrain.yaml", *overrides]) == 0
    table = pd.read_parquet(folder / "runs" / "pretrain" / "0001" / "predictions.parquet")
    assert table["image_id"].is_unique
    assert np.allclose([np.linalg.norm(v) for v in table["image"]], 1, atol=1e-3)
    assert len(table["text"][0]) == 16


def test_list_runs(finished, capsys):
    assert main(["list", "runs"]) == 0
    out = capsys.readouterr().out
    assert "runs/pretrain/0001" in out
    assert "R@10_chance" in out
    assert "PHANTOM DATA" in out
    broken = finished[0] / "runs/pretrain/0002"
    broken.mkdir()
    (broken / "metrics.json").write_text('{"best": ')
    assert main(["list", "runs"]) == 0
    shutil.rmtree(broken)
    out = capsys.readouterr().out
    assert "R@10_chance" in out
    assert "can't be read; make this run again" in out


def test_checkpoint_of_another_kind(finished, tmp_path):
    with pytest.raises(SistaError, match="no such file"):
        load_encoder(tmp_path / "none.ckpt")
    torch.save({"a": 1}, tmp_path / "other.ckpt")
    with pytest.raises(SistaError, match="is it from"):
        load_encoder(tmp_path / "other.ckpt")
    path = finished[0] / "runs" / "pretrain" / "0001" / "checkpoints" / "best.ckpt"
    (tmp_path / "cut.ckpt").write_bytes(path.read_bytes()[:20000])
    with pytest.raises(SistaError, match="cut short"):
        load_encoder(tmp_path / "cut.ckpt")
    checkpoint = read_checkpoint(path)
    checkpoint["hyper_parameters"]["image_encoder"] = "resnet18"
    torch.save(checkpoint, tmp_path / "mixed.ckpt")
    with pytest.raises(SistaError, match="does not fit"):
        load_encoder(tmp_path / "mixed.ckpt")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (["--data.size", "32"], "one store per size"),
        (["--data.batch_size", "500"], "lower data.batch_size"),
        (["--data.store", "nowhere"], "is no prepared store"),
        (["--model.image_size", "48"], "set both alike"),
        (["--trainer.max_epochs", "-1"], "no end of training"),
        (["--data.crop", "80", "--model.image_size", "80"], "crop is 80"),
        (["--data.similarity", "findigs"], "did you mean findings"),
        (["--trainer.strategy", "foo"], "trainer: "),
        (["--trainer.accelerator", "gpu"], "trainer: "),
        (["--trainer.devices", "foo"], "trainer: "),
        (["--trainer.limit_train_batches", "-1"], "trainer: "),
        (["--checkpoint_every", "-1"], "trainer: "),
        (["--trainer.max_epochs", "-3"], "trainer: "),
    ],
)
def test_mistakes_of_the_data_group_are_one_line(capsys, workdir, tiny, change, line):
    assert main([*FIT, *tiny, *change]) == 2
    message = [row for row in capsys.readouterr().err.splitlines() if row.startswith("sista:")]
    assert len(message) == 1
    assert line in message[0]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"losses": {"instance": None}}, "loss 'instance': it is None; write `{name: clip}`"),
        ({"losses": {"i": ["clip"]}}, "loss 'i': it is ['clip']; write"),
        ({"losses": {"my.loss": {"name": "clip"}}}, "no component can be called 'my.loss'; choose another"),
        ({"losses": {"keys": {"name": "clip"}}}, "no component can be called 'keys'"),
        ({"losses": {1: "clip"}}, "no component can be called 1"),
        ({"losses": {"i": {"name": "clip", "weight": math.nan}}}, "loss 'i': weight is nan; give a number >= 0"),
        ({"temperature": math.inf}, "temperature is inf; give a number of at least 0.01"),
        ({"temperature": 0.009}, "temperature is 0.009; give"),
        ({"embed_dim": 0}, "embed_dim is 0; give at least 1"),
        ({"head_hidden": -1}, "head_hidden is -1; give at least 1"),
        ({"pool": 1}, "pool is 1; give at least 2"),
    ],
)
def test_mistakes_of_the_model_group_are_one_line(change, line):
    from sista_pl.pretrain import PretrainTask

    with pytest.raises(SistaError, match=re.escape(line)) as error:
        PretrainTask(**{"losses": {"instance": "clip"}, "image_encoder": "resnet10t", "image_size": 32, **change})
    assert "\n" not in str(error.value)


def test_the_pairs_of_one_patient_have_no_interval():
    from sista_pl.pretrain import PretrainTask

    task = PretrainTask({"instance": "clip"}, "resnet10t", image_size=32, head_hidden=8)
    manifest = pd.DataFrame({"patient_id": ["p"] * 9})
    task._trainer = SimpleNamespace(datamodule=SimpleNamespace(store=SimpleNamespace(manifest=manifest)))
    ranks = torch.tensor([1, 2, 7, 20])
    task.val_retrieval.ranks = {"i2t": ranks, "t2i": ranks, "sample": torch.tensor([0, 2, 3, 8])}
    found = task.report("val")
    for name, value in {"i2t_R@1": 0.25, "t2i_R@5": 0.5, "R_mean": 0.5, "i2t_median_rank": 2}.items():
        assert found[f"val/{name}"] == {"value": value, "interval95": None, "n": 4}


def test_a_phantom_and_a_real_root_never_mix(capsys, workdir, tiny, phantom_root):
    real = ["--data.root", str(phantom_root), "--data.format", "mimic_cxr", "--data.store", "new"]
    assert main([*FIT, *tiny, *real]) == 2
    assert "a phantom and real data never mix" in capsys.readouterr().err
    (workdir / "mine").mkdir()
    (workdir / "mine" / "data.csv").write_text("a\n")
    mixed = ["--data.root", "mine", "--data.format", "mimic_cxr", "--data.phantom", "{studies: 20}"]
    assert main([*FIT, *tiny, *mixed, "--data.store", "new"]) == 2
    assert (workdir / "mine" / "data.csv").read_text() == "a\n"


@pytest.mark.slow
@pytest.mark.real
def test_real_pairs_train_to_the_end(real_data, workdir):
    """The data group switched to real X-rays; the tokenizer sees the real reports without images, too."""
    options = [
        "--data", "data/table.yaml", "--data.root", str(real_data), "--data.store", str(workdir / "store"),
        "--data.options", "{table: studies.csv, where: {projection: frontal}, require_report: true}",
        "--data.tokenizer_corpus", str(real_data / "reports_only_iu.csv"), "--data.size", "72", "--data.crop", "64",
        "--data.batch_size", "32", "--data.num_workers", "0", "--trainer.max_epochs", "3", "--model.head_hidden", "64",
    ]  # fmt: skip
    assert main([*FIT, *options]) == 0
    metrics = json.loads((workdir / "runs" / "pretrain" / "0001" / "metrics.json").read_text())
    assert metrics["phantom"] is False
    assert metrics["history"][-1]["train/loss"] < metrics["history"][0]["train/loss"]
    assert "val/i2t_R@5" in metrics["best"]["intervals"]


def test_every_trainable_parameter_gets_a_gradient_and_the_scale_its_own_up_to_100(workdir, tiny, monkeypatch):
    """Of pairs that nothing relates s comes down from 100; with its gradient turned round it stays there."""
    from sista_pl.pretrain import PretrainTask

    without, scales = [], []

    def look(self, optimizer):
        without.extend(name for name, p in self.named_parameters() if p.requires_grad and p.grad is None)
        scales[-1].append(self.scale().item())
        self.log_scale.grad *= 1 if len(scales) == 1 else -1

    monkeypatch.setattr(PretrainTask, "on_before_optimizer_step", look)
    more = ["--model.temperature", "0.01", "--model.lr", "1e-3", "--trainer.limit_train_batches", "3"]
    for losses in ("{a: {name: clip}}", "{a: {name: sia}, b: {name: sta}}"):
        scales.append([])
        assert main([*FIT, *tiny, "--model.losses", losses, *more]) == 0
    assert without == []
    assert scales[0][0] == pytest.approx(100)
    assert scales[0][2] < scales[0][1] < 99.99
    assert scales[1] == pytest.approx([100] * 3)
