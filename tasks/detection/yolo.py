"""YOLOv3's head (Redmon and Farhadi 2018) on the maps of the strides 8, 16 and 32: the published protocol.

B images, M boxes of the batch, N places (level, anchor, cell) of one image, K classes, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sista_tasks.detection.detectors import DETECTORS, LEAST_SCORE, MOST, Detections, Detector, Levels, broken
from torch import Tensor, nn
from torchvision.ops import batched_nms

from sista_pl.errors import SistaError
from sista_pl.models import ImageEncoder

# width and height in pixels of a 416 px input, three a level, from COCO's boxes
ANCHORS = ((10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326))
ANCHOR_SIZE = 416
LARGEST = 6.0  # of tw and th: e⁶ = 403 times the anchor, more would overflow
CANDIDATES = 1000  # of an image before the suppression of double ones


def block(channels: int, out: int, kernel: int) -> nn.Sequential:
    """Return convolution, batch normalisation and leaky ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(out),
        nn.LeakyReLU(0.1, inplace=True),
    )  # fmt: skip


def five(channels: int, width: int) -> nn.Sequential:
    """Return the five blocks before each level's output: 1, 3, 1, 3 and 1 wide."""
    return nn.Sequential(
        block(channels, width, 1), block(width, 2 * width, 3), block(2 * width, width, 1), block(width, 2 * width, 3),
        block(2 * width, width, 1),
    )  # fmt: skip


@dataclass
class Targets:
    """What the places of a batch should say.

    Args:
        positive: (B, N) whether a box belongs to it.
        ignored: (B, N) whether neither yes nor no is asked of it.
        box: (B, N) which box of the batch, 0 where none.
    """

    positive: Tensor
    ignored: Tensor
    box: Tensor


class Places(nn.Module):
    """The N places of an image: three anchors on each cell of three levels, in the order (level, anchor, y, x).

    Args:
        anchors: nine (width, height) in pixels of the input, three for each stride.
        strides: of the three levels.
        image_size: side of the input in pixels.
    """

    corner: Tensor  # (N, 2) x y of the cell
    step: Tensor  # (N,) stride
    shape: Tensor  # (N, 2) width and height of the anchor
    anchors: Tensor  # (9, 2) the same of the nine
    anchor_side: Tensor  # (9,) cells a side of the anchor's level
    anchor_step: Tensor  # (9,) its stride
    anchor_start: Tensor  # (9,) its first place

    def __init__(self, anchors: Sequence[Sequence[float]], strides: Sequence[int], image_size: int):
        super().__init__()
        self.sides = [image_size // stride for stride in strides]
        corner, step, shape = [], [], []
        for level, (side, stride) in enumerate(zip(self.sides, strides, strict=True)):
            y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
            cells = torch.stack([x, y], -1).reshape(-1, 2).float()
            corner.append(cells.repeat(3, 1))
            step.append(torch.full((3 * side * side,), float(stride)))
            three = torch.tensor(anchors[3 * level : 3 * level + 3], dtype=torch.float32)
            shape.append(three.repeat_interleave(side * side, 0))
        starts = [0, *torch.tensor([3 * side * side for side in self.sides]).cumsum(0).tolist()]
        values = {
            "corner": torch.cat(corner), "step": torch.cat(step), "shape": torch.cat(shape),
            "anchors": torch.tensor(anchors, dtype=torch.float32),
            "anchor_side": torch.tensor(self.sides).repeat_interleave(3),
            "anchor_step": torch.tensor(strides, dtype=torch.float32).repeat_interleave(3),
            "anchor_start": torch.tensor([starts[i // 3] + i % 3 * self.sides[i // 3] ** 2 for i in range(9)]),
        }  # fmt: skip
        for name, value in values.items():
            self.register_buffer(name, value, persistent=False)

    def __len__(self) -> int:
        return len(self.step)

    def decode(self, raw: Tensor) -> Tensor:
        """(B, N, 4) tx, ty, tw, th → x0 y0 x1 y1 in pixels of the input."""
        centre = (raw[..., :2].sigmoid() + self.corner) * self.step[:, None]
        half = raw[..., 2:].clamp(max=LARGEST).exp() * self.shape / 2
        return torch.cat([centre - half, centre + half], -1)

    def assign(self, boxes: Tensor, of: Tensor, batch: int, ignore: float) -> Targets:
        """Give each box the anchor of the most similar shape, in the cell of the box's centre.

        Where two boxes want one place, the first has it. A place whose anchor is similar too, but not the most, is
        ignored in the cell of the box's centre.

        Args:
            boxes: (M, 4) x0 y0 x1 y1 of all images.
            of: (M,) their image.
            batch: B.
            ignore: least IoU of the shapes.
        """
        count = len(boxes)
        shape = boxes[:, 2:] - boxes[:, :2]
        common = torch.minimum(shape[:, None], self.anchors).prod(-1)
        iou = common / (shape.prod(-1)[:, None] + self.anchors.prod(-1) - common)  # (M, 9)
        cell = ((boxes[:, None, :2] + boxes[:, None, 2:]) / 2 / self.anchor_step[:, None]).long()  # (M, 9, 2) x, y
        cell = torch.minimum(cell.clamp(min=0), (self.anchor_side - 1)[:, None])
        place = self.anchor_start + cell[..., 1] * self.anchor_side + cell[..., 0] + of[:, None] * len(self)  # (M, 9)
        mine = place.gather(1, iou.argmax(1, keepdim=True))[:, 0] if count else place.new_zeros(0)
        owner = torch.full((batch * len(self),), count, dtype=torch.long, device=boxes.device)
        owner.scatter_reduce_(0, mine, torch.arange(count, device=boxes.device), "amin")
        positive = owner < count
        ignored = torch.zeros_like(positive)
        ignored[place[iou > ignore]] = True
        ignored &= ~positive
        owner[~positive] = 0
        return Targets(*(each.reshape(batch, len(self)) for each in (positive, ignored, owner)))

    def encode(self, boxes: Tensor, places: Tensor) -> Tensor:
        """Return what these places should say of these boxes (m, 4): σ(tx), σ(ty), tw, th."""
        step, shape = self.step[places][:, None], self.shape[places]
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2 / step - self.corner[places]
        return torch.cat([centre, ((boxes[:, 2:] - boxes[:, :2]) / shape).log()], 1)


@DETECTORS.register("yolov3")
class YoloV3(Detector):
    """YOLOv3's neck and head; a detection's score is objectness times class.

    Its losses are means over the boxes of a batch: squared error of σ(tx), σ(ty), tw and th (`boxes`), binary
    cross-entropy of the class (`classification`), and of the objectness of all places that are not ignored, its sum
    divided by the number of boxes (`objectness`).

    Args:
        encoder: whose `pyramid` is given to `forward`.
        num_classes: K.
        image_size: side of the input in pixels.
        width: channels of the coarsest level's blocks; half and a quarter of it on the finer ones.
        anchors: nine (width, height) in pixels of a 416 px input, three a level from the finest.
        ignore: least IoU of shapes from which a second anchor of a box's cell is not asked to be empty.
        nms: largest IoU of two boxes of one class that are both kept.
    """

    components = ("boxes", "objectness", "classification")

    def __init__(
        self, encoder: ImageEncoder, num_classes: int, image_size: int, width: int = 512,
        anchors: Sequence[Sequence[float]] = ANCHORS, ignore: float = 0.5, nms: float = 0.5,
    ):  # fmt: skip
        super().__init__()
        if len(anchors) != 9 or not all(len(pair) == 2 and min(pair) > 0 for pair in anchors):
            raise SistaError("detector 'yolov3': anchors are nine (width, height) in pixels of a 416 px input")
        if width < 4 or width % 4:
            raise SistaError(f"detector 'yolov3': width is {width}; give a multiple of 4, as 512")
        self.num_classes, self.image_size, self.ignore, self.nms = num_classes, image_size, ignore, nms
        self.levels = Levels(encoder, image_size, width)
        scale = image_size / ANCHOR_SIZE
        self.places = Places([(w * scale, h * scale) for w, h in anchors], self.levels.strides, image_size)
        widths = (width // 4, width // 2, width)  # finest level first, as the maps
        above = (widths[1] // 2, widths[2] // 2, 0)  # channels that come down from the coarser level
        self.blocks = nn.ModuleList(
            five(channels + more, wide)
            for channels, more, wide in zip(self.levels.channels, above, widths, strict=True)
        )
        self.down = nn.ModuleList(block(widths[i + 1], above[i], 1) for i in range(2))
        self.heads = nn.ModuleList(
            nn.Sequential(block(wide, 2 * wide, 3), nn.Conv2d(2 * wide, 3 * (5 + num_classes), 1)) for wide in widths
        )
        for head in self.heads:
            # as RetinaNet: few places have an object, or the empty ones rule the first steps
            bias = head[-1].bias.detach().view(3, -1)
            bias[:, 4] = -math.log(99)

    def raw(self, maps: Sequence[Tensor]) -> Tensor:
        """Return (B, N, 5 + K): tx, ty, tw, th, objectness and classes as logits."""
        coarser: Tensor | None = None
        found: list[Tensor] = []
        for i, level in reversed(list(enumerate(self.levels(maps)))):
            if coarser is not None:
                level = torch.cat([nn.functional.interpolate(self.down[i](coarser), scale_factor=2.0), level], 1)
            coarser = self.blocks[i](level)
            out = self.heads[i](coarser)  # B 3(5+K) h w
            found.insert(0, out.unflatten(1, (3, -1)).permute(0, 1, 3, 4, 2).flatten(1, 3))
        return torch.cat(found, 1).float()

    def forward(
        self, maps: Sequence[Tensor], boxes: Sequence[Tensor] | None = None, labels: Sequence[Tensor] | None = None
    ) -> tuple[dict[str, Tensor], list[Detections]]:
        raw = self.raw(maps)
        with torch.autocast(raw.device.type, enabled=False):
            losses = self.compute_losses(raw, boxes, labels) if boxes is not None and labels is not None else {}
            return losses, [] if self.training else self.detect(raw.detach())

    def compute_losses(self, raw: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the components, scalars.

        Args:
            raw: (B, N, 5 + K).
            boxes: of each image (M, 4) x0 y0 x1 y1 in pixels of the input.
            labels: of each image (M,) class.
        """
        counts = torch.tensor([len(each) for each in boxes], device=raw.device)
        of = torch.arange(len(boxes), device=raw.device).repeat_interleave(counts)
        every, kinds = torch.cat(list(boxes)).float(), torch.cat(list(labels))
        targets = self.places.assign(every, of, len(raw), self.ignore)
        image, place = targets.positive.nonzero(as_tuple=True)
        box, said = targets.box[image, place], raw[image, place]
        count = max(1, len(place))
        wanted = self.places.encode(every[box], place)
        got = torch.cat([said[:, :2].sigmoid(), said[:, 2:4]], 1)
        bce = nn.functional.binary_cross_entropy_with_logits
        classes = nn.functional.one_hot(kinds[box], self.num_classes).float()
        asked = ~targets.ignored
        return {
            "boxes": (got - wanted).square().sum() / count,
            "objectness": bce(raw[..., 4][asked], targets.positive[asked].float(), reduction="sum") / count,
            "classification": bce(said[:, 5:], classes, reduction="sum") / count,
        }

    def detect(self, raw: Tensor) -> list[Detections]:
        """Return the detections of (B, N, 5 + K): of a class, the best score first, without double ones."""
        finite = raw.isfinite().flatten(1).all(1).tolist()
        corners = self.places.decode(raw[..., :4]).clamp(0, self.image_size)
        scores = raw[..., 4:5].sigmoid() * raw[..., 5:].sigmoid()  # B N K
        found = []
        for boxes, score, sound in zip(corners, scores, finite, strict=True):
            if not sound:
                found.append(broken(boxes))
                continue
            score, place = score.flatten().sort(descending=True, stable=True)
            place = place[:CANDIDATES][score[:CANDIDATES] >= LEAST_SCORE]
            score = score[: len(place)]
            kind = place % self.num_classes
            boxes = boxes[place // self.num_classes]
            solid = (boxes[:, 2:] > boxes[:, :2]).all(1)
            boxes, kind, score = boxes[solid], kind[solid], score[solid]
            kept = batched_nms(boxes, score, kind, self.nms)[:MOST]
            found.append(Detections(boxes[kept], kind[kept], score[kept]))
        return found
