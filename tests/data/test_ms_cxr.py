"""MS-CXR: every drawn box comes back with its phrase; where the table may lie; bad rows; its patients do not train."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from sista_pl.data.formats import READERS
from sista_pl.data.images import fit_box
from sista_pl.data.phantom import write_phantom
from sista_pl.data.phantom.layouts.ms_cxr import CATEGORY_OF
from sista_pl.data.prepare import prepare
from sista_pl.errors import SistaError

TABLE = "MS_CXR_Local_Alignment_v1.1.0.csv"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ms_cxr") / "raw"
    return write_phantom("ms_cxr", folder, 40, seed=4, size=64, workers=1, progress=False)


def read(root, **options):
    return READERS.build({"name": "ms_cxr", "root": root, **options})


def copy(root, folder, change=None):
    """A release of its table alone: the reader touches no image."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pd.read_csv(root / TABLE, dtype=str)
    (change(table) if change else table).to_csv(folder / TABLE, index=False)
    return folder


def test_the_store_holds_what_was_drawn(root, tmp_path):
    truth = pd.read_parquet(root / "phantom/truth.parquet").set_index("image_id")
    release = read(root)
    assert release.phantom
    assert release.version == "MS-CXR 1.1.0"
    assert not release.skipped
    store = prepare(release, tmp_path / "store", size=48, progress=False)
    manifest = store.manifest.set_index("image_id")
    assert set(manifest["split"]) == {"test"}
    seen = 0
    for name, row in truth.iterrows():
        drawn = [box for box in json.loads(row["boxes"]) if box[0] in CATEGORY_OF]
        assert (name in manifest.index) == bool(drawn)
        if not drawn:
            continue
        boxes = json.loads(manifest.at[name, "boxes"])
        for box, (kind, x, y, w, h) in zip(boxes, drawn, strict=True):
            place = fit_box({"x": x, "y": y, "w": w, "h": h}, row["columns"], row["rows"], 48)
            assert {key: box[key] for key in "xywh"} == place
            assert box["category"] == CATEGORY_OF[kind]
            finding = next(f for f in json.loads(row["drawn"])["findings"] if f["kind"] == kind)
            for word in (finding["side"], finding["severity"], finding["zone"]):
                assert word is None or word in box["phrase"].split()
            seen += 1
        shown = {box["category"] for box in boxes}
        for label in manifest.filter(like="label_"):
            value = manifest.at[name, label]
            assert value == 1 if label.removeprefix("label_") in shown else np.isnan(value)
        assert manifest.at[name, "patient_id"] == str(row["subject_id"])
    assert seen > 20


@pytest.mark.parametrize("place", ["ms-cxr", "../ms-cxr/0.1", "..", None])
def test_the_table_may_lie_beside_or_be_named(root, tmp_path, place):
    jpg = tmp_path / "jpg"
    jpg.mkdir()
    folder = copy(root, tmp_path / "elsewhere" if place is None else jpg / place)
    found = read(jpg, table=str(folder / TABLE)) if place is None else read(jpg)
    assert [row.image_id for row in found.rows] == [row.image_id for row in read(root).rows]
    assert all(row.image.is_relative_to(jpg / "files") for row in found.rows)


@pytest.mark.parametrize(
    ("column", "value", "why"),
    [
        ("path", "../../etc/passwd", "is no path of MIMIC-CXR-JPG"),
        ("path", "files/p10/p10x/s5/a.jpg", "is no path of MIMIC-CXR-JPG"),
        ("path", "files/p10/p10000032/s5/another.jpg", "is no film"),
        ("label_text", " ", "no category or no phrase"),
        ("category_name", "", "no category or no phrase"),
        ("w", "0", "a box is no rectangle"),
        ("x", "nan", "a box is no rectangle"),
        ("h", "wide", "a box is no rectangle"),
    ],
)
def test_a_film_with_a_bad_row_is_left_out_and_counted(root, tmp_path, column, value, why):
    dicom = pd.read_csv(root / TABLE)["dicom_id"].iloc[1]

    def change(table):
        table.loc[1, column] = value
        return table

    found = read(copy(root, tmp_path / "raw", change))
    assert dicom not in [row.image_id for row in found.rows]
    assert len(found.rows) == len(read(root).rows) - 1
    assert [name for name, _ in found.skipped] == [dicom]
    assert why in found.skipped[0][1]
    assert f"{TABLE}:3" in found.skipped[0][1]


def test_what_is_missing_is_said_in_one_line(root, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SistaError, match=r"MS_CXR_Local_Alignment_v1.1.0.csv not found; download MS-CXR"):
        read(tmp_path / "empty")
    with pytest.raises(SistaError, match=r"none.csv not found"):
        read(root, table="none.csv")
    with pytest.raises(SistaError, match="no column 'label_text'"):
        read(copy(root, tmp_path / "raw", lambda table: table.drop(columns="label_text")))


def test_its_patients_take_no_part_in_pre_training(root, tmp_path):
    mimic = write_phantom("mimic_cxr", tmp_path / "mimic", 40, seed=4, size=64, workers=1, progress=False)
    held = {row.patient_id for row in read(root).rows}
    every = READERS.build({"name": "mimic_cxr", "root": mimic})
    found = READERS.build({"name": "mimic_cxr", "root": mimic, "hold_out": str(root / TABLE)})
    expected = [row.image_id for row in every.rows if row.split == "test" or row.patient_id not in held]
    assert [row.image_id for row in found.rows] == expected
    assert 0 < len(expected) < len(every.rows)
    left = [name for name, why in found.skipped if why == f"its patient is in {TABLE}"]
    assert set(left) | set(expected) >= {row.image_id for row in every.rows}
    assert found.options["hold_out"] == TABLE
    assert "hold_out" not in every.options
    by_id = tmp_path / "ids.csv"
    pd.DataFrame({"subject_id": sorted(held)}).to_csv(by_id, index=False)
    again = READERS.build({"name": "mimic_cxr", "root": mimic, "hold_out": str(by_id)})
    assert [row.image_id for row in again.rows] == expected


def test_a_hold_out_that_names_nobody_is_one_line(root, tmp_path):
    mimic = tmp_path / "mimic"
    shutil.copytree(root, mimic)
    for name in ("metadata", "split"):
        (mimic / f"mimic-cxr-2.0.0-{name}.csv").write_text(
            "dicom_id,subject_id,study_id,ViewPosition,split\na,10,50,PA,train\n"
        )
    with pytest.raises(SistaError, match=r"hold_out none.csv: no such file"):
        READERS.build({"name": "mimic_cxr", "root": mimic, "hold_out": "none.csv"})
    (tmp_path / "a.csv").write_text("name\nx\n")
    with pytest.raises(SistaError, match="no column 'path'"):
        READERS.build({"name": "mimic_cxr", "root": mimic, "hold_out": str(tmp_path / "a.csv")})
    (tmp_path / "b.csv").write_text("path\nfilms/1.jpg\n")
    with pytest.raises(SistaError, match="names no patient"):
        READERS.build({"name": "mimic_cxr", "root": mimic, "hold_out": str(tmp_path / "b.csv")})
