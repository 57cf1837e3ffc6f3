"""The `sista` command. Verbs that need no Trainer are dispatched here, before Lightning is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from sista_pl.errors import SistaError, did_you_mean, disk_full

TRAINER_VERBS = {
    "fit": "train a task",
    "validate": "run the validation split",
    "test": "run the test split",
    "predict": "predict without labels",
}
LIGHT_VERBS = {
    "data": ("sista_pl.commands.data", "draw a phantom, prepare and look at data"),
    "sweep": ("sista_pl.commands.sweep", "methods x seeds x tasks x label fractions, resumable, compared at the end"),
    "compare": ("sista_pl.commands.compare", "methods on stored predictions: paired intervals, p-values, ranks"),
    "report": ("sista_pl.commands.report", "a sweep as one HTML page: tables, curves, maps, worst cases"),
    "export": (
        "sista_pl.commands.export",
        "trained encoders for timm, Hugging Face, ONNX or an MLflow server, each folder checked",
    ),
    "embed": ("sista_pl.commands.embed", "films, and their reports, to vectors in one Parquet file"),
    "explain": ("sista_pl.commands.explain", "where in a film the words of a text light up, over its own pixels"),
    "new": ("sista_pl.commands.new", "begin a task of your own: a small plug-in package that works as it is"),
    "bench": ("sista_pl.commands.bench", "speed as ratios: the losses beside the encoders, the store beside decoding"),
    "list": ("sista_pl.commands.list", "what is installed: tasks, encoders, losses, datasets, configs, runs"),
}
THEN = "--then"
HELP = """usage: sista VERB ... [--then VERB ...]

{verbs}

first steps:
  sista fit --config pretrain.yaml               pre-train on a drawn phantom, no data needed
  sista list configs                             the packaged configurations
  sista fit --config pretrain.yaml --data.root /data/mimic-cxr-jpg ...   see `sista fit --help`
`sista VERB --help` tells more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code: 0, or 2 for a user's mistake or a full disk, told in one line.

    `fit … --then test …` runs one after the other, as far as they succeed, and imports the libraries once.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        while THEN in argv:
            place = argv.index(THEN)
            if code := _dispatch(argv[:place]):
                return code
            argv = argv[place + 1 :]
        return _dispatch(argv)
    except SistaError as why:
        print(f"sista: {why}", file=sys.stderr)
        return 2
    except Exception as why:
        if not disk_full(why):
            raise
        where = getattr(why, "filename", None) or Path.cwd()
        print(
            f"sista: {where}: the disk is full; free some space and give the same command again (a fit goes on with "
            "--ckpt_path auto)",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("sista: interrupted", file=sys.stderr)
        return 130


def console() -> None:
    """Entry point of the `sista` script."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # `sista … | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141  # as the shell has it of a program that SIGPIPE ended
    sys.exit(code)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    verb, *rest = argv
    if verb == "--version":
        print(f"sista {version('sista-pl')}")
        return 0
    if verb in LIGHT_VERBS:
        run: Callable[[list[str]], int] = import_module(LIGHT_VERBS[verb][0]).main
        return run(rest)
    if verb in TRAINER_VERBS:
        from sista_pl.lightning_cli import run_trainer

        return run_trainer(argv)
    raise SistaError(f"unknown verb {verb!r}; {did_you_mean(verb, [*TRAINER_VERBS, *LIGHT_VERBS])}")


def _help() -> str:
    verbs = TRAINER_VERBS | {name: text for name, (_, text) in LIGHT_VERBS.items()}
    return HELP.format(verbs="\n".join(f"  {name:<9} {text}" for name, text in verbs.items()))
