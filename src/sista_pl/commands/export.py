"""`sista export`: the encoders of a pre-training in the forms that other software loads."""

from __future__ import annotations

import argparse
from pathlib import Path

_HELP = """\
Writes the encoders of a pre-training as a folder that needs no SISTA. It is loaded back with the library that it is
for, and the features are compared (to 1e-5 of their largest value), before the folder gets its name.

  --to timm  model.safetensors with timm's keys, config.json in timm's hub form: image encoder
  --to hf    image/ and text/ for AutoModel.from_pretrained, tokenizer included; a timm encoder in its wrapper
  --to onnx  image.onnx and text.onnx, any batch size, projections inside; needs: pip install 'sista-pl[onnx]'

Each has heads.safetensors (projections into the joint space), README.md (the model card, with figures and their
intervals) and sista.json: input size, mean, std, resize, tokenizer, hashes of data and split, versions, SHA-256 of
each file. `--model.weights DIR` of a task takes a folder of timm or hf, and refuses a changed file.
"""
_EPILOG = """\
examples:
  sista export --ckpt_path runs/pretrain/0001/checkpoints/best.ckpt --to timm --out encoder
  sista export --ckpt_path best.ckpt --size 256 --to onnx --out encoder-onnx

  timm.create_model("local-dir:encoder", pretrained=True)
"""


def main(argv: list[str]) -> int:
    """Write the folder and return 0.

    Raises:
        SistaError: a checkpoint, a form or a folder that can't be used, features that differ.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "sista export", description=_HELP, epilog=_EPILOG, formatter_class=raw, allow_abbrev=False
    )
    parser.add_argument("--ckpt_path", type=Path, required=True, metavar="CKPT", help="checkpoint of a pre-training")
    parser.add_argument("--to", required=True, metavar="timm|hf|onnx", help="the form")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make, which is not there")
    parser.add_argument(
        "--size", type=int, metavar="PX",
        help="long side of a film before the crop, as the store had it (default: as the run's config.yaml)",
    )  # fmt: skip
    options = parser.parse_args(argv)

    from sista_pl.export import export

    facts = export(options.ckpt_path, options.to, options.out, options.size)
    resize = facts["image"]["resize"]
    if facts["phantom"]:
        print(facts["phantom"])
    elif facts["phantom"] is None:
        print("export: the checkpoint lies apart from its run, whether it is of a phantom is not known")
    print(f"films: long side to {resize['long_side']} px ({resize['known']}), then the middle {resize['crop']}")
    told = ", ".join(f"{side} {value:.1e}" for side, value in facts["difference"].items())
    print(f"export: read back by {', '.join(facts['needs'])}, largest difference: {told}")
    print(f"export: {options.out}, {len(facts['files']) + 1} files; begin with {options.out / 'README.md'}")
    return 0
