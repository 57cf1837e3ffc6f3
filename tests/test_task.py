"""What the base of every task logs."""

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import CSVLogger

from sista_pl.errors import SistaError
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
