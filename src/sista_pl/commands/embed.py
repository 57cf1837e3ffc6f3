"""`sista embed`: the embeddings of films, and of their reports, as one Parquet file."""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sista_pl.errors import SistaError

_HELP = """\
Writes one row a film: its ids, `embedding` (float32 of fixed length), and `text_embedding` of its report where
films have reports, NaN for a film without one.
Embeddings are those of the joint space, of length 1: their inner product is the cosine of a film and a report.
`--pooled` gives the encoders' own vectors instead, as a linear probe or a search among films wants them.
"""
_EPILOG = """\
INPUTS is a prepared store, a folder of JPEG, PNG and DICOM, a CSV with a column `image` (paths relative to it), or one
file. Files that can't be read are listed in <out>-unreadable.csv. Memory does not grow with the number of films.

examples:
  sista embed --ckpt_path runs/pretrain/0001/checkpoints/best.ckpt --inputs datasets/mimic-256 --out mimic.parquet
  sista embed --ckpt_path best.ckpt --inputs films/ --out films.parquet --pooled --device cuda --workers 8

  import pandas as pd, numpy as np
  table = pd.read_parquet("mimic.parquet")
  films, reports = np.stack(table["embedding"]), np.stack(table["text_embedding"])
"""


def main(argv: list[str]) -> int:
    """Write the file and return 0.

    Raises:
        SistaError: a checkpoint, inputs or an output that can't be used.
    """
    options = _parser().parse_args(argv)
    out: Path = options.out
    if out.suffix.lower() != ".parquet":
        raise SistaError(f"embed: --out {out}: Parquet is written; give FILE.parquet")
    if out.exists():
        raise SistaError(f"embed: {out} exists; give --out another name, or delete it")
    if options.batch_size < 1 or options.workers < 1:
        raise SistaError("embed: --batch-size and --workers are counts; give 1 or more")
    if not options.inputs.exists():
        raise SistaError(f"embed: --inputs {options.inputs}: no such file or folder; check the path")
    device = choose_device(options.device)

    from sista_pl.data.images import find_images
    from sista_pl.data.store import Store
    from sista_pl.embed import FileFilms, StoreFilms, embed, open_joint, preparation

    joint = open_joint(options.ckpt_path, device)
    films: StoreFilms | FileFilms
    if (options.inputs / "store.json").is_file():
        store = Store.open(options.inputs)
        if options.size not in (None, store.size):
            raise SistaError(f"embed: --size {options.size}: {options.inputs} holds {store.size} px; leave --size out")
        how = preparation(options.ckpt_path, joint.image_size, options.size)
        if how.of_run and how.size != store.size:
            raise SistaError(
                f"embed: {options.inputs} holds films of {store.size} px, the run's had {how.size}, of which the "
                f"encoder saw the middle {how.crop}; prepare a store with --size {how.size}, or add --size {store.size}"
            )
        how = preparation(options.ckpt_path, joint.image_size, max(store.size, joint.image_size))
        films, phantom = StoreFilms(store, how), store.phantom
        if phantom:
            print("PHANTOM DATA: drawn by a program, no patient")
    else:
        how, phantom = preparation(options.ckpt_path, joint.image_size, options.size), None
        films = FileFilms(find_images(options.inputs), how, options.workers)
        print(f"films: long side to {how.size} px ({how.told}), of which the encoder sees the middle {how.crop}")
    facts = {
        "checkpoint": str(options.ckpt_path), "size": how.size, "crop": how.crop, "phantom": phantom,
        "embedding": "pooled, as it is" if options.pooled else "joint space, length 1",
    }  # fmt: skip
    with bar(len(films), "encoding films") as advance:
        rows, bad = embed(joint, films, out, options.pooled, options.batch_size, facts, advance)
    columns = "embedding and text_embedding" if films.has_texts else "embedding"
    print(f"embed: {out}, {rows} rows, {columns}")
    if bad:
        listed = out.with_name(f"{out.stem}-unreadable.csv")
        with listed.open("w", newline="") as file:
            csv.writer(file).writerows([("image", "why"), *bad])
        print(f"embed: {len(bad)} could not be read, as {bad[0][0]}: {bad[0][1]}; all in {listed}")
    return 0


def choose_device(name: str) -> str:
    """Return the device that is asked for; `auto` is an accelerator of CUDA where there is one.

    Raises:
        SistaError: one that isn't there.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError):
        raise SistaError(f"--device {name}: not to be used here; give cpu, or leave it out") from None
    return name


@contextmanager
def bar(total: int, doing: str) -> Iterator[Callable[[int], Any]]:
    """A bar over so many films, on a terminal."""
    if not sys.stderr.isatty() or not total:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task("", total=total)
        yield lambda count: shown.advance(task, count)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "sista embed", description=_HELP, epilog=_EPILOG, formatter_class=raw, allow_abbrev=False
    )
    parser.add_argument("--ckpt_path", type=Path, required=True, metavar="CKPT", help="checkpoint of a pre-training")
    parser.add_argument("--inputs", type=Path, required=True, help="store, folder, CSV or file, see below")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the Parquet file, which is not there")
    parser.add_argument("--pooled", action="store_true", help="the encoders' pooled vectors, not projected")
    parser.add_argument(
        "--size", type=int, metavar="PX", help="long side of a film before the crop (default: as the run's config.yaml)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="films at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, default=min(8, os.cpu_count() or 1), metavar="N",
        help="threads that decode files (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (default: %(default)s)")
    return parser
