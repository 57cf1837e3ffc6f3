"""Detection: a detector's head on the encoder's maps, K classes of boxes.

B images, M boxes and D detections of one image, H W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sista_tasks.detection import torchvision_heads, yolo  # noqa: F401  registration
from sista_tasks.detection.detectors import DETECTORS, Detections
from torch import Tensor

from sista_pl.data.images import unfit_boxes
from sista_pl.errors import SistaError
from sista_pl.metrics.detection import Detection
from sista_pl.models.image import freeze_unreached
from sista_pl.predictions import Predicted
from sista_pl.task import Step
from sista_pl.transfer import TransferTask


class DetectionTask(TransferTask):
    """Where findings are, as boxes with a class and a score.

    Args:
        num_classes: K; has to be the number of the data group's categories.
        detector: `retinanet` (the default), `fcos`, `faster_rcnn` or `yolov3`; or with arguments,
            `{name: retinanet, channels: 128}`. Under `protocol: mgca` it is `yolov3`.
        losses: `{COMPONENT: {name: detector, component: COMPONENT, weight: 1.0}}` of each of the detector's components
            where not given.
        kwargs: see `TransferTask`.
    """

    target = "boxes"
    monitor = "val/map_40_75"
    width = 6  # items: class, score, x y w h in pixels of the input

    def __init__(
        self,
        num_classes: int,
        detector: str | dict[str, Any] | None = None,
        losses: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        if num_classes < 1:
            raise SistaError(f"model: num_classes is {num_classes}; give the number of the data group's categories")
        published = kwargs.get("protocol") == "mgca"
        self.detector_spec = detector or ("yolov3" if published else "retinanet")
        name = DETECTORS.split(self.detector_spec)[0]
        if published and name != "yolov3":
            raise SistaError(f"model: protocol mgca has the detector yolov3, not {name!r}; choose one of the two")
        components = DETECTORS[name].components
        usual = {component: {"name": "detector", "component": component} for component in components}
        super().__init__(losses or usual, **kwargs)
        used = {spec.get("component") for spec in self.loss_specs.values() if spec["name"] == "detector"}
        if left := [component for component in components if component not in used]:
            raise SistaError(
                f"model: losses leave out {left[0]!r} of {name}; add `{left[0]}: {{name: detector, component: "
                f"{left[0]}}}`, with weight: 0 to switch it off"
            )
        self.num_classes = num_classes
        self.save_hyperparameters()
        self.build()

    def configure_head(self) -> None:
        self.detector = DETECTORS.build(
            self.detector_spec, encoder=self.image_encoder, num_classes=self.num_classes, image_size=self.image_size
        )
        freeze_unreached(self.image_encoder, self.image_size)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.check_classes(self.num_classes, "categories of boxes")

    def forward(
        self, batch: dict[str, Any], boxes: list[Tensor] | None = None, labels: list[Tensor] | None = None
    ) -> tuple[dict[str, Tensor], list[Detections]]:
        """Return the losses by component and the detections, see `Detector`."""
        return self.detector(self.pyramid(batch["image"]), boxes, labels)

    def step(self, batch: dict[str, Any]) -> Step:
        components, found = self(batch, batch["boxes"], batch["box_labels"])
        losses = {name: loss(components)[0] for name, loss in self.losses.items()}
        outputs: dict[str, Any] = {}
        if not self.training:
            scores = torch.stack([torch.nn.functional.pad(each.scores, (0, 1)).max() for each in found])
            # a NaN says that the model broke; without boxes nothing else would
            scores = scores + 0 * sum(loss.detach() for loss in components.values())
            items = torch.cat([items_of(each) for each in found])
            counts = torch.tensor([len(each.scores) for each in found], device=items.device)
            of = torch.arange(len(found), device=items.device).repeat_interleave(counts)
            outputs = {"rows": batch["index"], "values": scores[:, None], "items": items, "of": of}
        return Step(losses, {}, outputs, len(batch["index"]))

    # --- truth and predictions ---------------------------------------------------

    def truth(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return of each row of the store (M, 6) items as those of predictions, in pixels of the centre crop."""
        data, found = self.trainer.datamodule, []
        off = (data.size - data.crop) // 2
        for row in rows:
            corners, kinds = data.boxes[row]
            moved = np.clip(corners - off, 0, data.crop)
            sides = moved[:, 2:] - moved[:, :2]
            items = np.column_stack([kinds, np.ones(len(kinds)), moved[:, :2], sides])
            found.append(items[(sides >= 1).all(1)])  # what the batches keep, too
        return found

    def family(self, found: Predicted, stage: str) -> Detection:
        truth, items = self.truth(found.rows), found.per_image()
        return Detection(
            [each[:, 2:] for each in truth], [each[:, 0].astype(np.int64) for each in truth],
            [each[:, 2:] for each in items], [each[:, 0].astype(np.int64) for each in items],
            [each[:, 1] for each in items], self.trainer.datamodule.classes,
        )  # fmt: skip

    # --- what a test and a prediction leave -------------------------------------

    def table(self, found: Predicted) -> dict[str, list[Any]]:
        truth = [self.as_json(items, scored=False) for items in self.truth(found.rows)]
        predicted = [self.as_json(items) for items in found.per_image()]
        return {
            "truth_boxes": truth, "predicted_boxes": predicted, "score": found.values[:, 0].tolist(),
            "image_size": [self.image_size] * len(truth),
        }  # fmt: skip

    def as_json(self, items: np.ndarray, scored: bool = True) -> str:
        """(D, 6) class, score, x, y, w, h → JSON, a list of `{"category", "x", "y", "w", "h", "score"}`."""
        boxes = []
        for kind, score, *place in items.tolist():
            name = self.classes[int(kind)] if self.classes else str(int(kind))
            box = {"category": name, **{key: round(value, 2) for key, value in zip("xywh", place, strict=True)}}
            boxes.append(box | ({"score": round(score, 5)} if scored else {}))
        return json.dumps(boxes)

    def draw(self, found: Predicted, family: Any, folder: Path, notice: str) -> None:
        from sista_tasks.detection.pictures import draw_cases, draw_curves

        draw_curves(family, folder / "curves.png", notice)
        draw_cases(self, found, family, folder / "cases.png", notice)

    def predict_step(self, batch: dict[str, Any], index: int) -> dict[str, Any]:
        found = self(batch)[1] if len(batch["index"]) else []
        told = {"index": batch["index"].cpu(), "items": [items_of(each).cpu() for each in found],
                "bad": batch.get("bad", [])}  # fmt: skip
        return told | ({"original_size": batch["original_size"].cpu()} if "original_size" in batch else {})

    def prediction_table(self, batch: dict[str, Any]) -> pd.DataFrame:
        data, rows = self.trainer.datamodule, []
        sizes, names = self.original_sizes(batch), self.image_names(batch["index"].tolist())
        for name, (width, height), each in zip(names, sizes, batch["items"], strict=True):
            items = each.double().numpy()
            corners = unfit_boxes(corners_of(items), width, height, data.size, data.crop)
            items = np.column_stack([items[:, :2], corners[:, :2], corners[:, 2:] - corners[:, :2]])
            items = items[(items[:, 4:] > 0).all(1)]  # none that lies on the padding alone
            rows.append((name, width, height, float(items[:, 1].max(initial=0)), len(items), self.as_json(items)))
        return pd.DataFrame(rows, columns=["image", "width", "height", "score", "count", "boxes"])


def items_of(found: Detections) -> Tensor:
    """Return (D, 6) class, score, x, y, w, h of detections."""
    first, last = found.boxes[:, :2], found.boxes[:, 2:]
    return torch.cat([found.labels[:, None].to(first), found.scores[:, None].to(first), first, last - first], 1)


def corners_of(items: np.ndarray) -> np.ndarray:
    """(D, 6) class, score, x, y, w, h → (D, 4) x0 y0 x1 y1."""
    return np.concatenate([items[:, 2:4], items[:, 2:4] + items[:, 4:]], 1)
