"""The model hub, where there is one: without a network its client would retry for most of a minute."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse


def reachable() -> bool:
    """Whether the hub's host name resolves, or a proxy would do that for us."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


@contextmanager
def offline_where_unreachable() -> Iterator[None]:
    """Use what is in the hub's local cache, and fail at once for the rest, where the hub can't be reached."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not reachable()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def fetch(source: str, name: str) -> Path | None:
    """Return a file of a local folder or of a hub repository, or None where it has none or can't be reached."""
    if Path(source).is_dir():
        file = Path(source) / name
        return file if file.is_file() else None
    from huggingface_hub import hf_hub_download

    try:
        with offline_where_unreachable():
            return Path(hf_hub_download(source, name))
    except (OSError, ValueError):  # no such file, no such repository, not reached; no name of a repository
        return None
