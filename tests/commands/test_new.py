"""`sista new task`: what it writes works as it is, and a mistake leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sista_pl import packaged, plugins
from sista_pl.cli import main
from sista_pl.commands import new
from sista_pl.commands.new import write_task
from sista_pl.errors import SistaError


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def refusal(capsys, *argv) -> str:
    assert main(["new", "task", *argv]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    return told[0]


def test_it_writes_a_package_and_says_what_is_next(workdir, capsys):
    assert main(["new", "task", "pleural_effusion"]) == 0
    out = capsys.readouterr().out.splitlines()
    folder = workdir / "sista-pleural-effusion"
    assert files(folder) == {
        "pyproject.toml", "README.md", ".gitignore", "sista_pleural_effusion/__init__.py",
        "sista_pleural_effusion/task.py", "sista_pleural_effusion/configs/pleural_effusion.yaml", "tests/test_task.py",
    }  # fmt: skip
    assert [line.split()[0] for line in out[1:]] == ["pip", "python", "sista"]
    assert [path.name for path in workdir.iterdir()] == ["sista-pleural-effusion"]
    text = (folder / "pyproject.toml").read_text()
    assert '[project.entry-points."sista.tasks"]' in text
    assert 'pleural_effusion = "sista_pleural_effusion:PleuralEffusionTask"' in text
    assert len((folder / "README.md").read_text().splitlines()) <= 10


def test_the_configuration_names_its_phantom_and_interpolates(tmp_path):
    write_task("laterality", tmp_path / "plug")
    text = (tmp_path / "plug/sista_laterality/configs/laterality.yaml").read_text()
    config = yaml.safe_load(text)
    assert text.startswith("# laterality: ")
    assert "PHANTOM DATA" in text
    assert config["model"]["class_path"] == "LateralityTask"
    assert config["model"]["init_args"]["image_size"] == "${data.init_args.crop}"
    assert config["data"]["init_args"]["phantom"]
    assert len(config["data"]["init_args"]["labels"]) == config["model"]["init_args"]["num_classes"]


def test_it_is_in_the_house_style(tmp_path):
    write_task("laterality", tmp_path / "plug")
    settings = Path(__file__).parents[2] / "pyproject.toml"
    for verb in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *verb, "--config", str(settings), "--no-cache", "."]
        # from its own folder, where sista_pl is somebody else's package
        done = subprocess.run(ruff, cwd=tmp_path / "plug", capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Laterality", "did you mean laterality?"),
        ("pleural-effusion", "did you mean pleural_effusion?"),
        ("class", "as in pleural_effusion"),
        ("9th", "as in pleural_effusion"),
        ("", "as in pleural_effusion"),
        ("x" * 41, f"did you mean {'x' * 40}?"),
        ("../up", "did you mean up?"),
        ("classification", "there is one already (sista_tasks.classification:ClassificationTask)"),
        ("pl", "a package sista_pl is installed already"),
        ("cls_rsna", "there is a configuration cls_rsna.yaml already"),
    ],
)
def test_a_name_that_will_not_do_is_one_line(workdir, capsys, name, told):
    assert told in refusal(capsys, name)
    assert list(workdir.iterdir()) == []


def test_a_folder_that_is_not_empty_is_left_alone(workdir, capsys):
    (workdir / "mine").mkdir()
    (workdir / "mine/notes.txt").write_text("keep")
    assert "mine: it is there already and not empty" in refusal(capsys, "laterality", "--out", "mine")
    assert files(workdir) == {"mine/notes.txt"}
    assert "notes.txt: it is there already" in refusal(capsys, "laterality", "--out", "mine/notes.txt")
    (workdir / "empty").mkdir()
    assert main(["new", "task", "laterality", "--out", "empty"]) == 0
    assert "empty/pyproject.toml" in files(workdir)


def test_it_is_all_or_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(new._FILES, "tests/more.py", "no such template")
    with pytest.raises(SistaError, match="can't be written"):
        write_task("laterality", tmp_path / "deep" / "plug")
    assert files(tmp_path) == set()
    assert not (tmp_path / "deep" / "plug").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(SistaError, match="can't be written"):
        write_task("laterality", tmp_path / "file" / "plug")


@pytest.mark.parametrize("argv", [["--help"], ["task", "--help"]])
def test_help_teaches(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["new", *argv])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "task" in out
    assert ("sista new task laterality" in out) == (argv[0] == "task")
    assert main(["--help"]) == 0
    assert "  new " in capsys.readouterr().out


def test_neither_torch_nor_lightning_is_imported(tmp_path):
    program = (
        "import sys; from sista_pl.cli import main; code = main(['new', 'task', 'laterality']); "
        "heavy = {'torch', 'pytorch_lightning', 'mlflow'} & set(sys.modules); assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_configuration_of_a_plug_in_is_found_by_name_and_nothing_imported(tmp_path, monkeypatch, capsys):
    write_task("quokka", tmp_path / "site")
    own = tmp_path / "site/sista_quokka/configs/pretrain.yaml"
    own.write_text("# a name that is taken\n")
    facts = tmp_path / "site/sista_quokka-0.1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: sista-quokka\nVersion: 0.1\n")
    (facts / "entry_points.txt").write_text("[sista.tasks]\nquokka = sista_quokka:QuokkaTask\n")
    assert "quokka.yaml" not in packaged.names()
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert "quokka" in plugins.task_entries()
    assert packaged.find("quokka") == tmp_path / "site/sista_quokka/configs/quokka.yaml"
    assert packaged.find("pretrain.yaml") != own
    assert main(["list", "configs", "--match", "quokka"]) == 0
    assert "quokka: findings by a linear layer" in capsys.readouterr().out
    with pytest.raises(SistaError, match=r"did you mean quokka\.yaml"):
        packaged.find("qokka.yaml")
    assert "there is one already" in refusal(capsys, "quokka")
    assert "sista_quokka" not in sys.modules


@pytest.mark.slow
def test_the_installed_package_is_listed_fits_and_passes_its_own_test(workdir):
    assert main(["new", "task", "laterality"]) == 0
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation",
         "--target", "site", "./sista-laterality"],
        check=True,
    )  # fmt: skip
    path = os.pathsep.join(filter(None, [str(workdir / "site"), os.environ.get("PYTHONPATH")]))

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *command], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "laterality      sista_laterality:LateralityTask  (sista-laterality)" in run("sista_pl", "list", "tasks")
    run("sista_pl", "fit", "--config", "laterality.yaml", "--trainer.max_epochs", "1", "--data.phantom",
        "{studies: 200, size: 64, workers: 1}", "--data.size", "48", "--data.crop", "32")  # fmt: skip
    assert (workdir / "runs/laterality/0001/checkpoints/best.ckpt").is_file()
    assert "1 passed" in run("pytest", "-q", "sista-laterality")
