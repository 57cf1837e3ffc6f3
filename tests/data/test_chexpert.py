"""CheXpert: the labels that were drawn come back; prefixes, views, -1 and blank, both test sets; splits; bad tables."""

import json
import math
import shutil

import pandas as pd
import pytest

from sista_pl.data.doctor import Subject, diagnose
from sista_pl.data.formats import READERS
from sista_pl.data.formats.chexpert import COMPETITION, LABELS
from sista_pl.data.phantom import write_phantom
from sista_pl.data.prepare import prepare
from sista_pl.data.splits import split_table
from sista_pl.errors import SistaError

STUDIES = 60
# finding that is drawn → labels, of those that are never blank
KINDS = {
    "Atelectasis": {"atelectasis"}, "Cardiomegaly": {"cardiomegaly"}, "Consolidation": {"consolidation"},
    "Edema": {"edema"}, "Pleural Effusion": {"effusion"}, "Pneumothorax": {"pneumothorax"},
    "Lung Opacity": {"consolidation", "opacity", "pneumonia"},
}  # fmt: skip
BOTH = ["frontal", "lateral"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chexpert") / "raw"
    return write_phantom("chexpert", folder, STUDIES, seed=1, size=96, workers=1, progress=False)


def read(root, **options):
    return READERS.build({"name": "chexpert", "root": root, **options})


def copy(root, folder):
    """A release of tables alone: the reader touches no image."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in root.glob("*.csv"):
        shutil.copy(file, folder)
    return folder


def rows(file):
    return pd.read_csv(file, dtype=str, keep_default_na=False)


def test_the_store_holds_what_was_drawn(root, tmp_path):
    truth = pd.read_parquet(root / "phantom/truth.parquet").set_index("image_id")
    release = read(root)
    assert release.phantom
    assert release.version == "CheXpert-v1.0-small"
    store = prepare(release, tmp_path / "store", size=96, progress=False)
    manifest = store.manifest.set_index("image_id")
    assert set(manifest.index) == set(truth.index)
    assert len(manifest) == STUDIES
    positives = dict.fromkeys(KINDS, 0)
    for name, row in truth.iterrows():
        found, drawn = manifest.loc[name], json.loads(row.drawn)
        kinds = {finding["kind"] for finding in drawn["findings"]}
        for label, wanted in KINDS.items():
            assert found[f"label_{label}"] == bool(kinds & wanted), (name, label)
            positives[label] += bool(kinds & wanted)
        assert found["label_Lung Lesion"] == bool(kinds & {"nodule", "mass"})
        assert found["view"] == drawn["view"]
        assert (found["split"] == "test") == (row.split == "test")
        assert found["patient_id"] == f"patient{row.patient + 1:05d}"
        assert (found["width"], found["height"]) == (row.columns, row.rows)
    assert min(positives.values()) > 0
    assert manifest["boxes"].isna().all()
    films = store.images(range(STUDIES)).astype(float)
    # spine and abdomen against the lungs beside them
    assert films[:, 40:70, 45:51].mean() > films[:, 30:50, 22:34].mean() + 30
    assert {check.name for check in diagnose(Subject.of_store(store)) if check.level == "problem"} == set()
    assert store.info["split"]["name"] == "chexpert/competition"


def test_of_both_views_nothing_is_left_out(root, tmp_path):
    release = read(root, views=BOTH)
    assert not release.skipped
    listed = pd.concat([rows(root / "train.csv"), rows(root / "valid.csv")])
    assert [row.image_id for row in release.rows] == [path.split("/", 1)[1] for path in listed["Path"]]
    laterals = [row for row in release.rows if row.image_id.endswith("_lateral.jpg")]
    assert 3 <= len(laterals) == len(release.rows) - STUDIES
    assert {row.view for row in laterals} == {"Lateral"}
    by_study = {row.study_id: row for row in release.rows if row not in laterals}
    for row in laterals:
        frontal = by_study[row.study_id]
        assert (row.split, row.patient_id) == (frontal.split, frontal.patient_id)
        assert repr(row.labels) == repr(frontal.labels)
    store = prepare(release, tmp_path / "store", size=48, progress=False)
    assert len(store) == len(release.rows)
    # the split of an image does not depend on the views that are read
    parts = {row.image_id: row.split for row in release.rows}
    for views in ("frontal", "lateral"):
        one = read(root, views=views)
        assert {row.image_id: row.split for row in one.rows}.items() <= parts.items()
        assert not one.skipped, "a choice is no fault"
        assert all(f"_{views}." in row.image_id for row in one.rows)


@pytest.mark.parametrize("prefix", ["CheXpert-v1.0-small", "CheXpert-v1.0", "CheXpert-v1.0-downsampled", ""])
@pytest.mark.parametrize("above", [False, True])
def test_prefix_of_the_paths_and_either_folder(root, tmp_path, prefix, above):
    folder = copy(root, tmp_path / "CheXpert-v1.0-any")
    for file in folder.glob("*.csv"):
        table = file.read_text().replace("CheXpert-v1.0-small/", f"{prefix}/" if prefix else "")
        file.write_text(table)
    release = read(tmp_path if above else folder)
    assert release.version == (prefix or "CheXpert")
    assert [row.image for row in release.rows] == [folder / row.image_id for row in read(root).rows]
    assert [row.split for row in release.rows] == [row.split for row in read(root).rows]
    (folder / "phantom").mkdir()
    shutil.copy(root / "phantom/phantom.json", folder / "phantom")
    assert read(tmp_path if above else folder).phantom
    assert not release.phantom


def test_two_releases_in_one_folder(root, tmp_path):
    for name in ("CheXpert-v1.0", "CheXpert-v1.0-small"):
        copy(root, tmp_path / name)
    with pytest.raises(SistaError, match=r"holds CheXpert-v1\.0, CheXpert-v1\.0-small; give one of them as root"):
        read(tmp_path)


POLICIES = {
    "competition": {"Atelectasis": 1.0, "Edema": 1.0, "Pleural Effusion": 1.0, "Cardiomegaly": 0.0,
                    "Consolidation": 0.0},
    "unknown": {}, "ones": dict.fromkeys(LABELS, 1.0), "zeros": dict.fromkeys(LABELS, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("uncertain", list(POLICIES))
@pytest.mark.parametrize("blank", ["absent", "unknown"])
@pytest.mark.parametrize("labels", ["all", "competition"])
def test_uncertain_and_blank(root, tmp_path, uncertain, blank, labels):
    folder = copy(root, tmp_path)
    for name in ("train.csv", "valid.csv"):
        table = rows(folder / name)
        table.loc[0, list(LABELS)] = "-1.0"
        table.loc[1, list(LABELS)] = "-1"
        table.loc[2, list(LABELS)] = ""
        table.loc[3, list(LABELS)] = ["1.0", "0.0", "1", "0"] * 3 + ["1", "0.0"]
        table.to_csv(folder / name, index=False)
    release = read(folder, uncertain=uncertain, blank=blank, labels=labels, views=BOTH)
    names = list(LABELS if labels == "all" else COMPETITION)
    assert all(list(row.labels) == names for row in release.rows)
    train = [row.labels for row in release.rows if row.image_id.startswith("train/")]
    # experts wrote 1 or 0: there is no policy for their list
    valid = [row.labels for row in release.rows if row.image_id.startswith("valid/")]
    nan = math.nan
    for name in names:
        expected = POLICIES[uncertain].get(name, nan)
        whole = float(list(LABELS).index(name) % 2 == 0)
        assert repr([row[name] for row in train[:4]]) == repr(
            [expected, expected, 0.0 if blank == "absent" else nan, whole]
        )
        assert repr([row[name] for row in valid[:4]]) == repr([nan, nan, nan, whole])


def official(root, tmp_path):
    """The official test set beside the release: two studies, one of them of two films."""
    folder = copy(root, tmp_path / "CheXpert-v1.0")
    films = sorted((root / "valid").glob("*/*/*.jpg"))[:3]
    for name, film in zip(
        ("patient64741/study1/view1_frontal.jpg", "patient64741/study1/view2_lateral.jpg",
         "patient64742/study1/view1_frontal.jpg"), films, strict=True,
    ):  # fmt: skip
        (folder / "test" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(film, folder / "test" / name)
    (folder / "test/patient64741/study1/notes.txt").write_text("no image")
    return folder


def test_official_test_set_by_study(root, tmp_path):
    folder = official(root, tmp_path)
    # the order of its columns is another one
    header = ["Study", *LABELS[1:], LABELS[0]]
    studies = ["CheXpert-v1.0/test/patient64741/study1", "CheXpert-v1.0/test/patient64742/study1",
               "CheXpert-v1.0/test/patient64743/study1", "CheXpert-v1.0/train/patient00001/study1"]  # fmt: skip
    values = [["1.0", *["0.0"] * 13], ["0"] * 14, ["1"] * 14, ["1"] * 14]
    lines = [",".join(header), *(",".join([study, *line]) for study, line in zip(studies, values, strict=True))]
    (folder / "groundtruth.csv").write_text("\n".join(lines) + "\n")
    valid = [row.image_id for row in read(folder, views=BOTH).rows if row.split == "test"]
    assert all(name.startswith("valid/") for name in valid)
    release = read(folder, test="official", views=BOTH)
    test = {row.image_id: row for row in release.rows if row.split == "test"}
    assert list(test) == ["test/patient64741/study1/view1_frontal.jpg", "test/patient64741/study1/view2_lateral.jpg",
                          "test/patient64742/study1/view1_frontal.jpg"]  # fmt: skip
    assert [row.labels["Enlarged Cardiomediastinum"] for row in test.values()] == [1, 1, 0]
    rest = [label for label in LABELS if label != "Enlarged Cardiomediastinum"]
    assert {row.labels[label] for row in test.values() for label in rest} == {0.0}
    why = dict(release.skipped)
    assert "no image of the study in test" in why["patient64743/study1"]
    assert "no study of test" in why["CheXpert-v1.0/train/patient00001/study1"]
    assert len(why) == 2
    assert not {row.image_id for row in release.rows} & set(valid)
    # train and val are the same, whichever the test is
    assert [(row.image_id, row.split) for row in release.rows if row.split != "test"] == [
        (row.image_id, row.split) for row in read(folder, views=BOTH).rows if row.split != "test"
    ]
    store = prepare(read(folder, test="official", views=["lateral", "frontal"]), tmp_path / "store", size=32,
                    max_bad=1, progress=False)  # fmt: skip
    assert store.info["counts"]["test"] == 3
    (folder / "valid.csv").unlink()
    assert len(read(folder, test="official", views=BOTH).skipped) == 2
    with pytest.raises(SistaError, match=r"valid\.csv not found"):
        read(folder)
    (folder / "groundtruth.csv").write_text("\n".join([*lines, lines[1]]) + "\n")
    with pytest.raises(SistaError, match="row 6 repeats the image id 'test/patient64741/study1/view1_frontal"):
        read(folder, test="official")


def test_official_test_set_by_image(root, tmp_path):
    folder = official(root, tmp_path)
    header = ",".join(["Path", *LABELS])
    line = ",".join(["test/patient64741/study1/view1_frontal.jpg", "1.0", *["0.0"] * 13])
    (folder / "test_labels.csv").write_text(f"{header}\n{line}\n")
    test = [row for row in read(folder, test="official").rows if row.split == "test"]
    assert [(row.image_id, row.labels["No Finding"]) for row in test] == [
        ("test/patient64741/study1/view1_frontal.jpg", 1.0)
    ]
    assert test[0].image.is_file()
    (folder / "test_labels.csv").unlink()
    with pytest.raises(SistaError, match=r"none of groundtruth\.csv, test_labels\.csv, test\.csv found"):
        read(folder, test="official")


def test_val_of_the_whole_release_are_5000_frontal_films_of_whole_patients():
    # 191,027 frontal films of train; one patient in seven has laterals too, some have nothing else
    patients = [f"patient{n:05d}" for n in range(1, 64541)]
    films = [(p, True) for n, p in enumerate(patients) for _ in range(1 + n % 5)]
    films = films[:191_027] + [(p, False) for p in patients[::7]] + [(f"lateral{n}", False) for n in range(300)]
    films += [("patient00003", True)] * max(0, 191_027 - sum(frontal for _, frontal in films))
    table = pd.DataFrame(films, columns=["patient_id", "frontal"]).assign(list="train")
    assert table["frontal"].sum() == 191_027
    test = pd.DataFrame({"patient_id": [f"patient{n}" for n in range(64541, 64741)], "frontal": True, "list": "valid"})
    table = pd.concat([table, test], ignore_index=True)
    table["split"] = split_table("chexpert/competition", table)
    frontal = table[table["frontal"]]
    assert frontal["split"].value_counts().to_dict() == {"train": 186_027, "val": 5_000, "test": 200}
    assert table.groupby("patient_id")["split"].nunique().max() == 1
    assert (table["split"] == "test").tolist() == (table["list"] == "valid").tolist()
    # drawn from all of the patients, with and without laterals
    val = set(table.loc[table["split"] == "val", "patient_id"])
    assert 0.1 < sum(name in val for name in patients[::7]) / len(val & set(patients)) < 0.2
    # the order of the rows changes nothing, the seed does
    shuffled = table.sample(frac=1, random_state=0)
    assert split_table("chexpert/competition", shuffled) == shuffled["split"].tolist()
    few = table[table["patient_id"] < "patient02000"]
    assert split_table("chexpert/competition", few, seed=1) != split_table("chexpert/competition", few)


def test_splits_are_functions_of_ids(root, tmp_path):
    release = read(root, views=BOTH)
    parts = pd.DataFrame({"patient": [row.patient_id for row in release.rows],
                          "split": [row.split for row in release.rows]})  # fmt: skip
    assert parts.groupby("patient")["split"].nunique().max() == 1
    assert {"train", "val", "test"} == set(parts["split"])
    folder = copy(root, tmp_path)
    for file in folder.glob("*.csv"):
        rows(file)[::-1].to_csv(file, index=False)
    other = read(folder, views=BOTH)
    assert {row.image_id: row.split for row in other.rows} == {row.image_id: row.split for row in release.rows}
    assert other.options["split_sha256"] == release.options["split_sha256"]


@pytest.mark.parametrize(
    "path",
    [
        "../../etc/passwd", "/etc/passwd", "CheXpert-v1.0-small/train/../../x.jpg", "", "nan", "a\0b",
        "CheXpert-v1.0-small/valid/patient00001/study1/view1_frontal.jpg",
        "CheXpert-v1.0-small/train/patient00001/study1/view1_oblique.jpg",
        "a/b/train/patient00001/study1/view1_frontal.jpg",
        "CheXpert-v1.0-small/train/patient٣/study1/view1_frontal.jpg",
    ],
)  # fmt: skip
def test_a_bad_row_is_left_out_and_counted(root, tmp_path, path):
    folder = copy(root, tmp_path)
    text = (folder / "train.csv").read_text()
    rest = text.splitlines()[1].split(",", 1)[1]
    (folder / "train.csv").write_text(f"{text}{path},{rest}\n", encoding="utf-8")
    release, whole = read(folder, views=BOTH), read(root, views=BOTH)
    assert [row.image_id for row in release.rows] == [row.image_id for row in whole.rows]
    assert len(release.skipped) == 1
    assert "no image of train" in release.skipped[0][1]
    assert "\0" not in release.skipped[0][0]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda text: text.replace("Path,", "path,", 1), "no column 'Path'"),
        (lambda text: text.replace("Edema", "Oedema", 1), "no column 'Edema'"),
        (lambda text: text.replace(",0.0,", ",0.5,", 1), r"row 2: .* is '0\.5'; 1, 0, -1 or blank is known"),
        (lambda text: text.replace(",0.0,", ",nan,", 1), "is 'nan'; 1, 0, -1 or blank is known"),
        (lambda text: text + text.splitlines()[1] + "\n", "repeats the image id 'train/patient00001"),
        (lambda text: "", "not a readable CSV"),
    ],
)
def test_bad_tables_are_one_line(root, tmp_path, change, why):
    folder = copy(root, tmp_path)
    (folder / "train.csv").write_text(change((folder / "train.csv").read_text()))
    with pytest.raises(SistaError, match=why) as error:
        read(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"uncertain": "one"}, "uncertain 'one'; did you mean ones"),
        ({"blank": "zero"}, "blank 'zero'"),
        ({"labels": "five"}, "labels 'five'"),
        ({"test": "valid.csv"}, "test 'valid.csv'; did you mean valid"),
        ({"views": ["frontal", "laterals"]}, "views 'laterals'; did you mean lateral"),
        ({"split": "chexpert/competitions"}, "did you mean chexpert/competition"),
        ({"split": "rsna/mgca"}, "split 'rsna/mgca'"),
    ],
)
def test_unknown_options(root, options, why):
    with pytest.raises(SistaError, match=why):
        read(root, **options)


def test_no_folder_and_no_table(tmp_path):
    with pytest.raises(SistaError, match="no such folder"):
        read(tmp_path / "none")
    with pytest.raises(SistaError, match=r"train\.csv not found"):
        read(tmp_path)


def test_a_column_without_use_may_be_missing(root, tmp_path):
    folder = copy(root, tmp_path)
    for file in folder.glob("*.csv"):
        rows(file).drop(columns=["AP/PA", "Sex", "Age", "Frontal/Lateral"]).to_csv(file, index=False)
    assert {row.view for row in read(folder).rows} == {""}
    assert [row.split for row in read(folder).rows] == [row.split for row in read(root).rows]
