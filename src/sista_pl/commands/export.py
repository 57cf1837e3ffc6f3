"""`sista export`: trained encoders in the forms that other software loads."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from sista_pl.errors import SistaError

_HELP = """\
Writes the encoders of a checkpoint as a folder. It is loaded back with the library that it is for, and the features
are compared (to 1e-5 of their largest value), before the folder gets its name.

  --to timm    model.safetensors with timm's keys, config.json in timm's hub form: image encoder
  --to hf      image/ and text/ for AutoModel.from_pretrained, tokenizer included; a timm encoder in its wrapper
  --to onnx    image.onnx and text.onnx, any batch size, projections inside; needs: pip install 'sista-pl[onnx]'
  --to mlflow  a model for `mlflow models serve`: JPEG, PNG or DICOM files as bytes in, embeddings out, and scores
               where the checkpoint is of a classification; as `sista embed` and `sista predict` give them

Those of timm, hf and onnx need no SISTA. Each has heads.safetensors (projections into the joint space), README.md (the
model card, with figures and their intervals) and sista.json: input size, mean, std, resize, tokenizer, hashes of data
and split, versions, SHA-256 of each file. `--model.weights DIR` of a task takes a folder of timm or hf, and refuses a
changed file. That of mlflow has a signature, an input example (drawn, no patient) and README.md. With --register it
goes to MLFLOW_TRACKING_URI, too (sqlite:///mlflow.db where it isn't set): into the run that trained it, and as the
next version of NAME, which gets the alias.
"""
_EPILOG = """\
examples:
  sista export --ckpt_path runs/pretrain/0001/checkpoints/best.ckpt --to timm --out encoder
  sista export --ckpt_path best.ckpt --size 256 --to onnx --out encoder-onnx
  sista export --ckpt_path runs/cls_rsna/0001/checkpoints/best.ckpt --to mlflow --out served --register pneumonia

  timm.create_model("local-dir:encoder", pretrained=True)
  mlflow models serve -m served --env-manager local --port 5001    # or -m models:/pneumonia@champion
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
    parser.add_argument(
        "--ckpt_path", type=Path, required=True, metavar="CKPT",
        help="checkpoint of a pre-training; for mlflow of a classification, too",
    )  # fmt: skip
    parser.add_argument("--to", required=True, metavar="timm|hf|onnx|mlflow", help="the form")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make, which is not there")
    parser.add_argument(
        "--size", type=int, metavar="PX",
        help="long side of a film before the crop, as the store had it (default: as the run's config.yaml)",
    )  # fmt: skip
    parser.add_argument("--register", metavar="NAME", help="mlflow: register the model under this name")
    parser.add_argument("--alias", metavar="ALIAS", help="mlflow: of the registered version (default: champion)")
    parser.add_argument(
        "--privacy", choices=("local_only", "allow_patient_data"),
        help="whether a tracker on another machine may be used (default: SISTA_PRIVACY, else local_only)",
    )  # fmt: skip
    options = parser.parse_args(argv)
    if options.register is not None and options.to != "mlflow":
        raise SistaError(f"export: --register with --to {options.to}; it is for --to mlflow alone")
    if options.alias is not None and options.register is None:
        raise SistaError("export: --alias without --register; give --register NAME, or leave it out")
    register = None
    if options.register is not None:
        alias = "champion" if options.alias is None else options.alias
        from sista_pl.privacy import default_privacy

        register = {"name": options.register, "alias": alias, "privacy": options.privacy or default_privacy()}

    from sista_pl.export import export

    facts = export(options.ckpt_path, options.to, options.out, options.size, register)
    resize = facts["image"]["resize"]
    if facts["phantom"]:
        print(facts["phantom"])
    elif facts["phantom"] is None:
        print("export: the checkpoint lies apart from its run, whether it is of a phantom is not known")
    print(f"films: long side to {resize['long_side']} px ({resize['known']}), then the middle {resize['crop']}")
    told = ", ".join(f"{side} {value:.1e}" for side, value in facts["difference"].items())
    print(f"export: read back by {', '.join(facts['needs'])}, largest difference: {told}")
    if options.to == "mlflow":
        _tell_served(facts, options.out)
        return 0
    print(f"export: {options.out}, {len(facts['files']) + 1} files; begin with {options.out / 'README.md'}")
    return 0


def _tell_served(facts: dict[str, Any], out: Path) -> None:
    embedding, classes, model = facts["embedding"], facts["classes"], str(out)
    print(f"answers: embedding of {embedding['dim']} ({embedding['of']})"
          + (f", score_{', score_'.join(classes)}" if classes else ""))  # fmt: skip
    if classes == [str(k) for k in range(len(classes or []))]:
        print("classes: by number, in the order of the store, since data.labels of the run names none")
    print(f"export: {out}, {len(facts['files'])} files; begin with {out / 'README.md'}")
    if told := facts.get("registered"):
        model = f"models:/{told['name']}@{told['alias']}"
        print(f"registered: {told['name']} version {told['version']}, alias {told['alias']}, in {told['uri']}")
    print(f"next:   mlflow models serve -m {shlex.quote(model)} --env-manager local --port 5001")
