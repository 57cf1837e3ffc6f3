"""A release to a prepared store: each image decoded once, in parallel; atomic, resumable, the same bytes every time.

Work goes on in `<out>.partial/` (shards.py), by one process or by several that each take a part of the shards;
renaming the folder to `<out>` makes it a store.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from sista_pl.data.formats import Release
from sista_pl.data.shards import RESIZE, Shards, relative
from sista_pl.data.store import SCHEMA, Store
from sista_pl.errors import SistaError, disk_full, unwritable


def prepare(
    release: Release,
    out: str | Path,
    size: int = 256,
    workers: int = 0,
    max_bad: float = 0.01,
    progress: bool = True,
    shard_rows: int = 4096,
) -> Store:
    """Decode the images of a release into a store, or return the store that is there already.

    Args:
        release: what a reader found.
        out: folder of the store; must not exist, or hold the store of the same rows and size.
        size: side of the stored squares in pixels.
        workers: threads (Pillow decodes and resizes outside the interpreter's lock); 0 works in the caller's.
        max_bad: share of unreadable images above which the run stops; below it they are left out and listed in
            `skipped.csv`.
        progress: show a bar.
        shard_rows: rows of the release in a shard, at most; fewer where 1 GiB would not hold them.

    Raises:
        SistaError: no rows, too many bad images, `out` holds something else or is being written, disk full.
    """
    store = prepare_part(release, out, (0, 1), size, workers, max_bad, progress, shard_rows)
    assert store is not None
    return store


def prepare_part(
    release: Release,
    out: str | Path,
    part: tuple[int, int],
    size: int = 256,
    workers: int = 0,
    max_bad: float = 0.01,
    progress: bool = True,
    shard_rows: int = 4096,
) -> Store | None:
    """Do part i of n of `prepare`, as one task of an array job; the last to end makes the store.

    The parts may run at the same time, on several machines that share the file system, in any order; one that was
    killed is run again. The bytes are those of `prepare`.

    Args:
        part: (i, n), 0 <= i < n; the other arguments as in `prepare`, alike in all parts.

    Returns:
        the store, or None while other parts are missing.

    Raises:
        SistaError: as `prepare`; a part outside 0 … n-1.
    """
    out, (index, parts) = Path(out), part
    if not 0 <= index < parts:
        raise SistaError(f"shard {index}/{parts}: not a part; the first of {max(parts, 1)} is 0/{max(parts, 1)}")
    if not release.rows:
        reasons = Counter(why.split(": ", 1)[-1] for _, why in release.skipped).most_common(1)
        why = f", {len(release.skipped)} were left out, most as: {reasons[0][0]}" if reasons else ""
        raise SistaError(f"{release.name}: no image to prepare{why}; check root and the reader's options")
    if size < 1:
        raise SistaError(f"size {size}: not a size; give pixels, 256 for example")
    fingerprint = _fingerprint(release, size)
    partial = out.with_name(out.name + ".partial")
    shards = Shards(release, partial, size, max_bad, shard_rows, fingerprint)
    busy = f"{partial}: another process is at work in it; wait or give another folder"
    try:
        if store := _finished(out, fingerprint):
            return store
        partial.mkdir(parents=True, exist_ok=True)
        if parts > 1:
            # a part that ends has it alone for as long as it looks whether others are missing
            with _locked(partial / ".lock", shared=True, patience=5.0) as free:
                if store := _finished_meanwhile(out, fingerprint, partial):
                    return store
                with _locked(partial / f".lock-{index}of{parts}") as mine:
                    if not free or not mine:
                        raise SistaError(busy)
                    shards.write(range(index, len(shards), parts), workers, progress)
        with _locked(partial / ".lock") as alone:
            if store := _finished_meanwhile(out, fingerprint, partial):
                return store
            if not alone and parts == 1:
                raise SistaError(busy)
            # another part is still at work, or is finishing the store
            if not alone or (parts > 1 and shards.missing()):
                return None
            shards.clean()
            shards.write(range(len(shards)), workers, progress and parts == 1)
            shards.finish()
            os.rename(partial, out)
            # not before: who starts while there is no lock takes one of his own, and the folder with it
            for lock in out.glob(".lock*"):
                lock.unlink()
    except OSError as why:
        if not disk_full(why):
            raise unwritable(why.filename or out, why) from None
        raise SistaError(f"{out}: disk full; free some space and run again, {partial} goes on from there") from None
    return Store.open(out)


def _finished(out: Path, fingerprint: str) -> Store | None:
    """Return the store at `out` if it is of these inputs, None if nothing is there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / "store.json").is_file():
        raise SistaError(f"{out}: exists and is no store; give another folder")
    store = Store.open(out)
    if store.info["fingerprint"] != fingerprint:
        raise SistaError(
            f"{out}: holds another store ({store.name} {store.version}, {len(store)} images of {store.size} px); "
            "give another folder or delete it"
        )
    return store


def _finished_meanwhile(out: Path, fingerprint: str, partial: Path) -> Store | None:
    """The same after the wait for a lock, for which the working folder may have been made anew."""
    if store := _finished(out, fingerprint):
        shutil.rmtree(partial, ignore_errors=True)
    return store


def _fingerprint(release: Release, size: int) -> str:
    """Hash all that the store's bytes follow from, but the pixels; where the data lie does not count."""
    head = [SCHEMA, size, RESIZE, release.name, release.version, release.phantom, release.options]
    digest = hashlib.sha256(_json(head))
    for row in release.rows:
        mask = relative(release, row.mask) if isinstance(row.mask, Path) else row.mask and asdict(row.mask)
        for part in (row.image_id, row.patient_id, row.study_id, relative(release, row.image), row.view, row.split):
            digest.update(part.encode() + b"\0")
        digest.update(_json([row.findings, row.impression, row.labels, mask, row.boxes, row.source]))
    digest.update(_json(release.skipped))
    return digest.hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, default=str, ensure_ascii=False, sort_keys=True).encode()


@contextmanager
def _locked(file: Path, shared: bool = False, patience: float = 0.0) -> Iterator[bool]:
    """Hold a lock, if it is free within `patience` seconds; it goes with the process, however that ends."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # NFSv4 gives a shared lock only to who may read, the other only to who may write
    with file.open("a+") as lock:
        end = time.monotonic() + patience
        while not (free := _lock(lock, shared)) and time.monotonic() < end:
            time.sleep(0.05)
        yield free


def _lock(file: TextIO, shared: bool) -> bool:
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as why:
        # some cluster file systems have no such lock
        warnings.warn(f"{file.name}: cannot be locked ({why}); start no second run on it", stacklevel=2)
    return True
