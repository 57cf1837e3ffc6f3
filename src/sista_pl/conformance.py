"""What the conformance kit sees of a task from inside: a callback of a run, and the check of one batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, NoReturn
from unittest import mock

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from sista_pl.task import BaseTask, Step


def fail(task: object, check: str, why: str) -> NoReturn:
    """Raise the kit's AssertionError, one line: the task's class, the check, why."""
    raise AssertionError(f"{task if isinstance(task, str) else type(task).__name__}: {check}: {why}")


class Observer(Callback):
    """Remembers what a run shows only from inside; `latest` is that of the newest run.

    Args:
        poison: fill the images of a test or a prediction with NaN.
    """

    latest: Observer | None = None

    def __init__(self, poison: bool = False):
        self.poison = poison
        self.task: Any = None
        self.data: Any = None
        self.batch: dict[str, Any] = {}  # the first of the training
        self.before: dict[
            str, Tensor
        ] = {}  # state of the task when the training starts, or the test that trains nothing
        self.losses: list[float] = []
        self.keys: set[str] = set()  # what was logged
        Observer.latest = self

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        self.task, self.data = task, trainer.datamodule
        self.before = {k: v.detach().clone() for k, v in task.state_dict().items() if isinstance(v, Tensor)}

    def on_train_batch_start(self, trainer: Trainer, task: LightningModule, batch: Any, index: int) -> None:
        if not self.batch:
            self.batch = copy.deepcopy(batch)

    def on_train_batch_end(self, trainer: Trainer, task: LightningModule, outputs: Any, batch: Any, index: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_fit_end(self, trainer: Trainer, task: LightningModule) -> None:
        self.keys = set(trainer.callback_metrics)

    def on_test_start(self, trainer: Trainer, task: LightningModule) -> None:
        if not task.trains:
            self.on_train_start(trainer, task)

    def on_test_batch_start(
        self, trainer: Trainer, task: LightningModule, batch: Any, index: int, dataloader_idx: int = 0
    ) -> None:
        for key in ("image", "features"):
            if self.poison and key in batch:
                batch[key].fill_(math.nan)

    def on_predict_batch_start(
        self, trainer: Trainer, task: LightningModule, batch: Any, index: int, dataloader_idx: int = 0
    ) -> None:
        self.on_test_batch_start(trainer, task, batch, index)

    def on_test_end(self, trainer: Trainer, task: LightningModule) -> None:
        self.keys = set(trainer.callback_metrics)


def check_step(task: BaseTask, batch: Mapping[str, Any], steps: int = 10) -> None:
    """Check one training batch of a task: losses, gradients, and that repeating it makes the loss fall.

    The weights are put back; the global random state is left as it was.

    Args:
        task: built.
        batch: as its `step` takes it.
        steps: of AdamW with a rate of 1e-3.

    Raises:
        AssertionError: the first promise that is not kept, in one line.
    """
    trainable = {name: p for name, p in task.named_parameters() if p.requires_grad}
    if not trainable:
        fail(task, "step", "no parameter is trainable; give it a head")
    before, training = copy.deepcopy(task.state_dict()), task.training
    task.train()
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-3, weight_decay=0.0)
    seen: list[float] = []
    # outside of a Trainer's loop `self.log` has nowhere to log to
    log, log_dict = mock.patch.object(task, "log"), mock.patch.object(task, "log_dict")
    with log, log_dict, torch.random.fork_rng(devices=[]), torch.enable_grad():
        for _ in range(steps + 1):
            torch.manual_seed(0)  # the same dropout each time
            optimizer.zero_grad()
            loss = _loss(task, copy.deepcopy(dict(batch)))
            if not loss.requires_grad:
                fail(task, "step", "the loss depends on no trainable parameter; is it detached?")
            loss.backward()
            if not seen:
                _check_gradients(task, trainable)
            optimizer.step()
            seen.append(float(loss.detach()))
    optimizer.zero_grad()
    task.load_state_dict(before)
    task.train(training)
    if min(seen[1:]) >= seen[0]:
        fail(
            task, "step", f"the loss does not fall in {steps} steps on one batch ({seen[0]:.6g} to {min(seen[1:]):.6g})"
        )


def _loss(task: BaseTask, batch: dict[str, Any]) -> Tensor:
    """Return the weighted sum of a batch's losses, each of them checked."""
    step = task.step(batch)
    if not isinstance(step, Step):
        fail(task, "step", f"step() returns a {type(step).__name__}; return a sista_pl.Step")
    if set(step.losses) != set(task.weights):
        fail(
            task, "step",
            f"configured are the losses {sorted(task.weights)}, step() returns {sorted(step.losses)}; return each of "
            "self.losses",
        )  # fmt: skip
    for name, value in step.losses.items():
        if value.ndim:
            fail(task, "step", f"loss {name!r} has the shape {tuple(value.shape)}; reduce it to a scalar")
        if not value.isfinite():
            fail(task, "step", f"loss {name!r} is {float(value.detach())}; it has to be finite")
    if "index" in batch and step.size != len(batch["index"]):
        fail(task, "step", f"Step.size is {step.size}, the batch has {len(batch['index'])}; means are weighted with it")
    return torch.stack([task.weights[name] * value for name, value in step.losses.items()]).sum()


def _check_gradients(task: BaseTask, trainable: Mapping[str, Tensor]) -> None:
    none = [name for name, p in trainable.items() if p.grad is None]
    if none:
        fail(
            task, "step",
            f"{len(none)} trainable parameter(s) get no gradient, first {none[0]}; use it, or requires_grad_(False): "
            "DDP stops at one",
        )  # fmt: skip
    bad = [name for name, p in trainable.items() if p.grad is not None and not p.grad.isfinite().all()]
    if bad:
        fail(task, "step", f"the gradient of {bad[0]} is not finite")
