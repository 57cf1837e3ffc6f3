"""`sista bench growth`: what grows with batch, store and epochs, and what does not.

B pairs of a batch, N rows of a store.
"""

from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SIZE, SHARD_ROWS = 256, 4_096  # as `sista data prepare` has it

# a fresh process, for the memory of one that has read another store is not given back
_OPEN = """
import json, sys, time, timeit
import numpy as np, pandas, pyarrow.parquet
from sista_pl.commands.bench_growth import resident
from sista_pl.data.store import Store
before, opened = resident(), min(timeit.repeat(lambda: Store.open(sys.argv[1]), number=1, repeat=20))
store, start = Store.open(sys.argv[1]), time.perf_counter()
store.images(np.random.default_rng(0).integers(len(store), size=64))
read, after = time.perf_counter(), resident()
store.manifest
print(json.dumps({"open": opened, "read": (read - start) / 64, "manifest": time.perf_counter() - read,
                  "bytes": after - before, "manifest_bytes": resident() - after}))
"""


def resident() -> int:
    """Return the bytes of memory that this process has now; where /proc is missing, the most that it had."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def hollow_store(path: Path, rows: int) -> Path:
    """Write a store of `rows` black images of 256 px: its shards are files with a hole, which take no room."""
    import numpy as np
    import pandas as pd

    from sista_pl.data.store import SCHEMA

    path.mkdir(parents=True)
    ids = pd.Series(np.arange(rows)).astype(str).astype("string")
    text = "Small left pleural effusion. The heart is mildly enlarged. No pneumothorax is seen."
    manifest = pd.DataFrame({"image_id": ids, "patient_id": ids, "study_id": ids, "view": "PA", "split": "train",
                             "findings": "Case " + ids + ". " + text, "impression": ids})  # fmt: skip
    manifest.to_parquet(path / "manifest.parquet", index=False)
    shards: list[dict[str, Any]] = []
    for start in range(0, rows, SHARD_ROWS):
        shape = (min(SHARD_ROWS, rows - start), SIZE, SIZE)
        shards.append({"rows": shape[0], "images": f"images-{len(shards):05d}.npy"})
        with (path / shards[-1]["images"]).open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            file.truncate(file.tell() + shape[0] * SIZE * SIZE)
    files = {file.name: {"bytes": file.stat().st_size} for file in path.iterdir()}
    contents = json.dumps({"files": files, "shards": shards}).encode()
    (path / "files.json").write_bytes(contents)
    info = {"schema": SCHEMA, "name": "hollow", "version": "1", "phantom": True, "size": SIZE, "has_masks": False,
            "rows": rows, "contents": hashlib.sha256(contents).hexdigest()}  # fmt: skip
    (path / "store.json").write_text(json.dumps(info))
    return path


def opening(rows: Sequence[int], rounds: int) -> dict[int, dict[str, list[float]]]:
    """Open a store of each size in a fresh process, in turn, `rounds` times after one warm-up.

    Returns:
        by N a value a round of: seconds to `open` (least of 20), seconds to `read` an image (mean of the first 64, with
        the check of the files), `bytes` of memory after both, seconds to read the `manifest`, and its `manifest_bytes`.
    """
    found: dict[int, dict[str, list[float]]] = {n: {} for n in rows}
    with tempfile.TemporaryDirectory(prefix="sista-bench-") as folder:
        stores = {n: hollow_store(Path(folder) / str(n), n) for n in rows}
        for round_ in range(rounds + 1):
            for n, store in stores.items():
                told = subprocess.check_output([sys.executable, "-c", _OPEN, str(store)], text=True)
                for key, value in json.loads(told).items() if round_ else ():
                    found[n].setdefault(key, []).append(value)
    return found


def training(epochs: int) -> list[int]:
    """Return the bytes of memory at the end of each epoch of `train`, in a fresh process.

    One that has trained before keeps the memory that was freed, which would hide a leak.
    """
    code = f"import json; from sista_pl.commands.bench_growth import train; print(json.dumps(train({epochs})))"
    told = subprocess.check_output([sys.executable, "-c", code], text=True)
    return json.loads(told.splitlines()[-1])


def train(epochs: int) -> list[int]:
    """Pre-train on a phantom of 80 studies; return the bytes of memory of this process at the end of each epoch."""
    import logging
    import warnings

    from pytorch_lightning import Callback, Trainer, seed_everything

    from sista_pl.allocator import keep_memory
    from sista_pl.data.formats import READERS
    from sista_pl.data.pairs import PairDataModule
    from sista_pl.data.phantom import write_phantom
    from sista_pl.data.prepare import prepare
    from sista_pl.pretrain import PretrainTask

    found: list[int] = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer: Any, task: Any) -> None:
            found.append(resident())

    keep_memory()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="sista-bench-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seed_everything(0, verbose=False)
        root = write_phantom("mimic_cxr", Path(folder) / "raw", studies=80, size=96, workers=1, progress=False)
        release = READERS.build({"name": "mimic_cxr", "root": root})
        prepare(release, Path(folder) / "store", size=64, workers=1, progress=False)
        data = PairDataModule(Path(folder) / "store", size=64, crop=56, batch_size=8, contrast=0.2)
        losses = {"instance": {"name": "sia"}, "token": {"name": "sta", "negatives": "batch"}}
        task = PretrainTask(losses, image_encoder="resnet10t", image_size=56, head_hidden=64, embed_dim=32,
                            text_encoder={"name": "small-bert", "layers": 1, "dim": 32, "vocab_size": 500})  # fmt: skip
        Trainer(
            max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
            devices=1, enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
            callbacks=[Watch()],
        ).fit(task, datamodule=data)  # fmt: skip
    return found


def draw(figures: dict[str, Any], path: Path) -> None:
    """Draw the three growths side by side, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    step, store, memory = figure.subplots(1, 3)
    batches = sorted(figures["step"]["seconds"])
    milliseconds = [1e3 * figures["step"]["seconds"][b] for b in batches]
    step.plot(batches, milliseconds, "o-", label="measured")
    slope = milliseconds[-1] / batches[-1]
    step.plot([0, batches[-1]], [0, slope * batches[-1]], ":", label="in proportion to B")
    step.set(title="a training step", xlabel="pairs of a batch", ylabel="ms", ylim=(0, None))
    rows = sorted(figures["store"])
    for key, told in (("open", "open"), ("read", "read an image"), ("manifest", "read the manifest")):
        store.loglog(rows, [1e3 * figures["store"][n][key] for n in rows], "o-", label=told)
    store.set(title="a store", xlabel="rows", ylabel="ms")
    megabytes = [value / 1e6 for value in figures["memory"]["bytes"]]
    memory.plot(range(1, len(megabytes) + 1), megabytes, "o-", label="resident")
    memory.set(title="memory in training", xlabel="epochs", ylabel="MB", ylim=(0, 1.2 * max(megabytes)))
    for axis in (step, store, memory):
        axis.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
