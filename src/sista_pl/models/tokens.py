"""Reports as tokens, computed once: a flat table from which batches are cut.

N reports, B of them in a batch, T sub-word tokens, L words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from sista_pl.data.negation import negated_spans
from sista_pl.words import word_id


@dataclass(frozen=True)
class TokenTable:
    """Tokens of N reports, end to end.

    Args:
        tokens: (ΣT,) int32 sub-word ids.
        place: (ΣT,) int32 index of the token's word in its report, -1 for special tokens and punctuation.
        words: (ΣL,) int64 word identities, negative inside a negation.
        token_start: (N + 1,) where each report's tokens begin.
        word_start: (N + 1,) where each report's words begin.
        truncated: number of reports that were cut at the token limit.
    """

    tokens: np.ndarray
    place: np.ndarray
    words: np.ndarray
    token_start: np.ndarray
    word_start: np.ndarray
    truncated: int

    def __len__(self) -> int:
        return len(self.token_start) - 1

    def batch(self, reports: Sequence[int]) -> dict[str, Tensor]:
        """Pad the given reports to the longest among them.

        Returns:
            `input_ids`, `attention_mask`, `word_index` (B, T) and `word_ids` (B, L), int64, as `TextEncoder.forward`
            takes them.
        """
        lengths = [int(self.token_start[r + 1] - self.token_start[r]) for r in reports]
        counts = [int(self.word_start[r + 1] - self.word_start[r]) for r in reports]
        shape = (len(reports), max(lengths, default=0))
        ids, mask, index = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
        words = np.zeros((len(reports), max(1, *counts, 1)), np.int64)
        for row, report in enumerate(reports):
            start, n = self.token_start[report], lengths[row]
            ids[row, :n] = self.tokens[start : start + n]
            index[row, :n] = self.place[start : start + n]
            mask[row, :n] = 1
            start, n = self.word_start[report], counts[row]
            words[row, :n] = self.words[start : start + n]
        arrays = {"input_ids": ids, "attention_mask": mask, "word_index": index, "word_ids": words}
        return {k: torch.from_numpy(v) for k, v in arrays.items()}


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> TokenTable:
    """Tokenize with word identities and negation.

    Args:
        tokenizer: a fast tokenizer; its padding and truncation settings are overridden.
        texts: N reports.
        max_tokens: longest report, special tokens included.
    """
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    tokens, place, words = [], [], []
    token_start, word_start = [0], [0]
    truncated = 0
    for begin in range(0, len(texts), 4096):
        chunk = list(texts[begin : begin + 4096])
        for text, encoding in zip(chunk, tokenizer.encode_batch(chunk), strict=True):
            truncated += bool(encoding.overflowing)
            index, identities, _ = _words(text, encoding)
            tokens += encoding.ids
            place += index
            words += identities
            token_start.append(len(tokens))
            word_start.append(len(words))
    return TokenTable(
        np.array(tokens, np.int32), np.array(place, np.int32), np.array(words, np.int64),
        np.array(token_start, np.int64), np.array(word_start, np.int64), truncated,
    )  # fmt: skip


def surfaces(tokenizer: Tokenizer, text: str) -> list[str]:
    """Return the words of a report as written, in the order of a `TokenTable`'s words."""
    return _words(text, tokenizer.encode(text))[2]


def _words(text: str, encoding) -> tuple[list[int], list[int], list[str]]:
    """Return each token's word index, each word's signed identity, and the words; punctuation is no word."""
    spans: dict[int, tuple[int, int]] = {}
    for word, (start, end) in zip(encoding.word_ids, encoding.offsets, strict=True):
        if word is not None:
            first, last = spans.get(word, (start, end))
            spans[word] = (min(first, start), max(last, end))
    negated = negated_spans(text)
    order: dict[int, int] = {}
    identities: list[int] = []
    written: list[str] = []
    for word, (start, end) in spans.items():
        surface = text[start:end].strip()
        if not any(c.isalnum() for c in surface):
            continue
        order[word] = len(identities)
        written.append(surface)
        inside = any(a <= start < b for a, b in negated)
        identities.append(-word_id(surface) if inside else word_id(surface))
    index = [-1 if word is None else order.get(word, -1) for word in encoding.word_ids]
    return index, identities, written
