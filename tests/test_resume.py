"""A run killed in mid-epoch and resumed ends in the weights of the uninterrupted one."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy

from sista_pl.callbacks import ModelCheckpoint

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


@pytest.fixture(scope="module")
def whole(tmp_path_factory, phantom_store):
    """The weights of the uninterrupted run, which no number of workers changes."""
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run(command(phantom_store), cwd=folder, env=environment(folder), check=True, capture_output=True)
    return weights(folder)


def stop(argv: list[str], folder: Path, number: signal.Signals, ready, send=os.killpg, **more: str) -> subprocess.Popen:
    """Run a command, send its group the signal once `ready(last.ckpt)`, and return the process, which has ended."""
    with (folder / "log").open("w") as log:
        victim = subprocess.Popen(argv, cwd=folder, env=environment(folder) | more, stdout=log, stderr=log,
                                  start_new_session=True)  # fmt: skip
        last = folder / "runs" / "pretrain" / "0001" / "checkpoints" / "last.ckpt"
        while victim.poll() is None and not ready(last):
            time.sleep(0.01)
        assert victim.poll() is None, "the run ended before it could be stopped"
        send(victim.pid, number)
        victim.wait()
    return victim


def test_a_run_that_was_moved_keeps_its_best(tmp_path):
    before, after = (ModelCheckpoint(str(tmp_path / name), "best", monitor="val/x", mode="max") for name in "ab")
    before.best_model_score = before.kth_value = torch.tensor(0.9)
    before.best_model_path = before.kth_best_model_path = str(tmp_path / "a/best.ckpt")
    before.best_k_models = {before.best_model_path: before.best_model_score}
    assert after.state_key == before.state_key
    after.load_state_dict(before.state_dict())
    trainer = argparse.Namespace(strategy=SingleDeviceStrategy())
    assert not after.check_monitor_top_k(trainer, torch.tensor(0.1))
    assert after.check_monitor_top_k(trainer, torch.tensor(0.95))
    assert after.best_model_path == after.kth_best_model_path == str(tmp_path / "b/best.ckpt")


def assert_equal(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_kill_and_resume_equal_the_uninterrupted_run(tmp_path, phantom_store, whole, workers):
    cut, more = tmp_path, ["--data.num_workers", workers]
    stop(command(phantom_store, *more), cut, signal.SIGKILL, _past_mid_epoch)
    last = cut / "runs" / "pretrain" / "0001" / "checkpoints" / "last.ckpt"
    loops = torch.load(last, weights_only=True)["loops"]["fit_loop"]
    assert loops["epoch_loop.batch_progress"]["current"]["completed"] % 7, "killed in mid-epoch"

    resumed = command(phantom_store, *more, "--ckpt_path", "last")
    subprocess.run(resumed, cwd=cut, env=environment(cut), check=True, capture_output=True)
    assert not (cut / "runs" / "pretrain" / "0002").exists(), "it goes on in its own folder"
    assert_equal(whole, weights(cut))


# what srun gives a job of one task; Lightning takes its ranks from it, and would write a checkpoint of its own
SLURM = {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1",
         "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_ID": "42", "SLURM_JOB_NAME": "sista"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("number", "job"), [(signal.SIGTERM, {}), (signal.SIGUSR1, SLURM)], ids=["TERM", "USR1"])
def test_a_preempted_run_saves_its_last_step_and_the_same_command_goes_on(tmp_path, phantom_store, whole, number, job):
    trainer = ["--trainer", "trainer/slurm.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", "1",
               "--trainer.strategy", "auto", "--trainer.max_epochs", "3"] if job else []  # fmt: skip
    # no checkpoint but an epoch's: what is found in mid-epoch was saved by the signal
    argv = command(phantom_store, *trainer, "--checkpoint_every", "1000", "--ckpt_path", "auto")
    victim = stop(argv, tmp_path, number, Path.is_file, **job)
    assert victim.returncode == 128 + number, (tmp_path / "log").read_text()
    assert f"{number.name}: saved" in (tmp_path / "log").read_text()
    last = tmp_path / "runs" / "pretrain" / "0001" / "checkpoints" / "last.ckpt"
    loops = torch.load(last, weights_only=True)["loops"]["fit_loop"]
    assert loops["epoch_loop.batch_progress"]["current"]["processed"] % 7, "saved in mid-epoch"
    assert not list(tmp_path.glob("hpc_ckpt*"))

    subprocess.run(argv, cwd=tmp_path, env=environment(tmp_path) | job, check=True, capture_output=True)
    assert_equal(whole, weights(tmp_path))
    assert [p.name for p in (tmp_path / "runs" / "pretrain").iterdir()] == ["0001"]


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


@pytest.mark.slow
def test_of_two_processes_one_that_is_told_is_enough(tmp_path, phantom_store):
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]
    argv = command(phantom_store, *two, "--data.batch_size", "4", "--checkpoint_every", "1000", "--ckpt_path", "auto")
    victim = stop(argv, tmp_path, signal.SIGTERM, Path.is_file, send=os.kill)  # rank 0 alone
    assert victim.returncode == 128 + signal.SIGTERM, (tmp_path / "log").read_text()
    last = tmp_path / "runs" / "pretrain" / "0001" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] % 10 == 0, "they agree every tenth step"
    subprocess.run(argv, cwd=tmp_path, env=environment(tmp_path), check=True, capture_output=True)
    assert torch.load(last, weights_only=True)["epoch"] == 2
    assert [p.name for p in (tmp_path / "runs" / "pretrain").iterdir()] == ["0001"]


def _past_mid_epoch(path: Path) -> bool:
    """Whether the last checkpoint is one of the second epoch, not at its end."""
    try:
        state = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError):
        return False
    done = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"]
    return state["epoch"] == 1 and done in (2, 4)
