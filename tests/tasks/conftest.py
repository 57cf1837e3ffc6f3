"""Small labelled stores, drawn once."""

import shutil
from pathlib import Path

import numpy as np
import pytest

COMMON = [
    "--data.root", "null", "--data.format", "null", "--data.phantom", "null", "--data.size", "64", "--data.crop", "64",
    "--data.batch_size", "8", "--data.min_epoch_images", "0", "--trainer.enable_progress_bar", "false",
    "--trainer.enable_model_summary", "false", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true",
    "--model.draws", "100",
]  # fmt: skip


def overlap(prediction: np.ndarray, mask: np.ndarray) -> tuple[int, int, int]:
    """Return the pixels in both, of the prediction and of the truth; where the truth is 127 nothing counts."""
    said, true = prediction & (mask != 127), mask == 255
    return int((said & true).sum()), int(said.sum()), int(true.sum())


def _store(layout: str, studies: int, folder: Path, seed: int = 5) -> Path:
    from sista_pl.data.formats import READERS
    from sista_pl.data.phantom import write_phantom
    from sista_pl.data.prepare import prepare

    root = write_phantom(layout, folder / layout, studies, seed=seed, size=64, workers=1, progress=False)
    prepare(READERS.build({"name": layout, "root": root}), folder / f"{layout}-64", size=64, progress=False)
    return folder / f"{layout}-64"


@pytest.fixture(scope="session")
def rsna_store(tmp_path_factory) -> Path:
    """The prepared store of 175 studies in the layout of RSNA stage 2, at 64 px: 35 of them in its test split."""
    return _store("rsna", 175, tmp_path_factory.mktemp("rsna"))


@pytest.fixture(scope="session")
def siim_store(tmp_path_factory) -> Path:
    """The prepared store of 304 studies in the layout of SIIM-ACR stage 1, at 64 px: 35 for the test, 4 positive."""
    return _store("siim", 140, tmp_path_factory.mktemp("siim"), seed=6)


@pytest.fixture(scope="session")
def object_store(tmp_path_factory) -> Path:
    """The prepared store of 150 studies in the layout of Object-CXR, at 64 px."""
    return _store("object_cxr", 150, tmp_path_factory.mktemp("object_cxr"))


@pytest.fixture(scope="session")
def boxed_store(tmp_path_factory) -> Path:
    """The prepared store of 500 studies in the layout of ChestX-ray14, at 64 px: boxes on a part of its test films."""
    return _store("chestxray14", 500, tmp_path_factory.mktemp("chestxray14"))


@pytest.fixture(scope="session")
def phrase_store(tmp_path_factory) -> Path:
    """The prepared store of MS-CXR's layout, at 64 px: the films of 60 studies that show one of its findings."""
    return _store("ms_cxr", 60, tmp_path_factory.mktemp("ms_cxr"))


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> Path:
    """A checkpoint of pre-training as it begins, on images of 48 px: both encoders, both heads, a tokenizer."""
    import torch

    from sista_pl.pretrain import PretrainTask

    torch.manual_seed(0)
    task = PretrainTask(
        {"instance": {"name": "clip"}, "token": {"name": "sta"}}, "resnet10t",
        {"name": "small-bert", "layers": 1, "dim": 32, "vocab_size": 300}, embed_dim=16, head_hidden=32, image_size=48,
    )  # fmt: skip
    words = "no small left right pleural effusion pneumothorax pneumonia opacity the lungs are clear heart enlarged"
    task.text_encoder.fit([words, words])
    path = tmp_path_factory.mktemp("pretrained") / "begin.ckpt"
    told = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams), "task": "PretrainTask"}
    torch.save(told, path)
    return path


@pytest.fixture(scope="session")
def tested(pretrained, tmp_path_factory, mlflow_tables):
    """Return what runs `sista test` of an evaluation in a folder of its own: its run, in which told.txt is its log."""
    import logging

    from sista_pl.cli import main

    def run(name: str, store: Path, *more: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        shutil.copy(mlflow_tables, folder / "mlflow.db")
        log, handler = logging.getLogger("pytorch_lightning"), logging.FileHandler(folder / "told.txt")
        log.addHandler(handler)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                assert main(["test", *_evaluation(name, store, pretrained), *more]) == 0
        finally:
            log.removeHandler(handler)
            handler.close()
        return (folder / "told.txt").rename(folder / "runs" / name / "0001" / "told.txt").parent

    return run


def _evaluation(name: str, store: Path, weights: Path) -> list[str]:
    at = COMMON.index("--data.min_epoch_images")  # of transfer alone
    small = [*COMMON[:at], *COMMON[at + 2 :], "--data.crop", "48", "--trainer.logger", "false"]
    return ["--config", f"{name}.yaml", *small, "--data.store", str(store), "--model.weights", str(weights)]


@pytest.fixture(scope="session")
def evaluation():
    """Return what makes the command line of a small evaluation (configuration, store, weights), without a tracker."""
    return _evaluation


@pytest.fixture
def cls(rsna_store) -> list[str]:
    """The command line of a small probe."""
    return ["--config", "cls_rsna.yaml", *COMMON, "--data.store", str(rsna_store)]


@pytest.fixture
def seg(siim_store) -> list[str]:
    """The command line of a small segmentation."""
    decoder = "{name: unet, channels: [16, 16, 8, 8, 8]}"
    return ["--config", "seg_siim.yaml", *COMMON, "--data.store", str(siim_store), "--model.decoder", decoder]
