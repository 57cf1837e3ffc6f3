"""Every reader on damaged releases: one clear line, or a counted skip; never a traceback, never a file elsewhere."""

import contextlib
import gzip
import inspect
import os
import random
import shutil
import zipfile
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sista_pl.data.formats import READERS
from sista_pl.data.phantom import LAYOUTS, write_phantom
from sista_pl.data.prepare import prepare
from sista_pl.errors import SistaError

TABLES = (".csv", ".csv.gz", ".txt", ".tsv", ".xml", ".zip")
JUNK = [
    "",
    "nan",
    "-1",
    "-1e9",
    "1e400",
    "../../../../etc/passwd",
    "/etc/passwd",
    "0",
    "x" * 5000,
    "\x00",
    "é",
    "1 2 3",
]


def damage_bytes(file: Path, rng: random.Random) -> None:
    raw = file.read_bytes()
    how = rng.choice(["cut", "flip", "empty", "noise", "double", "gone"])
    if how == "cut":
        file.write_bytes(raw[: rng.randrange(len(raw) + 1)])
    elif how == "flip":
        flipped = bytearray(raw)
        for _ in range(rng.randrange(1, 30)):
            flipped[rng.randrange(len(raw))] = rng.randrange(256)
        file.write_bytes(flipped)
    elif how == "noise":
        file.write_bytes(rng.randbytes(rng.randrange(2000)))
    elif how == "double":
        file.write_bytes(raw + raw)
    else:
        file.write_bytes(b"") if how == "empty" else file.unlink()


def damage_table(file: Path, rng: random.Random) -> None:
    open_ = gzip.open if file.suffix == ".gz" else open
    with open_(file, "rt", encoding="utf-8", newline="") as source:
        lines = source.read().split("\n")
    how = rng.choice(["shuffle", "rename", "cell", "cell", "cell", "repeat", "drop"])
    place = rng.randrange(len(lines))
    if how == "shuffle":
        rng.shuffle(lines)
    elif how == "rename":
        lines[0] = lines[0].replace(rng.choice(lines[0].split(",")), rng.choice(["", "other", "study_id"]))
    elif how == "cell":
        cells = lines[place].split(",")
        cells[rng.randrange(len(cells))] = rng.choice(JUNK)
        lines[place] = ",".join(cells)
    elif how == "repeat":
        lines.append(lines[place])
    else:
        del lines[place]
    with open_(file, "wt", encoding="utf-8", newline="") as target:
        target.write("\n".join(lines))


def tree(folder: Path) -> set[str]:
    return {os.path.join(base, name) for base, _, names in os.walk(folder) for name in names}


@pytest.fixture(scope="session")
def releases(tmp_path_factory):
    """One small release of each layout, drawn once."""
    base = tmp_path_factory.mktemp("whole")
    found = {}
    for name in sorted(LAYOUTS):
        found[name] = write_phantom(name, base / name, 6, seed=2, size=48, workers=1, progress=False)
    (base / "table").mkdir()
    lines = ["image,report,patient,view,label_Edema"]
    for row in READERS.build({"name": "mimic_cxr", "root": found["mimic_cxr"]}).rows:
        shutil.copy(row.image, base / "table")
        lines.append(f"{row.image.name},{f'{row.findings} {row.impression}'.replace(',', ' ')},{row.patient_id},PA,1")
    (base / "table/studies.csv").write_text("\n".join(lines) + "\n")
    zipped = shutil.copytree(found["mimic_cxr"], base / "zip")
    with zipfile.ZipFile(zipped / "mimic-cxr-reports.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(zipped.rglob("s*.txt")):
            archive.write(file, file.relative_to(zipped))
            file.unlink()
    return found | {"table": base / "table", "mimic_cxr, zip": zipped}


def check(name: str, whole: Path, base: Path, seed: int) -> str:
    rng = random.Random(seed)
    shutil.rmtree(base, ignore_errors=True)
    root, out = base / "raw", base / "store"
    shutil.copytree(whole, root)
    files = sorted(f for f in root.rglob("*") if f.is_file() and "phantom" not in f.relative_to(root).parts)
    tables = [f for f in files if f.name.endswith(TABLES)]
    for _ in range(rng.randrange(1, 4)):
        file = rng.choice(tables if rng.random() < 0.6 and tables else files)
        if file.is_file() and file.stat().st_size:
            try:
                text = file in tables and file.suffix != ".zip" and rng.random() < 0.8
                damage_table(file, rng) if text else damage_bytes(file, rng)
            except (UnicodeDecodeError, OSError, EOFError, zlib.error):
                continue  # damaged before, so that it is no table any more
    before = tree(base)
    try:
        release = READERS.build({"name": name.split(",")[0], "root": root})
        assert all(len(entry) == 2 and entry[1] for entry in release.skipped)
        for row in release.rows:
            assert row.image.resolve().is_relative_to(root.resolve()), "a path left the release"
        store = prepare(release, out, size=32, max_bad=rng.choice([0.01, 1]), progress=False)
        assert len(store) + store.info["skipped"] >= 1
        outcome = "store"
    except SistaError as error:
        outcome, line = "refused", str(error)
        if "\n" in line or len(line) > 1000:
            raise AssertionError("not one clear line") from error
    assert all("/store" in path for path in tree(base) - before), "written outside the store"
    return outcome


def fuzz(releases, base: Path, cases: int) -> dict[str, int]:
    counts: dict[str, int] = {}

    @settings(max_examples=cases, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck])
    @given(st.sampled_from(sorted(releases)), st.integers(0, 2**32))
    def run(name: str, seed: int) -> None:
        outcome = check(name, releases[name], base / "case", seed)
        counts[f"{name} {outcome}"] = counts.get(f"{name} {outcome}", 0) + 1

    run()
    return counts


def test_damaged_releases_are_refused_in_one_line_or_their_faults_counted(releases, tmp_path):
    assert sum(fuzz(releases, tmp_path, 60).values()) >= 60


@pytest.mark.parametrize("value", [5, None, True, [5], {"a": 1}, "x"], ids=str)
def test_an_option_of_any_kind_is_taken_or_refused(releases, value):
    for name in releases.keys() & set(READERS):
        for option in list(inspect.signature(READERS[name]).parameters)[1:]:
            with contextlib.suppress(SistaError):
                READERS.build({"name": name, "root": releases[name], option: value})


def test_what_an_option_is_and_should_be(tmp_path):
    for spec, line in (
        ({"name": "mimic_cxr", "labels": None}, "mimic_cxr: labels is null; give a text"),
        ({"name": "mimic_cxr", "views": [5]}, r"mimic_cxr: views is \[5\]; give a list of texts or null"),
        ({"name": "table", "columns": "image"}, "table: columns is 'image'; give a mapping, {key: value} or null"),
        ({"name": "table", "seed": True}, "table: seed is True; give a whole number"),
        ({"name": "table", "require_report": 1}, "table: require_report is 1; give true or false"),
    ):
        with pytest.raises(SistaError, match=line):
            READERS.build(spec, root=tmp_path)


@pytest.mark.slow
def test_a_thousand_damaged_releases(releases, tmp_path):
    counts = fuzz(releases, tmp_path, 1050)
    print(f"\n{sum(counts.values())} cases: {counts}")
    assert sum(counts.values()) >= 1000
    assert any(name.endswith("store") for name in counts)
    assert any(name.endswith("refused") for name in counts)
