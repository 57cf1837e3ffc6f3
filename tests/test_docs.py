"""What the documents say against the code: commands are parsed by their own parsers and stopped there, code compiles,
links lead somewhere, and the reference has everything.
"""

import argparse
import ast
import functools
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml

from sista_pl import packaged, plugins
from sista_pl.cli import LIGHT_VERBS, TRAINER_VERBS, main
from sista_pl.errors import SistaError

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACEHOLDERS = ("mine.yaml",)  # a sweep of the reader's
STAND_IN = "cls_chexpert.yaml"  # for the config.yaml of a run that is not there
NAME = {"ids": lambda path: path.name}


class Parsed(Exception):
    """A command was understood; raised so that it is not run."""

    def __init__(self, options):
        self.options = options


def blocks(text, language):
    """Return the code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(block):
    """Return the arguments of each `sista` command of a shell block, of torchrun's and srun's, too."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|", re.sub(r"\$\w+", "0", line)):
            words = shlex.split(part, comments=True)
            if words[:1] == ["srun"]:
                words = words[1:]
            if words[:1] == ["torchrun"]:
                assert "sista_pl" in words, line
                words = ["sista", *words[words.index("sista_pl") + 1 :]]
            if words and words[0].endswith("sista"):
                found.append(words[1:])
    return found


@pytest.fixture(scope="module")
def trainer_parser():
    """A function of fit, validate, test or predict that returns its parser, built once."""
    from sista_pl.lightning_cli import SistaCLI

    def stop(cli, parser, args):
        raise Parsed(parser)

    @functools.cache
    def parser_of(verb):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SistaCLI, "parse_arguments", stop)
            with pytest.raises(Parsed) as parsed:
                main([verb])
        return parsed.value.options

    return parser_of


@pytest.fixture(scope="module")
def known():
    """What was found of commands that several documents have."""
    return {}


@pytest.fixture
def mistake(trainer_parser, known, monkeypatch, capsys):
    """A function of a command's arguments that returns what is wrong with them, or None; it runs nothing."""
    from sista_pl.data.formats import READERS
    from sista_pl.data.phantom.cohort import LAYOUTS
    from sista_pl.lightning_cli import _packaged_groups

    def stopping(parse):
        def parse_args(parser, args=None, namespace=None):
            raise Parsed(vars(parse(parser, args, namespace)))

        return parse_args

    def of_trainer(argv):
        argv = [re.sub(r"^runs/\S+/config\.yaml$", STAND_IN, word) for word in argv]
        if not any(word.endswith(".yaml") for word in argv):
            raise SistaError("no configuration")
        trainer_parser(argv[0]).parse_args(_packaged_groups(argv))

    def of_light(argv):
        options = {}
        with monkeypatch.context() as patch:
            for name in ("parse_args", "parse_intermixed_args"):
                patch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
            try:
                if code := main(argv):
                    raise SystemExit(code)
            except Parsed as parsed:
                options = parsed.options
        given = options.get("config") or []
        for config in [given] if isinstance(given, str) else given:
            if config not in PLACEHOLDERS:
                packaged.find(config)
        if argv[:2] == ["data", "prepare"]:
            READERS[options["name"]]
        if options.get("layout"):
            LAYOUTS[options["layout"]]

    def found(argv):
        if (words := tuple(argv)) not in known:
            known[words] = None
            try:
                of_trainer(argv) if argv[:1] and argv[0] in TRAINER_VERBS else of_light(argv)
            except SistaError as why:
                known[words] = str(why)
            except SystemExit:
                known[words] = capsys.readouterr().err.strip() or "refused"
        return known[words]

    return found


@pytest.mark.parametrize("path", FILES, **NAME)
def test_every_command_is_understood(path, mistake):
    told = [argv for block in blocks(path.read_text(), "bash") for argv in commands(block)]
    wrong = {shlex.join(argv): why for argv in told if (why := mistake(argv))}
    assert not wrong


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("sista fitt --config pretrain.yaml", "did you mean fit"),
        ("sista fit --config pretrian.yaml", "did you mean pretrain.yaml"),
        ("sista fit --config pretrain.yaml --data data/tabel.yaml", "did you mean data/table.yaml"),
        ("sista fit --config pretrain.yaml --trainer trainer/dpp.yaml", "did you mean trainer/ddp.yaml"),
        ("sista fit --config pretrain.yaml --model.weight FILE", "weight"),
        ("torchrun -m sista_pl fit --config pretrain.yaml \\\n  --trainer.node 2", "node"),
        ("srun sista fit --config pretrain.yaml --trainer trainer/slurm.yml", "slurm"),
        ("sista predict --config seg_siim.yaml --data.input FOLDER", "did you mean inputs"),
        ("sista data prepare chexprt --root R --out M", "did you mean chexpert"),
        ("sista data prepare chexpert --rot R --out M", "--root"),
        ("sista data phantom --layout sim --out R", "siim"),
        ("sista data doctr M", "doctr"),
        ("true && sista export --to timm --out DIR  # without a checkpoint", "--ckpt_path"),
        ("sista sweep --config benchmark/smok.yaml", "did you mean benchmark/smoke.yaml"),
        ("sista sweep --config mine.yaml --cel 0/3", "--cel"),
        ("sista list confgs", "confgs"),
    ],
)
def test_a_wrong_command_would_be_found(command, why, mistake):
    ((*argv,),) = commands(command)
    assert why in (mistake(argv) or "nothing wrong")


@pytest.mark.parametrize("path", FILES, **NAME)
def test_python_blocks_compile_and_import_what_is_there(path):
    for block in blocks(path.read_text(), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sista"):
                module = importlib.import_module(node.module)
                assert not [name.name for name in node.names if not hasattr(module, name.name)]


@pytest.mark.parametrize("path", FILES, **NAME)
def test_yaml_blocks_name_losses_and_sweeps_that_exist(path, mistake, tmp_path):
    from sista_pl.losses import LOSSES
    from sista_pl.sweep import read_sweep

    for block in blocks(path.read_text(), "yaml"):
        given = yaml.safe_load(block)
        losses = given.get("losses") or given.get("model", {}).get("init_args", {}).get("losses", {})
        for spec in losses.values():
            LOSSES.build({key: value for key, value in spec.items() if key != "weight"})
        if "methods" in given:
            (tmp_path / "mine.yaml").write_text(block)
            sweep = read_sweep(str(tmp_path / "mine.yaml"))
            # a pre-training, and a task that has no encoder to wait for
            first = [next(cell for cell in sweep.cells() if cell.task is None), sweep.cells()[0]]
            for cell in first:
                assert mistake(sweep.commands(cell, tmp_path)[0]) is None


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference(hooks):
    return hooks.pages()


def prose(text):
    """Return a page without code."""
    return re.sub(r"`[^`\n]+`", "code", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text):
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_links_lead_somewhere(hooks, reference):
    site = {path.name: hooks.on_page_markdown(path.read_text()) for path in FILES if path.parent.name == "docs"}
    site |= reference
    known = {ROOT / "docs" / name: text for name, text in site.items()} | {path: path.read_text() for path in FILES[:2]}
    broken = []
    for path, text in known.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
            if link.startswith(("https://", "http://")):
                continue
            file, _, anchor = link.partition("#")
            place = Path(path.parent, file).resolve() if file else path
            there = place in known or place.is_file()
            if not there or (anchor and anchor not in anchors(known.get(place, ""))):
                broken.append(f"{path.name}: {link}")
    assert not broken


def test_every_page_is_in_the_navigation(reference):
    config = (ROOT / "mkdocs.yml").read_text()
    named = set(re.findall(r"[\w/]+\.md", config))
    assert named == {path.name for path in FILES[2:]} | set(reference)
    assert "font: false" in config
    assert "http" not in config


def test_the_reference_names_everything(reference):
    from sista_pl.losses import LOSSES

    headings = {name: anchors(text) for name, text in reference.items()}
    assert headings["reference/commands.md"] >= {f"sista-{verb}" for verb in LIGHT_VERBS} | {"sista-data-prepare"}
    assert headings["reference/training.md"] >= {f"sista-{verb}" for verb in TRAINER_VERBS}
    assert headings["reference/losses.md"] >= set(LOSSES)
    assert headings["reference/tasks.md"] >= {task.__name__.lower() for task in plugins.load().values()}
    for name in packaged.names():
        assert f"## {name}\n" in reference["reference/configurations.md"]
    assert "--shard" in reference["reference/commands.md"]
    assert "--trainer.max_epochs" in reference["reference/training.md"]
    for text in reference.values():
        assert str(ROOT) not in text


def test_the_sections_of_contributing_are_put_in(hooks):
    text = hooks.on_page_markdown((ROOT / "docs" / "extend.md").read_text())
    assert "{{" not in text
    assert "class Blocks(ImageEncoder):" in text
    with pytest.raises(KeyError):
        hooks.on_page_markdown("{{ CONTRIBUTING: Add a planet }}")


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_fetches_nothing(tmp_path):
    pytest.importorskip("material")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path / "site"))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)  # strict: it raises where there was a warning
    pages = list((tmp_path / "site").rglob("*.html"))
    assert tmp_path / "site" / "reference" / "losses.html" in pages
    for page in pages:
        fetched = re.findall(r"<(?:script|img|iframe)[^>]+src=\"?(https?:[^\" >]+)|<link[^>]+href=\"?(https?:[^\" >]+)",
                             page.read_text())  # fmt: skip
        assert not fetched, page
