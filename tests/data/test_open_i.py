"""Open-i / IU X-ray: both layouts read back as they were drawn; views, labels, XML that attacks, tables that lie."""

import json
import random
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sista_pl.data.formats import READERS
from sista_pl.data.formats.open_i import LABELS, image_key, labels_of
from sista_pl.data.phantom import write_phantom
from sista_pl.data.prepare import prepare
from sista_pl.data.splits import grouped_split
from sista_pl.errors import SistaError

STUDIES = 40


def phantom(folder, form, **options):
    layout = {"name": "open_i", "form": form}
    return write_phantom(layout, folder, **{"studies": STUDIES, "size": 64, "workers": 1, "progress": False} | options)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_i")
    return {form: phantom(folder / form, form) for form in ("tables", "xml")}


@pytest.fixture
def copy(roots, tmp_path):
    def copied(form):
        return shutil.copytree(roots[form], tmp_path / form)

    return copied


def read(root, **options):
    return READERS.build({"name": "open_i", "root": root, **options})


def xml(root, name="9999", body="", head=""):
    file = root / "ecgen-radiology" / f"{name}.xml"
    file.write_text(f'{head}<eCitation><uId id="CXR{name}"/>{body}</eCitation>', encoding="utf-8")
    return file


# ── what comes back ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", ["tables", "xml"])
def test_rows_are_what_was_drawn(roots, form, tmp_path):
    release = read(roots[form])
    truth = pd.read_parquet(roots[form] / "phantom/truth.parquet").set_index("image_id")
    assert release.phantom
    assert not release.skipped
    frontal = [row for row in release.rows if row.image_id in truth.index]
    assert len(frontal) == STUDIES == len(truth)
    assert len({row.patient_id for row in release.rows}) == STUDIES
    for row in frontal:
        drawn = truth.loc[row.image_id]
        assert row.patient_id == row.study_id == f"CXR{drawn.uid}"
        assert Image.open(row.image).size == (drawn.columns, drawn.rows)
        kinds = {statement.split("/")[0] for statement in json.loads(drawn.attributes)}
        for kind, label in (("effusion", "Effusion"), ("nodule", "Nodule"), ("pneumothorax", "Pneumothorax")):
            assert row.labels[label] == (kind in kinds)
        assert len(f"{row.findings} {row.impression}".split()) >= 12
    assert [row.split for row in release.rows] == grouped_split([row.patient_id for row in release.rows])
    assert len(prepare(release, tmp_path / "store", size=32, progress=False)) == len(release.rows)


def test_the_two_layouts_hold_the_same(roots):
    tables, other = (read(roots[form], views=None) for form in ("tables", "xml"))
    assert "tables" in tables.version
    assert "projections unknown" in other.version
    assert {row.view for row in tables.rows} == {"Frontal", "Lateral"}
    assert {row.view for row in other.rows} == {""}
    same = lambda row: (row.image_id, row.patient_id, row.split, row.findings, row.impression, row.labels)  # noqa: E731
    key = lambda row: row.image_id  # noqa: E731
    assert [*map(same, sorted(tables.rows, key=key))] == [*map(same, sorted(other.rows, key=key))]
    assert tables.options["split_sha256"] == other.options["split_sha256"]


def test_views_are_chosen_where_they_are_known(roots, copy):
    frontal, lateral = (read(roots["tables"], views=[view]) for view in ("frontal", "Lateral"))
    assert {row.view for row in frontal.rows} == {"Frontal"}
    assert 0 < len(lateral.rows) < len(frontal.rows) == STUDIES
    assert len(read(roots["tables"]).rows) == STUDIES
    assert len(read(roots["xml"]).rows) == STUDIES + len(lateral.rows)  # nobody says which are lateral: all of them
    with pytest.raises(SistaError, match=r"no image of the views 'frontal'; known: ''"):
        read(roots["xml"], views="frontal")
    beside = copy("xml")
    shutil.copy(roots["tables"] / "indiana_projections.csv", beside / "ecgen-radiology")
    release = read(beside)
    assert {row.view for row in release.rows} == {"Frontal"}
    assert "unknown" not in release.version


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".dcm.png"])
def test_tables_and_images_may_lie_anywhere_below(copy, suffix):
    root = copy("tables")
    before = [row.image_id for row in read(root).rows]
    (root / "deeper/films").mkdir(parents=True)
    for file in (root / "images/images_normalized").iterdir():
        name = file.name.removesuffix(".dcm.png")
        Image.open(file).save(root / "deeper/films" / f"CXR{name}{suffix}")
    shutil.rmtree(root / "images")
    for name in ("indiana_reports.csv", "indiana_projections.csv"):
        (root / name).rename(root / "deeper" / name)
    release = read(root)
    assert [row.image_id for row in release.rows] == before
    assert not release.skipped


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("CXR12_IM-0002-1001", "12_IM-0002-1001"),
        ("CXR1_1_IM-0001-3001.png", "1_IM-0001-3001"),
        ("CXR1_11_IM-0001-3001.png", "1_11_IM-0001-3001"),
        ("1_IM-0001-3001.dcm.png", "1_IM-0001-3001"),
        ("7_IM-0001-0001-0002.JPG", "7_IM-0001-0001-0002"),
        ("CXR.png", "CXR"),
        ("", ""),
    ],
)
def test_an_image_has_one_name_in_all_layouts(name, key):
    assert image_key(name) == key


def test_labels_are_tags_and_unknown_without_any():
    labels = labels_of(["Pleural Effusion/left/small", "pulmonary emphysema", "Opacity/lung/base/left"])
    assert {name for name, value in labels.items() if value == 1} == {"Effusion", "Emphysema", "Opacity"}
    assert {value for name, value in labels.items()} == {0.0, 1.0}
    assert labels_of(["normal"])["No Finding"] == 1
    assert sum(labels_of(["normal"]).values()) == 1
    assert all(np.isnan(value) for value in labels_of([]).values())
    assert set(labels) == set(LABELS)


def test_text_is_cleaned_as_mimics_and_what_has_none_is_counted(copy):
    root = copy("tables")
    table = pd.read_csv(root / "indiana_reports.csv", dtype=str, keep_default_na=False)
    table.loc[0, ["findings", "impression"]] = ["A XXXX, seen  XXXX-rays; Größe 3.5 cm.", "XXXX."]
    table.loc[1, ["findings", "impression"]] = ["XXXX", " "]
    table.loc[2, "MeSH"] = "No Indexing"
    table.loc[3, "uid"] = ""
    table.to_csv(root / "indiana_reports.csv", index=False)
    release = read(root)
    first = next(row for row in release.rows if row.study_id == "CXR1")
    assert (first.findings, first.impression) == ("A , seen -rays; Größe 3.5 cm.", "")
    assert not {"CXR2", "CXR4"} & {row.study_id for row in release.rows}
    assert all(np.isnan(v) for v in next(row for row in release.rows if row.study_id == "CXR3").labels.values())
    reasons = dict(release.skipped)
    assert reasons["2_IM-0002-1001"] == "indiana_reports.csv:3: no findings and no impression"
    assert reasons["4_IM-0004-1001"] == "indiana_projections.csv: no report 'CXR4'"
    assert reasons["indiana_reports.csv:5"] == "indiana_reports.csv:5: no uid"


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────

LAUGHS = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]>'


@pytest.mark.parametrize(
    ("head", "body", "why"),
    [
        (LAUGHS, "<MeSH><major>&b;</major></MeSH>", "it has a DOCTYPE"),
        ('<!DOCTYPE x SYSTEM "file:///etc/passwd">', "", "it has a DOCTYPE"),
        ("", "<MeSH>", "mismatched tag"),
        ("", "&b;", "undefined entity"),
        ("", "\0", "NUL"),
    ],
)
def test_xml_that_is_broken_or_declares_entities_is_a_counted_skip(copy, head, body, why):
    root = copy("xml")
    before = len(read(root).rows)
    file = xml(root, body=body, head=head)
    release = read(root)
    assert len(release.rows) == before
    (name, reason), = release.skipped  # fmt: skip
    assert name == file.name
    assert why in reason


def test_xml_of_other_encodings_and_markup_is_read(copy):
    root = copy("xml")
    images = sorted(root.glob("*.png"))
    shutil.copy(images[0], root / "CXR9999_IM-0001-1001.png")
    body = (
        '<AbstractText Label="Findings">Clear, <b>3&#181;</b> &lt;5 mm.</AbstractText>'
        '<AbstractText Label="OTHER">no</AbstractText><MeSH><major>normal</major><automatic>Mass</automatic></MeSH>'
        '<parentImage id="CXR9999_9999_IM-0001-1001"/>'
    )
    file = xml(root, body=body, head='<?xml version="1.0" encoding="iso-8859-1"?>')
    row = next(row for row in read(root).rows if row.study_id == "CXR9999")
    assert (row.findings, row.impression, row.labels["No Finding"], row.labels["Mass"]) == (
        "Clear, 3µ <5 mm.",
        "",
        1,
        0,
    )
    shutil.copy(file, file.with_name("copy.xml"))
    assert [reason for _, reason in read(root).skipped] == ["copy.xml: repeats the report CXR9999 of 9999.xml"]


def test_an_image_of_two_reports_or_of_none_is_counted(copy):
    root = copy("tables")
    with (root / "indiana_projections.csv").open("a") as file:
        file.write("2,1_IM-0001-1001.dcm.png,Frontal\n1,gone.png,Frontal\n1,../../etc/passwd,Frontal\n1,,Frontal\n")
    assert dict(read(root).skipped) == {
        "1_IM-0001-1001": "indiana_reports.csv:3: repeats an image of indiana_reports.csv:2",
        "gone": "indiana_reports.csv:2: no image of that name below the root",
        "../../etc/passwd": "indiana_reports.csv:2: no image of that name below the root",
        f"indiana_projections.csv:{end(root)}": f"indiana_projections.csv:{end(root)}: no filename",
    }


def end(root) -> int:
    return len((root / "indiana_projections.csv").read_text().splitlines())


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("indiana_reports.csv", "findings", "finding", "no column 'findings'; did you mean finding"),
        ("indiana_reports.csv", "\n2,", "\n1,", "row 3 repeats the report 'CXR1' of row 2"),
        ("indiana_projections.csv", "filename", "file", "no column 'filename'"),
        ("indiana_projections.csv", None, None, r"indiana_projections.csv not found"),
        ("indiana_reports.csv", None, None, r"neither indiana_reports.csv nor ecgen-radiology"),
    ],
)
def test_tables_that_cannot_be_read_are_one_line(copy, file, old, new, message):
    root = copy("tables")
    if old is None:
        (root / file).unlink()
    else:
        (root / file).write_text((root / file).read_text().replace(old, new, 1))
    with pytest.raises(SistaError, match=message):
        read(root)


def test_unknown_options_and_roots_are_one_line(roots, tmp_path):
    with pytest.raises(SistaError, match="split 'open_i/group'; did you mean open_i/grouped"):
        read(roots["tables"], split="open_i/group")
    with pytest.raises(SistaError, match="no such folder"):
        read(tmp_path / "none")
    with pytest.raises(SistaError, match="form 'json'; give tables or xml"):
        phantom(tmp_path / "json", "json")


def test_damaged_xml_is_skipped_or_refused_in_one_line(copy):
    root, rng = copy("xml"), random.Random(1)
    files = sorted((root / "ecgen-radiology").iterdir())
    for _ in range(60):
        file = rng.choice(files)
        raw = bytearray(file.read_bytes()) or bytearray(b"<")
        for _ in range(rng.randrange(1, 20)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        file.write_bytes(raw[: rng.randrange(len(raw) + 1)] if rng.random() < 0.3 else raw)
        release = read(root)
        assert len({row.study_id for row in release.rows}) + len(release.skipped) >= STUDIES - 10
        assert all(row.image.is_relative_to(root) for row in release.rows)


def test_tables_have_the_columns_of_the_mirror_and_tags_where_something_is_to_see(roots):
    table = pd.read_csv(roots["tables"] / "indiana_reports.csv", dtype=str, keep_default_na=False)
    truth = pd.read_parquet(roots["tables"] / "phantom/truth.parquet")
    assert ",".join(table.columns) == "uid,MeSH,Problems,image,indication,comparison,findings,impression"
    assert table["MeSH"].str.contains(";").any()
    assert (table["Problems"] == table["MeSH"].str.replace("/[^;]*", "", regex=True)).any()

    def plain(attributes: str) -> bool:
        values = dict(statement.split("=") for statement in json.loads(attributes) if "=" in statement)
        normal = [v in ("none", "normal") for k, v in values.items() if k not in ("view", "rotation", "exposure")]
        return all(normal) and all("=" in statement for statement in json.loads(attributes))

    assert [tags == "normal" for tags in table["MeSH"]] == [plain(a) for a in truth["attributes"]]
