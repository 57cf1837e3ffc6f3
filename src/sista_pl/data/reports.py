"""The text of a report: bytes to text, text to sections, a section to one clean line."""

from __future__ import annotations

import re

# The longest real reports have some 10 kB; a megabyte is a file that is no report.
MAX_REPORT_BYTES = 1_000_000

_SECTIONS = {
    "FINDING": "findings",
    "FINDINGS": "findings",
    "FINDINGS AND IMPRESSION": "findings",
    "FINDINGS/IMPRESSION": "findings",
    "IMPRESSION": "impression",
    "IMPRESSIONS": "impression",
    "CONCLUSION": "impression",
    "CONCLUSIONS": "impression",
}
# A header is any upper-case line start with a colon, or one of ours in any case.
_HEADER = re.compile(
    rf"^[ \t]*((?:[A-Z][A-Z ()/,&-]{{2,60}})|(?i:{'|'.join(sorted(_SECTIONS, key=len, reverse=True))}))[ \t]*:",
    re.MULTILINE,
)
# Those that end the findings or the impression; "LUNGS:" is a part of them.
_ASIDE = re.compile(
    r"\b(?:EXAM|INDICATION|HISTORY|CLINICAL|REASON|TECHNI|PROCEDURE|COMPAR|REFERENCE|WET ?READ|PRELIMINARY|PROVISIONAL"
    r"|PFI|NOTIF|RECOMMEND|ADDENDUM|DATE\b|DOSE\b|READ BY|SIGNED|DICTATED|TRANSCRIBED|PHYSICIAN|RADIOLOGIST|ATTENDING)"
)
_TITLE = re.compile(r"^[ \t]*(?:FINAL|WET|PRELIMINARY) (?:REPORT|READ)\b.*$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n[ \t]*\n")
_WORD = re.compile(r"\w+")
_DEIDENTIFIED = re.compile(r"_{2,}")


class BadReport(ValueError):
    """A report that cannot be read; the message is the reason."""


def decode(raw: bytes) -> str:
    """Return the text of a report file: UTF-8 (with or without mark), else Windows-1252.

    Raises:
        BadReport: NUL bytes, bytes of neither encoding, or more than `MAX_REPORT_BYTES`.
    """
    if len(raw) > MAX_REPORT_BYTES:
        raise BadReport(f"report of {len(raw)} bytes, more than {MAX_REPORT_BYTES}")
    return decode_text(raw)


def decode_text(raw: bytes) -> str:
    """`decode` without the limit of length, for a whole table."""
    if b"\0" in raw:
        raise BadReport("not text: it has NUL bytes")
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise BadReport("neither UTF-8 nor Windows-1252")


def clean(text: str) -> str:
    """Return `text` in one line, without the `___` of de-identification; "" where no letter or digit is left.

    Case, punctuation and every other character stay: what to lower or to split is the text encoder's business.
    """
    text = " ".join(_DEIDENTIFIED.sub(" ", text).split())
    return text if any(c.isalnum() for c in text) else ""


def normalise_mgca(text: str) -> str:
    """Return the words as MGCA's reference code keeps them: ASCII, lower case, sentences of two words or more.

    Sentences end at a full stop, which takes the digits before it along ("1." of a list, and the 3 of 3.5); "" where
    fewer than three words are left. For comparison with published figures, not for hospitals that write otherwise.
    """
    sentences = [_WORD.findall(part.lower()) for part in re.split(r"[0-9]*\.", text.replace("\ufffd", " "))]
    words = [word for sentence in sentences if len(sentence) > 1 for word in sentence]
    words = [word for raw in words if (word := raw.encode("ascii", "ignore").decode())]
    return " ".join(words) if len(words) >= 3 else ""


NORMALISE = {"unicode": clean, "mgca": normalise_mgca}


def split_sections(text: str) -> dict[str, str]:
    """Cut a report, as MIMIC-CXR writes it, into its sections.

    A header begins a line. One that is not known, as "LUNGS:", is text of the section that it stands in.

    Returns:
        cleaned "findings" ("FINDINGS AND IMPRESSION" too) and "impression" ("CONCLUSION" too), where they are not
        empty; a repeated section is joined. Where neither is there: "last_paragraph", the text after the last blank
        line, without its header. Empty dict for a report without a word.
    """
    text = _TITLE.sub("", text.replace("\r\n", "\n"))
    headers = [
        header
        for header in _HEADER.finditer(text)
        if header[1].strip().upper() in _SECTIONS or _ASIDE.search(header[1])
    ]
    sections: dict[str, str] = {}
    ends = [header.start() for header in headers[1:]] + [len(text)]
    for header, end in zip(headers, ends, strict=False):
        name = _SECTIONS.get(header[1].strip().upper())
        body = clean(text[header.end() : end])
        if name and body:
            sections[name] = f"{sections[name]} {body}" if name in sections else body
    if not sections:
        paragraphs = [clean(_HEADER.sub("", part, count=1)) for part in _BLANK_LINES.split(text)]
        if last := next((p for p in reversed(paragraphs) if p), ""):
            sections["last_paragraph"] = last
    return sections
