"""SIIM-ACR: masks come back bit for bit; the three layouts; the leak of the split by rows; bad tables."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sista_pl.data.formats import READERS
from sista_pl.data.images import BadImage
from sista_pl.data.masks import Rle
from sista_pl.data.phantom import decode_rle, write_phantom
from sista_pl.data.phantom.cohort import LAYOUTS, Plan
from sista_pl.data.phantom.layouts.siim import relative_runs
from sista_pl.data.prepare import prepare
from sista_pl.errors import SistaError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siim") / "raw"
    return write_phantom("siim", folder, 90, seed=6, size=96, workers=1, progress=False)


def read(root, **options):
    return READERS.build({"name": "siim", "root": root, **options})


def union(row) -> np.ndarray:
    masks = [decode_rle(m, (row.rows, row.columns)) for k, m in json.loads(row.masks).items() if "pneumothorax" in k]
    return np.logical_or.reduce(masks) if masks else np.zeros((row.rows, row.columns), bool)


def test_masks_equal_what_was_drawn_bit_for_bit(root, tmp_path):
    truth = pd.read_parquet(root / "phantom/truth.parquet").set_index("image_id")
    release = read(root)
    assert release.phantom
    assert release.version == "SIIM-ACR stage 1"
    assert not release.skipped
    store = prepare(release, tmp_path / "store", size=96, progress=False)
    assert len(store) == 90 == len(truth)
    positives = 0
    for index, (name, label) in enumerate(store.manifest[["image_id", "label_Pneumothorax"]].itertuples(index=False)):
        expected = union(truth.loc[name])
        np.testing.assert_array_equal(store.mask(index), expected * 255)
        assert label == expected.any()
        positives += int(label)
    assert 3 <= positives < 60
    assert truth["inverted"].any()
    films = store.images(range(90)).astype(float)
    # MONOCHROME1 too: the abdomen is whiter than the lungs, film by film
    assert ((films[:, 88:, 30:66].mean((1, 2)) - films[:, 30:50, 22:34].mean((1, 2))) > 0).mean() > 0.95


def test_the_layout_has_the_share_of_the_release_and_changes_nothing_else():
    siim, usual = LAYOUTS.build("siim"), LAYOUTS.build("rsna")
    plans = [Plan(patient, 0) for patient in range(1500)]
    shown = 0
    for plan in plans:
        study, plain = siim.study(plan, 3), usual.study(plan, 3)
        assert [f for f in study.findings if f.kind != "pneumothorax"] == [
            f for f in plain.findings if f.kind != "pneumothorax"
        ]
        found = {f.kind for f in study.findings}
        assert [t for t in study.tubes if t.kind != "chest_tube"] == [t for t in plain.tubes if t.kind != "chest_tube"]
        assert "pneumothorax" in found or all(t.kind != "chest_tube" for t in study.tubes)
        assert replace(study, findings=(), tubes=()) == replace(plain, findings=(), tubes=())
        shown += "pneumothorax" in found
    assert 0.18 < shown / len(plans) < 0.26


def test_the_awkward_parts_are_there(root):
    lines = (root / "train-rle.csv").read_text().splitlines()
    assert lines[0] == "ImageId, EncodedPixels"
    assert {line.split(",")[1] for line in lines if line.endswith("-1")} == {"-1", " -1"}
    names = [line.split(",")[0] for line in lines[1:]]
    assert len(names) > len(set(names)) == 90


def test_stage_2_and_the_mirror_give_the_same(root, tmp_path):
    one = read(root)
    two = tmp_path / "two"
    (two / "stage_2_images").mkdir(parents=True)
    lines = (root / "train-rle.csv").read_text().replace(", EncodedPixels", ",EncodedPixels")
    (two / "stage_2_train.csv").write_text(lines)
    for row in one.rows:
        (two / "stage_2_images" / row.image.name).symlink_to(row.image)
    stage2 = read(two)
    assert stage2.version == "SIIM-ACR stage 2"
    assert [(r.image_id, r.mask, r.split, r.labels) for r in stage2.rows] == [
        (r.image_id, r.mask, r.split, r.labels) for r in one.rows
    ]
    mirror = tmp_path / "mirror"
    for folder in ("png_images", "png_masks"):
        (mirror / folder).mkdir(parents=True)
    table = ["new_filename,ImageId,has_pneumo"]
    for number, row in enumerate(one.rows[:12]):
        name = f"{number}_train_{int(row.labels['Pneumothorax'])}_.png"
        Image.new("L", (96, 96), number).save(mirror / "png_images" / name)
        Image.fromarray(row.mask.decode()).save(mirror / "png_masks" / name)
        table.append(f"{name},{row.image_id},{int(row.labels['Pneumothorax'])}")
    (mirror / "stage_1_train_images.csv").write_text("\n".join([*table, "../x.png,a,1", table[1]]) + "\n")
    release = read(mirror)
    assert [why.split(": ", 1)[1] for _, why in release.skipped] == [
        "'../x.png' is no file name of png_images", f"repeats the image '{table[1].split(',')[0]}'",
    ]  # fmt: skip
    assert [r.split for r in release.rows] == [r.split for r in one.rows[:12]]
    store = prepare(release, tmp_path / "store", size=96, progress=False)
    np.testing.assert_array_equal(store.mask(3), one.rows[3].mask.decode())
    with pytest.raises(SistaError, match="use siim/grouped"):
        read(mirror, split="siim/mgca-rows")


def test_the_split_by_rows_leaks_and_the_grouped_one_does_not(root):
    grouped, rows = read(root), read(root, split="siim/mgca-rows")
    assert pd.Series([r.patient_id for r in grouped.rows]).is_unique
    frame = pd.DataFrame({"film": [str(r.image) for r in rows.rows], "split": [r.split for r in rows.rows],
                          "area": [r.mask.decode().sum() for r in rows.rows]})  # fmt: skip
    leaked = frame.groupby("film")["split"].nunique()
    assert (leaked > 1).any()
    whole = {str(r.image): r.mask.decode().sum() for r in grouped.rows}
    assert (frame["area"] < frame["film"].map(whole)).any(), "truncated masks"
    train = [r.labels["Pneumothorax"] for r in rows.rows if r.split == "train"]
    assert train.count(0) <= train.count(1)


def test_relative_runs_against_the_rule_of_the_release():
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random((7, 5)) < 0.4
        slow = np.zeros(35, bool)
        place = 0
        numbers = [int(n) for n in relative_runs(mask).split()]
        for gap, length in zip(numbers[::2], numbers[1::2], strict=True):
            place += gap
            slow[place : place + length] = True
            place += length
        slow = slow.reshape(5, 7).T  # decoded along the rows of a 5 × 7 image, then transposed
        np.testing.assert_array_equal(slow, mask)
        np.testing.assert_array_equal(Rle((relative_runs(mask),), 5, 7, relative=True).decode(), mask * 255)
    np.testing.assert_array_equal(Rle(("2 3",), 2, 3, relative=False).decode(), [[0, 255], [255, 0], [255, 0]])


@pytest.mark.parametrize("runs", ["1", "a b", "0 99", "-1 3", "3 0", "3 -2"])
def test_junk_run_lengths_are_bad_images(runs):
    with pytest.raises(BadImage):
        Rle((runs,), 5, 7, relative=True).decode()


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ("Image,EncodedPixels\n", "no column 'ImageId'"),
        ("ImageId,Encoded\n", "no column 'EncodedPixels'"),
    ],
)
def test_bad_tables_are_one_line(tmp_path, root, table, why):
    (tmp_path / "train-rle.csv").write_text(table)
    (tmp_path / "dicom-images-train").symlink_to(root / "dicom-images-train")
    with pytest.raises(SistaError, match=why):
        read(tmp_path)


def test_nothing_there_and_films_that_are_missing(tmp_path, root):
    with pytest.raises(SistaError, match=r"none of train-rle\.csv"):
        read(tmp_path)
    (tmp_path / "train-rle.csv").write_text("ImageId, EncodedPixels\n../../x, -1\n")
    with pytest.raises(SistaError, match=r"no \.dcm file in it"):
        read(tmp_path)
    (tmp_path / "dicom-images-train").symlink_to(root / "dicom-images-train")
    release = read(tmp_path)
    assert not release.rows
    assert "no film '../../x'" in release.skipped[0][1]
