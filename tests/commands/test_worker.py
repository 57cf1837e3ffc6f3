"""A worker: commands one after the other in a process that imports the libraries once."""

import fcntl
import json
import os
import signal
import time

import pytest

from sista_pl.cli import main
from sista_pl.commands.worker import Worker


def finish(worker, words, log):
    worker.start(words, log, log.with_suffix(".lock"))
    while (code := worker.code(1.0)) is None:
        pass
    return code


@pytest.fixture
def worker():
    worker = Worker(os.environ)
    yield worker
    worker.process.kill()
    worker.end()


def test_each_command_has_its_code_and_its_log_and_a_failure_is_the_last(worker, tmp_path):
    tasks, losses, wrong = (tmp_path / f"{name}.log" for name in ("tasks", "losses", "wrong"))
    tasks.write_text("before\n")
    assert finish(worker, ["list", "tasks"], tasks) == 0
    assert finish(worker, ["list", "losses"], losses) == 0
    assert worker.process.poll() is None
    assert finish(worker, ["lists"], wrong) == 2
    assert worker.process.wait() == 2
    assert tasks.read_text().startswith("before\n")
    assert "segmentation" in tasks.read_text()
    assert "sista_tasks" not in losses.read_text()
    assert "clip" in losses.read_text()
    assert wrong.read_text().startswith("sista: unknown verb")


def test_one_that_was_killed_says_so(worker, tmp_path):
    worker.process.send_signal(signal.SIGKILL)
    assert finish(worker, ["list", "tasks"], tmp_path / "log") == -signal.SIGKILL


def test_a_cell_that_another_is_at_is_left_alone(worker, tmp_path):
    with (tmp_path / "log.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert finish(worker, ["list", "tasks"], tmp_path / "log.txt") == 2
    assert (
        (tmp_path / "log.txt")
        .read_text()
        .endswith("another process is at work on this cell; wait until it has ended\n")
    )


@pytest.mark.slow
def test_one_that_lost_its_parent_stops(workdir, tiny, worker):
    fit = ["fit", "--config", "pretrain.yaml", *tiny, "--name", "orphan", "--trainer.max_epochs", "9999"]
    worker.start(fit, workdir / "log", workdir / "lock")
    last = workdir / "runs/orphan/0001/checkpoints/last.ckpt"
    while not last.is_file() and worker.process.poll() is None:
        time.sleep(0.1)
    worker.process.stdin.close()  # as the end of its parent does
    worker.process.stdin = None
    assert worker.process.wait(timeout=120) == 128 + signal.SIGTERM
    assert "SIGTERM: saved" in (workdir / "log").read_text()


@pytest.mark.slow
def test_a_fit_behind_others_is_the_fit_alone(workdir, tiny, worker):
    fit = ["fit", "--config", "pretrain.yaml", *tiny, "--trainer.limit_train_batches", "2"]
    assert finish(worker, [*fit, "--name", "other", "--seed_everything", "5"], workdir / "log") == 0
    assert finish(worker, [*fit, "--name", "behind"], workdir / "log") == 0
    assert main([*fit, "--name", "alone"]) == 0
    told = [json.loads((workdir / "runs" / name / "0001/metrics.json").read_text()) for name in ("behind", "alone")]
    assert told[0]["history"] == told[1]["history"]
