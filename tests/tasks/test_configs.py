"""Every packaged downstream configuration through the real `fit`, `test` and `predict`, on a tiny phantom."""

import json

import pandas as pd
import pytest

from sista_pl import packaged
from sista_pl.cli import main

# evaluations train nothing: their configuration and the store that the other tests have drawn
EVALUATIONS = {
    "zeroshot_chexpert.yaml": "phantom_store", "retrieval_mimic.yaml": "phantom_store",
    "ground_rsna.yaml": "rsna_store", "ground_siim.yaml": "siim_store", "ground_object_cxr.yaml": "object_store",
    "ground_chestxray14.yaml": "boxed_store", "ground_ms_cxr.yaml": "phrase_store",
}  # fmt: skip
WHOLE = [name for name in packaged.names() if "/" not in name and name not in ("pretrain.yaml", *EVALUATIONS)]
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
    size = check_tested(run)
    assert main(["predict", *command]) == 0, capsys.readouterr().err
    assert len(pd.read_csv(run / "predictions.csv")) == size


@pytest.mark.slow
@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation(name, workdir, capsys, request, evaluation, pretrained):
    store = request.getfixturevalue(EVALUATIONS[name])
    command = evaluation(name.removesuffix(".yaml"), store, pretrained)
    at, tracked = command.index("--trainer.logger"), name == "zeroshot_chexpert.yaml"
    assert main(["test", *command[:at], *command[at + 2 if tracked else at :]]) == 0, capsys.readouterr().err
    runs = workdir / "runs" / name.removesuffix(".yaml")
    size = check_tested(runs / "0001")
    assert (runs / "0001/config.yaml").is_file()
    assert (runs / "0001/mlflow_run_id").is_file() == tracked, "the test is the run that is tracked"
    assert main(["predict", *command]) == 0, capsys.readouterr().err
    assert len(pd.read_csv(runs / "0002/predictions.csv")) == size
    capsys.readouterr()
    assert main(["list", "runs"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "/0001" in line or "/0002" in line]
    assert "PHANTOM DATA" in told[0]
    assert told[1].endswith("not finished"), "a prediction has no figures, and there is nothing to resume"


def check_tested(run) -> int:
    """Check what a test has left, and return how many images it had."""
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
    return len(table)
