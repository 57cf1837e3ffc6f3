"""The encoders of a checkpoint in the forms that others load (timm, Hugging Face, ONNX, MLflow), checked first.

B images or texts, H W pixels, C input channels, P patches, T sub-word tokens, D encoder dimension, E joint dimension.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from sista_pl.card import card, metrics_of
from sista_pl.checkpoint import read_checkpoint
from sista_pl.embed import Joint, Preparation, open_joint, preparation
from sista_pl.errors import SistaError, did_you_mean
from sista_pl.exported import MARK, file_hash
from sista_pl.models.huggingface import HuggingFaceEncoder
from sista_pl.models.image import IMAGE_ENCODERS, TimmEncoder
from sista_pl.models.text import sum_words
from sista_pl.roundtrip import agree, quiet

SCHEMA = 1
_PROBES = (
    "Small left pleural effusion. No pneumothorax is seen.", "Cardiomegaly", "Linear opacity, 3 cm, in the right lung."
)  # fmt: skip


def export(
    checkpoint: Path, to: str, out: Path, size: int | None = None, register: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write the encoders of a checkpoint as a folder, load it back with the library that it is for, and compare.

    The folder has its name only when all features agree to 1e-5 of their largest value.

    Args:
        checkpoint: of `sista fit --config pretrain.yaml`; for `mlflow` of a classification, too.
        to: `timm` (image encoder), `hf` (both), `onnx` (both) or `mlflow` (image encoder, served).
        out: folder to make.
        size: long side of a film before the crop, where the checkpoint lies apart from its run.
        register: for `mlflow`, `name`, `alias` and `privacy`, to register the model too.

    Returns:
        what stands in its `sista.json`; of `mlflow`, what stands in `metadata` of its MLmodel.

    Raises:
        SistaError: not such a checkpoint, an encoder that has no such form, a folder that exists, features that differ.
    """
    if to not in FORMS:
        raise SistaError(f"export: --to {to}; {did_you_mean(to, FORMS)}")
    if out.exists() or out.is_symlink():
        raise SistaError(f"export: {out} exists; give --out another folder, or delete it")
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        if to == "mlflow":
            from sista_pl.serving import write_mlflow

            facts = write_mlflow(checkpoint, partial, size, register)
            facts["files"] = _files(partial)
        else:
            facts = _write(checkpoint, to, partial, size)
        os.rename(partial, out)
    except OSError as why:
        raise SistaError(f"export: {out} cannot be written ({why.strerror or why}); give --out another folder") from why
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return facts


def _write(checkpoint: Path, to: str, folder: Path, size: int | None) -> dict[str, Any]:
    joint, found = open_joint(checkpoint), read_checkpoint(checkpoint)
    how = preparation(checkpoint, joint.image_size, size)
    folder.mkdir(parents=True)
    with quiet(), torch.no_grad():
        told = WRITERS[to](joint, how, folder)
    _write_heads(joint, folder / "heads.safetensors", ("image",) if to == "timm" else ("image", "text"))
    facts = _facts(found, checkpoint, joint, how, to) | told
    metrics = metrics_of(checkpoint, found)
    facts["phantom"] = metrics.get("phantom")
    (folder / "README.md").write_text(card(facts, metrics), encoding="utf-8")
    mode = (folder / "README.md").stat().st_mode
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)  # safetensors writes for the owner alone
    facts["files"] = _files(folder)
    (folder / MARK).write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n")
    return facts


def _files(folder: Path) -> dict[str, Any]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": file_hash(file)}
        for file in files
    }  # fmt: skip


# --- the forms ----------------------------------------------------------------------


def _timm(joint: Joint, how: Preparation, folder: Path) -> dict[str, Any]:
    if not isinstance(joint.image_encoder, TimmEncoder):
        other = "; use --to hf" if isinstance(joint.image_encoder, HuggingFaceEncoder) else "; use --to onnx"
        raise SistaError(f"export: the image encoder {_name(joint)} is not timm's{other}")
    return {"difference": {"image": write_timm(joint.image_encoder, how, folder)}}


def write_timm(encoder: TimmEncoder, how: Preparation, folder: Path) -> float:
    """Write `model.safetensors` with timm's keys and `config.json` in its hub form, which transformers reads as well.

    Returns:
        the largest difference between the features of the encoder and of the model that timm makes of the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in encoder.model.state_dict().items()},
              folder / "model.safetensors", {"format": "pt"})  # fmt: skip
    base = timm.get_pretrained_cfg(encoder.name)
    kept = ("fixed_input_size", "first_conv", "classifier", "license")
    pretrained = {key: value for key in kept if (value := getattr(base, key, None)) is not None}
    arguments: dict[str, Any] = {"in_chans": encoder.in_chans}
    if pretrained.get("fixed_input_size"):
        arguments["img_size"] = how.crop
    pretrained |= {
        "input_size": [encoder.in_chans, how.crop, how.crop], "interpolation": "lanczos",
        "crop_pct": how.crop / how.size, "crop_mode": "border",
        "mean": encoder.renormalise.mean, "std": encoder.renormalise.std, "num_classes": 0,
    }  # fmt: skip
    config = {"architecture": encoder.name, "num_classes": 0, "num_features": encoder.dim, "model_args": arguments,
              "pretrained_cfg": pretrained}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    probe = _probe(how.crop)
    given = encoder.renormalise(probe)
    return agree("timm", {
        "pooled": (encoder(probe).pooled, again(given)),
        "map": (encoder.model.forward_features(given), again.forward_features(given)),
    })  # fmt: skip


def _hf(joint: Joint, how: Preparation, folder: Path) -> dict[str, Any]:
    from transformers import AutoModel

    encoder, probe = joint.image_encoder, _probe(how.crop)
    if isinstance(encoder, TimmEncoder):
        write_timm(encoder, how, folder / "image")
    elif isinstance(encoder, HuggingFaceEncoder):
        # the names of this major version, which `weights:` compares; the library would write those of older ones
        encoder.model.save_pretrained(folder / "image", save_original_format=False)
        mean, std = encoder.renormalise.mean, encoder.renormalise.std
        # the pixels come from elsewhere: the library has no resize that pads with black
        stated = {"image_processor_type": "ViTImageProcessor", "do_resize": False, "do_rescale": True,
                  "do_normalize": True, "image_mean": mean, "image_std": std,
                  "size": {"height": how.crop, "width": how.crop}}  # fmt: skip
        (folder / "image" / "preprocessor_config.json").write_text(json.dumps(stated, indent=2) + "\n")
    else:
        raise SistaError(
            f"export: the image encoder {_name(joint)} is neither timm's nor Hugging Face's; use --to onnx"
        )
    again = AutoModel.from_pretrained(folder / "image").eval()
    again = getattr(again, "vision_model", again) if isinstance(encoder, HuggingFaceEncoder) else again
    given = encoder.renormalise(probe)
    if isinstance(encoder, TimmEncoder):
        found = again(given)
        pairs = {"pooled": (encoder(probe).pooled, found.pooler_output),
                 "map": (encoder.model.forward_features(given), found.last_hidden_state)}  # fmt: skip
    else:
        pairs = {"map": (encoder.model(given, **encoder.options).last_hidden_state,
                         again(given, **encoder.options).last_hidden_state)}  # fmt: skip
    image = agree("transformers", pairs)
    return {"difference": {"image": image, "text": _write_text(joint, folder / "text")}}


def _write_text(joint: Joint, folder: Path) -> float:
    """Write the text encoder with its tokenizer; the largest difference of what transformers makes of it."""
    from transformers import AutoModel, AutoTokenizer, PreTrainedModel

    encoder = joint.text_encoder
    if not isinstance(encoder.model, PreTrainedModel):
        raise SistaError(f"export: the text encoder is a {type(encoder.model).__name__} and not Hugging Face's; --to "
                         "onnx takes any")  # fmt: skip
    encoder.model.save_pretrained(folder)
    tokens = encoder.tokenize(list(_PROBES)).batch(range(len(_PROBES)))
    _tokenizer(joint).save_pretrained(folder)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    given = tokenizer(list(_PROBES), padding=True, truncation=True, return_tensors="pt")
    if not torch.equal(given["input_ids"], tokens["input_ids"]):
        raise SistaError(
            f"export: {type(tokenizer).__name__} of transformers {version('transformers')} cuts texts otherwise than "
            "the encoder was trained with; use --to onnx, which keeps the tokenizer as a file"
        )
    asked = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    real = tokens["attention_mask"].bool()
    before, after = (side(**asked).last_hidden_state[real] for side in (encoder.model, model))
    return agree("transformers", {"text": (before, after)})


def _tokenizer(joint: Joint) -> Any:
    """Return the encoder's tokenizer as transformers has it, with the roles of its special tokens."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    encoder = joint.text_encoder
    if encoder.tokenizer is None:
        raise SistaError("export: the text encoder has no tokenizer; take a checkpoint that `sista fit` wrote")
    own = Tokenizer.from_str(encoder.tokenizer.to_str())
    own.no_truncation()
    own.no_padding()
    ends, vocabulary = own.encode("").tokens, own.get_vocab()
    roles = {"unk_token": getattr(own.model, "unk_token", None),
             "pad_token": own.id_to_token(getattr(encoder.model.config, "pad_token_id", None) or 0),
             "cls_token": ends[0] if ends else None, "sep_token": ends[-1] if len(ends) > 1 else None,
             "mask_token": next((name for name in ("[MASK]", "<mask>") if name in vocabulary), None)}  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=own, model_max_length=encoder.max_tokens, padding_side="right",
        model_input_names=["input_ids", "attention_mask"], **{k: v for k, v in roles.items() if v is not None},
    )  # fmt: skip


class ImageGraph(nn.Module):
    """(B, 1, H, W) in [-1, 1] → pooled (B, D), local (B, P, D), joint (B, E) and joint_local (B, P, E), unit rows."""

    def __init__(self, joint: Joint):
        super().__init__()
        self.encoder, self.head = joint.image_encoder, joint.image_head

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        found = self.encoder(image)
        joint = self.head(found)
        return found.pooled, found.local, normalize(joint.pooled, dim=-1), normalize(joint.local, dim=-1)


class TextGraph(nn.Module):
    """input_ids, attention_mask, word_index (B, T) → pooled (B, D), local (B, T, D), joint (B, E), joint_local.

    Word j of a text, the sum of the sub-words whose `word_index` is j, is in place j of `local`; the rest is 0.
    """

    def __init__(self, joint: Joint):
        super().__init__()
        self.encoder, self.head = joint.text_encoder, joint.text_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor, word_index: Tensor) -> tuple[Tensor, ...]:
        # each token stands for a word's place: as many places as tokens, so that no length comes from the data
        ones = sum_words(attention_mask.unsqueeze(-1).float(), word_index, input_ids.shape[1]).squeeze(-1)
        found = self.encoder({"input_ids": input_ids, "attention_mask": attention_mask, "word_index": word_index,
                              "word_ids": (ones > 0).long()})  # fmt: skip
        joint = self.head(found)
        return found.pooled, found.local, normalize(joint.pooled, dim=-1), normalize(joint.local, dim=-1)


# not `embedding`: a graph of BERT has that name inside
_OUTPUTS = ("pooled", "local", "joint", "joint_local")


def _onnx(joint: Joint, how: Preparation, folder: Path) -> dict[str, Any]:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as why:
        raise SistaError(f"export: --to onnx needs the package {why.name}; pip install 'sista-pl[onnx]'") from None
    images = [(_probe(how.crop, count),) for count in (2, 1, 3)]
    texts = []
    for count in (3, 1, 2):
        tokens = joint.text_encoder.tokenize(list(_PROBES)).batch(range(count))
        texts.append(tuple(tokens[name] for name in ("input_ids", "attention_mask", "word_index")))
    difference = {}
    for name, graph, given in (("image", ImageGraph(joint), images), ("text", TextGraph(joint), texts)):
        names = ["image"] if name == "image" else ["input_ids", "attention_mask", "word_index"]
        batch, length = torch.export.Dim("batch"), torch.export.Dim("tokens")
        dynamic = tuple({0: batch} if name == "image" else {0: batch, 1: length} for _ in names)
        torch.onnx.export(graph.eval(), given[0], folder / f"{name}.onnx", input_names=names,
                          output_names=list(_OUTPUTS), dynamic_shapes=dynamic, opset_version=18,
                          external_data=False, dynamo=True)  # fmt: skip
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        pairs = {}
        for probe in given:
            found = session.run(list(_OUTPUTS), {key: x.numpy() for key, x in zip(names, probe, strict=True)})
            for key, before, after in zip(_OUTPUTS, graph(*probe), found, strict=True):
                pairs[f"{key} of {len(probe[0])}"] = (before, torch.from_numpy(after))
        difference[name] = agree("onnxruntime", pairs)
    assert joint.text_encoder.tokenizer is not None
    joint.text_encoder.tokenizer.no_padding()
    joint.text_encoder.tokenizer.save(str(folder / "tokenizer.json"))
    return {"difference": difference}


WRITERS: dict[str, Callable[[Joint, Preparation, Path], dict[str, Any]]] = {"timm": _timm, "hf": _hf, "onnx": _onnx}
FORMS = (*WRITERS, "mlflow")


def _write_heads(joint: Joint, file: Path, sides: tuple[str, ...]) -> None:
    """Write the projections, `{image,text}.{pooled,local}.…`; the formula is in the file's metadata and the card."""
    tensors: dict[str, Tensor] = {}
    for side in sides:
        head = joint.image_head if side == "image" else joint.text_head
        tensors |= {f"{side}.{k}": v.detach().cpu().contiguous() for k, v in head.state_dict().items()}
    save_file(tensors, file, {"format": "pt", "formula": "outer_norm(outer · relu(inner_norm(inner · x)))"})


# --- checks and facts ---------------------------------------------------------------


def _probe(crop: int, count: int = 2) -> Tensor:
    """Return images that differ everywhere, (count, 1, crop, crop) in [-1, 1]."""
    return torch.rand(count, 1, crop, crop, generator=torch.Generator().manual_seed(0)) * 2 - 1


def _name(joint: Joint) -> str:
    return repr(getattr(joint.image_encoder, "name", type(joint.image_encoder).__name__))


def _facts(found: Mapping[str, Any], path: Path, joint: Joint, how: Preparation, to: str) -> dict[str, Any]:
    image, text = joint.image_encoder, joint.text_encoder
    renormalise = getattr(image, "renormalise", None)
    needs = {"hf": ["transformers"], "onnx": ["onnxruntime"]}.get(to, [])
    if to == "timm" or (to == "hf" and isinstance(image, TimmEncoder)):
        needs.append("timm")
    data: dict[str, Any] = next((v for v in found.values() if isinstance(v, dict) and {"data", "split"} <= set(v)), {})
    hyper = found["hyper_parameters"]
    return {
        "schema": SCHEMA, "format": to, "created_by": f"sista-pl {version('sista-pl')}",
        "needs": {name: version(name) for name in needs},
        "image": {
            "encoder": _spec(joint, hyper["image_encoder"]), "size": how.crop,
            "channels": getattr(renormalise, "channels", 1), "mean": getattr(renormalise, "mean", [0.5]),
            "std": getattr(renormalise, "std", [0.5]), "dim": image.dim, "local_dim": image.local_dim,
            "resize": {"long_side": how.size, "filter": "lanczos", "pad": 0, "crop": how.crop, "known": how.told},
        },
        "text": {"encoder": getattr(getattr(text.model, "config", None), "model_type", None),
                 "dim": text.dim, "max_tokens": text.max_tokens, "pooling": text.pooling, "normalize": how.normalize,
                 "tokenizer": {"hf": "text/tokenizer.json", "onnx": "tokenizer.json"}.get(to),
                 "tokenizer_sha256": _text_hash(text.tokenizer)},
        "joint": {"dim": hyper["embed_dim"], "hidden": hyper["head_hidden"], "norm": hyper["head_norm"], "eps": 1e-5,
                  "scale": joint.scale, "tokens_trained": joint.tokens_trained},
        "losses": hyper["losses"],
        "checkpoint": {"sha256": file_hash(path), "epoch": found.get("epoch"), "step": found.get("global_step")},
        "data": {"sha256": data.get("data"), "split": data.get("split")},
        "versions": {name: version(name) for name in ("torch", "timm", "transformers", "tokenizers", "safetensors")},
    }  # fmt: skip


def _spec(joint: Joint, spec: Any) -> dict[str, Any]:
    """Return the image encoder's spec as a configuration takes it, with no path in it."""
    encoder = joint.image_encoder
    if hasattr(encoder, "config") and not isinstance(encoder, TimmEncoder):
        return {"name": "hf", "config": encoder.config}
    if isinstance(encoder, TimmEncoder):
        return {"name": encoder.name, "in_chans": encoder.in_chans,
                "mean": encoder.renormalise.mean, "std": encoder.renormalise.std}  # fmt: skip
    name, arguments = IMAGE_ENCODERS.split(spec)
    return {"name": name, **{k: v for k, v in arguments.items() if k not in ("weights", "path")}}


def _text_hash(tokenizer: Any) -> str | None:
    return None if tokenizer is None else hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
