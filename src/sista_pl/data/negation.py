"""Which characters of a report stand inside a negation, and which inside an uncertainty.

The method is that of trigger words and their scopes (NegEx, Chapman et al. 2001; its terminators as in ConText, Harkema
et al. 2009): a trigger opens a scope before or behind it, which a sentence end, a contrast or a new clause closes. The
words are read once from left to right, so the time is linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import product

# A decimal or "vs." is one word, since its point ends no sentence; hyphens part words ("right-sided", "air-space").
# A single line break ends nothing (reports are wrapped at 80 columns), a blank line does.
_TOKEN = re.compile(r"\d+(?:\.\d+)+|vs\.|[^\W_]+(?:['’][^\W_]+)*|[.;:!?。！？,()]|\n[^\S\n]*\n\s*", re.IGNORECASE)
_SENTENCE_END = frozenset(".;!?。！？")
# Lists of negated findings run to some 20 words; text without punctuation shall not be negated to its end.
_MAX_SCOPE = 40


def _phrases(*lines: str) -> list[str]:
    """Return the phrases of lines in which they are parted by `|`; `{a/b} c` stands for `a c|b c`, `_` for no word."""
    phrases = []
    for phrase in "|".join(lines).split("|"):
        parts = [part.split("/") for part in re.split(r"[{}]", phrase)]
        phrases += ["".join(choice).replace("_", "") for choice in product(*parts)]
    return phrases


_VERBS = frozenset(_phrases("is|are|was|were|has|have|appears|appear|remains|remain|shows|show|demonstrates"))
_SEEN = (
    "{seen/identified/demonstrated/visualized/visualised/noted/appreciated/evident/present/observed/detected/apparent/"
    "found/visible/recognized/shown}"
)
_DEGREE = "significant/substantial/appreciable/major/gross/obvious/acute/further/real/definite/marked/large/overall"
# A comma behind one of these goes on with the same noun: "no acute, displaced fracture".
_ADJECTIVES = frozenset(
    ["acute", "focal", "large", "definite", "discrete", "displaced", "significant", "suspicious", "obvious", "new"]
)
_CHANGE = "{change/changed/increase/decrease/progression/improvement/worsening/growth}"

_STOP = _phrases(
    "but|however|although|though|yet|whereas|while|nevertheless|except|aside from|apart from|other than|besides",
    "due to|secondary to|because|despite|status post|given|otherwise|compatible with|consistent with|this|these",
    "{there/and there} {is/are/has/have}|and the|, {stable/unchanged/again}|is clear|are clear|is normal|are normal",
)

_NEGATION = {
    "stop": [*_STOP, "which", "with"],
    "pseudo": _phrases(
        f"{{no/without/without any/not}} {_CHANGE}",
        f"{{no/without/without any/not}} {{{_DEGREE}/interval/significantly}} {_CHANGE}",
        f"{{no/without/without any}} {{{_DEGREE}}} interval {_CHANGE}",
        "{no/without/without any} {significant /substantial /appreciable /_}interval {acute change/changes}",
        "{no/without} {significant/substantial/appreciable/further} changes",
        f"not {{well/fully/completely/entirely/optimally}} {_SEEN}",
        "{not/cannot be} {well/fully/completely/entirely/adequately/optimally/clearly/accurately/reliably} "
        "{evaluated/assessed/included/imaged/excluded/defined}",
        "not {only/necessarily/excluded/exclude/ruled out/rule out/included/evaluated/assessed/cleared/certain}",
        "not {otherwise/available/removed/been removed/resolved/completely resolved/entirely resolved/limited to}",
        "cannot exclude|cannot be excluded|no doubt|no longer than|whether or not|with or without|no interval removal",
        "{nearly/partially/incompletely} resolved|{partial/incomplete/near complete} resolution",
        "{no/without} {comparison/prior/previous}",
    ),
    "forward": _phrases(
        "no|not|never|without|without evidence of|negative for|free {of/from}|{_/is /are /and }clear of|devoid of",
        "absence of|absent|lack of|lacks|lacking|neither|nor|denies|denied|rather than|instead of|as opposed to",
        "resolved|{complete /_}resolution of|{interval /_}removal of|excludes|exclude|rules out|against|no longer has",
    ),
    "backward": _phrases(
        f"{{not/no longer/not clearly/not definitely/not definitively/not currently/not now}} {_SEEN}",
        "{is/are/was/were/be/been} {absent/excluded/ruled out/removed/resected}",
        "{has/have/is/are} {_/completely /since /now }{resolved/disappeared}|{has/have} cleared",
    ),
}

_UNCERTAINTY = {
    "stop": _STOP,
    "pseudo": _phrases("soon as possible|if clinically|if indicated|if possible|likely normal"),
    "forward": _phrases(
        "{may/might/could/can} {represent/reflect/be/have/indicate/suggest/relate to/also represent/simply represent}",
        "{suspicious/concerning/worrisome/concern/suspicion/evaluate/questionable/equivocal} for",
        "{cannot/can not/does not/do not} {entirely /completely /_}{exclude/rule out}|not exclude|difficult to exclude",
        "rule out|r o|question of|possibility of|in the differential|differential {includes/considerations include}",
        "suggestive of|suggesting|suggest|suggests|whether|presumably|with or without|unlikely to represent",
        "versus|vs|vs.|possibly {representing/related to}",
    ),
    "next": _phrases(
        "possible|possibly|probable|probably|likely|unlikely|may|might|perhaps|vague|questionable|question|equivocal",
        "potential|suspected|presumed|suspicious|indeterminate",
    ),
    "backward": _phrases(
        "{is/are/was/be} {possible/suspected/questioned/questionable/unlikely/equivocal/uncertain}|not ruled out",
        "{cannot/can not} be {entirely /completely /_}{excluded/ruled out}|should be considered|is a consideration",
        f"{{may/might}} not be {_SEEN}",
        "{is not/are not/not} {entirely /completely /_}excluded|{is/would be} difficult to exclude",
    ),
    "beside": _phrases("versus|vs|vs."),
}


class Phrases:
    """Finds, at a word, the longest phrase of a table that starts there; the time is that of the phrase's length.

    Args:
        table: label → phrases of lower-case words, parted by blanks. A phrase under two labels keeps both.
        normal: what is done to each word of a phrase; the words looked up have to be treated alike.
    """

    def __init__(self, table: Mapping[str, Iterable[str]], normal: Callable[[str], str] = str):
        self._root: dict = {}
        for label, phrases in table.items():
            for phrase in phrases:
                node = self._root
                for word in phrase.split():
                    node = node.setdefault(normal(word), {})
                labels = node.setdefault("", ())
                if label not in labels:
                    node[""] = (*labels, label)

    def at(self, words: list[str], start: int) -> tuple[tuple[str, ...], int]:
        """Return the labels of the longest phrase that starts at `start`, and where it ends; ((), start) for none."""
        node, found, end = self._root, (), start
        for k in range(start, len(words)):
            if words[k] not in node:
                break
            node = node[words[k]]
            if "" in node:
                found, end = node[""], k + 1
        return found, end


_NEGATING = Phrases(_NEGATION)
_DOUBTING = Phrases(_UNCERTAINTY)


def tokens(text: str) -> list[tuple[str, int, int]]:
    """Return lower-case words, punctuation and blank lines of a text, each with its start and end character."""
    return [(m[0].lower(), m.start(), m.end()) for m in _TOKEN.finditer(text)]


def is_sentence_end(word: str) -> bool:
    """Whether a token of `tokens` ends a sentence."""
    return word in _SENTENCE_END or word[0] == "\n"


def negated_spans(text: str) -> list[tuple[int, int]]:
    """Return the character spans of a text that stand inside a negation.

    "No pleural effusion or pneumothorax", "free of", "is not seen", "has resolved"; not "no change in", "not only",
    "cannot exclude". English only: text in another language has no spans.

    Args:
        text: a report, of any length.

    Returns:
        Sorted spans [start, end) that do not overlap, without the trigger itself: "no [effusion]".
    """
    return scopes(tokens(text), _NEGATING)


def uncertain_spans(text: str) -> list[tuple[int, int]]:
    """Return the character spans of a text that are said with doubt: "may represent […]", "[…] cannot be excluded".

    Args:
        text: a report, of any length.

    Returns:
        Sorted spans [start, end) that do not overlap. They may overlap negated ones.
    """
    return scopes(tokens(text), _DOUBTING)


def scopes(read: list[tuple[str, int, int]], triggers: Phrases) -> list[tuple[int, int]]:
    """Return the character spans that triggers cover; see `negated_spans`.

    Args:
        read: what `tokens` returns.
        triggers: phrases under the labels "forward" (scope behind it, to the clause's end), "next" (to the next comma
            or conjunction), "backward" (from the clause's start), "beside" (from the last comma), "stop" (a new
            clause) and "pseudo" (no trigger).
    """
    words = [word for word, _, _ in read]
    spans: list[tuple[int, int]] = []
    opened: int | None = None
    short = verb = False
    clause = item = i = 0

    def close(end: int) -> None:
        nonlocal opened
        if opened is not None and end > opened:
            spans.append((read[opened][1], read[end - 1][2]))
        opened = None

    while i < len(words):
        word = words[i]
        labels, end = triggers.at(words, i)
        if opened is not None and i - opened >= _MAX_SCOPE:
            close(i)
        if not labels:
            end = i + 1
            if is_sentence_end(word):
                close(i)
                clause, item, verb = end, end, False
            elif word in (",", "and", "or"):
                item = end if word == "," else item
                if short or (word != "or" and verb) or (word == "," and _clause_ahead(words, i)):
                    close(i)
                    short = False
                if verb and word != "or":
                    clause, verb = end, False
            elif word in _VERBS:
                verb = True
        elif "stop" in labels:
            close(i)
            clause, verb = end, labels == ("stop",) and words[end - 1] in _VERBS
        elif "pseudo" not in labels:
            if "backward" in labels or "beside" in labels:
                close(i)
                start = max(clause, item) if "beside" in labels else clause
                if i > start:
                    spans.append((read[start][1], read[i - 1][2]))
                clause = end
            if not {"forward", "next"}.isdisjoint(labels) and (opened is None or short):
                close(i)
                opened, short, verb = end, "next" in labels, False
        i = end
    close(len(words))
    return _merge(spans)


def _clause_ahead(words: list[str], comma: int) -> bool:
    """Whether a comma opens a new clause ("no effusion, the heart is large") and not the next item of a list."""
    if words[comma - 1] in _ADJECTIVES:
        return False
    for word in words[comma + 1 : comma + 7]:
        if word in (",", "or", "nor", "and") or is_sentence_end(word):
            return False
        if word in _VERBS:
            return True
    return False


def _merge(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
