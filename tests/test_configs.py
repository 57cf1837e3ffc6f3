"""Every packaged configuration of pre-training through the real `fit` and then `test`, on a tiny phantom."""

import json

import pytest

from sista_pl import packaged
from sista_pl.cli import main

SMALL = [
    "--data.batch_size", "8", "--data.num_workers", "0", "--model.head_hidden", "32", "--model.embed_dim", "16",
    "--model.image_encoder", "resnet10t", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3",
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
    "--trainer.accelerator", "cpu", "--trainer.devices", "1",
    "--model.text_encoder", "{name: small-bert, layers: 1, dim: 32, vocab_size: 500}",
]  # fmt: skip
PHANTOM = ["--data.phantom", "{studies: 80, seed: 3, size: 96, workers: 1}", "--data.size", "64", "--data.crop", "48"]


def of_pretraining(name: str) -> bool:
    if name.startswith("benchmark/"):  # sweeps: tests/test_sweep.py
        return False
    return name == "pretrain.yaml" or ("/" in name and "TransferDataModule" not in packaged.find(name).read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", filter(of_pretraining, packaged.names()))
def test_fit_then_test(name, workdir, phantom_root, capsys):
    group = name.split("/")[0]
    overlay = {"data": ["--data", name], "trainer": ["--trainer", name], "pretrain.yaml": []}.get(
        group, ["--config", name]
    )
    root = workdir / "raw" if "open_i" in name else phantom_root
    small = [*SMALL, *PHANTOM, "--data.root", str(root), "--data.store", "store"]
    if name == "data/table.yaml":
        table(phantom_root, workdir)
        small += ["--data.root", "mine.csv", "--data.phantom", "null"]
    command = ["--config", "pretrain.yaml", *overlay, *small]
    assert main(["fit", *command]) == 0, capsys.readouterr().err
    assert main(["test", *command]) == 0, capsys.readouterr().err
    run = workdir / "runs" / "pretrain" / "0001"
    assert json.loads((run / "metrics.json").read_text())["history"]
    assert "test/i2t_R@10" in json.loads((run / "test/metrics.json").read_text())["test"]


def table(phantom_root, folder) -> None:
    """A hospital's table: paths, texts and patients of the phantom's frontal films, away from what marks a phantom."""
    import shutil

    import pandas as pd

    from sista_pl.data.formats import READERS

    rows = READERS.build({"name": "mimic_cxr", "root": phantom_root}).rows
    (folder / "films").mkdir()
    for row in rows:
        shutil.copy(row.image, folder / "films")
    columns = {
        "image": [f"films/{row.image.name}" for row in rows],
        "report": [f"{row.findings} {row.impression}" for row in rows],
        "patient_id": [row.patient_id for row in rows],
    }  # fmt: skip
    pd.DataFrame(columns).to_csv(folder / "mine.csv", index=False)
