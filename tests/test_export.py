"""`sista export`: each folder is read here by the library that it is for, without SISTA, and compared once more."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from sista_pl import export as module
from sista_pl.card import card
from sista_pl.cli import main
from sista_pl.embed import open_joint
from sista_pl.errors import SistaError
from sista_pl.models import IMAGE_ENCODERS
from sista_pl.models.image import Renormalise
from sista_pl.pretrain import PretrainTask
from sista_pl.weights import encoder_spec, load_weights

REPORTS = ["Small left pleural effusion. No pneumothorax is seen."] * 3 + ["Right lung opacity, linear."] * 3


def checkpoint(path, image_encoder, size=32, **more):
    """Write what `sista fit` would: random weights, batch statistics that are none of the defaults."""
    torch.manual_seed(0)
    task = PretrainTask(
        {"instance": "clip", "token": {"name": "sta", "weight": 1.0}}, image_encoder, image_size=size, embed_dim=8,
        text_encoder={"name": "small-bert", "layers": 1, "dim": 32, "vocab_size": 120}, head_hidden=16, **more,
    )  # fmt: skip
    task.text_encoder.fit(REPORTS)
    for layer in task.modules():
        if getattr(layer, "running_mean", None) is not None:
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams), "epoch": 2, "global_step": 9,
         "PairDataModule": {"place": {}, "data": "ab" * 32, "split": {"name": "official", "sha256": "cd" * 32}}},
        path,
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def ckpt(folder):
    """A checkpoint in its run: configuration and figures lie where `sista fit` leaves them."""
    run = folder / "runs" / "tiny" / "0001"
    found = checkpoint(run / "checkpoints" / "best.ckpt", "resnet10t")
    (run / "config.yaml").write_text("data:\n  init_args:\n    size: 40\n    text: {normalize: mgca}\n")
    figure = {"value": 0.25, "interval95": [0.125, 0.5], "n": 77}
    (run / "metrics.json").write_text(
        json.dumps({"phantom": "PHANTOM DATA: drawn", "best": {"intervals": {"val/R_mean": figure}},
                    "data": {"source": "mimic_cxr 2.1.0", "rows": {"train": 5}}})
    )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def exported(folder, ckpt):
    assert main(["export", "--ckpt_path", str(ckpt), "--to", "timm", "--out", str(folder / "timm")]) == 0
    return folder / "timm"


def films(count=2, size=32):
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(5)) * 2 - 1


def close(a, b):
    return float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


@torch.no_grad()
def test_timm_makes_the_same_encoder(ckpt, exported):
    joint, image = open_joint(ckpt), films()
    expected = joint.image_encoder(image).pooled
    model = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    assert close(model(image), expected)
    maps = model.forward_intermediates(image, intermediates_only=True)
    assert all(close(a, b) for a, b in zip(maps, joint.image_encoder.pyramid(image)[1:], strict=True))
    file = {"file": str(exported / "model.safetensors"), "input_size": (1, 32, 32)}
    model = timm.create_model("resnet10t", pretrained=True, pretrained_cfg_overlay=file, num_classes=0, in_chans=1)
    assert close(model.eval()(image), expected)
    config = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{exported}"))
    assert config["input_size"] == (1, 32, 32)
    assert (config["mean"], config["crop_pct"]) == ([0.5], 32 / 40)


@torch.no_grad()
def test_the_heads_are_what_the_card_says(ckpt, exported):
    """The formula of the card, by hand."""
    joint, head = open_joint(ckpt), load_file(exported / "heads.safetensors")
    x = joint.image_encoder(films()).pooled
    for name in ("inner", "outer"):
        x = x @ head[f"image.pooled.{name}.weight"].T
        norm = f"image.pooled.{name}_norm."
        x = (x - head[norm + "running_mean"]) / (head[norm + "running_var"] + 1e-5).sqrt()
        if name == "inner":
            x = (x * head[norm + "weight"] + head[norm + "bias"]).relu()
    assert close(x, joint.encode_image(films()).pooled)


def test_the_facts_and_the_card(ckpt, exported):
    facts, text = json.loads((exported / "sista.json").read_text()), (exported / "README.md").read_text()
    assert facts["image"]["resize"] | {"known": ""} == {
        "long_side": 40, "filter": "lanczos", "pad": 0, "crop": 32, "known": ""
    }  # fmt: skip
    assert facts["data"]["split"]["name"] == "official"
    assert facts["text"]["normalize"] == "mgca"
    assert set(facts["files"]) == {"README.md", "config.json", "heads.safetensors", "model.safetensors"}
    for told in ("PHANTOM DATA", "0.250 | 0.125 to 0.500 | 77", "Not for clinical use", "ab" * 32, "mimic_cxr 2.1.0"):
        assert told in text
    bare = card(facts | {"phantom": None}, {})
    assert "None were kept" in bare
    assert "is not known" in bare


def test_an_exported_folder_is_weights(ckpt, exported, tmp_path):
    encoder = IMAGE_ENCODERS.build(encoder_spec(exported), image_size=32).eval()
    assert load_weights(encoder, exported, minimum=1.0).share == 1
    assert torch.equal(encoder(films()).pooled, open_joint(ckpt).image_encoder(films()).pooled)
    (exported / "README.md").write_text("a card of our own\n")
    load_weights(encoder, exported)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda f: save_file({"a": torch.ones(1)}, f / "model.safetensors"), "model.safetensors was changed"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "sista.json").write_text("{"), "can't be read"),
        (lambda f: retold(f, needs={"timm": "99.1"}), "exported with timm 99.1"),
        (lambda f: retold(f, format="onnx"), "of ONNX"),
    ],
)
def test_a_changed_folder_is_refused_in_one_line(exported, tmp_path, change, why):
    shutil.copytree(exported, tmp_path / "copy")
    change(tmp_path / "copy")
    encoder = IMAGE_ENCODERS.build("resnet10t", image_size=32)
    with pytest.raises(SistaError, match=why):
        load_weights(encoder, tmp_path / "copy")


def retold(folder, **facts):
    file = folder / "sista.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))


@torch.no_grad()
def test_transformers_makes_both_encoders(ckpt, folder):
    from transformers import AutoModel, AutoTokenizer

    out = folder / "hf"
    assert main(["export", "--ckpt_path", str(ckpt), "--to", "hf", "--out", str(out)]) == 0
    joint, image = open_joint(ckpt), films()
    found = AutoModel.from_pretrained(out / "image").eval()(image)
    assert close(found.pooler_output, joint.image_encoder(image).pooled)
    tokenizer, text = AutoTokenizer.from_pretrained(out / "text"), AutoModel.from_pretrained(out / "text").eval()
    tokens = joint.text_encoder.tokenize(REPORTS[2:4]).batch([0, 1])
    given = tokenizer(REPORTS[2:4], padding=True, return_tensors="pt")
    assert torch.equal(given["input_ids"], tokens["input_ids"])
    assert (tokenizer.pad_token, tokenizer.cls_token, tokenizer.model_max_length) == ("[PAD]", "[CLS]", 112)
    hidden = text(**given).last_hidden_state
    real = given["attention_mask"].unsqueeze(-1)
    assert close((hidden * real).sum(1) / real.sum(1), joint.text_features(REPORTS[2:4]).pooled)
    encoder = IMAGE_ENCODERS.build(encoder_spec(out), image_size=32)
    assert load_weights(encoder, out / "image", minimum=1.0).share == 1


@torch.no_grad()
def test_a_tower_of_hugging_face(tmp_path):
    """Its own names and normalisation survive, and it is weights again without the folder that it came from."""
    from transformers import AutoModel, ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16
    )  # fmt: skip
    ViTModel(config).save_pretrained(tmp_path / "vit")
    ckpt = checkpoint(tmp_path / "vit.ckpt", f"hf:{tmp_path / 'vit'}")
    shutil.rmtree(tmp_path / "vit")
    out = tmp_path / "out"
    assert module.export(ckpt, "hf", out)["difference"]["image"] <= 1e-5
    joint = open_joint(ckpt)
    given = joint.image_encoder.renormalise(films())
    found = AutoModel.from_pretrained(out / "image", add_pooling_layer=False).eval()(given)
    assert close(found.last_hidden_state[:, 1:], joint.image_encoder(films()).local)
    encoder = IMAGE_ENCODERS.build(encoder_spec(out), image_size=32).eval()
    load_weights(encoder, out, minimum=1.0)
    assert close(encoder(films()).pooled, joint.image_encoder(films()).pooled)
    with pytest.raises(SistaError, match=r"it holds vit; --model\.image_encoder null builds it"):
        load_weights(IMAGE_ENCODERS.build("resnet10t", image_size=32), out)
    encoder.renormalise = Renormalise(3, 0.4)
    with pytest.raises(SistaError, match=r"the image encoder has \[0\.4, 0\.4, 0\.4\]"):
        load_weights(encoder, out)
    with pytest.raises(SistaError, match="is not timm's; use --to hf"):
        module.export(ckpt, "timm", tmp_path / "timm")


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet10t", {"name": "vit_tiny_patch16_224", "in_chans": 3, "mean": 0.4}])
def test_onnxruntime_gives_the_same_numbers_for_any_batch(tmp_path, name):
    import onnxruntime
    from tokenizers import Tokenizer

    ckpt, out = checkpoint(tmp_path / "a.ckpt", name), tmp_path / "onnx"
    module.export(ckpt, "onnx", out)
    joint, unit = open_joint(ckpt), torch.nn.functional.normalize
    for count in (1, 5):
        session = onnxruntime.InferenceSession(out / "image.onnx", providers=["CPUExecutionProvider"])
        found = [torch.from_numpy(x) for x in session.run(None, {"image": films(count).numpy()})]
        plain, projected = joint.image_encoder(films(count)), joint.encode_image(films(count))
        expected = [plain.pooled, plain.local, unit(projected.pooled, dim=-1), unit(projected.local, dim=-1)]
        assert all(close(a, b) for a, b in zip(found, expected, strict=True))
    one = Tokenizer.from_file(str(out / "tokenizer.json")).encode(REPORTS[0])
    rows = {"input_ids": one.ids, "attention_mask": one.attention_mask,
            "word_index": joint.text_encoder.tokenize(REPORTS[:1]).batch([0])["word_index"][0].tolist()}  # fmt: skip
    session = onnxruntime.InferenceSession(out / "text.onnx", providers=["CPUExecutionProvider"])
    found = [torch.from_numpy(x) for x in session.run(None, {k: np.array([row]) for k, row in rows.items()})]
    plain, projected = joint.text_features(REPORTS[:1]), joint.encode_text(REPORTS[:1])
    words = plain.local.shape[1]
    assert close(found[0], plain.pooled)
    assert close(found[1][:, :words], plain.local)
    assert close(found[2], unit(projected.pooled, dim=-1))
    assert close(found[3][:, :words], unit(projected.local, dim=-1))
    assert not found[3][:, words:].any()
    with pytest.raises(SistaError, match="of ONNX"):
        load_weights(joint.image_encoder, out)


def test_features_that_differ_leave_nothing(ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sista_pl.roundtrip.TOLERANCE", -1.0)
    assert main(["export", "--ckpt_path", str(ckpt), "--to", "timm", "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "read back by timm" in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_one_line(ckpt, tmp_path, capsys):
    torch.save({"state_dict": {}, "hyper_parameters": {"image_encoder": "resnet10t"}}, tmp_path / "cls.ckpt")
    out = tmp_path / "out"
    for arguments, why in (
        ((ckpt, "torch", out), "did you mean|known: hf, mlflow, onnx, timm"),
        ((ckpt, "timm", tmp_path), "exists"),
        ((tmp_path / "no.ckpt", "timm", out), "no such file"),
        ((tmp_path / "cls.ckpt", "timm", out), "without a text encoder"),
    ):
        with pytest.raises(SistaError, match=why):
            module.export(*arguments)
    with pytest.raises(SistaError, match="give 32 or more"):
        module.export(ckpt, "timm", out, size=8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cls.ckpt"]
