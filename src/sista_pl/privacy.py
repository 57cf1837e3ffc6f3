"""What may leave this machine: nothing of a patient, unless it is allowed; ids leave as keyed hashes only."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pandas as pd

from sista_pl.errors import SistaError, did_you_mean, disk_full

PRIVACY = ("local_only", "allow_patient_data")
ID_COLUMNS = ("image_id", "patient_id", "study_id", "image")
# besides MLFlowLogger, the loggers of Lightning that write files and nothing else
FILE_LOGGERS = ("CSVLogger", "TensorBoardLogger")
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"

# MLflow would send figures of its own use to its makers
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def default_privacy() -> str:
    """Return what SISTA_PRIVACY says, `local_only` where it isn't set.

    Raises:
        SistaError: it says something else than `local_only` or `allow_patient_data`.
    """
    privacy = os.environ.get("SISTA_PRIVACY") or PRIVACY[0]
    if privacy not in PRIVACY:
        raise SistaError(f"SISTA_PRIVACY: unknown value {privacy!r}; {did_you_mean(privacy, PRIVACY)}")
    return privacy


def is_local(uri: str) -> bool:
    """Whether what is written to the URI, of a tracker or of artifacts, stays on this machine.

    It does where the URI is sqlite, a file or folder, or a loopback address; `mlflow-artifacts:` without a host is the
    tracker's own.
    """
    parts = urlparse(str(uri))
    if uri in ("databricks", "databricks-uc", "uc"):  # names that mlflow sends elsewhere
        return False
    if parts.scheme in ("", "sqlite", "file") or (parts.scheme == "mlflow-artifacts" and not parts.netloc):
        return not parts.netloc or parts.netloc == "localhost"
    # a backslash ends the host for some clients and not for others
    if parts.scheme not in ("http", "https", "mlflow-artifacts") or "\\" in parts.netloc:
        return False
    host = parts.hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_destination(uri: str, privacy: str, what: str = "") -> None:
    """Refuse a place on another machine unless patient data may go there.

    Args:
        uri: of a tracker, or of its artifacts.
        privacy: `local_only` or `allow_patient_data`.
        what: it is, where it isn't the tracker.

    Raises:
        SistaError: under `local_only`, a place that isn't local or that is reached over a proxy.
    """
    if privacy == "allow_patient_data":
        return
    if not is_local(uri):
        raise SistaError(
            f"tracking: {what}{without_password(uri)} is not on this machine and pictures and report texts would go "
            "there; set MLFLOW_TRACKING_URI to sqlite:///… or a loopback address, or --privacy allow_patient_data if "
            "that is right"
        )
    if urlparse(str(uri)).scheme in ("http", "https"):
        from requests.utils import get_environ_proxies, select_proxy  # what mlflow asks with

        if select_proxy(uri, get_environ_proxies(uri)):
            raise SistaError(
                f"tracking: {without_password(uri)} would be asked for over the proxy of HTTP_PROXY, another machine; "
                "set NO_PROXY=localhost,127.0.0.1"
            )


def check_logger(class_path: str, arguments: Mapping[str, Any], privacy: str) -> None:
    """Refuse a logger of the configuration that could write to another machine.

    Raises:
        SistaError: under `local_only`, a remote URI or folder, or a class that isn't known to write files alone.
    """
    name = class_path.rsplit(".", 1)[-1]
    if name == "MLFlowLogger":
        # without a URI Lightning takes the folder
        check_destination(arguments.get("tracking_uri") or f"file:{arguments.get('save_dir')}", privacy)
        check_destination(arguments.get("artifact_location") or "", privacy, "artifact_location ")
    elif name in FILE_LOGGERS:
        check_destination(str(arguments.get("save_dir")), privacy, f"{name}: save_dir ")
    elif privacy != "allow_patient_data":
        raise SistaError(
            f"tracking: {name} may write to another machine; use MLFlowLogger, {' or '.join(FILE_LOGGERS)}, or "
            "--privacy allow_patient_data if that is right"
        )


def check_artifacts(uri: str, experiment: str, run: str | None, privacy: str) -> bool:
    """Refuse a tracker that is here and has its artifacts elsewhere: `publish` would, after the first epoch.

    Args:
        uri: of the tracker.
        experiment: its name; one that is not there yet passes.
        run: id of the run that goes on, or None for a new one.
        privacy: see `check_destination`.

    Returns:
        Whether the tracker has the run that goes on.

    Raises:
        SistaError: under `local_only`, artifacts on another machine; a tracker that doesn't answer.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    with answering(uri):
        client = MlflowClient(uri)
        try:
            held = None if run is None else client.get_run(run)
        except MlflowException as why:
            if why.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            held = None
        found = None if held is not None else client.get_experiment_by_name(experiment)
    place = held.info.artifact_uri if held is not None else "" if found is None else found.artifact_location
    check_destination(place, privacy, f"the artifacts of {experiment!r}, ")
    return held is not None


@contextmanager
def answering(uri: str) -> Iterator[None]:
    """Say in a line that a tracker can't be used, soon: MLflow would try for minutes, as is right in a training."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    given = os.environ.get(RETRIES)
    os.environ.setdefault(RETRIES, "1")
    try:
        yield
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as why:
        if disk_full(why):
            raise
        said = without_password(f"{uri} can't be used ({told(why)})")
        raise SistaError(f"tracking: {said}; set MLFLOW_TRACKING_URI to another") from why
    finally:
        if given is None:
            del os.environ[RETRIES]


def without_password(text: str) -> str:
    """Return a URI, or a text with one, without the user and password that it may have."""
    return re.sub(r"//[^/@\s]*@", "//", str(text))


def without_ids(path: Path, room: Path, key: Path | None) -> Path:
    """Return a copy of a table in which the ids are hashed, any other file as it is."""
    if path.suffix not in (".parquet", ".csv"):
        return path
    csv = path.suffix == ".csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False) if csv else pd.read_parquet(path)
    if columns := [column for column in ID_COLUMNS if column in table]:
        secret = id_key(key)
        for column in columns:
            table[column] = [hashed_id(value, secret) for value in table[column]]
        path = room / path.name
        table.to_csv(path, index=False) if csv else table.to_parquet(path, index=False)
    return path


def hashed_id(value: object, key: bytes) -> str:
    """Return 16 hexadecimal digits that stand for an id: without the key nobody can try ids until one fits."""
    return hashlib.blake2b(str(value).encode(), key=key, digest_size=8).hexdigest()


def id_key(file: Path | None) -> bytes:
    """Return the 32 random bytes of a file, which is made where it is not there; for None, bytes that nobody keeps.

    Whoever has the file can tell whose hash it is, so it is readable by its owner alone and never published.
    """
    if file is None:
        return secrets.token_bytes(32)
    import fcntl

    file.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # another run may make it, too
        if not (key := held.read()):
            held.write(key := secrets.token_bytes(32))
    return key


def told(why: Exception) -> str:
    """Return what an exception of MLflow's says, without its traceback."""
    return (str(why).strip().splitlines() or [type(why).__name__])[0][:300]
