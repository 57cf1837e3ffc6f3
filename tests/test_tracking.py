"""Nothing leaves for another machine unless it is allowed."""

import pytest

from sista_pl import tracking
from sista_pl.cli import main
from sista_pl.errors import SistaError


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
    assert tracking.is_local(uri) is (local and uri != "databricks")


def test_remote_is_refused_unless_allowed():
    with pytest.raises(SistaError, match="allow_patient_data"):
        tracking.check_destination("https://mlflow.example", "local_only")
    tracking.check_destination("https://mlflow.example", "allow_patient_data")


def test_a_run_with_a_remote_tracker_stops_before_anything_is_written(capsys, workdir, tiny, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://10.255.255.1:5000")
    assert main(["fit", "--config", "pretrain.yaml", *tiny]) == 2
    error = capsys.readouterr().err
    assert "is not on this machine" in error
    assert not (workdir / "runs").exists()
