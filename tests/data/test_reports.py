import pytest

from sista_pl.data.reports import MAX_REPORT_BYTES, BadReport, clean, decode, normalise_mgca, split_sections

REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old with cough  // question

 COMPARISON:  None.

 FINDINGS:

 The first line
 and the second: still the same.

 A second paragraph.

 IMPRESSION:

 1.  One thing.
 2.  Another.
"""


def test_findings_and_impression_are_cut_at_headers_and_put_on_one_line():
    assert split_sections(REPORT) == {
        "findings": "The first line and the second: still the same. A second paragraph.",
        "impression": "1. One thing. 2. Another.",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" FINDINGS AND IMPRESSION:  Both here.", {"findings": "Both here."}),
        (" FINDINGS/IMPRESSION: Both here.\n\n NOTIFICATION: by telephone", {"findings": "Both here."}),
        ("Conclusion: Nothing new.", {"impression": "Nothing new."}),
        (" FINDINGS: ___\n IMPRESSION: Seen.", {"impression": "Seen."}),
        (" FINDINGS: One.\r\n\r\n FINDINGS: Two.\r\n", {"findings": "One. Two."}),
        (" IMPRESSION: Kept.\n\n WET READ: Not kept.", {"impression": "Kept."}),
        (
            "FINDINGS:\nLUNGS: Left effusion.\nHEART: Enlarged.\nIMPRESSION: Effusion.\n CHEST: Old.\nSIGNED BY: Dr. X",
            {"findings": "LUNGS: Left effusion. HEART: Enlarged.", "impression": "Effusion. CHEST: Old."},
        ),
        *(
            (f" FINDINGS: Kept.\n {header}: Left out.\n IMPRESSION: K.", {"findings": "Kept.", "impression": "K."})
            for header in """EXAM|TYPE OF EXAMINATION|INDICATION|CLINICAL INFORMATION|PATIENT HISTORY|TECHNIQUE|DATE
                REASON FOR EXAM|COMPARISONS|REFERENCE EXAM|NOTIFICATION|RECOMMENDATION(S)|ADDENDUM|WETREAD|PFI
                PROVISIONAL FINDINGS IMPRESSION (PFI)""".replace("\n", "|").split("|")
        ),
        (" HISTORY: pain\n\n Heart is big.\n\n \n", {"last_paragraph": "Heart is big."}),
        (" FINAL REPORT\n CHEST: Heart is big.", {"last_paragraph": "Heart is big."}),
        ("the findings: are in the middle of a line", {"last_paragraph": "the findings: are in the middle of a line"}),
        ("", {}),
        ("___", {}),
        ("___ , ___.\n", {}),
    ],
)
def test_sections(text, expected):
    assert split_sections(text) == expected


def test_clean_keeps_unicode_and_case_and_drops_the_marks_of_de_identification():
    assert clean(" Dr. ___  saw\tÉlève,\n 3 µm; 胸部 ") == "Dr. saw Élève, 3 µm; 胸部"
    assert clean(" ___ . ") == ""


def test_decode_knows_two_encodings():
    assert decode("µm – é".encode()) == "µm – é"
    assert decode(b"\xef\xbb\xbfwith a mark") == "with a mark"
    assert decode("µm – é".encode("cp1252")) == "µm – é"


@pytest.mark.parametrize(
    ("raw", "why"),
    [(b"a\0b", "NUL"), (b"\x81\xff", "neither UTF-8"), (b"a" * (MAX_REPORT_BYTES + 1), "more than")],
)
def test_decode_refuses_what_is_no_report(raw, why):
    with pytest.raises(BadReport, match=why):
        decode(raw)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("No effusion. Normal. Heart is fine.", "no effusion heart is fine"),  # sentences of one word go
        ("Größe: normal 3.5 cm.", "gre normal 5 cm"),
        ("1. One thing. 2. Another.", ""),
        ("1. One small thing. 2. Another.", "one small thing"),
        ("Clear lungs.", ""),  # fewer than three words
        ("", ""),
    ],
)
def test_mgca_normalisation_keeps_ascii_words_of_sentences(text, expected):
    assert normalise_mgca(text) == expected
