"""`sista report`: what it writes and prints, what it refuses in one line, and that a sweep ends with it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sista_pl.book import Book
from sista_pl.cli import main
from sista_pl.commands import sweep as sweep_command
from sista_pl.report.swept import write_plan
from sista_pl.sweep import read_sweep

SWEEP = """
methods: {random: null, plain: null}
tasks: {seg: {config: seg_siim.yaml}}
fractions: [0.1]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A small sweep that is done, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(SWEEP)
    root, sweep = Path("sweeps/mine"), read_sweep("mine.yaml")
    for n, cell in enumerate(sweep.cells()):
        test = root / "runs" / cell.name / "0001" / "test"
        test.mkdir(parents=True)
        figure = {"value": 0.5, "interval95": [0.25, 0.75], "n": 30}
        (test / "metrics.json").write_text(json.dumps({"intervals": {"test/dice_positive": figure}}))
        right = np.random.default_rng(n).integers(0, 50, 30)
        pd.DataFrame({"image_id": [f"i{k}" for k in range(30)], "truth_pixels": 50, "predicted_pixels": 60,
                      "intersection_pixels": right}).to_parquet(test / "predictions.parquet")  # fmt: skip
        Book(root).finish(sweep, cell, 1.0)
    write_plan(root, sweep)
    return root


def run(capsys, *argv):
    code = main(["report", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


WAY = ("sweeps/mine", "--draws", "100")


def test_writes_the_page_and_says_where(folder, capsys):
    assert run(capsys, *WAY) == (0, "report: sweeps/mine/report.html\n", "")
    first = (folder / "report.html").read_bytes()
    assert b"2 of 2" in first
    assert b"PHANTOM" not in first
    assert run(capsys, *WAY, "--out", "deep/er/mine.html")[:2] == (0, "report: deep/er/mine.html\n")
    assert Path("deep/er/mine.html").read_bytes() == first
    assert sorted(path.name for path in Path("deep/er").iterdir()) == ["mine.html"]
    assert run(capsys, *WAY, "--no-words")[0] == 0
    assert "left out, as --no-words says" in (folder / "report.html").read_text()
    assert run(capsys, *WAY, "--seed", "1")[0] == 0
    assert (folder / "report.html").read_bytes() != first


def test_notes_are_printed_too(folder, capsys):
    (folder / "done" / "plain-0-seg-0.1.json").unlink()
    out = run(capsys, *WAY)[1].splitlines()
    assert out[0].startswith("note: only random is tested yet")
    assert out[1] == "report: sweeps/mine/report.html"


def test_a_sweep_keeps_its_plan_and_ends_with_the_page(folder, capsys, monkeypatch):
    (folder / "sweep.json").unlink()
    assert main(["sweep", "--config", "mine.yaml"]) == 0  # all is done already
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "report: sweeps/mine/report.html"
    assert "compare: sweeps/mine/compare.md" in out
    told = json.loads((folder / "sweep.json").read_text())
    assert [cell["method"] for cell in told["cells"]] == ["random", "plain"]
    assert run(capsys, "sweeps/mine", "--draws", "100")[0] == 0
    # one that has only begun has a plan, too
    monkeypatch.setattr(sweep_command._Run, "child", lambda *_: 2)
    Path("other.yaml").write_text(SWEEP)
    assert main(["sweep", "--config", "other.yaml", "--jobs", "1"]) == 2
    assert (Path("sweeps/other") / "sweep.json").is_file()
    capsys.readouterr()
    assert run(capsys, "sweeps/other")[0] == 0


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["sweeps/nothing"], "sweeps/nothing: no such folder"),
        (["sweeps"], "sweeps has no sweep.json; run `sista sweep` first"),
        ([*WAY, "--out", "mine.pdf"], "--out is mine.pdf; give a file, as report.html"),
        ([*WAY, "--out", "mine.yaml/report.html"], "cannot be written"),
        ([*WAY, "--draws", "5"], "5 draws give no interval"),
        (["broken"], "sweep.json can't be read"),
        (["cut"], "metrics.json: can't be read"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, argv, line):
    Path("broken").mkdir()
    Path("broken/sweep.json").write_text('{"cells": 3}')
    if argv[0] == "cut":
        folder.rename("cut")
        Path("cut/runs/plain-0-seg-0.1/0001/test/metrics.json").write_text("{")
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert line in err


def test_help_teaches_and_brings_no_torch():
    code = (
        "import sys; from sista_pl.cli import main\n"
        "try: main(['report', '--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False"
    for text in ("SWEEP_DIR", "sista report sweeps/smoke", "--no-words", "share it only"):
        assert text in out
