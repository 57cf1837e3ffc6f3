"""What goes to MLflow: parameters, configuration, versions, data hash, pictures, the checkpoint.

Everything shown to a tracker that could hold patient data (a picture, a text, a table) passes `publish`.
"""

from __future__ import annotations

import io
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from pytorch_lightning.loggers import MLFlowLogger
from pytorch_lightning.utilities import rank_zero_only

from sista_pl.errors import SistaError
from sista_pl.plugins import code_hash
from sista_pl.privacy import answering, check_destination, told, without_ids

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

PACKAGES = ("sista-pl", "torch", "torchvision", "pytorch-lightning", "timm", "transformers", "tokenizers",
            "torchmetrics", "mlflow", "numpy", "pandas")  # fmt: skip


def open_store(uri: str, experiment: str, artifacts: str | None = None) -> None:
    """Make the tables of a sqlite store and its experiment, one process at a time.

    MLflow makes them when it first opens the file; two runs that start together would both try, and one would fail.
    """
    parts = urlparse(str(uri))
    if parts.scheme != "sqlite" or not parts.path.strip("/"):
        return
    import fcntl

    from mlflow.tracking import MlflowClient

    file = Path(parts.path.removeprefix("/"))
    with answering(uri):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_name(f"{file.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            client = MlflowClient(uri)
            if client.get_experiment_by_name(experiment) is None:
                client.create_experiment(experiment, artifacts)


def publish(trainer: Trainer, path: Path, folder: str = "") -> None:
    """Send a file to the run's MLflow artifacts; the only door through which a picture, text or table leaves.

    Ids in a table leave as keyed hashes, to a tracker on this machine, too.
    """
    logger = trainer.logger
    if isinstance(logger, MLFlowLogger) and trainer.is_global_zero:
        privacy, client = getattr(trainer, "sista_privacy", "local_only"), logger.experiment
        check_destination(logger._tracking_uri, privacy)
        check_destination(client.get_run(logger.run_id).info.artifact_uri, privacy, "the run's artifacts, ")
        with tempfile.TemporaryDirectory(prefix="sista-") as room:
            shown = without_ids(path, Path(room), getattr(trainer, "sista_id_key", None))
            client.log_artifact(logger.run_id, str(shown), folder or None)


def check_registry(name: str, alias: str, privacy: str = "local_only") -> str:
    """Set MLflow to MLFLOW_TRACKING_URI, or to the store of the runs where it isn't set, and return the URI.

    Args:
        name: of the model to register.
        alias: of its version.
        privacy: see `check_destination`.

    Raises:
        SistaError: a tracker or registry on another machine, a name or alias that MLflow refuses.
    """
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.utils.validation import _validate_model_alias_name, _validate_model_name

    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    for place in (uri, os.environ.get("MLFLOW_REGISTRY_URI") or uri):
        check_destination(place, privacy)
    try:
        _validate_model_name(name)
        _validate_model_alias_name(alias)
    except MlflowException as why:
        raise SistaError(f"export: MLflow takes no model {name}@{alias} ({told(why)}); give another name") from None
    if alias.lower() == "latest":
        raise SistaError("export: --alias latest is MLflow's own; give another, as champion")
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(os.environ.get("MLFLOW_REGISTRY_URI", ""))
    return uri


def register_model(
    saved: Mapping[str, Any], run: Path | None, description: str, name: str, alias: str, privacy: str = "local_only"
) -> dict[str, str]:
    """Log a pyfunc model to the tracker, as the next version of a registered model, and give that the alias.

    Args:
        saved: arguments of `mlflow.pyfunc.save_model`, without the path.
        run: folder of the run that trained it; the model goes into its MLflow run where this tracker has it, else
            into a new one.
        description: of the version, Markdown.
        name: of the registered model.
        alias: moved to this version.
        privacy: see `check_destination`.

    Returns:
        name, version, alias, uri and run.

    Raises:
        SistaError: as `check_registry`; artifacts on another machine; a store that can't be written.
    """
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model
    from mlflow.tracking import MlflowClient

    uri = check_registry(name, alias, privacy)
    open_store(uri, "sista")
    try:
        client = MlflowClient()
        training = _training(client, run)
        if training is not None:
            experiment = training.info.experiment_id
        else:
            found = client.get_experiment_by_name("sista")
            experiment = client.create_experiment("sista") if found is None else found.experiment_id
        place = client.get_experiment(experiment).artifact_location
        check_destination(place, privacy, "the artifacts of its experiment, ")
        if training is None:
            training = client.create_run(experiment, run_name=f"export {name}")
            client.set_terminated(training.info.run_id)
        run_id = training.info.run_id
        logged = client.create_logged_model(
            experiment, "sista", run_id, params=training.data.params, model_type="encoder"
        )
        with _silent():
            info = Model.log(
                None, mlflow.pyfunc, name, run_id=run_id, model_id=logged.model_id, metadata=saved["metadata"],
                **{k: v for k, v in saved.items() if k != "metadata"},
            )  # fmt: skip
        number = str(info.registered_model_version)
        client.set_registered_model_alias(name, alias, number)
        client.update_model_version(name, number, description)
    except MlflowException as why:
        raise SistaError(
            f"export: {name}@{alias} can't be registered in {uri} ({told(why)}); nothing is written to --out, mend it "
            "and export again"
        ) from why
    return {"name": name, "version": number, "alias": alias, "uri": uri, "run": run_id}


def _training(client: Any, run: Path | None) -> Any:
    """Return the MLflow run of a run folder where the tracker has it, else None."""
    from mlflow.exceptions import MlflowException

    if run is None or not (run / "mlflow_run_id").is_file():
        return None
    try:
        return client.get_run((run / "mlflow_run_id").read_text().strip())
    except MlflowException as why:
        if why.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


@contextmanager
def _silent() -> Iterator[None]:
    """Keep MLflow's progress from the user; what matters is raised."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


@rank_zero_only
def record_run(trainer: Trainer, config_path: Path, name: str) -> None:
    """Record what the run was made of: configuration, package versions, data hash."""
    logger = trainer.logger
    if not isinstance(logger, MLFlowLogger):
        return
    tags = {f"version.{name}": told for name, told in versions().items()}
    store = getattr(trainer.datamodule, "store", None)
    if store is not None:
        tags |= {
            "data.hash": store.hash,
            "data.split": " ".join(trainer.datamodule.split_told[key] for key in ("name", "sha256")),
            "data.source": f"{store.name} {store.version}",
            "data.phantom": str(store.phantom),
        }
    tags["config"] = name
    for key, value in tags.items():
        logger.experiment.set_tag(logger.run_id, key, value)
    publish(trainer, config_path)


def versions() -> dict[str, str]:
    """Return the versions of the packages that make a result, and as `code` the hash of our sources and plug-ins'."""
    return {**{package: _version(package) for package in PACKAGES}, "code": code_hash()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def describe(value: Any) -> Any:
    """Return the value as JSON can hold it."""
    return value.item() if hasattr(value, "item") else value
