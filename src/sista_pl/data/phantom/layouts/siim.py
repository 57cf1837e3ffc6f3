"""The phantom as SIIM-ACR stage 1 lies on disk: nested DICOM, relative run lengths, several rows a film."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sista_pl.data.phantom.cohort import LAYOUTS, Drawn, Layout
from sista_pl.data.phantom.dicom import write_dicom


@LAYOUTS.register("siim")
def siim() -> Layout:
    """SIIM-ACR stage 1, awkward parts included: a blank in the header and before some -1, masks cut over rows.

    A pneumothorax is on 22 % of the films, as in the release.
    """
    return Layout(_write_study, _write_tables, aspect=False, positive=("pneumothorax", 0.22))


def relative_runs(mask: np.ndarray) -> str:
    """(H, W) bool → "gap length gap length …", down the columns."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    starts, ends = edges[::2], edges[1::2]
    gaps = starts - np.concatenate([[0], ends[:-1]])
    return " ".join(f"{gap} {end - start}" for gap, start, end in zip(gaps, starts, ends, strict=True))


def _write_study(drawn: Drawn, root: Path) -> dict:
    digits = str(int(drawn.name(), 16))
    name = f"1.2.276.0.7230010.3.1.4.8323329.{digits[:5]}.{digits[5:15]}.{digits[15:21]}"
    study, series = name.replace(".4.8323329.", ".2.8323329."), name.replace(".4.8323329.", ".3.8323329.")
    folder = root / "dicom-images-train" / study / series
    folder.mkdir(parents=True)
    # the release has none, other hospitals do: every fifth film is stored inverted
    inverted = drawn.extra.random() < 0.2
    write_dicom(folder / f"{name}.dcm", drawn.rendering.image, drawn.study.view,
                "MONOCHROME1" if inverted else "MONOCHROME2")  # fmt: skip
    masks = [mask for kind, mask in drawn.rendering.masks.items() if kind.startswith("pneumothorax.")]
    union = np.logical_or.reduce(masks) if masks else np.zeros(drawn.rendering.image.shape, bool)
    return {"name": name, "runs": _rows(union), "truth": drawn.truth(name, inverted=inverted)}


def _rows(mask: np.ndarray) -> list[str]:
    """Cut a mask at its middle row, as annotators who drew twice: up to two rows of the table."""
    lines = np.flatnonzero(mask.any(1))
    if not len(lines):
        return []
    middle = int(lines[len(lines) // 2])
    above, below = mask.copy(), mask.copy()
    above[middle:], below[:middle] = False, False
    return [relative_runs(part) for part in (above, below) if part.any()]


def _write_tables(root: Path, records: list[dict]) -> None:
    lines = ["ImageId, EncodedPixels"]
    for number, record in enumerate(records):
        lines += [f"{record['name']}, {runs}" for runs in record["runs"]]
        if not record["runs"]:
            lines.append(f"{record['name']},{' ' if number % 2 else ''}-1")
    (root / "train-rle.csv").write_text("\n".join(lines) + "\n", newline="\n")
