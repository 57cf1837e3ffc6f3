"""`sista compare`: what it prints and writes, and what it refuses in one line."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from sista_pl.cli import main
from sista_pl.commands import compare as command

PATIENTS = [f"p{n // 2}" for n in range(40)]
TRUTH = (np.random.default_rng(0).random(40) < 0.4).astype(float)
FILES = ["compare.csv", "compare.json", "compare.md", "compare.tex"]


def predictions(seed, signal):
    rng = np.random.default_rng(seed)
    scores = np.clip(TRUTH * signal + 0.7 * rng.random(40), 0, 1)
    return pd.DataFrame({"image_id": [f"i{n}" for n in range(40)], "patient_id": PATIENTS, "truth_Edema": TRUTH,
                         "score_Edema": scores})  # fmt: skip


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two seeds of two methods, as `sista test` leaves them, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for method, signal in (("clip", 0.1), ("sista", 0.3)):
        for seed in (0, 1):
            folder = tmp_path / f"runs/{method}-{seed}/0001/test"
            folder.mkdir(parents=True)
            predictions(seed + int(10 * signal), signal).to_parquet(folder / "predictions.parquet")
            (folder / "metrics.json").write_text('{"phantom": false}')
    return tmp_path


def run(capsys, *argv):
    code = main(["compare", *argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


BOTH = ("clip=runs/clip-*", "sista=runs/sista-*", "--draws", "200")


def test_prints_and_writes_the_same_figures(runs, capsys):
    code, out, err = run(capsys, *BOTH)
    assert (code, err) == (0, "")
    assert sorted(path.name for path in (runs / "compare").iterdir()) == FILES
    told = json.loads((runs / "compare/compare.json").read_text())
    first, second = told["rows"]
    assert (told["reference"], told["comparisons"], told["draws"], told["phantom"]) == ("clip", 1, 200, False)
    assert [file["predictions"] for file in told["files"]] == [
        f"runs/{name}-{seed}/0001/test/predictions.parquet" for name in ("clip", "sista") for seed in (0, 1)
    ]
    assert first["p"] is None
    assert first["seeds"] == second["seeds"] == 2
    mean = f"{second['value']:.3f} [{second['low']:.3f}, {second['high']:.3f}]"
    apart = f"{second['difference']:+.3f} [{second['difference_low']:+.3f}, {second['difference_high']:+.3f}]"
    markdown = (runs / "compare/compare.md").read_text()
    for text in (mean, apart, "40 images of 20 patients, 200 draws, seed 0, 1 comparison"):
        assert text in out
        assert text in markdown
    assert "PHANTOM" not in out + markdown
    table = pd.read_csv(runs / "compare/compare.csv")
    assert table["difference"].iloc[1] == pytest.approx(second["difference"])
    assert table["reference"].tolist() == ["clip", "clip"]
    head, rule, *lines = [line for line in markdown.splitlines() if line.startswith("|")][:4]
    assert len({line.count("|") for line in (head, rule, *lines)}) == 1
    latex = (runs / "compare/compare.tex").read_text()
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 2
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in rows[:3]} == {rows[0].count(" & ")}
    assert f"rank of {told['ranks'][0]['method']}" in out


def test_the_same_call_writes_the_same_bytes(runs, capsys):
    assert run(capsys, *BOTH)[0] == run(capsys, *BOTH, "--out", "again/deep")[0] == 0
    for name in FILES:
        assert (runs / "compare" / name).read_bytes() == (runs / "again/deep" / name).read_bytes()
    assert run(capsys, *BOTH, "--out", "other", "--seed", "1")[0] == 0
    assert (runs / "other/compare.csv").read_bytes() != (runs / "compare/compare.csv").read_bytes()


def test_a_phantom_is_never_silent(runs, capsys):
    (runs / "runs/sista-1/0001/test/metrics.json").write_text('{"phantom": "PHANTOM DATA: drawn"}')
    assert "PHANTOM DATA" in run(capsys, *BOTH)[1]
    assert all("PHANTOM DATA" in (runs / "compare" / name).read_text() for name in ("compare.md", "compare.tex"))
    assert json.loads((runs / "compare/compare.json").read_text())["phantom"] is True
    assert pd.read_csv(runs / "compare/compare.csv")["phantom"].all()


def test_a_peer_s_csv_beside_runs(runs, capsys):
    peer = predictions(5, 0.2).drop(columns="patient_id").sample(frac=1, random_state=0)
    peer.to_csv("peer.csv", index=False)
    code, out, _ = run(capsys, *BOTH, "peer=peer.csv", "--reference", "peer", "--metric", "auprc/Edema")
    assert code == 0
    assert "auprc/Edema, 40 images of 20 patients" in out
    assert "difference from peer" in out
    assert "2 comparisons" in out
    assert "p (Holm)" in out
    told = json.loads((runs / "compare/compare.json").read_text())
    assert [row["difference"] is None for row in told["rows"]] == [False, False, True]
    assert told["rows"][0]["p_holm"] >= told["rows"][0]["p"]


def test_cells_of_a_table_and_names_that_markup_would_eat(runs, capsys):
    folder = runs / "sweep"
    folder.mkdir()
    lines = ["method,task,fraction,seed,predictions,metric"]
    for fraction, metric in ((0.1, ""), (1, "ece")):
        for n, method in enumerate(("[red]a_1", "b|x%")):
            for seed in (0, 1):
                name = f"{n}-{fraction}-{seed}.parquet"
                predictions(10 * n + seed, 0.2).to_parquet(folder / name)
                lines.append(f"{method},cls_rsna,{fraction},{seed},{name},{metric}")
    (folder / "cells.csv").write_text("\n".join(lines) + "\n")
    code, out, _ = run(capsys, "--table", "sweep/cells.csv", "--draws", "100", "--out", "sweep")
    assert code == 0
    assert {path.name for path in folder.iterdir()} >= {*FILES, "cells.csv"}
    told = json.loads((folder / "compare.json").read_text())
    settings = [(row["fraction"], row["metric"]) for row in told["rows"]]
    assert settings == [(0.1, "auroc_macro")] * 2 + [(1, "ece")] * 2
    assert told["comparisons"] == 2
    assert told["ranks"][0]["settings"] == 2
    for text in ("fraction", "metric", "[red]a_1", "b|x%", "0.1"):
        assert text in out
    assert r"b\|x%" in (folder / "compare.md").read_text()
    latex = (folder / "compare.tex").read_text()
    assert r"[red]a\_1" in latex
    assert r"b\textbar{}x\%" in latex
    assert "settings: 2" in (folder / "compare.md").read_text()
    assert run(capsys, "--table", "sweep/cells.csv", "--draws", "100", "--metric", "ece", "--out", "sweep")[0] == 0


def test_numbers_of_latex_have_minuses_and_names_hyphens():
    assert command._tex("clip-2 -0.5 [-1.0, +2.0] <0.001 a~b^c\\d{}") == (
        r"clip-2 $-$0.5 [$-$1.0, +2.0] $<$0.001 a\textasciitilde{}b\textasciicircum{}c\textbackslash{}d\{\}"
    )


def test_a_run_that_is_passed_over_is_said(runs, capsys):
    (runs / "runs/clip-1/0002").mkdir()
    assert "note: runs/clip-1: run 0002 has no test, 0001 is taken" in run(capsys, *BOTH)[1]
    assert "- runs/clip-1: run 0002 has no test" in (runs / "compare/compare.md").read_text()


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "give methods as NAME=GLOB, or --table"),
        (["clip=runs/clip-*", "--table", "cells.csv"], "one of the two"),
        (["runs/clip-*", "sista=runs/sista-*"], "'runs/clip-*' is no NAME=GLOB"),
        (["clip=", "sista=runs/sista-*"], "'clip=' is no NAME=GLOB"),
        (["clip=runs/clip-0", "clip=runs/clip-1"], "clip is there twice"),
        (["clip=runs/clip-*"], "clip alone; give a second method"),
        (["clip=runs/clip-*", "sista=runs/sitsa-*"], "sista: nothing matches 'runs/sitsa-*'"),
        ([*BOTH, "--reference", "sist"], "no method 'sist'; did you mean sista?"),
        ([*BOTH, "--metric", "auroc"], "did you mean auroc_macro?"),
        (["clip=runs/clip-*", "sista=runs/sista-*", "--draws", "0"], "0 draws give no interval"),
        (["--table", "cells.csv"], "cells.csv: no such file"),
        ([*BOTH, "--out", "runs/clip-0/0001/test/metrics.json"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(runs, capsys, argv, line):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert line in err
    assert [path.name for path in runs.iterdir()] == ["runs"]


def test_help_teaches_and_brings_no_torch():
    code = (
        "import sys; from sista_pl.cli import main\n"
        "try: main(['compare', '--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False"
    for text in ("NAME=GLOB", "image_id,patient_id,truth_Edema,score_Edema", "method,task,fraction,seed,predictions"):
        assert text in out
