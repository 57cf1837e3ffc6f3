import csv
import gzip
import math
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from sista_pl.data.formats import READERS
from sista_pl.data.formats.mimic_cxr import _read_reports
from sista_pl.data.prepare import prepare
from sista_pl.errors import SistaError

LABELS = ["Atelectasis", "Edema", "No Finding"]
# dicom, subject, study, view, split
IMAGES = [
    ("d1", "10000032", "50000001", "PA", "train"),
    ("d2", "10000032", "50000001", "LATERAL", "train"),
    ("d3", "10000032", "50000002", "AP", "train"),
    ("d4", "11000033", "50000003", "AP", "validate"),
    ("d5", "12000034", "50000004", "", "test"),
    ("d6", "12000034", "50000005", "PA", "test"),
]
STUDIES = {study: subject for _, subject, study, _, _ in IMAGES}
# study: Atelectasis, Edema, No Finding
CHEXPERT = {"50000001": ("1.0", "0.0", ""), "50000002": ("-1.0", "", ""), "50000003": ("", "", "1.0")}


def report(study):
    return f" FINAL REPORT\n FINDINGS: Findings of {study}.\n\n IMPRESSION: Impression of ___ {study}.\n".encode()


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def text_file(study):
    subject = STUDIES[study]
    return f"files/p{subject[:2]}/p{subject}/s{study}.txt"


def write_tree(root, suffix=".csv.gz", reports: Path | None = None, images=IMAGES):
    """Write MIMIC-CXR-JPG by hand; the reports as text files under `reports`, where given."""
    for dicom, subject, study, _, _ in images:
        path = root / f"files/p{subject[:2]}/p{subject}/s{study}/{dicom}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (40, 50), 100).save(path)
    head = ["dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows"]
    write_csv(
        root / f"mimic-cxr-2.0.0-metadata{suffix}", [head, *([d, s, t, "CHEST", v, 50] for d, s, t, v, _ in images)]
    )
    write_csv(
        root / f"mimic-cxr-2.0.0-split{suffix}",
        [["dicom_id", "study_id", "subject_id", "split"], *([d, t, s, p] for d, s, t, _, p in images)],
    )
    for name in ("chexpert", "negbio"):
        rows = [[STUDIES[study], study, *values] for study, values in CHEXPERT.items()]
        write_csv(root / f"mimic-cxr-2.0.0-{name}{suffix}", [["subject_id", "study_id", *LABELS], *rows])
    for study in STUDIES if reports else ():
        (reports / text_file(study)).parent.mkdir(parents=True, exist_ok=True)
        (reports / text_file(study)).write_bytes(report(study))
    return root


def read(root, **options):
    return READERS.build({"name": "mimic_cxr", "root": root, **options})


def write_zip(path, prefix="", content=report):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for study in STUDIES:
            archive.writestr(prefix + text_file(study), content(study))


def unzip_beside(folder):
    def place(root):
        target = root.parent / folder if folder else root
        for study in STUDIES:
            (target / text_file(study)).parent.mkdir(parents=True, exist_ok=True)
            (target / text_file(study)).write_bytes(report(study))

    return place


def sectioned(root):
    rows = [[f"s{s}", f"Impression of {s}.", f"Findings of {s}.", "Last.", ""] for s in STUDIES]
    write_csv(
        root.parent / "mimic_cxr_sectioned.csv",
        [["study", "impression", "findings", "last_paragraph", "comparison"], *rows],
    )


LAYOUTS = {
    "merged into the images": unzip_beside(""),
    "mimic-cxr-reports beside": unzip_beside("mimic-cxr-reports"),
    "mimic-cxr beside": unzip_beside("mimic-cxr"),
    "zip beside": lambda root: write_zip(root.parent / "mimic-cxr-reports.zip"),
    "zip inside, with a folder": lambda root: write_zip(root / "mimic-cxr-reports.zip", "mimic-cxr-reports/"),
    "sectioned": sectioned,
}


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_reports_gives_the_same_rows(tmp_path, layout, suffix):
    root = write_tree(tmp_path / "jpg", suffix)
    LAYOUTS[layout](root)
    release = read(root)
    assert [(r.image_id, r.split, r.view) for r in release.rows] == [
        ("d1", "train", "PA"),
        ("d3", "train", "AP"),
        ("d4", "val", "AP"),
        ("d6", "test", "PA"),
    ]
    first = release.rows[0]
    assert (first.patient_id, first.study_id) == ("10000032", "50000001")
    assert (first.findings, first.impression) == ("Findings of 50000001.", "Impression of 50000001.")
    assert first.source == f"mimic-cxr-2.0.0-metadata{suffix}:2"
    assert all(r.image.is_file() for r in release.rows)
    assert release.version == "MIMIC-CXR-JPG 2.0.0"
    assert not release.phantom
    assert release.skipped == []


def test_uncertain_and_blank_labels_are_unknown(tmp_path):
    root = write_tree(tmp_path / "jpg", reports=tmp_path / "mimic-cxr-reports")
    labels = {r.image_id: r.labels for r in read(root, labels="negbio").rows}
    assert {k: v for k, v in labels["d1"].items() if not math.isnan(v)} == {"Atelectasis": 1, "Edema": 0}
    assert all(math.isnan(v) for v in labels["d3"].values())
    # the study has no line in the table of labels
    assert list(labels["d6"]) == LABELS
    assert all(math.isnan(v) for v in labels["d6"].values())
    assert all(r.labels == {} for r in read(root, labels="none").rows)


def radiologist(root, rows, head=LABELS):
    write_csv(root / "mimic-cxr-2.1.0-test-set-labeled.csv", [["study_id", *head], *rows])


def test_the_test_split_may_have_a_radiologists_labels(tmp_path):
    root = write_tree(tmp_path / "jpg", reports=tmp_path / "mimic-cxr-reports")
    (study,) = {r.study_id for r in read(root).rows if r.split == "test"}
    before = {r.image_id: r.labels for r in read(root).rows}
    values = ["1.0", "0.0", "-1.0", *[""] * (len(LABELS) - 3)]
    radiologist(root, [[study, *values]])
    release = read(root, test_labels="radiologist")
    for row in release.rows:
        if row.split == "test":
            assert [row.labels[name] for name in LABELS[:2]] == [1, 0]
            assert all(math.isnan(row.labels[name]) for name in LABELS[2:])
        else:
            assert str(row.labels) == str(before[row.image_id])
    assert release.options["test_labels"] == "radiologist"
    radiologist(root, [["59999999", *values]])
    assert all(math.isnan(v) for r in read(root, test_labels="radiologist").rows if r.split == "test"
               for v in r.labels.values())  # fmt: skip


def test_the_radiologists_table_of_other_names_of_findings(phantom_root, tmp_path):
    import shutil

    root = tmp_path / "raw"
    shutil.copytree(phantom_root, root)
    before = {row.image_id: str(row.labels) for row in read(root, test_labels="radiologist").rows}
    file = root / "mimic-cxr-2.1.0-test-set-labeled.csv"
    head, rest = file.read_text().split("\n", 1)
    assert "Lung Opacity" in head
    file.write_text(head.replace("Lung Opacity", "Airspace Opacity").replace(" ", "_") + "\n" + rest)
    assert {row.image_id: str(row.labels) for row in read(root, test_labels="radiologist").rows} == before


def test_the_radiologists_table_is_asked_for_in_one_line(tmp_path):
    root = write_tree(tmp_path / "jpg", reports=tmp_path / "mimic-cxr-reports")
    with pytest.raises(SistaError, match=r"test-set-labeled\.csv not found; it is part of release 2\.1\.0"):
        read(root, test_labels="radiologist")
    with pytest.raises(SistaError, match="test_labels 'radiologists'; did you mean radiologist"):
        read(root, test_labels="radiologists")
    radiologist(root, [], LABELS[1:])
    with pytest.raises(SistaError, match="no column 'Atelectasis'"):
        read(root, test_labels="radiologist")
    radiologist(root, [["50000001", "2", *[""] * (len(LABELS) - 1)]])
    with pytest.raises(SistaError, match=r"row 2: Atelectasis is '2'"):
        read(root, test_labels="radiologist")


def test_views_are_a_choice(tmp_path):
    root = write_tree(tmp_path / "jpg", reports=tmp_path / "mimic-cxr-reports")
    assert [r.image_id for r in read(root, views=None).rows] == ["d1", "d2", "d3", "d4", "d5", "d6"]
    assert [r.image_id for r in read(root, views=["LATERAL"]).rows] == ["d2"]
    with pytest.raises(SistaError, match="no image of the views LL; known: "):
        read(root, views=["LL"])


def test_root_may_be_the_folder_of_the_download_and_2_1_0_is_named(tmp_path):
    jpg = tmp_path / "physionet.org/files/mimic-cxr-jpg/2.1.0"
    write_tree(jpg)
    write_zip(tmp_path / "physionet.org/files/mimic-cxr/2.0.0/mimic-cxr-reports.zip")
    (jpg / "mimic-cxr-2.1.0-test-set-labeled.csv").write_text("study_id\n")
    release = read(tmp_path)
    assert release.version == "MIMIC-CXR-JPG 2.1.0"
    assert len(release.rows) == 4
    assert len(read(jpg).rows) == 4


def test_reports_may_be_named(tmp_path):
    root = write_tree(tmp_path / "a/jpg", reports=tmp_path / "b/texts")
    write_zip(tmp_path / "b/any.zip")
    assert len(read(root, reports=tmp_path / "b/texts").rows) == 4
    assert len(read(root, reports=str(tmp_path / "b/any.zip")).rows) == 4


def test_a_phantom_is_marked(tmp_path):
    root = write_tree(tmp_path / "jpg", reports=tmp_path / "jpg")
    (root / "phantom").mkdir()
    (root / "phantom/phantom.json").write_text("{}")
    assert read(root).phantom


def test_bad_reports_are_left_out_with_their_reason(tmp_path):
    bad = {"50000001": b" ___ \n", "50000002": b"x" * 10_000_000, "50000003": b"FINDINGS: a\0b"}

    def content(study):
        return bad.get(study, "FINDINGS: 3 µm".encode("cp1252"))

    root = write_tree(tmp_path / "jpg")
    for study in STUDIES:
        (root / text_file(study)).write_bytes(content(study))
    from_files = read(root)
    for study in STUDIES:
        (root / text_file(study)).unlink()
    write_zip(root / "mimic-cxr-reports.zip", content=content)
    from_zip = read(root)
    for release in (from_files, from_zip):
        assert [(r.image_id, r.findings) for r in release.rows] == [("d6", "3 µm")]
        reasons = dict(release.skipped)
        assert reasons["d1"] == "report s50000001: empty"
        assert "10000000 bytes" in reasons["d3"]
        assert "NUL" in reasons["d4"]


def test_the_last_paragraph_stands_in_where_a_sectioned_report_has_no_section(tmp_path):
    root = write_tree(tmp_path / "jpg")
    head = ["study", "impression", "findings", "last_paragraph", "comparison"]
    rows = [
        ["s50000001", "", " ", "Last one.", ""],
        ["s50000002", "Imp.", "", "Last.", ""],
        ["s50000003", "___", "", "", ""],
    ]
    write_csv(root / "mimic_cxr_sectioned.csv", [head, *rows])
    release = read(root)
    assert [(r.findings, r.impression) for r in release.rows] == [("Last one.", ""), ("", "Imp.")]
    assert dict(release.skipped) == {"d4": "report s50000003: empty", "d6": "report s50000005: not found"}
    write_csv(root / "mimic_cxr_sectioned.csv", [["study", "impression", "finding", "last_paragraph"]])
    with pytest.raises(SistaError, match=r"sectioned.csv: no column 'findings'; did you mean finding\?"):
        read(root)


def test_a_report_that_is_missing_and_an_image_without_split_are_left_out(tmp_path):
    root = write_tree(tmp_path / "jpg", ".csv", reports=tmp_path / "mimic-cxr")
    (tmp_path / "mimic-cxr" / text_file("50000001")).unlink()
    split = root / "mimic-cxr-2.0.0-split.csv"
    split.write_text("".join(line for line in split.open(newline="") if not line.startswith("d4")))
    release = read(root)
    assert [r.image_id for r in release.rows] == ["d3", "d6"]
    assert dict(release.skipped) == {
        "d1": "report s50000001: not found",
        "d4": "not in mimic-cxr-2.0.0-split.csv",
    }


def test_what_is_missing_is_said_in_one_line(tmp_path):
    with pytest.raises(SistaError, match="nowhere: no such folder"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SistaError, match=r"empty: mimic-cxr-2.0.0-metadata.csv\[.gz\] not found"):
        read(tmp_path / "empty")
    root = write_tree(tmp_path / "jpg")
    with pytest.raises(SistaError, match=r"MIMIC-CXR reports not found; download mimic-cxr-reports\.zip") as error:
        read(root)
    assert "\n" not in str(error.value)
    (tmp_path / "mimic-cxr-reports.zip").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(SistaError, match="not a whole zip file"):
        read(root)
    with pytest.raises(SistaError, match="labels 'chexprt'; did you mean chexpert"):
        read(root, labels="chexprt")
    with pytest.raises(SistaError, match="no argument 'view'; did you mean views"):
        read(root, view="PA")


def test_a_zip_of_reports_with_a_bit_turned(tmp_path):
    """In each byte of a member's headers and data, one at a time: the text that was written, or one line."""
    file = tmp_path / "reports.zip"
    write_zip(file)
    whole, (study, *_) = file.read_bytes(), STUDIES
    expected = dict(_read_reports(file, {study: STUDIES[study]}))
    name = text_file(study).encode()
    first, last = whole.index(name), whole.rindex(name)
    places = [*range(first - 30, first), *range(first + len(name), first + len(name) + 60), *range(last - 46, last)]
    refused = 0
    for place in places:
        for bit in (0, 3):
            raw = bytearray(whole)
            raw[place] ^= 1 << bit
            file.write_bytes(raw)
            try:
                found = dict(_read_reports(file, {study: STUDIES[study]}))
                assert found in (expected, {study: "not found"}) or "bytes, more than" in found[study]
            except SistaError:
                refused += 1
    assert refused > 100


def test_mistakes_in_a_table_name_file_and_row(tmp_path):
    root = write_tree(tmp_path / "jpg", ".csv", reports=tmp_path / "jpg")
    metadata, split, labels = (root / f"mimic-cxr-2.0.0-{n}.csv" for n in ("metadata", "split", "chexpert"))
    whole = {file: file.read_text() for file in (metadata, split, labels)}

    def broken(file, old, new, match):
        file.write_text(whole[file].replace(old, new))
        with pytest.raises(SistaError, match=match):
            read(root)
        file.write_text(whole[file])

    broken(metadata, "d3", "d1", r"metadata.csv: row 4 repeats the image id 'd1' of row 2")
    broken(metadata, "ViewPosition", "ViewPositions", r"metadata.csv: no column 'ViewPosition'; did you mean ViewPos")
    broken(split, "validate", "valid", r"split.csv: row 5: unknown split 'valid'; did you mean validate")
    broken(labels, "1.0", "positive", r"chexpert.csv: row 2: Atelectasis is 'positive'")
    labels.write_bytes(b"")
    with pytest.raises(SistaError, match=r"chexpert.csv: not a readable CSV"):
        read(root)


def test_a_release_becomes_a_store(tmp_path):
    root = write_tree(tmp_path / "jpg", reports=tmp_path / "jpg")
    store = prepare(read(root), tmp_path / "store", size=32, progress=False)
    assert store.manifest["label_Edema"].fillna(-1).tolist() == [0, -1, -1, -1]
    assert store.info["counts"] == {"train": 2, "val": 1, "test": 1}


@pytest.mark.slow
def test_the_full_number_of_rows(tmp_path):
    """377,110 rows without one image or report on disk but a sectioned table: no file is touched row by row."""
    n = 377_110
    rows = [(f"d{i}", str(10_000_000 + i // 6), str(50_000_000 + i // 2)) for i in range(n)]
    root = tmp_path / "jpg"
    write_csv(
        root / "mimic-cxr-2.0.0-metadata.csv.gz",
        [["dicom_id", "subject_id", "study_id", "ViewPosition"], *((*row, "PA") for row in rows)],
    )
    write_csv(
        root / "mimic-cxr-2.0.0-split.csv.gz",
        [["dicom_id", "study_id", "subject_id", "split"], *((d, t, s, "train") for d, s, t in rows)],
    )
    studies = sorted({row[2] for row in rows})
    write_csv(
        root / "mimic-cxr-2.0.0-chexpert.csv.gz",
        [["subject_id", "study_id", *LABELS], *(("1", t, "1.0", "", "-1.0") for t in studies)],
    )
    write_csv(
        tmp_path / "mimic_cxr_sectioned.csv",
        [["study", "impression", "findings", "last_paragraph"], *((f"s{t}", f"I {t}", "F", "") for t in studies)],
    )
    release = read(root)
    assert len(release.rows) == n
    assert release.rows[-1].impression == f"I {studies[-1]}"


@pytest.mark.parametrize("study", ["x" * 5000, "../../etc", "5000 0001", ""])
def test_an_id_that_is_no_number_is_left_out_and_counted(tmp_path, study):
    root = write_tree(tmp_path / "jpg", reports=tmp_path / "mimic-cxr-reports")
    file = root / "mimic-cxr-2.0.0-metadata.csv.gz"
    text = gzip.decompress(file.read_bytes()).decode()
    assert "d1,10000032,50000001," in text
    file.write_bytes(gzip.compress(text.replace("d1,10000032,50000001,", f"d1,10000032,{study},").encode()))
    release = read(root)
    assert [row.image_id for row in release.rows] == ["d3", "d4", "d6"]
    assert [name for name, why in release.skipped] == ["d1"]
    assert release.skipped[0][1].endswith("no number of a subject and a study")
