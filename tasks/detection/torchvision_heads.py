"""torchvision's detectors on an encoder's maps.

Their own transform neither rescales nor normalises nor pads here: the input has its size and its range already.

B images, M boxes of one image, K classes, H W pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from sista_tasks.detection.detectors import DETECTORS, LEAST_SCORE, MOST, Detections, Detector, Levels, broken
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork

from sista_pl.errors import SistaError
from sista_pl.models import ImageEncoder

ANCHORS = (0.05, 0.1, 0.2, 0.4)  # of the input's side, one a level: from a coil's to a lobe's size
RATIOS = (0.5, 1.0, 2.0)


class Given(nn.Module):
    """Stands where torchvision wants a backbone: gives the maps that were made before.

    Args:
        channels: of each of them.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.out_channels = channels
        self.maps: OrderedDict[str, Tensor] = OrderedDict()

    def forward(self, image: Tensor) -> OrderedDict[str, Tensor]:
        return self.maps


class TorchvisionDetector(Detector):
    """What torchvision's detectors have in common: a feature pyramid of four levels, losses, and detections.

    Args:
        encoder: whose `pyramid` is given to `forward`.
        image_size: side of the input in pixels.
        channels: of the feature pyramid.
    """

    prefix = ""  # of the names of torchvision's losses, cut off in `components`
    first_label = 0

    def __init__(self, encoder: ImageEncoder, image_size: int, channels: int):
        super().__init__()
        self.levels = Levels(encoder, image_size, channels)
        made = self.levels.make is not None
        # what is made of a vision transformer is a feature pyramid already (ViTDet)
        self.pyramid = None if made else FeaturePyramidNetwork(self.levels.channels, channels)
        self.given = Given(channels)
        self.strides = [*self.levels.strides, 2 * self.levels.strides[-1]]
        self.same: dict[str, Any] = {"min_size": image_size, "max_size": image_size, "image_mean": [0.0],
                                     "image_std": [1.0], "size_divisible": 1}  # fmt: skip
        self.model: Any = None
        self.finite: list[Tensor] = []  # of each output of the heads in eval mode, whether all of it is

    def watch(self, *heads: nn.Module) -> None:
        """Let what these modules give go on in fp32, so that losses and boxes are computed in it."""
        for head in heads:
            head.register_forward_hook(self._in_fp32)

    def _in_fp32(self, module: nn.Module, inputs: Any, outputs: Any) -> Any:
        if isinstance(outputs, Tensor):
            if not module.training:
                self.finite.append(outputs.isfinite().all())
            return outputs.float()
        if isinstance(outputs, dict):
            return {name: self._in_fp32(module, inputs, value) for name, value in outputs.items()}
        return type(outputs)(self._in_fp32(module, inputs, value) for value in outputs)

    def features(self, maps: Sequence[Tensor]) -> OrderedDict[str, Tensor]:
        """Return the four levels, finest first."""
        found = self.levels(maps)
        if self.pyramid is not None:
            found = list(self.pyramid(OrderedDict((str(i), level) for i, level in enumerate(found))).values())
        found.append(nn.functional.max_pool2d(found[-1], 1, 2))
        return OrderedDict((str(i), level) for i, level in enumerate(found))

    def forward(
        self, maps: Sequence[Tensor], boxes: Sequence[Tensor] | None = None, labels: Sequence[Tensor] | None = None
    ) -> tuple[dict[str, Tensor], list[Detections]]:
        images = list(maps[0].float())
        self.given.maps = self.features(maps)
        losses: dict[str, Tensor] = {}
        try:
            if boxes is not None and labels is not None:
                targets = [
                    {"boxes": box.float(), "labels": kind + self.first_label}
                    for box, kind in zip(boxes, labels, strict=True)
                ]
                losses = self._losses(images, targets)
            if self.training:
                return losses, []
            found = self.model.eval()(images)
            if not torch.stack(self.finite).all():
                return losses, [broken(images[0])] * len(images)
            return losses, [Detections(f["boxes"], f["labels"] - self.first_label, f["scores"]) for f in found]
        finally:
            self.given.maps, self.finite = OrderedDict(), []
            self.model.train(self.training)

    def _losses(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        # torchvision computes losses in training mode alone; its heads have nothing that behaves otherwise in it, but
        # Faster R-CNN draws which anchors count: an evaluation must leave the generator as it was
        devices = [images[0].device] if images[0].is_cuda else []
        with torch.random.fork_rng(devices, enabled=not self.training):
            found = self.model.train()(images, targets)
        return {name.removeprefix(self.prefix): loss for name, loss in found.items()}


def check_anchors(kind: str, anchors: Sequence[float]) -> None:
    """Raise SistaError where they are not four shares of the input's side."""
    if len(anchors) != 4 or not all(0 < anchor <= 1 for anchor in anchors):
        raise SistaError(f"detector {kind!r}: anchors are {list(anchors)}; give four shares of the side, as {ANCHORS}")


def check_channels(kind: str, channels: int) -> None:
    """Raise SistaError where the 32 groups of the head's normalisation have less than two channels."""
    if channels < 64 or channels % 32:
        raise SistaError(f"detector {kind!r}: channels is {channels}; give a multiple of 32 from 64 on, as 128")


@DETECTORS.register("retinanet")
class Retina(TorchvisionDetector):
    """RetinaNet (Lin et al. 2017), with group normalisation in its head.

    Args:
        encoder: whose `pyramid` is given to `forward`.
        num_classes: K.
        image_size: side of the input in pixels.
        channels: of the feature pyramid and the head, a multiple of 32, from 64 on.
        anchors: sides of the smallest of three anchors a level, as shares of the input's side.
        nms: largest IoU of two boxes of one class that are both kept.
    """

    components = ("classification", "bbox_regression")

    def __init__(
        self, encoder: ImageEncoder, num_classes: int, image_size: int, channels: int = 256,
        anchors: Sequence[float] = ANCHORS, nms: float = 0.5,
    ):  # fmt: skip
        check_channels("retinanet", channels)
        check_anchors("retinanet", anchors)
        super().__init__(encoder, image_size, channels)
        sizes = tuple(tuple(side * image_size * 2 ** (i / 3) for i in range(3)) for side in anchors)
        generator = AnchorGenerator(sizes, (RATIOS,) * 4)
        head = RetinaNetHead(channels, generator.num_anchors_per_location()[0], num_classes, partial(nn.GroupNorm, 32))
        self.watch(head)
        self.model = RetinaNet(
            self.given, num_classes, anchor_generator=generator, head=head, score_thresh=LEAST_SCORE, nms_thresh=nms,
            detections_per_img=MOST, **self.same,
        )  # fmt: skip


@DETECTORS.register("fcos")
class Fcos(TorchvisionDetector):
    """FCOS (Tian et al. 2019), without anchors.

    Args:
        encoder: whose `pyramid` is given to `forward`.
        num_classes: K.
        image_size: side of the input in pixels.
        channels: of the feature pyramid and the head, a multiple of 32, from 64 on.
        nms: largest IoU of two boxes of one class that are both kept.
    """

    components = ("classification", "bbox_regression", "bbox_ctrness")

    def __init__(self, encoder: ImageEncoder, num_classes: int, image_size: int, channels: int = 256, nms: float = 0.6):
        check_channels("fcos", channels)
        super().__init__(encoder, image_size, channels)
        # its points, of the side of a cell
        generator = AnchorGenerator(tuple((side,) for side in self.strides), ((1.0,),) * 4)
        self.model = FCOS(
            self.given, num_classes, anchor_generator=generator, score_thresh=LEAST_SCORE, nms_thresh=nms,
            detections_per_img=MOST, **self.same,
        )  # fmt: skip
        self.watch(self.model.head)


@DETECTORS.register("faster_rcnn")
class FasterRcnn(TorchvisionDetector):
    """Faster R-CNN (Ren et al. 2015) on a feature pyramid.

    Args:
        encoder: whose `pyramid` is given to `forward`; convolutional, or with a patch of a power of two.
        num_classes: K.
        image_size: side of the input in pixels.
        channels: of the feature pyramid.
        hidden: of the box head's two layers.
        anchors: side of the anchors of a level, as shares of the input's side.
        nms: largest IoU of two boxes of one class that are both kept.
    """

    components = ("classifier", "box_reg", "objectness", "rpn_box_reg")
    prefix = "loss_"
    first_label = 1  # 0 is the background

    def __init__(
        self, encoder: ImageEncoder, num_classes: int, image_size: int, channels: int = 256, hidden: int = 1024,
        anchors: Sequence[float] = ANCHORS, nms: float = 0.5,
    ):  # fmt: skip
        check_anchors("faster_rcnn", anchors)
        super().__init__(encoder, image_size, channels)
        if odd := [stride for stride in self.strides if stride & (stride - 1)]:
            raise SistaError(
                f"detector 'faster_rcnn': a stride of {odd[0]} is no power of two; use `detector: retinanet`"
            )
        generator = AnchorGenerator(tuple((side * image_size,) for side in anchors), (RATIOS,) * 4)
        self.model = FasterRCNN(
            self.given, None, rpn_anchor_generator=generator, box_head=TwoMLPHead(channels * 49, hidden),
            box_predictor=FastRCNNPredictor(hidden, num_classes + 1), box_score_thresh=LEAST_SCORE,
            box_nms_thresh=nms, box_detections_per_img=MOST, **self.same,
        )  # fmt: skip
        self.watch(self.model.rpn.head, self.model.roi_heads.box_predictor)
