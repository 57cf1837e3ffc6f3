"""Detection through the command line: figures, boxes of the original, frozen encoders, mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from pytorch_lightning import seed_everything
from sista_tasks.detection import DetectionTask
from sista_tasks.detection.detectors import Detections
from sista_tasks.detection.pictures import counts, precision_recall, threshold
from sklearn.metrics import precision_recall_curve

from sista_pl.cli import main
from sista_pl.data.images import read_gray
from sista_pl.data.store import Store
from sista_pl.data.transfer import TransferDataModule
from sista_pl.data.transforms import normalise
from sista_pl.metrics import Detection

SMALL_SPEC = {"name": "retinanet", "channels": 64}
SMALL = "{name: retinanet, channels: 64}"


@pytest.fixture(scope="module")
def det(rsna_store) -> list[str]:
    """The command line of a small detection on films of 64 px."""
    return [
        "--config", "det_rsna.yaml", "--data.root", "null", "--data.format", "null", "--data.phantom", "null",
        "--data.size", "64", "--data.crop", "64", "--data.batch_size", "8", "--data.store", str(rsna_store),
        "--data.min_epoch_images", "0",
        "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
        "--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.max_epochs", "1",
        "--trainer.logger", "false", "--model.draws", "20", "--model.detector", SMALL, "--model.frozen", "true",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(det, tmp_path_factory) -> list[str]:
    """The command line of a fine-tuned run that is there."""
    command = ["--run_root", str(tmp_path_factory.mktemp("runs")), *det, "--model.frozen", "false"]
    assert main(["fit", *command, "--trainer.max_epochs", "2"]) == 0
    return command


def run_of(command) -> Path:
    return Path(command[1]) / "det_rsna/0001"


def read(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    table = pd.read_parquet(folder / "predictions.parquet")
    for column in ("truth_boxes", "predicted_boxes"):
        table[column] = table[column].map(json.loads)
    return metrics, table


def corners(boxes):
    return np.array([[b["x"], b["y"], b["x"] + b["w"], b["y"] + b["h"]] for b in boxes]).reshape(-1, 4)


def average_precision(table, least):
    """Of one class, by hand: each detection by falling score takes the free true box of highest IoU."""
    said = [(box["score"], row, n) for row, each in enumerate(table["predicted_boxes"]) for n, box in enumerate(each)]
    free = [list(corners(each)) for each in table["truth_boxes"]]
    total = sum(map(len, free))
    hits = []
    for _, row, n in sorted(said, key=lambda one: -one[0]):
        box = corners(table["predicted_boxes"][row][n : n + 1])[0]
        iou = []
        for true in free[row]:
            w, h = (np.minimum(box[2:], true[2:]) - np.maximum(box[:2], true[:2])).clip(0)
            iou.append(w * h / (np.prod(box[2:] - box[:2]) + np.prod(true[2:] - true[:2]) - w * h))
        hits.append(bool(iou) and max(iou) >= least)
        if hits[-1]:
            free[row].pop(int(np.argmax(iou)))
    found = np.cumsum(hits)
    precision, recall = found / np.arange(1, len(hits) + 1), found / total
    return np.mean([max(precision[recall >= r - 1e-9], default=0) for r in np.linspace(0, 1, 101)])


def test_the_figures_are_those_of_the_boxes_that_were_written(trained, rsna_store, monkeypatch):
    """By a detector that knows the truth roughly, so that there is something to count."""
    rng = np.random.default_rng(0)
    forward = DetectionTask.forward

    def roughly(self, batch, boxes=None, labels=None):
        found = []
        for each in boxes:
            near = each + torch.from_numpy(rng.uniform(-2, 2, each.shape)).float()
            low = rng.uniform(0, 40, (int(rng.integers(3)), 2))
            said = torch.cat([near, torch.from_numpy(np.concatenate([low, low + 15], 1)).float()])
            scores = torch.from_numpy(rng.random(len(said))).float().sort(descending=True).values
            order = torch.from_numpy(rng.permutation(len(said)))
            found.append(Detections(said[order], torch.zeros(len(said), dtype=torch.long), scores))
        return forward(self, batch, boxes, labels)[0], found

    monkeypatch.setattr(DetectionTask, "forward", roughly)
    assert main(["test", *trained]) == 0
    folder = run_of(trained) / "test"
    metrics, table = read(folder)
    store = Store.open(rsna_store)
    rows = np.flatnonzero(store.manifest["split"] == "test")
    assert table["image_id"].tolist() == store.manifest["image_id"].to_numpy()[rows].tolist()
    assert (table["image_size"] == 64).all()
    expected = [[{k: b[k] for k in ("category", "x", "y", "w", "h")} for b in json.loads(store.manifest["boxes"][row])]
                for row in rows]  # fmt: skip
    assert table["truth_boxes"].tolist() == expected
    assert 0 < sum(map(bool, expected)) < len(expected), "films with and without boxes"
    top = table["predicted_boxes"].map(lambda each: max((box["score"] for box in each), default=0))
    assert np.allclose(table["score"], top, atol=1e-4)
    assert metrics["test"]["test/ap_50"] == pytest.approx(average_precision(table, 0.5), abs=1e-6)
    low = np.mean([average_precision(table, least) for least in np.arange(40, 76, 5) / 100])
    assert 0.03 < low < 0.9
    assert metrics["test"]["test/map_40_75"] == pytest.approx(low, abs=1e-6)
    figure = metrics["intervals"]["test/map_40_75"]
    assert figure["interval95"][0] < figure["value"] < figure["interval95"][1]
    assert figure["value"] == pytest.approx(metrics["test"]["test/map_40_75"], abs=1e-6)
    assert "PHANTOM" in metrics["phantom"]
    assert {p.name for p in (folder / "pictures").iterdir()} == {"curves.png", "cases.png"}
    assert all(Image.open(path).size[0] > 300 for path in (folder / "pictures").iterdir())


@pytest.mark.parametrize("crop", [64, 32])
def test_boxes_of_a_prediction_are_in_pixels_of_the_original(trained, rsna_store, tmp_path, crop):
    """Films that are not square: what the detector says of the crop, moved back by hand."""
    originals = {"wide.png": (320, 200), "tall.png": (101, 257), "square.jpg": (64, 64)}
    for i, (name, size) in enumerate(originals.items()):
        Image.fromarray(Store.open(rsna_store).image(i)).resize(size).save(tmp_path / name)
    (tmp_path / "broken.jpg").write_bytes(b"broken")
    more = ["--data.crop", str(crop), "--model.image_size", str(crop), "--data.inputs", str(tmp_path)]
    # alone, or the last digits of a score decide which of two doubles stays
    assert main(["predict", *trained, *more, "--data.batch_size", "1"]) == 0
    run = run_of(trained)
    table = pd.read_parquet(run / "predictions.parquet")
    assert [name.rsplit("/", 1)[-1] for name in table["image"]] == sorted(originals)
    assert [name.rsplit("/", 1)[-1] for name in pd.read_csv(run / "unreadable.csv")["image"]] == ["broken.jpg"]
    assert pd.read_csv(run / "predictions.csv")["boxes"].tolist() == table["boxes"].tolist()
    task = DetectionTask(1, SMALL_SPEC, image_encoder="resnet10t", image_size=crop).eval()
    checkpoint = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    assert checkpoint["classes"] == ["opacity"]
    task.load_state_dict(checkpoint["state_dict"])
    for told in table.itertuples():
        width, height = originals[told.image.rsplit("/", 1)[-1]]
        assert (told.width, told.height) == (width, height)
        off = (64 - crop) // 2
        pixels = read_gray(Path(told.image), 64)[off : off + crop, off : off + crop]
        with torch.no_grad():
            _, (found,) = task({"image": normalise(torch.from_numpy(pixels)[None, None])})
        scale = max(width, height) / 64
        padding = np.array([(64 - width / scale) / 2, (64 - height / scale) / 2] * 2)
        wanted = ((found.boxes.numpy() + off - padding) * scale).clip(0, [width, height] * 2)
        boxes = json.loads(told.boxes)
        assert len(boxes) == told.count > 0
        assert told.score == pytest.approx(boxes[0]["score"], abs=1e-5)
        assert {box["category"] for box in boxes} == {"opacity"}
        said, scores = corners(boxes), found.scores.numpy()
        assert said.min() >= 0
        assert (said <= np.array([width, height] * 2) + 0.02).all()
        apart = np.abs(scores - np.array([[box["score"]] for box in boxes]))
        far = np.abs(said[:, None] - wanted).max(2) + 1e4 * (apart > 1e-5)
        seen = far.argmin(1)
        left = np.setdiff1d(np.arange(len(wanted)), seen)
        assert len(set(seen)) == len(boxes)
        # the padding is whole pixels of the crop; what lies on it alone is left out
        assert far.min(1).max() <= 0.5 * scale + 0.02
        assert ((wanted[left, 2:] - wanted[left, :2]).min(1) <= 0.5 * scale).all()


def test_a_checkpoint_of_other_categories_is_one_line(trained, tmp_path, capsys):
    checkpoint = torch.load(run_of(trained) / "checkpoints/best.ckpt", weights_only=True)
    torch.save(checkpoint | {"classes": ["device"]}, tmp_path / "other.ckpt")
    assert main(["test", *trained, "--ckpt_path", str(tmp_path / "other.ckpt")]) == 2
    told = [text for text in capsys.readouterr().err.splitlines() if text.startswith("sista: ")]
    assert len(told) == 1
    assert told[0].endswith("categories are opacity, but the checkpoint was trained on device, in this order; "
                            "set data.categories: [device]")  # fmt: skip


def test_a_prediction_of_the_stored_films_equals_the_test(trained):
    """RSNA's films are square, so a test's boxes are those of the original but for the size."""
    assert main(["test", *trained]) == 0
    assert main(["predict", *trained]) == 0
    _, table = read(run_of(trained) / "test")
    told = pd.read_parquet(run_of(trained) / "predictions.parquet")
    assert told["image"].tolist() == table["image_id"].tolist()
    for boxes, width, tested in zip(
        told["boxes"].map(json.loads), told["width"], table["predicted_boxes"], strict=True
    ):
        assert np.allclose(corners(boxes), corners(tested) * width / 64, atol=0.03 * width / 64)
        assert [box["score"] for box in boxes] == [box["score"] for box in tested]


@pytest.mark.parametrize("detector", ["retinanet", "yolov3"])
def test_a_frozen_encoder_stays_as_it_was(det, workdir, detector):
    spec = {"retinanet": SMALL_SPEC, "yolov3": {"name": "yolov3", "width": 32}}[detector]
    published = ["--model.protocol", "mgca"] if detector == "yolov3" else []
    command = [*det, "--model.detector", json.dumps(spec), *published]
    assert main(["fit", *command]) == 0
    after = torch.load(workdir / "runs/det_rsna/0001/checkpoints/best.ckpt", weights_only=True)["state_dict"]
    seed_everything(0, workers=True)
    before = DetectionTask(1, spec, image_encoder="resnet10t", image_size=64).state_dict()
    kept = [name for name in before if name.startswith("image_encoder.")]
    assert any("running_var" in name for name in kept)
    assert all(torch.equal(before[name], after[name]) for name in kept)
    trained = [name for name in before if name.startswith("detector.")]
    assert not any(torch.equal(before[name], after[name]) for name in trained)
    if published:
        assert main(["test", *command]) == 0
        metrics, _ = read(workdir / "runs/det_rsna/0001/test")
        assert {"test/map_mgca", "test/loss/boxes", "test/loss/objectness"} <= set(metrics["test"])


def test_the_published_protocol_is_yolov3():
    task = DetectionTask(1, protocol="mgca", image_encoder="resnet10t", image_size=64)
    assert type(task.detector).__name__ == "YoloV3"
    assert set(task.losses) == {"boxes", "objectness", "classification"}
    assert len(task.detector.places) == 3 * (8 * 8 + 4 * 4 + 2 * 2)


def test_batches_hold_no_box_without_an_area(rsna_store, tmp_path):
    """What the crop cuts to nothing goes, with its label, from batches and from the truth alike."""
    data = TransferDataModule(rsna_store, target="boxes", size=64, crop=32, batch_size=4)
    data.setup("fit")
    place = data.rows["train"][0]
    kept, zero, outside = (20.0, 20.0, 40.0, 44.0), (30.0, 30.0, 30.0, 40.0), (0.0, 0.0, 10.0, 10.0)
    data.boxes[place] = np.array([zero, kept, outside], np.float32), np.array([0, 0, 0])
    dataset = data._loader("train", False).dataset
    batch = dataset.__getitems__([(int(place), 0)])
    assert batch["boxes"][0].tolist() == [[4.0, 4.0, 24.0, 28.0]]
    assert batch["box_labels"][0].tolist() == [0]
    task = DetectionTask(1, SMALL_SPEC, image_encoder="resnet10t", image_size=32)
    task._trainer = type("Trainer", (), {"datamodule": data})
    (truth,) = task.truth(np.array([place]))
    assert truth.tolist() == [[0, 1, 4, 4, 20, 24]]


def test_a_test_without_a_box_says_so(trained, caplog, monkeypatch):
    """All-negative test sets: no figure, a line that says why, and still predictions and pictures."""
    read_boxes = TransferDataModule._read_boxes

    def none_in_the_test(self):
        found = read_boxes(self)
        self.boxes = [
            (corners[:0], kinds[:0]) if split == "test" else (corners, kinds)
            for (corners, kinds), split in zip(self.boxes, self.store.manifest["split"], strict=True)
        ]
        return found

    monkeypatch.setattr(TransferDataModule, "_read_boxes", none_in_the_test)
    assert main(["test", *trained]) == 0
    assert "no image has a true box: no mAP, FROC and sensitivity" in caplog.text
    metrics, table = read(run_of(trained) / "test")
    assert metrics["intervals"] == {}
    assert not table["truth_boxes"].map(len).any()
    assert len(list((run_of(trained) / "test/pictures").glob("*.png"))) == 2


@pytest.mark.slow
def test_three_processes_test_as_one(trained, workdir):
    found = []
    for devices in ("1", "3"):
        run = [sys.executable, "-m", "sista_pl", "test", *trained, "--trainer.devices", devices,
               *(["--trainer.strategy", "ddp"] if devices == "3" else [])]  # fmt: skip
        done = subprocess.run(run, cwd=workdir, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(read(run_of(trained) / "test"))
    (one, first), (two, second) = found
    assert len(first) % 3, "a test set that three processes can't share evenly"
    assert first["image_id"].tolist() == second["image_id"].tolist()
    for a, b in zip(first["predicted_boxes"], second["predicted_boxes"], strict=True):
        assert len(a) == len(b)
        assert np.allclose(corners(a), corners(b), atol=0.05)
    for figure, value in one["test"].items():
        if "loss" not in figure:  # the mean over batches counts padding; no figure of ours does
            assert value == pytest.approx(two["test"][figure], abs=1e-6), figure


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["retinanet", "yolov3"])
def test_two_processes_train_together(det, workdir, detector):
    """Batches without a box on one of the ranks: each parameter has its gradient on both."""
    small = {"retinanet": SMALL, "yolov3": "{name: yolov3, width: 32}"}[detector]
    run = [sys.executable, "-m", "sista_pl", "fit", *det, "--model.detector", small, "--data.batch_size", "2",
           "--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.limit_train_batches", "6"]  # fmt: skip
    done = subprocess.run(run, cwd=workdir, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    history = json.loads((workdir / "runs/det_rsna/0001/metrics.json").read_text())["history"]
    assert np.isfinite(history[0]["val/loss"])


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--model.num_classes", "2"], "num_classes is 2, the data group has 1 categories of boxes (opacity)"),
        (["--model.num_classes", "0"], "num_classes is 0; give the number of the data group's categories"),
        (["--model.detector", "retinanett"], "unknown detector 'retinanett'; did you mean retinanet?"),
        (["--model.detector", "{channels: 64}"], "detector without a name"),
        (["--model.protocol", "mgca"], "protocol mgca has the detector yolov3, not 'retinanet'"),
        (["--model.losses", "{a: {name: detector, component: classification}}"], "losses leave out 'bbox_regression'"),
        (["--model.losses", "{a: {name: bce}}"], "losses leave out 'classification'"),
        (["--data.crop", "48", "--model.image_size", "48"], "image_size is 48; detection on this encoder needs a mult"),
        (["--data.target", "mask"], "has no masks; prepare a release with masks"),
        (["--data.target", "labels"], "DetectionTask needs boxes, the data group gives labels; set data.target: boxes"),
        (["--data.categories", "[opacty]"], "has no boxes of 'opacty'; did you mean opacity?"),
        (["--model.lr", "1.0e+30"], "lower"),
    ],
)
def test_mistakes_are_one_line(det, workdir, capsys, more, line):
    assert main(["fit", *det, *more]) == 2
    told = [text for text in capsys.readouterr().err.splitlines() if text.startswith("sista: ")]
    assert len(told) == 1
    assert line in told[0]


def test_an_unknown_component_is_named(det, workdir, capsys):
    both = "{a: {name: detector, component: classification}, b: {name: detector, component: bbox_regression}"
    assert main(["fit", *det, "--model.losses", both + ", c: {name: detector, component: clasification}}"]) == 2
    assert "no component 'clasification'; did you mean classification?" in capsys.readouterr().err


def test_losses_are_weighed_by_the_configuration(det, workdir):
    both = ("{a: {name: detector, component: classification}, "
            "b: {name: detector, component: bbox_regression, weight: 0}}")  # fmt: skip
    assert main(["fit", *det, "--model.losses", both]) == 0
    told = json.loads((workdir / "runs/det_rsna/0001/metrics.json").read_text())["history"][0]
    assert told["val/loss"] == pytest.approx(told["val/loss/a"], rel=1e-5)
    assert told["val/loss/b"] > 0


# --- pictures ------------------------------------------------------------------


def some_family(seed=0, images=20):
    rng = np.random.default_rng(seed)
    truth = [rng.integers(0, 40, (int(rng.integers(3)), 4)) + [0, 0, 8, 8.0] for _ in range(images)]
    said = [np.concatenate([each + rng.uniform(-2, 2, each.shape), rng.uniform(10, 30, (2, 4))]) for each in truth]
    scores = [rng.random(len(each)).round(2) for each in said]
    zeros = [[np.zeros(len(each), int) for each in part] for part in (truth, said)]
    return Detection(truth, zeros[0], said, zeros[1], scores, ["opacity"]), truth, said, scores


def test_the_drawn_curve_is_scikit_learns():
    """Its recall never reaches the missed boxes; up to that share it is a classifier's of the detections."""
    family, truth, *_ = some_family()
    ranked = family.ranked[0]
    hit = np.zeros(len(ranked.scores), int)
    hit[ranked.hits[2]] = 1
    recall, precision = precision_recall(ranked)
    theirs, share, _ = precision_recall_curve(hit, ranked.scores)
    assert recall[::-1] == pytest.approx(share * hit.sum() / sum(map(len, truth)))
    assert precision[::-1] == pytest.approx(theirs)


def test_the_films_are_counted_at_one_false_alarm_an_image():
    family, truth, _, scores = some_family()
    cut = threshold(family, 0)
    total, found, alarms = counts(family, np.array([cut]))
    assert total.tolist() == [len(each) for each in truth]
    assert (found + alarms).tolist() == [int((each >= cut).sum()) for each in scores]
    assert alarms.sum() <= family.size
    lower = np.unique(np.concatenate(scores))
    lower = lower[lower < cut][-1]
    assert counts(family, np.array([lower]))[2].sum() > family.size, "and at no lower threshold"
    assert found.sum() / total.sum() == family.figures()["sensitivity@1fp"]
    alone = Detection(truth, [np.zeros(len(each), int) for each in truth], [np.zeros((0, 4))] * 20,
                      [np.zeros(0, int)] * 20, [np.zeros(0)] * 20, ["opacity"])  # fmt: skip
    assert threshold(alone, 0) == np.inf
    assert counts(alone, np.array([np.inf]))[1].sum() == 0
