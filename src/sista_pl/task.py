"""The base of every task: what differs is models, losses, metrics and one `step`; the rest is written once here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.strategies import FSDPStrategy
from torch import Tensor, nn
from torchmetrics import Metric

from sista_pl import optim
from sista_pl.distributed import make_shardable
from sista_pl.errors import SistaError
from sista_pl.losses import LOSSES


@dataclass
class Step:
    """What one batch gives.

    Args:
        losses: unweighted component by name; the task's `weights` sum them.
        logs: detached scalars to log beside them.
        outputs: keyword arguments of the metrics' `update`.
        size: number of samples, the weight of this batch in an epoch's mean.
    """

    losses: dict[str, Tensor]
    logs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    size: int = 1


class BaseTask(LightningModule):
    """A LightningModule of four hooks: `configure_models`, `configure_losses`, `configure_metrics` and `step`.

    Args:
        losses: `{component: {name: registered loss, weight: 1.0, …its arguments}}`; the task's loss is the weighted
            sum. Which names there are: `sista list losses`.
        lr: peak learning rate of AdamW.
        weight_decay: on matrices and kernels; never on biases, norms and scalars.
        warmup: share of all steps with a linearly rising rate, then a cosine to zero.
    """

    # the metric that "best" means, and its direction
    monitor = "val/loss"
    target = "pair"  # what its losses look at
    mode = "min"
    trains = True  # False where there is nothing to fit: `sista test` needs no run before it

    def __init__(
        self,
        losses: Mapping[str, Any],
        lr: float = 2e-5,
        weight_decay: float = 0.05,
        warmup: float = 0.05,
    ):
        super().__init__()
        if not losses and self.trains:
            raise SistaError("model: no losses; give at least one, as in `losses: {instance: {name: clip}}`")
        self.loss_specs = {name: _plain(name, spec) for name, spec in losses.items()}
        self.weights = {name: spec.pop("weight", 1.0) for name, spec in self.loss_specs.items()}
        for name, weight in self.weights.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
                raise SistaError(f"loss {name!r}: weight is {weight!r}; give a number >= 0")
        self.lr, self.weight_decay, self.warmup = lr, weight_decay, warmup
        self.losses = nn.ModuleDict()
        self.metrics: dict[str, Metric] = {}

    def build(self) -> None:
        """Call the configure hooks; a subclass calls it at the end of its constructor."""
        self.configure_models()
        self.configure_losses()
        self.configure_metrics()

    def configure_model(self) -> None:
        """Called by Lightning before its strategy wraps the model, and by `load_from_checkpoint` without a Trainer."""
        if self._trainer is not None and isinstance(self.trainer.strategy, FSDPStrategy):
            make_shardable(self)

    def configure_models(self) -> None:
        """Build encoders and heads as attributes."""

    def configure_losses(self, **context: Any) -> None:
        """Build the loss components by name.

        Args:
            context: what a task knows and its YAML does not say, for the losses that take it.
        """
        self.losses.update({name: LOSSES.build(spec, **context) for name, spec in self.loss_specs.items()})
        for name, loss in self.losses.items():
            takes = getattr(loss, "takes", "pair")
            if takes != self.target:
                kind = self.loss_specs[name]["name"]
                raise SistaError(f"loss {name!r}: {kind!r} is for {takes}, this task has {self.target}; choose another")

    def configure_metrics(self) -> None:
        """Fill `self.metrics` with a metric for each stage, `val` and `test`, each an attribute too."""

    def step(self, batch: dict[str, Any]) -> Step:
        """Encode a batch and compute its losses: the one method that says what the task is."""
        raise NotImplementedError("a task defines step(batch) -> Step")

    def callbacks(self) -> list[Callback]:
        """Return what the task adds to the Trainer's callbacks: its pictures, usually."""
        return []

    def report(self, stage: str) -> dict[str, Any]:
        """Return the stage's figures as plain numbers and intervals for metrics.json, beyond what is logged."""
        return {}

    def write_test(self, folder: Path, notice: str) -> list[Path]:
        """Write what a test leaves beside its figures, return the files; `notice` belongs on pictures."""
        return []

    def prediction_tables(self, batches: Sequence[dict[str, Any]]) -> dict[str, pd.DataFrame]:
        """Return the tables that `sista predict` writes, by name: `predict_step`'s (B, …) tensors, a row a sample."""
        columns = {key: torch.cat([batch[key] for batch in batches]).cpu() for key in batches[0]}
        rows = columns.pop("index").numpy()
        table = pd.DataFrame({"image_id": self.trainer.datamodule.store.manifest["image_id"].to_numpy()[rows]})
        for key, values in columns.items():
            table[key] = list(values.float().numpy())
        return {"predictions": table.drop_duplicates("image_id")}

    def configure_optimizers(self):
        return optim.adamw(self, self.lr, self.weight_decay, self.warmup, self.trainer.estimated_stepping_batches)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["task"] = type(self).__name__

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        return self._run("train", batch)

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        self._run("val", batch)

    def test_step(self, batch: dict[str, Any], index: int) -> None:
        self._run("test", batch)

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Refuse predictions of NaN, whichever task made them."""
        if _has_nan(outputs):
            raise SistaError("predict: the model predicts NaN; set trainer.precision to 32-true, or train it again")

    def _run(self, stage: str, batch: dict[str, Any]) -> Tensor:
        step = self.step(batch)
        total = torch.stack([self.weights[name] * loss for name, loss in step.losses.items()]).sum()
        train = stage == "train"
        logs = {f"{stage}/loss/{name}": loss.detach() for name, loss in step.losses.items()}
        logs |= {f"{stage}/{name}": value for name, value in step.logs.items()}
        common: dict[str, Any] = {"on_step": train, "on_epoch": not train, "batch_size": step.size}
        self.log(f"{stage}/loss", total.detach(), prog_bar=True, sync_dist=not train, **common)
        self.log_dict(logs, sync_dist=not train, **common)
        if stage in self.metrics:
            self.metrics[stage].update(**step.outputs)
        return total

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        if stage in self.metrics:
            figures = self.figures(stage)
            # equal on all ranks already; unsaid, Lightning warns of each
            best = self.monitor.split("/", 1)[-1]
            rest = {f"{stage}/{name}": value for name, value in figures.items() if name != best}
            if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
                self._note(rest)
            else:
                self.log_dict(rest, sync_dist=True)
            if best in figures:
                self.log(f"{stage}/{best}", figures[best], prog_bar=True, sync_dist=True)
            self.log_progress(stage, figures)
            self.metrics[stage].reset()

    def _note(self, figures: Mapping[str, Any]) -> None:
        """Log figures that are equal on all ranks: forty of them by `self.log` outlast an epoch of a linear probe."""
        self.trainer.callback_metrics.update({name: torch.as_tensor(value) for name, value in figures.items()})
        step = self.trainer.global_step - 1  # Lightning's own count behind the last batch
        for logger in self.loggers:
            logger.log_metrics({name: float(value) for name, value in figures.items()}, step)

    def figures(self, stage: str) -> Mapping[str, Any]:
        """Return the stage's figures by name, equal on all ranks."""
        return self.metrics[stage].compute()

    def log_progress(self, stage: str, figures: Mapping[str, Tensor]) -> None:
        """Hook: what of the stage's figures belongs on the progress bar or into `report`."""

    def on_before_optimizer_step(self, optimizer) -> None:
        step = self.trainer.global_step + 1  # Lightning logs each n-th; the last of an epoch is in metrics.json
        if step % max(1, self.trainer.log_every_n_steps) == 0 or self.trainer.is_last_batch:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            self.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients))


def _has_nan(found: Any) -> bool:
    """Return whether there is a NaN in a tensor, or in one of a mapping's or list's."""
    if isinstance(found, Tensor):
        return bool(found.isnan().any())
    if isinstance(found, Mapping):
        return any(map(_has_nan, found.values()))
    return isinstance(found, (list, tuple)) and any(map(_has_nan, found))


def _plain(name: Any, spec: Any) -> dict[str, Any]:
    """Return a component's specification as a mapping of its own, once name and specification can be one's."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise SistaError(f"model: losses: no component can be called {name!r}; choose another name, as `instance`")
    if not isinstance(spec, str | Mapping):
        raise SistaError(f"loss {name!r}: it is {spec!r}; write `{{name: clip}}`, or leave the component out")
    return {"name": spec} if isinstance(spec, str) else dict(spec)
