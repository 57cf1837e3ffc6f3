"""Where runs live on disk: `runs/<config>/<number>/`, the newest last."""

from __future__ import annotations

from pathlib import Path

from sista_pl.errors import SistaError

CHECKPOINTS = "checkpoints"


def runs_of(root: Path, name: str) -> list[Path]:
    """Return the run folders of a configuration, oldest first."""
    folder = root / name
    return sorted(p for p in folder.glob("[0-9]*") if p.is_dir() and p.name.isdigit()) if folder.is_dir() else []


def new_run(root: Path, name: str) -> Path:
    """Make the next run folder of a configuration."""
    runs = runs_of(root, name)
    number = int(runs[-1].name) + 1 if runs else 1
    path = root / name / f"{number:04d}"
    path.mkdir(parents=True)
    return path


def find_checkpoint(root: Path, name: str, which: str) -> Path:
    """Return the newest `best` or `last` checkpoint of a configuration.

    Raises:
        SistaError: there is none.
    """
    for run in reversed(runs_of(root, name)):
        path = run / CHECKPOINTS / f"{which}.ckpt"
        if path.is_file():
            return path
    raise SistaError(
        f"{name}: no {which} checkpoint under {root / name}; run `sista fit --config {name}.yaml` first, or give "
        "--ckpt_path FILE"
    )


def run_of_config(config: Path | None) -> Path | None:
    """Return the folder of the run whose own config.yaml this is, or None."""
    if config is None or config.name != "config.yaml":
        return None
    # a run that was stopped early has no checkpoints yet, an evaluation never has any
    kept = (CHECKPOINTS, "test", "mlflow_run_id")
    return config.parent if any((config.parent / name).exists() for name in kept) else None


def best_of(run: Path) -> Path:
    """Return the best checkpoint of a run's folder.

    Raises:
        SistaError: it has none.
    """
    best = run / CHECKPOINTS / "best.ckpt"
    if not best.is_file():
        raise SistaError(f"{run}: the run has no best checkpoint; fit it again, or give --ckpt_path FILE")
    return best


def has_checkpoint(root: Path, name: str, which: str) -> bool:
    """Return whether a configuration has a `best` or `last` checkpoint."""
    return any((run / CHECKPOINTS / f"{which}.ckpt").is_file() for run in runs_of(root, name))


def newest_tested(root: Path, name: str) -> Path | None:
    """Return the newest run of a configuration that was tested, or None: a test writes test/metrics.json last."""
    tested = [run for run in runs_of(root, name) if (run / "test" / "metrics.json").is_file()]
    return tested[-1] if tested else None


def unfinished(root: Path, name: str) -> bool:
    """Return whether the newest run of a configuration was stopped and left a checkpoint to go on from."""
    newest = runs_of(root, name)[-1:]
    return any((run / CHECKPOINTS / "last.ckpt").is_file() and not (run / "metrics.json").is_file() for run in newest)


def run_of(checkpoint: Path) -> Path | None:
    """Return the run folder that a checkpoint belongs to, or None where it lies elsewhere."""
    folder = checkpoint.resolve().parent
    return folder.parent if folder.name == CHECKPOINTS else None
