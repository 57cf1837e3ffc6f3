"""Object-CXR: every drawn object comes back as its box; names, folders and shapes of the release; splits; bad rows."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw

from sista_pl.data.doctor import Subject, diagnose
from sista_pl.data.formats import READERS
from sista_pl.data.formats.object_cxr import parse_annotation
from sista_pl.data.images import BadImage
from sista_pl.data.phantom import write_phantom
from sista_pl.data.phantom.objects import draw_objects, put_objects
from sista_pl.data.prepare import prepare
from sista_pl.data.splits import split_table
from sista_pl.errors import SistaError

STUDIES = 70


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("object_cxr") / "raw"
    return write_phantom("object_cxr", folder, STUDIES, seed=4, size=96, workers=1, progress=False)


def read(root, **options):
    return READERS.build({"name": "object_cxr", "root": root, **options})


def copy(root, folder):
    """A release of tables alone: the reader touches no image."""
    folder.mkdir(exist_ok=True)
    for file in root.glob("*.csv"):
        shutil.copy(file, folder)
    return folder


def extents(annotation, height, width):
    """x y w h of each object by drawing it: the slow reference."""
    found = []
    for shape in annotation.split(";") if annotation else []:
        kind, *numbers = map(int, shape.split())
        film = Image.new("L", (width + 1, height + 1))
        draw = {0: "rectangle", 1: "rectangle", 2: "polygon"}[kind]
        getattr(ImageDraw.Draw(film), draw)(numbers, fill=1)
        ys, xs = np.nonzero(np.asarray(film))
        # a corner (x, y) is the edge of pixel x, so that the last pixel drawn is the end
        found.append([float(v) for v in (xs.min(), ys.min(), xs.max() - xs.min(), ys.max() - ys.min())])
    return found


def places(text):
    return [[box[key] for key in "xywh"] for box in json.loads(text)]


def test_the_store_holds_what_was_drawn(root, tmp_path):
    truth = pd.read_parquet(root / "phantom/truth.parquet").set_index("image_id")
    release = read(root)
    assert release.phantom
    assert release.version == "Object-CXR"
    assert not release.skipped
    assert [row.image_id for row in release.rows if row.image_id.startswith("dev/")] == [
        name for name in truth.index if name.startswith("dev/")
    ]
    # at their own size, boxes are compared to the pixel: the short side is centred
    store = prepare(release, tmp_path / "store", size=96, progress=False)
    manifest = store.manifest.set_index("image_id")
    assert len(manifest) == STUDIES
    assert set(manifest.index) == set(truth.index)
    small = prepare(release, tmp_path / "small", size=40, progress=False).manifest.set_index("image_id")
    kinds, positives = set(), 0
    for name, row in truth.iterrows():
        found, drawn = manifest.loc[name], np.array(extents(row.annotation, row.rows, row.columns)).reshape(-1, 4)
        assert (found["width"], found["height"]) == (row.columns, row.rows)
        left, top = (96 - row.columns) // 2, (96 - row.rows) // 2
        np.testing.assert_array_equal(np.reshape(places(found["boxes"]), (-1, 4)), drawn + [left, top, 0, 0])
        assert found["label_foreign_object"] == bool(len(drawn))
        assert (found["split"] == "test") == (row.split == "test")
        left, top = (40 - round(row.columns * 40 / 96)) // 2, (40 - round(row.rows * 40 / 96)) // 2
        np.testing.assert_allclose(np.reshape(places(small.loc[name, "boxes"]), (-1, 4)),
                                   drawn * 40 / 96 + [left, top, 0, 0], atol=0.005 + 1e-9)  # fmt: skip
        kinds |= {shape.split()[0] for shape in row.annotation.split(";") if shape}
        positives += bool(len(drawn))
    assert kinds == {"0", "1", "2"}
    assert 15 < positives < STUDIES - 15
    assert {box["category"] for text in manifest["boxes"] for box in json.loads(text)} == {"foreign_object"}
    assert {check.name for check in diagnose(Subject.of_store(store)) if check.level == "problem"} == set()
    assert store.info["split"]["name"] == "object_cxr/official"


def test_objects_fill_their_boxes_and_are_seen(root):
    for seed in range(40):
        film = np.full((90, 80), 20, np.uint8)
        film[60:] = 190  # the abdomen
        rng = np.random.default_rng(seed)
        things = draw_objects(rng, 0.7, 4)
        shown, shapes = put_objects(film, things, rng)
        changed = shown != film
        boxed = np.zeros_like(changed)
        for kind, points in shapes:
            xs, ys = points[::2], points[1::2]
            box = np.s_[min(ys) : max(ys), min(xs) : max(xs)]
            boxed[box] = True
            assert len(points) == (10 if kind == 2 else 4)
            assert changed[box].mean() > 0.1
            # it reaches every side of its box
            assert all(
                side.any() for side in (changed[box][0], changed[box][-1], changed[box][:, 0], changed[box][:, -1])
            )
            assert shown[box].max() >= film[box].min() + 30
        # a polygon's outline covers a part of the pixels at its end
        ys, xs = np.nonzero(changed & ~boxed)
        assert all(boxed[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].any() for y, x in zip(ys, xs, strict=True))


SHAPES = [
    ("", []),
    (" ; ", []),
    ("0 10 20 30 50", [(10, 20, 20, 30)]),
    ("0 30 50 10 20", [(10, 20, 20, 30)]),
    ("1 1.5 2 3.25 4", [(1.5, 2, 1.75, 2)]),
    ("2 5 5 9 1 7 12", [(5, 1, 4, 11)]),
    ("2 5 5 9 1 7 12 5 5", [(5, 1, 4, 11)]),
    ("0 1 2 3 4;1 5 6 7 8;2 0 0 4 0 4 4 0 4", [(1, 2, 2, 2), (5, 6, 2, 2), (0, 0, 4, 4)]),
    ("0 1 2 3 4;", [(1, 2, 2, 2)]),
    (" 0  1 2 3 4 ; 0 1 2 3 4 ", [(1, 2, 2, 2), (1, 2, 2, 2)]),
]
BAD = [
    ("3 1 2 3 4", "shape of type '3'; 0 rectangle"),
    ("-1", "shape of type '-1'"),
    ("1.0 1 2 3 4", "shape of type '1.0'"),
    ("rectangle 1 2 3 4", "shape of type 'rectangle'"),
    ("0", "rectangle of 0 numbers"),
    ("0 1 2 3", "rectangle of 3 numbers"),
    ("1 1 2 3 4 5 6", "ellipse of 6 numbers"),
    ("2 1 2 3 4", "polygon of 4 numbers; two corners, or three points and more"),
    ("2 1 2 3 4 5 6 7", "polygon of 7 numbers"),
    ("0 1 2 nan 4", "rectangle of 4 numbers"),
    ("0 1 2 1e400 4", "rectangle of 4 numbers"),
    ("0 1 2 a 4", "rectangle with '1 2 a 4'; numbers are known"),
    ("0 1 2 3 a\0b", "numbers are known"),
    ("0 1 2 1 4", "rectangle without an area"),
    ("2 1 1 2 1 3 1", "polygon without an area"),
    ("0 1 2 3 4;0 5", "rectangle of 1 numbers"),
    ("x" * 5000, "shape of type 'xxx"),
]


@pytest.mark.parametrize(("text", "boxes"), SHAPES)
def test_shapes(text, boxes):
    assert [tuple(box[key] for key in "xywh") for box in parse_annotation(text)] == boxes


@pytest.mark.parametrize(("text", "why"), BAD)
def test_a_bad_shape_leaves_its_image_out_and_is_counted(root, tmp_path, text, why):
    with pytest.raises(BadImage, match=why) as error:
        parse_annotation(text)
    assert len(str(error.value)) < 200
    folder = copy(root, tmp_path)
    lines = (folder / "train.csv").read_text().splitlines()
    name = lines[4].split(",")[0]
    lines[4] = f"{name},{text}"
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    release = read(folder)
    assert [row.image_id for row in release.rows] == [
        row.image_id for row in read(root).rows if row.image_id != f"train/{name}"
    ]
    assert [skip for skip, _ in release.skipped] == [name]
    assert release.skipped[0][1].startswith("train.csv:5: ")


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "../train/a.jpg", "", "/", ".", "a\0b.jpg", "C:\\x.jpg", "..\\x.jpg"]
)
def test_a_bad_name_is_left_out_and_counted(root, tmp_path, name):
    folder = copy(root, tmp_path)
    (folder / "dev.csv").write_text((folder / "dev.csv").read_text() + f"{name},0 1 2 3 4\n")
    release, whole = read(folder), read(root)
    assert [row.image_id for row in release.rows] == [row.image_id for row in whole.rows]
    assert len(release.skipped) == 1
    assert "is no file of the release" in release.skipped[0][1]


@pytest.mark.parametrize("prefix", ["", "/path/", "/data/train/", "train/", "./"])
def test_image_path_and_image_name(root, tmp_path, prefix):
    folder = copy(root, tmp_path)
    for file in folder.glob("*.csv"):
        head, *lines = file.read_text().splitlines()
        column = "image_path" if prefix else "image_name"
        lines = [f"{prefix}{line}" for line in lines]
        file.write_text("\r\n".join([head.replace("image_name", column), *lines]) + "\r\n")
    for part in ("train", "dev"):
        (folder / part).mkdir()
    release, whole = read(folder), read(root)
    assert [row.image.relative_to(folder) for row in release.rows] == [
        row.image.relative_to(root) for row in whole.rows
    ]
    assert [(row.image_id, row.split, row.boxes) for row in release.rows] == [
        (row.image_id, row.split, row.boxes) for row in whole.rows
    ]
    assert not release.skipped


def test_the_inner_folder_of_the_zip(root, tmp_path):
    folder = tmp_path / "raw"
    shutil.copytree(root, folder)
    for part in ("train", "dev"):
        (folder / part).rename(folder / "inner")
        (folder / part).mkdir()
        (folder / "inner").rename(folder / part / part)
    release = read(folder)
    assert all(row.image.is_file() for row in release.rows)
    assert {row.image.parent for row in release.rows} == {folder / "train/train", folder / "dev/dev"}
    assert [row.image_id for row in release.rows] == [row.image_id for row in read(root).rows]
    assert len(prepare(release, tmp_path / "store", size=32, progress=False)) == STUDIES


def test_splits_are_functions_of_ids(root, tmp_path):
    table = pd.DataFrame(
        {"image_id": [f"train/{n:05d}.jpg" for n in range(8000)] + [f"dev/{n}.jpg" for n in range(1000)]}
    )
    table["official"] = [name.split("/")[0] for name in table["image_id"]]
    table["split"] = split_table("object_cxr/official", table)
    assert table["split"].value_counts().to_dict() == {"train": 7200, "val": 800, "test": 1000}
    assert ((table["split"] == "test") == (table["official"] == "dev")).all()
    shuffled = table.sample(frac=1, random_state=0)
    assert split_table("object_cxr/official", shuffled) == shuffled["split"].tolist()
    assert split_table("object_cxr/official", table, seed=1) != table["split"].tolist()
    folder, whole = copy(root, tmp_path), read(root)
    for file in folder.glob("*.csv"):
        head, *lines = file.read_text().splitlines()
        file.write_text("\n".join([head, *lines[::-1]]) + "\n")
    release = read(folder)
    assert {row.image_id: row.split for row in release.rows} == {row.image_id: row.split for row in whole.rows}
    assert release.options["split_sha256"] == whole.options["split_sha256"]
    (folder / "dev.csv").unlink()
    assert {row.image_id: row.split for row in read(folder).rows} == {
        row.image_id: row.split for row in whole.rows if row.split != "test"
    }
    with pytest.raises(SistaError, match="did you mean object_cxr/official"):
        read(root, split="object_cxr/oficial")


def test_objects_that_leave_the_film(root, tmp_path):
    folder = tmp_path / "raw"
    shutil.copytree(root, folder)
    rows = [row for row in read(folder).rows if row.split == "test"]
    width, height = Image.open(rows[0].image).size
    lines = (folder / "dev.csv").read_text().splitlines()
    lines[1] = f"{rows[0].image.name},2 -10 -5 20 -5 20 30;0 5 5 {width + 50} {height + 60}"
    lines[2] = f"{rows[1].image.name},0 10 10 20 20;1 {width + 60} 5 {width + 90} 9"
    (folder / "dev.csv").write_text("\n".join(lines) + "\n")
    store = prepare(read(folder), tmp_path / "store", size=96, max_bad=0.1, progress=False)
    left, top = (96 - width) // 2, (96 - height) // 2
    boxes = store.manifest.set_index("image_id").loc[rows[0].image_id, "boxes"]
    assert places(boxes) == [[left, top, 20, 30], [left + 5, top + 5, width - 5, height - 5]]
    assert len(store) == STUDIES - 1
    assert f"{rows[1].image_id}: box" in (store.path / "skipped.csv").read_text()
    assert {check.name for check in diagnose(Subject.of_store(store)) if check.level == "problem"} == set()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda text: text.replace("image_name", "name", 1), "no column 'image_name'"),
        (lambda text: text.replace("annotation", "annotations", 1), "no column 'annotation'; did you mean annotations"),
        (lambda text: text + text.split("\n")[1] + "\n", "repeats the image id 'train/"),
        (lambda text: text.replace("\n", "\nsub/" + text.split("\n")[1] + "\n", 1), "row 3 repeats the image id"),
        (lambda text: "", "not a readable CSV"),
    ],
)
def test_bad_tables_are_one_line(root, tmp_path, change, why):
    folder = copy(root, tmp_path)
    (folder / "train.csv").write_text(change((folder / "train.csv").read_text()))
    with pytest.raises(SistaError, match=why) as error:
        read(folder)
    assert "\n" not in str(error.value)


def test_no_table(tmp_path):
    with pytest.raises(SistaError, match=r"train\.csv not found"):
        read(tmp_path)


@pytest.mark.parametrize("row", ["a.jpg,0 1 2 3 4,x", "a.jpg,,x,y"])
def test_a_row_longer_than_the_header_shifts_nothing(tmp_path, row):
    (tmp_path / "train.csv").write_text(f"image_name,annotation\n{row}\nb.jpg,\n")
    with pytest.raises(SistaError, match=r"train\.csv: row 2 has more values than the header"):
        read(tmp_path)
