"""The package map of setup.cfg against the tree."""

import os
import subprocess
import sys
import sysconfig
import venv
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def declared() -> set[str]:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return set(setup["options"]["packages"].split())


def test_every_package_of_the_tree_is_declared_and_no_other():
    found = {"sista_pl.configs"}
    for base, name in ((ROOT / "src" / "sista_pl", "sista_pl"), (ROOT / "tasks", "sista_tasks")):
        for init in base.rglob("__init__.py"):
            found.add(".".join([name, *init.parent.relative_to(base).parts]))
    assert declared() == found


def test_src_never_imports_from_tasks():
    for path in (ROOT / "src").rglob("*.py"):
        assert "sista_tasks" not in path.read_text(), path


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_packaged_configurations_are_short_and_explained(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert len(lines) < 40
    assert yaml.safe_load(path.read_text())


def test_make_help_is_true():
    makefile = (ROOT / "Makefile").read_text()
    phony = next(line for line in makefile.splitlines() if line.startswith(".PHONY")).split(":")[1].split()
    for target in phony:
        assert any(line.startswith(f"{target}:") and "##" in line for line in makefile.splitlines()), target


@pytest.mark.slow
def test_the_wheel_works_alone_from_any_folder(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True, capture_output=True,
    )  # fmt: skip
    wheel = next(tmp_path.glob("*.whl"))
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.check_output(ask, text=True).strip())
    (site / "parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index",
         "--ignore-installed", str(wheel)],
        check=True,
    )  # fmt: skip
    folder = tmp_path / "anywhere"
    folder.mkdir()
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}

    def run(*command: str) -> str:
        done = subprocess.run([python, *command], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run("-c", "import sista_pl, sista_tasks, sista_pl.configs as c; print(sista_pl.__file__, c.__file__)")
    assert where.count(str(site)) == 2
    assert "pretrain.yaml" in run("-m", "sista_pl", "list", "configs")
    run("-m", "sista_pl", "fit", "--config", "pretrain.yaml", "--data.phantom", "{studies: 60, size: 64, workers: 1}",
        "--data.size", "48", "--data.crop", "32", "--data.batch_size", "8", "--trainer.max_epochs", "1")  # fmt: skip
    assert (folder / "runs" / "pretrain" / "0001" / "metrics.json").is_file()
