"""Segmentation through the command line: what a test states is what its masks say, and masks of files are in theirs."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from PIL import Image
from sista_tasks.segmentation import SegmentationTask

from sista_pl.cli import main
from sista_pl.data.images import fit, read_gray
from sista_pl.data.masks import Rle
from sista_pl.data.store import Store
from sista_pl.data.transforms import normalise


@pytest.fixture(scope="module")
def store(siim_store, tmp_path_factory):
    """A copy of the phantom's store with more to find: what is bright on the left of three films of four."""
    copy = tmp_path_factory.mktemp("bright") / "store"
    shutil.copytree(siim_store, copy)
    images = Store.open(siim_store)

    def bright(masks, splits, start):
        for place, mask in enumerate(masks):
            mask[:] = 0
            if (start + place) % 4:
                mask[:, :32] = np.where(images.image(start + place)[:, :32] > 128, 255, 0)

    edit(copy, bright)
    return copy


def edit(store, change):
    """Write the masks of a store anew after `change(masks (N, H, W), splits (N,), first row)`."""
    splits, start = Store.open(store).manifest["split"].to_numpy(), 0
    for file in sorted(store.glob("masks-*.npy")):
        masks = np.load(file)
        change(masks, splits[start : start + len(masks)], start)
        np.save(file, masks)
        start += len(masks)


@pytest.fixture
def seg(seg, store):
    """The command line of a small segmentation of these masks, an epoch, no tracker."""
    return [*seg, "--data.store", str(store), "--trainer.max_epochs", "1", "--trainer.logger", "false"]


@pytest.fixture
def fitted(seg, runs, workdir):
    """The command line of a run that was fitted; its folder is in the current one."""
    shutil.copytree(runs, workdir / "runs")
    return [*seg, *CROP]


@pytest.fixture(scope="module")
def runs(store, tmp_path_factory, mlflow_tables):
    """The folder of runs with one fit of two epochs on crops of 48 px."""
    folder = tmp_path_factory.mktemp("fitted")
    shutil.copy(mlflow_tables, folder / "mlflow.db")
    command = ["--config", "seg_siim.yaml", *SMALL, "--data.store", str(store), *CROP, "--model.lr", "0.01"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", *command]) == 0
    return folder / "runs"


pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")  # runs are copied to be tested
CROP = ["--data.crop", "48"]
SMALL = [
    "--data.root", "null", "--data.format", "null", "--data.phantom", "null", "--data.size", "64",
    "--data.min_epoch_images", "320",
    "--data.batch_size", "8", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
    "--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.max_epochs", "2",
    "--trainer.logger", "false", "--model.decoder", "{name: unet, channels: [16, 16, 8, 8, 8]}",
]  # fmt: skip


def best(workdir, name="seg_siim", number="0001"):
    return workdir / "runs" / name / number / "checkpoints" / "best.ckpt"


def one_line(capsys):
    told = [text for text in capsys.readouterr().err.splitlines() if text.startswith("sista: ")]
    assert len(told) == 1, told
    return told[0]


def changed(store, workdir, change):
    copy = workdir / "store"
    shutil.copytree(store, copy)
    edit(copy, change)
    return ["--data.store", str(copy)]


def ignore_a_tenth(masks, splits, start):
    draw = np.random.default_rng(0)
    masks[draw.random(masks.shape) < 0.1] = 127


def loop(runs, truth):
    """Pixel by pixel: in both, in the prediction, in the truth; what is to be ignored in none."""
    size = len(truth)
    numbers = [int(word) for word in runs.split()]
    said = {pixel for first, length in zip(numbers[::2], numbers[1::2], strict=True)
            for pixel in range(first - 1, first - 1 + length)}  # fmt: skip
    known = {x * size + y for y in range(size) for x in range(size) if truth[y, x] != 127}  # down the columns
    true = {x * size + y for y in range(size) for x in range(size) if truth[y, x] == 255}
    return len(said & true), len(said & known), len(true), said - known


def test_what_a_test_states_is_what_its_masks_say(fitted, store, workdir):
    assert main(["test", *fitted, *changed(store, workdir, ignore_a_tenth)]) == 0
    folder = workdir / "runs/seg_siim/0001/test"
    table, metrics = pd.read_parquet(folder / "predictions.parquet"), json.loads((folder / "metrics.json").read_text())
    store = Store.open(workdir / "store")
    rows = {name: row for row, name in enumerate(store.manifest["image_id"])}
    assert len(table) == metrics["data"]["rows"]["test"] == (store.manifest["split"] == "test").sum()
    dice, iou, counts = [], [], []
    for line in table.itertuples():
        truth = store.mask(rows[line.image_id])[8:-8, 8:-8]
        both, said, true, beyond = loop(line.mask_rle, truth)
        assert (line.intersection_pixels, line.predicted_pixels, line.truth_pixels) == (both, said, true)
        assert not beyond, "a pixel to be ignored is in no mask"
        dice.append(2 * both / (said + true) if said + true else 1.0)
        iou.append(both / (said + true - both) if said + true else 1.0)
        counts.append((both, said, true))
        assert line.dice == pytest.approx(dice[-1])
        decoded = Rle((line.mask_rle,), line.mask_size, line.mask_size, relative=False).decode()
        assert (decoded == 255).sum() == said
        assert ((decoded == 255) & (truth == 255)).sum() == both
    both, said, true = np.array(counts).T
    assert (said > 0).any()
    expected = {
        "dice_image_empty1": np.mean(dice), "dice_positive": np.mean([d for d, t in zip(dice, true) if t]),  # noqa: B905
        "dice_dataset": 2 * both.sum() / (said + true).sum(), "iou": np.mean(iou),
        "empty_specificity": np.mean([s == 0 for s, t in zip(said, true) if not t]),  # noqa: B905
    }  # fmt: skip
    for name, value in expected.items():
        assert metrics["test"][f"test/{name}"] == pytest.approx(value, abs=1e-6), name
        stated = metrics["intervals"][f"test/{name}"]
        assert stated["value"] == pytest.approx(value, abs=1e-6)
        assert stated["interval95"][0] <= value <= stated["interval95"][1]
        assert stated["n"] == len(table)
    assert {p.name for p in (folder / "pictures").iterdir()} == {"cases.png"}


def slow_unfit(scores, width, height, size):
    """Each pixel of the original looked up in the square of the input."""
    crop, mask = len(scores), np.zeros((height, width), bool)
    scale, dx, dy = fit(width, height, size)
    new = [max(1, round(side * scale)) for side in (width, height)]
    off = (size - crop) // 2
    for y in range(height):
        for x in range(width):
            row = dy + int((y + 0.5) * new[1] / height) - off
            column = dx + int((x + 0.5) * new[0] / width) - off
            mask[y, x] = 0 <= row < crop and 0 <= column < crop and scores[row, column] > 0.5
    return mask


def test_masks_of_files_are_in_the_files_own_pixels(fitted, store, workdir):
    folder, store = workdir / "new", Store.open(store)
    folder.mkdir()
    for name, (width, height), row in zip("abc", [(90, 60), (50, 120), (64, 64)], range(1, 4), strict=True):
        Image.fromarray(store.image(row)).resize((width, height)).save(folder / f"{name}.png")
    (folder / "d.png").write_bytes(b"broken")
    assert main(["predict", *fitted, "--data.inputs", str(folder)]) == 0
    run = workdir / "runs/seg_siim/0001"
    table = pd.read_parquet(run / "predictions.parquet")
    assert [name.rsplit("/", 1)[-1] for name in table["image"]] == ["a.png", "b.png", "c.png"]
    assert pd.read_csv(run / "unreadable.csv")["image"].tolist() == [str(folder / "d.png")]
    task = SegmentationTask.load_from_checkpoint(best(workdir), map_location="cpu", weights_only=True).eval()
    for line in table.itertuples():
        with Image.open(line.image) as image:
            assert (line.width, line.height) == image.size
        pixels = torch.from_numpy(read_gray(folder / line.image, 64)[8:-8, 8:-8].copy())[None, None]
        with torch.no_grad():
            scores = task({"image": normalise(pixels)})[0, 0].sigmoid().numpy()
        expected = slow_unfit(scores, line.width, line.height, 64)
        found = Rle((line.mask_rle,), line.width, line.height, relative=False).decode() == 255
        assert found.shape == expected.shape == (line.height, line.width)
        assert (found != expected).mean() < 0.002  # scores of a batch differ in their last digit
        assert line.area == pytest.approx(found.mean())
        Image.new("L", (line.width, line.height), 255).save(workdir / "white.png")
        seen = read_gray(workdir / "white.png", 64)[8:-8, 8:-8] > 127
        assert line.score == pytest.approx(scores[seen].max(), abs=1e-4)
    assert table["area"].max() > 0


def test_a_score_on_the_padding_is_no_score_of_the_film():
    task, scores = SegmentationTask(image_encoder="resnet10t", image_size=32), torch.full((2, 32, 32), 0.2)
    scores[0, :8], scores[:, 16, 16] = 0.9, 0.3  # above a wide film; on both
    data = SimpleNamespace(size=32, files=["wide.png", "square.png"])
    task._trainer = SimpleNamespace(datamodule=data)
    sizes = torch.tensor([[100, 50], [50, 50]])
    table = task.prediction_table({"index": torch.arange(2), "scores": scores, "original_size": sizes})
    assert table["score"].tolist() == pytest.approx([0.3, 0.3])


def test_a_folder_of_broken_files_is_an_empty_table(fitted, workdir):
    (workdir / "new").mkdir()
    (workdir / "new/a.png").write_bytes(b"broken")
    assert main(["predict", *fitted, "--data.inputs", str(workdir / "new")]) == 0
    run = workdir / "runs/seg_siim/0001"
    assert len(pd.read_parquet(run / "predictions.parquet")) == 0
    assert len(pd.read_csv(run / "unreadable.csv")) == 1


@pytest.mark.parametrize("protocol", ["mgca", pytest.param("standard", marks=pytest.mark.slow)])
def test_frozen_is_bit_identical_and_the_protocol_names_its_figure(seg, workdir, protocol):
    from pytorch_lightning import seed_everything

    assert main(["fit", *seg, "--model.protocol", protocol]) == 0
    after = torch.load(best(workdir), weights_only=True)["state_dict"]
    seed_everything(0, workers=True)
    spec = {"name": "unet", "channels": [16, 16, 8, 8, 8]}
    before = SegmentationTask(spec, image_encoder="resnet10t", image_size=64, protocol=protocol).state_dict()
    encoder = [name for name in before if name.startswith("image_encoder.")]
    assert sum("running_" in name for name in encoder) > 10
    assert all(torch.equal(before[name], after[name]) for name in encoder)
    rest = [name for name in before if name.startswith("decoder.") and name.endswith("weight")]
    assert not any(torch.equal(before[name], after[name]) for name in rest)
    metrics = json.loads((workdir / "runs/seg_siim/0001/metrics.json").read_text())
    mgca = protocol == "mgca"
    assert metrics["monitor"] == ("val/dice_image_empty1" if mgca else "val/dice_positive")
    assert ("val/mask/focal" if mgca else "val/mask/bce") in metrics["history"][0]
    assert metrics["best"]["score"] == metrics["history"][0][metrics["monitor"]]


def empty(split):
    def change(masks, splits, start):
        masks[splits == split] = 0

    return change


def test_a_test_set_without_objects_states_what_is_defined(fitted, store, workdir, caplog):
    assert main(["test", *fitted, *changed(store, workdir, empty("test"))]) == 0
    assert "test: no image has an object: no dice_positive" in caplog.text
    metrics = json.loads((workdir / "runs/seg_siim/0001/test/metrics.json").read_text())
    assert "test/dice_positive" not in metrics["test"]
    assert metrics["test"]["test/dice_image_empty1"] == metrics["test"]["test/empty_specificity"]
    assert "test/empty_specificity" in metrics["intervals"]


def test_a_validation_set_without_objects_is_one_line(seg, store, workdir, capsys):
    assert main(["fit", *seg, *changed(store, workdir, empty("val"))]) == 2
    assert "val/dice_positive is not defined on the validation split (no image has an object" in one_line(capsys)


@pytest.mark.parametrize("verb", ["test", "predict"])
def test_nan_is_one_line_and_leaves_no_table(fitted, workdir, capsys, verb):
    checkpoint = torch.load(best(workdir), weights_only=True)
    checkpoint["state_dict"]["decoder.head.0.bias"].fill_(float("nan"))
    torch.save(checkpoint, best(workdir))
    assert main([verb, *fitted]) == 2
    assert f"{verb}: the model predicts NaN" in one_line(capsys)
    assert not list((workdir / "runs").rglob("predictions*"))


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--model.decoder", "dpt"], "'dpt': for vision transformers; use `decoder: unet`"),
        (["--model.image_encoder", "vit_tiny_patch16_224"], "maps of one stride, as a ViT; use `decoder: dpt`"),
        (["--model.decoder", "unnet"], "unknown decoder 'unnet'; did you mean unet?"),
        (["--model.losses", "{mask: {name: bce}}"], "'bce' is for labels, this task has mask"),
        (["--data.target", "labels"], "SegmentationTask needs mask, the data group gives labels"),
        (["--model.image_encoder", "hf:nowhere"], "'hf:nowhere': no folder with a config.json"),
    ],
)
def test_mistakes_are_one_line(seg, workdir, capsys, more, line):
    assert main(["fit", *seg, *more]) == 2
    assert line in one_line(capsys)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["dpt", "setr_pup"])
def test_a_model_of_hugging_face_and_its_checkpoint_without_the_folder(seg, workdir, decoder):
    """Fit on the folder; then another fit from the first one's checkpoint, when the folder is gone."""
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14
    )
    transformers.Dinov2WithRegistersModel(config).save_pretrained(workdir / "dino")
    channels = "intermediate: [8, 8, 8, 8], fusion: 8" if decoder == "dpt" else "channels: 8"
    more = [*seg, "--model.decoder", f"{{name: {decoder}, {channels}}}"]
    own = ["--model.image_encoder", f"hf:{workdir / 'dino'}"]
    assert main(["fit", *more, *own]) == 0
    assert main(["test", *more, *own]) == 0
    table = pd.read_parquet(workdir / "runs/seg_siim/0001/test/predictions.parquet")
    assert (table["mask_size"] == 64).all()
    shutil.rmtree(workdir / "dino")
    from_it = ["--model.image_encoder", "null", "--model.weights", str(best(workdir)), "--model.frozen", "false"]
    assert main(["fit", *more, *from_it]) == 0
    assert main(["test", *more, *from_it]) == 0
    states = [torch.load(best(workdir, number=n), weights_only=True)["state_dict"] for n in ("0001", "0002")]
    name = "image_encoder.model.embeddings.position_embeddings"
    assert states[0].keys() == states[1].keys()
    assert not torch.equal(states[0][name], states[1][name])
    assert (states[0][name] - states[1][name]).abs().max() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["true", "false"])
def test_classification_on_a_model_of_hugging_face(cls, workdir, frozen):
    config = transformers.SiglipVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    transformers.SiglipVisionModel(config).save_pretrained(workdir / "siglip")
    more = [*cls, "--model.image_encoder", f"hf:{workdir / 'siglip'}", "--model.frozen", frozen]
    assert main(["fit", *more, "--trainer.max_epochs", "1"]) == 0
    assert main(["test", *more]) == 0
    metrics = json.loads((workdir / "runs/cls_rsna/0001/test/metrics.json").read_text())
    assert 0 <= metrics["test"]["test/auroc_macro"] <= 1
