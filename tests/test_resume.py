"""A run killed in mid-epoch and resumed ends in the weights of the uninterrupted one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

COMMON = [
    "fit", "--config", "pretrain.yaml", "--data.root", "null", "--data.phantom", "null", "--data.format", "null",
    "--data.size", "64", "--data.crop", "56", "--data.batch_size", "8", "--data.contrast", "0.2",
    "--model.head_hidden", "32", "--model.embed_dim", "16", "--trainer.max_epochs", "3",
    "--trainer.precision", "32-true",
    "--trainer.enable_progress_bar", "false", "--checkpoint_every", "2", "--trainer.deterministic", "true",
    "--model.text_encoder", "{name: small-bert, layers: 1, dim: 32, vocab_size: 500}",
]  # fmt: skip


def command(store: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "sista_pl", *COMMON, "--data.store", str(store), *more]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "OMP_NUM_THREADS": "1"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "runs" / "pretrain" / "0001" / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_kill_and_resume_equal_the_uninterrupted_run(tmp_path, phantom_store, workers):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    more = ["--data.num_workers", workers]
    subprocess.run(command(phantom_store, *more), cwd=whole, env=environment(whole), check=True, capture_output=True)

    victim = subprocess.Popen(
        command(phantom_store, *more), cwd=cut, env=environment(cut), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    last = cut / "runs" / "pretrain" / "0001" / "checkpoints" / "last.ckpt"
    while victim.poll() is None and not _past_mid_epoch(last):
        time.sleep(0.01)
    assert victim.poll() is None, "the run ended before it could be killed"
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    loops = torch.load(last, weights_only=True)["loops"]["fit_loop"]
    assert loops["epoch_loop.batch_progress"]["current"]["completed"] % 7, "killed in mid-epoch"

    resumed = command(phantom_store, *more, "--ckpt_path", "last")
    subprocess.run(resumed, cwd=cut, env=environment(cut), check=True, capture_output=True)
    assert not (cut / "runs" / "pretrain" / "0002").exists(), "it goes on in its own folder"
    expected, got = weights(whole), weights(cut)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


@pytest.mark.slow
def test_two_devices_share_one_run(tmp_path, phantom_store):
    more = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu",
            "--trainer.max_epochs", "1"]  # fmt: skip
    done = subprocess.run(
        command(phantom_store, *more), cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (tmp_path / "runs" / "pretrain").iterdir()] == ["0001"]
    state = torch.load(tmp_path / "runs" / "pretrain" / "0001" / "checkpoints" / "last.ckpt", weights_only=True)
    assert len(state["callbacks"]["ExactResume"]["states"]) == 2


def _past_mid_epoch(path: Path) -> bool:
    """Whether the last checkpoint is one of the second epoch, not at its end."""
    try:
        state = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError):
        return False
    done = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"]
    return state["epoch"] == 1 and done in (2, 4)
