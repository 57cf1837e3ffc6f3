"""Grounding through the command line: a map that knows the region wins, the frame is right, the baselines are fair."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sista_tasks.grounding import GroundingTask
from sista_tasks.grounding.frame import centre_map, original_point

from sista_pl.cli import main
from sista_pl.data.images import film, read_gray
from sista_pl.data.store import Store
from sista_pl.errors import SistaError
from sista_pl.joint import load_joint
from sista_pl.metrics.grounding import Grounding, contrast, mean_iou, pointing
from sista_pl.similarity_map import similarity_map, upsample
from sista_pl.words import word_id


@pytest.fixture(scope="module")
def store(siim_store, tmp_path_factory):
    """A copy of the phantom's store in which the region is what is bright on the left of three films of four."""
    copy = tmp_path_factory.mktemp("bright") / "store"
    shutil.copytree(siim_store, copy)
    images, start = Store.open(siim_store), 0
    for file in sorted(copy.glob("masks-*.npy")):
        masks = np.load(file)
        for place in range(len(masks)):
            masks[place] = 0
            if (start + place) % 4:
                masks[place][:, :32] = np.where(images.image(start + place)[:, :32] > 128, 255, 0)
                masks[place][40:50, :20] = 127
        np.save(file, masks)
        start += len(masks)
    return copy


@pytest.fixture(scope="module")
def run(tested, store):
    return tested("ground_siim", store)


def read(run):
    metrics = json.loads((run / "test/metrics.json").read_text())
    return pd.read_parquet(run / "test/predictions.parquet"), metrics["intervals"], metrics


def words_of(joint, phrase):
    """The words of a phrase one by one: none of the small phantom's is boilerplate, but for `in` and `the`."""
    text = joint.encode_text([phrase])
    keep = ~torch.isin(text.ids[0], torch.tensor([0, word_id("in"), word_id("the")]))
    return (text.local[0][keep],)


def test_it_is_measured_as_loops_over_the_store_say(run, store, pretrained):
    table, figures, metrics = read(run)
    store, joint = Store.open(store), load_joint(pretrained)
    manifest = store.manifest
    rows = {name: row for row, name in enumerate(manifest["image_id"])}
    assert len(table) == metrics["data"]["rows"]["test"] == (manifest["split"] == "test").sum()
    regions = [store.mask(row)[8:-8, 8:-8] == 255 for row in np.flatnonzero(manifest["split"] == "val")]
    prior = np.mean([region for region in regions if region.any()], 0)
    words = joint.encode_text(["pneumothorax"]).local[0]
    for line in table.iloc[:12].itertuples():
        truth = store.mask(rows[line.image_id])[8:-8, 8:-8]
        image = torch.from_numpy(store.image(rows[line.image_id])[8:-8, 8:-8])[None, None].float() / 127.5 - 1
        values = upsample(similarity_map(words, joint.encode_image(image).local[0]), 48).numpy()
        y, x = np.unravel_index(values.argmax(), values.shape)
        if (values >= values.max() - 1e-6).sum() == 1:
            assert line.point_x_pneumothorax == pytest.approx((x + 8.5) * 128 / 64, abs=1e-3)
            assert line.point_y_pneumothorax == pytest.approx((y + 8.5) * 128 / 64, abs=1e-3)
        if not (truth == 255).any():
            assert np.isnan(line.truth_share_pneumothorax)
            continue
        inside, known = truth == 255, truth != 127
        expected = [inside.sum() / known.sum(), pointing(values, inside, known), contrast(values, inside, known),
                    mean_iou(values, inside, known), pointing(prior, inside, known), contrast(prior, inside, known),
                    mean_iou(prior, inside, known)]  # fmt: skip
        said = [line.truth_share_pneumothorax, line.hit_pneumothorax, line.cnr_pneumothorax, line.iou_pneumothorax,
                line.prior_hit_pneumothorax, line.prior_cnr_pneumothorax, line.prior_iou_pneumothorax]  # fmt: skip
        assert said == pytest.approx(expected, abs=1e-4)
    for name, value in Grounding.from_table(table).figures().items():
        assert figures[f"test/{name}"]["value"] == pytest.approx(value, abs=1e-6)
        low, high = figures[f"test/{name}"]["interval95"]
        assert low - 1e-9 <= value <= high + 1e-9
    assert (run / "test/pictures/cases.png").is_file()


def test_a_map_that_knows_the_region_beats_both_baselines(store, tested, monkeypatch):
    def forward(self, image):
        known = image.clone()
        known[..., 24:] = -1  # what is bright on the left
        return known

    monkeypatch.setattr(GroundingTask, "forward", forward)
    _, figures, _ = read(tested("ground_siim", store))
    assert figures["test/pointing_macro"]["value"] == 1
    assert figures["test/pointing_above_prior_macro"]["interval95"][0] > 0
    assert figures["test/pointing_above_random_macro"]["interval95"][0] > 0
    assert figures["test/cnr_above_prior_macro"]["interval95"][0] > 0


def test_boxes_are_regions_as_their_masks_are(tested, rsna_store):
    more = ["--data.categories", "[opacity]"]
    _, masks, _ = read(tested("ground_rsna", rsna_store, *more))
    boxes = tested("ground_rsna", rsna_store, *more, "--data.target", "boxes", "--data.masks_from_boxes", "false")
    assert read(boxes)[1] == masks


def test_each_image_has_phrases_of_its_own(tested, phrase_store, pretrained):
    table, _, metrics = read(tested("ground_ms_cxr", phrase_store))
    store, joint = Store.open(phrase_store), load_joint(pretrained)
    manifest = store.manifest.set_index("image_id", drop=False)
    rows = {name: row for row, name in enumerate(manifest["image_id"])}
    assert len(table) == metrics["data"]["rows"]["test"] == len(manifest)
    names = sorted({box["category"] for text in manifest["boxes"] for box in json.loads(text)})
    checked = 0
    for line in table.to_dict("records"):
        boxes = json.loads(manifest.at[line["image_id"], "boxes"])
        image = torch.from_numpy(store.image(rows[line["image_id"]])[8:-8, 8:-8])[None, None].float() / 127.5 - 1
        patches = joint.encode_image(image).local[0]
        for name in names:
            said = {box["phrase"] for box in boxes if box["category"] == name}
            if not said:
                assert np.isnan([line[f"truth_share_{name}"], line[f"hit_{name}"], line[f"point_x_{name}"]]).all()
                continue
            region = np.zeros((64, 64), bool)
            for box in (box for box in boxes if box["category"] == name):
                x, y, right, low = (round(v) for v in (box["x"], box["y"], box["x"] + box["w"], box["y"] + box["h"]))
                region[y:low, x:right] = True
            seen = film(*manifest.loc[line["image_id"], ["width", "height"]], 64, 48)
            inside = region[8:-8, 8:-8] & seen
            if not inside.any():  # cut off by the crop
                assert np.isnan(line[f"hit_{name}"])
                continue
            maps = [similarity_map(*words_of(joint, phrase), patches) for phrase in said]
            values = upsample(torch.stack(maps).mean(0), 48).numpy()
            expected = [inside.sum() / seen.sum(), pointing(values, inside, seen), contrast(values, inside, seen)]
            told = [line[f"truth_share_{name}"], line[f"hit_{name}"], line[f"cnr_{name}"]]
            assert told == pytest.approx(expected, abs=1e-4)
            checked += 1
    assert checked > 20


def test_phrases_that_the_boxes_do_not_have(evaluation, pretrained, rsna_store, phrase_store, workdir, capsys):
    boxes = ["--data.target", "boxes", "--data.masks_from_boxes", "false", "--data.categories", "[opacity]"]
    for store, more, line in (
        (rsna_store, [*boxes, "--model.phrases", "null"], "have none; give model.phrases, by category"),
        (rsna_store, ["--model.phrases", "null"], "gives no boxes with phrases; give phrases"),
    ):
        assert main(["test", *evaluation("ground_rsna", store, pretrained), *more]) == 2
        assert line in capsys.readouterr().err
    assert main(["predict", *evaluation("ground_ms_cxr", phrase_store, pretrained), "--data.inputs", "."]) == 2
    assert "sista: " in capsys.readouterr().err


def test_without_regions_in_the_validation_split_the_prior_is_the_centre(tested, store, tmp_path):
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    splits, start = Store.open(store).manifest["split"].to_numpy(), 0
    for file in sorted(copy.glob("masks-*.npy")):
        masks = np.load(file)
        masks[splits[start : start + len(masks)] == "val"] = 0
        np.save(file, masks)
        start += len(masks)
    run = tested("ground_siim", copy)
    assert "its prior is the image's centre" in (run / "told.txt").read_text()
    table, rows = read(run)[0], {name: row for row, name in enumerate(Store.open(copy).manifest["image_id"])}
    line = table.dropna().iloc[0]
    truth = Store.open(copy).mask(rows[line["image_id"]])[8:-8, 8:-8]
    assert line["prior_cnr_pneumothorax"] == pytest.approx(
        contrast(centre_map(48), truth == 255, truth != 127), abs=1e-4
    )


@pytest.mark.parametrize(("width", "height"), [(128, 128), (100, 60), (60, 100), (37, 91), (3, 200), (2000, 3)])
def test_the_frame_is_that_of_the_file(tmp_path, width, height):
    """White film: what is not padding in the crop is film, and a bright pixel of it goes back to where it was."""
    Image.fromarray(np.full((height, width), 255, np.uint8)).save(tmp_path / "white.png")
    square = read_gray(tmp_path / "white.png", 64)
    assert (film(width, height, 64, 48) == (square[8:-8, 8:-8] > 127)).all()
    pixels = np.zeros((height, width), np.uint8)
    y, x = height // 2, width // 2
    pixels[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3] = 255
    Image.fromarray(pixels).save(tmp_path / "spot.png")
    spot = read_gray(tmp_path / "spot.png", 64)[8:-8, 8:-8]
    place = np.unravel_index(spot.argmax(), spot.shape)
    back = original_point(place[1], place[0], width, height, 64, 48)
    assert np.abs(np.array(back) - (x, y)).max() <= 3 + 2 * max(width, height) / 64


def test_a_folder_of_films_is_pointed_at(pretrained, evaluation, workdir, capsys):
    (workdir / "films").mkdir()
    for name, shape in (("a.png", (60, 90)), ("b.png", (300, 200)), ("strip.png", (3, 2000))):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, np.uint8)).save(workdir / "films" / name)
    command = evaluation("ground_siim", workdir / "none", pretrained)
    phrases = "{effusion: [pleural effusion, left effusion], pneumothorax: pneumothorax}"
    more = ["--data.inputs", "films", "--model.phrases", phrases]
    assert main(["predict", *command, *more]) == 0, capsys.readouterr().err
    table = pd.read_csv(workdir / "runs/ground_siim/0001/predictions.csv")
    for (_, line), (height, width) in zip(table.iterrows(), ((60, 90), (300, 200), (3, 2000)), strict=True):
        for name in ("effusion", "pneumothorax"):
            assert 0 <= line[f"point_x_{name}"] <= width
            assert 0 <= line[f"point_y_{name}"] <= height
            assert -1 <= line[f"mean_{name}"] <= line[f"highest_{name}"] <= 1


def test_a_pre_training_without_a_token_loss_is_told(pretrained, rsna_store, evaluation, workdir, caplog):
    checkpoint = torch.load(pretrained, weights_only=True)
    checkpoint["hyper_parameters"]["losses"] = {"instance": {"name": "clip"}}
    torch.save(checkpoint, "clip.ckpt")
    assert main(["validate", *evaluation("ground_rsna", rsna_store, workdir / "clip.ckpt")]) == 0
    assert "the pre-training had no token loss" in caplog.text


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--model.phrases", "{a: edema, b: nodule}"], "masks have one class; give one"),
        (["--data.target", "boxes", "--model.phrases", "{opacityy: opacity}"], "did you mean opacityy?"),
        (["--data.target", "labels", "--data.labels", "[Pneumonia]"], "needs mask or boxes, the data group gives"),
    ],
)  # fmt: skip
def test_mistakes_of_the_data_are_one_line(more, line, evaluation, pretrained, rsna_store, workdir, capsys):
    assert main(["test", *evaluation("ground_rsna", rsna_store, pretrained), *more]) == 2
    told = [text for text in capsys.readouterr().err.splitlines() if text.startswith("sista: ")]
    assert len(told) == 1
    assert line in told[0]


@pytest.mark.parametrize(
    ("phrases", "line"),
    [
        ({}, "phrases is empty"),
        ({"a": []}, "phrases is empty"),
        ({"a": "no pneumothorax"}, "'no pneumothorax' has no word to look for"),
        ({"a": ["effusion", "the chest"]}, "'the chest' has no word to look for"),
    ],
)
def test_phrases_that_make_no_sense(phrases, line, pretrained):
    with pytest.raises(SistaError, match=line):
        GroundingTask(str(pretrained), phrases)
