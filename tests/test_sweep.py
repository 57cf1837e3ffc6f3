"""A sweep's file, its cells and what it remembers of them."""

import fcntl
import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest

from sista_pl import packaged
from sista_pl.book import Book, mixed
from sista_pl.cli import main
from sista_pl.errors import SistaError
from sista_pl.report.swept import Swept, write_plan
from sista_pl.stored import find_runs
from sista_pl.sweep import Cell, read_sweep
from sista_pl.tuning import Tuning

SWEEP = """
pretrain: {config: pretrain.yaml, options: {trainer.max_epochs: 2, data.phantom: {studies: 60, seed: 0}}}
methods:
  random: null
  clip: {config: method/clip.yaml, options: {model.lr: 0.002, data.augment: false}}
tasks:
  chexpert: {config: cls_chexpert.yaml, fractions: [0.01]}
  siim: {config: seg_siim.yaml}
fractions: [0.1, 1.0]
seeds: [0, 7]
reference: clip
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(SWEEP)
    return path


def finish(book: Book, sweep, cell: Cell, value: float = 0.5, code: str = "0a1b2c", weights: bytes = b"") -> None:
    """Put down what the commands of a cell would leave."""
    run = book.runs / cell.name / "0001"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "best.ckpt").write_bytes(weights)
    (run / "test").mkdir()
    figure = {"value": value, "interval95": [value - 0.1, value + 0.1], "n": 9}
    (run / "test" / "metrics.json").write_text(
        json.dumps({"intervals": {"test/auroc_macro": figure}, "versions": {"code": code}})
    )
    if cell.task is not None:
        (run / "test" / "predictions.parquet").touch()
    book.finish(sweep, cell, 1.0)


BENCHMARKS = [name for name in packaged.names() if name.startswith("benchmark/")]
ADDITIONS = {
    "benchmark/transfer.yaml": ["transfer_fcos"],
    "benchmark/phantom.yaml": ["with_peers", "with_controls", "phantom_decoders"],
    "benchmark/reports.yaml": ["with_peers", "with_controls", "reports_decoders", "reports_subsets"],
}
TUNED = "benchmark/with_tuning.yaml"
ADDED = {f"benchmark/{name}.yaml" for names in ADDITIONS.values() for name in names} | {TUNED}


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name not in ADDED])
def test_every_packaged_sweep_can_be_read_with_what_adds_to_it(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SISTA_REPORTS", "reports.csv")
    alone = read_sweep(name)
    sweep = read_sweep(name, *(f"benchmark/{addition}.yaml" for addition in ADDITIONS.get(name, ())))
    for cell in sweep.cells():
        if cell.task is None:
            assert sweep.commands(cell, tmp_path)[0][:3] == ["fit", "--config", sweep.pretrain.config[0]]
    assert sweep.name == alone.name
    assert set(alone.cells()) <= set(sweep.cells())
    without = [cell for cell in alone.cells() if cell.task is None]
    assert [sweep.commands(cell, tmp_path) for cell in without] == [alone.commands(cell, tmp_path) for cell in without]


@pytest.mark.parametrize("name", list(ADDITIONS))
def test_every_method_of_a_benchmark_can_be_tuned(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SISTA_REPORTS", "reports.csv")
    sweep = read_sweep(name, *(f"benchmark/{addition}.yaml" for addition in ADDITIONS[name]), TUNED)
    for method in sweep.methods:
        tried = [cell for cell in sweep.cells() if cell.method == method and cell.setting is not None]
        assert len(tried) == (0 if method == "random" else 2 * 4)  # a pre-training and a task, four rates
        assert {cell.fraction for cell in tried if cell.task is not None} <= {0.01}
        for cell in [cell for cell in tried if cell.task is None]:
            assert [command[0] for command in sweep.commands(cell, tmp_path)] == ["fit"]


@pytest.mark.parametrize("name", list(ADDITIONS))
def test_every_task_of_a_benchmark_takes_the_options_that_it_is_given(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SISTA_REPORTS", "reports.csv")
    monkeypatch.setattr("sista_pl.sweep.runs.find_checkpoint", lambda *of: tmp_path / "best.ckpt")
    sweep = read_sweep(name, *(f"benchmark/{addition}.yaml" for addition in ADDITIONS[name]))
    for task in (None, *sweep.tasks):
        cell = next(cell for cell in sweep.cells() if cell.method != "random" and cell.task == task)
        assert main([*sweep.commands(cell, tmp_path)[0], "--print_config"]) == 0, capsys.readouterr().err


def test_a_further_file_adds_methods_and_says_values_anew(file, tmp_path):
    more = tmp_path / "more.yaml"
    more.write_text("methods: {sia: {config: method/sia.yaml}, clip: {options: {model.lr: 0.001}}}\nseeds: [3]\n")
    sweep, root = read_sweep(str(file), str(more)), tmp_path / "runs"
    assert (sweep.name, sweep.seeds, list(sweep.methods)) == ("mine", [3], ["random", "clip", "sia"])
    assert sweep.methods["clip"].options == {"model.lr": 0.001, "data.augment": False}
    assert "method/sia.yaml" in sweep.commands(Cell("sia", 3), root)[0]
    more.write_text("method: {sia: {config: method/sia.yaml}}\n")
    with pytest.raises(SistaError, match=r"mine.yaml \+ .*more.yaml: unknown key 'method'; did you mean methods"):
        read_sweep(str(file), str(more))
    more.write_text("methods: {sia: {config: method/sia.yaml}}\n")
    with pytest.raises(SistaError, match=r"more\.yaml: no tasks"):
        read_sweep(str(more))


def test_an_evaluation_is_a_test_alone_of_each_pretraining(file, tmp_path):
    ground = "  ground: {config: ground_siim.yaml, fits: false}\n"
    file.write_text(SWEEP.replace("fractions: [0.1", ground + "fractions: [0.1"))
    sweep, root = read_sweep(str(file)), tmp_path / "runs"
    cells = [cell for cell in sweep.cells() if cell.task == "ground"]
    assert [cell.name for cell in cells] == ["clip-0-ground-0", "clip-7-ground-0"]
    (root / "clip-7/0001/checkpoints").mkdir(parents=True)
    (root / "clip-7/0001/checkpoints/best.ckpt").touch()
    (command,) = sweep.commands(cells[1], root)
    assert command[:3] == ["test", "--config", "ground_siim.yaml"]
    assert command[-2:] == ["--model.weights", str(root / "clip-7/0001/checkpoints/best.ckpt")]
    assert not any(word.startswith("--data.label") for word in command)


def test_a_file_may_name_environment_variables(file, monkeypatch):
    phantom = 'data.phantom: {seed: 0, reports: "${oc.env:SISTA_REPORTS}"}'
    file.write_text(SWEEP.replace("data.augment: false", phantom))
    monkeypatch.setenv("SISTA_REPORTS", "some/reports.csv")
    assert read_sweep(str(file)).methods["clip"].options["data.phantom"]["reports"] == "some/reports.csv"
    monkeypatch.delenv("SISTA_REPORTS")
    with pytest.raises(SistaError, match=r"SISTA_REPORTS.*; set it, or write the value there"):
        read_sweep(str(file))


def test_cells_of_a_sweep(file):
    sweep = read_sweep(str(file))
    names = [cell.name for cell in sweep.cells()]
    tasks = ["chexpert-0.01", "siim-0.1", "siim-1"]
    wanted = [
        name for seed in (0, 7) for name in
        [*(f"random-{seed}-{t}" for t in tasks), f"clip-{seed}", *(f"clip-{seed}-{t}" for t in tasks)]
    ]  # fmt: skip
    assert names == wanted  # nothing is pre-trained for `random`
    assert sweep.name == "mine"


def test_shares_of_an_array_job_are_all_cells_once_and_need_no_other(file):
    sweep = read_sweep(str(file))
    shares = [sweep.cells((i, 3)) for i in range(3)]
    assert sorted(c.name for share in shares for c in share) == sorted(c.name for c in sweep.cells())
    for share in shares:
        for cell in share:
            if cell.task is not None and cell.method != "random":
                assert Cell(cell.method, cell.seed) in share[: share.index(cell)]


def test_commands_name_all_configurations_before_any_option(file, tmp_path):
    sweep, book = read_sweep(str(file)), Book(tmp_path / "out")
    fit, test = sweep.commands(Cell("clip", 7), book.runs)
    assert fit[0] == "fit"
    assert test == ["test", *fit[1:]]
    assert fit[1:5] == ["--config", "pretrain.yaml", "--config", "method/clip.yaml"]
    assert fit[5:] == [
        "--trainer.max_epochs", "2", "--data.phantom", '{"studies": 60, "seed": 0}', "--model.lr", "0.002",
        "--data.augment", "false", "--name", "clip-7", "--run_root", str(book.runs), "--seed_everything", "7",
    ]  # fmt: skip


def test_a_task_takes_the_encoder_of_its_method_and_seed(file, tmp_path):
    sweep, book = read_sweep(str(file)), Book(tmp_path / "out")
    task = Cell("clip", 7, "siim", 0.1)
    with pytest.raises(SistaError, match="clip-7: no best checkpoint"):
        sweep.commands(task, book.runs)
    finish(book, sweep, Cell("clip", 7))
    fit, _ = sweep.commands(task, book.runs)
    assert fit[-2:] == ["--model.weights", str(book.runs / "clip-7/0001/checkpoints/best.ckpt")]
    assert "--data.label_fraction 0.1 --data.fraction_seed 7" in " ".join(fit)
    assert "--model.weights" not in sweep.commands(Cell("random", 7, "siim", 0.1), book.runs)[0]


def test_labels_of_a_fraction_may_be_drawn_several_times(file, tmp_path):
    once, book = read_sweep(str(file)), Book(tmp_path / "out")
    file.write_text(SWEEP.replace("siim: {config: seg_siim.yaml}", "siim: {config: seg_siim.yaml, subsets: {0.1: 3}}"))
    sweep = read_sweep(str(file))
    cells = [cell for cell in sweep.cells() if (cell.method, cell.seed, cell.task) == ("random", 7, "siim")]
    assert [cell.name for cell in cells] == [
        f"random-7-siim-{end}" for end in ("0.1", "0.1-1", "0.1-2", "1")
    ]  # what was done before there were subsets stays done
    assert [sweep.commands(cell, book.runs)[0][-1] for cell in cells] == ["7", "10007", "20007", "7"]
    assert set(once.cells()) < set(sweep.cells())
    assert len({sweep.commands(cell, book.runs)[0][-1] for cell in sweep.cells() if cell.method == "random"}) == 6
    for cell in cells[:2]:
        finish(book, sweep, cell)
    assert book.write_table(sweep).read_text().splitlines()[1:] == [
        f"random,siim,0.1,7,{k},runs/{cell.name}/0001/test/predictions.parquet" for k, cell in enumerate(cells[:2])
    ]


def test_a_finished_cell_is_not_made_again_and_not_taken_for_another(file, tmp_path):
    sweep, book, cell = read_sweep(str(file)), Book(tmp_path / "out"), Cell("random", 0, "siim", 1.0)
    assert not book.done(sweep, cell)
    finish(book, sweep, cell)
    assert book.done(sweep, cell)
    file.write_text(SWEEP.replace("seg_siim.yaml", "seg_rsna.yaml"))
    with pytest.raises(SistaError, match=r"random-0-siim-1 in .* another command \(seg_siim.yaml there, seg_rsna.yaml"):
        book.done(read_sweep(str(file)), cell)


def test_a_task_on_an_encoder_that_was_made_again_is_refused(file, tmp_path):
    sweep, book = read_sweep(str(file)), Book(tmp_path / "out")
    cell, task, other = Cell("clip", 0), Cell("clip", 0, "siim", 1.0), Cell("clip", 0, "siim", 0.1)
    for each in (cell, task):
        finish(book, sweep, each)
    book.begin(sweep, other)
    (book.runs / other.name / "0001/checkpoints").mkdir(parents=True)
    (book.runs / other.name / "0001/checkpoints/last.ckpt").touch()
    for weights in (b"", b"other"):
        assert book.done(sweep, task)
        assert book.begin(sweep, other)
        book.mark(cell).unlink()
        shutil.rmtree(book.runs / cell.name)
        finish(book, sweep, cell, weights=weights)
    said = r"{} in .* was made on another encoder than clip-0 has now; .* delete .*/{}/{}.json and .*/{} to make"
    with pytest.raises(SistaError, match=said.format(task.name, "done", task.name, task.name)):
        book.done(sweep, task)
    with pytest.raises(SistaError, match=said.format(other.name, "begun", other.name, other.name)):
        book.begin(sweep, other)


def test_a_cell_whose_configurations_say_something_else_now_is_refused(file, tmp_path):
    mine, data = tmp_path / "method.yaml", tmp_path / "data/part.yaml"
    file.write_text(SWEEP.replace("method/clip.yaml", str(mine)))
    mine.write_text("model: {init_args: {temperature: 0.1}}\ndata: data/part.yaml\n")
    data.parent.mkdir()
    data.write_text("init_args: {size: 64}\n")
    sweep, book, cell = read_sweep(str(file)), Book(tmp_path / "out"), Cell("clip", 0)
    book.begin(sweep, cell)
    data.write_text("init_args: {size: 80}\n")  # what was begun counts, not what is said at the end
    finish(book, sweep, cell)
    said = rf"clip-0 in .* was made when {data} said something else; .*/clip-0, and of its tasks, clip-0-\*, both, to"
    with pytest.raises(SistaError, match=said):
        book.done(sweep, cell)
    data.write_text("# with a comment\ninit_args: {size: 64}\n")
    assert book.done(sweep, cell)
    mine.write_text(mine.read_text().replace("0.1", "0.2"))
    with pytest.raises(SistaError, match=f"when {mine} said something else"):
        book.done(sweep, cell)
    told = json.loads(book.mark(cell).read_text())["configs"]
    assert set(told) == {"pretrain.yaml", "data/phantom_mimic_cxr.yaml", str(mine), str(data)}
    mine.write_text("model: {")
    with pytest.raises(SistaError, match=r"method\.yaml: not YAML"):
        book.done(sweep, cell)


def test_a_configuration_that_an_option_names_is_kept_too(file, tmp_path):
    file.write_text(SWEEP.replace("data.augment: false", "data: data/siim.yaml"))
    sweep, book = read_sweep(str(file)), Book(tmp_path / "out")
    assert "data/siim.yaml" in book.facts(sweep, Cell("clip", 0))["configs"]


def test_a_mark_of_before_configurations_and_encoders_were_kept(file, tmp_path):
    sweep, book = read_sweep(str(file)), Book(tmp_path / "out")
    cell, task = Cell("clip", 0), Cell("clip", 0, "siim", 1.0)
    for each in (cell, task):
        finish(book, sweep, each)
        told = json.loads(book.mark(each).read_text())
        book.mark(each).write_text(json.dumps({"commands": told["commands"], "seconds": 1.0}))
        assert book.done(sweep, each)
    book.mark(cell).unlink()
    shutil.rmtree(book.runs / cell.name)
    finish(book, sweep, cell)
    with pytest.raises(SistaError, match=r"clip-0-siim-1 in .* was made on another encoder than clip-0 has now"):
        book.done(sweep, task)


def test_a_sweep_that_was_moved_goes_on(file, tmp_path):
    sweep, cell, task = read_sweep(str(file)), Cell("clip", 0), Cell("clip", 0, "siim", 1.0)
    book = Book(tmp_path / "out")
    for each in (cell, task):
        finish(book, sweep, each)
    moved = Book((tmp_path / "out").rename(tmp_path / "elsewhere"))
    assert moved.done(sweep, cell)
    assert moved.done(sweep, task)


def test_a_cell_that_was_stopped_does_not_go_on_by_other_commands(file, tmp_path):
    book, cell = Book(tmp_path / "out"), Cell("clip", 0)
    assert not book.begin(read_sweep(str(file)), cell)
    checkpoints = book.runs / "clip-0/0001/checkpoints"
    checkpoints.mkdir(parents=True)
    file.write_text(SWEEP.replace("0.002", "0.5"))  # nothing was trained yet: these are its commands now
    assert not book.begin(read_sweep(str(file)), cell)
    (checkpoints / "last.ckpt").touch()
    assert book.begin(read_sweep(str(file)), cell)
    file.write_text(SWEEP)
    with pytest.raises(SistaError, match=r"clip-0 in .* was made by another command \(0.5 there, 0.002 now\)"):
        book.begin(read_sweep(str(file)), cell)


def test_a_training_that_nothing_says_the_commands_of_does_not_go_on(file, tmp_path):
    sweep, book, cell = read_sweep(str(file)), Book(tmp_path / "out"), Cell("clip", 0)
    checkpoints = book.runs / "clip-0/0001/checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "last.ckpt").touch()
    with pytest.raises(SistaError, match=r"/clip-0 has a training that was stopped, and no .*/begun/clip-0.json says"):
        book.begin(sweep, cell)


def test_a_cell_that_another_process_is_at_is_not_begun(file, tmp_path):
    sweep, book, cell = read_sweep(str(file)), Book(tmp_path / "out"), Cell("clip", 0)
    book.begin(sweep, cell)
    begun = (book.root / "begun/clip-0.json").read_text()
    file.write_text(SWEEP.replace("0.002", "0.5"))
    with book.lock(cell).open("w") as lock:  # as whoever runs its commands has
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SistaError, match=r"another process is at work on clip-0 .*; wait until it has ended"):
            book.begin(read_sweep(str(file)), cell)
    assert (book.root / "begun/clip-0.json").read_text() == begun
    with book.alone(cell):
        with book.alone(Cell("clip", 7)), pytest.raises(SistaError, match="another process is at work on clip-0 "):
            book.alone(cell).__enter__()
        assert not book.begin(sweep, cell)  # its own sweep does


def test_the_time_of_a_cell_is_that_of_all_its_sittings_as_far_as_they_were_kept(file, tmp_path):
    sweep, book, cell = read_sweep(str(file)), Book(tmp_path / "out"), Cell("clip", 0)
    last = book.runs / "clip-0/0001/checkpoints/last.ckpt"
    last.parent.mkdir(parents=True)
    for kept in (100, 20):
        book.begin(sweep, cell)
        last.touch()
        begun = (book.root / "begun" / "clip-0.json").stat().st_mtime
        os.utime(last, (begun + kept, begun + kept))
    book.begin(sweep, cell)
    book.finish(sweep, cell, 3.0)
    assert json.loads(book.mark(cell).read_text())["seconds"] == pytest.approx(123, abs=0.2)


def test_a_cell_whose_run_was_removed_is_made_again(file, tmp_path):
    sweep, book, cell = read_sweep(str(file)), Book(tmp_path / "out"), Cell("random", 0, "siim", 1.0)
    finish(book, sweep, cell)
    shutil.rmtree(book.runs / cell.name)
    assert not book.done(sweep, cell)
    assert book.table(sweep).empty


def test_a_cell_whose_test_was_removed_is_done_nowhere(file, tmp_path):
    sweep, book = read_sweep(str(file)), Book(tmp_path / "out")
    cells = [Cell("clip", 0), Cell("clip", 0, "siim", 1.0)]
    write_plan(book.root, sweep)
    for cell in cells:
        finish(book, sweep, cell)
        shutil.copytree(book.runs / cell.name / "0001", book.runs / cell.name / "0002")
        (book.runs / cell.name / "0002/test/metrics.json").unlink()  # as a test leaves it that was killed
    swept = Swept.open(book.root)
    assert swept.done == cells
    assert [swept.run(cell).name for cell in cells] == ["0001", "0001"]
    assert len(book.table(sweep)) == 2
    (run,), _ = find_runs({"clip": f"{book.runs}/clip-0-siim-1"})
    assert run.file == book.runs / "clip-0-siim-1/0001/test/predictions.parquet"
    for cell in cells:
        shutil.rmtree(book.runs / cell.name / "0001/test")
        assert not book.is_done(cell)
    assert Swept.open(book.root).done == []
    assert book.table(sweep).empty
    with pytest.raises(SistaError, match=r"clip-0-siim-1 has no test/predictions.parquet; .*\(test/metrics.json\)"):
        find_runs({"clip": f"{book.runs}/clip-0-siim-1"})


@pytest.mark.parametrize("root", [".", "o", "/"])
def test_the_folder_of_a_sweep_is_left_out_of_its_marks_and_nothing_else(file, root):
    sweep, cell = read_sweep(str(file)), Cell("random", 0, "siim", 1.0)
    commands, recorded = sweep.commands(cell, Path(root) / "runs"), Book(Path(root)).recorded(sweep, cell)
    assert [word for words in recorded for word in words] == [
        "OUT/runs" if before == "--run_root" else word
        for words in commands for before, word in zip(["", *words], words, strict=False)
    ]  # fmt: skip


def test_the_tables(file, tmp_path):
    sweep, book = read_sweep(str(file)), Book(tmp_path / "out")
    assert book.table(sweep).empty
    finish(book, sweep, Cell("clip", 0), 0.25)
    finish(book, sweep, Cell("clip", 0, "siim", 0.1), 0.75)
    path = book.write_table(sweep)
    assert path.read_text().splitlines() == [
        "method,task,fraction,seed,subset,predictions",
        "clip,siim,0.1,0,0,runs/clip-0-siim-0.1/0001/test/predictions.parquet",
    ]
    told = (book.root / "figures.csv").read_text().splitlines()
    assert told[1].startswith("clip,pretrain,,0,0,auroc_macro,0.25,0.15,0.35,")
    assert told[2].startswith("clip,siim,0.1,0,0,auroc_macro,0.75,0.65,0.85,runs/")
    assert len(told) == 3
    assert all(line.endswith(",0a1b2c") for line in told[1:])


def test_cells_of_code_that_differs_are_told(file, tmp_path):
    sweep, book = read_sweep(str(file)), Book(tmp_path / "out")
    assert mixed(book.table(sweep)) == ""
    finish(book, sweep, Cell("clip", 0))
    finish(book, sweep, Cell("clip", 0, "siim", 0.1))
    assert mixed(book.table(sweep)) == ""
    finish(book, sweep, Cell("clip", 7), code="ffffff")
    assert "(2 by 0a1b2c, 1 by ffffff; figures.csv has which)" in mixed(book.table(sweep))


TUNE = "tune: {options: {model.lr: [0.1, 0.2], data.batch_size: [8, 16]}, task: siim}\nseeds:"


def end(book: Book, cell: Cell, score: float | None, monitor: str = "val/dice_positive") -> None:
    """Put down what the training of a cell that chooses a setting leaves."""
    run = book.runs / cell.name / "0001"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "best.ckpt").touch()
    (run / "metrics.json").write_text(json.dumps({"monitor": monitor, "best": {"score": score}}))


def test_every_method_is_tuned_with_the_same_budget_and_never_on_a_test_set(file, tmp_path):
    file.write_text(SWEEP.replace("seeds:", TUNE).replace("tasks:", "  sia: {config: method/sia.yaml}\ntasks:"))
    sweep, book = read_sweep(str(file)), Book(tmp_path / "out")
    tried = {method: [c for c in sweep.cells() if c.method == method and c.setting is not None]
             for method in sweep.methods}  # fmt: skip
    assert tried["random"] == []
    assert [c.name for c in tried["clip"]] == [
        name for k in range(4) for name in (f"clip-tune{k}", f"clip-tune{k}-siim-0.1")
    ]
    assert len(tried["sia"]) == len(tried["clip"])
    assert {c.seed for c in tried["clip"]} == {0}  # the first
    for cell in tried["clip"][::2]:
        end(book, cell, 0.3)
    for cell in tried["clip"]:
        assert [command[0] for command in sweep.commands(cell, book.runs)] == ["fit"]
    assert sweep.commands(tried["clip"][3], book.runs)[0][-1] == str(
        book.runs / "clip-tune1" / "0001" / "checkpoints" / "best.ckpt"
    )
    assert sweep.needs(Cell("clip", 7)) == tried["clip"]
    assert sweep.needs(tried["clip"][0]) == []
    assert sweep.needs(Cell("clip", 7, "siim", 0.1)) == [Cell("clip", 7)]
    assert sweep.needs(Cell("random", 7, "siim", 0.1)) == []
    for share in ([c for c in sweep.cells((i, 3))] for i in range(3)):  # each task of an array job has all it needs
        assert all(needed in share[: share.index(cell)] for cell in share for needed in sweep.needs(cell))


def test_without_a_task_the_first_that_is_fitted_decides(file):
    file.write_text(
        SWEEP.replace("tasks:", "tasks:\n  words: {config: zeroshot_chexpert.yaml, fits: false}").replace(
            "seeds:", TUNE.replace(", task: siim", "")
        )
    )
    assert read_sweep(str(file)).tune == Tuning({"model.lr": [0.1, 0.2], "data.batch_size": [8, 16]}, "chexpert", 0.01)


def test_the_setting_of_the_highest_validation_figure_is_for_all_seeds(file, tmp_path):
    file.write_text(SWEEP.replace("seeds:", TUNE))
    sweep, book = read_sweep(str(file)), Book(tmp_path / "out")
    tried = [cell for cell in sweep.tuning("clip") if cell.task is not None]
    for cell in tried:
        end(book, cell.encoder, 0.9)
    for cell, score in zip(tried[:3], (0.2, 0.4, 0.4), strict=True):
        end(book, cell, score)
    with pytest.raises(SistaError, match=r"tune: clip-tune3-siim-0\.1 has not ended"):
        sweep.commands(Cell("clip", 7), book.runs)
    end(book, tried[3], 0.1)
    for seed in (0, 7):
        for command in sweep.commands(Cell("clip", seed), book.runs):
            words = " ".join(command)
            assert words.index("--model.lr 0.002") < words.index("--model.lr 0.1 ")  # the later one counts
            assert "--data.batch_size 16" in words
    for cell in sweep.tuning("clip"):
        book.finish(sweep, cell, 1.0)
    book.write_table(sweep)
    table = pd.read_csv(book.root / "tuning.csv")
    assert table["value"].tolist() == [0.2, 0.4, 0.4, 0.1]
    assert table["chosen"].tolist() == [False, True, False, False]
    assert json.loads(table["options"][1]) == {"model.lr": 0.1, "data.batch_size": 16}
    assert "4 pre-trainings, model.lr of [0.1, 0.2]" in sweep.tune.told()


def test_a_report_is_told_the_budget_and_shows_no_cell_that_only_chooses(file, tmp_path):
    file.write_text(SWEEP.replace("seeds:", TUNE))
    sweep = read_sweep(str(file))
    write_plan(tmp_path / "out", sweep)
    swept = Swept.open(tmp_path / "out")
    assert swept.tuning == sweep.tune.told()
    assert [cell.name for cell in swept.wanted] == [c.name for c in sweep.cells() if c.setting is None]
    for cell in swept.tried[:2]:  # what was computed is counted, of these too
        end(swept.book, cell, 0.5)
        swept.book.finish(sweep, cell, 3.0)
    swept = Swept.open(tmp_path / "out")
    assert set(swept.cells) == set(sweep.cells())
    assert [cell.name for cell, done in swept.cells.items() if done] == ["clip-tune0", "clip-tune0-siim-0.1"]
    assert swept.done == []
    assert swept.seconds == 6.0


def test_a_loss_can_not_choose(file, tmp_path):
    file.write_text(SWEEP.replace("seeds:", TUNE))
    sweep, book = read_sweep(str(file)), Book(tmp_path / "out")
    for cell in sweep.tuning("clip"):
        end(book, cell, 0.3, "val/loss")
    with pytest.raises(SistaError, match=r"clip-tune0-siim-0\.1 was chosen by val/loss"):
        sweep.commands(Cell("clip", 0), book.runs)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("methods:", "method:", "unknown key 'method'; did you mean methods"),
        ("method/clip.yaml", "method/clipp.yaml", "did you mean method/clip.yaml"),
        ("clip: {config", "cl/ip: {config", "the name 'cl/ip'"),
        ("options: {model.lr: 0.002, data.augment: false}", "option: {}", "methods: clip: unknown key 'option'"),
        ("options: {model.lr: 0.002, data.augment: false}", "options: 3", "options is 3"),
        ("siim: {config: seg_siim.yaml}", "siim: {}", "siim has no config"),
        ("[0.1, 1.0]", "[10]", r"fractions is \[10\]"),
        ("[0.01]", "[]", r"chexpert: fractions is \[\]"),
        ("[0.1, 1.0]", "[0.1, 1.0, 0.10]", r"fractions is \[0.1, 1.0, 0.1\]; give each once"),
        ("method/clip.yaml", "", "methods: clip: config is None; give a file"),
        ("method/clip.yaml", "[3]", r"methods: clip: config is \[3\]; give a file"),
        ("fractions: [0.01]", "fractions: [0.01], fits: false", "fits is False; give false, without fractions"),
        ("fractions: [0.01]", "fits: 1", "fits is 1"),
        ("siim: {", "siim: {subsets: 10, ", r"siim: subsets is 10; give of a task"),
        ("siim: {", "siim: {subsets: {1.0: 2}, ", r"subsets is \{1.0: 2\}; give of a task"),
        ("siim: {", "siim: {subsets: {0.1: 0}, ", r"subsets is \{0.1: 0\}; give of a task"),
        ("siim: {", "siim: {subsets: {0.1: 3, 0.5: 2}, ", r"siim: subsets is of 0.5, .* its fractions \[0.1, 1.0\]"),
        ("fractions: [0.01]", "fractions: [0.01], subsets: {0.1: 2}", r"subsets is of 0.1, .* its fractions \[0.01\]"),
        ("fractions: [0.01]", "fits: false, subsets: {0.1: 2}", "give of a task that is fitted"),
        ("[0, 7]", "[0, 10000]", "give whole numbers under 10000"),
        ("[0, 7]", "[0, 0]", "give each once"),
        ("[0, 7]", "1", "seeds is 1"),
        ("reference: clip", "reference: clop", "unknown method 'clop'; did you mean clip"),
        ("reference: clip", "reference: [clip]", r"unknown method \['clip'\]"),
        ("reference: clip", "reference: 5", "unknown method 5"),
        ("seeds:", "tune: 3\nseeds:", "tune is 3; write"),
        (
            "seeds:",
            TUNE.replace("task: siim", "task: sim"),
            "tune: task is 'sim'; give one that is fitted",
        ),
        ("seeds:", TUNE.replace("[0.1, 0.2]", "0.1"), "tune: options is .*; give values to try"),
        ("seeds:", TUNE.replace("task:", "fraction: 2, task:"), r"tune: fractions is \[2\]"),
        ("methods:", "methods: [", "not YAML"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(file, before, after, said):
    file.write_text(SWEEP.replace(before, after))
    with pytest.raises(SistaError, match=said) as why:
        read_sweep(str(file))
    assert "\n" not in str(why.value)


def test_a_list_adds_to_no_sweep(file, tmp_path):
    (tmp_path / "more.yaml").write_text("[1]\n")
    with pytest.raises(SistaError, match="no mapping each"):
        read_sweep(str(file), str(tmp_path / "more.yaml"))
