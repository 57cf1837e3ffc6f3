"""`sista explain`: maps in the film's own pixels, against a spot whose place is known, and pixel by pixel."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from sista_pl.cli import main
from sista_pl.commands.explain import overlay
from sista_pl.data.images import image_size, read_gray
from sista_pl.data.phantom.dicom import write_dicom
from sista_pl.embed import Preparation, open_joint
from sista_pl.errors import SistaError
from sista_pl.explain import Frame, ask, look, pooled_cells, read_film, show_film
from sista_pl.models import IMAGE_ENCODERS, ImageEncoder
from sista_pl.models.attention import AllAttention, roll_out
from sista_pl.pair import Features
from sista_pl.pretrain import PretrainTask

REPORTS = ["Small left pleural effusion. No pneumothorax is seen."] * 3 + ["Right lung opacity, linear."] * 3
WHOLE = Preparation(64, 64, "unicode", "")


def checkpoint(path, losses, image_encoder="resnet10t"):
    torch.manual_seed(0)
    task = PretrainTask(
        losses, image_encoder, image_size=32, embed_dim=8, head_hidden=16,
        text_encoder={"name": "small-bert", "layers": 1, "dim": 32, "vocab_size": 120},
    )  # fmt: skip
    task.text_encoder.fit(REPORTS)
    torch.save({"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)}, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("explain")


@pytest.fixture(scope="module")
def ckpt(folder):
    return checkpoint(folder / "sta.ckpt", {"a": "clip", "token": {"name": "sta", "sigma": 0.4, "weight": 2.0}})


class Brightness(ImageEncoder):
    """An encoder whose patch has the brightness of its 8 px cell as its one feature."""

    has_tokens = False

    def forward(self, image):
        cells = F.avg_pool2d(image, 8)
        return Features(cells.mean((2, 3)), cells.flatten(2).transpose(1, 2))


def brightness(film, how):
    """The map of the fake encoder over a film."""
    local = Brightness()(read_film(film, how)).local[0]
    side = round(len(local) ** 0.5)
    return local.reshape(side, side).numpy()


def spot(path, width, height, x, y, radius, kind):
    """Write a film that is black but for one bright disc, as PNG, JPEG, rotated JPEG or DICOM."""
    down, across = np.mgrid[:height, :width]
    film = np.where((across - x) ** 2 + (down - y) ** 2 <= radius**2, 250, 0).astype(np.uint8)
    if kind == "png":
        Image.fromarray(film).save(path)
    elif kind == "exif":  # stored on its side, shown upright
        image = Image.fromarray(film).transpose(Image.Transpose.ROTATE_90)
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(path, exif=exif, quality=95)
    else:
        write_dicom(path, film, "PA", kind)
    return path


@pytest.mark.parametrize(
    ("width", "height", "x", "y", "kind"),
    [
        (300, 200, 220, 60, "png"), (200, 330, 60, 250, "png"), (333, 201, 90, 150, "MONOCHROME1"),
        (201, 333, 130, 90, "MONOCHROME2"), (200, 300, 60, 220, "exif"), (40, 40, 12, 27, "png"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", [WHOLE, Preparation(80, 64, "unicode", "")], ids=["whole", "crop"])
def test_the_spot_comes_back_where_it_is(tmp_path, width, height, x, y, kind, how):
    radius = max(width, height) // 20
    film = spot(tmp_path / ("film.dcm" if kind.startswith("MONO") else "film.png"), width, height, x, y, radius, kind)
    if kind == "exif":
        film = film.rename(film.with_suffix(".jpg"))
    assert image_size(film) == (width, height)
    frame, values = Frame(width, height, how), brightness(film, how)
    found = frame.unfit(values)
    assert found.shape == (height, width)
    down, across = np.unravel_index(np.nanargmax(found), found.shape)
    cell = max(width, height) / how.size * 8
    assert abs(across - x) < cell
    assert abs(down - y) < cell
    left, top, right, bottom = frame.boxes(values == values.max())[0]
    assert left - radius <= x <= right + radius
    assert top - radius <= y <= bottom + radius
    # what is drawn lies on what is shown
    shown = show_film(film, width, height, 150)
    assert shown.shape[1] / shown.shape[0] == pytest.approx(width / height, rel=0.02)
    bright = np.argwhere(shown > 125).mean(0) / shown.shape * [height, width]
    assert np.allclose(bright, [y, x], atol=max(width, height) / 75)


@pytest.mark.parametrize(("width", "height"), [(30, 21), (21, 34), (50, 50), (7, 90)])
@pytest.mark.parametrize(("size", "crop"), [(16, 16), (20, 16), (17, 8)])
def test_unfit_pixel_by_pixel(width, height, size, crop):
    """The reference walks the other way: a pixel's centre through resize, padding and crop, onto the grid."""
    values = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    found = Frame(width, height, Preparation(size, crop, "unicode", "")).unfit(values)
    long = max(width, height)
    scaled = [max(1, int(side * size / long + 0.5)) for side in (height, width)]
    for row in range(height):
        for column in range(width):
            place = []
            for pixel, side, wide in ((row, height, scaled[0]), (column, width, scaled[1])):
                inside = (pixel + 0.5) * wide / side + (size - wide) // 2 - (size - crop) // 2
                place.append(inside * 4 / crop - 0.5 if 0 <= inside < crop else None)
            if None in place:
                assert np.isnan(found[row, column])
                continue
            y, x = (min(max(p, 0.0), 3.0) for p in place)
            total = 0.0
            for i in range(4):
                for j in range(4):
                    total += max(0, 1 - abs(y - i)) * max(0, 1 - abs(x - j)) * values[i, j]
            assert found[row, column] == pytest.approx(total, abs=1e-5)


def test_boxes_tile_what_the_encoder_saw():
    frame = Frame(300, 200, Preparation(80, 64, "unicode", ""))
    boxes = frame.boxes(np.ones((8, 8), bool))
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    # 300 px of 80 are seen to 64; the 200 rows are 53 px of the square, less than the crop: all of them
    assert areas.sum() == pytest.approx(300 * 64 / 80 * 200)
    assert boxes.min(0).tolist()[:2] == pytest.approx([30, 0])
    assert boxes.max(0).tolist()[2:] == pytest.approx([270, 200])


def test_the_overlay_colours_what_was_seen_alone():
    film = np.full((4, 8), 100, np.uint8)
    values = np.full((4, 8), np.nan, np.float32)
    values[:, 2:6] = np.linspace(0, 1, 4)
    drawn = np.asarray(overlay(film, values, None, 8)).astype(int)
    assert (drawn[:, :2] == 50).all()
    assert (drawn[:, 5].sum(1) > drawn[:, 2].sum(1)).all()
    lined = np.asarray(overlay(film, values, np.array([[2.0, 0, 6, 4]]), 8))
    assert lined[0, 3].tolist() == [64, 214, 255]


# --- words and patches --------------------------------------------------------------


@torch.no_grad()
def test_maps_and_selection_of_a_token_loss(ckpt):
    joint, image = open_joint(ckpt), torch.rand(1, 1, 32, 32) * 2 - 1
    query = ask(joint, "Effusion is small, the left effusion. No pneumothorax.", Preparation(32, 32, "unicode", ""))
    assert query.words == ["Effusion", "small", "left", "pneumothorax"]
    assert query.negated == [False, False, False, True]
    found = look(joint, query, image)
    text = joint.encode_text([query.text])
    said = [word for word in text.ids[0].tolist() if word]
    places = {"Effusion": [0, 5], "small": [2], "left": [4], "pneumothorax": [7]}
    assert len(said) == 8
    patches = joint.encode_image(image).local[0]
    maps = []
    for place, (_, each) in enumerate(places.items()):
        word = torch.stack([text.local[0, i] for i in each]).mean(0)
        cosine = torch.stack([F.cosine_similarity(word, patch, dim=0) for patch in patches])
        maps.append(cosine.reshape(found.whole.shape).numpy())
        assert np.allclose(found.words[place], maps[-1], atol=1e-5)
        s = patches @ word
        s = (s - s.min()) / (s.max() - s.min())
        kept = torch.where(s < 0.4, 0.0, s)
        assert np.allclose(found.weights[place].ravel(), kept / kept.sum(), atol=1e-5)
    assert np.allclose(found.whole, np.mean(maps[:3], 0), atol=1e-5)
    assert found.rollout is None


def test_all_negated_is_said(ckpt):
    query = ask(open_joint(ckpt), "No effusion", WHOLE)
    assert query.used.tolist() == [True]
    assert "negated" in query.notes[0]


def test_patches_that_choose_words(folder):
    losses = {"a": {"name": "clip"}, "b": {"name": "sta", "direction": "patch_to_word"}}
    joint = open_joint(checkpoint(folder / "p2w.ckpt", losses))
    image = torch.rand(1, 1, 32, 32) * 2 - 1
    query = ask(joint, "left pleural effusion", WHOLE)
    found = look(joint, query, image)
    s = joint.encode_image(image).local[0] @ query.vectors.T  # P L
    chosen = torch.zeros_like(s)
    for patch, row in enumerate(s):
        above = (row - row.min()) / (row.max() - row.min())
        chosen[patch] = torch.where(above < 0.5, 0.0, above) / above[above >= 0.5].sum()
    expected = chosen / chosen.sum(0).clamp_min(1e-12)
    assert np.allclose(found.weights.reshape(3, -1), expected.T, atol=1e-5)


@torch.no_grad()
def test_without_a_token_loss_the_pooled_projection_is_said_and_shown(folder):
    joint = open_joint(checkpoint(folder / "clip.ckpt", {"a": "clip"}))
    query = ask(joint, "left effusion", WHOLE)
    assert "no words with patches" in query.notes[0]
    image = torch.rand(1, 1, 64, 64) * 2 - 1
    found = look(joint, query, image)
    assert found.weights is None
    assert len(found.words) == 0
    last = joint.image_encoder.pyramid(image)[-1][0].flatten(1).T  # P D
    expected = F.cosine_similarity(joint.image_head.pooled(last), joint.encode_text(["left effusion"]).pooled)
    assert np.allclose(found.whole.ravel(), expected, atol=1e-5)


def built(spec, size):
    torch.manual_seed(0)
    encoder = IMAGE_ENCODERS.build(spec, image_size=size).eval()
    for name, value in encoder.named_parameters():
        if "norm" in name:
            value.add_(0.05 * torch.randn_like(value))
    return encoder, torch.rand(1, 1, size, size) * 2 - 1


def tower(family):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
             "image_size": 32, "patch_size": 16}  # fmt: skip
    return {"name": "hf", "config": {"model": {"model_type": family, **sizes}, "mean": 0.5, "std": 0.5}}


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet10t", "resnetv2_50", "efficientnet_b0"])
def test_cells_average_to_what_is_pooled(name):
    encoder, image = built(name, 64)
    found = encoder(image)
    cells = pooled_cells(encoder, image, found.local)
    assert cells.shape == (1, 4, encoder.dim)
    assert torch.allclose(cells.mean(1), found.pooled, atol=1e-4 * float(found.pooled.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize(("name", "cell"), [("convnext_atto", 32), ("vit_tiny_patch16_224", 16)])
def test_a_film_of_one_cell_is_its_cell(name, cell):
    """Also where the mean is normalised."""
    encoder, image = built(name, cell)
    if encoder.has_tokens:  # as MAE's
        encoder.model.global_pool, encoder.model.fc_norm = "avg", torch.nn.LayerNorm(192)
        encoder.model.fc_norm.weight.normal_()
    found = encoder(image)
    assert torch.allclose(pooled_cells(encoder, image, found.local)[0], found.pooled, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("spec", ["vit_tiny_patch16_224", tower("clip_vision_model"), tower("dinov2")], ids=str)
def test_a_patch_is_normalised_as_the_class_token_is(spec):
    """CLIP leaves its patches as they are behind the last block."""
    encoder, image = built(spec, 32)
    local = encoder(image).local
    expected = encoder.model.post_layernorm(local) if "clip" in str(spec) else local
    assert torch.allclose(pooled_cells(encoder, image, local), expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("spec", ["vit_tiny_patch16_224", tower("siglip_vision_model")], ids=str)
def test_attention_pooling_has_no_map(spec):
    encoder, image = built(spec, 32)
    encoder.model.attn_pool = torch.nn.Identity()  # as timm's SigLIP has it
    with pytest.raises(SistaError, match="nothing can be shown"):
        pooled_cells(encoder, image, encoder(image).local)


@torch.no_grad()
def test_the_attention_of_a_vision_transformer(folder):
    """Against timm's own unfused attention, seen where it is dropped out."""
    joint = open_joint(checkpoint(folder / "vit.ckpt", {"a": "clip"}, "vit_tiny_patch16_224"))
    image = torch.rand(1, 1, 32, 32) * 2 - 1
    with AllAttention() as watched:
        joint.image_encoder(image)
    seen = []
    for block in joint.image_encoder.model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, given, out: seen.append(given[0][0].mean(0)))
    joint.image_encoder(image)
    assert len(seen) == 12
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(watched.seen, seen, strict=True))
    for block in joint.image_encoder.model.blocks:
        block.attn.fused_attn = True
    found = look(joint, ask(joint, "left effusion", WHOLE), image)
    assert np.allclose(found.rollout.ravel(), roll_out(seen, 4), atol=1e-5)


# --- the command --------------------------------------------------------------------


def explain(ckpt, image, out, text="left pleural effusion", *more):
    return main(["explain", "--ckpt_path", str(ckpt), "--image", str(image), "--text", text, "--out", str(out), *more])


def test_a_folder_of_films(ckpt, tmp_path, capsys):
    films = tmp_path / "films"
    (films / "more").mkdir(parents=True)
    spot(films / "a b.png", 120, 80, 60, 40, 9, "png")
    spot(films / "more" / "a b.dcm", 80, 121, 40, 60, 9, "MONOCHROME1")
    (films / "broken.jpg").write_bytes(b"no image")
    out = tmp_path / "out"
    assert explain(ckpt, films, out, "left <effusion>", "--size", "40") == 0
    assert "broken.jpg: not an image" in capsys.readouterr().out
    facts = json.loads((out / "explain.json").read_text())
    assert [(film["folder"], film["width"], film["height"]) for film in facts["films"]] == [
        ("a-b", 120, 80), ("a-b-2", 80, 121)
    ]  # fmt: skip
    assert len(facts["unreadable"]) == 1
    whole = np.load(out / "a-b-2" / "text.npy")
    assert (whole.shape, whole.dtype) == ((121, 80), np.float16)
    # of 40 px the middle 32 are seen: a tenth is lost above and below, nothing at the sides
    assert np.isnan(whole).all(1).sum() == pytest.approx(0.2 * 121, abs=1)
    assert not np.isnan(whole[60]).any()
    words = [key for key in facts["films"][0]["maps"] if key.startswith("word-")]
    assert words == ["word-left", "word-effusion"]
    assert all(box[2] <= 120 and box[3] <= 80 for box in facts["films"][0]["maps"]["word-left"]["selected"])
    x, y = facts["films"][1]["maps"]["text"]["peak"]
    assert whole[y, x] == pytest.approx(float(np.nanmax(whole)), abs=1e-3)
    page = (out / "explain.html").read_text()
    assert len(re.findall("<img", page)) == len(re.findall('<img src="data:image/[^"]+" alt="[^"]{10,}', page)) == 8
    assert "http" not in page
    assert "<effusion>" not in page
    with Image.open(out / "a-b-2" / "text.png") as drawn:
        assert drawn.size == (80, 121)


def test_what_a_checkpoint_cannot_show_is_said(folder, tmp_path, capsys):
    film = spot(tmp_path / "a.png", 40, 40, 20, 20, 5, "png")
    found = checkpoint(folder / "gloria.ckpt", {"a": {"name": "clip"}, "b": {"name": "gloria"}})
    assert explain(found, film, tmp_path / "out") == 0
    assert "no selection is outlined" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("image", "text", "out", "why"),
    [
        ("nowhere.png", "effusion", "new", "no such file"),
        ("broken.jpg", "effusion", "new", "broken.jpg: not an image"),
        ("a.png", "肺炎", "new", "its tokenizer knows none of"),
        ("a.png", "there is no", "new", "only common words"),
        ("a.png", " ", "new", "no word in it"),
        ("a.png", "effusion", "taken", "taken exists"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(ckpt, tmp_path, capsys, image, text, out, why):
    spot(tmp_path / "a.png", 40, 40, 20, 20, 5, "png")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "taken").mkdir()
    before = sorted(tmp_path.iterdir())
    assert explain(ckpt, tmp_path / image, tmp_path / out, text) == 2
    told = capsys.readouterr().err
    assert why in told
    assert told.startswith("sista: ")
    assert told.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_checkpoint_of_a_task_is_refused(tmp_path, capsys):
    torch.save({"state_dict": {}, "hyper_parameters": {"image_encoder": "resnet10t"}}, tmp_path / "cls.ckpt")
    film = spot(tmp_path / "a.png", 40, 40, 20, 20, 5, "png")
    assert explain(tmp_path / "cls.ckpt", film, tmp_path / "out") == 2
    assert "without a text encoder" in capsys.readouterr().err


def test_an_encoder_without_a_map_says_so(ckpt):
    joint = open_joint(ckpt)
    joint.tokens_trained = False
    joint.image_encoder = Brightness()
    joint.image_encoder.dim, joint.image_encoder.local_dim = 2, 1
    with pytest.raises(SistaError, match="nothing can be shown"):
        look(joint, ask(joint, "effusion", WHOLE), torch.zeros(1, 1, 32, 32))


@pytest.mark.real
def test_real_films(real_data, ckpt, tmp_path):
    """The reader, the header and the map agree on a film's shape; a bright film is bright where it is shown."""
    films = [next((real_data / "dicom").glob("*.dcm")), next((real_data / "images").glob("*.jpg"))]
    for number, film in enumerate(films):
        out = tmp_path / str(number)
        assert explain(ckpt, film, out, "left effusion", "--size", "36") == 0
        width, height = image_size(film)
        facts = json.loads((out / "explain.json").read_text())["films"][0]
        whole = np.load(out / facts["folder"] / "text.npy")
        assert whole.shape == (height, width)
        shown = np.asarray(Image.open(out / facts["folder"] / "film.png"))
        square = read_gray(film, max(shown.shape))
        off = (len(square) - shown.shape[0]) // 2, (len(square) - shown.shape[1]) // 2
        assert np.array_equal(shown, square[off[0] : off[0] + shown.shape[0], off[1] : off[1] + shown.shape[1]])
