"""Detectors: what they learn, YOLOv3 against slow loops, and batches without boxes."""

import math

import numpy as np
import pytest
import torch
from sista_tasks.detection import DetectionTask
from sista_tasks.detection.detectors import DETECTORS
from sista_tasks.detection.yolo import ANCHOR_SIZE, ANCHORS, Places
from torch.nn.functional import binary_cross_entropy
from torchvision.ops import box_iou

from sista_pl.errors import SistaError
from sista_pl.models import IMAGE_ENCODERS

SIZE = 64
SMALL = {
    "yolov3": {"width": 64},
    "retinanet": {"channels": 64},
    "fcos": {"channels": 64},
    "faster_rcnn": {"channels": 32, "hidden": 64},
}
NAMES = list(SMALL)


def encoder(name="resnet10t", size=SIZE):
    return IMAGE_ENCODERS.build(name, image_size=size)


def build(name, of=None, classes=2, size=SIZE, **more):
    torch.manual_seed(0)
    of = of or encoder(size=size)
    spec = {"name": name, **SMALL[name], **more}
    return of, DETECTORS.build(spec, encoder=of, num_classes=classes, image_size=size)


def films(size=SIZE):
    """Four films: one box, two of both classes, one of the other class, none."""
    torch.manual_seed(0)
    image = 0.1 * torch.randn(4, 1, size, size) - 0.5
    places = [[(8, 10, 30, 34)], [(34, 6, 58, 26), (6, 36, 26, 60)], [(24, 24, 52, 48)], []]
    kinds = [[0], [0, 1], [1], []]
    for i, (boxes, labels) in enumerate(zip(places, kinds, strict=True)):
        for (x0, y0, x1, y1), kind in zip(boxes, labels, strict=True):
            image[i, 0, y0:y1, x0:x1] += 1.5 if kind else 0.8
    boxes = [torch.tensor(each, dtype=torch.float32).reshape(-1, 4) for each in places]
    return image, boxes, [torch.tensor(each, dtype=torch.long) for each in kinds]


def fit(of, detector, image, boxes, labels, steps, lr=3e-3):
    parameters = [p for module in (of, detector) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    losses = []
    for _ in range(steps):
        found, none = detector(of.pyramid(image), boxes, labels)
        assert none == []
        total = sum(found.values())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        schedule.step()
        losses.append(float(total.detach()))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backbone"), [*((name, "resnet10t") for name in NAMES), ("yolov3", "vit")])
def test_four_films_are_learnt_by_heart(name, backbone):
    of = encoder() if backbone == "resnet10t" else small_vit()
    _, detector = build(name, of)
    image, boxes, labels = films()
    of.train()
    losses = fit(of, detector.train(), image, boxes, labels, 120)
    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[:5])
    of.eval()
    with torch.no_grad():
        _, found = detector.eval()(of.pyramid(image))
    for each, truth, kinds in zip(found, boxes, labels, strict=True):
        assert (each.scores.diff() <= 0).all()
        assert not (each.scores[len(truth) :] > 0.5).any()
        assert sorted(each.labels[: len(truth)].tolist()) == sorted(kinds.tolist())
        for box, kind in zip(truth, kinds, strict=True):
            mine = each.boxes[: len(truth)][each.labels[: len(truth)] == kind]
            assert box_iou(mine, box[None]).max() > 0.5


def small_vit(patch=16, size=SIZE):
    name = {16: "vit_tiny_patch16_224", 14: "vit_small_patch14_dinov2"}[patch]
    of = encoder(name, size=size)
    of.model.blocks = of.model.blocks[:2]
    return of


# --- all detectors -------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["resnet10t", "vit"])
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_a_detector_gets_a_gradient(name, backbone):
    """Also in a batch without any box: under DDP a parameter without one stops the training."""
    of, detector = build(name, encoder() if backbone == "resnet10t" else small_vit())
    image, boxes, labels = films()
    for part in (slice(0, 4), slice(3, 4)):
        detector.zero_grad()
        losses, _ = detector.train()(of.pyramid(image[part]), boxes[part], labels[part])
        assert set(losses) == set(detector.components)
        assert all(torch.isfinite(loss) and loss.ndim == 0 for loss in losses.values())
        sum(losses.values()).backward()
        without = [key for key, p in detector.named_parameters() if p.requires_grad and p.grad is None]
        assert without == []
        assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.grad is not None)
    assert all(p.requires_grad for p in detector.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_film_does_not_know_its_neighbours(name):
    """Detections of a film alone, beside others, and with its truth given: the same."""
    of, detector = build(name)
    of.eval(), detector.eval()
    image, boxes, labels = films()
    with torch.no_grad():
        state = torch.get_rng_state()
        losses, told = detector(of.pyramid(image), boxes, labels)
        assert torch.equal(torch.get_rng_state(), state), "an evaluation draws nothing"
        none, together = detector(of.pyramid(image))
        _, alone = detector(of.pyramid(image[1:2]))
    assert none == {}
    assert set(losses) == set(detector.components)
    assert not any(module.training for module in detector.modules())
    for one, other in ((told[1], together[1]), (together[1], alone[0])):
        assert len(one.scores) == len(other.scores)
        assert torch.allclose(one.scores, other.scores, atol=1e-5)
    for each in together:
        assert len(each.boxes) == len(each.labels) == len(each.scores) <= 100
        assert each.boxes.min() >= 0 if len(each.boxes) else True
        assert each.boxes.max() <= SIZE if len(each.boxes) else True
        assert set(each.labels.tolist()) <= {0, 1}


@pytest.mark.parametrize("name", NAMES)
def test_bf16_autocast_keeps_losses_and_boxes_in_fp32(name):
    of, detector = build(name)
    image, boxes, labels = films()
    of.eval()
    for cast in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            losses, _ = detector.train()(of.pyramid(image), boxes, labels)
        assert all(loss.dtype == torch.float32 for loss in losses.values())
        if not cast:
            exact = {key: loss.detach() for key, loss in losses.items()}
    sum(losses.values()).backward()
    for key, loss in losses.items():
        assert float(loss.detach()) == pytest.approx(float(exact[key]), rel=0.1, abs=0.02), key
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        _, found = detector.eval()(of.pyramid(image))
    assert all(each.boxes.dtype == each.scores.dtype == torch.float32 for each in found)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", ["image_encoder", "detector"])
def test_weights_of_nan_are_no_film_without_a_box(name, part):
    """A threshold of scores drops NaN: a test and a prediction have to see it all the same."""
    spec = {"name": name, **SMALL[name]}
    task = DetectionTask(2, spec, image_encoder="resnet10t", image_size=SIZE).eval()
    image, boxes, labels = films()
    batch = {"image": image, "boxes": boxes, "box_labels": labels, "index": torch.arange(4)}
    assert not task.step(batch).outputs["values"].isnan().any()
    found = task.predict_step(batch, 0)
    assert len(found["items"]) == 4
    task.on_predict_batch_end(found, batch, 0)
    list(getattr(task, part).parameters())[-1].data.view(-1)[0] = math.nan
    assert task.step(batch).outputs["values"].isnan().all()
    with pytest.raises(SistaError, match=r"predict: the model predicts NaN; set trainer\.precision to 32-true"):
        task.on_predict_batch_end(task.predict_step(batch, 0), batch, 0)


@pytest.mark.parametrize("name", ["retinanet", "fcos", "faster_rcnn"])
@pytest.mark.parametrize(("backbone", "size"), [("resnet10t", 96), ("vit", 56)])
def test_torchvision_leaves_size_and_range_alone(name, backbone, size):
    if backbone == "vit":
        of = small_vit(14, size)
        if name == "faster_rcnn":  # its pooling guesses powers of two
            with pytest.raises(SistaError, match="a stride of 7 is no power of two; use `detector: retinanet`"):
                build(name, of, size=size)
            return
    else:
        of = encoder(size=size)
    _, detector = build(name, of, size=size)
    image = torch.rand(3, 1, size, size) * 2 - 1
    boxes = [torch.tensor([[3.0, 5.0, 20.5, 31.0]])] * 3
    targets = [{"boxes": box, "labels": torch.zeros(1, dtype=torch.long)} for box in boxes]
    for training in (True, False):
        given, moved = detector.model.transform.train(training)(list(image), targets)
        assert torch.equal(given.tensors, image)
        assert given.image_sizes == [(size, size)] * 3
        assert all(torch.equal(target["boxes"], box) for target, box in zip(moved, boxes, strict=True))
    seen = []
    detector.model.transform.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[0].tensors))
    with torch.no_grad():
        detector.eval()(of.pyramid(image))
    assert torch.equal(seen[0], image)


@pytest.mark.parametrize(("name", "first"), [("retinanet", 0), ("fcos", 0), ("faster_rcnn", 1)])
def test_labels_start_where_torchvision_starts_them(name, first, monkeypatch):
    of, detector = build(name)
    image, boxes, labels = films()
    given = []
    real = type(detector.model).forward

    def spy(self, images, targets=None):
        if targets is not None:
            given.extend(target["labels"].tolist() for target in targets)
        return real(self, images, targets)

    monkeypatch.setattr(type(detector.model), "forward", spy)
    detector.train()(of.pyramid(image), boxes, labels)
    assert given == [[kind + first for kind in each.tolist()] for each in labels]
    if name == "faster_rcnn":
        assert detector.model.roi_heads.box_predictor.cls_score.out_features == 3


@pytest.mark.parametrize(
    ("spec", "size", "line"),
    [
        ("yolov3", 72, "image_size is 72; detection on this encoder needs a multiple of 32"),
        ("retinet", 64, "unknown detector 'retinet'; did you mean retinanet"),
        ({"name": "retinanet", "channels": 48}, 64, "channels is 48; give a multiple of 32"),
        ({"name": "fcos", "channels": 32}, 64, "channels is 32; give a multiple of 32"),
        ({"name": "retinanet", "anchors": [0.1]}, 64, "give four shares of the side"),
        ({"name": "faster_rcnn", "anchors": [0.1, 0.2, 0.3, 4]}, 64, "give four shares of the side"),
        ({"name": "yolov3", "width": 30}, 64, "width is 30; give a multiple of 4"),
        ({"name": "yolov3", "anchors": [[1, 2]]}, 64, "anchors are nine"),
        ({"name": "yolov3", "wide": 3}, 64, "has no argument 'wide'"),
    ],
)
def test_mistakes_name_the_next_step(spec, size, line):
    with pytest.raises(SistaError, match=line):
        DETECTORS.build(spec, encoder=encoder(size=size), num_classes=1, image_size=size)


# --- YOLOv3 against loops ------------------------------------------------------

SIDE = 96
STRIDES = (8, 16, 32)
SCALED = [(w * SIDE / ANCHOR_SIZE, h * SIDE / ANCHOR_SIZE) for w, h in ANCHORS]


def every_place():
    """(level, anchor of the nine, row, column) of each place, in order."""
    return [
        (level, 3 * level + anchor, y, x)
        for level, stride in enumerate(STRIDES)
        for anchor in range(3)
        for y in range(SIDE // stride)
        for x in range(SIDE // stride)
    ]


def slow_targets(boxes, ignore=0.5):
    """{place: box} and the ignored places of one film, box by box."""
    number = {place: n for n, place in enumerate(every_place())}
    owner, ignored = {}, set()
    for n, (x0, y0, x1, y1) in enumerate(boxes):
        overlap = []
        for w, h in SCALED:
            both = min(w, x1 - x0) * min(h, y1 - y0)
            overlap.append(both / (w * h + (x1 - x0) * (y1 - y0) - both))
        best = max(range(9), key=lambda a: overlap[a])
        for anchor in range(9):
            stride, level = STRIDES[anchor // 3], anchor // 3
            last = SIDE // stride - 1
            x, y = (min(last, int((low + high) / 2 / stride)) for low, high in ((x0, x1), (y0, y1)))
            place = number[level, anchor, y, x]
            if anchor == best:
                owner.setdefault(place, n)
            if overlap[anchor] > ignore:
                ignored.add(place)
    return owner, ignored - set(owner)


def some_boxes(seed, count):
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, SIDE - 4, (count, 2))
    high = np.minimum(low + rng.uniform(2, 70, (count, 2)), SIDE)
    return np.concatenate([low, high], 1).astype(np.float32)


@pytest.mark.parametrize("seed", range(6))
def test_targets_equal_those_of_a_loop(seed):
    films = [some_boxes(seed, 12), some_boxes(seed + 90, 0), some_boxes(seed + 50, 40)]
    if seed == 0:
        films[0][1] = films[0][0]  # two boxes want one place
        films[0][2] = (SIDE - 2, SIDE - 2, SIDE, SIDE)
    of = torch.arange(3).repeat_interleave(torch.tensor([len(each) for each in films]))
    places = Places(SCALED, STRIDES, SIDE)
    targets = places.assign(torch.from_numpy(np.concatenate(films)), of, 3, 0.5)
    start = 0
    for i, boxes in enumerate(films):
        owner, ignored = slow_targets(boxes.astype(float))
        assert set(targets.positive[i].nonzero()[:, 0].tolist()) == set(owner)
        assert set(targets.ignored[i].nonzero()[:, 0].tolist()) == ignored
        assert {place: int(targets.box[i, place]) - start for place in owner} == owner
        start += len(boxes)


def test_decoding_equals_a_loop_and_undoes_encoding():
    torch.manual_seed(0)
    places = Places(SCALED, STRIDES, SIDE)
    raw = torch.randn(2, len(places), 4)
    decoded = places.decode(raw)
    for n, (level, anchor, y, x) in enumerate(every_place()):
        tx, ty, tw, th = raw[1, n].tolist()
        cx, cy = ((1 / (1 + math.exp(-t)) + c) * STRIDES[level] for t, c in ((tx, x), (ty, y)))
        w, h = SCALED[anchor][0] * math.exp(tw), SCALED[anchor][1] * math.exp(th)
        expected = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
        assert decoded[1, n].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-3)
    encoded = places.encode(decoded[0], torch.arange(len(places)))
    assert torch.allclose(encoded, torch.cat([raw[0, :, :2].sigmoid(), raw[0, :, 2:]], 1), atol=1e-4)


@pytest.mark.parametrize("empty", [False, True])
def test_losses_equal_those_of_a_loop(empty):
    _, detector = build("yolov3", classes=3, size=SIDE)
    films = [some_boxes(1, 0 if empty else 9), some_boxes(2, 0), some_boxes(3, 0 if empty else 5)]
    kinds = [np.random.default_rng(7).integers(0, 3, len(each)) for each in films]
    torch.manual_seed(3)
    raw = torch.randn(3, len(detector.places), 8)
    found = detector.compute_losses(raw, [torch.from_numpy(b) for b in films], [torch.from_numpy(k) for k in kinds])
    place_loss = class_loss = object_loss = 0.0
    count = 0
    for said, boxes, labels in zip(raw.double(), films, kinds, strict=True):
        owner, ignored = slow_targets(boxes.astype(float))
        for n, (level, anchor, y, x) in enumerate(every_place()):
            if n in ignored:
                continue
            sure = said[n, 4].sigmoid()
            object_loss += -math.log(sure if n in owner else 1 - sure)
            if n not in owner:
                continue
            count += 1
            x0, y0, x1, y1 = boxes[owner[n]].astype(float)
            stride, (w, h) = STRIDES[level], SCALED[anchor]
            wanted = [(x0 + x1) / 2 / stride - x, (y0 + y1) / 2 / stride - y,
                      math.log((x1 - x0) / w), math.log((y1 - y0) / h)]  # fmt: skip
            got = [*said[n, :2].sigmoid().tolist(), *said[n, 2:4].tolist()]
            place_loss += sum((a - b) ** 2 for a, b in zip(got, wanted, strict=True))
            one_hot = torch.eye(3, dtype=torch.float64)[labels[owner[n]]]
            class_loss += float(binary_cross_entropy(said[n, 5:].sigmoid(), one_hot, reduction="sum"))
    assert (count == 0) == empty
    assert float(found["boxes"]) == pytest.approx(place_loss / max(1, count), rel=1e-4)
    assert float(found["objectness"]) == pytest.approx(object_loss / max(1, count), rel=1e-4)
    assert float(found["classification"]) == pytest.approx(class_loss / max(1, count), rel=1e-4)


def test_what_the_network_gives_stands_at_its_place():
    """A spot on the finest map moves the outputs of the places around it, not those of another corner."""
    of, detector = build("yolov3", size=SIDE)
    of.eval(), detector.eval()
    maps = [m.clone() for m in of.pyramid(torch.zeros(1, 1, SIDE, SIDE))]
    with torch.no_grad():
        before = detector.raw(maps)
        at = detector.levels.places[0]
        maps[at][0, :, 2, 9] += 5
        moved = (detector.raw(maps) - before).abs().sum(-1)[0] > 1e-6
    touched = [place for place, hit in zip(every_place(), moved, strict=True) if hit]
    assert {level for level, *_ in touched} == {0}
    assert {anchor for _, anchor, *_ in touched} == {0, 1, 2}
    rows, columns = {y for *_, y, _ in touched}, {x for *_, x in touched}
    assert min(rows) == 0  # three convolutions of 3 × 3 reach three cells
    assert max(rows) == 5
    assert (min(columns), max(columns)) == (6, 11)


def test_detections_equal_those_of_a_loop():
    _, detector = build("yolov3", classes=2, size=SIDE)
    torch.manual_seed(5)
    raw = torch.randn(2, len(detector.places), 7) * 2 - 1
    corners = detector.places.decode(raw[..., :4]).clamp(0, SIDE)
    for said, boxes, found in zip(raw, corners, detector.detect(raw), strict=True):
        left = [
            (float(said[n, 4].sigmoid() * said[n, 5 + k].sigmoid()), n, k) for n in range(len(boxes)) for k in range(2)
        ]
        left = sorted((one for one in left if one[0] >= 0.01), key=lambda one: -one[0])[:1000]
        kept = []
        for score, n, k in left:
            others = [boxes[m] for _, m, j in kept if j == k]
            if not others or box_iou(boxes[n][None], torch.stack(others)).max() <= 0.5:
                kept.append((score, n, k))
        kept = kept[:100]
        assert found.scores.tolist() == pytest.approx([score for score, *_ in kept])
        assert found.labels.tolist() == [k for *_, k in kept]
        assert torch.equal(found.boxes, torch.stack([boxes[n] for _, n, _ in kept]))
