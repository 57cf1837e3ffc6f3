"""`sista list`: what is installed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sista_pl import found, packaged, plugins
from sista_pl.runs import CHECKPOINTS, runs_of

ANY = [
    ("any timm model", "image: by its name, as resnet50; `sista list encoders --match vit_small` searches"),
    ("hf:FOLDER_OR_HUB_ID", "image: RAD-DINO, SigLIP, CLIP, ViT, BiomedCLIP and their like"),
    ("any Hugging Face encoder", "text: by hub id or local folder"),
]
KINDS = ("tasks", "encoders", "losses", "datasets", "configs", "runs")


def main(argv: list[str]) -> int:
    """List one kind of thing, or all of them."""
    parser = argparse.ArgumentParser(
        prog="sista list",
        description="What is installed. Each name can be written in a configuration.",
        epilog="examples:\n  sista list\n  sista list losses\n  sista list encoders --match vit_s\n  sista list runs",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", nargs="?", choices=KINDS, help="what to list; all but runs where it is left out")
    parser.add_argument("--match", default="", help="only names that contain this")
    parser.add_argument("--root", default="runs", help="folder of the runs (default: runs)")
    options = parser.parse_args(argv)
    kinds = [options.kind] if options.kind else [k for k in KINDS if k != "runs"]
    whole = len(kinds) > 1  # from the source alone, at once
    listings: dict[str, Callable[[], list[tuple[str, str]]]] = {
        "tasks": _tasks,
        "encoders": _encoders_found if whole else lambda: _encoders(options.match),
        "losses": lambda: found.registered("LOSSES") if whole else _losses(),
        "datasets": lambda: found.registered("READERS"),
        "configs": _configs, "runs": lambda: _runs(Path(options.root)),
    }  # fmt: skip
    for kind in kinds:
        rows = [row for row in listings[kind]() if options.match in row[0]]
        if whole:
            print(f"{kind}:")
        width = min(40, max((len(name) for name, _ in rows), default=0))
        indent = "  " if whole else ""
        for name, text in rows:
            print(f"{indent}{name:<{width}}  {text}".rstrip())
        if not rows:
            print(f"{indent}none")
    return 0


def _tasks() -> list[tuple[str, str]]:
    return [
        (name, f"{entry.value}" + (f"  ({entry.dist.name})" if entry.dist is not None else ""))
        for name, entry in plugins.task_entries().items()
    ]


def _configs() -> list[tuple[str, str]]:
    return [(name, _first_comment(path)) for name, path in packaged.files_by_name().items()]


def _first_comment(path: Path) -> str:
    line = path.read_text().splitlines()[0] if path.stat().st_size else ""
    return line.lstrip("# ") if line.startswith("#") else ""


def _losses() -> list[tuple[str, str]]:
    plugins.load_others()
    from sista_pl.losses import LOSSES

    return [(name, _summary(LOSSES[name])) for name in LOSSES]


def _encoders(match: str) -> list[tuple[str, str]]:
    plugins.load_others()
    from sista_pl.models import IMAGE_ENCODERS, TEXT_ENCODERS

    rows = [(name, _summary(TEXT_ENCODERS[name])) for name in TEXT_ENCODERS]
    others = [(name, _summary(IMAGE_ENCODERS[name])) for name in IMAGE_ENCODERS]
    if match:
        import timm

        return _both(rows, others) + [(name, "image: timm") for name in timm.list_models() if match in name]
    return _both(rows, others) + ANY


def _encoders_found() -> list[tuple[str, str]]:
    return _both(found.registered("TEXT_ENCODERS"), found.registered("IMAGE_ENCODERS")) + ANY


def _both(texts: list[tuple[str, str]], images: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(n, f"text: {told}") for n, told in texts] + [(n, f"image: {told}") for n, told in images]


def _runs(root: Path) -> list[tuple[str, str]]:
    rows = []
    names = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    for name in names:
        for run in runs_of(root, name):
            try:
                told = _run_summary(run)
            except ValueError:
                told = "metrics.json can't be read; make this run again"
            rows.append((run.as_posix(), told))
    return rows


def _run_summary(run: Path) -> str:
    path, tested = run / "metrics.json", run / "test/metrics.json"
    if not path.is_file():
        trained = (run / CHECKPOINTS).is_dir()
        if trained or not tested.is_file():
            return "not finished; resume with --ckpt_path last" if trained else "not finished"
        return _test_summary(json.loads(tested.read_text()))
    metrics = json.loads(path.read_text())
    best = metrics.get("best") or {}
    figures = best.get("figures", {})
    parts = [f"best epoch {best.get('epoch')}", f"{metrics.get('monitor')} {best.get('score', float('nan')):.3f}"]
    for key in ("val/i2t_R@10", "val/t2i_R@10", "val/R@10_chance"):
        if key in figures:
            parts.append(f"{key.removeprefix('val/')} {figures[key]:.3f}")
    if metrics.get("phantom"):
        parts.append("PHANTOM DATA")
    return "  ".join(parts)


def _test_summary(metrics: dict[str, Any]) -> str:
    """Return the line of a run that is a test alone: an evaluation, which trains nothing."""
    key = str(metrics.get("monitor")).replace("val/", "test/")
    figure = metrics.get("intervals", {}).get(key) or {"value": float("nan"), "interval95": None}
    ends = "" if figure["interval95"] is None else "[{:.3f}, {:.3f}]".format(*figure["interval95"])
    return "  ".join(
        filter(None, [f"{key} {figure['value']:.3f}", ends, "PHANTOM DATA" * bool(metrics.get("phantom"))])
    )


def _summary(builder: object) -> str:
    lines = (builder.__doc__ or "").strip().splitlines()
    return lines[0] if lines else ""
