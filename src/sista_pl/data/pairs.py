"""Image-report pairs: which reports are equal, how alike the others are, and what labels say of them.

B pairs, K labels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sista_pl.data.formats import read_csv
from sista_pl.data.labels import read_labels
from sista_pl.data.module import BaseDataModule, StoreDataset
from sista_pl.data.reports import NORMALISE
from sista_pl.data.similarity import Similarity, fit_similarity
from sista_pl.errors import SistaError, did_you_mean


class PairDataset(StoreDataset):
    """Images with the id of their report's text, and their labels; equal texts share an id."""

    report_ids: np.ndarray
    labels: np.ndarray | None = None

    def samples(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        found = {"report": torch.from_numpy(self.report_ids[rows])}
        return found if self.labels is None else found | {"labels": torch.from_numpy(self.labels[rows])}


class PairDataModule(BaseDataModule):
    """Image-report pairs from a prepared store; pairs without a text are left out.

    The report is its impression followed by its findings, as MGCA has it.

    Args:
        similarity: source of the report similarities, `findings`, `tfidf`, `{name: frozen_text, model: folder}`, or
            null for none; fitted on the training reports, once, and kept beside the store.
        calibration: `center` (unrelated reports have similarity 0) or `none`.
        tokenizer_corpus: a CSV of more reports (columns `findings`, `impression`, or `report`) that a tokenizer
            trained from scratch should see as well.
        text: `{normalize: unicode}` leaves every character as it is; `{normalize: mgca}` repeats the reference's ASCII
            lower-casing, which drops what other languages write with.
        labels: label columns of the store, as in `[Edema, Pneumonia]`, that a batch brings as `labels` (B, K) 1, 0 or
            NaN = unknown, for losses such as `medclip`; none by default. No pair is left out for its labels.
        shuffled_reports: a negative control, not for use: each training image gets the report of another one, its
            labels with it. Validation and test keep their own.
        kwargs: see `BaseDataModule`.
    """

    dataset_class = PairDataset
    least_batch = 2  # a contrast is one with another

    def __init__(
        self,
        store: str | Path,
        similarity: str | dict[str, Any] | None = "findings",
        calibration: str = "center",
        tokenizer_corpus: str | Path | None = None,
        text: dict[str, str] | None = None,
        labels: list[str] | None = None,
        shuffled_reports: bool = False,
        **kwargs: Any,
    ):
        super().__init__(store, **kwargs)
        self.similarity_spec, self.calibration = similarity, calibration
        self.tokenizer_corpus = tokenizer_corpus
        for key in text or {}:
            if key != "normalize":
                raise SistaError(f"data: text has no key {key!r}; {did_you_mean(key, ['normalize'])}")
        name = (text or {}).get("normalize", "unicode")
        if name not in NORMALISE:
            raise SistaError(f"data: text.normalize is {name!r}; {did_you_mean(str(name), NORMALISE)}")
        self.normalise = NORMALISE[name]
        self.reports: list[str] = []
        self.report_ids = np.zeros(0, np.int64)
        self.similarity: Similarity | None = None
        self.wanted_labels, self.shuffled_reports = labels or [], shuffled_reports
        self.labels: np.ndarray | None = None  # (rows of the store, K) float32

    def setup(self, stage: str) -> None:
        if self.store is not None:
            return
        super().setup(stage)
        train = self.report_ids[self.rows["train"]]
        if self.similarity_spec is not None and len(train):
            cache = self.store_path.parent / "similarity"
            self.similarity = fit_similarity(
                self.reports, train, self.similarity_spec, self.calibration, cache=cache
            )  # fmt: skip

    def split(self) -> dict[str, np.ndarray]:
        manifest = self.store.manifest
        texts = (manifest["impression"].fillna("") + " " + manifest["findings"].fillna("")).str.strip()
        texts = texts.map({text: self.normalise(text) for text in texts.unique()})
        ids, distinct = pd.factorize(texts)
        self.report_ids, self.reports = ids.astype(np.int64), [str(text) for text in distinct]
        if self.wanted_labels:
            self.labels = read_labels(self.store, self.wanted_labels)
        present = (texts != "").to_numpy()
        found = {name: rows[present[rows]] for name, rows in super().split().items()}
        if self.shuffled_reports:
            # a ring in random order: nobody keeps the own one
            ring, given = np.random.default_rng(0).permutation(found["train"]), np.arange(len(texts))
            given[ring] = np.roll(ring, 1)
            self.report_ids = self.report_ids[given]
            self.labels = self.labels[given] if self.labels is not None else None
        return found

    def corpus(self) -> list[str]:
        """Return the texts that a tokenizer may be trained on: training reports, and `tokenizer_corpus`."""
        texts = [self.reports[i] for i in np.unique(self.report_ids[self.rows["train"]])]
        if self.tokenizer_corpus is not None:
            texts += filter(None, map(self.normalise, _read_corpus(Path(self.tokenizer_corpus))))
        return texts

    def _loader(self, split: str, train: bool):
        loader = super()._loader(split, train)
        loader.dataset.report_ids, loader.dataset.labels = self.report_ids, self.labels
        return loader


def _read_corpus(path: Path) -> list[str]:
    if not path.is_file():
        raise SistaError(f"data: tokenizer_corpus {path} does not exist; give a CSV of reports, or leave it out")
    table = read_csv(path)
    columns = [c for c in ("report", "impression", "findings") if c in table]
    if not columns:
        raise SistaError(f"data: {path} has no column of reports; {did_you_mean('findings', table.columns)}")
    return [text for text in table[columns].agg(" ".join, axis=1).str.strip() if text]
