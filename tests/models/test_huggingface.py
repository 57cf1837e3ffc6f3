"""Vision transformers of Hugging Face: what transformers' own forward gives, and a checkpoint that needs no folder."""

import json
import shutil

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

from sista_pl.checkpoint import load_encoder
from sista_pl.cli import main
from sista_pl.errors import SistaError
from sista_pl.features import encoder_hash
from sista_pl.models import IMAGE_ENCODERS
from sista_pl.models.image import freeze_unreached
from sista_pl.weights import encoder_spec, load_weights

SMALL = dict(hidden_size=32, num_hidden_layers=5, num_attention_heads=2, intermediate_size=64, image_size=32)
MEAN, STD = [0.5307, 0.5, 0.45], [0.2583, 0.25, 0.3]
# name: configuration, model, prefix tokens
FAMILIES = {
    "vit": (transformers.ViTConfig, transformers.ViTModel, 1),
    "deit": (transformers.DeiTConfig, transformers.DeiTModel, 2),
    "dinov2": (transformers.Dinov2Config, transformers.Dinov2Model, 1),
    "dinov2_reg": (transformers.Dinov2WithRegistersConfig, transformers.Dinov2WithRegistersModel, 5),
    "clip": (transformers.CLIPVisionConfig, transformers.CLIPVisionModel, 1),
    "siglip": (transformers.SiglipVisionConfig, transformers.SiglipVisionModel, 0),
}
TOWERS = {"clip": (transformers.CLIPConfig, transformers.CLIPModel),
          "siglip": (transformers.SiglipConfig, transformers.SiglipModel)}  # fmt: skip


def stirred(model):
    """Random values everywhere: a fresh class token of zeros would hide a mistake."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return model.eval()


def save(folder, family, patch=8, **more):
    """Write a tiny model of a family; returns the model."""
    config, kind, _ = FAMILIES[family]
    model = stirred(kind(config(**SMALL | {"patch_size": patch} | more)))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return model


def save_both_towers(folder, family):
    config, kind = TOWERS[family]
    text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50)
    model = stirred(kind(config(vision_config=SMALL | {"patch_size": 8}, text_config=text)))
    model.save_pretrained(folder)
    return model


def build(folder, image_size=48):
    return IMAGE_ENCODERS.build(f"hf:{folder}", image_size=image_size)


def own_forward(model, image, mean, std):
    """The library's forward of grey images, brought from [-1, 1] over [0, 1] to its normalisation, channel by channel.

    DINOv2 always interpolates its positions, and has no argument that says so.
    """
    unit = (image[:, 0] + 1) / 2
    pixels = torch.stack([(unit - m) / s for m, s in zip(mean, std, strict=True)], 1)
    told = {} if "Dinov2" in type(model).__name__ else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        return model(pixels, output_hidden_states=True, **told)


@pytest.mark.parametrize("size", [48, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_librarys_own(tmp_path, family, size):
    model, prefix = save(tmp_path, family), FAMILIES[family][2]
    encoder = build(tmp_path, size).eval()
    image, grid = torch.randn(2, 1, size, size), size // 8
    expected = own_forward(model, image, MEAN, STD)
    features = encoder(image)
    # ViT's dense pooler was trained for other classes
    pooled = expected.last_hidden_state[:, 0] if family in ("vit", "deit") else expected.pooler_output
    assert torch.allclose(features.pooled, pooled, atol=1e-5)
    assert torch.allclose(features.local, expected.last_hidden_state[:, prefix:], atol=1e-5)
    assert features.local.shape == (2, grid * grid, 32)
    assert (encoder.dim, encoder.local_dim, encoder.strides, encoder.channels) == (
        32,
        32,
        [1] + 4 * [8],
        [1] + 4 * [32],
    )
    found = encoder.tokens(image)
    norm = model.post_layernorm if family in ("clip", "siglip") else model.layernorm
    for place, (tokens, first) in zip([1, 2, 3, 5], found, strict=True):
        state = norm(expected.hidden_states[place])
        assert torch.allclose(first, state[:, :prefix], atol=1e-5)
        for y, x in [(0, 0), (1, 3), (grid - 1, 2)]:  # row-major
            assert torch.allclose(tokens[:, :, y, x], state[:, prefix + y * grid + x], atol=1e-5)
    assert torch.equal(encoder.pyramid(image)[0], image)
    assert all(torch.equal(a, b) for a, (b, _) in zip(encoder.pyramid(image)[1:], found, strict=True))


@pytest.mark.parametrize("family", TOWERS)
def test_of_two_towers_the_vision_tower_is_taken(tmp_path, family, capfd):
    model = save_both_towers(tmp_path, family)
    encoder = build(tmp_path, 48).eval()
    image = torch.randn(2, 1, 48, 48)
    expected = own_forward(model.vision_model, image, [0.5] * 3, [0.5] * 3)
    assert torch.allclose(encoder(image).pooled, expected.pooler_output, atol=1e-5)
    assert not any("text" in name or "logit" in name for name in encoder.state_dict())
    assert "UNEXPECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trainable_parameter_has_a_gradient(tmp_path, family):
    save(tmp_path, family)
    encoder = build(tmp_path).train()
    features = encoder(torch.randn(2, 1, 48, 48))
    (features.pooled.square().sum() + features.local.square().sum()).backward()
    assert [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None] == []
    encoder.zero_grad(set_to_none=True)
    freeze_unreached(encoder, 48)
    assert encoder.training
    sum(found.square().sum() for found in encoder.pyramid(torch.randn(2, 1, 48, 48))[1:]).backward()
    assert [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None] == []
    still = {name.split(".")[1] for name, p in encoder.named_parameters() if not p.requires_grad}
    assert still == ({"head"} if family == "siglip" else {"embeddings"} if family.startswith("dino") else set())


@pytest.mark.parametrize(
    ("file", "stated", "mean", "std"),
    [
        (None, {}, [0.5] * 3, [0.5] * 3),
        ("preprocessor_config.json", {"image_mean": MEAN, "image_std": STD}, MEAN, STD),
        ("preprocessor_config.json", {"do_normalize": False, "image_mean": MEAN}, [0.0] * 3, [1.0] * 3),
        ("preprocessor_config.json", {"size": 224}, [0.5] * 3, [0.5] * 3),
        ("processor_config.json", {"image_processor": {"image_mean": MEAN, "image_std": STD}}, MEAN, STD),
    ],
)
def test_the_models_own_normalisation(tmp_path, file, stated, mean, std):
    model = save(tmp_path, "dinov2")
    (tmp_path / "preprocessor_config.json").unlink()
    if file:
        (tmp_path / file).write_text(json.dumps(stated))
    image = torch.rand(2, 1, 48, 48) * 2 - 1
    expected = own_forward(model, image, mean, std).pooler_output
    assert torch.allclose(build(tmp_path).eval()(image).pooled, expected, atol=1e-5)


def test_one_channel_and_half_precision_in_the_file(tmp_path):
    save(tmp_path, "vit", num_channels=1)
    model = transformers.ViTModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    encoder = build(tmp_path).eval()
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    image = torch.randn(1, 1, 48, 48)
    expected = own_forward(model.float().eval(), image, [sum(MEAN) / 3], [sum(STD) / 3])
    assert torch.allclose(encoder(image).pooled, expected.last_hidden_state[:, 0], atol=1e-5)


def test_both_forms_of_the_name_and_a_classifiers_folder(tmp_path):
    model = stirred(transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, patch_size=8)))
    model.save_pretrained(tmp_path)
    image = torch.randn(1, 1, 32, 32)
    for spec in (f"hf:{tmp_path}", {"name": "hf", "path": str(tmp_path)}, {"name": f"hf:{tmp_path}", "image_size": 32}):
        encoder = IMAGE_ENCODERS.build(spec, image_size=32).eval()
        expected = own_forward(model.vit, image, [0.5] * 3, [0.5] * 3).last_hidden_state[:, 0]
        assert torch.allclose(encoder(image).pooled, expected, atol=1e-5)


def test_the_hash_is_of_weights_and_normalisation_not_of_the_place(tmp_path):
    save(tmp_path / "a", "dinov2")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = build(tmp_path / "a"), build(tmp_path / "b")
    assert encoder_hash(first) == encoder_hash(second)
    (tmp_path / "b/preprocessor_config.json").unlink()
    assert encoder_hash(build(tmp_path / "b")) != encoder_hash(first)
    plain, imagenet = (IMAGE_ENCODERS.build(spec, image_size=32) for spec in
                       ("resnet10t", {"name": "resnet10t", "in_chans": 1, "mean": 0.45, "std": 0.22}))  # fmt: skip
    imagenet.load_state_dict(plain.state_dict())
    assert encoder_hash(plain) != encoder_hash(imagenet)


def test_timm_takes_a_normalisation_too():
    spec = {"name": "resnet10t", "in_chans": 3, "mean": MEAN, "std": STD}
    encoder = IMAGE_ENCODERS.build(spec, image_size=64).eval()
    image = torch.rand(2, 1, 64, 64) * 2 - 1
    pixels = torch.stack([((image[:, 0] + 1) / 2 - m) / s for m, s in zip(MEAN, STD, strict=True)], 1)
    assert torch.allclose(encoder(image).pooled, encoder.model(pixels), atol=1e-5)
    for wrong in ({"mean": [0.5, 0.5]}, {"std": 0}, {"mean": "imagenet"}):
        with pytest.raises(SistaError, match="give"):
            IMAGE_ENCODERS.build({"name": "resnet10t", "in_chans": 3, **wrong}, image_size=32)


def save_open_clip(folder):
    """A made-up folder in open_clip's form: a timm trunk under `visual.trunk.`, projection and text beside it."""
    trunk = stirred(timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=224))
    state = {f"visual.trunk.{name}": value for name, value in trunk.state_dict().items()}
    folder.mkdir(exist_ok=True)
    torch.save(state | {"visual.head.proj.weight": torch.ones(8, 192), "text.proj": torch.ones(2), "logit_scale":
                        torch.ones(())}, folder / "open_clip_pytorch_model.bin")  # fmt: skip
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear", "image_size": 224}
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision}, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return trunk


def test_a_timm_tower_of_open_clip(tmp_path):
    trunk = save_open_clip(tmp_path)
    encoder = build(tmp_path, 224).eval()
    image = torch.rand(1, 1, 224, 224) * 2 - 1
    pixels = torch.stack([((image[:, 0] + 1) / 2 - m) / s for m, s in zip(MEAN, STD, strict=True)], 1)
    assert torch.allclose(encoder(image).pooled, trunk(pixels), atol=1e-4)
    small = build(tmp_path, 64)  # positions resampled
    assert small(torch.randn(1, 1, 64, 64)).local.shape == (1, 16, 192)
    again = IMAGE_ENCODERS.build({"name": "hf", "config": small.config}, image_size=64).eval()
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(image[..., :64, :64]).pooled, small.eval()(image[..., :64, :64]).pooled)
    (tmp_path / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(SistaError, match="it has no weights"):
        build(tmp_path, 64)


def test_a_checkpoint_needs_no_folder(tmp_path):
    folder, best, image = tmp_path / "rad-dino", tmp_path / "best.ckpt", torch.randn(2, 1, 64, 64)
    save(folder, "dinov2_reg")
    trained = build(folder, 64).eval()
    stirred(trained)
    state = {f"image_encoder.{name}": value for name, value in trained.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"image_encoder": f"hf:{folder}", "image_size": 64}}, best)
    (folder / "preprocessor_config.json").unlink()  # the checkpoint's normalisation holds
    built = build(folder, 64).eval()
    built.load_state_dict(trained.state_dict())
    shutil.rmtree(folder)
    assert torch.equal(load_encoder(best)(image).pooled, trained(image).pooled)
    assert torch.equal(built(image).pooled, trained(image).pooled)
    # to a downstream task the weights say which encoder they are
    other = IMAGE_ENCODERS.build(encoder_spec(best), image_size=64)
    assert "(100.0% of it), missing 0, unexpected 0" in str(load_weights(other, best))
    assert torch.equal(other.eval()(image).pooled, trained(image).pooled)
    with pytest.raises(SistaError, match=f"it holds hf:{folder}; --model.image_encoder null"):
        load_weights(IMAGE_ENCODERS.build("resnet10t", image_size=64), best)


@pytest.mark.slow
def test_pretraining_from_a_folder_and_without_it(tiny, workdir, capsys):
    folder = workdir / "rad-dino"
    save(folder, "dinov2")
    more = ["--config", "pretrain.yaml", *tiny, "--model.image_encoder", f"hf:{folder}"]
    assert main(["fit", *more]) == 0, capsys.readouterr().err
    before = build(folder, 64)
    shutil.rmtree(folder)
    encoder = load_encoder(workdir / "runs/pretrain/0001/checkpoints/best.ckpt")
    moved = {k: not torch.equal(v, before.state_dict()[k]) for k, v in encoder.state_dict().items()}
    assert not moved.pop("model.embeddings.mask_token")
    assert not moved.pop("_extra_state")
    assert all(moved.values())
    assert main(["test", *more]) == 2
    assert f"'hf:{folder}': no folder with a config.json" in capsys.readouterr().err


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def with_a_lack(folder):
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if "layernorm.bias" not in k}, folder / "model.safetensors")


def no_json(folder):
    (folder / "config.json").write_text("{")


def no_preprocessor(folder):
    (folder / "preprocessor_config.json").write_text("{")


def of_text(folder):
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    transformers.BertModel(config).save_pretrained(folder)


def convolutional(folder):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    transformers.ResNetModel(config).save_pretrained(folder)


def masked(folder):
    kind = transformers.ViTMAEModel
    kind(transformers.ViTMAEConfig(**SMALL, patch_size=8)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (without_weights, "it can't be loaded"),
        (with_a_lack, "its weights lack 1 tensors (first: layernorm.bias)"),
        (no_json, "it can't be loaded"),
        (no_preprocessor, "preprocessor_config.json can't be read"),
        (of_text, "'bert' is no plain vision transformer"),
        (convolutional, "'resnet' is no plain vision transformer"),
        (masked, "it is no plain vision transformer"),
        (shutil.rmtree, "no folder with a config.json, and the hub is no help"),
    ],
)
def test_bad_folders_are_one_line(tmp_path, monkeypatch, spoil, line):
    monkeypatch.setattr("sista_pl.models.hub.reachable", lambda: False)
    folder = tmp_path / "model"
    save(folder, "dinov2")
    spoil(folder)
    with pytest.raises(SistaError) as error:
        build(folder)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("hf:microsoft/rad-dino", "run `hf download microsoft/rad-dino --local-dir DIR`, then write hf:DIR"),
        ("hf:not a name", "no folder with a config.json"),
        ("hf:", "no path; write hf:FOLDER"),
        ("microsoft/rad-dino", "a model of Hugging Face is written hf:microsoft/rad-dino"),
        ({"name": "hf", "pathh": "x"}, "has no argument 'pathh'; did you mean path?"),
    ],
)
def test_bad_names_are_one_line(monkeypatch, tmp_path, spec, line):
    monkeypatch.setattr("sista_pl.models.hub.reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SistaError) as error:
        IMAGE_ENCODERS.build(spec)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_an_input_smaller_than_a_patch_is_one_line(tmp_path):
    save(tmp_path, "vit", patch=16)
    with pytest.raises(SistaError, match="image_size is 8, a patch alone has 16"):
        build(tmp_path, 8)
