"""Nothing of a patient reaches another machine unless it is allowed, and then no id does: a server that pretends to be
another machine's tracker keeps all that it is sent.
"""

import hashlib
import io
import json
import os
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from sista_pl import privacy, tracking
from sista_pl.cli import main
from sista_pl.errors import SistaError

ALLOWED = ["--privacy", "allow_patient_data"]


class Tracker(BaseHTTPRequestHandler):
    """Answers MLflow's REST calls as a server with one experiment, and keeps each request."""

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        call = self.path.partition("?")[0].removeprefix("/api/2.0/")
        self.server.requests.append((self.command, self.path, body))
        if call == "mlflow/experiments/create":
            self.server.known = True
        run = {
            "info": {"run_id": "a" * 32, "run_uuid": "a" * 32, "experiment_id": "1", "status": "RUNNING",
                     "artifact_uri": f"{self.server.place}/{'a' * 32}/artifacts", "lifecycle_stage": "active"},
            "data": {},
        }  # fmt: skip
        experiment = {"experiment_id": "1", "name": "sista", "artifact_location": self.server.place,
                      "lifecycle_stage": "active"}  # fmt: skip
        told = {
            "mlflow/experiments/get-by-name": {"experiment": experiment}, "mlflow/experiments/create": experiment,
            "mlflow/experiments/get": {"experiment": experiment}, "mlflow/runs/create": {"run": run},
            "mlflow/runs/get": {"run": run}, "mlflow/runs/update": {"run_info": run["info"]},
        }.get(call, {})  # fmt: skip
        code = 200
        if call == "mlflow/experiments/get-by-name" and not self.server.known:
            code, told = 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such experiment"}
        if call.startswith("mlflow/logged-models"):
            code, told = 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no models here"}
        sent = json.dumps(told).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    def log_message(self, *_):
        """Say nothing."""


@contextmanager
def serving():
    """A tracker whose `remote` URI leads to it, though it is no loopback address, and whose `local` URI is one."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Tracker)
    server.requests, server.known, server.place = [], False, "mlflow-artifacts:/1"
    server.remote, server.local = (f"http://{host}:{server.server_port}" for host in ("0.0.0.0", "127.0.0.1"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def tracker(monkeypatch):
    for name in ("HTTP_PROXY", "ALL_PROXY", "SISTA_PRIVACY", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    with serving() as server:
        yield server


def refused(capsys, *argv):
    """Return the one line with which a command is refused."""
    assert main([str(word) for word in argv]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sista: ")]
    assert len(lines) == 1
    return lines[0]


FIT = ["fit", "--config", "pretrain.yaml"]
RETRIEVAL = ["test", "--config", "retrieval_mimic.yaml", "--model.weights", "begin.ckpt"]
EXPORT = ["export", "--ckpt_path", "best.ckpt", "--to", "mlflow", "--out", "served", "--register", "films"]


@pytest.mark.parametrize("command", [FIT, RETRIEVAL, EXPORT], ids=["fit", "test", "export"])
def test_a_tracker_elsewhere_gets_no_request(command, capsys, workdir, tracker, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.remote)
    assert f"{tracker.remote} is not on this machine" in refused(capsys, *command)
    monkeypatch.setenv("SISTA_PRIVACY", "allow_everything")
    assert "SISTA_PRIVACY: unknown value 'allow_everything'" in refused(capsys, *command)
    assert not tracker.requests
    assert not list(workdir.iterdir())


def test_a_registry_elsewhere_gets_no_request(capsys, workdir, tracker, monkeypatch):
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", tracker.remote)
    assert f"{tracker.remote} is not on this machine" in refused(capsys, *EXPORT)
    assert not tracker.requests


def test_each_logger_of_the_configuration_is_looked_at(capsys, workdir, tracker):
    second = f"{{class_path: MLFlowLogger, init_args: {{tracking_uri: '{tracker.remote}'}}}}"
    loggers = f"[{{class_path: CSVLogger, init_args: {{save_dir: here}}}}, {second}]"
    assert f"{tracker.remote} is not on this machine" in refused(capsys, *FIT, "--trainer.logger", loggers)
    assert not tracker.requests
    assert not list(workdir.iterdir())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("MLFlowLogger", {"tracking_uri": "https://mlflow.example"}),
        ("MLFlowLogger", {"tracking_uri": "sqlite:///mlflow.db", "artifact_location": "s3://films/of-patients"}),
        ("MLFlowLogger", {"tracking_uri": None, "save_dir": "//films/s3"}),
        ("CSVLogger", {"save_dir": "s3://films/logs"}),
        ("TensorBoardLogger", {"save_dir": "gs://films/logs"}),
        ("WandbLogger", {"project": "films"}),
        ("mine.Logger", {}),
    ],
)
def test_a_logger_that_may_send_elsewhere_is_refused(name, arguments):
    with pytest.raises(SistaError, match=r"is not on this machine|may write to another machine"):
        privacy.check_logger(f"pytorch_lightning.loggers.{name}", arguments, "local_only")
    privacy.check_logger(f"pytorch_lightning.loggers.{name}", arguments, "allow_patient_data")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("MLFlowLogger", {"tracking_uri": "sqlite:///mlflow.db", "artifact_location": None}),
        ("MLFlowLogger", {"tracking_uri": None, "save_dir": "./mlruns"}),
        ("CSVLogger", {"save_dir": "logs"}),
    ],
)
def test_a_logger_that_stays_here_is_taken(name, arguments):
    privacy.check_logger(f"pytorch_lightning.loggers.{name}", arguments, "local_only")


@pytest.mark.parametrize(
    "uri",
    [
        "http://user@localhost.evil.example", "http://localhost@evil.example", "http://127.0.0.1.evil.example:5000",
        "http://evil.example\\@127.0.0.1", "http://evil.example#@127.0.0.1", "http://127.1", "http://2130706433",
        "https://localhost.", "http:///mlruns", "postgresql://remote/mlflow", "mysql+pymysql://localhost/mlflow",
        "sqlite://remote/mlflow.db", "file://remotehost/mlruns", "databricks", "databricks://profile", "databricks-uc",
        "s3://films", "gs://films", "dbfs:/films", "mlflow-artifacts://evil.example/1", "runs:/a/b", "ftp://localhost/x",
    ],
)  # fmt: skip
def test_what_is_not_surely_here_is_elsewhere(uri):
    with pytest.raises(SistaError, match="is not on this machine"):
        privacy.check_destination(uri, "local_only")
    privacy.check_destination(uri, "allow_patient_data")


@pytest.mark.parametrize(
    "uri", ["", "sqlite:////data/mlflow.db", "file:///data/mlruns", "/data/mlruns/1", "mlflow-artifacts:/1"]
)
def test_what_is_here(uri):
    privacy.check_destination(uri, "local_only")


def test_a_proxy_is_another_machine(tracker, monkeypatch):
    privacy.check_destination(tracker.local, "local_only")
    monkeypatch.setenv("HTTP_PROXY", "http://name:secret@proxy.hospital.example:3128")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(SistaError, match="NO_PROXY") as told:
        privacy.check_destination(tracker.local, "local_only")
    assert "secret" not in str(told.value)
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    privacy.check_destination(tracker.local, "local_only")


# --- a tracker that is here, and its artifacts elsewhere -------------------------------


def test_artifacts_elsewhere_are_refused_of_a_tracker_that_is_here(capsys, workdir, tracker, monkeypatch):
    tracker.known, tracker.place = True, "s3://films/1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.local)
    assert "the artifacts of 'sista', s3://films/1 is not on this machine" in refused(capsys, *FIT)
    assert {command for command, *_ in tracker.requests} == {"GET"}  # it was asked, and told nothing
    assert not list(workdir.iterdir())
    with pytest.raises(SistaError, match="of its experiment, s3://films/1 is not on this machine"):
        tracking.register_model({}, None, "", "films", "champion")
    assert {command for command, *_ in tracker.requests} == {"GET"}


@pytest.mark.parametrize("place", ["https://store.example/1", "s3://films/1"])
def test_artifacts_elsewhere_are_refused_of_a_store_that_is_here(place, capsys, workdir):
    uri = os.environ["MLFLOW_TRACKING_URI"]
    tracking.open_store(uri, "mine", place)
    run = MlflowClient(uri).create_run(MlflowClient(uri).get_experiment_by_name("mine").experiment_id).info.run_id
    option = ["--trainer.logger.init_args.experiment_name", "mine"]
    assert f"the artifacts of 'mine', {place} is not on this machine" in refused(capsys, *FIT, *option)
    with pytest.raises(SistaError, match="is not on this machine"):  # a run that goes on
        privacy.check_artifacts(uri, "another", run, "local_only")
    privacy.check_artifacts(uri, "another", "0" * 32, "local_only")  # one that isn't there
    privacy.check_artifacts(uri, "mine", None, "allow_patient_data")


def test_artifacts_of_a_new_experiment_are_looked_at_before_the_first_is_sent(workdir, tracker):
    from types import SimpleNamespace

    from pytorch_lightning.loggers import MLFlowLogger

    tracker.place = "s3://films/1"
    trainer = SimpleNamespace(logger=MLFlowLogger("sista", tracking_uri=tracker.local), is_global_zero=True)
    (workdir / "report.txt").write_text("effusion of Mrs Example")
    with pytest.raises(SistaError, match="the run's artifacts, s3://films/1"):
        tracking.publish(trainer, workdir / "report.txt")
    assert not [body for _, _, body in tracker.requests if b"effusion" in body]


# --- ids --------------------------------------------------------------------------------


def test_ids_are_hashed_with_a_key_that_stays(workdir):
    key = privacy.id_key(workdir / "new" / "id_key")
    assert key == privacy.id_key(workdir / "new" / "id_key")
    assert len(key) == 32
    assert (workdir / "new" / "id_key").stat().st_mode & 0o077 == 0
    name = privacy.hashed_id("10000032", key)
    assert name == hashlib.blake2b(b"10000032", key=key, digest_size=8).hexdigest()
    assert name != privacy.hashed_id("10000032", privacy.id_key(None))
    table = pd.DataFrame({"patient_id": ["7", "8", "7"], "score": [0.1, 0.2, 0.3]})
    table.to_csv(workdir / "predictions.csv", index=False)
    (workdir / "room").mkdir()
    shown = pd.read_csv(privacy.without_ids(workdir / "predictions.csv", workdir / "room", None), dtype=str)
    assert shown["score"].tolist() == ["0.1", "0.2", "0.3"]
    assert shown["patient_id"][0] == shown["patient_id"][2] != shown["patient_id"][1]
    assert not set(shown["patient_id"]) & {"7", "8"}
    assert pd.read_csv(workdir / "predictions.csv", dtype=str)["patient_id"].tolist() == ["7", "8", "7"]


def texts(body):
    """Return all that can be read in what was sent: a Parquet file is compressed."""
    return pd.read_parquet(io.BytesIO(body)).to_csv().encode() if body[:4] == b"PAR1" else body


def test_what_is_allowed_goes_through_without_an_id(workdir, tracker, tiny, phantom_store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.remote)
    monkeypatch.setenv("SISTA_PRIVACY", "allow_patient_data")  # as docker/compose.yaml has it
    short = ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"]
    assert main([*FIT, *tiny, *short]) == 0
    assert main(["test", "--config", "retrieval_mimic.yaml", "--model.weights",
                 "runs/pretrain/0001/checkpoints/best.ckpt", "--model.draws", "20", *_of_data(tiny)]) == 0  # fmt: skip
    sent = {path.partition("/artifacts/")[2].rpartition("/artifacts/")[2]: body
            for command, path, body in tracker.requests if command == "PUT"}  # fmt: skip
    assert set(sent) >= {"config.yaml", "metrics.json", "checkpoints/best.ckpt", "test/predictions.parquet",
                         "pictures/words-epoch-000.png", "test/pictures/nearest.png"}  # fmt: skip
    manifest = pd.read_parquet(phantom_store / "manifest.parquet")
    ids = {value.encode() for name in ("image_id", "patient_id", "study_id") for value in manifest[name].astype(str)}
    assert len(ids) > 100
    for _, path, body in tracker.requests:
        said = texts(body) + path.encode()
        found = [name for name in ids if name in said]
        assert not found, f"{path}: {found[:3]}"
    # the control: the file of the run has them, and the key makes one of the other
    here = pd.read_parquet(next(Path("runs/retrieval_mimic").rglob("predictions.parquet")))
    there = pd.read_parquet(io.BytesIO(sent["test/predictions.parquet"]))
    assert {value.encode() for value in here["image_id"].astype(str)} <= ids
    key = privacy.id_key(Path("runs/.id_key"))
    for name in ("image_id", "patient_id"):
        assert there[name].tolist() == [privacy.hashed_id(value, key) for value in here[name]]
    pd.testing.assert_frame_equal(*(t.drop(columns=["image_id", "patient_id"]) for t in (here, there)))
    assert not any(key in body for *_, body in tracker.requests)
    # a flag is nearer than the environment
    before = len(tracker.requests)
    assert main([*FIT, *tiny, "--privacy", "local_only"]) == 2
    assert len(tracker.requests) == before


def _of_data(options):
    """Return those of a fit that an evaluation takes, too."""
    pairs = zip(options[::2], options[1::2], strict=True)
    kept = [pair for pair in pairs if pair[0].startswith(("--data.", "--trainer.")) and "max_epochs" not in pair[0]]
    return [word for pair in kept for word in pair]


@pytest.mark.slow
def test_a_sweep_sends_nothing_elsewhere(capsys, workdir, tracker, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.remote)
    (workdir / "mine.yaml").write_text(
        "methods: {clip: {config: method/clip.yaml}}\ntasks: {cls_chexpert: {config: cls_chexpert.yaml}}\n"
    )
    assert "is not on this machine" in refused(capsys, "sweep", "--config", "mine.yaml", "--jobs", "1")
    assert not tracker.requests


@pytest.mark.slow
def test_a_model_is_registered_elsewhere_only_where_that_is_allowed(capsys, workdir, tracker, tiny, monkeypatch):
    assert main([*FIT, *tiny]) == 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.remote)
    checkpoint = "runs/pretrain/0001/checkpoints/best.ckpt"
    command = ["export", "--ckpt_path", checkpoint, "--to", "mlflow", "--register", "films"]
    assert "is not on this machine" in refused(capsys, *command, "--out", "served")
    assert not tracker.requests
    # it has no registry: what counts is that it is asked
    assert "can't be registered" in refused(capsys, *command, "--out", "served", *ALLOWED)
    assert [path for _, path, _ in tracker.requests if "logged-models" in path]
