"""What happens around training: run folder, exact resume, one picture an epoch, results at the end."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer, callbacks
from pytorch_lightning.loggers import MLFlowLogger
from rich.console import Console

from sista_pl import tracking
from sista_pl.atomic import writing
from sista_pl.data.loader import ResumableLoader
from sista_pl.distributed import rank, world_size
from sista_pl.errors import SistaError
from sista_pl.runs import CHECKPOINTS, new_run

PHANTOM = "PHANTOM DATA: drawn by a program, no patient"


class ModelCheckpoint(callbacks.ModelCheckpoint):
    """Lightning's, whose folder may have moved: Lightning's own would forget the best score, and keep a worse epoch."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        here = Path(str(self.dirpath))
        state = {**state_dict, "dirpath": self.dirpath}
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = str(here / Path(state[key]).name) if state.get(key) else ""
        state["best_k_models"] = {str(here / Path(path).name): score for path, score in state["best_k_models"].items()}
        super().load_state_dict(state)


class RunFolder(Callback):
    """Gives a `fit` its folder `<root>/<name>/<number>`, puts checkpoints there, and records what it was made of.

    Args:
        root: folder of all runs.
        name: of the configuration.
        config: the run's configuration as YAML.
        resumed: the folder of the run that goes on, or None for a new one.
        privacy: `local_only` or `allow_patient_data`.
    """

    def __init__(self, root: Path, name: str, config: str, resumed: Path | None = None, privacy: str = "local_only"):
        self.root, self.name, self.config, self.resumed, self.privacy = root, name, config, resumed, privacy
        self.path: Path | None = None

    def setup(self, trainer: Trainer, task: LightningModule, stage: str) -> None:
        trainer.sista_privacy, trainer.sista_id_key = self.privacy, self.root / ".id_key"
        store = getattr(trainer.datamodule, "store", None)
        if store is not None and store.phantom and trainer.is_global_zero:
            Console(stderr=True).print(f"[bold yellow]{PHANTOM}[/]")
        if self.path is None:
            path = self.resumed
            if path is None and trainer.is_global_zero:
                path = new_run(self.root, self.name)
            self.path = Path(trainer.strategy.broadcast(str(path)))
        for callback in trainer.callbacks:
            if isinstance(callback, callbacks.ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str((self.path / CHECKPOINTS).resolve())
        if (stage == "fit" or not task.trains) and trainer.is_global_zero:
            (self.path / "config.yaml").write_text(self.config)

    def on_fit_start(self, trainer: Trainer, task: LightningModule) -> None:
        self._record(trainer)

    def on_test_start(self, trainer: Trainer, task: LightningModule) -> None:
        if not task.trains:  # the test is the run
            self._record(trainer)

    def _record(self, trainer: Trainer) -> None:
        tracking.record_run(trainer, self.path / "config.yaml", self.name)
        if isinstance(trainer.logger, MLFlowLogger) and trainer.is_global_zero:
            (self.path / "mlflow_run_id").write_text(str(trainer.logger.run_id))


class ExactResume(Callback):
    """Stores every rank's random state, so that a resumed run draws what the uninterrupted one would have drawn.

    The order of the data and its augmentation need no state: they are functions of seed, epoch and rank.
    """

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        state = _random_state()
        states: list[Any] = [state] * world_size()
        if world_size() > 1:
            dist.all_gather_object(states, state)
        return {"states": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.states = state["states"]

    def on_train_start(self, trainer: Trainer, task: LightningModule) -> None:
        if self.states:
            if len(self.states) != world_size():
                raise SistaError(
                    f"resume: the checkpoint was written by {len(self.states)} process(es), this run has "
                    f"{world_size()}; resume with the same number"
                )
            _set_random_state(self.states[rank()])
            self.states = []


def _random_state() -> dict[str, Any]:
    kind, keys, place, has_gauss, gauss = np.random.get_state()  # noqa: NPY002  the global state is what we keep
    version, internal, normal = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), int(place), int(has_gauss), float(gauss)],
        "python": [version, list(internal), normal],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, internal, normal = state["python"]
    random.setstate((version, tuple(internal), normal))


class DataWait(Callback):
    """Says at the end of a fit for which share of the training there was no batch yet.

    On an accelerator the host waits while the device still computes, so that its share is an upper bound.
    """

    def __init__(self) -> None:
        self.began, self.stepped = 0.0, 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.stepped += time.perf_counter() - self.began

    def on_fit_end(self, trainer: Trainer, task: LightningModule) -> None:
        loader = trainer.train_dataloader
        if trainer.is_global_zero and isinstance(loader, ResumableLoader) and self.stepped:
            print(wait_told(loader.waited / (loader.waited + self.stepped), loader.num_workers))


def wait_told(share: float, workers: int) -> str:
    """Say how much of a training waited for batches, and what helps where it is more than 5 %."""
    told = f"waiting for batches: {share:.1%} of the training"
    if share <= 0.05:
        return told
    more = f"more than the {workers} there are" if workers else "-1 takes what the machine has"
    return f"{told}; data.num_workers makes them beside it: {more}"


class Results(Callback):
    """Keeps the figures of each epoch, writes metrics.json, and says at the end where the encoder is.

    Args:
        folder: the `RunFolder` of the run.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history, self.best = state["history"], state["best"]

    def on_validation_end(self, trainer: Trainer, task: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        figures = {k: float(v) for k, v in trainer.callback_metrics.items()}
        self.history.append({"epoch": trainer.current_epoch, "step": trainer.global_step, **figures})
        score, sign = figures.get(str(task.monitor)), 1 if task.mode == "max" else -1
        if score is not None and not math.isnan(score) and (not self.best or sign * score > sign * self.best["score"]):
            self.best = {"score": score, "epoch": trainer.current_epoch, "step": trainer.global_step,
                         "figures": {k: v for k, v in figures.items() if k.startswith("val/")},
                         "intervals": task.report("val")}  # fmt: skip

    def on_fit_end(self, trainer: Trainer, task: LightningModule) -> None:
        if trainer.is_global_zero:
            self._write(trainer, task, {"best": self.best, "history": self.history})
            self._publish(trainer)

    def on_test_end(self, trainer: Trainer, task: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        folder = self.folder.path / "test"
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        figures = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("test/")}
        intervals = task.report("test")
        (folder / "metrics.json").unlink(missing_ok=True)  # it comes last: what it stands beside is of the same test
        phantom = getattr(getattr(trainer.datamodule, "store", None), "phantom", False)
        for file in task.write_test(folder, PHANTOM if phantom else ""):
            tracking.publish(trainer, file, file.parent.relative_to(self.folder.path).as_posix())
        path = self._write(trainer, task, {"test": figures, "intervals": intervals}, "test/metrics.json")
        _show(intervals)
        if intervals:  # Lightning's table would say the same again, without them
            trainer.test_loop.verbose = False
        Console().print(f"metrics: {path}", soft_wrap=True)

    def on_predict_epoch_end(self, trainer: Trainer, task: LightningModule) -> None:
        part = f"-{rank()}" if world_size() > 1 else ""
        for name, table in task.prediction_tables(trainer.predict_loop.predictions).items():
            plain = not any(isinstance(value, (np.ndarray, list, dict)) for value in table.head(1).to_numpy().ravel())
            for suffix in (".parquet", ".csv") if plain else (".parquet",):
                path = self.folder.path / f"{name}{part}{suffix}"
                with writing(path) as partial:
                    table.to_csv(partial, index=False) if suffix == ".csv" else table.to_parquet(partial, index=False)
            Console().print(f"{name}: {path.with_suffix('.parquet')}, {len(table)} rows", soft_wrap=True)

    def _write(self, trainer: Trainer, task: LightningModule, figures: dict, name: str = "metrics.json") -> Path:
        path = self.folder.path / name
        facts = {"config": self.folder.name, "monitor": task.monitor, **_data_facts(trainer), "seed": _seed(),
                 "devices": trainer.world_size, "precision": str(trainer.precision),
                 "versions": tracking.versions()}  # fmt: skip
        with writing(path) as partial:
            partial.write_text(json.dumps(facts | figures, indent=2, default=tracking.describe) + "\n")
        tracking.publish(trainer, path)
        return path

    def _publish(self, trainer: Trainer) -> None:
        from sista_pl.checkpoint import load_encoder
        from sista_pl.exported import export_timm

        best = Path(getattr(trainer.checkpoint_callback, "best_model_path", "") or "")
        out = Console()
        if not best.is_file():
            out.print("no checkpoint was written; turn trainer.enable_checkpointing on to keep the encoder")
            return
        tracking.publish(trainer, best, CHECKPOINTS)
        if "image_encoder" in trainer.lightning_module.hparams:
            size = trainer.lightning_module.hparams.image_size
            exported = export_timm(load_encoder(best), self.folder.path / "encoder", size)
            shown = best.relative_to(Path.cwd()) if best.is_relative_to(Path.cwd()) else best
            timm = f" (timm weights: {exported}/model.safetensors)" if exported else ""
            out.print(f"encoder: {shown}{timm}", soft_wrap=True)
        out.print(f"metrics: {self.folder.path}/metrics.json", soft_wrap=True)
        out.print(f"next:    sista test --config {self.folder.path}/config.yaml    # or: mlflow ui --backend-store-uri "
                  "sqlite:///mlflow.db", soft_wrap=True, highlight=False)  # fmt: skip


def _show(intervals: dict[str, Any]) -> None:
    """Print figures with their intervals, a line each."""
    width = max(map(len, intervals), default=0)
    for name, figure in intervals.items():
        low_high = figure["interval95"]
        told = f"[{low_high[0]:.3f}, {low_high[1]:.3f}]" if low_high else "no interval: fewer than two patients"
        Console().print(f"{name:<{width}}  {figure['value']:.3f}  {told}", soft_wrap=True, markup=False)


def _data_facts(trainer: Trainer) -> dict[str, Any]:
    store = getattr(trainer.datamodule, "store", None)
    if store is None:
        return {}
    rows = {name: len(r) for name, r in trainer.datamodule.rows.items()}
    similarity = getattr(trainer.datamodule, "similarity", None)
    return {"phantom": PHANTOM if store.phantom else False,
            "data": {"source": f"{store.name} {store.version}", "hash": store.hash,
                     "split": trainer.datamodule.split_told, "rows": rows,
                     "similarity": similarity.report() if similarity is not None else None}}  # fmt: skip


def _seed() -> int | None:
    import os

    value = os.environ.get("PL_GLOBAL_SEED")
    return int(value) if value else None
