"""Image encoders: any timm model gives pooled vectors and tokens, and every parameter a gradient."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from sista_pl.errors import SistaError
from sista_pl.models import IMAGE_ENCODERS


@pytest.mark.parametrize(
    ("spec", "dim", "local", "patches"),
    [
        ("resnet10t", 512, 256, 16),
        ({"name": "resnet18", "in_chans": 3}, 512, 256, 16),
        ("vit_tiny_patch16_224", 192, 192, 16),
        ("convnext_atto", 320, 160, 16),
        ("swin_tiny_patch4_window7_224", 768, 384, 16),
    ],
)
def test_shapes_and_gradients(spec, dim, local, patches):
    encoder = IMAGE_ENCODERS.build(spec, image_size=64)
    features = encoder(torch.randn(2, 1, 64, 64))
    assert (encoder.dim, encoder.local_dim) == (dim, local)
    assert features.pooled.shape == (2, dim)
    assert features.local.shape == (2, patches, local)
    (features.pooled.square().sum() + features.local.square().sum()).backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


def test_tokens_are_row_major_stage_3_of_a_resnet():
    encoder = IMAGE_ENCODERS.build("resnet10t", image_size=64).eval()
    image = torch.randn(1, 1, 64, 96)
    stages = timm.create_model("resnet10t", in_chans=1, features_only=True).eval()
    stages.load_state_dict({k: v for k, v in encoder.model.state_dict().items() if not k.startswith("fc")})
    expected = stages(image)[3]  # stride 16
    tokens = encoder(image).local
    assert torch.allclose(tokens[0, 7], expected[0, :, 1, 1], atol=1e-5)  # row 1, column 1 of 4 x 6


def test_three_channels_repeat_the_grey_one():
    encoder = IMAGE_ENCODERS.build({"name": "resnet10t", "in_chans": 3}, image_size=64).eval()
    image = torch.randn(1, 1, 64, 64)
    expected = encoder.model(image.repeat(1, 3, 1, 1))
    assert torch.allclose(encoder(image).pooled, expected, atol=1e-5)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_weights_from_a_file(tmp_path, caplog, suffix, in_chans):
    """As a hub has them: with a classifier, for three channels, which become one by summing."""
    state, file = timm.create_model("resnet10t").state_dict(), tmp_path / f"model.{suffix}"
    save_file(state, file) if suffix == "safetensors" else torch.save(state, file)
    encoder = IMAGE_ENCODERS.build({"name": "resnet10t", "weights": str(file), "in_chans": in_chans})
    for name, value in encoder.model.state_dict().items():
        first = name == "conv1.0.weight" and in_chans == 1
        assert torch.equal(value, state[name].sum(1, keepdim=True) if first else state[name]), name
    assert f"{file}: matched 84 of 84 tensors (100.0% of it), missing 0, unexpected 2" in caplog.text
    with pytest.raises(SistaError, match=r"'resnet18': .*less than 95% is covered; is it of this model"):
        IMAGE_ENCODERS.build({"name": "resnet18", "weights": str(file)})


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("resnet51", "did you mean"),
        ({"name": "resnet10t", "weights": "nowhere.pt"}, "write none, imagenet, or a path"),
        ({"name": "resnet10t", "in_chans": 2}, "in_chans is 2"),
        ({"name": "resnet10t", "depth": 3}, "has no argument 'depth'"),
    ],
)
def test_bad_specs_are_one_line(spec, line):
    with pytest.raises(SistaError) as error:
        IMAGE_ENCODERS.build(spec)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_unreachable_hub_says_how_to_give_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr("sista_pl.models.hub.reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SistaError, match="give a local file"):
        IMAGE_ENCODERS.build({"name": "resnet26t", "weights": "imagenet"})
