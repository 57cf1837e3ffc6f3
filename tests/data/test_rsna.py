"""RSNA Pneumonia stage 2: what the phantom drew is what the store holds; its awkward parts; bad tables."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from sista_pl.data.formats import READERS
from sista_pl.data.phantom import write_phantom
from sista_pl.data.prepare import prepare
from sista_pl.errors import SistaError

POSITIVE = {"opacity", "pneumonia", "consolidation"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_phantom(
        "rsna", tmp_path_factory.mktemp("rsna") / "raw", 60, seed=4, size=96, workers=1, progress=False
    )


def read(root, **options):
    return READERS.build({"name": "rsna", "root": root, **options})


def copy(root, tmp_path, table="stage_2_train_labels.csv"):
    """A release of tables alone: the reader touches no image."""
    for file in root.glob("*.csv"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path / table


def test_the_store_holds_what_was_drawn(root, tmp_path):
    truth = pd.read_parquet(root / "phantom/truth.parquet").set_index("image_id")
    release = read(root)
    assert release.phantom
    assert not release.skipped
    assert {row.image_id for row in release.rows} == set(truth.index)
    # at their own size, boxes are compared to the pixel
    store = prepare(release, tmp_path / "store", size=96, progress=False)
    manifest = store.manifest.set_index("image_id")
    assert len(store) == 60
    positives = 0
    for name, row in truth.iterrows():
        drawn = [tuple(map(float, box[1:])) for box in json.loads(row.boxes) if box[0] in POSITIVE]
        found = [tuple(box[k] for k in "xywh") for box in json.loads(manifest.loc[name, "boxes"])]
        assert sorted(found) == sorted(set(drawn))
        assert manifest.loc[name, "label_Pneumonia"] == bool(drawn)
        assert manifest.loc[name, "label_No Finding"] == (not json.loads(row.drawn)["findings"])
        positives += bool(drawn)
    assert 5 < positives < 55
    assert store.info["split"]["name"] == "rsna/mgca"
    assert store.info["counts"] == {"train": 36, "val": 12, "test": 12}


def test_films_are_upright_with_white_bones(root, tmp_path):
    store = prepare(read(root), tmp_path / "store", size=96, progress=False)
    films = store.images(range(60)).astype(float)
    # spine and abdomen against the lungs beside them
    assert films[:, 40:70, 45:51].mean() > films[:, 30:50, 22:34].mean() + 30
    assert films[:, 85:, 30:66].mean() > films[:, 30:50, 22:34].mean() + 30


def test_repeated_rows_are_one(root, tmp_path):
    file = copy(root, tmp_path)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, *lines[1:]]) + "\n")
    assert [row.boxes for row in read(tmp_path).rows] == [row.boxes for row in read(root).rows]
    (tmp_path / "stage_2_detailed_class_info.csv").unlink()
    assert all(math.isnan(row.labels["No Finding"]) for row in read(tmp_path).rows)


def test_splits_are_functions_of_ids(root):
    first, other = read(root), read(root, split="rsna/gloria-cls")
    assert [row.split for row in first.rows] == [row.split for row in read(root).rows]
    assert pd.Series([row.split for row in other.rows]).value_counts().to_dict() == {"train": 42, "val": 9, "test": 9}
    with pytest.raises(SistaError, match="unknown split 'rsna/mcga'; did you mean rsna/mgca"):
        read(root, split="rsna/mcga")
    ids = pd.DataFrame({"patient_id": [f"{n:08x}" for n in range(26684)]})
    from sista_pl.data.splits import split_table

    counts = pd.Series(split_table("rsna/mgca", ids)).value_counts()
    assert counts.to_dict() == {"train": 16010, "val": 5337, "test": 5337}
    assert np.array_equal(split_table("rsna/mgca", ids[::-1])[::-1], split_table("rsna/mgca", ids))


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("{name},1,2,nan,4,1", "no rectangle"),
        ("{name},1,2,-3,4,1", "no rectangle"),
        ("{name},,,,,1", "no rectangle"),
        ("../../etc/passwd,1,2,3,4,1", "no patient id"),
        (",1,2,3,4,1", "no patient id"),
        ("a\0b,1,2,3,4,1", "no patient id"),
    ],
)
def test_a_bad_row_is_left_out_and_counted(root, tmp_path, row, why):
    file = copy(root, tmp_path)
    table = pd.read_csv(file)
    name = table.loc[table["Target"] == 1, "patientId"].iloc[0]
    file.write_text(file.read_text() + row.format(name=name) + "\n")
    release = read(tmp_path)
    assert len(release.skipped) == 1
    assert why in release.skipped[0][1]
    assert len(release.rows) == (59 if name in row.format(name=name) else 60)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda text: text.replace("Target", "target"), "no column 'Target'"),
        (lambda text: text.replace(",1\n", ",2\n", 1), "Target is '2'; 0 or 1 is known"),
        (lambda text: text + text.split("\n")[1].rsplit(",", 1)[0] + ",{other}\n", "is 0 and 1"),
    ],
)
def test_bad_tables_are_one_line(root, tmp_path, change, why):
    file = copy(root, tmp_path)
    text = file.read_text()
    other = "0" if text.split("\n")[1].endswith("1") else "1"
    file.write_text(change(text).replace("{other}", other))
    with pytest.raises(SistaError, match=why):
        read(tmp_path)


def test_no_tables(tmp_path, root):
    with pytest.raises(SistaError, match=r"stage_2_train_labels\.csv not found"):
        read(tmp_path)
    file = copy(root, tmp_path, "stage_2_detailed_class_info.csv")
    file.write_text(file.read_text().replace("Normal\n", "Odd\n"))
    with pytest.raises(SistaError, match=r"class '.*Odd'; known: Normal"):
        read(tmp_path)
