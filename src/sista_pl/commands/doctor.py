"""`sista data doctor`: what is wrong with a store or a raw release, before a week is spent on it."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import uuid
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sista_pl.commands.options import natural
from sista_pl.errors import SistaError

_HELP = """\
Examines a prepared store, or a raw release before it is prepared: patients, studies and images in two splits,
duplicates and near-duplicates, masks and boxes, labels that a split lacks, length and repetition of the reports, blank
and inverted images. Each check is ok, a note, a warning or a problem, and says what to do next.

Writes doctor.html (to look at), doctor.json (all figures) to <store>-doctor. Nothing leaves this machine; patient ids
are not shown, and image ids only with --show-ids. The page holds images: share it only as the data may be shared.

examples:
  sista data doctor stores/mimic
  sista data doctor raw/siim --format siim --option split=siim/mgca-rows --pixels 200

exit code: 0 no problem, 1 a problem, 2 a mistake in the command
"""
_STYLES = {"ok": "green", "note": "blue", "warning": "yellow", "problem": "bold red"}
_OURS = {"doctor.html", "doctor.json"}
SCHEMA = 1


def main(argv: list[str]) -> int:
    """Run `sista data doctor` and return 0, or 1 where a check found a problem.

    Raises:
        SistaError: no store or release there, an option that does not exist, a folder that cannot be written.
    """
    options = _parser().parse_args(argv)
    path: Path = options.path
    if options.format is None and (options.options or options.pixels):
        raise SistaError("doctor: --option and --pixels are for a raw release; name its --format too")
    if options.max_tokens < 1 or options.pixels < 0:
        raise SistaError("doctor: --max-tokens below 1 or --pixels below 0; give a count")
    resolved = path.resolve()
    out: Path = options.out or resolved.with_name(f"{resolved.name}-doctor")
    _check_out(out, resolved)
    count_tokens = _tokenizer(options.tokenizer) if options.tokenizer else None

    from sista_pl.data.doctor import Subject, diagnose, worst
    from sista_pl.data.doctor.page import page
    from sista_pl.data.store import Store

    if options.format is None:
        try:
            subject = Subject.of_store(Store.open(path))
        except SistaError:
            if path.exists() and not (path / "store.json").exists():
                raise SistaError(f"{path}: not a prepared store; for a raw release add --format NAME") from None
            raise
    else:
        subject = Subject.of_release(_release(options), options.pixels, options.seed)
    if not len(subject.table):
        raise SistaError(f"{path}: {subject.name} finds no image in it; check root and the reader's options")
    with _bar(len(subject.rows)) as advance:
        checks = diagnose(subject, options.max_tokens, count_tokens, advance)

    def name(row: int) -> str:
        image = str(subject.table["image_id"].iat[row])
        if options.show_ids:
            return image
        return "#" + hashlib.blake2b(image.encode(), key=subject.key.encode()[:64], digest_size=5).hexdigest()

    report = {
        "schema": SCHEMA,
        "subject": {
            "path": resolved.name, "kind": subject.kind, "name": subject.name, "version": subject.version,
            "phantom": subject.phantom, "split": subject.split, "options": subject.options,
            "images": len(subject.table), "images_with_pixels": len(subject.rows),
        },
        "level": worst(checks),
        "checks": [
            {
                "name": check.name, "level": check.level, "text": check.text, "step": check.step,
                "figures": check.figures,
                "examples": [{"images": [name(row) for row in rows], "note": note} for rows, note in check.examples],
            }
            for check in checks
        ],
    }  # fmt: skip
    html = page(subject, checks, resolved.name, name, options.seed)
    _write(out, {"doctor.json": json.dumps(_plain(report), indent=1, allow_nan=False) + "\n", "doctor.html": html})
    _show(report, out)
    return int(report["level"] == "problem")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sista data doctor", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, metavar="STORE|RAW", help="folder of a store, or of a raw release")
    parser.add_argument(
        "--format", metavar="NAME", help="reader of the raw release: mimic_cxr, rsna …; not for a store"
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", dest="options", help="an option of the reader"
    )
    parser.add_argument(
        "--pixels",
        type=int,
        default=0,
        metavar="N",
        help="decode N images of the raw release, at random (default: none)",
    )
    parser.add_argument("--max-tokens", type=int, default=112, help="limit of the text encoder (default: %(default)s)")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="with tokenizer.json: count tokens instead of an estimate"
    )
    parser.add_argument("--seed", type=natural, default=0, help="of the images drawn (default: %(default)s)")
    parser.add_argument("--show-ids", action="store_true", help="show the ids of images instead of hashes")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: <store>-doctor beside it)")
    return parser


def _release(options: argparse.Namespace) -> Any:
    from sista_pl.commands.options import parse
    from sista_pl.data.formats import READERS

    return READERS.build({"name": options.format, "root": options.path, **parse(options.options)})


def _tokenizer(folder: Path) -> Callable[[list[str]], list[int]]:
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json" if folder.is_dir() else folder
    try:
        tokenizer = Tokenizer.from_file(str(file))
    # the library raises a plain Exception
    except Exception as why:
        raise SistaError(f"{file}: not a tokenizer ({why}); give a folder with tokenizer.json") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda texts: [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]


def _check_out(out: Path, examined: Path) -> None:
    if examined.is_dir() and out.resolve().is_relative_to(examined):
        raise SistaError(f"{out}: lies in the data that are examined; give --out a folder outside")
    if out.exists() and not (out.is_dir() and {file.name for file in out.iterdir()} <= _OURS):
        raise SistaError(f"{out}: exists and holds something else; give --out another folder")


def _write(out: Path, files: dict[str, str]) -> None:
    """Write the folder under another name and put it in the place of the last one."""
    tag = uuid.uuid4().hex[:8]
    part, old = out.with_name(f"{out.name}.{tag}.part"), out.with_name(f"{out.name}.{tag}.old")
    try:
        part.mkdir(parents=True)
        for name, text in files.items():
            (part / name).write_text(text, encoding="utf-8")
        if out.exists():
            os.rename(out, old)
        os.rename(part, out)
    except OSError as why:
        raise SistaError(f"{out}: cannot be written ({why.strerror}); give --out another folder") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _plain(value: Any) -> Any:
    """Return what JSON can say: numpy's numbers as Python's, NaN and infinity as null, keys as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)


@contextmanager
def _bar(total: int):
    """A bar over the images, on a terminal."""
    if not sys.stderr.isatty() or not total:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda n: bar.advance(task, n)


def _show(report: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, subject = Console(), report["subject"]
    if subject["phantom"]:
        console.print("PHANTOM DATA: drawn, not taken from patients", style="bold")
    table = Table("", "check", "", title=Text(f"{subject['path']}: {subject['version']}"))
    for check in report["checks"]:
        text = Text(check["text"])
        if check["step"]:
            text.append(f"\n→ {check['step']}", style="dim")
        table.add_row(Text(check["level"], style=_STYLES[check["level"]]), Text(check["name"]), text)
    console.print(table)
    print(f"{report['level']}: {out / 'doctor.html'}, {out / 'doctor.json'}")
