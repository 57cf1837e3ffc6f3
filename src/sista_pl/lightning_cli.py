"""`sista fit | validate | test | predict`: LightningCLI with packaged configurations and one-line errors."""

from __future__ import annotations

import difflib
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from jsonargparse import ActionConfigFile, set_parsing_settings
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from sista_pl import packaged, plugins, runs
from sista_pl.allocator import keep_memory
from sista_pl.callbacks import DataWait, ExactResume, ModelCheckpoint, Results, RunFolder
from sista_pl.data.module import BaseDataModule
from sista_pl.data.pairs import PairDataModule  # noqa: F401  addressable by its short name
from sista_pl.data.transfer import TransferDataModule  # noqa: F401
from sista_pl.errors import SistaError, did_you_mean
from sista_pl.precision import usual_precision
from sista_pl.preemption import Preemption
from sista_pl.privacy import PRIVACY, check_artifacts, check_logger, default_privacy, without_password
from sista_pl.task import BaseTask
from sista_pl.tracking import open_store

LOGGER = {
    "class_path": "pytorch_lightning.loggers.MLFlowLogger",
    "init_args": {
        "experiment_name": "sista",
        # mlflow refuses its own default, a folder of files
        "tracking_uri": "${oc.env:MLFLOW_TRACKING_URI,sqlite:///mlflow.db}",
    },
}

# Warnings of Lightning's about what we do on purpose.
NOISE = (
    "MLFlow only allows",
    "You have overridden `on_before_batch_transfer`",
    ".*does not have many workers",
    ".*isinstance.treespec",
    ".*callbacks used to create the checkpoint",
    "The number of training batches",
    r"Found \d+ module\(s\) in eval mode at the start of training",  # a frozen encoder
)


class PackagedConfig(ActionConfigFile):
    """`--config NAME`: a file, or a packaged configuration of that name."""

    def __call__(self, parser, cfg, values, option_string=None):
        super().__call__(parser, cfg, str(packaged.find(values)), option_string)


class Parser(LightningArgumentParser):
    """jsonargparse's parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise mistake_in(ex) or SistaError(explain(message))


def mistake_in(error: BaseException | None) -> SistaError | None:
    """Return the user's mistake that an error was raised from: jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, SistaError):
        error = error.__cause__ or error.__context__
    return error


def explain(message: str) -> str:
    """Turn jsonargparse's paragraph into one line that names the key, the reason and the nearest known name."""
    lines = [line.strip(" -\t") for line in message.splitlines() if line.strip(" -\t")]
    key = next((m[1] for line in lines if (m := re.search(r'(?:Parser key|key) "([^"]+)"', line))), None)
    if match := re.search(
        r"(?:Key|Option|Option name) '([^']+)' (?:is not expected|not found|is not accepted)", message
    ) or re.search(r"unrecognized arguments: --([^\s=]+)", message):
        last = match[1].rsplit(".", 1)[-1]
        near = difflib.get_close_matches(last, _keys(), n=1)
        told = f"did you mean {near[0]}?" if near else "`sista fit --help` lists the keys"
        if near == [last]:  # known, but not of the class that is chosen where it stands
            told = "it is of another class; put --config before the options, and see `sista fit --model.help CLASS`"
        return f"configuration: unknown key {match[1]!r}{_in(key)}; {told}"
    if match := re.search(r"Multiple subclasses with name (\w+)\..*?: ([\w., ]+)\.", message):
        return f"configuration: more than one class is called {match[1]}{_in(key)}; say which: {match[2]}"
    if match := re.search(r"Expected a dot import path string: ([\w.]+)", message) or re.search(
        r"(?:No module named|Import path|class_path:?) ['\"]?([\w.]+)", message
    ):
        known = did_you_mean(match[1].rsplit(".", 1)[-1], _classes(key))
        return f"configuration: unknown class {match[1]!r}{_in(key)}; {known}"
    detail = lines[-1] if lines else "can't be parsed"
    first = lines[0] if lines else ""
    text = detail if first == detail else f"{first} {detail}".strip()
    return f"configuration: {text[:400]}; see `sista fit --help`"


def _in(key: str | None) -> str:
    return f" in {key!r}" if key else ""


def _subclasses(*bases: type) -> list[Any]:
    """Return the classes and all that derive from them."""
    found: list[Any] = []
    todo = list(bases)
    while todo:
        cls = todo.pop()
        found.append(cls)
        todo += cls.__subclasses__()
    return found


def _classes(key: str | None) -> list[str]:
    """Return the names of the classes that can stand under a key, those of tasks and data where it is none of these."""
    bases: dict[str | None, type] = {
        "model": BaseTask, "data": BaseDataModule, "trainer.logger": Logger, "trainer.callbacks": Callback,
    }  # fmt: skip
    found = _subclasses(*([bases[key]] if key in bases else (BaseTask, BaseDataModule)))
    return [cls.__name__ for cls in found if not cls.__name__.startswith(("Base", "_")) and not inspect.isabstract(cls)]


def _keys() -> set[str]:
    """The arguments of every task, data module and of the Trainer."""
    classes = _subclasses(BaseTask, BaseDataModule, Trainer)
    return {name for cls in classes for name in inspect.signature(cls).parameters} - {"self", "kwargs"}


class SistaCLI(LightningCLI):
    """Wires a task, a data module and a Trainer from YAML.

    Its own keys beside Lightning's: `name` of the run (the first configuration's name), `run_root`, `privacy`,
    `checkpoint_every`. Only the verb that was asked for gets a parser: each takes longer than the parse itself.
    """

    def __init__(self, verb: str, *args: Any, **kwargs: Any) -> None:
        self.verb = verb
        super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        return {self.verb: super().subcommands()[self.verb]}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        # an abbreviation that happens to be unique today is another key tomorrow
        parser = Parser(**kwargs, allow_abbrev=False)
        parser.add_argument(
            "-c", "--config", action=PackagedConfig,
            help="configuration: a file, or the name of a packaged one (`sista list configs`); later ones override",
        )  # fmt: skip
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str | None, default=None, help="of the run; default: the configuration's")
        parser.add_argument("--run_root", type=str, default="runs", help="folder of all runs")
        parser.add_argument(
            "--privacy", type=Literal[PRIVACY], default=default_privacy(),
            help="whether pictures and report texts may go to a tracker on another machine; default: what the "
            "environment's SISTA_PRIVACY says, else local_only",
        )  # fmt: skip
        parser.add_argument(
            "--checkpoint_every", type=int, default=100, help="training steps between two last.ckpt, to resume from"
        )
        parser.set_defaults({"trainer.logger": LOGGER, "trainer.use_distributed_sampler": False,
                             "trainer.num_sanity_val_steps": 0})  # fmt: skip

    def _parse_ckpt_path(self) -> None:
        """Do nothing: a checkpoint brings weights; the configuration says what is built.

        Lightning 2.6 would let the checkpoint's hyper-parameters silently beat the command line here.
        """

    def _set_seed(self) -> None:
        seed = self.config[self.subcommand].seed_everything
        if type(seed) is int and not 0 <= seed < 2**32:
            raise SistaError(f"--seed_everything is {seed}; give one from 0 to 4294967295")
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        self.run_name = config.name or _first_config(sys.argv[1:])
        root, wanted = Path(config.run_root), config.get("ckpt_path")
        own = None
        if self.subcommand != "fit" and not any(word.partition("=")[0] == "--ckpt_path" for word in sys.argv):
            own = runs.run_of_config(_config(sys.argv[1:]))
        if own is not None:  # its config.yaml may name the checkpoint that the run itself went on from
            wanted = config.ckpt_path = None
        if self.subcommand == "fit" and wanted == "auto":
            wanted = "last" if runs.unfinished(root, self.run_name) else None
            config.ckpt_path = wanted
        self.resumed: Path | None = None
        if not self._trains(config):
            if wanted is not None:
                raise SistaError(
                    f"--ckpt_path: {self.run_name} trains nothing; give the pre-training as --model.weights"
                )
        elif self.subcommand == "fit" and wanted is None:
            pass
        elif wanted in (None, "best", "last"):
            which = wanted or "best"
            found = runs.find_checkpoint(root, self.run_name, which) if own is None else runs.best_of(own)
            config.ckpt_path = str(found)
            print(f"checkpoint: {config.ckpt_path}")
        elif not Path(wanted).is_file():
            raise SistaError(
                f"--ckpt_path {wanted}: no such file; write best, last, or a file of `sista list runs`; of fit, auto "
                "goes on where a run was stopped"
            )
        if config.ckpt_path is not None:
            from sista_pl.checkpoint import read_checkpoint

            self._check_task(read_checkpoint(config.ckpt_path), config)
            self.resumed = runs.run_of(Path(config.ckpt_path))
        if config.trainer.precision is None:
            config.trainer.precision = usual_precision(str(config.trainer.accelerator))
            rank_zero_info(
                f"precision: {config.trainer.precision}, as suits this machine; --trainer.precision sets another"
            )
        _check_folder(root)
        self._check_tracking(config)

    def _trains(self, config: Any) -> bool:
        """Return whether the configured task is one that is trained.

        Raises:
            SistaError: it is not, and the verb is fit.
        """
        task = str(config.model.class_path).rsplit(".", 1)[-1]
        trains = all(cls.trains for cls in _subclasses(BaseTask) if cls.__name__ == task)
        if self.subcommand == "fit" and not trains:
            raise SistaError(
                f"{self.run_name}: {task} evaluates a pre-trained encoder, there is nothing to fit; sista test "
                f"--config {self.run_name}.yaml --model.weights CHECKPOINT"
            )
        return trains

    def _check_task(self, checkpoint: dict[str, Any], config: Any) -> None:
        """Refuse the checkpoint of another task."""
        held, wanted = checkpoint.get("task"), str(config.model.class_path).rsplit(".", 1)[-1]
        if held is not None and held != wanted:
            raise SistaError(
                f"--ckpt_path {config.ckpt_path}: a checkpoint of {held}, the configuration is of {wanted}; to start "
                "from its encoder give --model.weights instead"
            )

    def _check_tracking(self, config: Any) -> None:
        """Refuse a tracker elsewhere, and let a resumed or tested run go on in its own MLflow run."""
        given = config.trainer.logger
        loggers = given if isinstance(given, list) else [given]
        for logger in loggers:
            if hasattr(logger, "class_path"):
                check_logger(logger.class_path, logger.init_args, config.privacy)
        if not getattr(loggers[0] if loggers else None, "class_path", "").endswith("MLFlowLogger"):
            return
        place = loggers[0].init_args
        path = self.resumed / "mlflow_run_id" if self.resumed else None
        if path is not None and path.is_file():
            place.run_id = path.read_text().strip()
        elif place.get("run_name") is None:
            place.run_name = self.run_name
        open_store(place.tracking_uri, place.experiment_name, place.get("artifact_location"))
        if self.subcommand == "predict":  # which logs nothing
            return
        run = place.get("run_id")
        if not check_artifacts(place.tracking_uri, place.experiment_name, run, config.privacy) and run is not None:
            rank_zero_info(f"tracking: MLflow run {run} is not in this tracker; a new one goes on in its place")
            place.run_id, place.run_name = None, self.run_name

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config[self.subcommand]
        kept = config.clone()
        if self.resumed is not None:  # the run's own checkpoint, which is no part of how the run is made again
            kept.ckpt_path = None
        dump = _without_passwords(self._parser(self.subcommand).dump(kept, skip_none=False), config)
        folder = RunFolder(Path(config.run_root), self.run_name, dump, self.resumed, config.privacy)
        callbacks: list[Any] = [folder, ExactResume(), DataWait(), Results(folder)]
        if self.subcommand == "fit" and config.trainer.enable_checkpointing is not False:
            common: dict[str, Any] = {"auto_insert_metric_name": False, "enable_version_counter": False}
            callbacks += [
                ModelCheckpoint(filename="best", monitor=self.model.monitor, mode=self.model.mode, **common),
                ModelCheckpoint(filename="last", every_n_train_steps=config.checkpoint_every, **common),
                ModelCheckpoint(filename="last", every_n_epochs=1, **common),
                Preemption(),
            ]
        callbacks += self.model.callbacks()
        if self.resumed is not None:  # the run has its parameters, and MLflow refuses other values of them
            self.model._log_hyperparams = False
        self.trainer_defaults["callbacks"] = callbacks
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, ImportError) as why:  # what the Trainer says of its arguments
            raise _trainer_mistake(why) from why


def run_trainer(argv: Sequence[str]) -> int:
    """Parse and run one of fit, validate, test, predict."""
    keep_memory()
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    plugins.load()
    # Lightning starts the other ranks of a node with sys.argv, and warns where it is given arguments beside it
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(_useful)
    for noise in NOISE:
        warnings.filterwarnings("ignore", noise)
    before, sys.argv = sys.argv, [sys.argv[0], *_packaged_groups(argv)]
    try:
        SistaCLI(
            argv[0], BaseTask, BaseDataModule, subclass_mode_model=True, subclass_mode_data=True,
            save_config_callback=None, auto_configure_optimizers=False, seed_everything_default=0,
            parser_kwargs={"parser_mode": "omegaconf+", "prog": "sista", argv[0]: {"parser_mode": "omegaconf+"}},
        )  # fmt: skip
    except SystemExit as stop:  # --help and --print_config
        return int(stop.code or 0)
    except MisconfigurationException as why:
        raise mistake_in(why) or _trainer_mistake(why) from why
    except (yaml.YAMLError, UnicodeDecodeError) as why:
        raise SistaError(f"configuration: not YAML: {' '.join(str(why).split())[:200]}; check that place") from why
    except Exception as why:
        mistake = mistake_in(why) or _other_shape(why)
        if mistake is None or mistake is why:
            raise
        raise mistake from None
    finally:
        sys.argv = before
    return 0


def _trainer_mistake(why: Exception) -> SistaError:
    return SistaError(f"trainer: {' '.join(str(why).split())[:400]}; see `sista fit --help`")


def _check_folder(root: Path) -> None:
    """Refuse a folder of runs that can't be made, before the data are prepared.

    Raises:
        SistaError: it, or one above it, is a file or may not be written.
    """
    place = next(place for place in (root, *root.absolute().parents) if place.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise SistaError(f"--run_root {root}: {place} is no folder that can be written; give another")


def _without_passwords(dump: str, config: Any) -> str:
    """Return a run's configuration where the environment says the URI of a tracker that has a password in it."""
    given = config.trainer.logger
    for logger in given if isinstance(given, list) else [given]:
        uri = str(logger.init_args.get("tracking_uri") or "") if hasattr(logger, "class_path") else ""
        if without_password(uri) != uri:
            dump = dump.replace(uri, "${oc.env:MLFLOW_TRACKING_URI}")
    return dump


def _other_shape(why: Exception) -> SistaError | None:
    """Return the mistake of a checkpoint that the configured model has other tensors than."""
    if not str(why).startswith("Error(s) in loading state_dict"):
        return None
    first = str(why).splitlines()[1].strip()[:200]
    return SistaError(
        f"--ckpt_path: the checkpoint does not fit the configured model ({first}); give its own configuration, "
        "--config runs/NAME/NUMBER/config.yaml"
    )


def _useful(record: logging.LogRecord) -> bool:
    """Whether a line of Lightning's tells the user something: no advertisements, no list of absent devices."""
    return not record.getMessage().startswith(("💡", "TPU available", "GPU available: False"))


def _first_config(argv: Sequence[str]) -> str:
    """Return the stem of the first `--config`, of a run's config.yaml the run's name; jsonargparse keeps neither."""
    path = _config(argv)
    if (run := runs.run_of_config(path)) is not None:
        return run.absolute().parent.name
    return "run" if path is None else path.stem


def _config(argv: Sequence[str]) -> Path | None:
    """Return what the first `--config` names."""
    for i, argument in enumerate(argv):
        option, _, value = argument.partition("=")
        if option in ("-c", "--config"):
            return Path(value or argv[i + 1])
    return None


def _packaged_groups(argv: Sequence[str]) -> list[str]:
    """Let `--data NAME.yaml` (model, trainer) name a packaged file, as `--config` does."""
    groups = ("--data", "--model", "--trainer")
    found = list(argv)
    for i, argument in enumerate(found):
        option, equals, value = argument.partition("=")
        if option in groups and equals and value.endswith(".yaml"):
            found[i] = f"{option}={packaged.find(value)}"
        elif argument.endswith(".yaml") and i and found[i - 1] in groups:
            found[i] = str(packaged.find(argument))
    return found
