"""What the base of every task logs, and what a test leaves."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import CSVLogger

from sista_pl.callbacks import Results, RunFolder
from sista_pl.errors import SistaError
from sista_pl.measured import MeasuredTask
from sista_pl.predictions import Predicted
from sista_pl.task import BaseTask, Step


class Slope(BaseTask):
    """One weight whose gradient in a step is the batch itself."""

    def __init__(self):
        super().__init__({"slope": "clip"})
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def step(self, batch):
        return Step({"slope": (self.weight * batch).sum()})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*have no `val_dataloader`")
def test_the_gradient_norm_is_that_of_the_step_it_is_logged_at(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics = lambda metrics, step=None: told.update({step: metrics["train/grad_norm"]})
    told: dict[int, float] = {}
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, log_every_n_steps=3, logger=logger, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    norms = torch.arange(1.0, 5.0)
    trainer.fit(Slope(), torch.utils.data.DataLoader(norms))
    assert told == {2: 3, 5: 2}  # steps count on over the epochs, from 0
    assert trainer.callback_metrics["train/grad_norm"] == 4


def test_a_prediction_of_nan_is_refused_wherever_it_stands():
    nan, fine = torch.tensor([0.0, torch.nan]), torch.zeros(2)
    Slope().on_predict_batch_end({"a": fine, "b": [fine, (fine,)], "c": "nan", "d": 3}, None, 0)
    for found in ({"a": nan}, {"b": [fine, nan]}, {"b": [{"c": (nan,)}]}, nan):
        with pytest.raises(SistaError, match="predict: the model predicts NaN"):
            Slope().on_predict_batch_end(found, None, 0)


class Told(MeasuredTask):
    """Its predictions are those of two images."""

    def __init__(self):
        super().__init__({"slope": "clip"})
        self.predicted = Predicted(np.arange(2), np.zeros((2, 1)), np.zeros((0, 0)), np.zeros(0, int))
        manifest = pd.DataFrame({"image_id": ["a", "b"], "patient_id": ["p", "q"]})
        self._trainer = SimpleNamespace(
            datamodule=SimpleNamespace(store=SimpleNamespace(manifest=manifest)), is_global_zero=True, logger=None
        )

    @property
    def trainer(self):
        return self._trainer

    def table(self, found):
        return {"score_a": found.values[:, 0].tolist()}

    def family(self, found, stage):
        return None


def test_predictions_are_whole_or_those_of_before(tmp_path, monkeypatch):
    (tmp_path / "predictions.parquet").write_text("of before")

    def killed(table, path, **_):
        path.write_text("hal")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_parquet", killed)
        with pytest.raises(KeyboardInterrupt):
            Told().write_test(tmp_path, "")
    assert (tmp_path / "predictions.parquet").read_text() == "of before"
    assert Told().write_test(tmp_path, "") == [tmp_path / "predictions.parquet"]
    assert pd.read_parquet(tmp_path / "predictions.parquet")["image_id"].tolist() == ["a", "b"]


@pytest.mark.parametrize("killed", [False, True])
def test_the_figures_of_a_test_come_last_and_stand_beside_no_others(tmp_path, monkeypatch, killed):
    folder = RunFolder(tmp_path, "mine", "")
    folder.path = tmp_path
    trainer = SimpleNamespace(
        is_global_zero=True, callback_metrics={"test/auroc": 0.5}, datamodule=None, logger=None, world_size=1,
        precision="32-true",
    )  # fmt: skip
    task = SimpleNamespace(report=lambda stage: {}, monitor="val/auroc")
    figures = tmp_path / "test" / "metrics.json"
    figures.parent.mkdir()
    figures.write_text("of before")

    def write_test(place, notice):
        assert not figures.exists()
        if killed:
            raise KeyboardInterrupt
        return []

    task.write_test = write_test
    with pytest.raises(KeyboardInterrupt) if killed else nullcontext():
        Results(folder).on_test_end(trainer, task)
    assert figures.exists() != killed
    assert killed or json.loads(figures.read_text())["test"] == {"test/auroc": 0.5}
