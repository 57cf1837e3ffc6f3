"""A trained encoder as an MLflow model: image files as bytes in, scores and embeddings out.

B films, K classes, D embedding, H W pixels.
"""

from __future__ import annotations

import io
import tempfile
import threading
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from sista_pl import plugins
from sista_pl.card import data_lines, figure_lines, metrics_of, phantom_lines
from sista_pl.checkpoint import image_encoder_of, read_checkpoint
from sista_pl.data import transforms
from sista_pl.data.images import read_gray
from sista_pl.embed import Preparation, preparation
from sista_pl.errors import BadImage, SistaError
from sista_pl.exported import file_hash
from sista_pl.models import IMAGE_ENCODERS
from sista_pl.models.heads import Projection
from sista_pl.roundtrip import agree, quiet
from sista_pl.runs import run_of

FILE = "model.ckpt"
COLUMN = "image"
_BATCH = 32  # films at a time in the encoder: the memory does not grow with a request
_TOLD = 5  # bad rows that an answer names
_PACKAGES = ("sista-pl", "mlflow", "torch", "torchvision", "timm", "transformers", "numpy", "pandas", "pillow",
             "pydicom")  # fmt: skip


class FilmEncoder(nn.Module):
    """The image side of a checkpoint: embeddings, and scores where it is of a classification.

    Args:
        found: of `read_checkpoint`, or what `bundle` kept of it.
        path: for the messages.

    Raises:
        SistaError: a checkpoint of another task, weights that don't fit what it names.
    """

    def __init__(self, found: Mapping[str, Any], path: str | Path):
        super().__init__()
        hyper, state, held = found["hyper_parameters"], found["state_dict"], found.get("task")
        self.kind: str | None = None
        self.head: nn.Module
        if held in (None, "PretrainTask") and {"embed_dim", "head_hidden", "head_norm"} <= set(hyper):
            self.image_encoder, prefix = image_encoder_of(found, path), "image_head.pooled."
            dim = self.image_encoder.dim
            self.head = Projection(dim, hyper["head_hidden"], hyper["embed_dim"], hyper["head_norm"])
            self.dim = int(hyper["embed_dim"])
        elif held in (None, "ClassificationTask") and {"num_classes", "kind"} <= set(hyper):
            self.image_encoder, prefix = image_encoder_of(found, path), "head."
            self.kind, self.dim = hyper["kind"], self.image_encoder.dim
            self.head = nn.Linear(self.dim, hyper["num_classes"])
        else:
            raise SistaError(
                f"export: {path} is a checkpoint of {held or 'another task'}, --to mlflow takes one of a pre-training "
                "or of a classification; give one of `sista fit --config pretrain.yaml` or cls_….yaml"
            )
        try:
            self.head.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        except RuntimeError as why:
            first = str(why).strip().splitlines()[-1].strip()[:200]
            raise SistaError(f"checkpoint {path}: its {prefix}* does not fit what it says of itself ({first})") from why
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 1, H, W) in [-1, 1] → embedding (B, D) and scores (B, K) or None."""
        pooled = self.image_encoder(image).pooled
        if self.kind is None:
            return normalize(self.head(pooled).float(), dim=1), None
        logits = self.head(pooled).float()
        return pooled.float(), logits.softmax(1) if self.kind == "multiclass" else logits.sigmoid()


class FilmModel:
    """What MLflow loads and serves; several threads may ask it at once.

    Args:
        encoder: of the checkpoint.
        facts: its `image.resize` says how films are prepared, its `classes` name the scores.
        device: where the encoder computes.
    """

    def __init__(self, encoder: FilmEncoder, facts: Mapping[str, Any], device: str = "cpu"):
        try:
            self.encoder, self.device = encoder.to(device), device
        except (RuntimeError, AssertionError) as why:
            raise SistaError(f"serving_device {device}: {' '.join(str(why).split())[:120]}; give cpu") from None
        resize = facts["image"]["resize"]
        self.size, self.classes = int(resize["long_side"]), list(facts["classes"] or [])
        self.transform = transforms.build(self.size, int(resize["crop"]), train=False)
        # films are decoded beside each other; the encoder takes all cores by itself
        self.turn = threading.Lock()

    def predict(self, data: pd.DataFrame) -> pd.DataFrame:
        """Return a row for each film.

        Args:
            data: column `image`, JPEG, PNG or DICOM files as bytes.

        Returns:
            `score_CLASS` for each class, where the model has classes, and `embedding`, D floats.

        Raises:
            MlflowException: rows that can't be read, which the scoring server answers with 400; nothing of the
                request is answered then.
        """
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE

        files, bad = data[COLUMN].tolist(), []
        vectors, scores = np.zeros((len(files), self.encoder.dim), np.float32), []
        for start in range(0, len(files), _BATCH):
            squares = []
            for row, file in enumerate(files[start : start + _BATCH], start):
                try:
                    squares.append(self._read(file))
                except BadImage as why:
                    bad.append(f"row {row}: {why}")
                except OSError as why:
                    reason = f"no room for the film in {tempfile.gettempdir()} ({why.strerror or why}); set TMPDIR"
                    raise MlflowException(reason, INTERNAL_ERROR) from None
            if bad:
                continue  # the rest is only looked at, to name what is bad in it
            found, said = self._encode(np.stack(squares))
            vectors[start : start + len(squares)] = found
            scores += [] if said is None else [said]
        if bad:
            more = f"; and {len(bad) - _TOLD} more" if len(bad) > _TOLD else ""
            raise MlflowException(
                f"{'; '.join(bad[:_TOLD])}{more}. Rows are counted from 0; send JPEG, PNG or DICOM files as bytes, in "
                "JSON as base64 in dataframe_records",
                INVALID_PARAMETER_VALUE,
            )
        if not (np.isfinite(vectors).all() and all(np.isfinite(said).all() for said in scores)):
            raise MlflowException("the model gives values that are not finite; export another one", INTERNAL_ERROR)
        table = np.concatenate(scores) if scores else np.zeros((len(files), len(self.classes)), np.float32)
        columns: dict[str, Any] = {f"score_{name}": table[:, k] for k, name in enumerate(self.classes)}
        return pd.DataFrame({**columns, "embedding": pd.Series(vectors.tolist(), dtype=object)})

    def _read(self, file: Any) -> np.ndarray:
        """Bytes of a file → (size, size) uint8, by the reader of `sista predict`, which takes paths."""
        if not isinstance(file, (bytes, bytearray)):
            raise BadImage("no bytes")
        with tempfile.NamedTemporaryFile(prefix="sista-") as room:
            room.write(file)
            room.flush()
            try:
                return read_gray(Path(room.name), self.size)
            except BadImage as why:
                raise BadImage(" ".join(str(why).replace(room.name, "the file").split())) from None

    @torch.inference_mode()
    def _encode(self, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        images = transforms.normalise(self.transform(torch.from_numpy(squares)[:, None]))
        with self.turn:
            vectors, scores = self.encoder(images.to(self.device))
        return vectors.cpu().numpy(), None if scores is None else scores.cpu().numpy()


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> FilmModel:
    """Return the model of an exported folder; MLflow calls this function by its name."""
    plugins.load_modules()
    found = read_checkpoint(path)
    return FilmModel(FilmEncoder(found, path), found["serving"], (model_config or {}).get("serving_device", "cpu"))


def write_mlflow(
    checkpoint: Path, folder: Path, size: int | None = None, register: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write the image side of a checkpoint as an MLflow model, load it with MLflow and compare.

    Args:
        checkpoint: of a pre-training, or of a classification.
        folder: to fill; it must not be there.
        size: see `preparation`.
        register: `name`, `alias` and `privacy`, to log the model to the tracker and register it.

    Returns:
        the model's facts, with `difference`, and `registered` where it was.

    Raises:
        SistaError: another task's checkpoint, answers that differ, a tracker that may not or can't be used.
    """
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    if register is not None:  # what would be refused at the end is refused at the beginning
        from sista_pl.tracking import check_registry

        check_registry(**register)
    plugins.load_modules()
    found = read_checkpoint(checkpoint)
    encoder = FilmEncoder(found, checkpoint)
    how = preparation(checkpoint, int(found["hyper_parameters"].get("image_size", 224)), size)
    metrics = metrics_of(checkpoint, found)
    facts = _facts(found, checkpoint, encoder, how, metrics)
    film = _film()
    outputs: list[Any] = [ColSpec(DataType.float, f"score_{name}") for name in facts["classes"] or []]
    outputs.append(ColSpec(Array(DataType.float), "embedding"))
    with tempfile.TemporaryDirectory(prefix="sista-") as room:
        torch.save(bundle(found, facts), Path(room) / FILE)
        saved: dict[str, Any] = {
            "loader_module": __name__, "data_path": str(Path(room) / FILE), "metadata": facts,
            "signature": ModelSignature(Schema([ColSpec(DataType.binary, COLUMN)]), Schema(outputs)),
            "input_example": pd.DataFrame({COLUMN: [film]}), "model_config": {"serving_device": "cpu"},
            # given, since MLflow would start a process to find them out
            "pip_requirements": [f"{name}=={version(name)}" for name in _PACKAGES],
        }  # fmt: skip
        with quiet():
            mlflow.pyfunc.save_model(folder, **saved)
            answer = mlflow.pyfunc.load_model(str(folder)).predict(saved["input_example"])
        direct = FilmModel(encoder, facts).predict(saved["input_example"])
        pairs = {str(name): (_tensor(direct[name]), _tensor(answer[name])) for name in direct}
        facts["difference"] = {"image": agree("mlflow", pairs)}
        text = serving_card(facts, metrics)
        (folder / "README.md").write_text(text, encoding="utf-8")
        if register is not None:
            from sista_pl.tracking import register_model

            facts["registered"] = register_model(saved, run_of(checkpoint), text, **register)
    return facts


def bundle(found: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return of a checkpoint what serving needs: no optimizer, no text encoder, no path; with `facts` beside it."""
    hyper = found["hyper_parameters"]
    kept = ("image_size", "embed_dim", "head_hidden", "head_norm", "num_classes", "kind")
    name, arguments = IMAGE_ENCODERS.split(hyper["image_encoder"])
    spec = {"name": name, **{k: v for k, v in arguments.items() if k not in ("weights", "path")}}
    sides = ("image_encoder.", "image_head.pooled.", "head.", "thresholds")
    return {
        "state_dict": {k: v for k, v in found["state_dict"].items() if k.startswith(sides)},
        "hyper_parameters": {"image_encoder": spec, **{k: hyper[k] for k in kept if k in hyper}},
        "task": found.get("task"), "serving": dict(facts),
    }  # fmt: skip


def _facts(
    found: Mapping[str, Any], path: Path, encoder: FilmEncoder, how: Preparation, metrics: Mapping[str, Any]
) -> dict[str, Any]:
    data: dict[str, Any] = next((v for v in found.values() if isinstance(v, dict) and {"data", "split"} <= set(v)), {})
    # of exclusive classes the highest score decides
    thresholds = None if encoder.kind == "multiclass" else found["state_dict"].get("thresholds")
    name, _ = IMAGE_ENCODERS.split(found["hyper_parameters"]["image_encoder"])
    return {
        "format": "mlflow", "created_by": f"sista-pl {version('sista-pl')}", "needs": {"mlflow": version("mlflow")},
        "image": {
            "encoder": name, "size": how.crop,
            "resize": {"long_side": how.size, "filter": "lanczos", "pad": 0, "crop": how.crop, "known": how.told},
        },
        "embedding": {"of": "joint space, length 1" if encoder.kind is None else "encoder, pooled", "dim": encoder.dim},
        "kind": encoder.kind,
        "classes": None if encoder.kind is None else class_names(path, found),
        "thresholds": None if thresholds is None else [round(float(value), 6) for value in thresholds],
        "checkpoint": {"sha256": file_hash(path), "epoch": found.get("epoch"), "step": found.get("global_step")},
        "data": {"sha256": data.get("data"), "split": dict(data.get("split") or {})},
        "phantom": metrics.get("phantom"),
    }  # fmt: skip


def class_names(checkpoint: Path, found: Mapping[str, Any]) -> list[str]:
    """Return the names of the scores: those that the checkpoint keeps.

    One of before keeps none: they are `data.labels` of its run then, else numbers.
    """
    if found.get("classes"):
        return list(found["classes"])
    run, names, count = run_of(checkpoint), None, found["hyper_parameters"]["num_classes"]
    if run is not None and (run / "config.yaml").is_file():
        try:
            names = yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"].get("labels")
        except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
            names = None  # edited by hand; what follows is told
    if not names:
        return [str(k) for k in range(count)]
    if not isinstance(names, list) or len(names) != count:
        raise SistaError(f"export: {run}/config.yaml has data.labels {names}, the checkpoint {count} classes; mend it")
    return [str(name) for name in names]


def _film() -> bytes:
    """Return a drawn image as PNG, for the example: rings, and no patient."""
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    drawn = np.rint(127.5 + 127.5 * np.cos(9 * np.hypot(x, 1.3 * y) + x)).astype(np.uint8)
    Image.fromarray(drawn).save(room := io.BytesIO(), "PNG")
    return room.getvalue()


def _tensor(column: pd.Series) -> Tensor:
    return torch.tensor(np.stack([np.asarray(value, np.float64) for value in column]))


def serving_card(facts: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Return the folder's README.md, which a registered model has as its description."""
    resize, classes = facts["image"]["resize"], facts["classes"]
    scores = f"`score_CLASS` ({facts['kind']}: {', '.join(classes)}) and " if classes else ""
    limits = f" Thresholds chosen on validation: {facts['thresholds']}." if facts["thresholds"] else ""
    return "\n".join(
        [
            "# Chest X-ray encoder, served by MLflow",
            "",
            *phantom_lines(facts["phantom"]),
            f"Image files in; {scores}`embedding` out ({facts['embedding']['of']}, {facts['embedding']['dim']} "
            f"numbers).{limits} Made by {facts['created_by']}. **Not for clinical use.**",
            "",
            "## Use",
            "```bash",
            "mlflow models serve -m DIR --env-manager local --port 5001",
            "```",
            "```python",
            "import base64, requests",
            "",
            'film = base64.b64encode(open("film.dcm", "rb").read()).decode()',
            'body = {"dataframe_records": [{"image": film}]}',
            'answer = requests.post("http://127.0.0.1:5001/invocations", json=body).json()["predictions"]',
            "```",
            "JPEG, PNG and DICOM (with its preamble) are read. A request with a file that can't be read is answered "
            "with 400, the row and the reason. `dataframe_split` and Parquet (`application/vnd.apache.parquet`, bytes "
            "as they are) do as well; `instances` and `inputs` do not, since MLflow leaves base64 undecoded there. A "
            "film lies in TMPDIR while it is decoded. To a request without a Content-Type MLflow's server says 500.",
            "",
            f"Long side to {resize['long_side']} px ({resize['known']}), black to a square, middle {resize['crop']} "
            'px. On a GPU: `SERVING_MODEL_CONFIG=\'{"serving_device": "cuda"}\'`.',
            "",
            "## Data",
            *data_lines(facts, metrics),
            "",
            "## Figures",
            *figure_lines(metrics),
            "",
        ]
    )
