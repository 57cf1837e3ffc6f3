"""The prepared store: a manifest and uint8 images at one size; manifest row i is image i."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sista_pl.errors import SistaError

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 2
# Without one of these in `store.json` nothing can be read.
_KEYS = {"name", "version", "phantom", "size", "has_masks", "rows", "contents"}


class Store:
    """A folder that `sista data prepare` wrote.

    An image is one positioned read: where the page cache does not hold the shards yet, random access is some ten
    times faster than through a memory map, whose faults read ahead. Threads and forked workers may share a store;
    a spawned worker gets the path and opens the shards itself.
    Columns of the manifest: image_id, patient_id, study_id, view, split, findings, impression, `label_<finding>`
    (1, 0, NaN), has_mask, boxes (JSON in pixels of the store, null where unknown), width, height
    (of the upright original, in pixels), source.
    """

    def __init__(self, path: Path, info: dict[str, Any], digest: str):
        self.path = path
        self.info = info
        self.hash = digest
        self.size: int = info["size"]
        self.name: str = info["name"]
        self.version: str = info["version"]
        self.phantom: bool = info["phantom"]
        self.has_masks: bool = info["has_masks"]
        self._opened: dict[str, tuple[int, int]] = {}

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open a store: a file of a few lines is read, as quickly for a million images as for a thousand.

        Raises:
            SistaError: no store there, or one of another schema version.
        """
        path = Path(path)
        try:
            raw = (path / "store.json").read_bytes()
        except OSError:
            raise SistaError(f"{path}: not a prepared store; run `sista data prepare NAME --out {path}`") from None
        try:
            info = json.loads(raw)
            schema = info["schema"]
            if schema == SCHEMA and not info.keys() >= _KEYS:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise SistaError(f"{path}/store.json: not readable; delete {path} and prepare it again") from None
        if schema != SCHEMA:
            raise SistaError(
                f"{path}: store of schema version {schema}, this sista reads {SCHEMA}; "
                f"{'delete it and prepare it again' if isinstance(schema, int) and schema < SCHEMA else 'update sista'}"
            )
        return cls(path, info, hashlib.sha256(raw).hexdigest())

    @cached_property
    def contents(self) -> dict[str, Any]:
        """`files`, by name the bytes and SHA-256 of each, and `shards`, their rows and files; checked when first read.

        Sizes are compared, not hashes: a file that is missing or was cut is found, one that was changed is not.

        Raises:
            SistaError: a file is missing or of another size, or the list is not the one that `store.json` knows.
        """
        try:
            raw = (self.path / "files.json").read_bytes()
        except OSError:
            raw = b""
        if hashlib.sha256(raw).hexdigest() != self.info["contents"]:
            raise SistaError(
                f"{self.path}/files.json: missing or not this store's; delete {self.path} and prepare it again"
            )
        contents: dict[str, Any] = json.loads(raw)
        with os.scandir(self.path) as there:  # at once: a million rows are hundreds of files
            sizes = {entry.name: entry.stat().st_size for entry in there if entry.is_file()}
        for name, file in contents["files"].items():
            size = sizes.get(name, "no")
            if size != file["bytes"]:
                raise SistaError(
                    f"{self.path / name}: {size} bytes where files.json says {file['bytes']}; "
                    f"delete {self.path} and prepare it again"
                )
        return contents

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(shard["rows"] for shard in self.contents["shards"]))

    @cached_property
    def manifest(self) -> pd.DataFrame:
        """One row an image; read at the first use."""
        import pandas as pd

        self._check()
        return pd.read_parquet(self.path / "manifest.parquet")

    def _check(self) -> None:
        """Compare the sizes of the files, once."""
        _ = self.contents

    def __len__(self) -> int:
        return int(self.info["rows"])

    def image(self, index: int) -> np.ndarray:
        """Return image `index` as (size, size) uint8."""
        return self._read("images", index, np.empty((self.size, self.size), np.uint8))

    def images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return n images as (n, size, size) uint8."""
        out = np.empty((len(indices), self.size, self.size), np.uint8)
        for place, index in zip(out, indices, strict=True):
            self._read("images", int(index), place)
        return out

    def mask(self, index: int) -> np.ndarray:
        """Return the mask as (size, size) uint8: 0 background, 255 object, 127 ignore; all 127 without a mask.

        Raises:
            SistaError: no image of the store has one.
        """
        if not self.has_masks:
            raise SistaError(f"{self.path}: this store has no masks; prepare a release that has some")
        return self._read("masks", index, np.empty((self.size, self.size), np.uint8))

    def _read(self, kind: str, index: int, out: np.ndarray) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a store of {len(self)}")
        shard = bisect_right(self._ends, index)
        name = self.contents["shards"][shard][kind]
        if name not in self._opened:
            with (self.path / name).open("rb") as file:
                np.lib.format.read_magic(file)
                np.lib.format.read_array_header_1_0(file)
                start = file.tell()
                descriptor = os.dup(file.fileno())
            weakref.finalize(self, os.close, descriptor)
            self._opened[name] = descriptor, start
        descriptor, start = self._opened[name]
        row = index - (self._ends[shard - 1] if shard else 0)
        if os.preadv(descriptor, [out.data], start + row * out.nbytes) != out.nbytes:
            raise OSError(f"{self.path / name}: ends before image {index}")
        return out

    def __getstate__(self) -> dict[str, Any]:
        return {**{k: v for k, v in self.__dict__.items() if k != "manifest"}, "_opened": {}}

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, {self.name} {self.version}, {len(self)} images of {self.size} px)"
