"""Phantoms of real reports: what MeSH tags say is what is drawn and stated; text comes back as it was given."""

import csv
import hashlib
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from sista_pl.cli import main
from sista_pl.data.formats import READERS
from sista_pl.data.formats.open_i import TaggedReport
from sista_pl.data.phantom import (
    Finding,
    draw_study,
    findings_from_mesh,
    read_real_reports,
    render,
    stated,
    study_from_mesh,
    write_phantom,
)
from sista_pl.data.phantom.cohort import LAYOUTS, Plan, draw
from sista_pl.data.phantom.layouts.open_i import tags_of
from sista_pl.data.phantom.objects import draw_objects
from sista_pl.data.phantom.study import OBJECTS
from sista_pl.data.reports import split_sections
from sista_pl.errors import SistaError

# Invented reports in the form of the collection: uid, findings, impression, tags.
REPORTS = [
    ("CXR7", "A XXXX opacity, left base. Heart is of normal size.", "Left basal opacity.", "Opacity/lung/base/left"),
    ("CXR8", "", "Nothing of note.", "normal"),
    ("CXR9", "XXXX.", "XXXX", "normal"),  # no text
    ("CXR10", "Film not indexed.", "", "No Indexing"),
    ("CXR11", "", "", "Cardiomegaly"),  # no text
    ("CXR12", "WIRES: as before. Große Kerley lines, 3.5 µm.", "", "Cardiomegaly/mild|Markings/bronchovascular"),
    ("CXR13", "Effusions on both sides, more on the right.", "Effusions.", "Pleural Effusion/bilateral/small"),
    ("CXR14", "Not tagged.", "", ""),
]
USED = [report for report in REPORTS if report[0] in ("CXR7", "CXR8", "CXR12", "CXR13")]


def write_csv(file, reports=REPORTS, header=("report_id", "findings", "impression", "mesh")):
    with file.open("w", encoding="utf-8", newline="") as target:
        csv.writer(target).writerows([header, *reports])
    return file


@pytest.fixture
def reports(tmp_path):
    return write_csv(tmp_path / "reports.csv")


def phantom(root, layout="open_i", **options):
    return write_phantom(layout, root, **{"size": 48, "workers": 1, "progress": False} | options)


def pictures(root):
    return {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.suffix in (".png", ".jpg", ".dcm")}


# ── from tags to findings ────────────────────────────────────────────────────────────────────────────────────────────

F = Finding


@pytest.mark.parametrize(
    ("tags", "findings", "values"),
    [
        ("normal", [], {}),
        ("Opacity/lung/upper lobe/right", [F("opacity", "right", "upper")], {}),
        ("Opacity/lung/lingula/patchy", [F("opacity", "left", "middle", "patchy")], {}),
        ("opacity/Lung/Base/bilateral/mild", [F("opacity", "bilateral", "lower", "faint")], {}),
        ("Density/lung/middle lobe/round", [F("nodule", "right", "middle")], {}),
        ("Airspace Disease/retrocardiac", [F("opacity", "left", "lower")], {}),
        ("Pleural Effusion/left/severe", [F("effusion", "left", None, "large")], {}),
        ("Pneumothorax/apex/right/small", [F("pneumothorax", "right", None, "small")], {}),
        ("Hydropneumothorax/right", [F("pneumothorax", "right"), F("effusion", "right")], {}),
        ("Pulmonary Atelectasis/base/left/streaky", [F("atelectasis", "left", None, "linear")], {}),
        ("Fractures, Bone/ribs/left", [F("fracture", "left")], {}),
        ("Fractures, Bone/ribs/left/healed", [], {"rib_deformity": ("left",)}),
        ("Thickening/pleura/right", [F("pleural_thickening", "right")], {}),
        ("Thickening/pleura/apex/bilateral", [], {"scarring": ("bilateral",)}),
        ("Cicatrix/lung/apex/left", [], {"scarring": ("left",)}),
        ("Cicatrix/lung/base/right", [F("atelectasis", "right", None, "linear")], {}),
        ("Cardiomegaly", [], {"heart": ("mild", "moderate", "severe")}),
        ("Cardiac Shadow/enlarged/borderline", [], {"heart": ("mild",)}),
        ("Lung/hypoinflation", [], {"inspiration": ("low",)}),
        ("Diaphragm/right/elevated/mild", [], {"diaphragm": ("elevated/right",)}),
        ("Diaphragm/bilateral/flattened", [], {"inspiration": ("hyper",)}),
        ("Scoliosis/thoracic vertebrae/left", [], {"spine": ("scoliosis/left",)}),
        ("Scoliosis", [], {"spine": ("scoliosis/left", "scoliosis/right")}),
        ("Aorta, Thoracic/tortuous", [], {"aorta": ("tortuous",)}),
        ("Calcified Granuloma/lung/lower lobe/left", [], {"granuloma": ("left/lower",)}),
        ("Calcinosis/lung/hilum/lymph nodes/right", [], {"hilar_nodes": ("right",)}),
        ("Implanted Medical Device/left", [], {"pacemaker": ("left",)}),
        ("Implanted Medical Device/humerus/left", [], {"shoulder": ("left",)}),
        ("Surgical Instruments/mediastinum", [], {"sternotomy": ("present",)}),
        ("Surgical Instruments/abdomen/right", [], {"clips": ("right upper quadrant",)}),
        ("Technical Quality of Image Unsatisfactory", [], {"exposure": ("under", "over")}),
        # one lesion under two headings; a second that may be the same; two that are not
        ("Opacity/lung/base/left;Infiltrate/lung/base/left/patchy", [F("opacity", "left", "lower", "patchy")], {}),
        ("Pleural Effusion/small|Pleural Effusion/left", [F("effusion", "left", None, "small")], {}),
        ("Pleural Effusion/right|Pleural Effusion/bilateral", [F("effusion", "bilateral")], {}),
        ("Pleural Effusion/right|Pleural Effusion/left", [F("effusion", "right"), F("effusion", "left")], {}),
        ("Mass/lung/apex/left|Mass/lung/base/left", [F("mass", "left", "upper"), F("mass", "left", "lower")], {}),
        ("Costophrenic Angle/left/blunted|Pleural Effusion/bilateral", [F("effusion", "bilateral")], {}),
        # the first says one of six, the second which
        ("Granulomatous Disease|Granuloma/lung/apex/right", [], {"granuloma": ("right/upper",)}),
    ],
)  # fmt: skip
def test_what_the_tags_say(tags, findings, values):
    tagged = findings_from_mesh(tags)
    assert list(tagged.findings) == findings
    assert tagged.values == values
    assert not tagged.missing
    assert findings_from_mesh(tags.replace(";", "|").split("|")) == tagged


def test_tubes_are_apart():
    tagged = findings_from_mesh("Tube, Inserted/trachea, carina|Tube, Inserted/thorax/left|Catheters, Indwelling/right")
    assert tagged.tubes == (F("endotracheal_tube"), F("chest_tube", "left"), F("central_line", "right"))
    assert tagged.states == {"endotracheal_tube", "chest_tube", "chest_tube/left"}


@pytest.mark.parametrize(
    "tag",
    [
        "Markings/bronchovascular", "Opacity/pleura/right", "Density/ribs/left", "Pulmonary Atelectasis/apex/left",
        "Pleural Effusion/apex/left", "Fractures, Bone/clavicle/left", "Deformity/thoracic vertebrae", "Lung/left",
        "Scoliosis/lumbar vertebrae", "Subcutaneous Emphysema/thorax/right", "Calcinosis/mediastinum/lymph nodes",
        "Implanted Medical Device/aortic valve", "No such heading", "/", "Opacity/breast",
    ],
)  # fmt: skip
def test_what_is_not_drawn_is_told(tag):
    tagged = findings_from_mesh(f"Hernia, Hiatal|{tag}")
    assert tagged.missing == (tag,)
    assert tagged.drawn == ("Hernia, Hiatal",)
    assert tagged.states == {"hernia"}


def test_of_two_that_exclude_each_other_the_later_is_missing():
    tagged = findings_from_mesh("Aorta/tortuous|Atherosclerosis/aorta|Cardiomegaly/mild|Cardiac Shadow/enlarged/severe")
    assert tagged.values == {"aorta": ("tortuous",), "heart": ("mild",)}
    assert tagged.missing == ("Atherosclerosis/aorta", "Cardiac Shadow/enlarged/severe")


def test_stated_is_what_tags_name_and_not_what_looks_alike():
    tagged = findings_from_mesh(
        "Cardiomegaly/mild|Pleural Effusion|Costophrenic Angle/left/blunted|Cicatrix/lung/base/left"
    )
    assert tagged.states == {"cardiomegaly", "cardiomegaly/mild", "heart=mild", "effusion"}
    assert {f.kind for f in tagged.findings} == {"effusion", "atelectasis"}
    assert findings_from_mesh("Cardiomegaly").states == {"cardiomegaly"}
    assert findings_from_mesh("normal").states == frozenset()


def attributes(study):
    """What tags can tell: not how the film was taken, by which way a line came, nor what a foreign body is."""
    ways = ("view=", "rotation=", "exposure=", "port=", "picc", "central_line", *OBJECTS)
    return {a for a in study.attributes() if not a.startswith(ways)}


def test_tags_of_a_drawn_study_are_read_back_as_that_study():
    seen = Counter()
    for i in range(400):
        rng = np.random.default_rng([5, i])
        study = replace(draw_study(rng), objects=draw_objects(rng, 0.5, 3))
        tagged = findings_from_mesh(tags_of(study))
        back = study_from_mesh(tagged, seed=3, patient=i)
        assert attributes(back) == attributes(study), tags_of(study)
        assert not tagged.missing
        assert sorted(map(str, back.findings)) == sorted(map(str, study.findings))
        assert {(o.side, o.zone) for o in back.objects} == {(o.side, o.zone) for o in study.objects}
        seen.update(f.kind for f in back.findings)
    assert min(seen.values()) >= 3
    assert len(seen) == 14


def test_what_tags_leave_open_is_drawn_from_the_seed_and_nothing_else_is():
    tagged = findings_from_mesh("Opacity/lung|Pleural Effusion/left|Cardiomegaly|Scoliosis")
    studies = [study_from_mesh(tagged, seed, patient) for seed in range(10) for patient in range(10)]
    assert studies[7] == study_from_mesh(tagged, 0, 7)
    for study in studies:
        assert tagged.states <= study.attributes()
        heart, opacity, effusion = study.findings
        assert (heart.kind, opacity.kind, effusion.kind, effusion.side) == (
            "cardiomegaly",
            "opacity",
            "effusion",
            "left",
        )
        assert heart.severity == study.patient.heart != "normal"
        assert study.patient.spine.startswith("scoliosis/")
        assert {study.patient.aorta, study.patient.granuloma, study.patient.pacemaker} == {"normal", "none"}
        assert study.inspiration == "normal"
    for drawn in (
        [s.findings[1].side for s in studies], [s.findings[1].zone for s in studies],
        [s.findings[2].severity for s in studies], [s.view for s in studies],
        [s.patient.sex for s in studies], [s.patient.heart for s in studies], [s.patient.spine for s in studies],
    ):  # fmt: skip
        assert 1 < len(set(drawn)) <= 3
        assert min(Counter(drawn).values()) > 10


def test_the_film_shows_what_the_tags_say():
    tags = ("Pleural Effusion/right/large", "Nodule/lung/apex/left")
    report = TaggedReport("CXR1", tags, "x", findings="A sentence that was invented.")
    drawn = draw(Plan(0, 0), 0, 96, LAYOUTS.build("rsna"), report)
    assert [box[0] for box in drawn.rendering.boxes] == ["effusion", "nodule"]
    assert np.flatnonzero(drawn.rendering.masks["effusion.0"].any(0)).mean() < 48  # the patient's right is on our left
    rows, columns = np.nonzero(drawn.rendering.masks["nodule.1"])
    assert rows.mean() < 48 < columns.mean()


# ── the phantom ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", ["tables", "xml"])
def test_every_study_takes_a_report_as_it_is(reports, tmp_path, form):
    root = phantom(tmp_path / "raw", {"name": "open_i", "form": form}, reports=reports, seed=5)
    release = READERS.build({"name": "open_i", "root": root, "views": None})
    assert release.phantom
    texts = {(row.findings, row.impression) for row in release.rows}
    assert texts == {(text.replace("XXXX ", ""), summary) for _, text, summary, _ in USED}
    assert len({row.patient_id for row in release.rows}) == len(USED)
    if form == "tables":
        table = pd.read_csv(root / "indiana_reports.csv", dtype=str, keep_default_na=False)
        told = zip(table["findings"], table["impression"], table["MeSH"].str.replace(";", "|"), strict=True)
        assert [*told] == [report[1:] for report in USED]
    truth = pd.read_parquet(root / "phantom/truth.parquet")
    assert truth["report"].tolist() == [report[0] for report in USED]
    assert [json.loads(tags) for tags in truth["not_drawn"]] == [[], [], ["Markings/bronchovascular"], []]
    assert json.loads(truth["stated"][0]) == ["opacity", "opacity/left", "opacity/lower"]
    assert [box[0] for box in json.loads(truth["boxes"][3])] == ["effusion", "effusion"]


def test_phantom_json_tells_of_the_reports_but_not_where_they_were(reports, tmp_path):
    text = (phantom(tmp_path / "raw", reports=reports) / "phantom/phantom.json").read_text()
    told = json.loads(text)
    assert told["reports"] == hashlib.sha256(reports.read_bytes()).hexdigest()
    assert told["notice"] == "PHANTOM DATA: films drawn by a program, no patient's; the reports are real ones"
    assert told["studies"] == len(USED)
    assert str(tmp_path) not in text
    assert "reports" not in json.loads((phantom(tmp_path / "b", studies=1) / "phantom/phantom.json").read_text())
    assert phantom(tmp_path / "raw", reports=reports) == tmp_path / "raw"
    with pytest.raises(SistaError, match=f"another phantom .*reports {told['reports']}"):
        phantom(tmp_path / "raw", studies=len(USED))


@pytest.mark.parametrize("layout", ["open_i", "mimic_cxr", "rsna", "chestxray14"])
def test_films_are_the_same_in_any_number_of_workers_and_begin_with_the_smaller(reports, tmp_path, layout):
    one = pictures(phantom(tmp_path / "one", layout, reports=reports, seed=2))
    assert one == pictures(phantom(tmp_path / "two", layout, reports=reports, seed=2, workers=2))
    small = pictures(phantom(tmp_path / "small", layout, reports=reports, seed=2, studies=2))
    assert small.items() < one.items()
    assert not one.items() & pictures(phantom(tmp_path / "other", layout, reports=reports, seed=3)).items()
    assert len(READERS.build({"name": layout, "root": tmp_path / "one"}).rows) == len(USED)


def test_mimics_reader_gets_the_words(tmp_path):
    plain = [("CXR1", "A first sentence that was invented.", "Its end.", "Mass/lung"), ("CXR2", "", "Alone.", "normal")]
    reports = write_csv(tmp_path / "plain.csv", plain)
    release = READERS.build({"name": "mimic_cxr", "root": phantom(tmp_path / "raw", "mimic_cxr", reports=reports)})
    assert [(row.findings, row.impression) for row in release.rows] == [report[1:3] for report in plain]
    assert (release.rows[0].labels["Lung Lesion"], release.rows[1].labels["No Finding"]) == (1, 1)


def test_the_text_file_of_a_report_has_its_words_whatever_they_are(reports):
    for number, (uid, findings, impression, _) in enumerate(USED):
        real = read_real_reports(reports).reports[number]
        assert real.uid == uid
        text = draw(Plan(number, 0), 0, 32, LAYOUTS.build("mimic_cxr"), real).document()
        assert "XXXX" not in text
        expected = {"findings": findings.replace("XXXX ", ""), "impression": impression}
        assert split_sections(text) == {name: words for name, words in expected.items() if words}


def test_reports_of_a_folder_of_open_i(reports, tmp_path):
    for form in ("tables", "xml"):
        root = phantom(tmp_path / form, {"name": "open_i", "form": form}, reports=reports)
        again = read_real_reports(root)
        assert [r.tags for r in again.reports] == [tuple(report[3].split("|")) for report in USED]
        assert [r.findings.strip() for r in again.reports] == [report[1] for report in USED]
        again = phantom(tmp_path / f"{form}-again", reports=root)
        assert pictures(again) == pictures(phantom(tmp_path / f"{form}-file", reports=reports))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"studies": 5}, "reports: 4 with text and tags, but studies is 5"),
        ({"studies": 0}, "studies=0"),
        ({"reports": "gone.csv"}, r"reports: gone\.csv does not exist"),
        ({"reports": None}, "no number of studies"),
    ],
)
def test_what_cannot_be_is_one_line(reports, tmp_path, options, message):
    with pytest.raises(SistaError, match=message):
        phantom(tmp_path / "raw", **{"reports": reports} | options)
    assert [file.name for file in tmp_path.iterdir()] == ["reports.csv"]


def test_files_without_usable_reports_are_one_line(tmp_path):
    with pytest.raises(SistaError, match="no report with text and MeSH tags"):
        read_real_reports(write_csv(tmp_path / "a.csv", [REPORTS[2], REPORTS[3]]))
    with pytest.raises(SistaError, match="no column 'MeSH'"):
        read_real_reports(write_csv(tmp_path / "b.csv", header=("uid", "findings", "impression", "tag")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SistaError, match=r"neither indiana_reports\.csv nor"):
        read_real_reports(tmp_path / "empty")


def test_the_command_counts_and_says_what_it_is(reports, tmp_path, capsys):
    command = [
        "data",
        "phantom",
        "--layout",
        "open_i",
        "--out",
        str(tmp_path / "raw"),
        "--size",
        "48",
        "--workers",
        "1",
    ]
    assert main([*command, "--reports", str(reports)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        "PHANTOM DATA with the words of real reports, which keep their licence: 4 of 4 reports, left out 2 no text, "
        "2 no tags; 4 of 5 tags drawn, not drawn most: Markings 1\n4 phantom studies in "
    )
    assert main([*command, "--reports", str(reports), "--studies", "9"]) == 2
    assert "give at most that" in capsys.readouterr().err


def test_the_data_module_passes_the_reports_on(reports, tmp_path):
    from sista_pl.data.pairs import PairDataModule

    data = PairDataModule(
        tmp_path / "store", format="open_i", root=tmp_path / "raw", size=32, batch_size=2, similarity=None,
        phantom={"seed": 1, "reports": str(reports), "size": 48, "workers": 1, "progress": False},
    )  # fmt: skip
    data.prepare_data()
    data.setup("predict")
    assert set(data.reports) == {f"{summary} {text}".replace("XXXX ", "").strip() for _, text, summary, _ in USED}


# ── real reports ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.real
def test_real_reports(real_data, capsys):
    found = read_real_reports(real_data / "reports_only_iu.csv")
    read = [findings_from_mesh(report.tags) for report in found.reports]
    normal = sum(tags.drawn == ("normal",) for tags in read)
    texts = pd.Series([f"{report.findings} {report.impression}" for report in found.reports])
    drawn, missing = found.coverage()
    abnormal = (drawn - normal) / (drawn - normal + missing.total())
    with capsys.disabled():
        print(
            f"\n{len(read)} of 3,102 reports, left out {found.left_out}; {normal / len(read):.1%} normal, "
            f"{texts.duplicated().mean():.1%} repeat a text; {drawn / (drawn + missing.total()):.1%} of "
            f"{drawn + missing.total()} tags drawn, {abnormal:.1%} of those that are not `normal`; "
            f"{sum(not tags.drawn for tags in read)} reports without a drawn tag; missing {missing.most_common(8)}"
        )
    assert len(read) == 3069
    assert found.left_out == {"no tags": 33}
    assert normal / len(read) == pytest.approx(0.35, abs=0.01)
    assert texts.duplicated().mean() == pytest.approx(0.18, abs=0.01)
    assert drawn / (drawn + missing.total()) > 0.82
    assert abnormal > 0.8
    for number, tags in enumerate(read):
        assert tags.states <= study_from_mesh(tags, 0, number).attributes(), tags


@pytest.mark.real
def test_films_of_real_reports(real_data):
    reports = read_real_reports(real_data / "reports_only_iu.csv").reports
    for number in range(0, len(reports), len(reports) // 20):
        drawn = draw(Plan(number, 0), 0, 96, LAYOUTS.build("mimic_cxr"), reports[number])
        assert drawn.rendering.image.std() > 20
        assert stated(drawn.study, drawn.report) == findings_from_mesh(reports[number].tags).states
        kinds = {finding.kind for finding in drawn.study.findings} - {"emphysema"}
        film = render(drawn.study, 96, np.random.default_rng(0))
        assert {box[0] for box in film.boxes} >= kinds
