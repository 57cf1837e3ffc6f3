"""COVIDx: the classes that were drawn come back; the versions of its lists and their odd lines; splits; bad lists."""

import shutil

import pandas as pd
import pytest

from sista_pl.data.doctor import Subject, diagnose
from sista_pl.data.formats import READERS
from sista_pl.data.phantom import write_phantom
from sista_pl.data.prepare import prepare
from sista_pl.data.splits import split_table
from sista_pl.errors import SistaError

STUDIES = 90
CLASSES = ("normal", "pneumonia", "COVID-19")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("covidx") / "raw"
    return write_phantom("covidx", folder, STUDIES, seed=4, size=96, workers=1, progress=False)


def read(root, **options):
    return READERS.build({"name": "covidx", "root": root, **options})


def lists(folder, suffix="", **places):
    """Write `train<suffix>.txt` and so on; the reader touches no image."""
    folder.mkdir(exist_ok=True)
    for place, lines in places.items():
        (folder / f"{place}{suffix}.txt").write_text("".join(f"{line}\n" for line in lines))
    return folder


def copy(root, folder):
    for file in root.glob("*.txt"):
        shutil.copy(file, folder)
    return folder / "train_COVIDx9A.txt"


def kind(row):
    assert sum(row.labels.values()) == 1
    return max(row.labels, key=row.labels.__getitem__)


def test_the_store_holds_what_was_drawn(root, tmp_path):
    truth = pd.read_parquet(root / "phantom/truth.parquet").set_index("image_id")
    release = read(root)
    assert release.phantom
    assert release.version == "COVIDx V9A"
    store = prepare(release, tmp_path / "store", size=96, progress=False)
    manifest = store.manifest.set_index("image_id")
    assert len(manifest) == STUDIES
    assert set(manifest.index) == set(truth.index)
    for name, row in truth.iterrows():
        found = manifest.loc[name]
        assert {label: found[f"label_{label}"] for label in CLASSES} == {label: label == row.kind for label in CLASSES}
        assert (found["split"] == "test") == (row.split == "test")
        assert (found["width"], found["height"]) == (row.columns, row.rows)
    assert min(truth["kind"].value_counts()[list(CLASSES)]) > 10
    films = store.images(range(STUDIES)).astype(float)
    # spine and abdomen against the lungs beside them
    assert films[:, 40:70, 45:51].mean() > films[:, 30:50, 22:34].mean() + 30
    assert {check.name for check in diagnose(Subject.of_store(store)) if check.level == "problem"} == set()
    # nothing but rows that come twice
    assert all("repeats the image" in why for _, why in release.skipped)
    lines = [line for file in root.glob("*.txt") for line in file.read_text().splitlines()]
    assert len(lines) == STUDIES + len(release.skipped)
    assert len(release.skipped) == len(lines) - len(set(lines)) > 0


def test_the_awkward_parts_are_there(root):
    release = read(root)
    train = (root / "train_COVIDx9A.txt").read_text().splitlines()
    assert {line.split()[-2] for line in train} == {*CLASSES, "positive"}
    assert any(" " in row.image.name for row in release.rows)
    assert {row.image.suffix for row in release.rows} == {".png", ".jpg"}
    assert all(row.image.is_file() for row in release.rows)
    numbers = pd.Series({row.patient_id: row.patient_id.split(":")[1] for row in release.rows})
    assert numbers.duplicated().any(), "the same number in two sources"


def test_a_patient_is_a_number_of_a_source(tmp_path):
    lines = ["7 a.png normal rsna", "7 b.png COVID-19 cohen", "COVID-00003b c d  e.jpg pneumonia actmed",
             "7 f.png normal rsna", "ANON12  g.jpeg   positive\tfig1"]  # fmt: skip
    release = read(lists(tmp_path, "_COVIDx8A", train=lines, test=["9 x.png normal rsna"]))
    assert [(row.patient_id, row.image.relative_to(tmp_path).as_posix(), kind(row)) for row in release.rows] == [
        ("rsna:7", "train/a.png", "normal"), ("cohen:7", "train/b.png", "COVID-19"),
        ("actmed:COVID-00003b", "train/c d  e.jpg", "pneumonia"), ("rsna:7", "train/f.png", "normal"),
        ("fig1:ANON12", "train/g.jpeg", "COVID-19"), ("rsna:9", "test/x.png", "normal"),
    ]  # fmt: skip
    assert not release.skipped


THREE = ["1 a.png normal rsna", "2 b.png pneumonia rsna", "3 c.png COVID-19 cohen", "4 d.png positive ricord"]
TWO = ["1 a.png negative rsna", "3 c.png positive cohen"]


@pytest.mark.parametrize(
    ("suffix", "lines", "version", "told"),
    [
        ("", THREE, "train.txt", "COVIDx (train.txt, test.txt)"),
        ("", TWO, "train.txt", "COVIDx (train.txt, test.txt)"),
        ("_COVIDx9A", THREE, "V9A", "COVIDx V9A"),
        ("_COVIDx9B", TWO, "V9B", "COVIDx V9B"),
        ("_COVIDx8A", THREE, "V8A", "COVIDx V8A"),
        ("_COVIDx8B", TWO, "V8B", "COVIDx V8B"),
        ("_COVIDx7A", THREE[:3], "V7A", "COVIDx V7A"),
        ("_COVIDx5", THREE[:3], "V5", "COVIDx V5"),
        ("_COVIDx_CXR-3A", THREE[:3], "CXR-3A", "COVIDx CXR-3A"),
        ("_COVIDx_CXR-3B", TWO, "CXR-3B", "COVIDx CXR-3B"),
        ("_COVIDx_CXR-2", TWO, "CXR-2", "COVIDx CXR-2"),
    ],
)
def test_versions(tmp_path, suffix, lines, version, told):
    # lists that no version claims lie beside them
    (tmp_path / "README.txt").write_text("read me")
    (tmp_path / "train_COVIDx9A_old.txt").write_text("1 a.png normal rsna")
    release = read(lists(tmp_path, suffix, train=lines, test=lines[::-1]))
    assert release.version == told
    assert release.options["version"] == version
    if lines is TWO:
        assert [row.labels for row in release.rows] == [{"COVID-19": value} for value in (0.0, 1.0, 1.0, 0.0)]
    else:
        kinds = [line.split()[2].replace("positive", "COVID-19") for line in lines]
        assert [kind(row) for row in release.rows] == [*kinds, *kinds[::-1]]
        assert all(list(row.labels) == list(CLASSES) for row in release.rows)
    assert [row.split for row in release.rows[len(lines) :]] == ["test"] * len(lines)


def test_cxr4_has_its_own_val(tmp_path):
    train = [f"{n} {n}.png {('negative', 'positive')[n % 2]} ricord" for n in range(80)]
    release = read(lists(tmp_path, train=train, val=["8 v.png negative x"], test=["9 t.png positive y"]))
    assert release.version == "COVIDx CXR-4 (train.txt, val.txt, test.txt)"
    assert [(row.image_id, row.split, row.labels["COVID-19"]) for row in release.rows] == [
        *((f"train/{n}.png", "train", n % 2) for n in range(80)), ("val/v.png", "val", 0), ("test/t.png", "test", 1),
    ]  # fmt: skip
    assert release.rows[80].image == tmp_path / "val/v.png"


def test_of_several_versions_one_is_chosen(tmp_path):
    for suffix, lines in (("_COVIDx9A", THREE), ("_COVIDx9B", TWO), ("", TWO)):
        lists(tmp_path, suffix, train=lines, test=lines)
    with pytest.raises(SistaError, match=r"lists of train\.txt, V9A, V9B; choose one with the option version"):
        read(tmp_path)
    assert read(tmp_path, version="V9B").version == "COVIDx V9B"
    assert len(read(tmp_path, version="V9A").rows) == 8
    assert read(tmp_path, version="train.txt").version == "COVIDx (train.txt, test.txt)"
    with pytest.raises(SistaError, match="no lists of version 'V9'; did you mean V9"):
        read(tmp_path, version="V9")
    # a lone list is none
    (tmp_path / "test_COVIDx9A.txt").unlink()
    (tmp_path / "test.txt").unlink()
    assert read(tmp_path).version == "COVIDx V9B"
    with pytest.raises(SistaError, match=r"train_COVIDx9A\.txt without its train and test lists"):
        read(tmp_path, version="V9A")


def test_the_official_lists_are_kept_and_val_are_whole_patients(tmp_path):
    # counts of V9A: 30,130 in train, 400 in test
    train = [f"{n // 3} {n}.png {CLASSES[n % 3]} {('rsna', 'cohen')[n // 6 % 2]}" for n in range(30_130)]
    test = [f"{n} {n}.png {CLASSES[n % 3]} rsna" for n in range(20_000, 20_400)]
    release = read(lists(tmp_path, "_COVIDx9A", train=train, test=test))
    names = ("image_id", "patient_id", "split")
    table = pd.DataFrame([[getattr(row, name) for name in names] for row in release.rows], columns=names)
    table["list"] = [name.split("/")[0] for name in table["image_id"]]
    counts = table["split"].value_counts()
    assert counts["test"] == 400
    assert counts["train"] + counts["val"] == 30_130
    assert counts["val"] == pytest.approx(3_013, rel=0.1)
    assert table[table["list"] == "train"].groupby("patient_id")["split"].nunique().max() == 1
    assert ((table["split"] == "test") == (table["list"] == "test")).all()
    # the order of the rows changes nothing, and a part of them is dealt as the whole
    part = table.sample(frac=0.5, random_state=0)
    assert split_table("covidx/official", part) == part["split"].tolist()
    assert split_table("covidx/official", part, seed=1) != part["split"].tolist()
    lists(tmp_path, "_COVIDx9A", train=train[::-1], test=test[::-1])
    other = read(tmp_path)
    assert {row.image_id: row.split for row in other.rows} == dict(zip(table["image_id"], table["split"], strict=True))
    assert other.options["split_sha256"] == release.options["split_sha256"]


def test_repeated_rows_are_one_and_counted(root, tmp_path):
    file = copy(root, tmp_path)
    lines = file.read_text().splitlines()
    file.write_text("\r\n".join(["", *lines, lines[0], lines[0].replace("COVID-19", "positive"), " ", ""]))
    release, whole = read(tmp_path), read(root)
    assert [(row.image_id, row.labels, row.split) for row in release.rows] == [
        (row.image_id, row.labels, row.split) for row in whole.rows
    ]
    assert len(release.skipped) == len(whole.skipped) + 2
    assert release.rows[0].source == "train_COVIDx9A.txt:2"


@pytest.mark.parametrize(
    "line",
    [
        "1 ../../etc/passwd normal rsna", "1 /etc/passwd normal rsna", "1 a/b.png normal rsna", "1 .. normal rsna",
        "1 . normal rsna", "1 normal rsna", "normal", "1  normal rsna", f"1 {'x' * 5000} normal rsna", "nan", "-1",
    ],
)  # fmt: skip
def test_a_bad_row_is_left_out_and_counted(root, tmp_path, line):
    file = copy(root, tmp_path)
    file.write_text(f"{line}\n{file.read_text()}")
    release, whole = read(tmp_path), read(root)
    assert [row.image_id for row in release.rows] == [row.image_id for row in whole.rows]
    assert len(release.skipped) == len(whole.skipped) + 1
    assert release.skipped[0][0] == "train_COVIDx9A.txt:1"
    assert "is no line of patient, file, class and source" in release.skipped[0][1]
    assert len(release.skipped[0][1]) < 300


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda text: text + "1 a.png negative rsna\n", "class 'negative'; known: normal, pneumonia"),
        (lambda text: text + "1 a.png COVID rsna\n", "row [0-9]+: class 'COVID'"),
        (lambda text: text + "1 a.png normal rsna\n1 a.png pneumonia rsna\n", r"a\.png is pneumonia, in row .* normal"),
        (lambda text: text + "1 a\0b.png normal rsna\n", "not a readable list"),
    ],
)  # fmt: skip
def test_bad_lists_are_one_line(root, tmp_path, change, why):
    file = copy(root, tmp_path)
    file.write_text(change(file.read_text()))
    with pytest.raises(SistaError, match=why) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def test_three_classes_in_a_list_of_two(tmp_path):
    with pytest.raises(SistaError, match="class 'normal'; known: negative, positive"):
        read(lists(tmp_path, "_COVIDx9B", train=THREE, test=TWO))
    with pytest.raises(SistaError, match="class 'negative'; known: normal"):
        read(lists(tmp_path / "mixed", train=THREE, test=TWO))


def test_no_folder_no_list_and_unknown_options(tmp_path, root):
    with pytest.raises(SistaError, match="no such folder"):
        read(tmp_path / "none")
    with pytest.raises(SistaError, match=r"neither train\.txt nor train_COVIDx9A\.txt found"):
        read(tmp_path)
    with pytest.raises(SistaError, match="did you mean covidx/official"):
        read(root, split="covidx/oficial")


def test_a_missing_film_is_counted_in_preparation(root, tmp_path):
    folder = tmp_path / "raw"
    shutil.copytree(root, folder)
    gone = read(folder).rows[3]
    gone.image.unlink()
    store = prepare(read(folder), tmp_path / "store", size=32, max_bad=0.1, progress=False)
    assert len(store) == STUDIES - 1
    assert gone.image_id not in set(store.manifest["image_id"])
    assert f"{gone.image_id}: file not found" in (store.path / "skipped.csv").read_text()
