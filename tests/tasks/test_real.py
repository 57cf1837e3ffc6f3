"""Real X-rays: five folds over whole patients, each model against a plain baseline of the same folds, `-s` for figures.

N images, H W pixels.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sista_pl.cli import main
from sista_pl.data.store import Store
from sista_pl.data.transfer import TransferDataModule
from sista_pl.metrics import Classification, Detection, Segmentation, intervals

from .conftest import overlap

pytestmark = [pytest.mark.real, pytest.mark.study]
FOLDS, SIZE = 5, 96


def run_folds(config: str, group: str, root: Path, options: str, target: str, *more: str) -> list[tuple]:
    """Fit and test each fold by the command; return of each its data module and its table of predictions."""
    found = []
    for number in range(FOLDS):
        fold = f"{number}/{FOLDS}"
        command = [
            "--config", config, "--data", group, "--data.root", str(root), "--data.store", "store", "--data.options",
            options, "--data.size", str(SIZE), "--data.crop", str(SIZE), "--data.num_workers", "0", "--data.fold", fold,
            "--name", f"fold{number}", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false",
            "--trainer.enable_model_summary", "false", "--trainer.accelerator", "cpu", "--model.draws", "20", *more,
        ]  # fmt: skip
        assert main(["fit", *command]) == 0
        assert main(["test", *command]) == 0
        data = TransferDataModule("store", size=SIZE, target=target, fold=fold, **_labels(more))
        data.setup("test")
        table = pd.read_parquet(f"runs/fold{number}/0001/test/predictions.parquet").set_index("image_id")
        ids = data.store.manifest["image_id"].to_numpy()[data.rows["test"]]
        assert set(table.index) == set(ids)
        found.append((data, table.loc[ids].reset_index()))
    tested = pd.concat([table for _, table in found])
    assert tested["image_id"].is_unique
    return found


def _labels(more: tuple[str, ...]) -> dict:
    pairs = dict(zip(more[::2], more[1::2], strict=True))
    return {key: json.loads(pairs[f"--data.{key}"]) for key in ("labels", "categories") if f"--data.{key}" in pairs}


def told(name: str, model, baseline, figure: str, patients) -> tuple[float, float]:
    """Print a figure of both and their paired difference with its interval over patients; return the interval."""

    def difference(weights: np.ndarray) -> dict[str, float]:
        return {"difference": model.figures(weights)[figure] - baseline.figures(weights)[figure]}

    found = intervals(difference, patients, draws=500)["difference"]
    values = [family.figures()[figure] for family in (model, baseline)]
    low, high = found["interval95"]
    print(f"\n{name}: {figure} {values[0]:.3f} against {values[1]:.3f}, "
          f"difference {found['value']:+.3f} [{low:+.3f}, {high:+.3f}], {found['n']} images")  # fmt: skip
    return low, high


def test_lungs_against_the_mean_mask(real_data, workdir):
    found = run_folds(
        "seg_siim.yaml", "data/table_masks.yaml", real_data, "{table: studies.csv, require_report: false}", "mask",
        "--model.frozen", "false", "--data.batch_size", "8", "--trainer.max_epochs", "6", "--trainer.precision",
        "32-true", "--model.decoder", "{name: unet, channels: [64, 32, 16, 16, 16]}",
    )  # fmt: skip
    counts, baseline, patients = [], [], []
    for data, table in found:
        store: Store = data.store
        train, val = ([store.mask(int(row)) for row in data.rows[split]] for split in ("train", "val"))
        known, object_ = (
            np.sum([test(mask) for mask in train], 0) for test in (lambda m: m != 127, lambda m: m == 255)
        )
        mean = object_ / np.maximum(known, 1)
        threshold = max(
            np.linspace(0.1, 0.9, 17),
            key=lambda t: Segmentation(*np.array([overlap(mean >= t, m) for m in val]).T).figures()["dice_positive"],
        )
        baseline += [overlap(mean >= threshold, store.mask(int(row))) for row in data.rows["test"]]
        counts.append(table[["intersection_pixels", "predicted_pixels", "truth_pixels"]].to_numpy())
        patients += table["patient_id"].tolist()
    model, plain = Segmentation(*np.concatenate(counts).T), Segmentation(*np.array(baseline).T)
    assert len(patients) == 139
    assert told("lungs", model, plain, "dice_positive", patients)[0] > 0.05


def test_lung_boxes_against_the_mean_box(real_data, workdir):
    names = ["left_lung", "right_lung"]
    found = run_folds(
        "det_object_cxr.yaml", "data/table_boxes.yaml", real_data,
        "{table: studies.csv, boxes: boxes.csv, require_report: false, where: {image_id: @}}".replace(
            "@", json.dumps(_with_lungs(real_data))
        ),
        "boxes", "--data.categories", json.dumps(names), "--model.num_classes", "2", "--model.frozen", "false",
        "--data.batch_size", "8", "--trainer.max_epochs", "14", "--trainer.precision", "32-true",
    )  # fmt: skip
    truth: list = []
    said: tuple[list, list, list] = ([], [], [])
    mean: tuple[list, list, list] = ([], [], [])
    patients: list[str] = []
    for data, table in found:
        boxes = [data.boxes[row] for row in (*data.rows["train"], *data.rows["val"])]
        plain = [np.mean([c for corners, kinds in boxes for c in corners[kinds == k]], 0) for k in range(2)]
        for row, text in zip(data.rows["test"], table["predicted_boxes"], strict=True):
            truth.append((as_xywh(data.boxes[row][0]), data.boxes[row][1]))
            listed = json.loads(text)
            said[0].append(np.array([[b[key] for key in "xywh"] for b in listed]).reshape(-1, 4))
            said[1].append(np.array([names.index(b["category"]) for b in listed], np.int64))
            said[2].append(np.array([b["score"] for b in listed]))
            mean[0].append(as_xywh(np.array(plain)))
            mean[1].append(np.arange(2))
            mean[2].append(np.ones(2))
        patients += table["patient_id"].tolist()
    true = [corners for corners, _ in truth], [kinds for _, kinds in truth]
    model, baseline = Detection(*true, *said, names), Detection(*true, *mean, names)
    low, _ = told("lung boxes", model, baseline, "map_coco", patients)
    assert low > 0


def _with_lungs(real_data: Path) -> list[str]:
    boxes = pd.read_csv(real_data / "boxes.csv")
    return sorted(set(boxes.loc[boxes["category"].str.endswith("_lung"), "image_id"]))


def as_xywh(corners: np.ndarray) -> np.ndarray:
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)


def test_pneumonia_against_ridge_regression_on_pixels(real_data, workdir):
    """The two folders differ in acquisition: the figure shows that learning works, nothing clinical."""
    from PIL import Image
    from sklearn.linear_model import RidgeClassifier

    found = run_folds(
        "cls_rsna.yaml", "data/table_labels.yaml", real_data,
        "{table: studies.csv, require_report: false, columns: {labels: [pneumonia], group: group_id}, "
        "where: {source: [nih]}}",
        "labels", "--data.labels", '["pneumonia"]', "--model.frozen", "false", "--model.lr", "0.001",
        "--data.batch_size", "32", "--trainer.max_epochs", "12", "--trainer.precision", "32-true",
    )  # fmt: skip
    truth, scores, plain, patients = [], [], [], []
    for data, table in found:
        pixels = {
            split: np.stack([
                np.asarray(Image.fromarray(data.store.image(int(row))).resize((32, 32), Image.Resampling.BOX)).ravel()
                for row in data.rows[split]
            ]) / 255.0
            for split in ("train", "val", "test")
        }  # fmt: skip
        target = {split: data.labels[data.rows[split], 0] for split in pixels}

        def auroc(model: RidgeClassifier, pixels=pixels, target=target) -> float:
            score = model.decision_function(pixels["val"])
            return Classification(target["val"][:, None], squash(score), ["pneumonia"], "binary").figures()[
                "auroc_macro"
            ]

        fitted = [RidgeClassifier(alpha).fit(pixels["train"], target["train"]) for alpha in 10.0 ** np.arange(-1, 5)]
        plain.append(squash(max(fitted, key=auroc).decision_function(pixels["test"])))
        truth.append(target["test"][:, None])
        scores.append(table[["score_pneumonia"]].to_numpy())
        patients += table["patient_id"].tolist()
    families = [
        Classification(np.concatenate(truth), np.concatenate(values), ["pneumonia"], "binary")
        for values in (scores, plain)
    ]
    assert len(patients) == 724
    told("pneumonia", *families, "auroc_macro", patients)
    assert families[0].figures()["auroc_macro"] > 0.6


def squash(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values[:, None]))
