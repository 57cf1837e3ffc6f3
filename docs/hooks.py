"""mkdocs hooks: the reference, written from the code as the site is built, and the text of CONTRIBUTING.md."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

from sista_pl import packaged, plugins
from sista_pl.cli import LIGHT_VERBS, TRAINER_VERBS, main


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the reference."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put a section of CONTRIBUTING.md in the place of a line `{{ CONTRIBUTING: Its heading }}`."""
    parts = re.split(r"^## (.+)\n", (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    line = re.compile(r"^\{\{ CONTRIBUTING: (.+) \}\}$", re.MULTILINE)
    return line.sub(lambda match: sections[match[1]].strip(), markdown)


def pages() -> dict[str, str]:
    """Return the pages of the reference, Markdown by path."""
    from sista_tasks.detection.detectors import DETECTORS
    from sista_tasks.segmentation.decoders import DECODERS

    from sista_pl.data.formats import READERS
    from sista_pl.data.module import BaseDataModule
    from sista_pl.data.pairs import PairDataModule
    from sista_pl.data.phantom.cohort import LAYOUTS
    from sista_pl.data.similarity import SOURCES
    from sista_pl.data.splits import NAMED_SPLITS
    from sista_pl.data.transfer import TransferDataModule
    from sista_pl.losses import LOSSES
    from sista_pl.models import IMAGE_ENCODERS, TEXT_ENCODERS

    tasks = plugins.load()
    bases = {cls.__name__: cls for task in tasks.values() for cls in task.__mro__ if cls.__module__[:9] == "sista_pl."}
    modules = {cls.__name__: cls for cls in (PairDataModule, TransferDataModule, BaseDataModule)}
    any_timm = "Any timm model is an image encoder and any encoder of Hugging Face a text encoder, by its name."
    found_by = "What `--config NAME`, `--data NAME` and `--trainer NAME` find."
    files = packaged.files_by_name().items()
    configurations = [f"## {name}\n\n{code(path.read_text(), 'yaml')}" for name, path in files]
    layouts = f"`sista data phantom --layout NAME` draws for: {', '.join(f'`{name}`' for name in LAYOUTS)}."
    return {
        "reference/commands.md": commands(LIGHT_VERBS, "Commands"),
        "reference/training.md": commands(TRAINER_VERBS, "Commands that train and test"),
        "reference/configurations.md": page("Packaged configurations", found_by, *configurations),
        "reference/tasks.md": page("Tasks", things({task.__name__: task for task in tasks.values()} | bases)),
        "reference/losses.md": page("Losses", things(LOSSES)),
        "reference/encoders.md": page("Encoders", any_timm, things(IMAGE_ENCODERS), things(TEXT_ENCODERS)),
        "reference/heads.md": page("Decoders and detectors", things(DECODERS), things(DETECTORS)),
        "reference/data.md": page(
            "Data", "## Data modules", things(modules, 3), "## Releases", layouts, things(READERS, 3), "## Splits",
            things(NAMED_SPLITS, 3), "## Sources of report similarity", things(SOURCES, 3),
        ),
    }  # fmt: skip


def page(title: str, *parts: str) -> str:
    """Return a page of a title and what is under it."""
    return "\n\n".join([f"# {title}", *parts]) + "\n"


def code(text: str, language: str = "text") -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def things(known: Any, level: int = 2) -> str:
    """Return name, arguments and docstring of each class or function of a registry or a dict."""
    texts = {name: (arguments(known[name]), inspect.getdoc(known[name]) or "") for name in known}
    parts = (f"{'#' * level} {name}\n\n{code(f'{name}({a})', 'python')}\n\n{code(t)}" for name, (a, t) in texts.items())
    return "\n\n".join(parts)


def arguments(builder: Callable[..., Any]) -> str:
    """Return the arguments, one a line; nothing of a class whose constructor is torch's."""
    known = list(inspect.signature(builder).parameters.values())
    if any(argument.kind is argument.VAR_POSITIONAL for argument in known):
        return ""
    lines = [f"{argument}".replace(repr(argument.annotation), str(argument.annotation)) for argument in known]
    return "\n" + "".join(f"    {line},\n" for line in lines) if lines else ""


def commands(verbs: Iterable[str], title: str) -> str:
    """Return the help of each verb and of the verbs below it."""
    parts = []
    for verb in verbs:
        text = said(verb)
        below = re.search(r"^  (?:VERB|KIND)\n((?:    .*\n)+)", text, re.MULTILINE)
        parts += [f"## sista {verb}", code(text)]
        for name in re.findall(r"^    ([a-z]+)", below[1] if below else "", re.MULTILINE):
            parts += [f"### sista {verb} {name}", code(said(verb, name))]
    return page(title, *parts)


def said(*verb: str) -> str:
    """Return what `sista VERB --help` prints."""
    out = io.StringIO()
    environment = mock.patch.dict(os.environ, COLUMNS="100", NO_COLOR="1")
    with environment, contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*verb, "--help"])
    return out.getvalue()
