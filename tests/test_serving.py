"""`sista export --to mlflow`: against `sista predict` and `sista embed`; bad bytes, registry, the real server."""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from mlflow.exceptions import MlflowException
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from sista_tasks.classification import ClassificationTask

from sista_pl import load_encoder, serving
from sista_pl.checkpoint import read_checkpoint
from sista_pl.cli import main
from sista_pl.data.images import read_gray
from sista_pl.embed import preparation
from sista_pl.errors import SistaError
from sista_pl.pretrain import PretrainTask
from sista_pl.serving import class_names

LABELS = ["Edema", "Pleural Effusion"]


def checkpoint(run, task, **data):
    """Write what `sista fit` would: random weights, batch statistics that are none of the defaults."""
    for layer in task.modules():
        if getattr(layer, "running_mean", None) is not None:
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"size": 80, **data}}}))
    (run / "metrics.json").write_text(json.dumps({"phantom": "PHANTOM DATA: drawn"}))
    optimizer = {"state": {0: torch.zeros(9)}}
    found = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams), "optimizer_states": [optimizer],
             "task": type(task).__name__, "epoch": 2, "global_step": 9, "pytorch-lightning_version": "2.6.6",
             "callbacks": {}}  # fmt: skip
    torch.save(found, run / "checkpoints" / "best.ckpt")
    return run / "checkpoints" / "best.ckpt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="module")
def cls(folder):
    torch.manual_seed(0)
    task = ClassificationTask(2, image_encoder="resnet10t", image_size=64)
    return checkpoint(folder / "runs" / "cls" / "0001", task, labels=LABELS)


@pytest.fixture(scope="module")
def pre(folder):
    torch.manual_seed(0)
    task = PretrainTask(
        {"instance": "clip"}, "resnet10t", image_size=64, embed_dim=8, head_hidden=16,
        text_encoder={"name": "small-bert", "layers": 1, "dim": 32, "vocab_size": 120},
    )  # fmt: skip
    task.text_encoder.fit(["Small left pleural effusion."] * 3)
    return checkpoint(folder / "runs" / "pre" / "0001", task)


@pytest.fixture(scope="module")
def films(folder):
    """A JPEG, a PNG and a DICOM of drawn pixels, and a file that is none."""
    draw, path = np.random.default_rng(0), folder / "films"
    path.mkdir()
    smooth = np.cumsum(draw.normal(0, 9, (90, 70)), 0)
    grey = np.clip(128 + smooth, 0, 255).astype(np.uint8)
    Image.fromarray(grey).save(path / "a.jpg", quality=95)
    Image.fromarray(grey[:50, ::-1]).save(path / "b.png")
    deep = (2000 + 20 * smooth).clip(0, 4095).astype(np.uint16)
    data = FileDataset("c.dcm", {}, file_meta=FileMetaDataset(), preamble=b"\0" * 128)
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.3"
    data.Rows, data.Columns = deep.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME1"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.WindowCenter, data.WindowWidth = 2000, 3000
    data.PixelData = deep.tobytes()
    data.save_as(path / "c.dcm", enforce_file_format=True)
    (path / "d.jpg").write_bytes(b"no image")
    return path


GOOD = ["a.jpg", "b.png", "c.dcm"]


def table(films, names=GOOD):
    return pd.DataFrame({"image": [(films / name).read_bytes() for name in names]})


def export(ckpt, out, *more):
    return main(["export", "--ckpt_path", str(ckpt), "--to", "mlflow", "--out", str(out), *more])


@pytest.fixture(scope="module")
def served(folder, cls):
    assert export(cls, folder / "cls") == 0
    return folder / "cls"


@pytest.fixture(scope="module")
def model(served):
    return mlflow.pyfunc.load_model(str(served))


def test_scores_are_those_of_predict(cls, films, model, folder, workdir):
    command = [
        "--config", "cls_chexpert.yaml", "--ckpt_path", str(cls), "--model.num_classes", "2", "--data.phantom", "null",
        "--data.labels", json.dumps(LABELS), "--data.inputs", str(films), "--data.size", "80", "--data.crop", "64",
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.precision", "32-true",
    ]  # fmt: skip
    assert main(["predict", *command]) == 0
    expected = pd.read_csv(cls.parents[1] / "predictions.csv")
    found = model.predict(table(films))
    assert list(found) == ["score_Edema", "score_Pleural Effusion", "embedding"]
    assert [name.rsplit("/", 1)[-1] for name in expected["image"]] == GOOD
    for name in list(found)[:2]:
        assert np.allclose(found[name], expected[name], rtol=0, atol=1e-5)
    assert np.ptp(found["score_Edema"]) > 1e-4


@torch.no_grad()
def test_embeddings_are_those_of_the_encoder(cls, films, model):
    encoder = load_encoder(cls)
    for name, vector in zip(GOOD, model.predict(table(films))["embedding"], strict=True):
        square = read_gray(films / name, 80)[8:72, 8:72].astype(np.float32) / 127.5 - 1
        expected = encoder(torch.from_numpy(square)[None, None]).pooled[0]
        assert np.allclose(vector, expected, rtol=1e-4, atol=1e-5)


def test_a_registered_pretraining_has_alias_and_run_and_the_embeddings_of_embed(pre, films, workdir, capsys):
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.create_experiment("sista")
    run = client.create_run(experiment).info.run_id
    (pre.parents[1] / "mlflow_run_id").write_text(run)
    assert export(pre, workdir / "pre", "--register", "chest encoder") == 0
    told = capsys.readouterr().out
    for part in ("PHANTOM DATA", "chest encoder version 1, alias champion", "-m 'models:/chest encoder@champion'"):
        assert part in told
    version = client.get_model_version_by_alias("chest encoder", "champion")
    assert "PHANTOM DATA" in version.description
    logged = client.get_logged_model(version.source.removeprefix("models:/"))
    assert (logged.experiment_id, logged.source_run_id, version.run_id) == (experiment, run, run)
    assert client.get_run(run).info.status == "RUNNING"  # as it was
    found = mlflow.pyfunc.load_model("models:/chest encoder@champion")
    assert found.metadata.signature is not None
    assert (workdir / "pre" / "MLmodel").is_file()
    out = workdir / "embedded.parquet"
    assert main(["embed", "--ckpt_path", str(pre), "--inputs", str(films), "--out", str(out)]) == 0
    answer = found.predict(table(films))
    assert list(answer) == ["embedding"]
    assert np.allclose(np.stack(answer["embedding"]), np.stack(pd.read_parquet(out)["embedding"]), atol=1e-5)


def test_the_folder_is_whole_and_says_what_it_is(served, model):
    schema = model.metadata.signature
    assert [(c.name, c.type.name) for c in schema.inputs] == [("image", "binary")]
    assert schema.outputs.input_names() == ["score_Edema", "score_Pleural Effusion", "embedding"]
    told = model.metadata.metadata
    assert (told["kind"], told["classes"], told["embedding"]["dim"]) == ("multilabel", LABELS, 512)
    assert told["image"]["resize"]["long_side"] == 80
    kept = torch.load(served / "data" / "model.ckpt", weights_only=True)
    assert set(kept) == {"state_dict", "hyper_parameters", "task", "serving"}
    text = (served / "README.md").read_text()
    for part in ("PHANTOM DATA", "Not for clinical use", "mlflow models serve", "Edema, Pleural Effusion"):
        assert part in text
    assert len(model.predict(model.input_example)) == 1
    assert sorted(p.name for p in served.parent.iterdir() if p.name.startswith(".")) == []


@pytest.mark.parametrize("kind", ["multilabel", "multiclass"])
def test_thresholds_are_told_where_some_were_chosen(cls, kind):
    """Of exclusive classes the highest score decides."""
    found = read_checkpoint(cls)
    found["hyper_parameters"]["kind"] = kind
    facts = serving._facts(found, cls, serving.FilmEncoder(found, cls), preparation(cls, 64), {})
    assert facts["thresholds"] == (None if kind == "multiclass" else [0.5, 0.5])
    assert ("Thresholds chosen" in serving.serving_card(facts, {})) == (kind == "multilabel")


def test_bad_bytes_are_the_clients_mistake_and_named(films, model, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cut = (films / "c.dcm").read_bytes()
    rows = [(films / "a.jpg").read_bytes(), b"no image", b"", cut[: len(cut) // 2], cut[:140]]
    with pytest.raises(MlflowException) as caught:
        model.predict(pd.DataFrame({"image": rows}))
    assert caught.value.get_http_status_code() == 400
    told = caught.value.message
    assert told.startswith("row 1: not an image; row 2: empty file; row 3: DICOM: pixels cannot be decoded")
    assert "row 4: not a DICOM image" in told
    assert "row 0" not in told
    assert "\n" not in told
    assert str(tmp_path) not in told
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MlflowException, match="row 4: not an image; and 35 more"):
        model.predict(pd.DataFrame({"image": [b"x"] * 40}))
    for wrong in ({"film": rows}, {"image": ["text"]}, {"image": [5]}, {"image": [None]}):
        with pytest.raises(MlflowException) as caught:
            model.predict(pd.DataFrame(wrong))
        assert caught.value.get_http_status_code() == 400
    empty = model.predict(pd.DataFrame({"image": pd.Series([], dtype=object)}))
    assert (len(empty), list(empty)) == (0, ["score_Edema", "score_Pleural Effusion", "embedding"])


def test_no_room_is_not_the_clients_mistake(films, model, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    with pytest.raises(MlflowException, match="set TMPDIR") as caught:
        model.predict(table(films))
    assert caught.value.get_http_status_code() == 500


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would be there")
def test_a_device_that_is_not_there_is_told(served):
    with pytest.raises(SistaError, match=r"serving_device cuda: .*; give cpu"):
        mlflow.pyfunc.load_model(str(served), model_config={"serving_device": "cuda"})


def test_many_at_once_are_as_one_by_one(films, model):
    one = pd.concat([model.predict(table(films, [name])) for name in GOOD], ignore_index=True)
    many = model.predict(table(films, GOOD * 11))  # over the batches of the encoder
    with ThreadPoolExecutor(8) as pool:
        beside = list(pool.map(lambda _: model.predict(table(films)), range(8)))
    for found in [many[:3], many[30:], *beside]:
        assert np.allclose(found["score_Edema"], one["score_Edema"], atol=1e-6)
        assert np.allclose(np.stack(found["embedding"]), np.stack(one["embedding"]), atol=1e-5)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--register", "a/b"], "MLflow takes no model a/b@champion"),
        (["--register", "a", "--alias", "latest"], "--alias latest is MLflow's own"),
        (["--register", "a", "MLFLOW_TRACKING_URI"], "is not on this machine"),
        (["--register", "a", "MLFLOW_REGISTRY_URI"], "is not on this machine"),
        (["--alias", "a"], "--alias without --register"),
        (["--to", "timm", "--register", "a"], "--register with --to timm"),
        (["--out", "."], "exists"),
        (["--ckpt_path", "other.ckpt"], "is a checkpoint of SegmentationTask"),
        (["--size", "8"], "give 64 or more"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(cls, workdir, capsys, monkeypatch, more, why):
    hyper = {"image_encoder": "resnet10t", "image_size": 64}
    torch.save({"state_dict": {}, "hyper_parameters": hyper, "task": "SegmentationTask"}, "other.ckpt")
    if more[-1].startswith("MLFLOW_"):
        *more, name = more
        monkeypatch.setenv(name, "http://10.255.255.1:5000")
    assert export(cls, workdir / "out", *more) == 2
    told = capsys.readouterr().err
    assert why in told
    assert told.count("\n") == 1
    assert sorted(p.name for p in workdir.iterdir() if "mlflow" not in p.name) == ["other.ckpt"]


def test_names_of_classes(cls, tmp_path, capsys):
    run = tmp_path / "runs" / "cls" / "0001"
    (run / "checkpoints").mkdir(parents=True)
    copy = Path(shutil.copy(cls, run / "checkpoints"))
    hyper = {"hyper_parameters": {"num_classes": 2}}
    assert class_names(copy, hyper) == ["0", "1"]
    assert class_names(copy, hyper | {"classes": ["A", "B"]}) == ["A", "B"]
    (run / "config.yaml").write_text("data: {init_args: {labels: [Edema]}}")
    assert export(copy, tmp_path / "out") == 2
    assert "the checkpoint 2 classes; mend it" in capsys.readouterr().err


# --- the real server ----------------------------------------------------------------


class Server:
    """`mlflow models serve` in a process group of its own."""

    def __init__(self, folder, log):
        with socket.socket() as room:
            room.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{room.getsockname()[1]}"
        command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(folder), "--env-manager", "local",
                   "--port", self.url.rsplit(":", 1)[1]]  # fmt: skip
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
        self.log = log.open("w")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, start_new_session=True,
                                        env=os.environ | {"PATH": path})  # fmt: skip

    def wait(self, seconds=180):
        end = time.time() + seconds
        while time.time() < end and self.process.poll() is None:
            try:
                return urllib.request.urlopen(f"{self.url}/ping", timeout=5).status == 200
            except OSError:
                time.sleep(0.3)
        return False

    def post(self, body, kind="application/json"):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/invocations", data, {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as why:
            return why.code, why.read().decode()

    def stop(self):
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(20)
        self.log.close()


@pytest.fixture(scope="module")
def server(served, folder):
    found = Server(served, folder / "server.log")
    try:
        assert found.wait(), (folder / "server.log").read_text()
        yield found
    finally:
        found.stop()


def records(*files):
    return {"dataframe_records": [{"image": base64.b64encode(file).decode()} for file in files]}


@pytest.mark.slow
def test_the_real_server_answers(server, model, films):
    files = table(films)["image"].tolist()
    status, said = server.post(records(*files))
    assert status == 200
    for found, (_, expected) in zip(said["predictions"], model.predict(table(films)).iterrows(), strict=True):
        assert list(found) == list(expected.index)
        assert found["score_Edema"] == pytest.approx(expected["score_Edema"], abs=1e-6)
        assert np.allclose(found["embedding"], expected["embedding"], atol=1e-5)
    parquet = table(films).to_parquet()
    assert server.post(parquet, "application/vnd.apache.parquet")[1] == said
    encoded = base64.b64encode(files[0]).decode()
    for body, kind, code in (
        (records(files[0], b"no image"), "json", 400), (records(files[2][:-100]), "json", 400),
        (records(b""), "json", 400), ({"dataframe_records": []}, "json", 400), ({}, "json", 400),
        ({"dataframe_records": [{"film": encoded}]}, "json", 400), ({"instances": [{"image": encoded}]}, "json", 400),
        ({"dataframe_records": [{"image": None}]}, "json", 400), ({"dataframe_records": [{"image": "a"}]}, "json", 400),
        (b"{", "json", 400), (files[0], "json", 400), (b"x", "vnd.apache.parquet", 400), (files[0], "jpeg", 415),
    ):  # fmt: skip
        assert server.post(body, f"application/{kind}")[0] == code, body
    told = json.loads(server.post(records(files[0], b"no image"))[1])
    assert told["message"].splitlines()[-1].startswith("Error: row 1: not an image")


@pytest.mark.slow
def test_eight_clients_at_once_and_broken_films_among_them(server, films):
    files, draw = table(films)["image"].tolist(), np.random.default_rng(0)
    expected = {file: server.post(records(file))[1] for file in files}
    asked = []
    for number in range(63):
        file = bytearray(files[number % 3])
        if number % 4 == 0:
            for place in draw.integers(0, len(file), 20):
                file[place] = draw.integers(256)
        asked.append(bytes(file))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda file: server.post(records(file)), asked))
    for file, (status, said) in zip(asked, found, strict=True):
        assert status in ((200,) if file in expected else (200, 400))
        if file in expected:
            vectors = [x["predictions"][0]["embedding"] for x in (said, expected[file])]
            assert np.allclose(*vectors, atol=1e-6)
    assert server.process.poll() is None
    assert server.post(records(files[0]))[0] == 200
