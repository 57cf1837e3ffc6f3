import hashlib
import json
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from sista_pl.data.doctor import Subject
from sista_pl.data.formats import Release, Row
from sista_pl.data.images import read_gray
from sista_pl.data.prepare import prepare
from sista_pl.data.store import SCHEMA, Store
from sista_pl.errors import SistaError


@pytest.fixture
def data(tmp_path):
    rows = []
    for i in range(11):
        path = tmp_path / f"{i}.png"
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 16), dtype=np.uint8)).save(path)
        rows.append(Row(f"i{i}", f"p{i}", f"s{i}", path, "PA", "train", f"Text {i}.", "", {"Edema": 1.0}))
    return Release("test", "1", rows, phantom=True, root=tmp_path)


@pytest.fixture
def store(tmp_path, data):
    prepare(data, tmp_path / "store", size=24, shard_rows=4, progress=False)
    return Store.open(tmp_path / "store")


def test_images_across_shards_one_by_one_and_together(store, data):
    expected = np.stack([read_gray(row.image, 24) for row in data.rows])
    assert np.array_equal(np.stack([store.image(i) for i in range(len(store))]), expected)
    order = [10, 0, 4, 3, 3, 7]
    assert np.array_equal(store.images(order), expected[order])
    assert np.array_equal(store.images(np.array(order)), expected[order])
    assert store.images([]).shape == (0, 24, 24)
    for outside in (-1, 11):
        with pytest.raises(IndexError, match="of a store of 11"):
            store.image(outside)


def test_an_image_may_be_changed(store):
    before = store.image(0)
    store.image(0)[:] = 0
    assert np.array_equal(store.image(0), before)


def test_threads_and_forked_workers_share_a_store(store, data):
    expected = np.stack([read_gray(row.image, 24) for row in data.rows])
    store.image(0)
    order = [int(i) for i in np.random.default_rng(0).integers(0, 11, 400)]
    with ThreadPoolExecutor(4) as threads, multiprocessing.get_context("fork").Pool(2) as processes:
        for got in (threads.map(store.image, order), processes.map(store.image, order)):
            assert np.array_equal(np.stack(list(got)), expected[order])


def test_what_a_store_says_of_itself(store):
    assert (store.size, store.name, store.version, store.phantom, len(store)) == (24, "test", "1", True, 11)
    assert store.hash == hashlib.sha256((store.path / "store.json").read_bytes()).hexdigest()
    for name, file in store.contents["files"].items():
        assert hashlib.sha256((store.path / name).read_bytes()).hexdigest() == file["sha256"]
    assert set(store.contents["files"]) == {f.name for f in store.path.iterdir()} - {"store.json", "files.json"}
    assert store.info["contents"] == hashlib.sha256((store.path / "files.json").read_bytes()).hexdigest()
    assert list(store.manifest.columns) == [
        *("image_id", "patient_id", "study_id", "view", "split", "findings", "impression"),
        *("label_Edema", "has_mask", "boxes", "width", "height", "source"),
    ]
    with pytest.raises(SistaError, match="has no masks"):
        store.mask(0)


def test_a_store_travels_to_a_worker_without_its_data(store):
    store.image(0)
    assert len(store.manifest) == 11
    raw = pickle.dumps(store)
    assert len(raw) < 10_000
    assert b"Text 3." not in raw
    other = pickle.loads(raw)
    assert np.array_equal(other.image(5), store.image(5))
    assert other.manifest.equals(store.manifest)


def test_what_is_no_store(tmp_path):
    with pytest.raises(SistaError, match=r"not a prepared store; run `sista data prepare"):
        Store.open(tmp_path)
    for text in ("{", "[]", "{}", f'{{"schema": {SCHEMA}}}'):
        (tmp_path / "store.json").write_text(text)
        with pytest.raises(SistaError, match="not readable"):
            Store.open(tmp_path)


@pytest.mark.parametrize(("schema", "step"), [(SCHEMA - 1, "prepare it again"), (SCHEMA + 1, "update sista")])
def test_a_store_of_another_version_is_refused_with_both_versions(store, schema, step):
    file = store.path / "store.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema": schema}))
    with pytest.raises(SistaError, match=f"schema version {schema}, this sista reads {SCHEMA}; .*{step}"):
        Store.open(store.path)


def test_a_file_that_is_cut_or_missing_is_named(store):
    shard = store.path / "images-00001.npy"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(SistaError, match=r"images-00001.npy: \d+ bytes where files.json says \d+; delete .*store"):
        store.image(0)
    (store.path / "skipped.csv").unlink()
    with pytest.raises(SistaError, match=r"\.(csv|npy): .* bytes where files.json says"):
        Subject.of_store(store)
    shard.unlink()
    with pytest.raises(SistaError, match=r"images-00001.npy: no bytes"):
        store.image(0)
    with pytest.raises(SistaError, match=r"images-00001.npy: no bytes"):
        print(store.manifest)
    (store.path / "files.json").write_text("{}")
    with pytest.raises(SistaError, match=r"files.json: missing or not this store's; delete .*store"):
        store.image(0)


def test_opening_reads_one_small_file_whatever_lies_beside_it(store):
    size = (store.path / "store.json").stat().st_size
    for file in store.path.iterdir():
        if file.name != "store.json":
            file.unlink()
    assert len(Store.open(store.path)) == 11
    assert size < 2_000
