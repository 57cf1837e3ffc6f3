"""`sista sweep`: what runs, when, and what is left after a stop."""

import json
import shutil
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest

from sista_pl.book import Book
from sista_pl.cli import main
from sista_pl.commands import sweep as command
from sista_pl.runs import new_run
from sista_pl.sweep import Cell, read_sweep

SWEEP = """
methods: {random: null, clip: {config: method/clip.yaml}}
tasks: {siim: {config: seg_siim.yaml}}
fractions: [0.1, 1.0]
seeds: [0, 1]
"""


@pytest.fixture
def file(workdir, monkeypatch) -> Path:
    path = Path("mine.yaml")
    path.write_text(SWEEP)
    monkeypatch.setattr(command, "_show", lambda sweep, book: None)
    return path


def stand_in(ran: list[str], broken: str = "", gate: threading.Barrier | None = None):
    """Return a child process's stand-in: it leaves what the command would, or fails."""

    def child(self, cell, commands, sink, release) -> int:
        if gate is not None:
            gate.wait(timeout=20)
        for words in commands:
            ran.append(f"{words[0]} {cell.name}{' resumed' if '--ckpt_path' in words else ''}")
            if cell.name == broken:
                sink.write(b"starting\nsista: data: no images\n")
                return 2
            if words[0] == "fit" and "--ckpt_path" not in words:
                run = new_run(self.book.runs, cell.name)
                (run / "checkpoints").mkdir()
                for name in ("best", "last"):
                    (run / "checkpoints" / f"{name}.ckpt").write_text(f"{cell.name}, after {len(ran)}")
            elif words[0] == "test":
                test = self.book.runs / cell.name / "0001" / "test"
                test.mkdir()
                (test / "metrics.json").write_text(json.dumps({"intervals": {}}))
        return 0

    return child


def test_pretrainings_come_before_their_tasks_and_nothing_runs_twice(file, monkeypatch, capsys):
    ran: list[str] = []
    monkeypatch.setattr(command._Run, "child", stand_in(ran))
    assert main(["sweep", "--config", str(file), "--jobs", "1"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if " min: " in line]
    assert [line.split(",")[0] for line in told] == [f"{n} of 10" for n in range(1, 11)]
    assert len(ran) == len(set(ran)) == 2 * (2 * 2 * 2 + 2)  # fit and test of eight task cells and two pre-trainings
    for seed in (0, 1):
        assert ran.index(f"test clip-{seed}") < ran.index(f"fit clip-{seed}-siim-0.1")
    ran.clear()
    assert main(["sweep", "--config", str(file), "--jobs", "1"]) == 0
    assert ran == []


def test_a_pretraining_waits_for_what_chooses_its_setting(file, monkeypatch, capsys):
    file.write_text(SWEEP + "tune: {options: {model.lr: [0.1, 0.2]}, task: siim}\n")
    ran: list[str] = []
    plain = stand_in(ran)

    def child(self, cell, commands, sink, release) -> int:
        code = plain(self, cell, commands, sink, release)
        told = {"monitor": "val/dice_positive", "best": {"score": 0.1 if cell.setting == 0 else 0.3}}
        (self.book.runs / cell.name / "0001" / "metrics.json").write_text(json.dumps(told))
        return code

    monkeypatch.setattr(command._Run, "child", child)
    assert main(["sweep", "--config", str(file), "--dry-run"]) == 0
    assert "# clip-1: once the setting of clip is chosen" in capsys.readouterr().out.splitlines()
    assert main(["sweep", "--config", str(file), "--jobs", "2"]) == 0
    tuning = [f"fit clip-tune{k}{task}" for k in range(2) for task in ("", "-siim-0.1")]
    assert max(map(ran.index, tuning)) < min(ran.index(f"fit clip-{seed}") for seed in (0, 1))
    assert not any(line.startswith("test clip-tune") for line in ran)
    done = json.loads(Path("sweeps/mine/done/clip-1.json").read_text())["commands"]
    assert all("--model.lr 0.2" in " ".join(words) for words in done)
    ran.clear()
    assert main(["sweep", "--config", str(file), "--jobs", "2"]) == 0
    assert ran == []


def test_a_failure_stops_the_sweep_and_says_why_and_mended_it_goes_on(file, monkeypatch, capsys):
    ran: list[str] = []
    monkeypatch.setattr(command._Run, "child", stand_in(ran, broken="clip-0"))
    assert main(["sweep", "--config", str(file), "--jobs", "1"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("sista: sweep: clip-0 failed: data: no images; see sweeps/mine/logs/clip-0.log")
    assert ran[-1] == "fit clip-0"
    before = list(ran)
    monkeypatch.setattr(command._Run, "child", stand_in(ran))
    assert main(["sweep", "--config", str(file), "--jobs", "1"]) == 0
    assert not set(ran[len(before) :]) & set(before[:-1])  # what had ended was left alone


def test_keep_going_leaves_out_only_what_needs_the_failed_cell(file, monkeypatch, capsys):
    ran: list[str] = []
    monkeypatch.setattr(command._Run, "child", stand_in(ran, broken="clip-0"))
    assert main(["sweep", "--config", str(file), "--jobs", "1", "--keep-going"]) == 2
    assert "fit clip-1-siim-1" in ran
    assert not any(name.startswith("fit clip-0-") for name in ran)
    assert "clip-0 failed" in capsys.readouterr().err


def test_a_training_that_was_stopped_goes_on_from_its_last_checkpoint(file, monkeypatch):
    Book(Path("sweeps/mine")).begin(read_sweep("mine.yaml"), Cell("clip", 0))
    leave_stopped(Path("sweeps/mine/runs/clip-0/0001/checkpoints"))
    ran: list[str] = []
    monkeypatch.setattr(command._Run, "child", stand_in(ran))
    assert main(["sweep", "--config", str(file), "--jobs", "1", "--cell", "1/4"]) == 0
    assert ran[0] == "fit clip-0 resumed"
    assert "fit clip-0-siim-0.1" in ran


def leave_stopped(checkpoints: Path) -> None:
    checkpoints.mkdir(parents=True)
    (checkpoints / "last.ckpt").touch()
    (checkpoints / "best.ckpt").touch()


def test_a_training_without_a_mark_fails_and_is_not_taken_for_the_cells(file, monkeypatch, capsys):
    leave_stopped(Path("sweeps/mine/runs/clip-0/0001/checkpoints"))
    ran: list[str] = []
    monkeypatch.setattr(command._Run, "child", stand_in(ran))
    assert main(["sweep", "--config", str(file), "--jobs", "1", "--keep-going"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("sista: sweep: clip-0 failed: sweeps/mine/runs/clip-0 has a training that was stopped")
    assert "no sweeps/mine/begun/clip-0.json says" in Path("sweeps/mine/logs/clip-0.log").read_text()
    assert "test clip-1-siim-1" in ran
    assert not any(" clip-0" in line for line in ran)


def test_a_cell_that_another_sweep_is_at_fails(file, monkeypatch, capsys):
    ran: list[str] = []
    monkeypatch.setattr(command._Run, "child", stand_in(ran))
    with Book(Path("sweeps/mine")).alone(Cell("clip", 0)):
        assert main(["sweep", "--config", str(file), "--jobs", "1", "--keep-going"]) == 2
    assert "clip-0 failed: another process is at work on clip-0" in capsys.readouterr().err.splitlines()[-1]
    assert not any(" clip-0" in line for line in ran)


def test_what_has_no_test_any_more_is_tested_again(file, monkeypatch):
    ran: list[str] = []
    monkeypatch.setattr(command._Run, "child", stand_in(ran))
    assert main(["sweep", "--config", str(file), "--jobs", "1"]) == 0
    for name in ("clip-0", "random-1-siim-1"):
        shutil.rmtree(f"sweeps/mine/runs/{name}/0001/test")
    ran.clear()
    assert main(["sweep", "--config", str(file), "--jobs", "1"]) == 0
    assert sorted(ran) == [
        f"{verb} {name}{' resumed' if verb == 'fit' else ''}"
        for verb in ("fit", "test") for name in ("clip-0", "random-1-siim-1")
    ]  # fmt: skip


def test_tasks_of_an_encoder_that_was_made_again_fail(file, monkeypatch, capsys):
    ran: list[str] = []
    monkeypatch.setattr(command._Run, "child", stand_in(ran))
    assert main(["sweep", "--config", str(file), "--jobs", "1"]) == 0
    Path("sweeps/mine/done/clip-0.json").unlink()
    shutil.rmtree("sweeps/mine/runs/clip-0")
    assert main(["sweep", "--config", str(file), "--jobs", "1", "--keep-going"]) == 2
    said = "clip-0-siim-0.1 failed (and 1 more): clip-0-siim-0.1 in sweeps/mine was made on another encoder than clip-0"
    assert said in capsys.readouterr().err
    assert main(["sweep", "--config", str(file), "--jobs", "1"]) == 2
    assert "sista: sweep: clip-0-siim-0.1 in sweeps/mine was made on another encoder" in capsys.readouterr().err
    for name in ("clip-0-siim-0.1", "clip-0-siim-1"):
        Path(f"sweeps/mine/done/{name}.json").unlink()
        shutil.rmtree(f"sweeps/mine/runs/{name}")
    assert main(["sweep", "--config", str(file), "--jobs", "1"]) == 0


def test_a_configuration_that_is_edited_while_a_sweep_runs_is_told(file, monkeypatch, capsys):
    Path("method.yaml").write_text("model: {init_args: {lr: 0.1}}\n")
    file.write_text(SWEEP.replace("method/clip.yaml", "method.yaml"))
    plain = stand_in([])

    def child(self, cell, commands, sink, release) -> int:
        if cell == Cell("clip", 1):
            Path("method.yaml").write_text("model: {init_args: {lr: 0.2}}\n")
        return plain(self, cell, commands, sink, release)

    monkeypatch.setattr(command._Run, "child", child)
    assert main(["sweep", "--config", str(file), "--jobs", "1"]) == 2
    assert "clip-0 in sweeps/mine was made when method.yaml said something else" in capsys.readouterr().err


def test_the_time_of_a_cell_is_without_its_wait_for_the_data_of_another(file, monkeypatch):
    plain = stand_in([])

    def child(self, cell, commands, sink, release) -> int:
        threading.Event().wait(0.5)
        return plain(self, cell, commands, sink, release)

    monkeypatch.setattr(command._Run, "child", child)
    book = Book(Path("sweeps/mine"))
    run = command._Run(read_sweep("mine.yaml"), book, 4, [], keep_going=False)
    cells = [Cell("random", seed, "siim", share) for seed in (0, 1) for share in (0.1, 1.0)]
    assert run.all(cells) == []
    assert all(0.5 <= json.loads(book.mark(cell).read_text())["seconds"] < 1.0 for cell in cells)  # alone, in turn


def test_cells_run_at_once(file, monkeypatch):
    Path("sweeps/mine/prepared").mkdir(parents=True)
    for kind in ("pretrain", "siim"):
        (Path("sweeps/mine/prepared") / kind).touch()
    ran: list[str] = []
    # no child goes on before a second one has started
    monkeypatch.setattr(command._Run, "child", stand_in(ran, gate=threading.Barrier(2)))
    assert main(["sweep", "--config", str(file), "--jobs", "2", "--cell", "0/2"]) == 0
    assert len(ran) == 2 * 4


def test_the_first_of_a_kind_prepares_its_data_alone(file, monkeypatch):
    inside, most = [0], [0]
    usual = stand_in([])

    def child(self, cell, commands, sink, release):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        threading.Event().wait(0.05)
        inside[0] -= 1
        return usual(self, cell, commands, sink, release)

    monkeypatch.setattr(command._Run, "child", child)
    assert main(["sweep", "--config", str(file), "--jobs", "2", "--cell", "0/2"]) == 0
    assert most[0] == 1  # nobody said that the data are there


def test_a_stop_while_data_are_prepared_begins_no_other_cell(file, monkeypatch):
    began: list[str] = []

    def child(self, cell, commands, sink, release):
        began.append(cell.name)
        self.stop.set()  # as Ctrl-C does; the others wait for the data
        return 130

    monkeypatch.setattr(command._Run, "child", child)
    book = Book(Path("sweeps/mine"))
    run = command._Run(read_sweep("mine.yaml"), book, 3, [], keep_going=True)
    cells = [Cell("random", seed, "siim", share) for seed in (0, 1) for share in (0.1, 1.0)]
    assert {why for _, why in run.all(cells)} == {"stopped"}
    assert len(began) == 1


@pytest.mark.parametrize(
    ("allotted", "count", "jobs", "given"),
    [
        (None, 0, 2, [None, None]),
        (None, 2, 3, ["0", "1", "0"]),  # no worker without one: it would take them all
        ("2,3", 2, 2, ["2", "3"]),
        ("GPU-5ebe9a,7", 2, 3, ["GPU-5ebe9a", "7", "GPU-5ebe9a"]),
    ],
)
def test_workers_take_the_gpus_that_are_allotted(file, monkeypatch, allotted, count, jobs, given):
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setattr(command, "Worker", dict)
    if allotted:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allotted)
    else:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    run = command._Run(read_sweep("mine.yaml"), Book(Path("sweeps/mine")), jobs, command._devices(), False)
    found = [run.worker() for _ in range(jobs)]
    assert [device for _, device in found] == given
    assert [environment.get("CUDA_VISIBLE_DEVICES") for environment, _ in found] == given


def test_a_dry_run_prints_the_commands(file, capsys):
    assert main(["sweep", "--config", str(file), "--dry-run", "--cell", "1/4"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("sista fit --config pretrain.yaml --config method/clip.yaml --name clip-0")
    assert said[-1] == "# clip-0-siim-1: once clip-0 has an encoder"
    assert not Path("sweeps").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config", "nothing.yaml"], "config 'nothing.yaml': no such file"),
        (["--config", "mine.yaml", "--cell", "4/4"], "--cell is '4/4'"),
        (["--config", "mine.yaml", "--cell", "²/3"], "--cell is '²/3'"),
        (["--config", "mine.yaml", "--jobs", "0"], "--jobs is 0"),
    ],
)
def test_a_mistake_is_one_line(file, capsys, words, said):
    assert main(["sweep", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_as_a_user_runs_it(workdir, monkeypatch):
    """Two methods, a task, one seed: killed in the middle, run again, compared."""
    import os
    import signal
    import subprocess
    import time

    Path("small.yaml").write_text("""
pretrain:
  config: pretrain.yaml
  options:
    {trainer.max_epochs: 1, data.phantom: {studies: 120, seed: 0}, data.batch_size: 16, model.pool: 8, data.crop: 64}
methods: {random: null, clip: {config: method/clip.yaml}}
tasks:
  cls_chexpert:
    config: cls_chexpert.yaml
    options: {data.phantom: {studies: 300, seed: 1}, model.draws: 50, data.crop: 64}
fractions: [0.5]
""")
    sweep = [sys.executable, "-m", "sista_pl", "sweep", "--config", "small.yaml", "--jobs", "2"]
    child = subprocess.Popen(sweep, start_new_session=True)
    marks = Path("sweeps/small/done")
    while child.poll() is None and not list(marks.glob("*.json")):
        time.sleep(0.1)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    first = {path: path.read_bytes() for path in marks.glob("*.json")}
    subprocess.run(sweep, check=True)
    assert len(list(marks.glob("*.json"))) == 3
    assert all(path.read_bytes() == told for path, told in first.items())
    cells = pd.read_csv("sweeps/small/cells.csv")
    assert cells["method"].tolist() == ["random", "clip"]
    assert all((Path("sweeps/small") / path).is_file() for path in cells["predictions"])
    assert "random" in Path("sweeps/small/compare.md").read_text()
