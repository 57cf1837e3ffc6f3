"""Every decoder on its encoders: logits of the input's size, a gradient everywhere, wrong pairs in one line."""

import pytest
import torch
import transformers
from sista_tasks.segmentation import SegmentationTask
from sista_tasks.segmentation.decoders import DECODERS

from sista_pl.errors import SistaError
from sista_pl.models import IMAGE_ENCODERS

SMALL = {
    "unet": {"channels": [16, 16, 8, 8, 8]},
    "unetplusplus": {"channels": [16, 16, 8, 8, 8]},
    "fpn": {"channels": 32},
    "dpt": {"intermediate": [8, 8, 8, 8], "fusion": 8},
    "setr_pup": {"channels": 8},
    "linear": {},
}
PAIRS = [
    *[(decoder, "resnet10t", 64) for decoder in ("unet", "unetplusplus", "fpn")],
    *[(decoder, "convnext_atto", 64) for decoder in ("unet", "fpn")],
    ("unet", "resnet10t", 100),  # its maps do not double
    ("fpn", "efficientnet_b0", 96),
    *[(decoder, "vit_tiny_patch16_224", size) for decoder in ("dpt", "setr_pup") for size in (64, 80)],
    ("dpt", "vit_tiny_patch16_224", 224),
    ("dpt", "hf:dinov2", 70),  # 5 × 5 patches of 14
    ("setr_pup", "hf:dinov2", 70),
    ("dpt", "hf:siglip", 32),  # patches of 8, no class token
    *[("linear", encoder, 64) for encoder in ("resnet10t", "convnext_atto", "vit_tiny_patch16_224")],
    ("linear", "hf:dinov2", 70),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models of Hugging Face, by their names here."""
    root = tmp_path_factory.mktemp("models")
    small = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
    dino = transformers.Dinov2Config(**small, image_size=28, patch_size=14)
    siglip = transformers.SiglipVisionConfig(**small, image_size=16, patch_size=8)
    transformers.Dinov2Model(dino).save_pretrained(root / "dinov2")
    transformers.SiglipVisionModel(siglip).save_pretrained(root / "siglip")
    return root


def task(folders, decoder, encoder, size, **more):
    encoder = f"hf:{folders / encoder.removeprefix('hf:')}" if encoder.startswith("hf:") else encoder
    spec = {"name": decoder, **SMALL[decoder]}
    return SegmentationTask(spec, image_encoder=encoder, image_size=size, **more)


@pytest.mark.parametrize(("decoder", "encoder", "size"), PAIRS)
def test_logits_of_the_inputs_size_and_a_gradient_everywhere(folders, decoder, encoder, size):
    made = task(folders, decoder, encoder, size, frozen=False)
    draw = torch.Generator().manual_seed(0)
    batch = {"image": torch.randn(2, 1, size, size, generator=draw), "index": torch.arange(2)}
    batch["mask"] = torch.where(torch.rand(2, size, size, generator=draw) < 0.2, 255, 0).to(torch.uint8)
    logits = made(batch)
    assert logits.shape == (2, 1, size, size)
    made.step(batch).losses["mask"].backward()
    assert [name for name, p in made.named_parameters() if p.requires_grad and p.grad is None] == []
    frozen = task(folders, decoder, encoder, size)
    frozen.step(batch).losses["mask"].backward()
    for name, parameter in frozen.named_parameters():
        assert (parameter.grad is None) == name.startswith("image_encoder."), name
        assert parameter.requires_grad != name.startswith("image_encoder."), name


@pytest.mark.parametrize("decoder", SMALL)
def test_logits_are_where_the_maps_are(folders, decoder):
    """What changes in the encoder's maps at the upper right changes the logits there most."""
    torch.manual_seed(0)
    made = task(folders, decoder, "vit_tiny_patch16_224" if decoder in ("dpt", "setr_pup") else "resnet10t", 128).eval()
    image = torch.zeros(1, 1, 128, 128)
    encoder = made.image_encoder

    def moved(found):
        side = found.shape[-1] // 4
        found = found.clone()
        found[..., :side, -side:] += 5
        return found

    with torch.no_grad():
        maps, tokens = encoder.pyramid(image), encoder.tokens(image) if encoder.has_tokens else []
        encoder.pyramid, encoder.tokens = lambda image: maps, lambda image: tokens
        before = made({"image": image})
        encoder.pyramid = lambda image: [moved(m) for m in maps]
        encoder.tokens = lambda image: [(moved(m), prefix) for m, prefix in tokens]
        change = (made({"image": image}) - before).abs()
    assert torch.nn.functional.adaptive_avg_pool2d(change, 2).argmax() == 1


def test_the_linear_probe_is_linear_in_the_maps_and_bilinear_between_their_cells(folders):
    made = task(folders, "linear", "resnet10t", 64).eval()
    encoder, image = made.image_encoder, torch.zeros(1, 1, 64, 64)
    shapes = [m.shape for m in encoder.pyramid(image)]

    def logits(maps):
        encoder.pyramid = lambda image: maps
        with torch.no_grad():
            return made({"image": image})[0, 0]

    a, b = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    none = [torch.zeros(shape) for shape in shapes]
    total = [x + y for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(logits(total), logits(a) + logits(b) - logits(none), rtol=1e-4, atol=1e-5)
    # a lone cell of the coarsest map (32 px) reaches one of its cells and one of the finest (8 px) far
    lone = [torch.zeros(shape) for shape in shapes]
    lone[-1][0, :, 0, 0] = torch.randn(shapes[-1][1])
    reach = logits(lone) - logits(none)
    weight, scale = made.decoder.heads[-1].weight[0, :, 0, 0], (1 + made.decoder.norms[-1].eps) ** -0.5
    centre = (lone[-1][0, :, 0, 0] * scale * weight).sum()
    torch.testing.assert_close(reach[:12, :12], centre.detach().expand(12, 12), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reach[31:33, 0].mean(), centre.detach() / 2, rtol=1e-3, atol=1e-5)
    assert reach[52:].abs().max() < 1e-6


@pytest.mark.parametrize(
    ("decoder", "encoder", "size", "line"),
    [
        ("unet", "vit_tiny_patch16_224", 64, "maps of one stride, as a ViT; use `decoder: dpt` or setr_pup"),
        ("fpn", "hf:dinov2", 70, "maps of one stride, as a ViT; use `decoder: dpt` or setr_pup"),
        ("unetplusplus", "convnext_atto", 64, "no map of stride 2; use `decoder: unet` or fpn"),
        ("unetplusplus", "resnet10t", 100, "image_size is 100, its maps double from stride 32; give a multiple of 32"),
        ("fpn", "resnet10t", 72, "image_size is 72, its maps double from stride 32; give a multiple of 32"),
        ("dpt", "resnet10t", 64, "'dpt': for vision transformers; use `decoder: unet`"),
        ("setr_pup", "resnet10t", 64, "'setr_pup': for vision transformers; use `decoder: unet`"),
        ({"name": "dpt", "intermediate": [8, 8]}, "vit_tiny_patch16_224", 64, "4 maps of the encoder for 2 channels"),
        ({"name": "unet", "channels": [8, 8]}, "resnet10t", 64, "channels is [8, 8]; give 5 numbers"),
        ({"name": "fpn", "channels": 16}, "resnet10t", 64, "channels is 16; give a multiple of 32"),
        ({"name": "unet", "channel": [8, 8]}, "resnet10t", 64, "no argument 'channel'; did you mean channels?"),
        ("unnet", "resnet10t", 64, "unknown decoder 'unnet'; did you mean unet?"),
    ],
)
def test_wrong_decoders_are_one_line(folders, decoder, encoder, size, line):
    encoder = f"hf:{folders / encoder.removeprefix('hf:')}" if encoder.startswith("hf:") else encoder
    with pytest.raises(SistaError) as error:
        DECODERS.build(decoder, encoder=IMAGE_ENCODERS.build(encoder, image_size=size), image_size=size)
    assert line in str(error.value)
    assert "\n" not in str(error.value)
