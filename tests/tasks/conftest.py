"""Small labelled stores, drawn once."""

from pathlib import Path

import pytest

COMMON = [
    "--data.root", "null", "--data.format", "null", "--data.phantom", "null", "--data.size", "64", "--data.crop", "64",
    "--data.batch_size", "8", "--data.min_epoch_images", "0", "--trainer.enable_progress_bar", "false",
    "--trainer.enable_model_summary", "false", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true",
    "--model.draws", "100",
]  # fmt: skip


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
    return _store("siim", 304, tmp_path_factory.mktemp("siim"), seed=6)


@pytest.fixture
def cls(rsna_store) -> list[str]:
    """The command line of a small probe."""
    return ["--config", "cls_rsna.yaml", *COMMON, "--data.store", str(rsna_store)]


@pytest.fixture
def seg(siim_store) -> list[str]:
    """The command line of a small segmentation."""
    decoder = "{name: unet, channels: [16, 16, 8, 8, 8]}"
    return ["--config", "seg_siim.yaml", *COMMON, "--data.store", str(siim_store), "--model.decoder", decoder]
