"""Spans of negation and doubt: sentences written for the test, with the words that must and must not be covered."""

from __future__ import annotations

import pytest

from sista_pl.data.negation import negated_spans, uncertain_spans


def covered(text: str, spans: list[tuple[int, int]]) -> set[str]:
    """Words of the text that lie wholly inside a span."""
    words = [word for start, end in spans for word in text[start:end].split()]
    return {word.strip(".,:;").lower() for word in words}


NEGATED = [
    # text, negated, not negated
    ("No pleural effusion or pneumothorax.", "effusion pneumothorax", ""),
    ("Clear lungs without evidence of edema, nodules or collapse.", "edema nodules collapse", "clear lungs"),
    ("The lungs are free of infiltrate.", "infiltrate", "lungs"),
    ("Both lungs are clear of consolidation.", "consolidation", "lungs"),
    ("Negative for pneumonia, edema and effusion.", "pneumonia edema effusion", ""),
    ("Neither nodule nor mass.", "nodule mass", ""),
    ("Atelectasis rather than pneumonia.", "pneumonia", "atelectasis"),
    ("A nodule is not seen.", "nodule", ""),
    ("Effusion and edema are no longer visible.", "effusion edema", ""),
    ("The left effusion has resolved.", "effusion", ""),
    ("Interval resolution of edema.", "edema", ""),
    ("Removal of the catheter.", "catheter", ""),
    ("Pneumothorax is absent.", "pneumothorax", ""),
    ("The heart is not enlarged.", "enlarged", "heart"),
    # an adjective, not a negation
    ("Non-calcified nodule in the right upper lobe.", "", "nodule calcified"),
    ("Non displaced fracture of the left clavicle.", "", "fracture"),
    ("Non-specific opacity, no effusion.", "effusion", "opacity"),
    # a scope ends
    ("No effusion. Cardiomegaly.", "effusion", "cardiomegaly"),
    ("No effusion but cardiomegaly.", "effusion", "cardiomegaly"),
    ("No effusion; however scoliosis is severe.", "effusion", "scoliosis"),
    ("No acute disease other than cardiomegaly.", "disease", "cardiomegaly"),
    ("No effusion is seen and the aorta is tortuous.", "effusion", "tortuous"),
    ("No effusion, the heart is enlarged.", "effusion", "enlarged"),
    ("No effusion\n\nCardiomegaly", "effusion", "cardiomegaly"),
    ("The effusion is small and pneumothorax is not seen.", "pneumothorax", "effusion"),
    # and does not end
    ("No nodule of 1.5 cm or mass.", "nodule mass", ""),
    ("No pleural effusion or\npneumothorax.", "effusion pneumothorax", ""),
    ("No acute, displaced fractures are seen.", "fractures", ""),
    ("No edema, effusion, or consolidation is seen.", "edema effusion consolidation", ""),
    # no negation at all
    ("No change in the hernia.", "", "hernia"),
    ("No significant interval change in the nodule.", "", "nodule"),
    ("Without interval change in cardiomegaly.", "", "cardiomegaly"),
    ("Not only edema, effusion too.", "", "edema effusion"),
    ("Cannot exclude pneumonia.", "", "pneumonia"),
    ("Pneumonia is not excluded.", "", "pneumonia"),
    ("The effusion has not resolved.", "", "effusion"),
    ("The left base is not well seen.", "", "base left"),
]


@pytest.mark.parametrize(("text", "negated", "free"), NEGATED, ids=[row[0] for row in NEGATED])
def test_negation(text: str, negated: str, free: str) -> None:
    words = covered(text, negated_spans(text))
    assert set(negated.split()) <= words
    assert words.isdisjoint(free.split())


UNCERTAIN = [
    ("Opacity may represent atelectasis or pneumonia.", "atelectasis pneumonia", "opacity"),
    ("Possible edema, cardiomegaly.", "edema", "cardiomegaly"),
    ("Cannot exclude pneumonia.", "pneumonia", ""),
    ("Pneumonia cannot be excluded.", "pneumonia", ""),
    ("Opacity suspicious for pneumonia. Effusion.", "pneumonia", "opacity effusion"),
    ("Questionable nodule and cardiomegaly.", "nodule", "cardiomegaly"),
    ("Atelectasis versus scar.", "atelectasis scar", ""),
    ("Basal opacity, atelectasis vs. scar.", "atelectasis scar", "opacity"),
    ("Small fractures may not be visible.", "fractures", ""),
    ("Stable cardiomegaly.", "", "cardiomegaly"),
    ("No edema.", "", "edema"),
]


@pytest.mark.parametrize(("text", "doubtful", "free"), UNCERTAIN, ids=[row[0] for row in UNCERTAIN])
def test_uncertainty(text: str, doubtful: str, free: str) -> None:
    words = covered(text, uncertain_spans(text))
    assert set(doubtful.split()) <= words
    assert words.isdisjoint(free.split())


@pytest.mark.parametrize("spans", [negated_spans, uncertain_spans])
@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "...",
        "no",
        "not seen",
        "versus",
        "no no no.",
        "心臓は正常。胸水なし。",
        "Kein Erguß.",
        "\ud800 no edema",
    ],
)
def test_any_text_gives_sorted_spans_inside_it(spans, text: str) -> None:
    found = spans(text)
    flat = [place for span in found for place in span]
    assert flat == sorted(flat)
    assert all(0 <= start < end <= len(text) for start, end in found)


def test_text_without_punctuation_is_not_negated_to_its_end() -> None:
    text = "no effusion " + "word " * 100
    assert [len(text[a:b].split()) for a, b in negated_spans(text)] == [40]


def test_trigger_stays_outside_and_span_starts_at_a_word() -> None:
    text = "There is no pleural effusion."
    assert [text[a:b] for a, b in negated_spans(text)] == ["pleural effusion"]


def test_spans_of_sentences_are_those_of_the_text() -> None:
    sentences = [text for text, _, _ in NEGATED if text.endswith(".")]
    whole, expected, at = " ".join(sentences), [], 0
    for sentence in sentences:
        expected += [(at + a, at + b) for a, b in negated_spans(sentence)]
        at += len(sentence) + 1
    assert negated_spans(whole) == expected


@pytest.mark.parametrize("unit", ["no ", "a", " ", "\n", "no\t\n \t", "no effusion, ", "1.1."])
def test_scan_is_linear(unit: str) -> None:
    # Regular expressions that backtrack do not finish on this in an hour; no clock is needed.
    text = unit * (2_000_000 // len(unit))
    assert all(end <= len(text) for _, end in negated_spans(text))
