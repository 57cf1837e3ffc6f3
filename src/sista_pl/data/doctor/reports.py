"""Checks of the reports: how many, how long, how often two say the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from sista_pl.data.doctor.subject import Check, Subject, share
from sista_pl.data.findings import extract_findings
from sista_pl.data.formats import SPLITS

BATCHES = (32, 144, 512)
_TOKENS_A_WORD = 1.3


def texts(subject: Subject, max_tokens: int, count_tokens: Callable[[list[str]], list[int]] | None) -> list[Check]:
    table = subject.table
    text = (table["impression"].fillna("") + " " + table["findings"].fillna("")).str.strip()
    written = text != ""
    figures: dict[str, Any] = {
        split: {
            "images": int((table["split"] == split).sum()),
            "with_report": int(written[table["split"] == split].sum()),
        }
        for split in SPLITS
        if (table["split"] == split).any()
    }
    if not written.any():
        why = "no image has a report: for tasks with labels, not for image-report pre-training"
        return [Check("reports", "ok", why, figures=figures)]
    told = f"{share(written.sum(), len(table))} of the images have a report"
    level = "ok" if written.all() else "note"
    step = "" if written.all() else "images without one are left out of image-report pre-training"
    checks = [Check("reports", level, told, step, figures)]

    reports = table.assign(text=text)[written].drop_duplicates(["study_id", "text"])
    words = np.array([len(report.split()) for report in reports["text"]])
    how = "counted" if count_tokens else "estimate: 1.3 a word"
    tokens = np.array(count_tokens(reports["text"].tolist()) if count_tokens else words * _TOKENS_A_WORD + 2)
    long = int((tokens > max_tokens).sum())
    histogram, edges = np.histogram(words, bins=24, range=(0, max(24, float(np.quantile(words, 0.995)))))
    figures = {
        "reports": len(reports), "words_median": float(np.median(words)), "words_p95": float(np.quantile(words, 0.95)),
        "max_tokens": max_tokens, "truncated": long, "tokens": how,
        "histogram": {"counts": histogram.tolist(), "edges": edges.round(1).tolist()},
    }  # fmt: skip
    told = f"{figures['words_median']:.0f} words (95%: {figures['words_p95']:.0f}), {share(long, len(reports))} longer "
    told += f"than {max_tokens} tokens ({how})"
    if long > 0.1 * len(reports):
        checks.append(Check("length of reports", "warning", told, "raise the token limit of the text encoder", figures))
    else:
        checks.append(Check("length of reports", "ok", told, figures=figures))
    return [*checks, _repeats(table, text, written)]


def _repeats(table: pd.DataFrame, text: pd.Series, written: pd.Series) -> Check:
    """How often two reports of the training split say the same, and what that means for a batch."""
    train = (table["split"] == "train") & written
    if train.sum() < 2:
        return Check("reports that say the same", "ok", "fewer than two training reports")
    ids, distinct = pd.factorize(text[train])
    normal = [" ".join(re.findall(r"\w+", report.lower())) for report in distinct]
    found = [extract_findings(report) for report in distinct]
    stated = [
        tuple(sorted({(f.kind, f.polarity, f.side or "", f.zone or "") for f in all_ if f.polarity != "absent"}))
        for all_ in found
    ]
    read = float(np.mean([bool(found[i]) for i in ids]))
    studies = table.loc[train, "study_id"].to_numpy()
    figures: dict[str, Any] = {"pairs": int(train.sum()), "reports_with_a_finding_named": read, "groups": {}}
    for name, keys in (("equal_text", normal), ("equal_findings", stated)):
        group = pd.Series(pd.Series(keys, dtype=object).map({key: n for n, key in enumerate(dict.fromkeys(keys))}))
        each = group.to_numpy()[ids]
        sizes = np.bincount(pd.DataFrame({"s": studies, "g": each}).drop_duplicates("s")["g"])
        pairs = np.bincount(each).astype(float)
        equal = float((pairs * (pairs - 1)).sum() / (len(each) * (len(each) - 1)))
        figures["groups"][name] = {
            "share_of_studies": float(sizes[sizes > 1].sum() / sizes.sum()),
            "expected_false_negatives": {str(b): (b - 1) * equal if b <= len(each) else None for b in BATCHES},
        }
    same, like = figures["groups"]["equal_text"], figures["groups"]["equal_findings"]
    told = f"{same['share_of_studies']:.1%} of the training reports repeat another's words, "
    if read < 0.5:
        told += f"findings are named in {read:.0%} only"
        return Check("reports that say the same", "note", told, "the rules for findings read English", figures)
    told += f"{like['share_of_studies']:.1%} its findings"
    known = {b: n for b, n in like["expected_false_negatives"].items() if n is not None}
    if known:
        told += "; false negatives of an anchor in a batch: " + ", ".join(f"{n:.1f} of {b}" for b, n in known.items())
    if known and max(known.values()) >= 1:
        step = "a loss that takes them for negatives is misled: use `sia`, or a smaller batch"
        return Check("reports that say the same", "note", told, step, figures)
    return Check("reports that say the same", "ok", told, figures=figures)
