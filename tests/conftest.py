"""Fixtures of all tests: two threads at most, a tiny phantom, and the `sista` command in this process."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sista_pl.allocator import keep_memory

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
keep_memory()
if "PYTEST_XDIST_WORKER" in os.environ:
    # workers share the cores: two threads each would wait for one another, at half the speed
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Skip what would begin after the time that SISTA_TEST_DEADLINE gives, in seconds since 1970."""
    if time.time() > float(os.environ.get("SISTA_TEST_DEADLINE", "inf")):
        pytest.skip("no time left before SISTA_TEST_DEADLINE; `make test-slow` runs it")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real X-rays; tests that use it are marked `real`."""
    default = Path(__file__).parents[2] / "shared" / "data" / "cxr"
    path = Path(os.environ.get("SISTA_REAL_DATA", default))
    if not (path / "studies.csv").is_file():
        pytest.skip(f"no real X-rays in {path}; set SISTA_REAL_DATA")
    return path


@pytest.fixture(scope="session")
def phantom_root(tmp_path_factory) -> Path:
    """A phantom of 80 studies in the layout of MIMIC-CXR-JPG."""
    from sista_pl.data.phantom import write_phantom

    return write_phantom(
        "mimic_cxr",
        tmp_path_factory.mktemp("phantom") / "mimic",
        studies=80,
        seed=3,
        size=96,
        workers=1,
        progress=False,
    )


@pytest.fixture(scope="session")
def phantom_store(phantom_root, tmp_path_factory) -> Path:
    """The prepared store of `phantom_root` at 64 px."""
    from sista_pl.data.formats import READERS
    from sista_pl.data.prepare import prepare

    release = READERS.build({"name": "mimic_cxr", "root": phantom_root})
    path = tmp_path_factory.mktemp("store") / "mimic-64"
    prepare(release, path, size=64, workers=1, progress=False)
    return path


@pytest.fixture(scope="session")
def mlflow_tables(tmp_path_factory) -> Path:
    """An MLflow database without a run: making its tables takes seconds, a copy does not."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def workdir(tmp_path, tmp_path_factory, monkeypatch, mlflow_tables) -> Iterator[Path]:
    """An empty current folder, with an MLflow database without a run elsewhere."""
    monkeypatch.chdir(tmp_path)
    database = shutil.copy(mlflow_tables, tmp_path_factory.mktemp("mlflow"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    before = dict(os.environ)
    yield tmp_path
    if torch.distributed.is_initialized():  # a run with strategy ddp leaves its group and MASTER_PORT behind
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def tiny(phantom_store) -> list[str]:
    """Overrides that make `pretrain.yaml` a matter of seconds on the tiny phantom."""
    return [
        "--data.store", str(phantom_store), "--data.root", "null", "--data.phantom", "null", "--data.format", "null",
        "--data.size", "64", "--data.crop", "64", "--data.batch_size", "8", "--model.image_size", "64",
        "--model.head_hidden", "32", "--model.embed_dim", "16", "--trainer.max_epochs", "1",
        "--trainer.precision", "32-true", "--trainer.enable_progress_bar", "false",
        "--trainer.enable_model_summary", "false", "--trainer.accelerator", "cpu",
        "--model.text_encoder", "{name: small-bert, layers: 1, dim: 32, vocab_size: 500}",
    ]  # fmt: skip
