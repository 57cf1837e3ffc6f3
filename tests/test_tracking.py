"""Nothing leaves for another machine unless it is allowed."""

import argparse
import os
import subprocess
import sys

import pytest

from sista_pl import privacy, tracking
from sista_pl.cli import main
from sista_pl.errors import SistaError
from sista_pl.lightning_cli import _without_passwords


@pytest.mark.parametrize(
    ("uri", "local"),
    [
        ("sqlite:///mlflow.db", True),
        ("file:///data/mlruns", True),
        ("mlruns", True),
        ("http://127.0.0.1:5000", True),
        ("http://localhost:5000", True),
        ("http://[::1]:5000", True),
        ("https://mlflow.hospital.example", False),
        ("http://10.0.0.3:5000", False),
        ("file://server/share", False),
        ("databricks", True),
        ("postgresql://user@db/mlflow", False),
        ("http://127.0.0.1.example.org", False),
    ],
)
def test_what_is_local(uri, local):
    assert privacy.is_local(uri) is (local and uri != "databricks")


def test_remote_is_refused_unless_allowed():
    with pytest.raises(SistaError, match="allow_patient_data"):
        privacy.check_destination("https://mlflow.example", "local_only")
    privacy.check_destination("https://mlflow.example", "allow_patient_data")


def test_a_run_with_a_remote_tracker_stops_before_anything_is_written(capsys, workdir, tiny, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://10.255.255.1:5000")
    assert main(["fit", "--config", "pretrain.yaml", *tiny]) == 2
    error = capsys.readouterr().err
    assert "is not on this machine" in error
    assert not (workdir / "runs").exists()


@pytest.mark.slow
def test_runs_that_start_together_make_one_store(workdir):
    code = "from sista_pl.tracking import open_store; open_store('sqlite:///new/mlflow.db', 'mine')"
    started = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    told = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], told
    from mlflow.tracking import MlflowClient

    names = [found.name for found in MlflowClient("sqlite:///new/mlflow.db").search_experiments()]
    assert names.count("mine") == 1


def test_a_store_that_cannot_be_written_is_one_line(workdir):
    (workdir / "file").write_text("")
    with pytest.raises(SistaError, match=r"can't be used .*; set MLFLOW_TRACKING_URI"):
        tracking.open_store("sqlite:///file/mlflow.db", "mine")
    tracking.open_store("http://127.0.0.1:5000", "mine")  # a server makes its own


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("./mlruns", "./mlruns can't be used"),
        ("sqlite:///text.db", "file is not a database"),
        ("http://me:geheim@127.0.0.1:9", "http://127.0.0.1:9 can't be used"),
        ("nosuch://me:geheim@127.0.0.1:9/x", "nosuch://127.0.0.1:9/x can't be used"),
        ("postgresql+nosuch://me:geheim@127.0.0.1:9/x", "//127.0.0.1:9/x can't be used"),
    ],
)
@pytest.mark.parametrize("allowed", privacy.PRIVACY)
def test_a_tracker_that_cannot_be_used_is_one_line_and_soon(workdir, uri, said, allowed):
    (workdir / "text.db").write_text("this is no database at all, it is a text\n" * 9)
    with pytest.raises(SistaError) as why:  # noqa: PT012  either of them may be the one that says it
        tracking.open_store(uri, "mine")
        privacy.check_artifacts(uri, "mine", None, allowed)
    assert said in str(why.value)
    assert "geheim" not in str(why.value)
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_a_run_whose_mlflow_run_is_elsewhere_is_tested_in_a_new_one(caplog, workdir, tiny, monkeypatch):
    assert main(["fit", "--config", "pretrain.yaml", *tiny]) == 0
    first = (workdir / "runs/pretrain/0001/mlflow_run_id").read_text()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    assert main(["test", "--config", "pretrain.yaml", *tiny]) == 0
    assert f"MLflow run {first} is not in this tracker" in caplog.text


def test_a_password_stays_out_of_the_configuration():
    uri, plain = "http://me:geheim@tracker:5000", "http://tracker:5000"
    for given, kept in ((uri, "${oc.env:MLFLOW_TRACKING_URI}"), (plain, plain)):
        logger = argparse.Namespace(class_path="MLFlowLogger", init_args={"tracking_uri": given})
        config = argparse.Namespace(trainer=argparse.Namespace(logger=[logger]))
        assert _without_passwords(f"a: 1\ntracking_uri: {given}\n", config) == f"a: 1\ntracking_uri: {kept}\n"
