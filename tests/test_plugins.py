"""A real third-party package, built and installed in an environment of its own, adds a task, a loss and an encoder."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from sista_pl import plugins

PACKAGE = {
    "pyproject.toml": """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "sista-acme"
version = "0.1"
[project.entry-points."sista.tasks"]
acme = "sista_acme:AcmeTask"
broken = "sista_acme:NoSuchTask"
[project.entry-points."sista.plugins"]
acme = "sista_acme"
broken = "sista_acme.missing"
""",
    "sista_acme/__init__.py": '''
"""A plug-in: a task, a loss and an encoder."""
import torch
from sista_pl import IMAGE_ENCODERS, LOSSES, Features, ImageEncoder
from sista_pl.pretrain import PretrainTask


@LOSSES.register("acme_distance")
class Distance(torch.nn.Module):
    """Mean squared distance of the two sides."""
    needs_tokens = False

    def __init__(self, margin: float = 0.0):
        super().__init__()
        self.margin = margin

    def forward(self, pair):
        return (pair.image.pooled - pair.text.pooled).square().mean() + self.margin + 0 * pair.scale, {}


@IMAGE_ENCODERS.register("acme_mean")
class Mean(ImageEncoder):
    """Grey levels of 8 x 8 blocks."""

    def __init__(self, image_size: int = 64):
        super().__init__()
        self.dim = self.local_dim = 4
        self.layer = torch.nn.Conv2d(1, 4, 8, stride=8)

    def forward(self, image):
        maps = self.layer(image).flatten(2).transpose(1, 2)
        return Features(maps.mean(1), maps)


class AcmeTask(PretrainTask):
    """A task of somebody else."""
''',
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """A virtual environment that sees the packages of this one, with sista-acme installed."""
    folder = tmp_path_factory.mktemp("acme")
    for name, text in PACKAGE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    parent = sysconfig.get_path("purelib")
    Path(site.strip(), "parent.pth").write_text(f"import site; site.addsitedir({parent!r})\n")
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index",
         "--no-build-isolation", str(folder)],
        check=True,
    )  # fmt: skip
    return python


def sista(python: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [python, "-m", "sista_pl", *arguments], text=True, capture_output=True, cwd=cwd, timeout=300, env={**os.environ}
    )


@pytest.mark.slow
def test_everything_is_listed_and_the_broken_part_is_a_warning(environment):
    tasks = sista(environment, "list", "tasks")
    assert "acme" in tasks.stdout
    assert "sista-acme" in tasks.stdout
    losses = sista(environment, "list", "losses")
    assert losses.returncode == 0
    assert "acme_distance" in losses.stdout
    warnings = [line for line in losses.stderr.splitlines() if "warning" in line]
    assert len(warnings) == 2, losses.stderr
    assert "plug-in broken of sista-acme (sista_acme.missing) is left out" in warnings[0]
    assert "Traceback" not in losses.stderr


@pytest.mark.slow
def test_its_task_loss_and_encoder_train_by_yaml(environment, tiny, workdir):
    (workdir / "acme.yaml").write_text(
        "model:\n  class_path: AcmeTask\n  init_args:\n    losses: {pull: {name: acme_distance, margin: 1.0}}\n"
        "    image_encoder: acme_mean\ndata: {class_path: PairDataModule, init_args: {store: x}}\n"
    )
    run = sista(environment, "fit", "--config", "acme.yaml", *tiny, "--trainer.limit_train_batches", "2", cwd=workdir)
    assert run.returncode == 0, run.stderr
    assert (workdir / "runs" / "acme" / "0001" / "checkpoints" / "best.ckpt").is_file()


def test_the_code_of_plugins_is_in_the_hash(tmp_path, monkeypatch):
    alone = plugins.code_hash.__wrapped__()
    module = tmp_path / "sista_extra.py"
    module.write_text("A = 1\n")
    info = tmp_path / "sista_extra-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: sista-extra\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[sista.plugins]\nextra = sista_extra\nbroken = sista_absent.part\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = dict(plugins.sources())
    assert found["sista_extra"] == module
    assert {"sista_pl/cli.py", "sista_pl/commands/sweep.py", "sista_tasks/segmentation/task.py"} < set(found)
    assert "sista_extra" not in sys.modules
    one = plugins.code_hash.__wrapped__()
    module.write_text("A = 2\n")
    two = plugins.code_hash.__wrapped__()
    assert len({alone, one, two}) == 3
    module.write_text("A = 1\n")
    assert plugins.code_hash.__wrapped__() == one
