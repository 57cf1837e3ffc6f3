"""The conformance kit: our own tasks pass it, and a task that is broken in one place is told so."""

import enum
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sista_tasks.classification import ClassificationTask
from torch import nn

from sista_pl import packaged
from sista_pl.task import Step
from sista_pl.testing import CHECKS, check_step, check_task

SMALL = {"studies": 120, "size": 32}


class Whole(ClassificationTask):
    """A task that keeps every promise; each of the others breaks one."""


class UnfrozenNorm(ClassificationTask):
    def train(self, mode=True):
        return nn.Module.train(self, mode)


class ThawedEncoder(ClassificationTask):
    def encode(self, image):
        return self.image_encoder(image)

    def configure_models(self):
        super().configure_models()
        self.image_encoder.requires_grad_(True)


class SpareParameter(ClassificationTask):
    def configure_head(self):
        super().configure_head()
        self.spare = nn.Linear(3, 3)


class NoHead(ClassificationTask):
    def configure_head(self):
        super().configure_head()
        self.head.requires_grad_(False)


class Changed(ClassificationTask):
    """Its step is that of the base, but for what `change` does to it."""

    def change(self, step):
        return step

    def step(self, batch):
        return self.change(super().step(batch))


class NaNLoss(Changed):
    def change(self, step):
        return Step({"labels": step.losses["labels"] * math.nan}, {}, step.outputs, step.size)


class NaNTraining(Changed):
    def change(self, step):
        return NaNLoss.change(self, step) if self.training else step


class Uphill(Changed):
    def change(self, step):
        loss = step.losses["labels"]
        return Step({"labels": 2 * loss.detach() - loss}, {}, step.outputs, step.size)


class Detached(Changed):
    def change(self, step):
        return Step({"labels": step.losses["labels"].detach()}, {}, step.outputs, step.size)


class ManyLosses(Changed):
    def change(self, step):
        return Step({"labels": step.losses["labels"].expand(4)}, {}, step.outputs, step.size)


class OtherLoss(Changed):
    def change(self, step):
        return Step({"mask": step.losses["labels"]}, {}, step.outputs, step.size)


class NoSize(Changed):
    def change(self, step):
        return Step(step.losses, {}, step.outputs)


class NoStep(Changed):
    def change(self, step):
        return step.losses["labels"]


class Kind(enum.Enum):
    LINEAR = 1


class Objects(ClassificationTask):
    def build(self):
        super().build()
        self.hparams.shape = {"of": [Kind.LINEAR]}


class ObjectInCheckpoint(ClassificationTask):
    def on_save_checkpoint(self, checkpoint):
        super().on_save_checkpoint(checkpoint)
        checkpoint["shape"] = Kind.LINEAR


class NotSaved(ClassificationTask):
    def build(self):
        super().build()
        del self.hparams["num_classes"]


class Unseeded(ClassificationTask):
    def configure_head(self):
        super().configure_head()
        drawn = np.random.default_rng().normal(size=tuple(self.head.weight.shape))
        self.head.weight.data = torch.from_numpy(drawn).float()


class OddKey(ClassificationTask):
    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        self.log("auroc", 0.5)


class NoInterval(ClassificationTask):
    def report(self, stage):
        return {}


class FarInterval(ClassificationTask):
    def report(self, stage):
        return {name: figure | {"interval95": (2.0, 3.0)} for name, figure in super().report(stage).items()}


class OtherFigure(ClassificationTask):
    def report(self, stage):
        return {name: {"value": 0.123, "interval95": (0.1, 0.2)} for name in super().report(stage)}


class TwiceWritten(ClassificationTask):
    def write_test(self, folder, notice):
        path, *rest = super().write_test(folder, notice)
        table = pd.read_parquet(path)
        pd.concat([table, table.head(1)]).to_parquet(path)
        return [path, *rest]


class NothingWritten(ClassificationTask):
    def write_test(self, folder, notice):
        return []


class LosesRows(ClassificationTask):
    def prediction_table(self, batch):
        return super().prediction_table(batch).iloc[1:]


class SwallowsNaN(ClassificationTask):
    def _scores(self, logits):
        return super()._scores(logits).nan_to_num(0.5)


class PredictsNaN(ClassificationTask):
    def predict_step(self, batch, index):
        return super().predict_step({**batch, "image": batch["image"].nan_to_num()}, index)


class TakesAnyData(ClassificationTask):
    def setup(self, stage):
        pass


class Crashes(ClassificationTask):
    def setup(self, stage):
        raise KeyError("labels of the store")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Where the phantom is drawn once."""
    return tmp_path_factory.mktemp("kit")


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Return the configuration of a task of this file; every one has the same name, and so the same phantom."""
    monkeypatch.chdir(tmp_path)

    def write(task: type, **arguments: str) -> str:
        told = {"num_classes": "1", "kind": "binary", "image_encoder": "resnet10t", "frozen": "true", "cache": "false",
                "protocol": "mgca", "image_size": "${data.init_args.crop}", "lr": "1.0e-3", **arguments}  # fmt: skip
        rows = "".join(f"    {key}: {value}\n" for key, value in told.items())
        data = packaged.find("data/phantom_rsna.yaml").read_text().replace("\n", "\n  ")
        Path("kit.yaml").write_text(f"model:\n  class_path: {task.__name__}\n  init_args:\n{rows}data:\n  {data}\n")
        return "kit.yaml"

    return write


def but(*checks: str) -> dict:
    """Skip all but these checks."""
    return {**SMALL, "skip": set(CHECKS) - set(checks)}


def one_line(error, task: type, check: str, text: str) -> None:
    told = str(error.value)
    assert told.startswith(f"{task.__name__}: {check}: "), told
    assert text in told
    assert "\n" not in told


# --- that it passes --------------------------------------------------------------


def test_a_whole_task_passes(config, place):
    check_task(config(Whole), folder=place, **but("step", "frozen", "checkpoint", "keys", "interval", "predictions"))


@pytest.mark.slow
def test_a_whole_task_passes_all_of_it(config, place):
    check_task(config(Whole), folder=place, **SMALL)


@pytest.mark.slow
def test_a_whole_task_that_is_not_frozen_passes_from_a_command_line(config, place):
    check_task(["--config", config(Whole), "--model.frozen", "false"], **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cls_rsna.yaml", {}), ("seg_rsna.yaml", {}), ("seg_siim.yaml", {"studies": 400}), ("det_rsna.yaml", {}),
        ("pretrain.yaml", {"skip": {"predictions"}}),
    ],
)  # fmt: skip
def test_our_own_tasks_pass(name, options):
    if name not in packaged.names():
        pytest.skip(f"no {name}")
    check_task(name, **options)


# --- that it can fail: one batch, no Trainer ---------------------------------------


def built(task: type, **arguments):
    torch.manual_seed(0)
    usual = {"num_classes": 1, "image_encoder": "resnet10t", "image_size": 32, "protocol": "mgca", "cache": False}
    return task(**usual | arguments)


def batch():
    generator = torch.Generator().manual_seed(0)
    return {"image": torch.randn(4, 1, 32, 32, generator=generator), "labels": torch.tensor([[0.0], [1], [1], [0]]),
            "index": torch.arange(4)}  # fmt: skip


@pytest.mark.parametrize("frozen", [True, False])
def test_one_batch_of_a_whole_task_passes_and_leaves_no_trace(frozen):
    task = built(Whole, frozen=frozen).eval()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    random = torch.get_rng_state()
    check_step(task, batch())
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    assert all(p.grad is None for p in task.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert not task.training


@pytest.mark.parametrize(
    ("task", "text"),
    [
        (SpareParameter, "2 trainable parameter(s) get no gradient, first spare.weight"),
        (NoHead, "no parameter is trainable"),
        (NaNLoss, "loss 'labels' is nan; it has to be finite"),
        (Uphill, "the loss does not fall in 10 steps on one batch"),
        (Detached, "the loss depends on no trainable parameter"),
        (ManyLosses, "loss 'labels' has the shape (4,)"),
        (OtherLoss, "configured are the losses ['labels'], step() returns ['mask']"),
        (NoSize, "Step.size is 1, the batch has 4"),
        (NoStep, "step() returns a Tensor"),
    ],
)
def test_one_batch_of_a_broken_task(task, text):
    with pytest.raises(AssertionError) as error:
        check_step(built(task), batch())
    one_line(error, task, "step", text)


# --- that it can fail: runs --------------------------------------------------------

slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("task", "check", "text"),
    [
        (UnfrozenNorm, "frozen", "image_encoder.model.bn1.num_batches_tracked has changed in a fit"),
        pytest.param(ThawedEncoder, "frozen", " has changed in a fit", marks=slow),
        pytest.param(SpareParameter, "step", "get no gradient, first spare.weight", marks=slow),
        (NaNTraining, "step", "the loss of a training step is nan"),
        (Objects, "hparams", "shape is a dict; keep numbers"),
        pytest.param(ObjectInCheckpoint, "checkpoint", "Kind", marks=slow),
        pytest.param(NotSaved, "checkpoint", "num_classes", marks=slow),
        pytest.param(Unseeded, "seed", "two fits of one seed differ in head.weight", marks=slow),
        pytest.param(OddKey, "keys", "'auroc' is logged", marks=slow),
        pytest.param(NoInterval, "interval", "no interval of test/auroc_macro", marks=slow),
        pytest.param(FarInterval, "interval", "its interval [2.0, 3.0]", marks=slow),
        pytest.param(OtherFigure, "interval", "0.123 with its interval", marks=slow),
        pytest.param(TwiceWritten, "predictions", "twice", marks=slow),
        pytest.param(NothingWritten, "predictions", "was not written", marks=slow),
        pytest.param(LosesRows, "predict", "rows, the test split", marks=slow),
        pytest.param(SwallowsNaN, "nan", "images of NaN in a test end with exit code 0, not with one", marks=slow),
        pytest.param(PredictsNaN, "nan", "images of NaN in a prediction end with exit code 0, not", marks=slow),
        pytest.param(TakesAnyData, "target", "ends with a traceback", marks=slow),
    ],
)
def test_a_broken_task_is_told_so_in_one_line(task, check, text, config, place):
    with pytest.raises(AssertionError) as error:
        check_task(config(task), folder=place, **but(check))
    one_line(error, task, check, text)


def test_a_crash_and_a_mistake_name_the_verb(config, place):
    with pytest.raises(AssertionError, match=r"fit: sista fit ends with a traceback, KeyError: 'labels of the store'"):
        check_task(config(Crashes), folder=place, **SMALL)
    with pytest.raises(AssertionError, match=r"fit: exit code 2: sista: model: kind is 'binery'; did you mean binary"):
        check_task(config(Whole, kind="binery"), folder=place, **SMALL)


def test_an_unknown_check_is_no_check():
    with pytest.raises(ValueError, match="unknown check 'frosen'; did you mean frozen"):
        check_task("pretrain.yaml", skip={"frosen"})
