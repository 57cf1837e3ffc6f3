import csv
import json
import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sista_pl.data.formats import READERS
from sista_pl.data.prepare import prepare
from sista_pl.data.splits import grouped_split
from sista_pl.errors import SistaError

HEAD = ["path", "text", "patient_id", "split", "label_Edema"]
ROWS = [
    ["images/a.png", "One finding.", "p1", "train", "1"],
    ["images/b.png", "FINDINGS: Two.\nIMPRESSION: And three.", "p1", "Training", "0"],
    ["images/c.png", " ___ ", "p2", "dev", ""],
    ["images/d.png", "Four µm.", "p3", "validate", "-1"],
]


def write(path, rows=ROWS, head=HEAD, delimiter=","):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([head, *rows])
    return path


def read(root, **options):
    return READERS.build({"name": "table", "root": root, **options})


def test_usual_names_need_no_map(tmp_path):
    release = read(write(tmp_path / "studies.csv"))
    assert [(r.image_id, r.patient_id, r.split, r.findings, r.impression) for r in release.rows] == [
        ("images/a.png", "p1", "train", "One finding.", ""),
        ("images/b.png", "p1", "train", "Two.", "And three."),
        ("images/d.png", "p3", "val", "Four µm.", ""),
    ]
    assert release.rows[0].image == tmp_path / "images/a.png"
    assert release.rows[1].source == "studies.csv:3"
    assert release.skipped == [("images/c.png", "studies.csv:4: empty report")]
    assert release.rows[0].labels == {"Edema": 1.0}
    assert math.isnan(release.rows[2].labels["Edema"])


def test_tsv_semicolons_parquet_and_encodings_give_the_same_rows(tmp_path):
    def plain(release):
        return [(r.image_id, r.split, r.findings, str(r.labels)) for r in release.rows]

    expected = plain(read(write(tmp_path / "1/t.csv")))
    assert plain(read(write(tmp_path / "2/t.tsv", delimiter="\t"))) == expected
    assert plain(read(write(tmp_path / "3/t.csv", delimiter=";"))) == expected
    frame = pd.DataFrame(ROWS, columns=HEAD)
    frame["label_Edema"] = pd.to_numeric(frame["label_Edema"])
    (tmp_path / "4").mkdir()
    frame.to_parquet(tmp_path / "4/t.parquet")
    assert plain(read(tmp_path / "4")) == expected
    frame.to_csv(tmp_path / "4/t.csv.gz", index=False, encoding="cp1252")
    assert plain(read(tmp_path / "4", table="t.csv.gz")) == expected


def test_columns_may_be_named(tmp_path):
    head = ["bild", "befund", "beurteilung", "fall", "maske", "odem", "ansicht", "nr"]
    rows = [["a.png", "Some", "thing", "f1", "m.png", "yes", "PA", "7"], ["b.png", "", "", "f2", "", "", "AP", "8"]]
    columns = {"image": "bild", "findings": "befund", "impression": "beurteilung", "patient": "fall", "mask": "maske"}
    columns |= {"labels": ["odem"], "view": "ansicht", "id": "nr"}
    release = read(write(tmp_path / "t.csv", rows, head), columns=columns, require_report=False)
    first, second = release.rows
    assert (first.image_id, first.patient_id, first.view) == ("7", "f1", "PA")
    assert (first.findings, first.impression, first.mask) == ("Some", "thing", tmp_path / "m.png")
    assert first.labels == {"odem": 1.0}
    assert (second.findings, second.mask) == ("", None)
    with pytest.raises(SistaError, match="no column 'bidl'; did you mean bild"):
        read(tmp_path / "t.csv", columns={**columns, "image": "bidl"})
    with pytest.raises(SistaError, match=r"columns.imge is no role; did you mean image"):
        read(tmp_path / "t.csv", columns={"imge": "bild"})


def test_where_keeps_rows_and_compares_as_yaml_and_csv_write(tmp_path):
    rows = [["a.png", "A", "p", "train", "1.0"], ["b.png", "B", "p", "train", "0"], ["c.png", "C", "p", "val", "True"]]
    file = write(tmp_path / "t.csv", rows, ["path", "text", "patient", "split", "use"])
    assert [r.image_id for r in read(file, where={"use": 1}).rows] == ["a.png"]
    assert [r.image_id for r in read(file, where={"use": True}).rows] == ["c.png"]
    assert [r.image_id for r in read(file, where={"use": [1, 0], "split": "train"}).rows] == ["a.png", "b.png"]
    with pytest.raises(SistaError, match=r"no row where use is 3; it has '1\.0', '0', 'True'"):
        read(file, where={"use": 3})
    with pytest.raises(SistaError, match="no column 'usw'; did you mean use"):
        read(file, where={"usw": 1})


def test_without_split_column_no_patient_is_cut(tmp_path):
    rows = [[f"{i}.png", "text", f"p{i // 3}"] for i in range(900)]
    file = write(tmp_path / "t.csv", rows, ["path", "text", "patient"])
    splits = {}
    for row in read(file).rows:
        splits.setdefault(row.patient_id, set()).add(row.split)
    assert all(len(s) == 1 for s in splits.values())
    share = [sum(s == {name} for s in splits.values()) / 300 for name in ("train", "val", "test")]
    assert share == pytest.approx([0.8, 0.1, 0.1], abs=0.06)
    assert [r.split for r in read(file, seed=1).rows] != [r.split for r in read(file).rows]
    assert [r.split for r in read(file).rows] == [r.split for r in read(file).rows]
    with pytest.raises(SistaError, match="no column of patients"):
        read(write(tmp_path / "u.csv", [["a.png", "text"]], ["path", "text"]))


def test_a_column_that_is_null_does_not_count(tmp_path):
    file = write(tmp_path / "t.csv", [[f"{i}.png", "Text.", f"p{i}", "train", "1"] for i in range(40)])
    release = read(file, columns={"split": None, "labels": None})
    assert {row.split for row in release.rows} == {"train", "val", "test"}
    assert [row.split for row in release.rows] == list(grouped_split([f"p{i}" for i in range(40)], 0))
    assert all(row.labels == {} for row in release.rows)
    assert "split" not in release.options["columns"]
    with pytest.raises(SistaError, match="no column of image paths"):
        read(file, columns={"image": None})


def test_a_group_stands_above_the_patient(tmp_path):
    rows = [["a.png", "t", "p1", "g1"], ["b.png", "t", "p2", "g1"], ["c.png", "t", "p3", ""]]
    release = read(write(tmp_path / "t.csv", rows, ["path", "text", "patient_id", "group_id"]))
    assert [r.patient_id for r in release.rows] == ["g1", "g1", "p3"]


def cuts(rows, key):
    """Whose films lie in two splits."""
    splits = {}
    for row, release in rows:
        splits.setdefault(row[key], set()).add(release.split)
    return [name for name, found in splits.items() if name and len(found) > 1]


def test_no_patient_and_no_group_is_cut_where_both_are_known_in_part(tmp_path):
    rng = np.random.default_rng(0)
    rows = [[f"{i}.png", "t", f"p{rng.integers(120)}", f"g{rng.integers(90)}"] for i in range(240)]
    for row in rows:
        row[rng.integers(2, 4)] *= bool(rng.random() < 0.4)
    rows[0][2:] = rows[1][2:] = ["", ""]
    file = write(tmp_path / "t.csv", rows, ["path", "text", "patient_id", "group_id"])
    release = read(file)
    assert release.skipped == [(f"{i}.png", f"t.csv:{i + 2}: neither a patient nor a group") for i in (0, 1)]
    pairs = list(zip(rows[2:], release.rows, strict=True))
    assert cuts(pairs, 2) == cuts(pairs, 3) == []
    # the slow way: unite what shares a name until nothing changes
    units = [{i} for i in range(2, 240)]
    for key in (2, 3):
        for name in {row[key] for row in rows} - {""}:
            joined = [unit for unit in units if any(rows[i][key] == name for i in unit)]
            units = [unit for unit in units if unit not in joined] + [set().union(*joined)]
    named = {}
    for i, row in enumerate(release.rows, start=2):
        named.setdefault(row.patient_id, set()).add(i)
    assert sorted(map(sorted, named.values())) == sorted(map(sorted, units))
    assert 20 < len(units) < 150


def test_rows_that_where_leaves_aside_still_join_and_a_column_may_be_called_row(tmp_path):
    rows = [["a.png", "t", "p1", "", "1"], ["b.png", "t", "p1", "g", "2"], ["c.png", "t", "p2", "g", "1"]]
    file = write(tmp_path / "t.csv", rows, ["path", "text", "patient", "group", "row"])
    release = read(file, where={"row": 1})
    assert [(r.image_id, r.patient_id, r.source) for r in release.rows] == [
        ("a.png", "g", "t.csv:2"),
        ("c.png", "g", "t.csv:4"),
    ]
    assert read(file, columns={"id": "row"}, where={"row": 2}).rows[0].image_id == "2"


def test_a_table_with_a_split_and_without_patients_says_so(tmp_path):
    file = write(tmp_path / "t.csv", [["a.png", "t", "train"]], ["path", "text", "split"])
    with pytest.warns(UserWarning, match="no column of patients; each image counts as another patient's"):
        (row,) = read(file).rows
    assert row.patient_id == "a.png"


def test_grouped_split_depends_on_the_group_alone():
    groups = [f"g{i}" for i in range(200)]
    whole = dict(zip(groups, grouped_split(groups), strict=True))
    assert grouped_split(groups[::-7]) == [whole[g] for g in groups[::-7]]
    assert set(grouped_split(groups, fractions=(0.5, 0.5, 0.0))) == {"train", "val"}
    with pytest.raises(ValueError, match="three shares"):
        grouped_split(groups, fractions=(0.8, 0.1, 0.2))


def test_a_path_that_leaves_the_folder_is_left_out(tmp_path):
    outside = ["../../x.png", "/etc/x.png", "images/../../x.png", "", "."]
    rows = [[p, "text", "p", "train"] for p in [*outside, "images/../ok.png", str(tmp_path / "data/abs.png")]]
    file = write(tmp_path / "data/t.csv", rows, ["path", "text", "patient", "split"])
    release = read(file, columns={"id": "path"})
    assert [r.image for r in release.rows] == [tmp_path / "data/ok.png", tmp_path / "data/abs.png"]
    assert len(release.skipped) == 5
    assert release.skipped[0] == (
        "../../x.png",
        "t.csv:2: ../../x.png points outside data; set images to the folder of all images",
    )
    (moved,) = read(write(tmp_path / "data/t.csv", [["x.png", "t", "p", "train"]], HEAD[:4]), images="..").rows
    assert moved.image == tmp_path / "x.png"


def test_a_long_report_is_left_out(tmp_path):
    rows = [["a.png", "x " * 5_000_000, "p", "train"], ["b.png", "short", "p", "train"]]
    release = read(write(tmp_path / "t.csv", rows, HEAD[:4]))
    assert [r.image_id for r in release.rows] == ["b.png"]
    assert "more than 1000000 characters" in release.skipped[0][1]


@pytest.mark.parametrize(
    ("rows", "head", "options", "match"),
    [
        ([*ROWS, ROWS[0]], HEAD, {}, r"t.csv: row 6 repeats the image id 'images/a.png' of row 2"),
        ([["a.png", "x", "p", "holdout", ""]], HEAD, {}, r"t.csv: row 2: unknown split 'holdout'"),
        ([["a.png", "x", "p", "train", "maybe"]], HEAD, {}, r"t.csv: row 2: label_Edema is 'maybe'"),
        (ROWS, ["x", *HEAD[1:]], {}, "no column of image paths; name one of x, text"),
        (ROWS, ["path", "x", *HEAD[2:]], {}, "no column of texts"),
        (ROWS, HEAD, {"columns": {"labels": ["Edema"]}}, "no column 'Edema'; did you mean label_Edema"),
        ([[*ROWS[0], "more"]], HEAD, {}, "row 2 has more values than the header"),
        ([*ROWS, [*ROWS[0], "more"]], HEAD, {}, "not a readable table .*line 6"),
    ],
)
def test_mistakes_name_file_and_row(tmp_path, rows, head, options, match):
    with pytest.raises(SistaError, match=match) as error:
        read(write(tmp_path / "t.csv", rows, head), **options)
    assert "\n" not in str(error.value)


def test_which_table(tmp_path):
    with pytest.raises(SistaError, match="nowhere: no such file or folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(SistaError, match="no table; name one"):
        read(tmp_path)
    write(tmp_path / "studies.csv")
    assert len(read(tmp_path).rows) == 3
    write(tmp_path / "other.csv")
    with pytest.raises(SistaError, match=r"several tables \(other.csv, studies.csv\)"):
        read(tmp_path)
    with pytest.raises(SistaError, match=r"study.csv: no such table; did you mean studies.csv"):
        read(tmp_path, table="study.csv")
    (tmp_path / "t.xlsx").write_bytes(b"x")
    with pytest.raises(SistaError, match=r"t.xlsx: not a readable table \(known: .csv"):
        read(tmp_path / "t.xlsx")
    (tmp_path / "nul.csv").write_bytes(b"path,text\0")
    with pytest.raises(SistaError, match="NUL"):
        read(tmp_path / "nul.csv")


@pytest.mark.real
def test_real_set(tmp_path):
    root = Path(os.environ.get("SISTA_REAL_DATA", Path(__file__).parents[2] / "../shared/data/cxr"))
    if not (root / "studies.csv").is_file():
        pytest.skip(f"no real data at {root}; set SISTA_REAL_DATA")
    release = read(root, table="studies.csv", columns={"labels": ["pneumonia", "no_finding"]})
    assert len(release.rows) == 219
    assert {r.split for r in release.rows} == {"train", "val"}
    groups = {split: {r.patient_id for r in release.rows if r.split == split} for split in ("train", "val")}
    assert not groups["train"] & groups["val"]
    assert len({r.findings for r in release.rows}) == 176
    frontal = read(root, table="studies.csv", where={"projection": "frontal", "report_describes_image": 1})
    assert len(frontal.rows) == 149
    store = prepare(frontal, tmp_path / "store", size=64, workers=2, max_bad=0, progress=False)
    assert len(store) == 149
    masked = store.manifest.index[store.manifest["has_mask"]]
    assert len(masked) > 50
    # a lung field takes a fifth to a half of the radiograph, and where no mask is known all is ignored
    shares = [(store.mask(i) == 255).mean() for i in masked]
    assert 0.1 < min(shares) < max(shares) < 0.6
    assert (store.mask(store.manifest.index[~store.manifest["has_mask"]][0]) == 127).all()


def test_boxes_of_a_second_table_are_cut_at_the_image(tmp_path):
    write(tmp_path / "studies.csv")
    head = ["image_id", "category", "x", "y", "w", "h"]
    rows = [
        ["images/a.png", "nodule", "1", "2", "3", "4"],
        ["images/a.png", "mass", "-5", "30", "10.5", "99"],
        ["images/b.png", "mass", "1", "2", "nan", "4"],
        ["images/d.png", "mass", "1", "2", "0", "4"],
        ["d.png", "mass", "1", "2", "3", "4"],
        ["images/c.png", "mass", "1", "2", "3", "4"],
    ]
    write(tmp_path / "boxes.csv", rows, head)
    release = read(tmp_path, table="studies.csv", boxes="boxes.csv")
    assert [row.boxes and len(row.boxes) for row in release.rows] == [2, None, None]
    assert release.skipped[0][1] == "boxes.csv:4: box [1.0, 2.0, nan, 4.0] is no rectangle"
    assert "boxes.csv:5" in release.skipped[1][1]
    assert release.skipped[2] == ("d.png", "boxes.csv:6: 'd.png' is not in studies.csv")
    assert len(release.skipped) == 4, "the image c is there, and left out for its report"
    # an image that `where` leaves aside is not unknown
    assert read(tmp_path, table="studies.csv", boxes="boxes.csv", where={"path": "images/b.png"}).skipped == [
        skip for skip in release.skipped if "boxes.csv" in skip[1]
    ]
    for row in release.rows:
        row.image.parent.mkdir(exist_ok=True)
        Image.new("L", (40, 50)).save(row.image)
    store = prepare(release, tmp_path / "store", size=50, progress=False)
    assert json.loads(store.manifest["boxes"][0]) == [
        {"category": "nodule", "x": 6.0, "y": 2.0, "w": 3.0, "h": 4.0},
        {"category": "mass", "x": 5.0, "y": 30.0, "w": 5.5, "h": 20.0},
    ]
    rows[0][2] = "40"
    write(tmp_path / "boxes.csv", rows, head)
    outside = read(tmp_path, table="studies.csv", boxes="boxes.csv")
    store = prepare(outside, tmp_path / "outside", size=50, max_bad=0.5, progress=False)
    assert "box 40 2 3 4 outside the image of 40×50" in (tmp_path / "outside/skipped.csv").read_text()
    with pytest.raises(SistaError, match="no such table"):
        read(tmp_path, table="studies.csv", boxes="boxen.csv")
    write(tmp_path / "boxes.csv", rows[4:5], head)
    with pytest.raises(SistaError, match=r"boxes.csv: row 2: 'd.png' is no image of studies.csv, nor is any other"):
        read(tmp_path, table="studies.csv", boxes="boxes.csv")


@pytest.mark.real
def test_masks_boxes_and_blank_labels_of_real_images(real_data, tmp_path):
    labels = ["covid19", "pneumonia", "no_finding"]
    release = read(
        real_data, table="studies.csv", boxes="boxes.csv", require_report=False,
        columns={"labels": labels, "group": "group_id"},
    )  # fmt: skip
    truth = pd.read_csv(real_data / "studies.csv", dtype={"patient_id": str}).set_index("image_id")
    drawn = pd.read_csv(real_data / "boxes.csv")
    release.rows = [row for row in release.rows if row.mask is not None or row.boxes]
    store = prepare(release, tmp_path / "store", size=128, workers=2, progress=False)
    assert len(store) == len(release.rows) == len(set(truth.index[truth["mask"].notna()]) | set(drawn["image_id"]))
    masks = np.stack([store.mask(i) for i in np.flatnonzero(store.manifest["has_mask"])])
    assert len(masks) == truth["mask"].notna().sum() == 139
    assert set(np.unique(masks)) == {0, 127, 255}
    # a lung is a fifth to a half of a chest film
    assert 0.1 < np.median((masks == 255).mean((1, 2))) < 0.5
    boxes = {name: json.loads(text) for name, text in store.manifest.set_index("image_id")["boxes"].dropna().items()}
    assert sum(map(len, boxes.values())) == len(drawn)
    for name, found in boxes.items():
        scale = 128 / max(truth.loc[name, "width"], truth.loc[name, "height"])
        expected = drawn[drawn["image_id"] == name]
        assert [b["category"] for b in found] == expected["category"].tolist()
        for box, w in zip(found, expected["w"], strict=True):
            assert box["w"] <= w * scale + 0.01
            assert box["x"] >= 0
            assert box["x"] + box["w"] <= 128.01
    known = truth.loc[store.manifest["image_id"], "pneumonia"].notna()
    assert store.manifest["label_pneumonia"].notna().sum() == known.sum()
