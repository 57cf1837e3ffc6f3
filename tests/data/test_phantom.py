import dataclasses
import gzip
import json
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sista_pl.data.findings import extract_findings
from sista_pl.data.formats import READERS
from sista_pl.data.phantom import (
    LAYOUTS,
    decode_rle,
    draw_patient,
    draw_study,
    generator_hash,
    oracle_scores,
    recall_at,
    render,
    stated,
    write_phantom,
    write_report,
)
from sista_pl.data.phantom.study import OBJECTS, Finding
from sista_pl.errors import SistaError

SIZE = 96
CHEXPERT = [
    "subject_id", "study_id", "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum",
    "Fracture", "Lung Lesion", "Lung Opacity", "No Finding", "Pleural Effusion", "Pleural Other", "Pneumonia",
    "Pneumothorax", "Support Devices",
]  # fmt: skip
METADATA = [
    "dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows", "Columns",
    "StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning", "ViewCodeSequence_CodeMeaning",
    "PatientOrientationCodeSequence_CodeMeaning",
]  # fmt: skip


@pytest.fixture(scope="module")
def drawn():
    """512 studies of different patients, with their reports."""
    studies = [draw_study(np.random.default_rng([5, i])) for i in range(512)]
    return studies, [write_report(study, np.random.default_rng([6, i])) for i, study in enumerate(studies)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_phantom(
        "mimic_cxr", tmp_path_factory.mktemp("phantom") / "a", 60, seed=1, size=SIZE, workers=1, progress=False
    )


def table(root, name):
    return pd.read_csv(root / f"mimic-cxr-2.0.0-{name}.csv.gz")


def with_finding(kind, side=None, zone=None, severity=None):
    """The same plain film, with one finding or without."""
    study = draw_study(np.random.default_rng(0), draw_patient(np.random.default_rng(0)))
    patient = dataclasses.replace(
        study.patient, heart="normal", chronic=(), spine="normal", diaphragm="normal", sternotomy="none",
        pacemaker="none", port="none", scarring="none", granuloma="none",
    )  # fmt: skip
    findings = (Finding(kind, side, zone, severity),) if kind else ()
    plain = {"rotation": "none", "inspiration": "normal", "exposure": "normal", "view": "PA"}
    return dataclasses.replace(study, patient=patient, findings=findings, tubes=(), **plain)


def files(root):
    return {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}


# ── on disk ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_bytes_do_not_depend_on_workers_and_a_larger_phantom_begins_with_the_smaller(root, tmp_path):
    two = files(write_phantom("mimic_cxr", tmp_path / "two", 60, seed=1, size=SIZE, workers=2, progress=False))
    one = files(root)
    assert one == two
    other = files(write_phantom("mimic_cxr", tmp_path / "other", 6, seed=2, size=SIZE, workers=1, progress=False))
    assert not {name for name in other if name.endswith(".jpg")} & set(one)
    small = files(write_phantom("mimic_cxr", tmp_path / "small", 30, seed=1, size=SIZE, workers=1, progress=False))
    pictures = {name: data for name, data in small.items() if name.endswith((".jpg", ".txt"))}
    assert len(pictures) >= 60
    assert pictures.items() <= one.items()


def test_more_contrast_changes_the_films_with_lesions_alone(root, tmp_path):
    more = write_phantom("mimic_cxr", tmp_path / "more", 60, seed=1, size=SIZE, workers=1, progress=False, contrast=2.5)
    plain, strong = (pd.read_parquet(folder / "phantom/truth.parquet") for folder in (root, more))
    assert plain["drawn"].tolist() == strong["drawn"].tolist()
    before, after = files(root), files(more)
    changed = {name.rpartition("/")[2][:-4] for name in before if name.endswith(".jpg") and before[name] != after[name]}
    lesions = {"opacity", "pneumonia", "consolidation", "nodule", "mass", "effusion", "edema", "atelectasis"}
    for row in plain.itertuples():
        study = json.loads(row.drawn)
        found = {finding["kind"] for finding in study["findings"]}
        assert row.image_id in changed or not found & lesions
        dotted = {study["patient"]["granuloma"], study["patient"]["hilar_nodes"]} != {"none"}
        assert row.image_id not in changed or found or dotted
    assert 10 < len(changed) < 50
    with pytest.raises(SistaError, match=r"another phantom \(contrast 2.5\)"):
        write_phantom("mimic_cxr", more, 60, seed=1, size=SIZE, workers=1, progress=False)
    with pytest.raises(SistaError, match="contrast=0; give a factor over 0"):
        write_phantom("mimic_cxr", tmp_path / "none", 60, contrast=0)


def test_layout_is_that_of_mimic_cxr_jpg(root):
    names = (root / "IMAGE_FILENAMES").read_text().split("\n")[:-1]
    assert all(re.fullmatch(r"files/p1\d/p1\d{7}/s5\d{7}/([0-9a-f]{8}-){4}[0-9a-f]{8}\.jpg", name) for name in names)
    assert {str(f.relative_to(root)) for f in root.glob("files/**/*.jpg")} == set(names)
    metadata, split, labels = table(root, "metadata"), table(root, "split"), table(root, "chexpert")
    assert list(metadata.columns) == METADATA
    assert list(split.columns) == ["dicom_id", "study_id", "subject_id", "split"]
    assert list(labels.columns) == CHEXPERT
    assert set(labels[CHEXPERT[2:]].stack().dropna()) <= {1.0, 0.0, -1.0}
    assert set(metadata["ViewPosition"]) == {"PA", "AP", "LATERAL", "LL"}
    assert len(names) == len(metadata) == len(split) > len(labels) == 60
    test = pd.read_csv(root / "mimic-cxr-2.1.0-test-set-labeled.csv")
    assert set(test["study_id"]) == set(split.loc[split["split"] == "test", "study_id"])
    assert len(test.columns) == 15
    for row in metadata.itertuples():
        subject = f"p{str(row.subject_id)[:2]}/p{row.subject_id}"
        image = Image.open(root / f"files/{subject}/s{row.study_id}/{row.dicom_id}.jpg")
        assert (image.mode, image.size) == ("L", (row.Columns, row.Rows))
        report = (root / f"mimic-cxr-reports/files/{subject}/s{row.study_id}.txt").read_text()
        assert "FINAL REPORT" in report
        assert "___" in report
        assert max(map(len, report.split("\n"))) <= 80
    raw = (root / "mimic-cxr-2.0.0-split.csv.gz").read_bytes()
    assert raw[4:8] == b"\0\0\0\0"
    assert gzip.decompress(raw).startswith(b"dicom_id,")
    told = json.loads((root / "phantom/phantom.json").read_text())
    assert told["generator"] == generator_hash(LAYOUTS.build("mimic_cxr"))
    assert told["notice"].startswith("PHANTOM DATA")


def test_the_reader_finds_each_frontal_film_with_the_words_that_were_written(root):
    release = READERS.build({"name": "mimic_cxr", "root": root})
    assert release.phantom
    assert "2.1.0" in release.version
    assert len(release.rows) == 60
    assert not release.skipped
    truth = pd.read_parquet(root / "phantom/truth.parquet").set_index("study_id")
    forms = Counter()
    for row in release.rows:
        drawn = json.loads(truth.loc[int(row.study_id), "drawn"])
        text = f"{row.findings} {row.impression}".strip()
        assert 15 <= len(text.split()) <= 80
        assert bool(drawn["findings"]) or "No acute" in text or "without acute" in text
        forms[bool(row.findings), bool(row.impression)] += 1
    assert set(forms) == {(True, True), (True, False), (False, True)}


def test_splits_part_patients_and_give_validation_its_share(tmp_path):
    root = write_phantom("mimic_cxr", tmp_path / "a", 300, size=32, workers=2, progress=False)
    split = table(root, "split")
    assert (split.groupby("subject_id")["split"].nunique() == 1).all()
    share = split.drop_duplicates("study_id")["split"].value_counts(normalize=True)
    assert share["validate"] >= 0.12
    assert 0.65 < share["train"] < 0.88
    assert share["test"] > 0.03
    assert table(root, "metadata").groupby("subject_id")["study_id"].nunique().max() > 1


def test_masks_of_the_truth_agree_with_the_boxes(root):
    truth = pd.read_parquet(root / "phantom/truth.parquet")
    boxed = 0
    for row in truth.itertuples():
        masks = {name: decode_rle(rle, (row.rows, row.columns)) for name, rle in json.loads(row.masks).items()}
        assert masks["lungs"].mean() > 0.05
        union = np.zeros((row.rows, row.columns), bool)
        for kind, x, y, w, h in json.loads(row.boxes):
            if kind in OBJECTS:  # not in the body, no mask
                continue
            union[y : y + h, x : x + w] = True
            inside = np.zeros_like(union)
            inside[y : y + h, x : x + w] = True
            mask = np.logical_or.reduce([m for name, m in masks.items() if name.split(".")[0] == kind]) & inside
            # Tight: each edge of the box touches the mask.
            assert all(edge.any() for edge in (mask[y], mask[y + h - 1], mask[:, x], mask[:, x + w - 1]))
            boxed += 1
        for name, mask in masks.items():
            assert name in ("lungs", "heart") or not (mask & ~union).any()
    assert boxed > 40


def test_an_existing_phantom_is_kept_and_anything_else_refused(root, tmp_path):
    before = (root / "IMAGE_FILENAMES").stat().st_mtime_ns
    assert write_phantom("mimic_cxr", root, 60, seed=1, size=SIZE, workers=1, progress=False) == root
    assert (root / "IMAGE_FILENAMES").stat().st_mtime_ns == before
    with pytest.raises(SistaError, match=r"another phantom .*seed 1"):
        write_phantom("mimic_cxr", root, 60, seed=2, size=SIZE, workers=1, progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    with pytest.raises(SistaError, match="not a phantom"):
        write_phantom("mimic_cxr", tmp_path / "mine", 2, progress=False)
    for out in (tmp_path / "mine/notes.txt/x", tmp_path / ("x" * 300)):
        with pytest.raises(SistaError, match=r"x: cannot be written \(.*\); give another folder"):
            write_phantom("mimic_cxr", out, studies=1)
    with pytest.raises(SistaError, match="studies=0"):
        write_phantom("mimic_cxr", tmp_path / "none", 0)
    with pytest.raises(SistaError, match=r"seed=-1; give 1, 32, 0 and 0 or more"):
        write_phantom("mimic_cxr", tmp_path / "none", 1, seed=-1)
    assert [f.name for f in tmp_path.iterdir()] == ["mine"]


# ── the picture ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["effusion", "pneumothorax", "nodule", "consolidation", "atelectasis"])
def test_the_patients_left_is_on_the_images_right(kind):
    zone = "middle" if kind in ("nodule", "consolidation") else None
    severity = {"effusion": "moderate", "pneumothorax": "moderate", "atelectasis": "linear"}.get(kind)
    for side, right_half in (("left", True), ("right", False)):
        study = with_finding(kind, side, zone, severity)
        mask = render(study, 128, np.random.default_rng(3)).masks[f"{kind}.0"]
        columns = np.flatnonzero(mask.any(0))
        assert (columns.mean() > 64) == right_half


@pytest.mark.parametrize(
    ("finding", "sign"),
    [
        (("effusion", "left", None, "small"), 1),
        (("effusion", "right", None, "large"), 1),
        (("consolidation", "left", "upper", "focal"), 1),
        (("mass", "right", "middle", None), 1),
        (("edema", None, None, "moderate"), 1),
        (("pneumothorax", "left", None, "large"), -1),
    ],
)
def test_a_finding_changes_the_film_where_its_mask_says(finding, sign):
    # The same key draws the same pose, anatomy and noise, whatever the findings.
    film = render(with_finding(*finding), 128, np.random.default_rng(4))
    plain = render(with_finding(None), 128, np.random.default_rng(4))
    mask = film.masks[f"{finding[0]}.0"]
    change = (film.image.astype(float) - plain.image) * sign
    assert change[mask].mean() > 3
    assert change[mask].mean() > 2 * abs(change[~mask & plain.masks["lungs"]].mean())


def test_severity_and_heart_size_grow():
    areas = {
        kind: [
            render(with_finding(kind, "left", None, grade), 128, np.random.default_rng(4)).masks[f"{kind}.0"].sum()
            for grade in grades
        ]
        for kind, grades in {
            "effusion": ("small", "moderate", "large"),
            "pneumothorax": ("small", "moderate", "large"),
        }.items()
    }
    plain = with_finding(None)
    areas["heart"] = [
        render(dataclasses.replace(plain, patient=dataclasses.replace(plain.patient, heart=size)), 128,
               np.random.default_rng(4)).masks["heart"].sum()
        for size in ("normal", "mild", "moderate", "severe")
    ]  # fmt: skip
    for kind, sizes in areas.items():
        assert all(a < b for a, b in pairwise(sizes)), (kind, sizes)
    assert areas["effusion"][0] > 0


def test_a_film_has_air_lung_and_bone():
    for i in range(8):
        film = render(draw_study(np.random.default_rng([9, i])), 128, np.random.default_rng(i))
        assert film.image.dtype == np.uint8
        lung, heart = film.image[film.masks["lungs"]].mean(), film.image[film.masks["heart"]].mean()
        assert heart > lung + 40
        assert not (film.masks["lungs"] & film.masks["heart"]).any()


# ── the words ────────────────────────────────────────────────────────────────────────────────────────────────────────

# Our kinds and those that the extractor of findings, which was written on real reports, may read for them.
READ_AS = {
    "pleural effusion": {"effusion"},
    "pneumothorax": {"pneumothorax"},
    "cardiomegaly": {"cardiomegaly"},
    "edema": {"edema"},
    "mass": {"mass"},
    "hernia": {"hernia"},
    "consolidation": {"consolidation"},
}


def test_what_is_stated_was_drawn(drawn):
    for study, report in zip(*drawn, strict=True):
        said = stated(study, report)
        assert said <= study.attributes()
        kinds = {s.split("/")[0] for s in said if "=" not in s}
        assert kinds <= {f.kind for f in (*study.findings, *study.tubes)}
    one, other = drawn[0][0], next(r for s, r in zip(*drawn, strict=True) if r.states - drawn[0][0].attributes())
    with pytest.raises(ValueError, match="not the report of this study"):
        stated(one, other)


def test_the_text_affirms_what_is_stated_and_denies_the_rest(drawn):
    affirmed = Counter()
    for report in drawn[1]:
        read = extract_findings(report.findings + "\n" + report.impression)
        for found in read:
            kinds = READ_AS.get(found.kind)
            if kinds and found.polarity == "present":
                assert kinds & report.states, (found, report.text)
                affirmed[found.kind] += 1
            if kinds and found.polarity == "absent":
                assert not kinds & report.states, (found, report.text)
                affirmed["denied"] += 1
    assert affirmed["pleural effusion"] > 20
    assert affirmed["pneumothorax"] > 5
    assert affirmed["denied"] > 200


def test_reports_are_short_hedged_and_well_formed(drawn):
    _, reports = drawn
    words = [len(r.text.split()) for r in reports]
    assert min(words) >= 15
    assert max(words) <= 80
    hedged = sum(bool(re.search(r"may represent|cannot be excluded|possibl|likely", r.text)) for r in reports)
    assert 0.08 < hedged / len(reports) < 0.6
    for report in reports:
        assert not re.search(r"[{}]|  |None|\ba [aeiou]\w+ (?:effusion|opacity)| \.|both \w+ side", report.text), (
            report.text
        )


def test_a_third_is_normal_and_some_normal_reports_are_equal(drawn):
    studies, reports = drawn
    normal = [r.text for s, r in zip(studies, reports, strict=True) if s.normal]
    assert 0.28 < len(normal) / len(studies) < 0.38
    count = Counter(normal)
    equal = sum(n for n in count.values() if n > 1) / len(normal)
    assert 0.05 < equal < 0.6
    assert max(count.values()) <= 20


def test_studies_of_a_patient_share_what_is_chronic():
    patient = draw_patient(np.random.default_rng(3))
    first, second = (draw_study(np.random.default_rng(i), patient) for i in (1, 2))
    assert first.patient == second.patient
    assert set(patient.chronic) <= set(first.findings) & set(second.findings)
    assert first != second


# ── the oracle ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_oracle_finds_the_report_and_chance_does_not(drawn, capsys):
    studies, reports = drawn
    texts = [r.text for r in reports]
    scores = oracle_scores(studies, reports)
    to_report, to_image = recall_at(scores, texts), recall_at(scores.T, texts)
    chance = recall_at(np.zeros_like(scores), texts)
    with capsys.disabled():
        print(f"\nphantom, 512 pairs: oracle R@10 {to_report:.3f} / {to_image:.3f}, chance {chance:.3f}")
    assert min(to_report, to_image) >= 0.95
    assert chance <= 0.05


def test_the_oracle_sees_only_what_was_drawn(drawn):
    studies, reports = drawn
    shuffled = [dataclasses.replace(s, patient=dataclasses.replace(s.patient, seed=i)) for i, s in enumerate(studies)]
    np.testing.assert_array_equal(oracle_scores(studies[:64], reports[:64]), oracle_scores(shuffled[:64], reports[:64]))


def test_recall_counts_ties_by_chance_and_equal_texts_as_right():
    rng = np.random.default_rng(0)
    scores, texts = rng.integers(0, 4, (30, 30)).astype(float), [str(i // 2) for i in range(30)]

    def simulated(k):
        hits = []
        for _ in range(400):
            order = np.argsort(-(scores + 0.5 * rng.random(scores.shape)), axis=1)[:, :k]
            hits.append([any(texts[j] == texts[i] for j in order[i]) for i in range(30)])
        return np.mean(hits)

    for k in (1, 5, 10):
        assert recall_at(scores, texts, k) == pytest.approx(simulated(k), abs=0.02)
    assert recall_at(np.eye(4), list("abcd"), 1) == 1
    assert recall_at(np.zeros((20, 20)), [str(i) for i in range(20)], 10) == pytest.approx(0.5)
