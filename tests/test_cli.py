"""The command: light verbs stay light, configurations are found by name, mistakes are one line and exit code 2."""

import importlib
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from sista_pl import packaged
from sista_pl.cli import main
from sista_pl.errors import SistaError
from sista_pl.lightning_cli import SistaCLI, explain


def run(capsys, *argv):
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


LIGHT = ["torch", "pytorch_lightning", "mlflow", "numpy", "pandas", "timm"]


@pytest.mark.parametrize(
    ("argv", "absent"),
    [
        (["list"], LIGHT),
        (["list", "tasks"], LIGHT),
        (["list", "configs"], LIGHT),
        (["list", "datasets"], LIGHT),
        (["--help"], LIGHT),
        (["--version"], LIGHT),
        # its own ratio: `sista bench startup`
        (["list", "losses"], ["pytorch_lightning", "mlflow", "timm", "torchvision", "transformers"]),
        pytest.param(["list", "encoders"], ["pytorch_lightning", "mlflow"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_light_verbs_do_not_import_what_is_heavy(argv, absent):
    code = (
        "import sys; from sista_pl.cli import main; code = main(sys.argv[2:]); "
        "heavy = [m for m in sys.argv[1].split() if m in sys.modules]; "
        "assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, " ".join(absent), *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_what_is_found_in_the_source_is_what_is_registered():
    from sista_pl.data.formats import READERS
    from sista_pl.found import registered
    from sista_pl.losses import LOSSES
    from sista_pl.models import IMAGE_ENCODERS, TEXT_ENCODERS

    for name, registry in {
        "READERS": READERS, "LOSSES": LOSSES, "IMAGE_ENCODERS": IMAGE_ENCODERS, "TEXT_ENCODERS": TEXT_ENCODERS,
    }.items():  # fmt: skip
        own = [key for key in registry if registry[key].__module__.startswith("sista_pl.")]
        assert registered(name) == [(key, registry[key].__doc__.strip().splitlines()[0]) for key in own]


def test_python_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "sista_pl", "list", "tasks"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "\npretrain " in f"\n{done.stdout}"


def test_a_reader_that_has_read_enough_is_no_error():
    piped = f"{sys.executable} -m sista_pl list configs | true"
    done = subprocess.run(["bash", "-c", piped], capture_output=True, text=True)
    assert done.stderr == ""


def test_list_names_what_can_be_written_in_yaml(capsys):
    code, out, _ = run(capsys, "list")
    assert code == 0
    for name in ("pretrain", "small-bert", "clip", "sia", "sta", "mimic_cxr", "table", "pretrain.yaml"):
        assert name in out
    assert "vit_small_patch16_224" in run(capsys, "list", "encoders", "--match", "vit_small")[1]


@pytest.mark.parametrize("name", packaged.names())
def test_every_packaged_configuration_is_found_with_and_without_its_ending(name):
    assert packaged.find(name) == packaged.find(name.removesuffix(".yaml"))


def whole(name: str) -> list[str]:
    """The command-line part that makes a run of a packaged file: alone, or on top of a configuration that it fits."""
    group, _, rest = name.partition("/")
    if not rest:
        return ["--config", name]
    transfer = "TransferDataModule" in packaged.find(name).read_text()
    base = ["--config", "cls_rsna.yaml" if transfer else "pretrain.yaml"]
    return [*base, f"--{group}", name] if group in ("data", "trainer") else [*base, "--config", name]


@pytest.mark.parametrize("name", [name for name in packaged.names() if not name.startswith("benchmark/")])
def test_every_packaged_configuration_parses(name, capsys, workdir):
    code, out, err = run(capsys, "fit", *whole(name), "--print_config")
    assert code == 0, err
    config = yaml.safe_load(out)
    assert config["model"]["class_path"].endswith("Task")
    if name.startswith("data/"):
        assert ("phantom" in name) == bool(config["data"]["init_args"]["phantom"]), "a phantom is never silent"


def test_the_command_line_wins_over_interpolation(capsys, workdir):
    _, out, _ = run(capsys, "fit", "--config", "pretrain.yaml", "--data.crop", "96", "--print_config")
    config = yaml.safe_load(out)
    assert config["data"]["init_args"]["crop"] == 96


@pytest.mark.parametrize(
    "verb", ["data phantom --out x", "data doctor x", "data similarity x", "compare a=b", "report x"]
)
@pytest.mark.parametrize("seed", ["-1", "one"])
def test_a_seed_is_a_whole_number_from_0_on(verb, seed, capsys, workdir):
    with pytest.raises(SystemExit) as stop:
        main([*verb.split(), "--seed", seed])
    assert stop.value.code == 2
    assert f"argument --seed: {seed} is no whole number from 0 on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["fitt"], "unknown verb 'fitt'; did you mean fit?"),
        (["fit", "--config", "pretrian.yaml"], "did you mean pretrain.yaml?"),
        (["fit", "--config", "pretrain.yaml", "--model.lr_", "1"], "did you mean lr?"),
        (["fit", "--config", "pretrain.yaml", "--trainer.max_epoch", "1"], "did you mean max_epochs?"),
        (["fit", "--config", "pretrain.yaml", "--data.batchsize", "4"], "did you mean batch_size?"),
        (["fit", "--config", "pretrain.yaml", "--model.lr", "fast"], "fast"),
        (["fit", "--config", "pretrain.yaml", "--model", "PretrainTusk"], "did you mean PretrainTask?"),
        (["fit", "--config", "pretrain.yaml", "--trainer.logger", "CVSLogger"], "did you mean CSVLogger?"),
        (["fit", "--config", "pretrain.yaml", "--trainer.callbacks+=EarlyStoping"], "did you mean EarlyStopping?"),
        (["fit", "--config", "pretrain.yaml", "--data.batch_size", "1"], "a contrast needs at least 2 pairs"),
        (["fit", "--config", "pretrain.yaml", "--model.losses", "{a: {name: clipp}}"], "did you mean clip?"),
        (["fit", "--config", "pretrain.yaml", "--model.losses", "{}"], "no losses"),
        (["fit", "--config", "pretrain.yaml", "--model.losses", "{a: {name: clip, weight: -1}}"], "weight is -1"),
        (["fit", "--config", "pretrain.yaml", "--model.losses", "{a: {name: sta, sigma: 1.5}}"], "sigma"),
        (["fit", "--config", "pretrain.yaml", "--model.losses", "{a: {name: sta}}"], "add one, as"),
        (["fit", "--config", "pretrain.yaml", "--model.image_encoder", "resnet51"], "did you mean"),
        (["fit", "--config", "pretrain.yaml", "--model.head_norm", "group"], "head_norm is 'group'"),
        (["fit", "--config", "pretrain.yaml", "--ckpt_path", "last"], "no last checkpoint"),
        (["fit", "--config", "pretrain.yaml", "--ckpt_path", "nowhere.ckpt"], "no such file"),
        (["test", "--config", "pretrain.yaml"], "run `sista fit --config pretrain.yaml` first"),
        (["fit", "--config", "pretrain.yaml", "--privacy", "none"], "privacy"),
        (["fit", "--config", "pretrain.yaml", "--seed_everything", "-5"], "--seed_everything is -5; give one from 0"),
        (["fit", "--config", "pretrain.yaml", "--run_root", __file__], "is no folder that can be written"),
        (["fit", "--config", "pretrain.yaml", "--run_root", f"{__file__}/runs"], "is no folder that can be written"),
        (["list", "taskz"], None),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, workdir, argv, line):
    try:
        code, _, err = run(capsys, *argv)
    except SystemExit as stop:  # argparse's own refusal, of a light verb
        code, err = stop.code, capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in err
    if line is not None:
        message = [row for row in err.splitlines() if row.startswith("sista:")]
        assert len(message) == 1, err
        assert line in message[0]
    assert not (workdir / "runs").exists()
    assert not (workdir / "datasets").exists()


def test_the_configuration_of_a_run_brings_its_own_best_checkpoint(capsys, workdir, monkeypatch):
    _, out, _ = run(capsys, "fit", "--config", "pretrain.yaml", "--print_config")
    for name in ("0001", "0002", "0003"):
        (workdir / "runs/demo" / name / "checkpoints").mkdir(parents=True)
        # as a run has it that was resumed by a version that kept this
        resumed = re.sub(
            "^ckpt_path: .*", f"ckpt_path: runs/demo/{name}/checkpoints/last.ckpt", out, flags=re.MULTILINE
        )
        assert "last.ckpt" in resumed
        (workdir / "runs/demo" / name / "config.yaml").write_text(resumed)
        for which in ("best", "last") if name != "0003" else ("last",):
            path = workdir / "runs/demo" / name / "checkpoints" / f"{which}.ckpt"
            torch.save({"state_dict": {}, "hyper_parameters": {}, "task": "PretrainTask"}, path)

    def stop(cli):
        raise SistaError(f"{cli.run_name} {cli.config[cli.subcommand].ckpt_path}")

    monkeypatch.setattr(SistaCLI, "instantiate_classes", stop)
    for verb in ("test", "predict"):
        _, out, err = run(capsys, verb, "--config", "runs/demo/0001/config.yaml")
        assert "checkpoint: runs/demo/0001/checkpoints/best.ckpt" in out
        assert err == "sista: demo runs/demo/0001/checkpoints/best.ckpt\n"
    other = "runs/demo/0002/checkpoints/last.ckpt"
    given = ["test", "--config", "runs/demo/0001/config.yaml", f"--ckpt_path={other}"]
    assert run(capsys, *given)[2] == f"sista: demo {other}\n"
    code, _, err = run(capsys, "test", "--config", "runs/demo/0003/config.yaml")
    assert (code, err) == (
        2, "sista: runs/demo/0003: the run has no best checkpoint; fit it again, or give --ckpt_path FILE\n",
    )  # fmt: skip


def test_two_classes_of_one_name_are_told_apart(capsys, workdir, monkeypatch):
    monkeypatch.syspath_prepend(workdir)
    for name in ("our_tasks", "your_tasks"):
        (workdir / f"{name}.py").write_text(
            "from sista_pl.pretrain import PretrainTask\nclass Twofold(PretrainTask):\n    pass\n"
        )
        importlib.import_module(name)
    command = ["fit", "--config", "pretrain.yaml", "--print_config", "--model"]
    code, _, err = run(capsys, *command, "Twofold")
    assert (code, err.strip()) == (
        2, "sista: configuration: more than one class is called Twofold in 'model'; say which: "
        "our_tasks.Twofold, your_tasks.Twofold",
    )  # fmt: skip
    assert run(capsys, *command, "your_tasks.Twofold")[0] == 0


def test_broken_yaml_and_unknown_keys_in_files(capsys, workdir):
    (workdir / "broken.yaml").write_text("model: [1, 2\n")
    code, _, err = run(capsys, "fit", "--config", "broken.yaml")
    assert code == 2
    assert err.startswith("sista: ")
    (workdir / "latin.yaml").write_bytes("name: Bär\n".encode("latin-1"))
    code, _, err = run(capsys, "fit", "--config", "latin.yaml")
    assert code == 2
    assert err.startswith("sista: configuration: not YAML: 'utf-8' codec can't decode byte 0xe4 in position 7")
    (workdir / "extra.yaml").write_text("trainer:\n  max_epoch: 3\n")
    code, _, err = run(capsys, "fit", "--config", "pretrain.yaml", "--config", "extra.yaml")
    assert code == 2
    assert "max_epoch" in err
    assert len(err.splitlines()) == 1


def test_a_cut_checkpoint_is_one_line(capsys, workdir):
    (workdir / "cut.ckpt").write_bytes(b"PK\x03\x04 not all of it")
    code, _, err = run(capsys, "test", "--config", "pretrain.yaml", "--ckpt_path", "cut.ckpt")
    assert code == 2
    assert "cut short" in err


def test_verbs_run_one_after_the_other_as_far_as_they_succeed(capsys):
    assert main(["list", "losses", "--then", "--version"]) == 0
    said = capsys.readouterr().out
    assert said.index("clip") < said.index("sista 0")
    assert main(["sweep", "--config", "nothing.yaml", "--then", "--version"]) == 2
    assert "sista 0" not in capsys.readouterr().out


def test_help_teaches(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert "sista fit --config pretrain.yaml" in out
    code, out, _ = run(capsys, "fit", "--help")
    assert code == 0
    assert "--privacy" in out


def test_explain_is_always_one_line():
    assert "\n" not in explain('Parser key "a":\n  - first\n  - second\n')
    assert explain("") == "configuration: can't be parsed; see `sista fit --help`"


def test_find_names_the_nearest():
    with pytest.raises(SistaError, match=r"did you mean method/clip\.yaml"):
        packaged.find("method/clipp")


def test_an_option_before_its_configuration_says_so(capsys, workdir):
    assert main(["fit", "--model.image_size", "64", "--config", "cls_rsna.yaml"]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sista: ")]
    assert len(told) == 1
    assert "put --config before the options" in told[0]


def fill_by_text():
    with open("/dev/full", "w") as full:
        full.write("x" * 100_000)


def fill_by_array():
    with open("/dev/full", "wb") as full:
        np.save(full, np.ones(100_000))


def fill_by_table():
    with sqlite3.connect(":memory:") as database:
        database.execute("PRAGMA max_page_count = 2")
        database.execute("CREATE TABLE t (x TEXT)")
        database.execute("INSERT INTO t VALUES (?)", ["x" * 100_000])


@pytest.mark.parametrize("fill", [fill_by_text, fill_by_array, fill_by_table])
def test_a_full_disk_is_one_line_under_whatever_was_raised_from_it(fill, capsys, monkeypatch):
    def wrapped(argv):
        try:
            fill()
        except Exception as why:
            raise RuntimeError("the run failed") from why

    for dispatch in (lambda argv: fill(), wrapped):
        monkeypatch.setattr("sista_pl.cli._dispatch", dispatch)
        assert main(["fit"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "the disk is full; free some space" in line


def test_another_error_is_not_taken_for_a_full_disk(monkeypatch):
    monkeypatch.setattr("sista_pl.cli._dispatch", lambda argv: Path("nowhere/at/all").read_text())
    with pytest.raises(FileNotFoundError):
        main(["fit"])
