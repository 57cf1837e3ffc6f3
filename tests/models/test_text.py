"""Text encoders: words out of sub-words, a tokenizer inside the checkpoint, Hugging Face folders."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sista_pl.errors import SistaError
from sista_pl.models import TEXT_ENCODERS
from sista_pl.models.text import TextEncoder, from_state, small_bert, sum_words, train_wordpiece
from sista_pl.similarity_map import content_words
from sista_pl.words import word_id

CORPUS = [
    "No pleural effusion. The heart is enlarged.",
    "Heart size is normal. The lungs are clear.",
    "Small left pleural effusion with adjacent atelectasis.",
] * 4


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    encoder = TEXT_ENCODERS.build({"name": "small-bert", "layers": 1, "dim": 32, "vocab_size": 120}).eval()
    encoder.fit(CORPUS)
    return encoder


def test_words_carry_identity_and_negation(encoder):
    table = encoder.tokenize(["No pleural effusion, but the heart is enlarged.", "Pleural effusion."])
    ids = table.batch([0, 1])["word_ids"]
    assert ids[0].tolist()[2] == -word_id("effusion"), "negated"
    assert word_id("enlarged") in ids[0].tolist(), "affirmed after `but`, and punctuation is no word"
    assert ids[1].tolist()[:3] == [word_id("pleural"), word_id("effusion"), 0]


def test_batch_pads_to_the_longest_and_equals_one_by_one(encoder):
    table = encoder.tokenize(CORPUS[:3])
    batch = encoder(table.batch([0, 1, 2]))
    for row in range(3):
        alone = encoder(table.batch([row]))
        words = alone.local.shape[1]
        assert torch.allclose(batch.local[row, :words], alone.local[0], atol=1e-5)
        assert torch.allclose(batch.pooled[row], alone.pooled[0], atol=1e-5)
        assert not batch.mask[row, words:].any()


def test_parts_of_like_length_equal_the_batch_as_one(encoder):
    texts = ["Heart.", "No effusion. " * 7, "The heart is enlarged.", *CORPUS[:3], "Clear.", "Lungs are clear. " * 4]
    batch = encoder.tokenize(texts).batch(range(len(texts)))
    whole = encoder.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    shapes = []
    hook = encoder.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = encoder(batch)
    hook.remove()
    real = batch["attention_mask"].unsqueeze(-1)
    assert torch.allclose(found.pooled, (whole * real).sum(1) / real.sum(1), atol=1e-5)
    expected = sum_words(whole, batch["word_index"], batch["word_ids"].shape[1])
    assert torch.allclose(found.local, expected, atol=1e-5)
    assert [rows for rows, _ in shapes] == [2, 2, 2, 2]
    assert sum(rows * length for rows, length in shapes) < 0.7 * batch["input_ids"].numel(), "less padding"


def test_sum_words_equals_a_loop():
    torch.manual_seed(0)
    hidden = torch.randn(2, 6, 3)
    index = torch.tensor([[-1, 0, 0, 1, 2, -1], [-1, 0, 1, 1, 1, -1]])
    expected = torch.zeros(2, 3, 3)
    for b in range(2):
        for t in range(6):
            if index[b, t] >= 0:
                expected[b, index[b, t]] += hidden[b, t]
    assert torch.allclose(sum_words(hidden, index, 3), expected)


def test_tokenizer_is_deterministic_and_truncates(encoder):
    assert len({train_wordpiece(CORPUS, 120).to_str() for _ in range(5)}) == 1
    with pytest.raises(SistaError, match="vocab_size is 20"):
        train_wordpiece(CORPUS, 20)
    table = encoder.tokenize(["effusion " * 500, ""])
    assert table.truncated == 1
    assert table.batch([0])["input_ids"].shape[1] == encoder.max_tokens
    features = encoder(table.batch([1]))
    assert torch.isfinite(features.pooled).all()
    assert not features.mask.any()


def test_state_dict_brings_the_tokenizer(encoder):
    state = encoder.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    other = TEXT_ENCODERS.build({"name": "small-bert", "layers": 1, "dim": 32, "vocab_size": 120}).eval()
    assert other.tokenizer is None
    other.load_state_dict(state)
    rebuilt = from_state(state["_extra_state"], pooling="mean").eval()
    rebuilt.load_state_dict(state)
    expected = encoder(encoder.tokenize(CORPUS[:2]).batch([0, 1])).pooled
    for again in (other, rebuilt):
        assert torch.equal(again(again.tokenize(CORPUS[:2]).batch([0, 1])).pooled, expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("bert")
    tokenizer = train_wordpiece(CORPUS, 120)
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    config = BertConfig(
        vocab_size=120, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(path)
    return path


def test_hugging_face_folder_with_layer_cut(folder):
    encoder = TEXT_ENCODERS.build({"name": str(folder), "layers": 2, "pooling": "cls"})
    assert len(encoder.model.encoder.layer) == 2
    features = encoder(encoder.tokenize(CORPUS[:2]).batch([0, 1]))
    (features.pooled.square().sum() + features.local.square().sum()).backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


def test_half_precision_weights_are_trained_in_full(folder, tmp_path):
    from transformers import AutoModel

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    AutoModel.from_pretrained(folder).half().save_pretrained(tmp_path)
    encoder = TEXT_ENCODERS.build(str(tmp_path))
    state = encoder.state_dict()
    stored = json.loads(bytes(state["_extra_state"].numpy().tobytes()))
    stored["config"]["dtype"] = "float16"  # as a checkpoint of before has it
    again = from_state(torch.frombuffer(bytearray(json.dumps(stored).encode()), dtype=torch.uint8), pooling="cls")
    again.load_state_dict(state)
    for each in (encoder, again):
        assert {p.dtype for p in each.parameters()} == {torch.float32}
    table = encoder.eval().tokenize(CORPUS[:2]).batch([0, 1])
    assert torch.equal(encoder(table).pooled, again.eval()(table).pooled)


def test_weights_of_other_names_are_refused(folder, tmp_path):
    """They would leave each tensor as it was drawn."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    state = load_file(folder / "model.safetensors")
    save_file({f"text.tower.{name}": value for name, value in state.items()}, tmp_path / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    with pytest.raises(SistaError, match=r"its weights lack \d+ tensors \(first: embeddings\..*is it of this model"):
        TEXT_ENCODERS.build(str(tmp_path))


def test_word_order_matters(folder):
    encoder = TEXT_ENCODERS.build(str(folder)).eval()
    table = encoder.tokenize(["left effusion right", "right effusion left"])
    a, b = encoder(table.batch([0, 1])).pooled
    assert not torch.allclose(a, b, atol=1e-6)


def test_frozen_means_no_gradient_and_eval_mode(folder):
    encoder = TEXT_ENCODERS.build({"name": str(folder), "frozen": True}).train()
    assert not encoder.model.training
    assert not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ({"name": "small-bert", "dim": 50}, "multiple of 32"),
        ({"name": "small-bert", "pooling": "max"}, "pooling is 'max'"),
        ({"name": "small-bert", "max_tokens": 1}, "max_tokens is 1"),
        ("nobody/no-such-model", "give a local folder"),
        ("smal-bert", "did you mean small-bert"),
    ],
)
def test_bad_specs_are_one_line(spec, line, monkeypatch):
    monkeypatch.setattr("sista_pl.models.hub.reachable", lambda: False)
    with pytest.raises(SistaError) as error:
        TEXT_ENCODERS.build(spec)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_too_many_layers(folder):
    with pytest.raises(SistaError, match="layers is 9; it has 3"):
        TEXT_ENCODERS.build({"name": str(folder), "layers": 9})


def test_folder_without_a_model(tmp_path):
    with pytest.raises(SistaError, match="that folder can't be loaded"):
        TEXT_ENCODERS.build(str(tmp_path))


def test_models_that_count_positions_from_after_padding_take_fewer_tokens():
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=32,
        max_position_embeddings=34, pad_token_id=1,
    )  # fmt: skip
    model = RobertaModel(config, add_pooling_layer=False)
    encoder = TextEncoder(model, None, 32, "mean", False).eval()
    ids = torch.full((1, 32), 5)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "word_index": ids * 0, "word_ids": ids[:, :1]}
    assert encoder(batch).pooled.isfinite().all(), "as many as it says do fit"
    with pytest.raises(SistaError, match="max_tokens is 33; this model takes 4 to 32"):
        TextEncoder(model, None, 33, "mean", False)


def test_no_part_of_an_x_ray_names_something_to_look_for():
    encoder = small_bert(layers=1, dim=32)
    encoder.fit(["chest x-ray shows an effusion"] * 3)
    ids = encoder.tokenize(["Chest X-ray: effusion"]).batch([0])["word_ids"]
    assert ids[0][content_words(ids)[0]].tolist() == [word_id("effusion")]
