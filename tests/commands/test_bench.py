"""`sista bench` prints ratios of one run."""

import json

from sista_pl.cli import main


def test_prints_and_writes_ratios(tmp_path, capsys):
    path = tmp_path / "bench.json"
    options = ["--image-size", "32", "--batch-size", "4", "--rounds", "1", "--json", str(path)]
    assert main(["bench", *options]) == 0
    figures = json.loads(path.read_text())["figures"]
    assert figures["encoders"]["ratio_to_encoders"] == 1
    assert {"clip", "sia", "sia + sta within", "sia + sta batch"} < set(figures)
    assert "pairs/s" in capsys.readouterr().out


def test_nonsense_is_refused(capsys):
    assert main(["bench", "--rounds", "0"]) == 2
    assert "at least 1 round" in capsys.readouterr().err
