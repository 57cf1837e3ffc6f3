"""The conformance kit: `check_task` in one test says whether a task keeps what the command promises of every task.

```python
from sista_pl.testing import check_task


def test_it_conforms():
    check_task("laterality.yaml")
```
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pickle
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sista_pl.cli import main
from sista_pl.conformance import Observer, check_step, fail
from sista_pl.errors import did_you_mean
from sista_pl.runs import CHECKPOINTS, runs_of

__all__ = ["CHECKS", "check_step", "check_task"]

CHECKS = {
    "hparams": "hyper-parameters are plain values, so that a checkpoint loads without code",
    "step": "each configured loss is a finite scalar, each trainable parameter gets a gradient, and repeating a batch "
    "lowers its loss",
    "frozen": "with frozen: true the encoder is bit-identical after a fit, batch statistics included; so is what has "
    "requires_grad_(False)",
    "checkpoint": "the checkpoint loads under torch.load(weights_only=True) and builds its task",
    "seed": "equal seeds give equal checkpoints",
    "unfrozen": "with frozen: false, `step` holds of the encoder too",
    "keys": "what is logged is named train/…, val/… or test/…",
    "interval": "metrics.json of a test has the monitored figure, inside of its interval",
    "predictions": "predictions.parquet of a test has each image of the split once",
    "predict": "so has the table of sista predict",
    "nan": "a test of a model that says NaN is refused in one line, and its figures are not written; so is a "
    "prediction",
    "target": "data of another target are refused in one line",
}
_KEY = re.compile(r"(train|val|test)/\S.*")
_PLAIN = (type(None), bool, int, float, str)


def check_task(
    config: str | Path | Sequence[str],
    *,
    studies: int = 200,
    size: int = 64,
    folder: Path | None = None,
    skip: Collection[str] = (),
) -> None:
    """Run a task through the real `sista fit`, `test` and `predict` on a tiny drawn phantom and check what comes out.

    The configuration's own data group says which release is drawn; sizes, batches and epochs are replaced by small
    ones. It takes some ten to twenty seconds on one core.

    Of a task that trains nothing (`EvaluationTask`), give `--model.weights` on the command line: `fit` has to be
    refused in one line, and of the checks those hold that need no fit; `seed` means equal figures, `frozen` that a test
    leaves all tensors as they were.

    Args:
        config: a configuration as `--config` takes it, or a command line, `["--config", "a.yaml", "--model.lr", "1"]`.
        studies: of the phantom; more where a finding is rare.
        size: side of the images in pixels; that of the pre-training where `--model.weights` is one.
        folder: where to draw; what an earlier check of this configuration has drawn there is used again. A temporary
            one where not given.
        skip: names of `CHECKS` that are no promise of this task.

    Raises:
        AssertionError: the first promise that is not kept, in one line.
    """
    for name in skip:
        if name not in CHECKS:
            raise ValueError(f"skip: unknown check {name!r}; {did_you_mean(name, CHECKS)}")
    command = ["--config", str(config)] if isinstance(config, str | Path) else [str(word) for word in config]
    with tempfile.TemporaryDirectory() as temporary:
        _Conformance(command, Path(folder or temporary), Path(temporary) / "runs", studies, size, skip).check()


class _Conformance:
    """The check of one task: runs of the command, and what they leave in a folder."""

    def __init__(
        self, command: list[str], folder: Path, runs: Path, studies: int, size: int, skip: Collection[str]
    ):  # fmt: skip
        self.name, self.runs, self.skip = " ".join(command), runs, skip
        self.trains = True
        place = folder / re.sub(r"\W+", "-", f"{self.name}-{studies}-{size}")[-100:]
        self.data = [
            "--data.root", str(place / "raw"), "--data.store", str(place / "store"), "--data.size", str(size),
            "--data.crop", str(size), "--data.batch_size", "8", "--data.num_workers", "0",
        ]  # fmt: skip
        phantom = f"{{studies: {studies}, seed: 5, size: {size}, workers: 1}}"
        self.command = [*command, *self.data, "--data.phantom", phantom]
        self.common = [
            "--name", "check", "--run_root", str(self.runs), "--seed_everything", "0", "--trainer.max_epochs", "1",
            "--trainer.limit_train_batches", "8",
            "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.precision", "32-true",
            "--trainer.logger", "false", "--trainer.enable_progress_bar", "false",
            "--trainer.enable_model_summary", "false",
        ]  # fmt: skip

    def check(self) -> None:
        code, told = self.run("fit")
        if code == 2 and "nothing to fit" in told:
            self.check_evaluation(told)
            return
        observer, run = self.fitted(code, told)
        if "draws" in observer.task.hparams:  # of the bootstrap: enough for an interval
            self.common += ["--model.draws", "100"]
        if "step" not in self.skip:
            check_step(observer.task, observer.batch)
        if "frozen" not in self.skip:
            self.check_frozen(observer, run)
        if "checkpoint" not in self.skip:
            self.check_checkpoint(observer, run)
        if "seed" not in self.skip:
            self.check_seed(observer, run)
        if hasattr(observer.task, "frozen"):
            self.check_other(not observer.task.frozen)
        if not {"keys", "interval", "predictions", "nan"} <= set(self.skip):
            self.check_test(observer, run)
        if "predict" not in self.skip:
            self.check_predict(observer, run)
        if "nan" not in self.skip:
            self.check_nan(observer, run)
        if "target" not in self.skip:
            self.check_target(observer)

    def check_evaluation(self, told: str) -> None:
        """Check a task that trains nothing: each test is a run of its own."""
        if len(told.splitlines()) != 1:
            fail(self.name, "fit", "it is refused in several lines; raise one SistaError")
        self.trains = False
        self.common += ["--model.draws", "100"]
        self.done("test")
        observer, run = Observer.latest, runs_of(self.runs, "check")[-1]
        assert observer is not None
        self.name = type(observer.task).__name__
        self.check_hparams(observer)
        if "frozen" not in self.skip:
            after = observer.task.state_dict()
            for name, value in observer.before.items():
                # a tokenizer writes down to what length it was last asked to cut
                if not name.endswith("_extra_state") and not torch.equal(value, after[name]):
                    fail(self.name, "frozen", f"{name} has changed in a test; keep all of it in eval mode")
        self.check_tested(observer, run)
        if "seed" not in self.skip:
            self.done("test")
            told_twice = [
                json.loads((found / "test/metrics.json").read_text())["test"]
                for found in (run, runs_of(self.runs, "check")[-1])
            ]
            if differs := [name for name, value in told_twice[0].items() if value != told_twice[1].get(name)]:
                fail(self.name, "seed", f"two tests of one seed differ in {differs[0]}; draw by generators of your own")
        if "predict" not in self.skip:
            self.check_predict(observer, run)
        if "nan" not in self.skip:
            self.check_nan(observer, run)
        if "target" not in self.skip:
            self.check_target(observer)

    # --- the command -----------------------------------------------------------

    def run(self, verb: str, *more: str, poison: bool = False, check: str = "") -> tuple[int, str]:
        """Run a verb and return its exit code and the `sista: …` lines of standard error; `check` names a failure."""
        observer = f"{{class_path: sista_pl.conformance.Observer, init_args: {{poison: {str(poison).lower()}}}}}"
        arguments = [verb, *self.command, *self.common, "--trainer.callbacks+", observer, *more]
        Observer.latest, environment, err = None, dict(os.environ), io.StringIO()
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
                code = main(arguments)
        except Exception as why:
            told = f"{type(why).__name__}: {(str(why).strip().splitlines() or [''])[0]}"
            raise AssertionError(
                f"{self.name}: {check or verb}: sista {verb} ends with a traceback, {told}; a user's mistake is a "
                "SistaError, anything else a bug"
            ) from why
        finally:
            os.environ.clear()
            os.environ.update(environment)
        return code, "\n".join(line for line in err.getvalue().splitlines() if line.startswith("sista: "))

    def done(self, verb: str, *more: str) -> None:
        """Run a verb that has to succeed."""
        code, told = self.run(verb, *more)
        if code:
            fail(self.name, verb, f"exit code {code}: {told}")

    def refused(self, check: str, what: str, advice: str, verb: str, *more: str, poison: bool = False) -> None:
        """Run a verb that has to end with one line and exit code 2."""
        code, told = self.run(verb, *more, poison=poison, check=check)
        if code != 2 or len(told.splitlines()) != 1:
            fail(self.name, check, f"{what} end with exit code {code}, not with one line and 2; {advice}")

    def fit(self, *more: str) -> tuple[Observer, Path]:
        """Fit, and return what was seen from inside and the run's folder."""
        return self.fitted(*self.run("fit", *more))

    def fitted(self, code: int, told: str) -> tuple[Observer, Path]:
        """Return the same of a fit that was run."""
        observer = Observer.latest
        if observer is not None and observer.task is not None:
            self.name = type(observer.task).__name__
            self.check_hparams(observer)
            for value in observer.losses:
                if not math.isfinite(value):
                    fail(self.name, "step", f"the loss of a training step is {value}; it has to be finite")
        if code and "checkpoint" not in self.skip and list(self.runs.glob("check/*/checkpoints/last.ckpt")):
            self.checkpoint(runs_of(self.runs, "check")[-1])  # what can't be read back is why
        if code or observer is None:
            fail(self.name, "fit", f"exit code {code}: {told}")
        return observer, runs_of(self.runs, "check")[-1]

    def of_run(self, run: Path) -> list[str]:
        """Return the options that take a run's best checkpoint, where the task has any."""
        return ["--ckpt_path", str(run / CHECKPOINTS / "best.ckpt")] if self.trains else []

    # --- what is checked -------------------------------------------------------

    def check_hparams(self, observer: Observer) -> None:
        for key, value in observer.task.hparams.items():
            if "hparams" not in self.skip and not _plain(value):
                fail(
                    self.name, "hparams",
                    f"{key} is a {type(value).__name__}; keep numbers, texts, lists and dicts, and build from them",
                )  # fmt: skip

    def check_frozen(self, observer: Observer, run: Path) -> None:
        after = self.checkpoint(run)["state_dict"]
        still = {name for name, p in observer.task.named_parameters() if not p.requires_grad}
        if getattr(observer.task, "frozen", False):
            still |= {name for name in after if name.startswith("image_encoder.")}
        for name in sorted(still & set(observer.before)):
            if not torch.equal(observer.before[name], after[name]):
                fail(
                    self.name, "frozen",
                    f"{name} has changed in a fit; a frozen encoder has requires_grad_(False) and eval(), as "
                    "TransferTask.train keeps it",
                )  # fmt: skip

    def check_other(self, frozen: bool) -> None:
        """Check the task frozen where the configuration is not, or the other way round."""
        check = "frozen" if frozen else "unfrozen"
        if check not in self.skip:
            observer, run = self.fit("--model.frozen", str(frozen).lower(), "--trainer.limit_train_batches", "2")
            with _named(check):
                check_step(observer.task, observer.batch)
            self.check_frozen(observer, run)

    def checkpoint(self, run: Path) -> dict[str, Any]:
        """Read a run's last checkpoint as anybody could who has no code of the task."""
        try:
            return torch.load(run / CHECKPOINTS / "last.ckpt", map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as why:
            kind = re.search(r"GLOBAL ([\w.]+)", str(why))
            fail(
                self.name, "checkpoint",
                f"it does not load under weights_only=True, it holds a {kind[1] if kind else 'Python object'}; keep "
                "plain values and tensors",
            )  # fmt: skip

    def check_checkpoint(self, observer: Observer, run: Path) -> None:
        checkpoint = self.checkpoint(run)
        told = {k: v for k, v in checkpoint.get("hyper_parameters", {}).items() if not k.startswith("_")}
        if not told:
            fail(self.name, "checkpoint", "it has no hyper_parameters; call self.save_hyperparameters() in __init__")
        try:
            type(observer.task)(**told).load_state_dict(checkpoint["state_dict"])
        except Exception as why:
            line = (str(why).strip().splitlines() or [""])[-1].strip()
            fail(self.name, "checkpoint", f"its hyper_parameters don't build its task, {type(why).__name__}: {line}")

    def check_seed(self, observer: Observer, first: Path) -> None:
        _, second = self.fit()
        one, two = (self.checkpoint(run)["state_dict"] for run in (first, second))
        differs = [
            name for name in one if isinstance(one[name], torch.Tensor) and not torch.equal(one[name], two[name])
        ]
        parameters = dict(observer.task.named_parameters())
        for name in sorted(differs, key=lambda name: name not in parameters):  # a buffer may only follow
            fail(self.name, "seed", f"two fits of one seed differ in {name}; draw by generators that the seed sets")

    def check_test(self, observer: Observer, run: Path) -> None:
        self.done("test", *self.of_run(run))
        self.check_tested(observer, run)

    def check_tested(self, observer: Observer, run: Path) -> None:
        assert Observer.latest is not None
        for key in sorted(observer.keys | Observer.latest.keys):
            if "keys" not in self.skip and not _KEY.fullmatch(key):
                fail(self.name, "keys", f"{key!r} is logged; name it train/…, val/… or test/…, as Step.logs does")
        if "interval" not in self.skip:
            self.check_interval(json.loads((run / "test/metrics.json").read_text()))
        if "predictions" not in self.skip:
            self.check_table("predictions", run / "test/predictions.parquet", observer)

    def check_interval(self, metrics: Mapping[str, Any]) -> None:
        key = "test/" + metrics["monitor"].removeprefix("val/")
        if key not in metrics["intervals"]:
            known = ", ".join(metrics["intervals"]) or "none"
            fail(self.name, "interval", f"metrics.json has no interval of {key}, the monitored figure; it has {known}")
        value, ends = (metrics["intervals"][key][name] for name in ("value", "interval95"))
        if ends is None or not ends[0] - 1e-9 <= value <= ends[1] + 1e-9:
            fail(self.name, "interval", f"{key} is {value} and its interval {ends}; the value lies inside of it")
        logged = metrics["test"].get(key, math.nan)
        if not math.isclose(value, logged, abs_tol=1e-5):
            fail(self.name, "interval", f"{key} is {value} with its interval, {logged} as logged; they are one figure")

    def check_table(self, check: str, path: Path, observer: Observer) -> None:
        """Check that a table of predictions has each image of the test split once."""
        if not path.is_file():
            fail(self.name, check, f"{path.relative_to(self.runs)} was not written")
        table = pd.read_parquet(path)
        column = next((name for name in ("image_id", "image") if name in table), None)
        if column is None:
            fail(self.name, check, f"{path.name} has neither a column image_id nor image; it has {list(table)}")
        expected = set(observer.data.store.manifest["image_id"].to_numpy()[observer.data.rows["test"]])
        if table[column].duplicated().any():
            fail(self.name, check, f"{path.name} has {table[column][table[column].duplicated()].iloc[0]!r} twice")
        if set(table[column]) != expected:
            odd = sorted(map(str, set(table[column]) ^ expected))[0]
            fail(self.name, check, f"{path.name} has {len(table)} rows, the test split {len(expected)}; look at {odd}")

    def check_predict(self, observer: Observer, run: Path) -> None:
        self.done("predict", *self.of_run(run))
        here = run if self.trains else runs_of(self.runs, "check")[-1]
        self.check_table("predict", here / "predictions.parquet", observer)

    def check_nan(self, observer: Observer, run: Path) -> None:
        before = (run / "test/metrics.json").read_bytes()
        advice = "raise a SistaError where predictions are not finite, as MeasuredTask.figures does"
        self.refused("nan", "images of NaN in a test", advice, "test", *self.of_run(run), poison=True)
        path = (run if self.trains else runs_of(self.runs, "check")[-1]) / "test/metrics.json"
        if path.read_bytes() != before if self.trains else path.exists():
            fail(self.name, "nan", "a test that was refused has written metrics.json")
        advice = "let predict_step return the NaN, which BaseTask.on_predict_batch_end refuses"
        self.refused("nan", "images of NaN in a prediction", advice, "predict", *self.of_run(run), poison=True)

    def check_target(self, observer: Observer) -> None:
        other = _other_target(observer.data)
        if other is None:
            return  # the release has nothing else to offer
        changed = ["--data", "PairDataModule" if other == "pairs" else "TransferDataModule", *self.data]
        if other != "pairs":
            changed += ["--data.target", other, "--data.masks_from_boxes", "true" if other == "mask" else "false"]
        advice = "raise a SistaError in setup(), as TransferTask.setup does"
        self.refused("target", f"data of {other}", advice, "fit" if self.trains else "test", *changed)


def _other_target(data: Any) -> str | None:
    """Return what else the store of this data module has, so that nobody but the task can refuse it."""
    manifest, mine = data.store.manifest, getattr(data, "target", "pairs")
    boxes = bool(manifest["boxes"].notna().any())
    offers = {
        "labels": any(name.startswith("label_") for name in manifest), "boxes": boxes, "mask": boxes,
        "pairs": bool((manifest["findings"].fillna("") + manifest["impression"].fillna("") != "").any()),
    }  # fmt: skip
    return next((name for name, there in offers.items() if there and name != mine), None)


@contextlib.contextmanager
def _named(check: str) -> Iterator[None]:
    """Let a failing `check_step` name this check."""
    try:
        yield
    except AssertionError as why:
        raise AssertionError(str(why).replace(": step: ", f": {check}: ", 1)) from None


def _plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(type(key) in _PLAIN and _plain(item) for key, item in value.items())
    return all(map(_plain, value)) if isinstance(value, list | tuple) else type(value) in _PLAIN
