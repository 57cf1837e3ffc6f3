"""The working folder of a preparation: shards of decoded images, each with a note, and at the end what makes a store.

A shard is written under a temporary name, renamed, then noted in `shard-<number>.json`; a run that was killed goes on
with the shards that have no note.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sista_pl.atomic import writing
from sista_pl.data.formats import SPLITS, Release, Row
from sista_pl.data.images import IGNORE, BadImage, fit, fit_box, fit_mask, image_size, read_gray, read_mask
from sista_pl.data.masks import Rle
from sista_pl.data.splits import split_hash
from sista_pl.data.store import SCHEMA
from sista_pl.errors import SistaError

RESIZE = "long side to size (JPEG draft, Lanczos), centred, padded with 0; masks by nearest neighbour"
# A shard is built in memory, so that large images come in shards of fewer rows.
MAX_SHARD_BYTES = 2**30
# What the working folder may hold; the rest is somebody's and is not deleted.
_OURS = re.compile(
    r"\.lock(-\d+of\d+)?|"
    r"\.?(shard-\d+\.json|(images|masks)-\d+\.npy|manifest\.parquet|skipped\.csv|files\.json|store\.json)"
    r"(\.[0-9a-f]{8}\.partial)?"
)


def relative(release: Release, path: Path) -> str:
    return str(path).removeprefix(f"{release.root}{os.sep}")


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file under a temporary name and rename it; return its size and SHA-256."""
    digest, size = hashlib.sha256(), 0
    with writing(path) as partial, partial.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _write_json(path: Path, value: dict[str, Any]) -> dict[str, Any]:
    return _write(path, [f"{json.dumps(value, indent=1, ensure_ascii=False, default=str)}\n".encode()])


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


class Shards:
    """The shards of one release at one size.

    Args:
        release: what a reader found.
        folder: the working folder.
        size: side of the stored squares in pixels.
        max_bad: share of unreadable images among the release's above which a run stops.
        shard_rows: rows of the release in a shard, at most.
        fingerprint: of all that the bytes follow from, but the pixels.
    """

    def __init__(self, release: Release, folder: Path, size: int, max_bad: float, shard_rows: int, fingerprint: str):
        self.release = release
        self.folder = folder
        self.size = size
        self.max_bad = max_bad
        self.shard_rows = max(1, min(shard_rows, MAX_SHARD_BYTES // size**2))
        self.fingerprint = fingerprint
        self.with_masks = any(row.mask is not None for row in release.rows)

    def __len__(self) -> int:
        return -(-len(self.release.rows) // self.shard_rows)

    def write(self, numbers: Iterable[int], workers: int, progress: bool) -> None:
        """Write those of the shards that have no note yet; others may write other shards at the same time."""
        numbers = list(numbers)
        done = {number: note for number in numbers if (note := self._note(number)) and self._still_bad(note)}
        rows = {number: self._rows(number) for number in numbers}
        bad = dict[int, str]()
        with ExitStack() as stack:
            # an image of too many pixels is refused by images.py; Pillow's own warning would only repeat it
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # the same for headers that are odd and yet readable
            warnings.filterwarnings("ignore", module=r"pydicom|gdcm")
            pool = stack.enter_context(ThreadPoolExecutor(workers)) if workers > 0 else None
            advance = stack.enter_context(_bar(sum(map(len, rows.values())), progress))
            for number in numbers:
                note = done.get(number)
                if note is None:
                    note = self._shard(number, rows[number], pool.map if pool else map, advance)
                    head = {"fingerprint": self.fingerprint, "shard_rows": self.shard_rows}
                    _write(self._note_file(number), [json.dumps(head | note, ensure_ascii=False).encode()])
                else:
                    advance(len(rows[number]))
                bad |= {int(index): why for index, why in note["bad"].items()}
                self._check_bad(bad)

    def missing(self) -> list[int]:
        """Return the shards without a note."""
        return [number for number in range(len(self)) if self._note(number) is None]

    def clean(self) -> None:
        """Delete what former runs on other inputs, or killed ones, left in the folder.

        Raises:
            SistaError: a file that no preparation wrote.
        """
        wanted = set[str]()
        for number in range(len(self)):
            if note := self._note(number):
                wanted |= {self._note_file(number).name, *note["files"]}
        for file in sorted(self.folder.iterdir()):
            if not _OURS.fullmatch(file.name):
                raise SistaError(f"{file}: not written by a preparation; move it elsewhere or give another folder")
            if file.name not in wanted and not file.name.startswith(".lock"):
                file.unlink()

    def _rows(self, number: int) -> range:
        start = number * self.shard_rows
        return range(start, min(start + self.shard_rows, len(self.release.rows)))

    def _note_file(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.json"

    def _note(self, number: int) -> dict[str, Any] | None:
        """Return what is noted of a shard, if it is of the same inputs and its files are whole."""
        try:
            note = json.loads(self._note_file(number).read_bytes())
            same = (note["fingerprint"], note["shard_rows"]) == (self.fingerprint, self.shard_rows)
            return note if same and self._whole(note) else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def _whole(self, note: dict[str, Any]) -> bool:
        files = [(self.folder / name, file["bytes"]) for name, file in note["files"].items()]
        return all(path.is_file() and path.stat().st_size == size for path, size in files)

    def _still_bad(self, note: dict[str, Any]) -> bool:
        """False where an image that a former run left out can be read now, so that the shard is written anew."""
        for index in note["bad"]:
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
            name = "mask" if isinstance(row.mask, Rle) else f"mask {relative(self.release, row.mask)}"
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

    def _check_bad(self, bad: dict[int, str]) -> None:
        total = len(self.release.rows)
        if len(bad) <= self.max_bad * total:
            return
        listing = self.folder / "skipped.csv"
        _write(listing, [self._skipped_csv(bad)])
        index, why = next(iter(bad.items()))
        raise SistaError(
            f"{relative(self.release, self.release.rows[index].image)}: {why}; it and {len(bad) - 1} more of "
            f"{total} images are bad, more than the share {self.max_bad:g}: see {listing}, repair or raise --max-bad"
        )

    def _skipped(self, bad: dict[int, str]) -> list[tuple[str, str]]:
        rows = self.release.rows
        return self.release.skipped + [
            (rows[i].image_id, f"{relative(self.release, rows[i].image)}: {why}") for i, why in bad.items()
        ]

    def _skipped_csv(self, bad: dict[int, str]) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([("what", "why"), *self._skipped(bad)])
        return text.getvalue().encode()

    def finish(self) -> None:
        """Write manifest, list of what was left out, list of the files, and last `store.json`; the notes go."""
        notes = [note for number in range(len(self)) if (note := self._note(number))]
        bad = {int(index): why for note in notes for index, why in note["bad"].items()}
        known = {int(index): facts for note in notes for index, facts in note["facts"].items()}
        kept = [row for index, row in enumerate(self.release.rows) if index not in bad]
        facts = [known[index] for index in range(len(self.release.rows)) if index not in bad]
        self._check_bad(bad)
        if not kept:
            listing = self.folder / "skipped.csv"
            _write(listing, [self._skipped_csv(bad)])
            raise SistaError(f"{self.release.root}: not one image can be read; see {listing}")
        files = {name: file for note in notes for name, file in note["files"].items()}
        files["manifest.parquet"] = _write(self.folder / "manifest.parquet", [_manifest(kept, facts)])
        files["skipped.csv"] = _write(self.folder / "skipped.csv", [self._skipped_csv(bad)])
        counts = Counter(row.split for row in kept)
        kinds = ["images", "masks"] if self.with_masks else ["images"]
        shards = [
            {"rows": note["rows"], **{kind: f"{kind}-{note['shard']:05d}.npy" for kind in kinds}}
            for note in notes
            if note["rows"]
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
            "skipped": len(self._skipped(bad)),
            "has_masks": self.with_masks,
            "options": self.release.options,
            "fingerprint": self.fingerprint,
            "rows": len(kept),
            "contents": _write_json(self.folder / "files.json", {"files": files, "shards": shards})["sha256"],
        }
        _write_json(self.folder / "store.json", store)
        for number in range(len(self)):
            self._note_file(number).unlink()


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
