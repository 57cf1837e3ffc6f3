"""The identity of a word, shared by the text encoders that emit it and the token losses that read it."""

from __future__ import annotations

import hashlib
from functools import lru_cache

# Function words and the boilerplate of reports: they stand in nearly every report and name nothing in the image.
STOP_WORDS = frozenset(
    """
    a about above after again all also am an and any are as at be been being below between both but by can could did
    do does doing down during each few for from further had has have having he her here hers him his how i if in into
    is it its just may me might more most must my no nor not now of off on once only or other our out over own per
    same she should so some such than that the their them then there these they this those through to too under until
    up upon very was we were what when where which while who whom why will with within without would you your
    appear appears appearance available chest clinical compared comparison compatible consistent correlate evaluation
    evidence examination exam film finding findings frontal history identified image images impression indication
    interval lateral likely noted note otherwise overall pa ap patient please possible possibly present prior
    probable probably radiograph radiographs recommend recommended reason report seen single stable study suggest
    suggested suggesting technique unchanged view views visible visualized x ray xray xxxx year old
    """.split()  # noqa: SIM905  a paragraph of words reads better than 160 lines
)


@lru_cache(maxsize=65536)
def word_id(word: str) -> int:
    """Return a positive 62-bit hash of the word, lower-cased: the same on every machine and in every run."""
    digest = hashlib.blake2b(word.lower().encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 2) or 1
