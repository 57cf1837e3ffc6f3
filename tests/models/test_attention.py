"""Attention: what the eager models give, read without leaving the fused kernels, and the roll-out through layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from sista_pl.errors import SistaError
from sista_pl.models import IMAGE_ENCODERS, TEXT_ENCODERS, ProjectionHead
from sista_pl.models.attention import roll_out
from sista_pl.models.huggingface import HuggingFaceEncoder
from sista_pl.models.image import ImageEncoder
from sista_pl.models.text import TextEncoder, train_wordpiece
from sista_pl.pair import Features

CORPUS = ["No pleural effusion. The heart is enlarged.", "Small left pleural effusion with atelectasis.", "Clear."] * 4
VIT = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=32)
TEXT = dict(vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)


def text_encoder(kind: str, **options) -> TextEncoder:
    torch.manual_seed(0)
    if kind == "DistilBert":
        config = transformers.DistilBertConfig(vocab_size=120, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
    else:
        config = getattr(transformers, f"{kind}Config")(**TEXT)
    model = getattr(transformers, f"{kind}Model")(config)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return TextEncoder(model, train_wordpiece(CORPUS, 120), **options).eval()


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert", "Electra"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_words_have_the_attention_of_the_eager_model(kind, pooling):
    encoder = text_encoder(kind, pooling=pooling)
    batch = encoder.tokenize([*CORPUS[:2], "Effusions clearing."]).batch([0, 1, 2])
    places = batch["word_index"]
    assert ((places[:, 1:] == places[:, :-1]) & (places[:, 1:] >= 0)).any(), "a word of several sub-words"
    assert (batch["attention_mask"] == 0).any()
    before = encoder(batch)
    assert before.attention is None
    encoder.ask_attention()
    features = encoder(batch)
    for name in ("pooled", "local", "mask", "ids"):
        assert torch.equal(getattr(features, name), getattr(before, name)), name
    encoder.model.set_attn_implementation("eager")
    shown = encoder.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_attentions=True
    ).attentions[-1]  # B H T T
    expected = torch.zeros(batch["word_ids"].shape)
    for b, t in (places >= 0).nonzero().tolist():
        expected[b, places[b, t]] += shown[b, :, 0, t].mean()
    torch.testing.assert_close(features.attention, expected, rtol=0, atol=1e-6)
    assert (features.attention[~features.mask] == 0).all()
    assert (features.attention[features.mask] > 0).all()
    assert not features.attention.requires_grad
    assert features.pooled.requires_grad


def test_attention_does_not_depend_on_padding_or_dropout():
    encoder = text_encoder("Bert")
    encoder.ask_attention()
    table = encoder.tokenize(CORPUS)
    alone, padded = encoder(table.batch([2])).attention, encoder(table.batch([2, 0])).attention
    torch.testing.assert_close(padded[:1, : alone.shape[1]], alone, rtol=0, atol=1e-6)
    # of the last layer's own dropout, which scales some weights by 1 / (1 - p) and drops the others
    layers = encoder.train().model.encoder.layer
    for module in encoder.model.modules():
        if isinstance(module, torch.nn.Dropout) and module is not layers[-1].attention.self.dropout:
            module.p = 0.0
    layers[-1].attention.self.dropout.p = 0.9
    torch.testing.assert_close(encoder(table.batch([2])).attention, alone, rtol=0, atol=1e-6)


def test_half_precision_is_close():
    encoder = text_encoder("Bert")
    encoder.ask_attention()
    batch = encoder.tokenize(CORPUS).batch([0, 1])
    exact = encoder(batch).attention
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = encoder(batch).attention
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=2e-2, atol=1e-4)


def test_of_cut_layers_it_is_the_last_that_runs():
    whole, cut = text_encoder("Bert"), text_encoder("Bert")
    cut.model.encoder.layer = cut.model.encoder.layer[:1]
    batch = whole.tokenize(CORPUS).batch([0])
    for encoder in (whole, cut):
        encoder.ask_attention()
    assert not torch.allclose(whole(batch).attention, cut(batch).attention, atol=1e-5)


@pytest.mark.parametrize(("kind", "name"), [("DebertaV2", "deberta-v2"), ("GPT2", "gpt2")])
def test_a_text_encoder_without_it_is_one_line(kind, name):
    if kind == "GPT2":  # causal: its first token sees itself alone
        config = transformers.GPT2Config(vocab_size=120, n_embd=32, n_layer=1, n_head=2)
        encoder = TextEncoder(transformers.GPT2Model(config), train_wordpiece(CORPUS, 120)).eval()
    else:
        encoder = text_encoder(kind)
    assert encoder(encoder.tokenize(CORPUS).batch([0])).attention is None
    with pytest.raises(SistaError, match=f"'{name}': the attention of its class token can't be read") as error:
        encoder.ask_attention()
    assert "\n" not in str(error.value)


def test_small_bert_gives_it_before_it_has_a_tokenizer():
    encoder = TEXT_ENCODERS.build({"name": "small-bert", "layers": 1, "dim": 32, "vocab_size": 120}).train()
    encoder.ask_attention()
    assert encoder.training
    encoder.fit(CORPUS)
    assert encoder(encoder.tokenize(CORPUS).batch([0])).attention.min() > 0


def by_hand(attention, x: torch.Tensor) -> torch.Tensor:
    """The class token's weights of a timm `Attention` on its input (B, T, D), head by head: (B, T)."""
    width = attention.head_dim
    q, k, _ = attention.qkv(x).chunk(3, dim=2)
    heads = []
    for h in range(attention.num_heads):
        part = slice(h * width, (h + 1) * width)
        query, key = attention.q_norm(q[:, 0, part]), attention.k_norm(k[:, :, part])
        heads.append(torch.stack([(key[b] @ query[b] * attention.scale).softmax(0) for b in range(len(x))]))
    return torch.stack(heads).mean(0)


@pytest.mark.parametrize(("name", "prefix"), [("vit_tiny_patch16_224", 1), ("deit_tiny_distilled_patch16_224", 2)])
def test_patches_of_timm_equal_the_slow_formula(name, prefix):
    torch.manual_seed(0)
    encoder = IMAGE_ENCODERS.build(name, image_size=64).eval()
    image, inputs = torch.randn(2, 1, 64, 64), []
    before = encoder(image)
    assert before.attention is None
    encoder.ask_attention(64)
    last = encoder.model.blocks[-1].attn
    last.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    features = encoder(image)
    torch.testing.assert_close(features.attention, by_hand(last, inputs[0])[:, prefix:], rtol=0, atol=1e-6)
    assert features.attention.shape == features.local.shape[:2] == (2, 16)
    assert torch.equal(features.local, before.local)
    assert not features.attention.requires_grad


def test_rotated_keys_are_the_models_own():
    """EVA turns its keys by their place after the projection; its unfused path shows the weights."""
    encoder = IMAGE_ENCODERS.build("eva02_tiny_patch14_224", image_size=56).eval()
    image, calls = torch.randn(1, 1, 56, 56), []
    encoder.ask_attention(56)
    attention = encoder(image).attention
    for block in encoder.model.blocks:
        block.attn.attn_drop.register_forward_pre_hook(lambda _, given: calls.append(given[0]))
        block.attn.fused_attn = False
    encoder.needs_attention = False
    encoder(image)
    torch.testing.assert_close(attention, calls[-1][:, :, 0, 1:].mean(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["ViT", "DeiT", "Dinov2", "Dinov2WithRegisters", "CLIPVision"])
def test_patches_of_hugging_face_equal_the_eager_model(family):
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**VIT, patch_size=8))
    encoder = HuggingFaceEncoder(model, 0.5, 0.5, 32).eval()
    image = torch.randn(2, 1, 32, 32)
    before = encoder(image)
    encoder.ask_attention(32)
    features = encoder(image)
    assert before.attention is None
    assert torch.equal(before.local, features.local)
    model.set_attn_implementation("eager")
    shown = model(encoder.renormalise(image), output_attentions=True).attentions[-1]
    torch.testing.assert_close(features.attention, shown[:, :, 0, -16:].mean(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet10t", "vit_little_patch16_reg1_gap_256", "siglip"])
def test_without_a_class_token_there_is_none(name):
    """A register in front of the patches, as in the second, is no class token."""
    if name == "siglip":
        config = transformers.SiglipVisionConfig(**VIT, patch_size=8)
        encoder: ImageEncoder = HuggingFaceEncoder(transformers.SiglipVisionModel(config), 0.5, 0.5, 32)
    else:
        encoder = IMAGE_ENCODERS.build(name, image_size=32)
    encoder.ask_attention(32)
    assert encoder.training
    assert encoder.eval()(torch.randn(1, 1, 32, 32)).attention is None


def test_an_image_encoder_whose_attention_is_not_fused_is_one_line():
    encoder = IMAGE_ENCODERS.build("vit_tiny_patch16_224", image_size=32)
    for block in encoder.model.blocks:
        block.attn.fused_attn = False
    with pytest.raises(SistaError, match="image encoder 'vit_tiny_patch16_224': the attention") as error:
        encoder.ask_attention(32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tokens", [False, True])
def test_heads_pass_it_on(tokens):
    attention = torch.rand(2, 4)
    head = ProjectionHead(6, 5, out=4, hidden=8)
    given = Features(torch.randn(2, 6), torch.randn(2, 4, 5), attention=attention)
    assert head(given, tokens).attention is attention
    given.attention = None
    assert head(given, tokens).attention is None


def test_roll_out_step_by_step():
    draw = np.random.default_rng(0)
    layers = [draw.random((6, 6)) for _ in range(3)]
    layers = [layer / layer.sum(1, keepdims=True) for layer in layers]
    rolled = np.eye(6)
    for layer in layers:
        rolled = (0.5 * layer + 0.5 * np.eye(6)) @ rolled
    given = [torch.from_numpy(layer).float() for layer in layers]
    assert np.allclose(roll_out(given, 4), rolled[0, 2:], atol=1e-6)
    assert np.allclose(roll_out(given, 4, class_token=False), rolled[2:, 2:].mean(0), atol=1e-6)
    assert roll_out([], 4) is None
    assert roll_out([*given, torch.eye(5)], 4) is None
