"""The model card of an exported folder: its facts, and the figures of its run with their intervals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sista_pl.errors import SistaError
from sista_pl.runs import run_of

NAMES = {"timm": "timm", "hf": "Hugging Face", "onnx": "ONNX"}
_USE = {
    "timm": """\
import timm

model = timm.create_model("local-dir:DIR", pretrained=True).eval()  # channels and size stand in config.json
pooled, features = model(x), model.forward_features(x)  # x: (B, {channels}, {size}, {size})
""",
    "hf": """\
from transformers import AutoModel, AutoTokenizer

image, text = AutoModel.from_pretrained("DIR/image").eval(), AutoModel.from_pretrained("DIR/text").eval()
tokenizer = AutoTokenizer.from_pretrained("DIR/text")
features = image(x).last_hidden_state  # x: (B, {channels}, {size}, {size})
tokens = text(**tokenizer(["Small left effusion."], return_tensors="pt")).last_hidden_state  # no pooler was trained
""",
    "onnx": """\
import numpy as np, onnxruntime, tokenizers

image, text = onnxruntime.InferenceSession("DIR/image.onnx"), onnxruntime.InferenceSession("DIR/text.onnx")
pooled, local, joint, joint_local = image.run(None, {{"image": x}})  # x: (B, 1, {size}, {size})
one = tokenizers.Tokenizer.from_file("DIR/tokenizer.json").encode("Small left effusion.")
words = [-1 if place is None else place for place in one.word_ids]  # which tokens are summed into which word
rows = {{"input_ids": one.ids, "attention_mask": one.attention_mask, "word_index": words}}
report, *_ , report_joint, words_joint = text.run(None, {{name: np.array([row]) for name, row in rows.items()}})
cosine = joint @ report_joint.T  # both have length 1
""",
}
_PREPARE = """\
from PIL import Image, ImageOps
import numpy as np

film = ImageOps.pad(Image.open(FILE).convert("L"), ({long}, {long}), Image.Resampling.LANCZOS, color=0)
film = film.crop(({off}, {off}, {end}, {end}))
x = (np.asarray(film, np.float32) / 255 - {mean}) / {std}  # then as (B, {channels}, {size}, {size})
"""


def card(facts: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Return the card as Markdown.

    Args:
        facts: what `sista.json` holds, without its `files`.
        metrics: the run's metrics.json, that of its test under `test`; or what the checkpoint keeps of it; or nothing.
    """
    image, text, joint = facts["image"], facts["text"], facts["joint"]
    size, resize = image["size"], image["resize"]
    # an ONNX graph brings its input to the encoder's normalisation itself
    ours = facts["format"] == "onnx"
    channels, mean, std = (1, 0.5, 0.5) if ours else (image["channels"], _one(image["mean"]), _one(image["std"]))
    off = (resize["long_side"] - size) // 2
    use = _USE[facts["format"]].format(channels=channels, size=size)
    prepare = _PREPARE.format(long=resize["long_side"], off=off, end=off + size, mean=mean, std=std, channels=channels,
                              size=size)  # fmt: skip
    differences = ", ".join(f"{side} {value:.1e}" for side, value in facts["difference"].items())
    lines = [
        f"# Chest X-ray image-report encoder, for {NAMES[facts['format']]}",
        "",
        *phantom_lines(facts["phantom"]),
        f"An image encoder (`{image['encoder']['name']}`, {size} px) and a text encoder, pre-trained by "
        f"{facts['created_by']} on pairs of chest X-rays and reports. **Not for clinical use**: for research, and for "
        "labelling nothing that a patient depends on.",
        "",
        "## Use",
        f"```python\n{use}```",
        "A film is read grey, bones white; its long side is brought to "
        f"{resize['long_side']} px ({resize['known']}), padded with black to a square, and the middle {size} px are "
        f"taken:\n```python\n{prepare}```",
        *(
            ["`timm.data.create_transform` pads with the mean, mid-grey, where the training had black."]
            if not ours
            else []
        ),
        "",
        "`heads.safetensors` holds the projections into the joint space, `image.pooled.*`, `image.local.*`"
        + (", `text.pooled.*`, `text.local.*`" if facts["format"] != "timm" else "")
        + ": y = outer_norm(outer.weight · relu(inner_norm(inner.weight · x))), then divided by its length. "
        + _norm(joint),
        *(
            []
            if joint["tokens_trained"]
            else [
                "No loss of its training compares patches with words: the `local` "
                "projections are as they were drawn at random."
            ]
        ),
        "",
        "Checked at export, read back by "
        + " and ".join(f"{name} {number}" for name, number in facts["needs"].items())
        + f": largest difference of a feature, as a share of the largest value: {differences}. `sista.json` has the "
        "SHA-256 of each file, and `weights: DIR` of SISTA refuses a changed one.",
        "",
        "## Data",
        *data_lines(facts, metrics),
        "",
        "## Recipe",
        f"Losses: `{json.dumps(facts['losses'])}`; epoch {facts['checkpoint']['epoch']}, step "
        f"{facts['checkpoint']['step']}; joint space of {joint['dim']}, logit scale {joint['scale']:.2f}; reports up "
        f"to {text['max_tokens']} tokens, {text['pooling']} pooling. Checkpoint SHA-256 "
        f"`{facts['checkpoint']['sha256']}`.",
        "",
        "## Figures",
        *figure_lines(metrics),
        "",
        "## Limits",
        "* It was pre-trained on the data above: other scanners, views, countries, ages and report styles may do "
        "worse, and nobody has measured how much worse.",
        "* Retrieval figures are of this split and this pool; they are no accuracy of a diagnosis.",
        "* A similarity to a text is no probability of a finding, and negation is understood poorly by such encoders.",
        "* Weights can remember training data: share them only as the data's agreement allows.",
        "",
    ]
    return "\n".join(lines)


def _one(values: list[float]) -> float | str:
    """Return the number that all channels share, or them all as Python writes an array over the last axis."""
    return values[0] if len(set(values)) == 1 else f"np.array({values})[:, None, None]"


def _norm(joint: Mapping[str, Any]) -> str:
    if joint["norm"] == "layer":
        return f"The norms are layer normalisations (eps {joint['eps']:g})."
    return f"The norms use running_mean and running_var (eps {joint['eps']:g}), the outer one without weight and bias."


def phantom_lines(phantom: Any) -> list[str]:
    """Return what a card says of drawn data: nothing where there were none."""
    if phantom is None:
        return ["> Whether it was trained on drawn phantoms is not known: the checkpoint lay apart from its run.", ""]
    return [f"> **{phantom}.** Its figures say nothing about patients.", ""] if phantom else []


def data_lines(facts: Mapping[str, Any], metrics: Mapping[str, Any]) -> Iterator[str]:
    """Return what it was trained on, with the hashes of store and split."""
    data, split = metrics.get("data") or {}, facts["data"]["split"] or {}
    if data.get("source"):
        rows = ", ".join(f"{count} {name}" for name, count in (data.get("rows") or {}).items())
        yield f"{data['source']}; {rows}. "
    yield (
        f"Store SHA-256 `{facts['data']['sha256'] or 'not recorded'}`, split `{split.get('name', 'not recorded')}` "
        f"(SHA-256 `{split.get('sha256', 'not recorded')}`)."
    )


def figure_lines(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Return the table of figures with their intervals, validation's and, where there was a test, that of the test."""
    best = metrics.get("best") or {}
    found = dict(best.get("intervals") or {}) | dict((metrics.get("test") or {}).get("intervals") or {})
    if not found:
        yield "None were kept with the checkpoint."
        return
    yield "| figure | value | 95 % interval | n |"
    yield "|---|---|---|---|"
    for name, figure in found.items():
        interval = figure.get("interval95")
        told = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "fewer than two patients"
        yield f"| {name} | {figure['value']:.3f} | {told} | {figure.get('n', '')} |"
    yield ""
    yield "Intervals by bootstrap over patients. The checkpoint was chosen on `val`; only `test` is unseen data."


def metrics_of(checkpoint: Path, read: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run's metrics.json, that of its test under `test`; apart from a run, what the checkpoint keeps."""
    run, found = run_of(checkpoint), {"best": (read.get("callbacks") or {}).get("Results", {}).get("best")}
    for name in ("metrics.json", "test/metrics.json"):
        file = None if run is None else run / name
        if file is not None and file.is_file():
            try:
                read = json.loads(file.read_text())
            except ValueError:
                raise SistaError(f"export: {file} is no JSON; repair it, or copy the checkpoint elsewhere") from None
            found |= {"test": read} if name.startswith("test/") else read
    return found
