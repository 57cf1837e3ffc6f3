"""ChestX-ray14: labels and boxes that were drawn come back; bracketed headers, folders, lists; splits; bad tables."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sista_pl.data.doctor import Subject, diagnose
from sista_pl.data.formats import READERS
from sista_pl.data.formats.chestxray14 import LABELS
from sista_pl.data.phantom import write_phantom
from sista_pl.data.phantom.layouts.chestxray14 import LABEL_OF
from sista_pl.data.prepare import prepare
from sista_pl.data.splits import split_table
from sista_pl.errors import SistaError

STUDIES = 120
TABLE, BOXES = "Data_Entry_2017_v2020.csv", "BBox_List_2017.csv"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chestxray14") / "raw"
    return write_phantom("chestxray14", folder, STUDIES, seed=5, size=96, workers=1, progress=False)


def read(root, **options):
    return READERS.build({"name": "chestxray14", "root": root, **options})


def copy(root, folder):
    """The tables, and the films as links: the reader lists them and opens none."""
    folder.mkdir(exist_ok=True)
    for file in [*root.glob("*.csv"), *root.glob("*.txt")]:
        shutil.copy(file, folder)
    (folder / "images").mkdir(exist_ok=True)
    for file in root.glob("images_*/images/*.png"):
        (folder / "images" / file.name).symlink_to(file)
    return folder


def drawn_boxes(row):
    """The boxes of the truth, under the names of the release."""
    return [(LABEL_OF[kind], *map(float, place)) for kind, *place in json.loads(row.boxes) if kind in LABEL_OF]


def without_order(rows):
    return sorted((row.image_id, row.patient_id, row.study_id, row.view, row.split, repr(row.labels), repr(row.boxes))
                  for row in rows)  # fmt: skip


def test_the_store_holds_what_was_drawn(root, tmp_path):
    truth = pd.read_parquet(root / "phantom/truth.parquet").set_index("image_id")
    release = read(root)
    assert release.phantom
    assert release.version == "ChestX-ray14 v2020"
    assert not release.skipped
    # at their own size, boxes are compared to the pixel
    store = prepare(release, tmp_path / "store", size=96, progress=False)
    manifest = store.manifest.set_index("image_id")
    assert len(manifest) == STUDIES
    assert set(manifest.index) == set(truth.index)
    small = prepare(release, tmp_path / "small", size=40, progress=False).manifest.set_index("image_id")
    boxed = 0
    for name, row in truth.iterrows():
        found, kinds = manifest.loc[name], {f["kind"] for f in json.loads(row.drawn)["findings"]}
        for label in LABELS:
            assert found[f"label_{label}"] == bool(kinds & {k for k, v in LABEL_OF.items() if v == label}), label
        assert found["label_No Finding"] == (not kinds & LABEL_OF.keys())
        assert found["view"] == json.loads(row.drawn)["view"]
        assert (found["split"] == "test") == (row.split == "test")
        assert found["patient_id"] == str(row.patient + 1)
        if not row.boxed:
            assert pd.isna(found["boxes"]), "nobody looked"
            continue
        boxed += 1
        place = [(box["category"], *(box[key] for key in "xywh")) for box in json.loads(found["boxes"])]
        assert sorted(place) == sorted(drawn_boxes(row))
        scaled = [[box[key] for key in "xywh"] for box in json.loads(small.loc[name, "boxes"])]
        np.testing.assert_allclose(scaled, np.array([box[1:] for box in place]) * 40 / 96, atol=0.005 + 1e-9)
    assert boxed >= 3
    films = store.images(range(STUDIES)).astype(float)
    # spine and abdomen against the lungs beside them
    assert films[:, 40:70, 45:51].mean() > films[:, 30:50, 22:34].mean() + 30
    assert {check.name for check in diagnose(Subject.of_store(store)) if check.level == "problem"} == set()


def test_the_awkward_parts_are_there(root):
    header = (root / TABLE).read_text().split("\n")[0]
    assert len(header.split(",")) == 11
    assert "OriginalImage[Width,Height]" in header
    assert (root / BOXES).read_text().split("\n")[0] == "Image Index,Finding Label,Bbox [x,y,w,h],,,"
    assert "Infiltrate," in (root / BOXES).read_text()
    assert all(line.endswith(",,,") for line in (root / BOXES).read_text().splitlines())
    assert {Image.open(file).mode for file in root.glob("images_*/images/*.png")} == {"L", "RGBA"}
    assert sorted(folder.name for folder in root.glob("images_*")) == ["images_001", "images_002"]


def test_rgba_films_are_as_gray_ones(root, tmp_path):
    release = read(root)
    store = prepare(release, tmp_path / "store", size=96, progress=False)
    colours = [n for n, row in enumerate(release.rows) if Image.open(row.image).mode == "RGBA"]
    assert colours
    for index in colours:
        np.testing.assert_array_equal(store.image(index), np.asarray(Image.open(release.rows[index].image))[..., 0])


def test_flat_images_older_table_and_infiltrate(root, tmp_path):
    whole = read(root)
    folder = copy(root, tmp_path)
    flat = read(folder)
    assert without_order(flat.rows) == without_order(whole.rows)
    assert {row.image.parent for row in flat.rows} == {folder / "images"}
    # the films beside the tables
    for file in (folder / "images").iterdir():
        file.rename(folder / file.name)
    assert without_order(read(folder).rows) == without_order(whole.rows)
    # the older table ends its lines with a comma, and has other labels
    lines = (folder / TABLE).read_text().splitlines()
    (folder / TABLE).unlink()
    name = lines[1].split(",")[0]
    lines[1] = ",".join([name, "Hernia|Fibrosis", *lines[1].split(",")[2:]])
    (folder / "Data_Entry_2017.csv").write_text("\r\n".join(f"{line}," for line in lines) + "\r\n\r\n")
    older = read(folder)
    assert older.version == "ChestX-ray14 2017"
    labels = {row.image_id: row.labels for row in older.rows}
    assert {label for label, value in labels[name].items() if value} == {"Hernia", "Fibrosis"}
    assert len(older.rows) == STUDIES
    # with both tables, the newer counts
    shutil.copy(root / TABLE, folder)
    assert read(folder).version == "ChestX-ray14 v2020"
    test = next(row for row in whole.rows if row.split == "test" and not row.boxes).image_id
    (folder / BOXES).write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\r\n"
        f"{test},Infiltrate,1.5,2.25,30.0,40.0,,,\r\n{test},Atelectasis,5,6,7,8,,,\r\n\r\n"
    )
    boxes = {row.image_id: row.boxes for row in read(folder).rows if row.boxes is not None}
    assert boxes == {test: [{"category": "Infiltration", "x": 1.5, "y": 2.25, "w": 30.0, "h": 40.0},
                            {"category": "Atelectasis", "x": 5.0, "y": 6.0, "w": 7.0, "h": 8.0}]}  # fmt: skip
    (folder / BOXES).unlink()
    assert {repr(row.boxes) for row in read(folder).rows} == {"None"}


def test_official_lists_of_the_whole_release():
    # 86,524 films of 28,008 patients and 25,596 of 2,797 others
    train = [f"{1 + n % 28_008}" for n in range(86_524)]
    test = [f"{30_000 + n % 2_797}" for n in range(25_596)]
    table = pd.DataFrame({"patient_id": train + test, "official": ["train_val"] * len(train) + ["test"] * len(test)})
    table["split"] = split_table("chestxray14/official", table)
    counts = table["split"].value_counts()
    assert counts["test"] == 25_596
    assert counts["train"] + counts["val"] == 86_524
    assert counts["val"] == pytest.approx(8_652, rel=0.06)
    assert ((table["split"] == "test") == (table["official"] == "test")).all()
    assert table.groupby("patient_id")["split"].nunique().max() == 1
    part = table.sample(frac=0.1, random_state=0)
    assert split_table("chestxray14/official", part) == part["split"].tolist()
    assert split_table("chestxray14/official", part, seed=1) != part["split"].tolist()
    assert set(split_table("chestxray14/official", table[:4].assign(official=""))) == {""}
    grouped = table.assign(split=split_table("chestxray14/grouped", table))
    assert grouped.groupby("patient_id")["split"].nunique().max() == 1
    assert grouped["split"].value_counts(normalize=True)["train"] == pytest.approx(0.8, abs=0.02)


def test_splits_are_functions_of_ids(root, tmp_path):
    folder, whole = copy(root, tmp_path), read(root)
    for name in (TABLE, "train_val_list.txt", "test_list.txt"):
        lines = (folder / name).read_text().splitlines()
        head, rest = (lines[:1], lines[1:]) if name == TABLE else ([], lines)
        (folder / name).write_text("\r\n".join([*head, *rest[::-1]]))
    release = read(folder)
    assert without_order(release.rows) == without_order(whole.rows)
    assert release.options["split_sha256"] == whole.options["split_sha256"]
    official = set((root / "test_list.txt").read_text().split())
    assert {row.image_id for row in whole.rows if row.split == "test"} == official
    parts = pd.DataFrame([(row.patient_id, row.split) for row in whole.rows], columns=["patient", "split"])
    assert parts.groupby("patient")["split"].nunique().max() == 1
    # without the lists a split by patient is offered, and what stands in no list is left out
    (folder / "test_list.txt").unlink()
    with pytest.raises(SistaError, match=r"test_list\.txt not found; .* split=chestxray14/grouped"):
        read(folder)
    assert len(read(folder, split="chestxray14/grouped").rows) == STUDIES
    (folder / "test_list.txt").write_text("")
    rest = read(folder)
    assert len(rest.rows) == STUDIES - len(official)
    assert {name for name, _ in rest.skipped} == official
    assert all("in neither train_val_list.txt nor test_list.txt" in why for _, why in rest.skipped)
    with pytest.raises(SistaError, match="did you mean chestxray14/official"):
        read(folder, split="chestxray14/oficial")


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("../../etc/passwd,Mass,0,1,60,M,PA,9,9,1,1", "no image of that name"),
        ("/etc/passwd,Mass,0,1,60,M,PA,9,9,1,1", "no image of that name"),
        ("images/{name},Mass,0,1,60,M,PA,9,9,1,1", "no image of that name"),
        (",No Finding,0,1,60,M,PA,9,9,1,1", "no image of that name"),
        ("nan,No Finding,0,1,60,M,PA,9,9,1,1", "no image of that name"),
        ("spare.png,No Finding,0,,60,M,PA,9,9,1,1", "no patient id"),
    ],
)
def test_a_bad_row_is_left_out_and_counted(root, tmp_path, row, why):
    folder = copy(root, tmp_path)
    Image.new("L", (9, 9)).save(folder / "images/spare.png")
    name = read(root).rows[0].image_id
    (folder / TABLE).write_text((folder / TABLE).read_text() + row.format(name=name) + "\n")
    release = read(folder)
    assert without_order(release.rows) == without_order(read(root).rows)
    assert len(release.skipped) == 1
    assert why in release.skipped[0][1]
    assert f"{TABLE}:{STUDIES + 2}" in release.skipped[0][1]


@pytest.mark.parametrize("place", ["1,2,nan,4", "1,2,-3,4", "1,2,3,0", "inf,2,3,4", ",,,", "a,b,c,d"])
def test_an_image_with_a_bad_box_is_left_out_and_counted(root, tmp_path, place):
    folder = copy(root, tmp_path)
    name = next(row for row in read(root).rows if row.boxes).image_id
    (folder / BOXES).write_text((folder / BOXES).read_text() + f"{name},Mass,{place},,,\n")
    release = read(folder)
    assert len(release.rows) == STUDIES - 1
    assert [(image, why.split(": ")[1]) for image, why in release.skipped] == [
        (name, f"a box of it in {BOXES} is no rectangle")
    ]


def test_boxes_of_an_unknown_image_are_counted(root, tmp_path):
    folder = copy(root, tmp_path)
    text = (folder / BOXES).read_text()
    (folder / BOXES).write_text(f"{text}../x.png,Mass,1,2,3,4,,,\n../x.png,Mass,1,2,3,9,,,\n")
    release = read(folder)
    assert without_order(release.rows) == without_order(read(root).rows)
    number = len(text.splitlines()) + 1
    assert release.skipped == [("../x.png", f"{BOXES}:{number}: '../x.png' is not in {TABLE}")]


def test_boxes_that_leave_the_film(root, tmp_path):
    folder = copy(root, tmp_path / "raw")
    release = read(folder)
    inside, outside = [row.image_id for row in release.rows if row.split == "test"][:2]
    (folder / BOXES).write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
        f"{inside},Mass,-10,80.5,30,40,,,\n{inside},Nodule,0,0,96,96,,,\n{outside},Mass,96,10,5,5,,,\n"
    )
    store = prepare(read(folder), tmp_path / "store", size=96, max_bad=0.1, progress=False)
    boxes = store.manifest.set_index("image_id")["boxes"].dropna()
    assert {name: json.loads(text) for name, text in boxes.items()} == {
        inside: [{"category": "Mass", "x": 0.0, "y": 80.5, "w": 20.0, "h": 15.5},
                 {"category": "Nodule", "x": 0.0, "y": 0.0, "w": 96.0, "h": 96.0}]
    }  # fmt: skip
    assert len(store) == STUDIES - 1
    assert f"{outside}: box 96 10 5 5 outside the image of 96×96" in (store.path / "skipped.csv").read_text()
    assert {check.name for check in diagnose(Subject.of_store(store)) if check.level == "problem"} == set()


@pytest.mark.parametrize(
    ("file", "change", "why"),
    [
        (TABLE, lambda text: text.replace("Finding Labels", "Labels"), "no column 'Finding Labels'"),
        (TABLE, lambda text: text.replace("Follow-up #", "Follow-up"), "no column 'Follow-up #'"),
        (TABLE, lambda text: text.replace("No Finding", "No finding", 1), "label 'No finding'; known: No Finding"),
        (TABLE, lambda text: text + "00000001_000.png,Mass\n", f"row {STUDIES + 2} has 2 fields"),
        (TABLE, lambda text: text + text.split("\n")[1] + "\n", f"row {STUDIES + 2} repeats the image id"),
        (TABLE, lambda text: text + "a\0", "not a readable CSV"),
        (TABLE, lambda text: "", "no column 'Image Index'"),
        (BOXES, lambda text: text.replace("Finding Label", "Label"), "no column 'Finding Label'"),
        (BOXES, lambda text: text + "00000001_000.png,Mass,1,2\n", "has 4 fields"),
        (BOXES, lambda text: text + "00000001_000.png,Masses,1,2,3,4,,,\n", "label 'Masses'; known: Atelectasis"),
        (BOXES, lambda text: "", "no column 'Image Index'"),
        ("test_list.txt", lambda text: text + "00000001_000.png\n", r"00000001_000\.png is in both lists"),
        ("test_list.txt", lambda text: text + "\0", "not a readable list"),
    ],
)  # fmt: skip
def test_bad_tables_are_one_line(root, tmp_path, file, change, why):
    folder = copy(root, tmp_path)
    assert (folder / "train_val_list.txt").read_text().startswith("00000001_000.png")
    (folder / file).write_text(change((folder / file).read_text()))
    with pytest.raises(SistaError, match=why) as error:
        read(folder)
    assert "\n" not in str(error.value)


def test_no_table_and_no_films(tmp_path, root):
    with pytest.raises(SistaError, match=r"Data_Entry_2017_v2020\.csv not found"):
        read(tmp_path)
    folder = copy(root, tmp_path)
    shutil.rmtree(folder / "images")
    release = read(folder)
    assert not release.rows
    assert len(release.skipped) == STUDIES
    with pytest.raises(SistaError, match=f"no image to prepare, {STUDIES} were left out, most as: no image of that"):
        prepare(release, tmp_path / "store", size=32, progress=False)


def test_folders_may_be_linked_and_loops_end(root, tmp_path):
    copy(root, tmp_path)
    shutil.rmtree(tmp_path / "images")
    for folder in root.glob("images_*"):
        (tmp_path / folder.name).symlink_to(folder)
    (tmp_path / "again").symlink_to(tmp_path)
    assert without_order(read(tmp_path).rows) == without_order(read(root).rows)
