"""What goes to MLflow: parameters, configuration, versions, data hash, pictures, the checkpoint.

Everything shown to a tracker that could hold patient data (a picture, a text, a table) passes `publish`.
"""

from __future__ import annotations

import ipaddress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from pytorch_lightning.loggers import MLFlowLogger
from pytorch_lightning.utilities import rank_zero_only

from sista_pl.errors import SistaError

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

PACKAGES = ("sista-pl", "torch", "torchvision", "pytorch-lightning", "timm", "transformers", "tokenizers",
            "torchmetrics", "mlflow", "numpy", "pandas")  # fmt: skip
PRIVACY = ("local_only", "allow_patient_data")


def is_local(uri: str) -> bool:
    """Whether what is written to the tracking URI stays on this machine: sqlite, a file or folder, or loopback."""
    parts = urlparse(str(uri))
    if uri in ("databricks", "databricks-uc", "uc"):  # names that mlflow sends elsewhere
        return False
    if parts.scheme in ("", "sqlite", "file"):
        return not parts.netloc or parts.netloc == "localhost"
    if parts.scheme not in ("http", "https"):
        return False
    host = parts.hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_destination(uri: str, privacy: str) -> None:
    """Refuse a tracker on another machine unless patient data may go there.

    Raises:
        SistaError: a remote URI under `privacy: local_only`.
    """
    if privacy != "allow_patient_data" and not is_local(uri):
        raise SistaError(
            f"tracking: {uri} is not on this machine and pictures and report texts would go there; set "
            "MLFLOW_TRACKING_URI to sqlite:///… or a loopback address, or --privacy allow_patient_data if that is right"
        )


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
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_name(f"{file.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            client = MlflowClient(uri)
            if client.get_experiment_by_name(experiment) is None:
                client.create_experiment(experiment, artifacts)
    except OSError as why:
        raise SistaError(f"tracking: {uri} can't be written ({why.strerror}); set MLFLOW_TRACKING_URI") from why


def publish(trainer: Trainer, path: Path, folder: str = "") -> None:
    """Send a file to the run's MLflow artifacts; the only door through which a picture, text or table leaves."""
    logger = trainer.logger
    if isinstance(logger, MLFlowLogger) and trainer.is_global_zero:
        check_destination(logger._tracking_uri, getattr(trainer, "sista_privacy", "local_only"))
        logger.experiment.log_artifact(logger.run_id, str(path), folder or None)


@rank_zero_only
def record_run(trainer: Trainer, config_path: Path, name: str) -> None:
    """Record what the run was made of: configuration, package versions, data hash."""
    logger = trainer.logger
    if not isinstance(logger, MLFlowLogger):
        return
    tags = {f"version.{package}": _version(package) for package in PACKAGES}
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
    """Return the versions of the packages that make a result."""
    return {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def describe(value: Any) -> Any:
    """Return the value as JSON can hold it."""
    return value.item() if hasattr(value, "item") else value
