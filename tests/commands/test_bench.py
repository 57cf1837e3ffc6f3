"""`sista bench` prints ratios of one run."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom

from sista_pl.cli import main
from sista_pl.commands.bench import median_interval
from sista_pl.commands.bench_step import StepBench, looped, padded
from sista_pl.pair import Pair


def test_prints_and_writes_ratios(tmp_path, capsys):
    path, picture = tmp_path / "bench.json", tmp_path / "step.png"
    options = ["--image-size", "32", "--batch-size", "4", "--rounds", "1", "--json", str(path)]
    assert main(["bench", "step", *options, "--old-habits", "--picture", str(picture)]) == 0
    told = json.loads(path.read_text())
    figures = told["figures"]
    assert list(figures) == ["encoders", "clip", "sia", "sia + sta within", "sia + sta batch", "old habits",
                             "old habits, 299 px"]  # fmt: skip
    assert figures["encoders"]["ratio"] == {"median": 1, "range": [1, 1], "interval95": None}
    for name, found in figures.items():
        assert found["peak_bytes"] > 4 * 4 * 32**2
        assert found["ratio_to"] == ("sia + sta within" if "old" in name else "encoders")
        assert "old" in name or found["mfu"] > 0
    assert figures["old habits, 299 px"]["peak_bytes"] > 3 * figures["old habits"]["peak_bytes"]
    assert told["product_flops"] > 0
    out = capsys.readouterr().out
    assert "resnet10t at 32 px, BERT of 2 layers of 128, B = 4" in out
    assert len([line for line in out.splitlines() if "pairs/s" in line]) == 7
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
def test_steps_on_an_accelerator(capsys):
    assert main(["bench", "step", "--image-size", "32", "--batch-size", "4", "--rounds", "1", "--old-habits"]) == 0
    out = capsys.readouterr().out
    assert "on cuda" in out
    assert len([line for line in out.splitlines() if "pairs/s" in line]) == 7


def test_old_habits_compute_the_same():
    """Of a transformer, which has no statistics of the batch: the values of the losses, whatever the habits."""
    bench = StepBench("vit_tiny_patch16_224", 32, 3, precision="32-true")
    bench.task.eval()
    pair = Pair(bench.task.encode_image(bench.image), bench.task.encode_text(bench.tokens), bench.task.scale())
    longer = padded(bench.tokens, 112)
    assert {tuple(value.shape) for value in longer.values()} == {(3, 112)}
    again = replace(pair, text=bench.task.encode_text(longer))
    loss = bench.task.losses["within"]
    value = loss(pair)[0]
    assert torch.allclose(looped(loss, again), value, atol=1e-5)
    assert abs(value - looped(loss, replace(pair, text=pair.text.shifted()))) > 1e-4
    assert set(bench.old_habits()) == {"old habits"}, "its images have one size"
    assert any(module.fused_attn for module in bench.task.image_encoder.modules() if hasattr(module, "fused_attn"))


@pytest.mark.parametrize("n", [5, 6, 15, 16, 40])
def test_interval_of_a_median(n):
    """The narrowest pair of order statistics, alike from both ends, that covers 95 % by the binomial law."""
    values = [float(v) for v in np.random.default_rng(n).permutation(n)]
    places = [k for k in range(1, n // 2 + 1) if binom.cdf(n - k, n, 0.5) - binom.cdf(k - 1, n, 0.5) >= 0.95]
    expected = [max(places) - 1, n - max(places)] if places else None
    assert median_interval(values) == expected


def test_nonsense_is_refused(capsys):
    assert main(["bench", "step", "--rounds", "0"]) == 2
    assert "at least 1 round" in capsys.readouterr().err
    assert main(["bench", "loss", "--pairs", "1"]) == 2
    assert "at least 2 pairs" in capsys.readouterr().err
    assert main(["bench", "data", "--size", "64", "--crop", "65"]) == 2
    assert "a crop of at most the size" in capsys.readouterr().err
    assert main(["bench", "growth", "--batch-sizes", "8"]) == 2
    assert "two batch sizes" in capsys.readouterr().err


def test_losses_in_blocks_and_whole_agree_and_their_memory_is_told(tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert main(["bench", "loss", "--pairs", "1536", "--dim", "16", "--rounds", "1", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())["figures"]
    assert set(figures) == {"clip", "sia soft", "sia mask", "siglip"}
    for found in figures.values():
        assert found["largest_difference"] < 1e-4
        # the logits, their softmax or the like, and a gradient at the least
        assert found["peak_bytes"]["whole"] > 3 * 4 * 1536**2
        assert 4 * 512**2 < found["peak_bytes"]["blocks"] < found["peak_bytes"]["whole"] / 2
    assert capsys.readouterr().out.startswith("B = 1536, D = 16")


def test_data_ratios(tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert main(["bench", "data", "--images", "2", "--rounds", "1", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert figures["ratios"]["store loader"]["median"] > 1
    assert 0 <= figures["mean_difference"] < 1
    assert "as fast as decoding in each epoch" in capsys.readouterr().out


@pytest.mark.slow
def test_probe_counts_the_passes_of_both_sides(tmp_path, capsys):
    path = tmp_path / "bench.json"
    options = ["--images", "200", "--image-size", "32", "--epochs", "2", "--json", str(path)]
    assert main(["bench", "probe", *options]) == 0
    figures = json.loads(path.read_text())
    # each training and validation image once, against each in each epoch of each of the nine fits
    assert figures["cached"]["passes"] < 200
    train, val = 0.8 * 200, 0.1 * 200
    expected = 2 * 3 * (1.11 * train + 3 * val)
    assert figures["uncached"]["passes"] == pytest.approx(expected, rel=0.25)
    assert figures["ratios"]["passes"] == figures["uncached"]["passes"] / figures["cached"]["passes"] > 3
    assert figures["largest_difference"] < 1e-5
    assert "times fewer passes" in capsys.readouterr().out
    assert main(["bench", "probe", "--images", "50"]) == 2


def test_startup_prints_ratios_and_names_what_is_over_its_bound(tmp_path, capsys, monkeypatch):
    from sista_pl.commands import bench_startup

    path = tmp_path / "bench.json"
    monkeypatch.setattr(bench_startup, "BOUNDS", {"--version": 1e-9, "--help": 1e9})
    monkeypatch.setattr(bench_startup, "IMPORT", "import of json")
    monkeypatch.setattr(bench_startup, "IMPORTED", "json")
    assert main(["bench", "startup", "--rounds", "1", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())["figures"]
    assert set(figures) == {"--version", "--help"}
    assert figures["--help"]["cpu_ratio"]["median"] > 0
    out = capsys.readouterr().out
    assert "over its bound: sista --version" in out
    assert "over its bound: sista --help" not in out


def test_a_command_that_fails_is_no_time(capsys, monkeypatch):
    from sista_pl.commands import bench_startup

    monkeypatch.setattr(bench_startup, "BOUNDS", {"lst": 1.0})
    monkeypatch.setattr(bench_startup, "IMPORTED", "json")
    assert main(["bench", "startup", "--rounds", "1"]) == 2
    assert "did you mean list" in capsys.readouterr().err


def test_opening_a_store_is_measured_at_each_size(tmp_path):
    from sista_pl.commands import bench_growth
    from sista_pl.data.store import Store

    store = Store.open(bench_growth.hollow_store(tmp_path / "hollow", 5000))
    assert len(store) == 5000 == len(store.manifest)
    assert store.image(4999).max() == 0
    assert sum(file.stat().st_blocks * 512 for file in (tmp_path / "hollow").iterdir()) < 2**20, "holes take no room"
    found = bench_growth.opening([10], rounds=1)
    assert found[10].keys() == {"open", "read", "bytes", "manifest", "manifest_bytes"}


@pytest.mark.slow
def test_growth_tells_of_step_store_and_memory(tmp_path, capsys):
    path, picture = tmp_path / "bench.json", tmp_path / "growth.png"
    options = [
        "--image-size",
        "32",
        "--batch-sizes",
        "2",
        "4",
        "--rows",
        "10",
        "5000",
        "--rounds",
        "1",
        "--epochs",
        "3",
    ]
    assert main(["bench", "growth", *options, "--json", str(path), "--picture", str(picture)]) == 0
    figures = json.loads(path.read_text())
    assert set(figures["step"]["seconds"]) == {"2", "4"}
    assert len(figures["memory"]["bytes"]) == 3
    assert figures["memory"]["ratio"] < 1.5
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "memory after epoch 3" in capsys.readouterr().out
