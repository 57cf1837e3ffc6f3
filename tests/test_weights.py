"""Weights of any source into an encoder: what fits is loaded and counted, too little is one line.

The files of other projects are made up here from the key names that they are known by; no real one was at hand.
"""

import json

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from sista_pl.checkpoint import load_encoder
from sista_pl.data.transforms import MEAN, STD
from sista_pl.errors import SistaError
from sista_pl.exported import export_timm
from sista_pl.models import IMAGE_ENCODERS
from sista_pl.weights import encoder_spec, load_weights


def build(name="resnet18", size=64, **more):
    return IMAGE_ENCODERS.build({"name": name, **more}, image_size=size)


def numbered(model, seed=1):
    """Return a model's tensors, each number moved a little, so that none is a constant."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (value * 1.1 + 0.01 * torch.rand(value.shape, generator=draw)).contiguous()
        if value.is_floating_point()
        else value
        for name, value in model.state_dict().items()
    }


def contiguous(encoder):
    return {name: value.contiguous() for name, value in encoder.model.state_dict().items()}


def slow(state, prefix, encoder):
    """The reference: each tensor of a timm encoder looked up by its name, one after another."""
    matched, missing, mismatched, used = [], [], [], set()
    own = encoder.model.state_dict()
    for name, value in own.items():
        other = state.get(prefix + name)
        if other is None:
            if not name.endswith("num_batches_tracked"):
                missing.append(name)
            continue
        used.add(name)
        folds = value.shape != other.shape and name.endswith("conv1.weight") and other.shape[1] == 3
        (matched if value.shape == other.shape or folds else mismatched).append(name)
    unexpected = [name for name in state if name.startswith(prefix) and name.removeprefix(prefix) not in used]
    tensors = len(matched) / (len(matched) + len(missing) + len(mismatched))
    numbers = sum(own[name].numel() for name in matched) / sum(value.numel() for value in own.values())
    return matched, missing, unexpected, mismatched, min(tensors, numbers)


def check(coverage, encoder, state, prefix=""):
    """Compare what was loaded and what was counted with the reference."""
    matched, missing, unexpected, mismatched, share = slow(state, prefix, encoder)
    assert sorted(coverage.matched) == sorted(matched)
    assert sorted(coverage.missing) == sorted(missing)
    assert sorted(coverage.mismatched) == sorted(mismatched)
    assert sorted(prefix + name for name in coverage.unexpected) == sorted(unexpected)
    assert coverage.share == pytest.approx(share)
    for name, value in encoder.model.state_dict().items():
        if name in matched:
            other = state[prefix + name]
            expected = other if other.shape == value.shape else other.sum(1, keepdim=True)
            assert torch.equal(value, expected), name


@pytest.mark.parametrize("depth", [18, pytest.param(50, marks=pytest.mark.slow)])
def test_a_torchvision_resnet_has_timms_names(tmp_path, depth):
    """Nothing is mapped: the names are equal, the first layer is folded to one channel, the classifier left over."""
    model = getattr(torchvision.models, f"resnet{depth}")()
    model.load_state_dict(numbered(model))
    torch.save(model.state_dict(), tmp_path / "resnet.pth")
    encoder = build(f"resnet{depth}")
    coverage = load_weights(encoder, tmp_path / "resnet.pth")
    check(coverage, encoder, model.state_dict())
    assert coverage.unexpected == ["fc.bias", "fc.weight"]
    assert coverage.share == 1
    # the same image through the library's own layers, the grey channel repeated
    stages = torch.nn.Sequential(*list(model.eval().children())[:-1])
    image = torch.randn(2, 1, 64, 64)
    expected = stages(image.repeat(1, 3, 1, 1)).flatten(1)
    assert torch.allclose(encoder.eval()(image).pooled, expected, rtol=1e-4)


def test_an_old_file_without_counters_is_whole(tmp_path):
    model = torchvision.models.resnet18()
    state = {name: value for name, value in model.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "resnet18.pth", _use_new_zipfile_serialization=False)
    coverage = load_weights(build(), tmp_path / "resnet18.pth", minimum=0.999)
    assert coverage.missing == []


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_timm_file(tmp_path, suffix):
    model = timm.create_model("convnext_atto", num_classes=3)
    file = tmp_path / f"model.{suffix}"
    save_file(model.state_dict(), file) if suffix == "safetensors" else torch.save(model.state_dict(), file)
    encoder = build("convnext_atto", in_chans=3)
    coverage = load_weights(encoder, file)
    check(coverage, encoder, model.state_dict())
    assert coverage.unexpected == ["head.fc.bias", "head.fc.weight"]


@pytest.mark.parametrize(
    ("prefix", "wrap", "spec"),
    [
        ("backbone.", None, {"prefix": "backbone."}),
        ("backbone.", "state_dict", {}),  # solo-learn, lightly
        ("net.encoder.", "state_dict", {"prefix": "net.encoder"}),
        ("img_encoder_q.model.", "state_dict", {"preset": "mgca"}),
        ("gloria.img_encoder.model.", "state_dict", {"preset": "gloria"}),
        ("img_encoder.model.", "state_dict", {"preset": "gloria"}),
        ("", "model", {}),  # MRM
        ("module.", "model", {}),  # SAT: a model in DDP's wrapper
        ("image_encoder.model.", "state_dict", {}),
    ],
)
def test_made_up_files_of_other_projects(tmp_path, prefix, wrap, spec):
    """Their key names around a ResNet's tensors, with what stands beside the encoder in such a file."""
    source = torchvision.models.resnet18()
    source.fc = torch.nn.Identity()
    state = {prefix + name: value for name, value in numbered(source).items()}
    beside = {f"{prefix or 'decoder.'}global_embed.head.0.weight": torch.ones(4, 4), "text_encoder_q.w": torch.ones(2)}
    torch.save({wrap: state | beside, "epoch": 3} if wrap else state | beside, tmp_path / "other.ckpt")
    encoder = build()
    coverage = load_weights(encoder, {"path": tmp_path / "other.ckpt", **spec})
    prefix = prefix.removeprefix("module.")
    check(coverage, encoder, {k.removeprefix("module."): v for k, v in (state | beside).items()}, prefix)
    assert coverage.share > 0.999
    assert f"matched {len(coverage.matched)} of 120 tensors (100.0% of it), missing 0" in str(coverage)


def test_a_checkpoint_of_sista_and_its_exported_folder(tmp_path):
    spec = {"name": "resnet18", "in_chans": 3, "mean": [0.48, 0.46, 0.41], "std": 0.27}
    encoder = IMAGE_ENCODERS.build(spec, image_size=64).eval()
    encoder.model.load_state_dict(numbered(encoder.model))
    state = {f"image_encoder.{name}": value for name, value in encoder.state_dict().items()}
    state |= {"image_head.pooled.inner.weight": torch.ones(2, 2), "log_scale": torch.ones(())}
    checkpoint, image = tmp_path / "best.ckpt", torch.randn(2, 1, 64, 64)
    torch.save({"state_dict": state, "hyper_parameters": {"image_encoder": spec, "image_size": 64}}, checkpoint)
    folder = export_timm(encoder, tmp_path / "encoder", 64)
    for weights in (checkpoint, folder, {"path": str(folder)}):
        other = IMAGE_ENCODERS.build(encoder_spec(weights), image_size=64).eval()
        coverage = load_weights(other, weights)
        assert (len(coverage.matched), coverage.missing, coverage.unexpected, coverage.mismatched) == (120, [], [], [])
        assert torch.equal(other(image).pooled, encoder(image).pooled)
    assert torch.equal(load_encoder(checkpoint)(image).pooled, encoder(image).pooled)
    own = timm.create_model("resnet18", checkpoint_path=str(folder / "model.safetensors"), num_classes=0).eval()
    stated = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    pixels = ((image + 1) / 2 - torch.tensor(stated["mean"])[:, None, None]) / torch.tensor(stated["std"])[
        :, None, None
    ]
    assert torch.allclose(own(pixels), encoder(image).pooled, rtol=1e-4)
    plain = export_timm(build(), tmp_path / "plain", 64)
    stated = json.loads((plain / "config.json").read_text())["pretrained_cfg"]
    assert stated == {"input_size": [1, 64, 64], "mean": [MEAN], "std": [STD]}


@pytest.mark.parametrize(
    ("trained", "named", "differs"),
    [
        ({"in_chans": 3, "mean": [0.48, 0.46, 0.41], "std": 0.27}, {}, True),
        ({"in_chans": 3, "mean": [0.48, 0.46, 0.41]}, {"mean": [0.48, 0.46, 0.41]}, True),  # one channel has their mean
        ({"mean": 0.4}, {"in_chans": 3, "mean": [0.4, 0.4, 0.4]}, False),
        ({"in_chans": 3}, {}, False),
        ({}, {"std": 0.3}, True),
    ],
)
def test_the_normalisation_of_the_training_is_not_dropped(tmp_path, trained, named, differs):
    """An encoder that is named in the configuration has the configuration's: the same weights, other features."""
    source = build(**trained)
    state = {f"image_encoder.{name}": value for name, value in source.state_dict().items()}
    hyper = {"image_encoder": {"name": "resnet18", **trained}, "image_size": 64}
    torch.save({"state_dict": state, "hyper_parameters": hyper}, tmp_path / "best.ckpt")
    for weights in (tmp_path / "best.ckpt", export_timm(source, tmp_path / "encoder", 64)):
        encoder, image = build(**named).eval(), torch.randn(1, 1, 64, 64)
        before = encoder.model.layer1[0].conv1.weight.clone()
        if differs:
            with pytest.raises(SistaError, match=r"trained on images of mean .*; --model\.image_encoder null builds"):
                load_weights(encoder, weights)
            assert torch.equal(encoder.model.layer1[0].conv1.weight, before)
        else:
            load_weights(encoder, weights)
            assert torch.allclose(encoder(image).pooled, source.eval()(image).pooled, atol=1e-5)


def test_three_channels_become_one_and_one_three(tmp_path):
    three, one = build(in_chans=3), build()
    save_file(contiguous(three), tmp_path / "three.safetensors")
    load_weights(one, tmp_path / "three.safetensors")
    image = torch.randn(2, 1, 64, 64)
    assert torch.allclose(one.eval()(image).pooled, three.eval()(image).pooled, atol=1e-5)
    save_file(contiguous(one), tmp_path / "one.safetensors")
    again = build(in_chans=3)
    load_weights(again, tmp_path / "one.safetensors")
    assert torch.allclose(again.eval()(image).pooled, one(image).pooled, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("vit_tiny_patch16_224", 1),
        ("deit_tiny_distilled_patch16_224", 2),
        ("vit_medium_patch16_gap_240", 0),
        ("vit_small_patch14_reg4_dinov2", 0),  # class and registers are added after the positions
    ],
)
def test_positions_are_resampled_class_tokens_kept(tmp_path, name, prefix):
    patch = 14 if "14" in name else 16
    source = timm.create_model(name, num_classes=0, img_size=4 * patch)
    state = numbered(source)
    save_file(state, tmp_path / "model.safetensors")
    encoder = build(name, size=6 * patch, in_chans=3)
    coverage = load_weights(encoder, tmp_path / "model.safetensors")
    assert coverage.mismatched == coverage.missing == []
    found, grid = encoder.model.pos_embed, state["pos_embed"]
    assert torch.equal(found[:, :prefix], grid[:, :prefix])
    maps = grid[:, prefix:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(maps, (6, 6), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    assert torch.allclose(found[:, prefix:], expected, atol=1e-5)
    assert torch.allclose(found, resample_abs_pos_embed(grid, [6, 6], num_prefix_tokens=prefix), atol=1e-6)


def test_positions_of_another_number_of_tokens_are_mismatched(tmp_path):
    """A vision transformer without a class token, given to one that has it."""
    more = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    state = numbered(timm.create_model("vit_tiny_patch16_224", num_classes=0, **more))
    save_file(state, tmp_path / "model.safetensors")
    encoder = build("vit_tiny_patch16_224", size=96, in_chans=3)
    coverage = load_weights(encoder, tmp_path / "model.safetensors")
    assert (coverage.mismatched, coverage.missing) == (["pos_embed"], ["cls_token"])


def test_too_little_loads_nothing_unless_allowed(tmp_path):
    state = numbered(torchvision.models.resnet18())
    part = {name: value for name, value in state.items() if not name.startswith("layer3")}
    part["layer1.0.bn1.weight"] = torch.ones(3)
    torch.save(part, tmp_path / "part.pth")
    encoder = build()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(SistaError, match="less than 95% is covered") as error:
        load_weights(encoder, tmp_path / "part.pth")
    share = slow(part, "", encoder)[-1]
    assert f"({share:.1%} of it), missing 25, unexpected 2, mismatched 1" in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    coverage = load_weights(encoder, {"path": tmp_path / "part.pth", "minimum": 0.5})
    check(coverage, encoder, part)
    assert torch.equal(encoder.model.layer3[0].conv1.weight, before["model.layer3.0.conv1.weight"])


def test_numbers_count_where_tensors_would_do(tmp_path):
    """Of 120 tensors one is missing, with a fifth of the numbers."""
    state = numbered(torchvision.models.resnet18())
    del state["layer4.1.conv2.weight"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(SistaError, match=r"matched 119 of 120 tensors \(78.9% of it\)"):
        load_weights(build(), tmp_path / "part.pth")


def test_nan_is_refused_and_nothing_loaded(tmp_path):
    state = numbered(torchvision.models.resnet18())
    state["layer2.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    encoder = build()
    before = encoder.model.conv1.weight.clone()
    with pytest.raises(SistaError, match=r"layer2.0.conv1.weight has values that are not finite"):
        load_weights(encoder, tmp_path / "nan.pth")
    assert torch.equal(encoder.model.conv1.weight, before)


class Code:
    """What runs when it is read; here it would leave a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def test_code_in_a_pickle_does_not_run(tmp_path):
    torch.save({"state_dict": numbered(build().model), "config": Code(tmp_path / "ran")}, tmp_path / "code.pth")
    with pytest.raises(SistaError, match="holds more than tensors") as error:
        load_weights(build(), tmp_path / "code.pth")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["text.pth", "cut.pth", "empty.pth", "list.pth", "nested.pth", "cut.safetensors"])
def test_files_that_are_no_weights_are_one_line(tmp_path, name):
    file = tmp_path / name
    whole = tmp_path / "whole"
    torch.save(numbered(build().model), whole)
    contents = {
        "text.pth": b"version https://git-lfs.github.com/spec/v1\n", "cut.pth": whole.read_bytes()[:100_000],
        "empty.pth": b"", "cut.safetensors": b"\x10\0\0\0\0\0\0\0{",
    }  # fmt: skip
    if name in contents:
        file.write_bytes(contents[name])
    else:
        torch.save([torch.ones(2)] if name == "list.pth" else {"net": {"conv1.weight": torch.ones(2)}}, file)
    with pytest.raises(SistaError, match=name) as error:
        load_weights(build(), file)
    assert "\n" not in str(error.value)
    assert "weights_only=False" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("nowhere.pth", "nowhere.pth: no such file"),
        ({"prefix": "backbone."}, "no path; write {path: FILE"),
        ({"path": None}, "no path; write {path: FILE"),
        ({"path": "x.pth", "preset": "mgka"}, "no such file"),
        ({"path": "x.pth", "prefx": "a."}, "no key 'prefx'; did you mean prefix?"),
        ({"path": "x.pth", "prefix": "a.", "preset": "mgca"}, "give one of them"),
        ({"path": "x.pth", "minimum": 1.5}, "minimum is 1.5; give a share from 0 to 1"),
        ({"path": "x.pth", "minimum": "most"}, "minimum is 'most'"),
    ],
)
def test_bad_specs_are_one_line(spec, line):
    with pytest.raises(SistaError) as error:
        load_weights(build(), spec)
    assert line in str(error.value)
    assert encoder_spec(spec) is None


def test_an_unknown_preset_names_the_nearest(tmp_path):
    torch.save(numbered(build().model), tmp_path / "x.pth")
    with pytest.raises(SistaError, match="did you mean mgca"):
        load_weights(build(), {"path": tmp_path / "x.pth", "preset": "mgka"})
