"""Findings of report sentences, written for the test; and, on real reports, against what people tagged."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from sista_pl.commands.similarity import (
    equal_finding_agreement,
    finding_agreement,
    main,
    pair_agreement,
    read_table,
    tag_sets,
)
from sista_pl.data import lexicon
from sista_pl.data.findings import KINDS, Finding, extract_findings, finding_vectors, tagged_kinds
from sista_pl.errors import SistaError


def of_kind(text: str, kind: str) -> list[Finding]:
    return [f for f in extract_findings(text) if f.kind == kind]


PLACES = [
    ("Small left pleural effusion.", Finding("pleural effusion", "present", "left")),
    ("Opacity in the right upper lobe.", Finding("opacity", "present", "right", "upper")),
    ("Bibasilar atelectasis.", Finding("atelectasis", "present", "bilateral", "base")),
    ("Atelectasis in the left lung base.", Finding("atelectasis", "present", "left", "base")),
    ("Right and left lower lobe opacities.", Finding("opacity", "present", "bilateral", "lower")),
    ("Right apical pneumothorax.", Finding("pneumothorax", "present", "right", "apex")),
    ("Left perihilar infiltrate.", Finding("infiltrate", "present", "left", "hilar")),
    ("Retrocardiac consolidation.", Finding("consolidation", "present", None, "retrocardiac")),
    ("Left effusion, right basal scarring.", Finding("scar", "present", "right", "base")),
    ("Left effusion, right basal scarring.", Finding("pleural effusion", "present", "left")),
    ("Effusion and right atelectasis.", Finding("pleural effusion", "present")),
    ("Effusion and atelectasis in the right lung.", Finding("pleural effusion", "present", "right")),
    ("No left pneumothorax.", Finding("pneumothorax", "absent", "left")),
    ("Possible right nodule.", Finding("nodule", "uncertain", "right")),
]


@pytest.mark.parametrize(("text", "finding"), PLACES, ids=[f"{text} {f.kind}" for text, f in PLACES])
def test_side_and_zone(text: str, finding: Finding) -> None:
    assert of_kind(text, finding.kind) == [finding]


POLARITIES = [
    ("The heart is mildly enlarged.", "cardiomegaly", "present"),
    ("Enlarged heart.", "cardiomegaly", "present"),
    ("Heart size at the upper limit of normal.", "cardiomegaly", "uncertain"),
    ("The heart is not enlarged.", "cardiomegaly", "absent"),
    ("Heart size is normal.", "cardiomegaly", "absent"),
    ("Cardiac silhouette within normal limits.", "enlarged cardiac silhouette", "absent"),
    ("The lungs are clear.", "consolidation", "absent"),
    ("Mediastinum unremarkable.", "enlarged mediastinum", "absent"),
    ("Low lung volumes.", "hypoinflation", "present"),
    ("Lungs are hyperexpanded.", "hyperinflation", "present"),
    ("Tortuous aorta.", "tortuous aorta", "present"),
    ("The left hemidiaphragm is elevated.", "elevated diaphragm", "present"),
    ("Flattening of the diaphragms.", "flattened diaphragm", "present"),
    ("Blunted costophrenic angle.", "costophrenic angle blunting", "present"),
    ("Degenerative changes of the spine.", "degenerative spine", "present"),
    ("Old rib fractures.", "fracture", "present"),
    ("No acute fracture.", "fracture", "absent"),
    ("Surgical clips in the right axilla.", "surgical material", "present"),
    ("Pacemaker leads in place.", "implanted device", "present"),
    ("A central line ends in the cava.", "catheter", "present"),
    ("Endotracheal tube above the carina.", "tube", "present"),
    ("The pneumothorax has resolved.", "pneumothorax", "absent"),
    ("No change in the hiatal hernia.", "hiatal hernia", "present"),
    ("Opacity may reflect pneumonia.", "pneumonia", "uncertain"),
    ("Opacity may reflect pneumonia.", "opacity", "present"),
    ("Increased interstitial markings.", "interstitial markings", "present"),
]


@pytest.mark.parametrize(("text", "kind", "polarity"), POLARITIES, ids=[f"{t} {k}" for t, k, _ in POLARITIES])
def test_polarity(text: str, kind: str, polarity: str) -> None:
    assert [f.polarity for f in of_kind(text, kind)] == [polarity]


def test_calcified_granuloma_is_one_finding_and_two_items_are_two() -> None:
    assert {f.kind for f in extract_findings("Calcified left hilar granuloma.")} == {"calcified granuloma"}
    assert {f.kind for f in extract_findings("Calcified nodes and a granuloma.")} == {"calcification", "granuloma"}


@pytest.mark.parametrize("text", ["", "XXXX.", "Sin hallazgos.", "心臓は正常。", "Please call the ward."])
def test_nothing_in_it(text: str) -> None:
    assert extract_findings(text) == []


def test_findings_do_not_depend_on_case_wrapping_or_earlier_calls() -> None:
    text = "Small left pleural effusion. The heart is enlarged. No edema."
    assert extract_findings(text) == extract_findings(text.upper()) == extract_findings(text.replace(" ", "\n"))


def test_long_text_without_a_sentence_end() -> None:
    found = extract_findings("the heart is enlarged and " * 40_000)
    assert {f.kind for f in found} >= {"cardiomegaly"}


def test_lexicon_is_consistent() -> None:
    known = set(lexicon.FINDINGS) | set(lexicon.PARTS)
    assert {part for _, a, b, _ in lexicon.PAIRS for part in (a, b)} <= known
    assert {kind for kinds in lexicon.DENIES.values() for kind in kinds} <= set(KINDS)
    assert set(lexicon.TAGS) <= set(KINDS)
    assert len(KINDS) * (1 + 2 + len(lexicon.ZONES)) + 1 <= 1024
    for kind, phrases in lexicon.FINDINGS.items():
        for phrase in phrases.split("|"):
            assert kind in {f.kind for f in extract_findings(f"There may be {phrase} here")} | {"calcification"}, phrase


def test_vectors_are_unit_rows_and_normal_is_its_own() -> None:
    texts = [
        "The heart is normal. Lungs are clear.",
        "No acute disease. Normal heart size, no effusion or pneumothorax.",
        "Cardiomegaly.",
        "The heart is enlarged. No pneumothorax.",
        "Possible cardiomegaly.",
        "Scoliosis, hernia and old fractures.",
        "Left pleural effusion.",
        "Right pleural effusion.",
        "",
    ]
    vectors, names = finding_vectors(texts)
    s = vectors @ vectors.T
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(texts), len(names))
    np.testing.assert_allclose(np.diag(s), 1, atol=1e-6)
    assert "no finding" in names
    np.testing.assert_allclose([s[0, 1], s[2, 3], s[0, 8]], 1, atol=1e-6)
    assert s[0, 2] < 0.3
    assert s[0, 5] < s[0, 2]
    assert s[0, 2] < s[0, 4] < 1
    assert s[2, 4] < 1
    assert 0.8 < s[6, 7] < 0.999
    alone, fewer = finding_vectors(texts[:4])
    assert fewer == names[: len(fewer)] == ["no finding", *KINDS], "a coordinate is the same finding in any reports"
    assert names[len(fewer) :] == ["pleural effusion/left", "pleural effusion/right"]
    np.testing.assert_allclose(alone @ alone.T, s[:4, :4], atol=1e-6)


def test_vectors_of_no_reports() -> None:
    assert finding_vectors([])[0].shape == (0, len(KINDS) + 1)


def test_tags() -> None:
    assert tagged_kinds("normal") == frozenset()
    assert tagged_kinds("Lung/hypoinflation|Aorta/tortuous/mild") == {"hypoinflation", "tortuous aorta"}
    assert tag_sets(["normal", "Opacity/lung|Opacity/right|Nodule"]) == [frozenset(), {"Opacity", "Nodule"}]


def test_pair_agreement_equals_the_double_loop() -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 2, (30, 6))
    rows[:, 0] = 1
    vectors = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    sets = [frozenset(np.flatnonzero(row[1:3]).tolist()) for row in rows]
    wins = pairs = hits = said = same = 0.0
    values = [
        (sets[i] == sets[j], round(float(vectors[i] @ vectors[j]), 5)) for i in range(30) for j in range(i + 1, 30)
    ]
    for equal, s in values:
        same, said, hits = same + equal, said + (s >= 0.999), hits + (equal and s >= 0.999)
        for other, t in values:
            if equal and not other:
                wins, pairs = wins + (s > t) + 0.5 * (s == t), pairs + 1
    figures = pair_agreement(vectors, sets)
    assert figures["auroc"] == pytest.approx(wins / pairs)
    assert figures["recall"] == pytest.approx(hits / same)
    assert figures["precision"] == pytest.approx(hits / said)
    sampled = pair_agreement(vectors, sets, seed=1, limit=300)
    assert sampled["pairs"] == 300
    assert sampled == pair_agreement(vectors, sets, seed=1, limit=300)


def test_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "reports.csv"
    rows = ["findings,impression,mesh"]
    rows += ["Clear lungs.,No acute disease.,normal", "Normal heart.,,normal", "Cardiomegaly.,,Cardiomegaly/mild"] * 3
    rows += ["Never read.,,No Indexing", ",,normal"]
    table.write_text("\n".join(rows))
    out = tmp_path / "figures.json"
    assert main([str(table), "--tags", "mesh", "--sources", "findings", "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert figures["reports"] == 9
    assert figures["findings"]["cardiomegaly"]["f1"] == 1
    assert figures["sources"]["findings"]["tags"]["auroc"] == 1
    assert figures["equal_findings"] == {"recall": 1, "precision": 1}
    assert "cardiomegaly" in capsys.readouterr().out
    assert main([str(table), "--sources", "findings,tfidf"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.csv"], "no such file"),
        (["reports.csv", "--tags", "tags"], "no column 'tags'"),
        (["reports.csv", "--sources", "finding"], "did you mean findings"),
        (["one.csv"], "at least two"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "reports.csv").write_text("findings,impression\nEdema.,\nEffusion.,\n")
    (tmp_path / "one.csv").write_text("findings,impression\nEdema.,\n")
    with pytest.raises(SistaError, match=message):
        main([str(tmp_path / arguments[0]), *arguments[1:]])


@pytest.mark.real
def test_held_out_real_reports(capsys: pytest.CaptureFixture[str]) -> None:
    """The lexicon was written on one half of the reports (by hash of the id); this is the other."""
    import pandas as pd

    root = Path(os.environ.get("SISTA_REAL_DATA", Path(__file__).parents[2].parent / "shared/data/cxr"))
    file = root / "reports_only_iu.csv"
    if not file.is_file():
        pytest.skip(f"no {file}; set SISTA_REAL_DATA")
    ids = pd.read_csv(file, usecols=["report_id", "mesh"], dtype=str, keep_default_na=False)
    ids = ids.report_id[ids.mesh != "No Indexing"]
    texts, tags = read_table(file, tags="mesh")
    assert len(ids) == len(texts) == len(tags)
    half = [i for i, name in enumerate(ids) if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 2]
    texts, tags = [texts[i] for i in half], [tags[i] for i in half]
    pairs = pair_agreement(finding_vectors(texts)[0], tag_sets(tags))
    equal = equal_finding_agreement(texts, tags)
    kinds = finding_agreement(texts, tags)
    with capsys.disabled():
        print(f"\n{len(texts)} held-out reports: {pairs}\nequal findings: {equal}\nall findings: {kinds['all']}")
    assert pairs["auroc"] >= 0.95
    assert pairs["auroc_without_normal_pairs"] >= 0.88
    assert equal["recall"] >= 0.8
    assert equal["precision"] >= 0.85
    assert kinds["all"]["f1"] >= 0.85
