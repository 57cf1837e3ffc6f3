"""Findings of a report: what is there, what is said not to be there, what is doubtful; on which side, in which zone.

N reports, Ds coordinates. Terms are in `lexicon`, negation and doubt in `negation`; both are English.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sista_pl.data import lexicon
from sista_pl.data.negation import Phrases, is_sentence_end, negated_spans, tokens, uncertain_spans

KINDS: tuple[str, ...] = tuple(dict.fromkeys([*lexicon.FINDINGS, *(pair[0] for pair in lexicon.PAIRS)]))
NO_FINDING = "no finding"
# Tried on one half of the Indiana reports against their tags: any weight up to 0.5 for what is uncertain does, side and
# zone move nothing (tags are compared without), and weight on absent findings makes two normal reports differ by what
# they happen to mention: 2 % of the pairs with equal tags have S >= 0.999 then, instead of 88 %.
WEIGHTS = {"present": 1.0, "uncertain": 0.5, "absent": 0.0}
SIDE_WEIGHT = 0.25
ZONE_WEIGHT = 0.2
# A single finding is nearer to normal than five are. Without this, one spurious finding in a normal report costs all:
# the AUROC falls from 0.98 to 0.95. More than 0.2 raises it further, at the price of likeness between other findings.
NEAR_NORMAL = 0.2

# How far a side or zone may stand from its finding, in words.
_REACH = 8
_NEAR = 4
_ITEM = frozenset([",", "and", "or"])
_IN = frozenset(["in", "of", "at", "within", "on", "overlying", "over", "involving"])
_LONGEST_SENTENCE = 2000


@dataclass(frozen=True)
class Finding:
    """One finding as a report names it.

    Args:
        kind: one of `KINDS`.
        polarity: "present", "absent" or "uncertain".
        side: "left", "right", "bilateral", or None where none is stated.
        zone: a key of `lexicon.ZONES`, or None.
    """

    kind: str
    polarity: str
    side: str | None = None
    zone: str | None = None


def _phrases(table: dict[str, str]) -> dict[str, list[str]]:
    return {label: phrases.split("|") for label, phrases in table.items()}


_TERMS = Phrases(_phrases(lexicon.FINDINGS) | _phrases(lexicon.PARTS), lexicon.singular)
_SIDES = Phrases(_phrases(lexicon.SIDES), lexicon.singular)
_ZONES = Phrases(_phrases(lexicon.ZONES), lexicon.singular)
_TAGS = {kind: frozenset(names.split("|")) for kind, names in lexicon.TAGS.items()}
_PAIRED = {part for _, anatomy, state, _ in lexicon.PAIRS for part in (anatomy, state)}


def extract_findings(text: str) -> list[Finding]:
    """Return the findings that a report names, in the order of the text, each once.

    A finding may come with two polarities, where a report contradicts itself ("no effusion … small effusion").

    Args:
        text: a report, of any length; English, others give an empty list or near.
    """
    found: dict[Finding, None] = {}
    for sentence in _sentences(text):
        found.update(dict.fromkeys(_sentence_findings(sentence)))
    return list(found)


def _sentences(text: str) -> Iterable[str]:
    start = None
    for word, begin, end in tokens(text):
        if start is None:
            start = begin
        if is_sentence_end(word) or end - start > _LONGEST_SENTENCE:
            yield text[start:end].lower()
            start = None
    if start is not None:
        yield text[start:].lower()


# Reports are made of sentences that recur ("No pneumothorax."), so that most are read once in a corpus.
@lru_cache(maxsize=50_000)
def _sentence_findings(sentence: str) -> tuple[Finding, ...]:
    read = tokens(sentence)
    words = [lexicon.singular(word) for word, _, _ in read]
    terms = _matches(_TERMS, words)
    if not terms:
        return ()
    negated = _covered(read, negated_spans(sentence))
    doubted = _covered(read, uncertain_spans(sentence))
    sides, zones = _matches(_SIDES, words), _matches(_ZONES, words)
    within = [start for label, start, _ in terms if label == "WITHIN"]

    def finding(kind: str, at: int, borderline: bool) -> Finding:
        if negated[at] or any(0 < start - at <= _NEAR for start in within):
            polarity = "absent"
        else:
            polarity = "uncertain" if doubted[at] or borderline else "present"
        return Finding(kind, polarity, _nearest(sides, at, words), _nearest(zones, at, words))

    named = [(at, label, False) for label, at, _ in terms if label in lexicon.FINDINGS]
    named += _pairs(terms, words)
    taken = {
        (at, part)
        for whole_at, whole, _ in named
        for part in lexicon.ABSORBS.get(whole, ())
        for at, label, _ in named
        if label == part and abs(at - whole_at) <= _NEAR
    }
    found = [finding(kind, at, borderline) for at, kind, borderline in sorted(named) if (at, kind) not in taken]
    positive = {f.kind for f in found if f.polarity != "absent"}
    for part, at in _normal_parts(terms, negated):
        side = _nearest(sides, at, words)
        found += [Finding(kind, "absent", side) for kind in lexicon.DENIES[part] if kind not in positive]
    return tuple(dict.fromkeys(found))


def _matches(phrases: Phrases, words: list[str]) -> list[tuple[str, int, int]]:
    """Return (label, first word, end) of all phrases, left to right, none inside another."""
    matches, i = [], 0
    while i < len(words):
        labels, end = phrases.at(words, i)
        matches += [(label, i, end) for label in labels]
        i = max(end, i + 1)
    return matches


def _covered(read: list[tuple[str, int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """Return whether each word starts inside a span; both come sorted."""
    covered, k = [], 0
    for _, start, _ in read:
        while k < len(spans) and spans[k][1] <= start:
            k += 1
        covered.append(k < len(spans) and spans[k][0] <= start)
    return covered


def _pairs(terms: list[tuple[str, int, int]], words: list[str]) -> list[tuple[int, str, bool]]:
    """Return (word, finding, whether borderline) of parts that stand together: heart … enlarged."""
    places: dict[str, list[tuple[int, int]]] = {}
    for label, start, end in terms:
        if label in _PAIRED:
            places.setdefault(label, []).append((start, end))
    found = []
    for kind, anatomy, state, gap in lexicon.PAIRS:
        # Two findings make a third only as one phrase ("calcified hilar granuloma"), not as two items of a list.
        apart = {"but", "and", ","} if anatomy in lexicon.FINDINGS else {"but"}
        for start, end in places.get(anatomy, ()):
            for state_start, state_end in places.get(state, ()):
                between = words[end:state_start] if start < state_start else words[state_end:start]
                if len(between) <= gap and apart.isdisjoint(between):
                    found.append((state_start, kind, state == "BORDERLINE"))
                    break
    return found


def _normal_parts(terms: list[tuple[str, int, int]], negated: list[bool]) -> list[tuple[str, int]]:
    """Return (anatomy, word) of the parts that are called normal: "heart and lungs are normal", "clear lungs"."""
    normal = [start for label, start, _ in terms if label in ("NORMAL", "WITHIN") and not negated[start]]
    return [
        (label, at)
        for label, at, _ in terms
        if label in lexicon.DENIES and any(-_NEAR < start - at <= _REACH for start in normal)
    ]


def _nearest(places: list[tuple[str, int, int]], at: int, words: list[str]) -> str | None:
    """Return the label nearest to word `at`; of two equally near, the one before it.

    A place behind it is its own only up to the next item of a list: "effusion and right atelectasis", but "effusion
    and atelectasis in the right lung".
    """
    near = []
    for label, start, _ in places:
        gap = words[at + 1 : start]
        if abs(start - at) <= _REACH and (start < at or _ITEM.isdisjoint(gap) or not _IN.isdisjoint(gap)):
            near.append((abs(start - at), start > at, label))
    return min(near)[2] if near else None


def finding_vectors(texts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Return one vector a report; the cosine of two says how alike their findings are.

    Args:
        texts: N reports.

    Returns:
        vectors (N, Ds) float32 unit rows, Ds <= 1024, and the names of the coordinates: "no finding" and all of
        `KINDS`, the same for any reports; then those of "finding/side" and "finding/zone", at less weight, that some
        report uses. An uncertain finding counts half, and leaves half of "no finding". What is said to be absent does
        not count: it is where normal reports differ in wording only.
    """
    column = {name: place for place, name in enumerate((NO_FINDING, *KINDS))}
    rows = []
    for text in texts:
        weights = _coordinates(extract_findings(text))
        rows.append(([column.setdefault(name, len(column)) for name in weights], list(weights.values())))
    vectors = np.zeros((len(rows), len(column)), dtype=np.float32)
    for vector, (columns, values) in zip(vectors, rows, strict=True):
        vector[columns] = values
        vector /= np.linalg.norm(vector)
    return vectors, list(column)


def _coordinates(findings: Iterable[Finding]) -> dict[str, float]:
    kinds: dict[str, float] = {}
    places: dict[str, float] = {}
    for f in findings:
        weight = WEIGHTS[f.polarity]
        if not weight:
            continue
        kinds[f.kind] = max(kinds.get(f.kind, 0.0), weight)
        for place, share in ((f.side, SIDE_WEIGHT), (f.zone, ZONE_WEIGHT)):
            for part in ("left", "right") if place == "bilateral" else (place,):
                if part:
                    key = f"{f.kind}/{part}"
                    places[key] = max(places.get(key, 0.0), weight * share)
    normal = max(1.0 - max(kinds.values()), NEAR_NORMAL / len(kinds)) if kinds else 1.0
    return kinds | places | {NO_FINDING: normal}


def tagged_kinds(tags: str) -> frozenset[str]:
    """Return the findings that the tags of an Indiana report name.

    Args:
        tags: as the data set has them: `Opacity/lung/base|Cardiomegaly/mild`, or `normal`.
    """
    names = set()
    for tag in tags.split("|"):
        heading, *qualifiers = [part.strip() for part in tag.split("/")]
        names |= {heading, *(f"{heading}/{qualifier}" for qualifier in qualifiers)}
    return frozenset(kind for kind, wanted in _TAGS.items() if not names.isdisjoint(wanted))
