"""The phantom as Object-CXR lies on disk: coins, buttons, plates and pendants on every other film."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from sista_pl.data.phantom.cohort import LAYOUTS, Drawn, Layout


@LAYOUTS.register("object_cxr")
def object_cxr() -> Layout:
    """Object-CXR: foreign objects as rectangle (0), ellipse (1) and polygon (2), up to four on every other film."""
    return Layout(_write_study, _write_tables, objects=(0.5, 4))


def _write_study(drawn: Drawn, root: Path) -> dict:
    part = "dev" if drawn.plan.split == "test" else "train"
    name = f"{drawn.plan.patient:05d}{drawn.plan.study}.jpg"
    (root / part).mkdir(exist_ok=True)
    Image.fromarray(drawn.rendering.image).save(root / part / name, quality=92)
    text = ";".join(f"{kind} {' '.join(map(str, points))}" for kind, points in drawn.shapes)
    return {"part": part, "name": name, "annotation": text, "truth": drawn.truth(f"{part}/{name}", annotation=text)}


def _write_tables(root: Path, records: list[dict]) -> None:
    for part in ("train", "dev"):
        (root / part).mkdir(exist_ok=True)
        lines = [f"{record['name']},{record['annotation']}" for record in records if record["part"] == part]
        text = "".join(f"{line}\n" for line in ("image_name,annotation", *lines))
        (root / f"{part}.csv").write_text(text, newline="\n")
