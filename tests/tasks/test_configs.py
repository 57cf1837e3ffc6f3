"""Every packaged downstream configuration through the real `fit`, `test` and `predict`, on a tiny phantom."""

import json

import pandas as pd
import pytest

from sista_pl import packaged
from sista_pl.cli import main

WHOLE = [name for name in packaged.names() if "/" not in name and name != "pretrain.yaml"]
SMALL = [
    "--data.phantom", "{studies: 400, seed: 5, size: 64, workers: 1}", "--data.size", "64", "--data.crop", "64",
    "--data.batch_size", "8", "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false",
    "--trainer.enable_model_summary", "false", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true",
    "--data.root", "raw", "--data.store", "store", "--data.min_epoch_images", "0",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_fit_test_and_predict(name, workdir, capsys, caplog):
    command = ["--config", name, *SMALL]
    assert main(["fit", *command]) == 0, capsys.readouterr().err
    assert "random initialisation" in caplog.text
    assert main(["test", *command, "--model.draws", "50"]) == 0, capsys.readouterr().err
    run = workdir / "runs" / name.removesuffix(".yaml") / "0001"
    metrics = json.loads((run / "test/metrics.json").read_text())
    assert "PHANTOM" in metrics["phantom"]
    monitor = metrics["monitor"].replace("val/", "test/")
    low, high = metrics["intervals"][monitor]["interval95"]
    assert low <= metrics["intervals"][monitor]["value"] <= high
    assert metrics["intervals"][monitor]["value"] == pytest.approx(metrics["test"][monitor], abs=1e-6)
    table = pd.read_parquet(run / "test/predictions.parquet")
    assert table["image_id"].is_unique
    assert len(table) == metrics["data"]["rows"]["test"]
    assert list((run / "test/pictures").glob("*.png"))
    assert main(["predict", *command]) == 0, capsys.readouterr().err
    assert len(pd.read_csv(run / "predictions.csv")) == len(table)
