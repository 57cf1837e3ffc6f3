"""A store of MIMIC-CXR's size: opening it and building splits takes seconds and little memory."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from sista_pl.data.store import SCHEMA, Store

N, PATIENTS = 377_110, 65_379

MEASURE = """
import sys, time
import numpy as np
from sista_pl.data.store import Store
from sista_pl.data.splits import grouped_split, label_fraction, split_hash
began = time.perf_counter()
store = Store.open(sys.argv[1])
table = store.manifest
opened = time.perf_counter()
patients = table["patient_id"].tolist()
splits = grouped_split(patients)
digest = split_hash(table["image_id"].tolist(), splits)
train = np.array(splits) == "train"
labels = table.filter(like="label_").to_numpy()[train]
chosen = label_fraction(table["patient_id"][train].tolist(), labels, 0.01)
ended = time.perf_counter()
status = open("/proc/self/status").read()  # not getrusage: a child begins with the peak of its parent
peak = int(status.split("VmHWM:")[1].split()[0]) / 2**20
print(len(store), int(train.sum()), int(chosen.sum()), f"{peak:.3f} GiB, open {opened - began:.1f} s, "
      f"splits and fraction {ended - opened:.1f} s")
"""


@pytest.fixture(scope="module")
def huge(tmp_path_factory):
    """A store of 377,110 images of one pixel."""
    path = tmp_path_factory.mktemp("huge")
    draw = np.random.default_rng(0)
    patient = draw.integers(PATIENTS, size=N)
    study = np.arange(N) * 227_827 // N
    texts = pd.array([f"of study {i}: {'some thirty words of text, ' * 7}" for i in study], dtype="string")
    columns = {
        "image_id": pd.array([hashlib.sha1(str(i).encode()).hexdigest() for i in range(N)], dtype="string"),
        "patient_id": pd.array([f"p{10_000_000 + i}" for i in patient], dtype="string"),
        "study_id": pd.array([f"s{i}" for i in study], dtype="string"),
        "view": "PA", "split": "train",
        "findings": texts, "impression": texts,
    }  # fmt: skip
    for name in range(14):
        columns[f"label_{name}"] = draw.choice(np.array([0, 1, np.nan], np.float32), size=N, p=[0.3, 0.1, 0.6])
    pd.DataFrame(columns).to_parquet(path / "manifest.parquet", index=False)
    np.save(path / "images-00000.npy", np.zeros((N, 1, 1), np.uint8))
    files = {file.name: {"bytes": file.stat().st_size} for file in path.iterdir()}
    contents = {"files": files, "shards": [{"rows": N, "images": "images-00000.npy"}]}
    (path / "files.json").write_text(json.dumps(contents))
    info = {"schema": SCHEMA, "name": "huge", "version": "1", "phantom": True, "size": 1, "has_masks": False,
            "rows": N, "contents": hashlib.sha256(json.dumps(contents).encode()).hexdigest()}  # fmt: skip
    (path / "store.json").write_text(json.dumps(info))
    return path


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_opening_and_splitting_377110_rows_stays_under_2_gib(huge):
    run = subprocess.run([sys.executable, "-c", MEASURE, str(huge)], capture_output=True, text=True, check=True)
    print("\n" + run.stdout)
    rows, train, chosen, peak, *_ = run.stdout.split()
    assert int(rows) == N == len(Store.open(huge))
    assert abs(int(train) / N - 0.8) < 0.01
    assert abs(int(chosen) / int(train) - 0.01) < 0.001
    assert float(peak) < 2
