"""MS-CXR: phrases of reports with the boxes that radiologists drew for them, on films of MIMIC-CXR-JPG."""

from __future__ import annotations

import math
import re
from pathlib import Path

from sista_pl.data.formats import READERS, Release, Row, is_phantom, need_columns, read_csv
from sista_pl.data.reports import clean
from sista_pl.errors import SistaError

_NAME = "MS_CXR_Local_Alignment_v{}.csv"
_VERSIONS = ("1.1.0", "1.0.0")
_COLUMNS = ("dicom_id", "category_name", "label_text", "path", "x", "y", "w", "h")
_PATH = re.compile(r"(?:^|/)(files/p[0-9]{2}/p(?P<patient>[0-9]{1,12})/s(?P<study>[0-9]{1,12})/(?P<film>[\w-]+)\.jpg)$")
_FOLDERS = ("", "ms-cxr", "ms-cxr/1.1.0", "ms-cxr/0.1", "ms-cxr/1.0.0")


@READERS.register("ms_cxr")
def read_ms_cxr(root: Path, table: str | Path | None = None) -> Release:
    """Read MS-CXR: a row a film, each of its boxes with its category and its `phrase`; every film is in the test split.

    A film has the label 1 of the categories that it has boxes of, and NaN of the others, which nobody looked for. The
    films come from all splits of MIMIC-CXR: give this table to `mimic_cxr` as its option `hold_out`, so that their
    patients take no part in pre-training. No image file is touched: one that is missing shows when the store is
    prepared.

    Args:
        root: the folder of MIMIC-CXR-JPG, with `files/`.
        table: `MS_CXR_Local_Alignment_v1.1.0.csv` (or 1.0.0); by default searched in and beside `root`.

    Raises:
        SistaError: no table, a missing column.
    """
    root = Path(root)
    file = Path(table) if table is not None else _find(root)
    if file is None or not file.is_file():
        missing = file or f"{root}: {_NAME.format(_VERSIONS[0])}"
        raise SistaError(f"{missing} not found; download MS-CXR from PhysioNet, or give the file as the option table")
    found = read_csv(file)
    need_columns(file, list(found.columns), _COLUMNS)
    films: dict[str, Row] = {}
    skipped: list[tuple[str, str]] = []
    wrong: set[str] = set()
    for number, (dicom, category, phrase, path, *place) in enumerate(
        found[list(_COLUMNS)].itertuples(index=False, name=None), start=2
    ):
        source, phrase = f"{file.name}:{number}", clean(phrase)
        where = _PATH.search(path)
        box = dict(zip("xywh", map(_number, place), strict=True))
        why = (
            f"{path!r} is no path of MIMIC-CXR-JPG" if where is None
            else f"{path!r} is no film {dicom}" if where["film"] != dicom
            else "no category or no phrase" if not category or not phrase
            else "a box is no rectangle" if not _is_box(box)
            else ""
        )  # fmt: skip
        if where is None or why:
            if dicom not in wrong:
                skipped.append((dicom or source, f"{source}: {why}"))
            wrong.add(dicom)
            continue
        patient, study = where["patient"], where["study"]
        film = films.setdefault(
            dicom, Row(dicom, patient, study, root / where[1], "", "test", "", "", boxes=[], source=source)
        )
        assert film.boxes is not None
        film.boxes.append({"category": category, **box, "phrase": phrase})
    rows = [film for dicom, film in films.items() if dicom not in wrong]
    names = sorted({box["category"] for row in rows for box in row.boxes or ()})
    for row in rows:
        shown = {box["category"] for box in row.boxes or ()}
        row.labels = {name: 1.0 if name in shown else math.nan for name in names}
    version = next((v for v in _VERSIONS if v in file.name), "")
    return Release("ms_cxr", f"MS-CXR {version}".strip(), rows, skipped, is_phantom(root), root)


def _find(root: Path) -> Path | None:
    places = [above / folder for above in dict.fromkeys([root, root.parent, root.parent.parent]) for folder in _FOLDERS]
    files = [place / _NAME.format(version) for version in _VERSIONS for place in places]
    return next((file for file in files if file.is_file()), None)


def _is_box(box: dict[str, float]) -> bool:
    return all(map(math.isfinite, box.values())) and box["w"] > 0 and box["h"] > 0


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
