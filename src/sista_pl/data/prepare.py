"""A release to a prepared store: each image decoded once, in parallel; atomic, resumable, the same bytes every time.

Work goes on in `<out>.partial/`. A shard is written under a temporary name, renamed, then noted in `journal.jsonl`;
a run that was killed goes on after the last noted shard. Renaming the folder to `<out>` makes it a store.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sista_pl.data.formats import SPLITS, Release, Row
from sista_pl.data.images import IGNORE, BadImage, fit, fit_box, fit_mask, image_size, read_gray, read_mask
from sista_pl.data.masks import Rle
from sista_pl.data.splits import split_hash
from sista_pl.data.store import SCHEMA, Store
from sista_pl.errors import SistaError

RESIZE = "long side to size (JPEG draft, Lanczos), centred, padded with 0; masks by nearest neighbour"
# A shard is built in memory, so that large images come in shards of fewer rows.
MAX_SHARD_BYTES = 2**30
# What the working folder may hold; the rest is somebody's and is not deleted.
_OURS = re.compile(
    r"\.lock|(journal\.jsonl|(images|masks)-\d+\.npy|manifest\.parquet|skipped\.csv|store\.json)(\.tmp)?"
)


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
    out = Path(out)
    if not release.rows:
        reasons = Counter(why.split(": ", 1)[-1] for _, why in release.skipped).most_common(1)
        why = f", {len(release.skipped)} were left out, most as: {reasons[0][0]}" if reasons else ""
        raise SistaError(f"{release.name}: no image to prepare{why}; check root and the reader's options")
    if size < 1:
        raise SistaError(f"size {size}: not a size; give pixels, 256 for example")
    shard_rows = max(1, min(shard_rows, MAX_SHARD_BYTES // size**2))
    fingerprint = _fingerprint(release, size)
    if store := _finished(out, fingerprint):
        return store
    partial = out.with_name(out.name + ".partial")
    try:
        with _locked(partial):
            # another process may have finished it between the first look and the lock
            if store := _finished(out, fingerprint):
                shutil.rmtree(partial)
                return store
            _Preparation(release, partial, size, max_bad, shard_rows, fingerprint).run(workers, progress)
            (partial / ".lock").unlink()
            os.rename(partial, out)
    except OSError as why:
        if why.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise SistaError(f"{out}: cannot be written ({why.strerror}); give another folder") from None
        if why.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
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


def _fingerprint(release: Release, size: int) -> str:
    """Hash all that the store's bytes follow from, but the pixels; where the data lie does not count."""
    head = [SCHEMA, size, RESIZE, release.name, release.version, release.phantom, release.options]
    digest = hashlib.sha256(_json(head))
    for row in release.rows:
        mask = _relative(release, row.mask) if isinstance(row.mask, Path) else row.mask and asdict(row.mask)
        for part in (row.image_id, row.patient_id, row.study_id, _relative(release, row.image), row.view, row.split):
            digest.update(part.encode() + b"\0")
        digest.update(_json([row.findings, row.impression, row.labels, mask, row.boxes, row.source]))
    digest.update(_json(release.skipped))
    return digest.hexdigest()


def _relative(release: Release, path: Path) -> str:
    return str(path).removeprefix(f"{release.root}{os.sep}")


def _json(value: Any) -> bytes:
    return json.dumps(value, default=str, ensure_ascii=False, sort_keys=True).encode()


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Hold the working folder; the lock goes with the process, however it ends."""
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SistaError(f"{partial}: another process is at work in it; wait or give another folder") from None
        except OSError as why:
            # some cluster file systems have no such lock
            warnings.warn(f"{partial}: cannot be locked ({why}); start no second run on it", stacklevel=2)
        yield


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file under a temporary name and rename it; return its size and SHA-256."""
    temporary = path.with_name(path.name + ".tmp")
    digest, size = hashlib.sha256(), 0
    with temporary.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _npy(array: np.ndarray) -> list[bytes | memoryview]:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return [header.getvalue(), np.ascontiguousarray(array).data.cast("B")]


@dataclass(frozen=True, slots=True)
class _Decoded:
    image: np.ndarray
    mask: np.ndarray | None
    boxes: list[dict[str, Any]] | None
    size: tuple[int, int]  # width and height of the upright image


class _Preparation:
    """One run over the rows, shard by shard."""

    def __init__(self, release: Release, folder: Path, size: int, max_bad: float, shard_rows: int, fingerprint: str):
        self.release = release
        self.folder = folder
        self.size = size
        self.max_bad = max_bad
        self.shard_rows = shard_rows
        self.fingerprint = fingerprint
        self.with_masks = any(row.mask for row in release.rows)
        self.facts: dict[int, dict[str, Any]] = {}
        self.bad: dict[int, str] = {}

    def run(self, workers: int, progress: bool) -> None:
        """Write every shard that is not there yet, the manifest, and last `store.json`."""
        starts = range(0, len(self.release.rows), self.shard_rows)
        done = self._resume()
        with ExitStack() as stack:
            # an image of too many pixels is refused by images.py; Pillow's own warning would only repeat it
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            pool = stack.enter_context(ThreadPoolExecutor(workers)) if workers > 0 else None
            advance = stack.enter_context(_bar(len(self.release.rows), progress))
            journal = stack.enter_context((self.folder / "journal.jsonl").open("ab"))
            for number, start in enumerate(starts):
                indices = range(start, min(start + self.shard_rows, len(self.release.rows)))
                entry = done.get(number)
                if entry is None:
                    entry = self._shard(number, indices, pool.map if pool else map, advance)
                    journal.write(_json(entry) + b"\n")
                    journal.flush()
                    done[number] = entry
                else:
                    advance(len(indices))
                self.bad |= {int(index): why for index, why in entry["bad"].items()}
                self.facts |= {int(index): facts for index, facts in entry["facts"].items()}
                self._check_bad()
        self._finish([done[number] for number in range(len(starts))])

    def _resume(self) -> dict[int, dict[str, Any]]:
        """Return the noted shards of a run on the same inputs; start the journal anew, without a half-written end."""
        journal = self.folder / "journal.jsonl"
        head = {"fingerprint": self.fingerprint, "shard_rows": self.shard_rows}
        entries: list[dict[str, Any]] = []
        try:
            lines = [json.loads(line) for line in journal.read_bytes().split(b"\n")[:-1]]
            entries = lines[1:] if lines[:1] == [head] else []
        except (FileNotFoundError, ValueError):
            pass
        kept = {entry["shard"]: entry for entry in entries if self._whole(entry) and self._still_bad(entry)}
        wanted = {"journal.jsonl", ".lock"}.union(*(entry["files"] for entry in kept.values()))
        for file in sorted(self.folder.iterdir()):
            if not _OURS.fullmatch(file.name):
                raise SistaError(f"{file}: not written by a preparation; move it elsewhere or give another folder")
            if file.name not in wanted:
                file.unlink()
        _write(journal, [_json(line) + b"\n" for line in [head, *kept.values()]])
        return kept

    def _whole(self, entry: dict[str, Any]) -> bool:
        files = [(self.folder / name, file["bytes"]) for name, file in entry["files"].items()]
        return all(path.is_file() and path.stat().st_size == size for path, size in files)

    def _still_bad(self, entry: dict[str, Any]) -> bool:
        """False where an image that a former run left out can be read now."""
        for index in entry["bad"]:
            try:
                self._decode(int(index))
                return False
            except BadImage:
                continue
        return True

    def _decode(self, index: int) -> _Decoded:
        row: Row = self.release.rows[index]
        image, mask = read_gray(row.image, self.size), None
        width, height = image_size(row.image)
        if row.mask is not None:
            name = "mask" if isinstance(row.mask, Rle) else f"mask {_relative(self.release, row.mask)}"
            try:
                if isinstance(row.mask, Rle):
                    mask_width, mask_height = row.mask.width, row.mask.height
                    mask = fit_mask(row.mask.decode(), self.size)
                else:
                    mask_width, mask_height = image_size(row.mask)
                    mask = read_mask(row.mask, self.size)
            except BadImage as why:
                raise BadImage(f"{name}: {why}") from None
            places = zip(fit(width, height, self.size)[1:], fit(mask_width, mask_height, self.size)[1:], strict=True)
            if any(abs(a - b) > 1 for a, b in places):
                raise BadImage(f"mask of {mask_width}×{mask_height} on an image of {width}×{height}")
        boxes = None if row.boxes is None else [fit_box(box, width, height, self.size) for box in row.boxes]
        return _Decoded(image, mask, boxes, (width, height))

    def _shard(self, number: int, indices: range, map_: Callable, advance: Callable[[int], None]) -> dict[str, Any]:
        shape = (len(indices), self.size, self.size)
        arrays = {"images": np.empty(shape, np.uint8)}
        if self.with_masks:
            arrays["masks"] = np.full(shape, IGNORE, np.uint8)

        def decode(index: int) -> str | dict[str, Any]:
            try:
                found = self._decode(index)
            except BadImage as why:
                return f"{why}"
            arrays["images"][index - indices.start] = found.image
            if found.mask is not None:
                arrays["masks"][index - indices.start] = found.mask
            return {"size": found.size, "boxes": found.boxes}

        bad, facts, good = {}, {}, []
        for index, found in zip(indices, map_(decode, indices), strict=True):
            if isinstance(found, str):
                bad[str(index)] = found
            else:
                good.append(index - indices.start)
                facts[str(index)] = found
            advance(1)
        files = {}
        for kind, array in arrays.items() if good else ():
            name = f"{kind}-{number:05d}.npy"
            files[name] = _write(self.folder / name, _npy(array if not bad else array[good]))
        return {"shard": number, "rows": len(good), "files": files, "bad": bad, "facts": facts}

    def _check_bad(self) -> None:
        total = len(self.release.rows)
        if len(self.bad) <= self.max_bad * total:
            return
        listing = self.folder / "skipped.csv"
        _write(listing, [self._skipped_csv()])
        index, why = next(iter(self.bad.items()))
        raise SistaError(
            f"{_relative(self.release, self.release.rows[index].image)}: {why}; it and {len(self.bad) - 1} more of "
            f"{total} images are bad, more than the share {self.max_bad:g}: see {listing}, repair or raise --max-bad"
        )

    def _skipped(self) -> list[tuple[str, str]]:
        rows = self.release.rows
        return self.release.skipped + [
            (rows[i].image_id, f"{_relative(self.release, rows[i].image)}: {why}") for i, why in self.bad.items()
        ]

    def _skipped_csv(self) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([("what", "why"), *self._skipped()])
        return text.getvalue().encode()

    def _finish(self, entries: list[dict[str, Any]]) -> None:
        kept = [row for index, row in enumerate(self.release.rows) if index not in self.bad]
        facts = [self.facts[index] for index in range(len(self.release.rows)) if index not in self.bad]
        if not kept:
            raise SistaError(f"{self.release.root}: not one image can be read; see {self.folder}/skipped.csv")
        files = {name: file for entry in entries for name, file in entry["files"].items()}
        files["manifest.parquet"] = _write(self.folder / "manifest.parquet", [_manifest(kept, facts)])
        files["skipped.csv"] = _write(self.folder / "skipped.csv", [self._skipped_csv()])
        counts = Counter(row.split for row in kept)
        kinds = ["images", "masks"] if self.with_masks else ["images"]
        shards = [
            {"rows": entry["rows"], **{kind: f"{kind}-{entry['shard']:05d}.npy" for kind in kinds}}
            for entry in entries
            if entry["rows"]
        ]
        store = {
            "schema": SCHEMA,
            "created_by": f"sista-pl {metadata.version('sista-pl')}",
            "name": self.release.name,
            "version": self.release.version,
            "phantom": self.release.phantom,
            "size": self.size,
            "resize": RESIZE,
            "split": {
                "name": self.release.split,
                "sha256": split_hash([row.image_id for row in kept], [row.split for row in kept]),
            },
            "counts": {split: counts[split] for split in SPLITS if counts[split]},
            "skipped": len(self._skipped()),
            "has_masks": self.with_masks,
            "options": self.release.options,
            "fingerprint": self.fingerprint,
            "shards": shards,
            "files": files,
        }
        text = json.dumps(store, indent=1, ensure_ascii=False, default=str) + "\n"
        _write(self.folder / "store.json", [text.encode()])
        (self.folder / "journal.jsonl").unlink()


def _manifest(rows: list[Row], facts: list[dict[str, Any]]) -> bytes:
    import pandas as pd

    names = ("image_id", "patient_id", "study_id", "view", "split", "findings", "impression")
    columns: dict[str, Any] = {name: pd.array([getattr(row, name) for row in rows], dtype="string") for name in names}
    for label in dict.fromkeys(label for row in rows for label in row.labels):
        columns[f"label_{label}"] = np.array([row.labels.get(label, np.nan) for row in rows], np.float32)
    columns["has_mask"] = [row.mask is not None for row in rows]
    boxes = [None if fact["boxes"] is None else json.dumps(fact["boxes"]) for fact in facts]
    columns["boxes"] = pd.array(boxes, dtype="string")
    for place, name in enumerate(("width", "height")):
        columns[name] = np.array([fact["size"][place] for fact in facts], np.int32)
    columns["source"] = pd.array([row.source for row in rows], dtype="string")
    out = io.BytesIO()
    pd.DataFrame(columns).to_parquet(out, index=False)
    return out.getvalue()


@contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar with the remaining time; yields the function that advances it."""
    if not show:
        yield lambda _: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("preparing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("", total=total)
        yield lambda n: bar.advance(task, n)
