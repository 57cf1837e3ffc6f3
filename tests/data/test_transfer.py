"""Labels, masks and boxes of a store: which rows, which values, moved with the image."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sista_pl.data.formats import READERS, Release, Row
from sista_pl.data.images import find_images, fit, fit_box, fit_mask, unfit_boxes, unfit_mask
from sista_pl.data.masks import Rle, encode_rle
from sista_pl.data.prepare import prepare
from sista_pl.data.transfer import TransferDataModule, fill_boxes
from sista_pl.errors import SistaError

SIZE = 32


@pytest.fixture
def store(tmp_path):
    """30 images of 20 patients: a bright square, its mask, its box, two labels with unknowns."""
    rows, draw = [], np.random.default_rng(0)
    for i in range(30):
        pixels, mask = draw.integers(0, 90, (40, 30), dtype=np.uint8), np.zeros((40, 30), np.uint8)
        x, y = draw.integers(0, 18), draw.integers(0, 28)
        boxes = []
        if i % 3:
            pixels[y : y + 10, x : x + 10], mask[y : y + 10, x : x + 10] = 255, 255
            boxes = [{"category": "square", "x": int(x), "y": int(y), "w": 10, "h": 10}]
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        Image.fromarray(mask).save(tmp_path / f"mask-{i}.png")
        labels = {"square": float(i % 3 > 0), "rare": 1.0 if i == 4 else np.nan if i % 5 == 0 else 0.0}
        split = "train" if i < 18 else "val" if i < 24 else "test"
        rows.append(
            Row(f"i{i}", f"p{i // 2 if i < 18 else i}", f"s{i}", tmp_path / f"{i}.png", "", split, "", "", labels,
                None if i == 29 else tmp_path / f"mask-{i}.png", None if i == 28 else boxes)
        )  # fmt: skip
    prepare(Release("test", "1", rows, phantom=True, root=tmp_path), tmp_path / "store", size=SIZE, progress=False)
    return tmp_path / "store"


def module(store, **more):
    data = TransferDataModule(store, size=SIZE, batch_size=4, **more)
    data.setup("fit")
    return data


def test_labels_in_the_asked_order_and_unknown_as_nan(store):
    data = module(store, labels=["rare", "square"])
    assert data.classes == ["rare", "square"]
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape == (4, 1, SIZE, SIZE)
    expected = [[1.0 if i == 4 else np.nan if i % 5 == 0 else 0.0, float(i % 3 > 0)] for i in range(18, 22)]
    assert np.array_equal(batch["labels"].numpy(), np.array(expected, np.float32), equal_nan=True)


def test_rows_without_a_target_are_left_out(store):
    assert len(module(store, labels=["rare"]).rows["test"]) == 5  # 25 is unknown
    assert 29 not in module(store, target="mask").rows["test"]
    assert 28 not in module(store, target="boxes").rows["test"]


@pytest.mark.parametrize("crop", [SIZE, 24])
def test_masks_and_boxes_lie_on_what_is_bright_whatever_the_augmentation(store, crop):
    masks = module(store, target="mask", crop=crop, rotate=30)
    for batch in masks.train_dataloader():
        for image, mask in zip(batch["image"][:, 0], batch["mask"], strict=True):
            if (mask == 255).sum() > 20:
                assert image[mask == 255].mean() > 0.6 > 0 > image[mask == 0].mean()
    boxes = module(store, target="boxes", crop=crop)
    seen = 0
    for batch in (*boxes.train_dataloader(), *boxes.val_dataloader()):
        for image, found, kinds in zip(batch["image"][:, 0], batch["boxes"], batch["box_labels"], strict=True):
            assert len(found) == len(kinds)
            for x0, y0, x1, y1 in found.round().int().tolist():
                assert 0 <= x0 < x1 <= crop
                assert 0 <= y0 < y1 <= crop
                if x1 - x0 > 4 < y1 - y0:
                    assert image[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1].mean() > 0.7
                    seen += 1
    assert seen > 5


def test_masks_from_boxes_fill_the_boxes(store):
    data = module(store, target="mask", masks_from_boxes=True)
    batch = next(iter(data.val_dataloader()))
    for row, mask in zip(batch["index"].tolist(), batch["mask"], strict=True):
        found = json.loads(data.store.manifest["boxes"][row])
        expected = np.zeros((SIZE, SIZE), np.uint8)
        for box in found:
            for x in range(SIZE):
                for y in range(SIZE):
                    inside_x = round(box["x"]) <= x < round(box["x"] + box["w"])
                    if inside_x and round(box["y"]) <= y < round(box["y"] + box["h"]):
                        expected[y, x] = 255
        assert np.array_equal(mask.numpy(), expected)
    assert fill_boxes(np.zeros((0, 4)), 3).sum() == 0


def test_a_fraction_is_of_whole_patients_and_the_same_each_time(store):
    few, again, more = (module(store, labels=["square"], label_fraction=f) for f in (0.25, 0.25, 0.5))
    patients = few.store.manifest["patient_id"].to_numpy()
    assert few.rows["train"].tolist() == again.rows["train"].tolist()
    assert set(few.rows["train"]) < set(more.rows["train"])
    assert not set(patients[few.rows["train"]]) & set(patients[np.setdiff1d(np.arange(18), few.rows["train"])])
    assert few.rows["val"].tolist() == more.rows["val"].tolist()


def test_a_fraction_without_a_positive_is_one_line(store):
    with pytest.raises(SistaError, match=r"without a positive one; raise data\.label_fraction"):
        module(store, labels=["rare"], label_fraction=0.06, fraction_seed=0)


def test_balance_keeps_as_many_without_as_with(store):
    data = module(store, target="mask", balance=True)
    present = [bool((data.store.mask(int(row)) == 255).any()) for row in data.rows["train"]]
    assert sum(present) == 12
    assert len(present) - sum(present) == 6  # there are no more


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"target": "label"}, "target is 'label'; did you mean labels"),
        ({"labels": ["sqare"]}, "no label 'sqare'; did you mean square"),
        ({"target": "boxes", "categories": ["circle"]}, "no boxes of 'circle'"),
        ({"label_fraction": 0}, "label_fraction is 0; give a share above 0"),
    ],
)
def test_mistakes_are_one_line(store, more, line):
    with pytest.raises(SistaError, match=line):
        module(store, **more)


def test_a_store_without_masks_or_boxes_says_so(phantom_store):
    for target in ("mask", "boxes"):
        with pytest.raises(SistaError, match=f"has no {target}"):
            TransferDataModule(phantom_store, target=target, size=64).setup("fit")


def test_predict_inputs_are_decoded_and_bad_ones_counted(store, tmp_path):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    Image.new("L", (50, 40), 200).save(folder / "a.png")
    Image.new("L", (20, 60), 100).save(folder / "deep/b.jpg")
    (folder / "deep/c.jpg").write_bytes(b"no image")
    (folder / "readme.txt").write_text("x")
    data = TransferDataModule(store, size=SIZE, batch_size=2, inputs=folder)
    data.prepare_data()
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert [f.name for f in data.files] == ["a.png", "b.jpg", "c.jpg"]
    assert [b["index"].tolist() for b in batches] == [[0, 1], []]
    assert batches[0]["original_size"].tolist() == [[50, 40], [20, 60]]
    assert batches[1]["bad"] == [(2, "not an image")]
    assert batches[1]["image"].shape == (0, 1, SIZE, SIZE)
    table = tmp_path / "list.csv"
    table.write_text("image\nin/a.png\nin/deep/b.jpg\n")
    assert [f.name for f in find_images(table)] == ["a.png", "b.jpg"]
    wrong_table = tmp_path / "wrong.csv"
    wrong_table.write_text("picture\nin/a.png\n")
    for wrong, line in (
        (tmp_path / "nowhere", "no such file or folder"),
        (wrong_table, "no column image"),
    ):
        with pytest.raises(SistaError, match=line):
            find_images(wrong)


@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 301), (64, 64)])
@pytest.mark.parametrize("crop", [32, 28])
def test_predictions_go_back_to_original_pixels(width, height, crop):
    size, off = 32, (32 - crop) // 2
    box = {"category": "x", "x": 0.3 * width, "y": 0.4 * height, "w": 0.2 * width, "h": 0.3 * height}
    there = fit_box(box, width, height, size)
    corners = np.array([[there["x"], there["y"], there["x"] + there["w"], there["y"] + there["h"]]]) - off
    back = unfit_boxes(corners, width, height, size, crop)[0]
    tolerance = 0.02 / fit(width, height, size)[0]
    assert np.allclose(back, [box["x"], box["y"], box["x"] + box["w"], box["y"] + box["h"]], atol=tolerance)
    mask = np.zeros((height, width), np.uint8)
    mask[int(0.4 * height) : int(0.7 * height), int(0.3 * width) : int(0.5 * width)] = 255
    small = fit_mask(mask, size)[off : off + crop, off : off + crop] > 0
    again = unfit_mask(small, width, height, size)
    assert again.shape == (height, width)
    assert (again & (mask > 0)).sum() / (again | (mask > 0)).sum() > 0.75


def test_run_lengths_go_back_to_the_mask():
    mask = np.random.default_rng(0).random((7, 5)) < 0.4
    assert np.array_equal(Rle((encode_rle(mask),), 5, 7, relative=False).decode() > 0, mask)


def test_loaders_give_features_once_they_are_kept(store):
    data = module(store, labels=["square"])
    loader = data.val_dataloader()
    assert "image" in next(iter(loader))
    data.kept.features = np.arange(60, dtype=np.float32).reshape(30, 2)
    batch = next(iter(loader))
    assert batch["features"].tolist() == data.kept.features[18:22].tolist()
    assert "image" not in batch
    assert torch.is_tensor(batch["labels"])


@pytest.mark.real
def test_real_lung_masks_and_boxes(real_data, tmp_path):
    release = READERS.build(
        {"name": "table", "root": real_data, "table": "studies.csv", "boxes": "boxes.csv", "require_report": False}
    )
    prepare(release, tmp_path / "store", size=64, progress=False)
    masks = TransferDataModule(tmp_path / "store", target="mask", size=64, batch_size=16)
    masks.setup("fit")
    assert sum(map(len, masks.rows.values())) == 139
    assert set(torch.unique(next(iter(masks.val_dataloader()))["mask"]).tolist()) <= {0, 127, 255}
    boxes = TransferDataModule(
        tmp_path / "store", target="boxes", categories=["left_lung", "right_lung"], size=64, batch_size=16
    )
    boxes.setup("fit")
    lines = (real_data / "boxes.csv").read_text().splitlines()
    assert sum(len(found) for found, _ in boxes.boxes) == sum("_lung," in line for line in lines) > 70


def test_folds_cover_the_images_once_and_cut_no_patient(store):
    tested, named = [], set()
    for number in range(5):
        data = module(store, target="mask", fold=f"{number}/5")
        patients = data.store.manifest["patient_id"].to_numpy()
        parts = [set(patients[data.rows[name]]) for name in ("train", "val", "test")]
        assert sum(map(len, parts)) == len(set.union(*parts))
        tested += data.rows["test"].tolist()
        following = module(store, target="mask", fold=f"{(number + 1) % 5}/5")
        assert data.rows["val"].tolist() == following.rows["test"].tolist()
        named.add((data.split_told["name"], data.split_told["sha256"]))
    assert sorted(tested) == list(range(29))  # 29 has no mask
    assert len(named) == 5
    assert module(store, target="mask").split_told["name"] == "official"
    part = module(store, target="mask", fold="0/5", label_fraction=0.5)
    assert part.rows["test"].tolist() == module(store, target="mask", fold="0/5").rows["test"].tolist()
    assert part.split_told == module(store, target="mask", fold="0/5").split_told


@pytest.mark.parametrize("fold", ["5/5", "0/2", "0", "-1/5", "a/b"])
def test_a_fold_that_is_none(store, fold):
    with pytest.raises(SistaError, match="of five folds the first is 0/5"):
        module(store, fold=fold)


def test_few_images_are_repeated_and_each_time_augmented_anew(store):
    data = module(store, target="mask", rotate=20, label_fraction=0.3, min_epoch_images=20)
    few = data.rows["train"]
    assert len(few) < 10
    batches = list(data.train_dataloader())
    seen = np.concatenate([batch["index"].numpy() for batch in batches])
    assert len(seen) == 20
    assert set(seen) == set(few.tolist())
    assert np.ptp(np.bincount(seen)[few]) <= 1
    images = torch.cat([batch["image"] for batch in batches])
    first, second = np.flatnonzero(seen == few[0])[:2]
    assert not torch.equal(images[first], images[second])
    assert sum(len(batch["index"]) for batch in data.val_dataloader()) == len(data.rows["val"])
    # a training set that is long enough is left as it is
    whole = module(store, target="mask", min_epoch_images=10)
    assert sum(len(batch["index"]) for batch in whole.train_dataloader()) == len(whole.rows["train"]) // 4 * 4
