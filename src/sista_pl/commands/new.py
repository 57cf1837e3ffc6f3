"""`sista new`: the beginning of a plug-in; needs neither torch nor Lightning."""

from __future__ import annotations

import argparse
import keyword
import os
import re
import shlex
import shutil
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template

from sista_pl import packaged, plugins
from sista_pl.errors import SistaError

_EPILOG = """\
It makes a package that is installed beside sista-pl and changes nothing in it:
  pyproject.toml            the entry point `sista.tasks`, by which the command finds the task
  sista_NAME/task.py        a small task that trains, tests and predicts: yours from here on
  sista_NAME/configs/       NAME.yaml, found by `sista fit --config NAME.yaml` once the package is installed
  tests/test_task.py        one call of sista_pl.testing.check_task, the conformance kit
Example:
  sista new task laterality
  pip install --editable sista-laterality
  python -m pytest sista-laterality
  sista fit --config laterality.yaml
"""
_FILES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    ".gitignore": "gitignore",
    "$package/__init__.py": "init.py",
    "$package/task.py": "task.py",
    "$package/configs/$name.yaml": "config.yaml",
    "tests/test_task.py": "test_task.py",
}


def main(argv: list[str]) -> int:
    """Run `sista new …`.

    Raises:
        SistaError: a mistake of the user.
    """
    parser = argparse.ArgumentParser("sista new", description="Begin something of your own, as a plug-in package.")
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    task = kinds.add_parser(
        "task", help="a downstream task: package, configuration, conformance test", epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    task.add_argument("name", metavar="NAME", help="of the task, in lower case, as pleural_effusion")
    task.add_argument("--out", type=Path, metavar="DIR", help="folder to make (default: sista-NAME)")
    options = parser.parse_args(argv)
    check_name(options.name)
    out = options.out or Path(f"sista-{options.name.replace('_', '-')}")
    write_task(options.name, out)
    print(f"{out}: a task of your own, in {len(_FILES)} files; next:")
    there = shlex.quote(str(out))
    print(f"  pip install --editable {there}\n  python -m pytest {there}\n  sista fit --config {options.name}.yaml")
    return 0


def check_name(name: str) -> None:
    """Refuse a name that is no lower-case identifier, or that something has already.

    Raises:
        SistaError: such a name.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name) or keyword.iskeyword(name):
        near = re.sub(r"\W+|_+", "_", name.lower(), flags=re.ASCII).strip("_")[:40]
        fits = re.fullmatch(r"[a-z][a-z0-9_]*", near) and not keyword.iskeyword(near)
        told = f"did you mean {near}?" if fits else "as in pleural_effusion"
        raise SistaError(f"task {name!r}: give a lower-case identifier of at most 40 letters; {told}")
    tasks = plugins.task_entries()
    if name in tasks:
        raise SistaError(f"task {name!r}: there is one already ({tasks[name].value}); choose another name")
    if find_spec(f"sista_{name}") is not None:
        raise SistaError(f"task {name!r}: a package sista_{name} is installed already; choose another name")
    if f"{name}.yaml" in packaged.names():
        raise SistaError(f"task {name!r}: there is a configuration {name}.yaml already; choose another name")


def write_task(name: str, out: Path) -> None:
    """Write the package of a task into a new folder, all of it or nothing.

    Raises:
        SistaError: the folder is not empty, or can't be written.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise SistaError(f"{out}: it is there already and not empty; give another folder as --out DIR")
    words = {
        "name": name, "package": f"sista_{name}", "distribution": f"sista-{name.replace('_', '-')}",
        "task": "".join(word.capitalize() for word in name.split("_")) + "Task",
    }  # fmt: skip
    templates = files("sista_pl.commands") / "templates"
    part = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.part")
    try:
        for target, template in _FILES.items():
            path = part / Template(target).substitute(words)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(Template((templates / f"{template}.txt").read_text()).substitute(words))
        part.replace(out.absolute())
    except OSError as why:
        raise SistaError(f"{out}: it can't be written ({why.strerror}); give another folder as --out DIR") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
