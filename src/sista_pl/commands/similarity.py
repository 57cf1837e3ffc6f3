"""`sista data similarity`: what a report similarity is worth on a table of reports.

N reports, S their similarity.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sista_pl.commands.options import natural
from sista_pl.data.findings import KINDS, extract_findings, tagged_kinds
from sista_pl.data.similarity import EQUAL, SOURCES, fit_similarity
from sista_pl.errors import SistaError, did_you_mean

_HELP = """\
Report similarity decides which other reports of a batch count as positives or are no negatives (loss `sia`).
This prints, for each source, the offset that calibrates it, the share of identical reports, and the quantiles of S'.
With --tags it also compares with findings that people tagged: the area under the ROC curve of S for "these two reports
have the same tags", with and without pairs of two normal reports, and recall and precision of "S >= 0.999".

example:
  sista data similarity reports.csv --tags mesh --sources findings,tfidf --json similarity.json
"""
# Kept out of a table of tags: nobody tagged these reports.
_UNTAGGED = "No Indexing"
_NORMAL = "normal"


def main(argv: list[str]) -> int:
    """Run `sista data similarity` and return the exit code.

    Raises:
        SistaError: a file, column or source that is not there.
    """
    options = _parser().parse_args(argv)
    names = [name.strip() for name in options.sources.split(",") if name.strip()]
    for name in names:
        if name not in SOURCES:
            raise SistaError(f"unknown similarity source {name!r}; {did_you_mean(name, SOURCES)}")
    texts, tags = read_table(options.file, options.findings_column, options.impression_column, options.tags)
    distinct, train = np.unique(np.asarray(texts, dtype=object), return_inverse=True)
    result: dict[str, Any] = {"file": options.file.name, "reports": len(texts), "sources": {}}
    if tags is not None:
        result["findings"] = finding_agreement(texts, tags)
        result["equal_findings"] = equal_finding_agreement(texts, tags, options.seed)
    for name in names:
        spec = {"name": name, "model": options.model} if name == "frozen_text" else name
        similarity = fit_similarity(distinct.tolist(), train, spec, seed=options.seed)
        figures = similarity.report()
        if tags is not None:
            figures["tags"] = pair_agreement(similarity.vectors[train], tag_sets(tags), options.seed)
        result["sources"][name] = figures
    _show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sista data similarity", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE.csv", help="one report a row")
    parser.add_argument("--findings-column", default="findings", help="column of the findings (default: %(default)s)")
    parser.add_argument("--impression-column", default="impression", help="of the impression (default: %(default)s)")
    parser.add_argument(
        "--tags", help="column of tags as in the Indiana set: Opacity/lung/base|Cardiomegaly, or normal"
    )
    parser.add_argument("--sources", default="findings,tfidf", help="comma-separated (default: %(default)s)")
    parser.add_argument("--model", help="local folder or hub name of the encoder, for the source frozen_text")
    parser.add_argument("--seed", type=natural, default=0, help="of the SVD and of the samples (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all figures there too")
    return parser


def read_table(
    file: Path, findings: str = "findings", impression: str = "impression", tags: str | None = None
) -> tuple[list[str], list[str] | None]:
    """Return the texts of a table of reports, and their tags; rows without text or without tags are left out.

    Raises:
        SistaError: the file cannot be read, a column is missing, fewer than two reports are left.
    """
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise SistaError(f"{file}: no such file; give a CSV with one report a row") from None
    except (OSError, ValueError) as why:
        raise SistaError(f"{file}: cannot be read as CSV ({str(why).splitlines()[0]}); check the file") from None
    for column in (findings, impression, tags):
        if column is not None and column not in table:
            raise SistaError(f"{file}: no column {column!r}; {did_you_mean(column, table.columns)}")
    text = (table[findings].str.strip() + "\n\n" + table[impression].str.strip()).str.strip()
    keep = text != ""
    if tags is not None:
        keep &= (table[tags].str.strip() != "") & (table[tags] != _UNTAGGED)
    if keep.sum() < 2:
        raise SistaError(f"{file}: {keep.sum()} reports with text and tags; at least two are needed to compare")
    return text[keep].tolist(), None if tags is None else table.loc[keep, tags].tolist()


def tag_sets(tags: Sequence[str]) -> list[frozenset[str]]:
    """Return the headings of each report's tags, without qualifiers; the empty set for a normal report."""
    return [frozenset(tag.split("/")[0].strip() for tag in row.split("|")) - {_NORMAL} for row in tags]


def finding_agreement(texts: Sequence[str], tags: Sequence[str]) -> dict[str, dict[str, float]]:
    """Compare each finding that the text states as present with the tags.

    Returns:
        finding → tagged, found, precision, recall, f1, for findings that are tagged at least once; `all` is the
        micro-average over these.
    """
    wanted = [tagged_kinds(row) for row in tags]
    found = [_present(text) for text in texts]
    figures, total = {}, np.zeros(3)
    for kind in KINDS:
        both = sum(kind in w and kind in f for w, f in zip(wanted, found, strict=True))
        counts = np.array([sum(kind in w for w in wanted), sum(kind in f for f in found), both])
        if counts[0]:
            figures[kind] = _scores(*counts)
            total += counts
    return figures | {"all": _scores(*total)}


def _present(text: str) -> frozenset[str]:
    return frozenset(f.kind for f in extract_findings(text) if f.polarity == "present")


def _scores(tagged: float, found: float, both: float) -> dict[str, float]:
    return {
        "tagged": int(tagged),
        "found": int(found),
        "precision": float(both / found) if found else 0.0,
        "recall": float(both / tagged) if tagged else 0.0,
        "f1": float(2 * both / (tagged + found)) if tagged + found else 0.0,
    }


def pair_agreement(
    vectors: np.ndarray, sets: Sequence[frozenset[str]], seed: int = 0, limit: int = 5_000_000
) -> dict[str, float]:
    """Compare the similarity of two reports with whether they have the same set of findings.

    Args:
        vectors: (N, Ds) unit rows.
        sets: N sets of findings; the empty set is normal.
        seed: of the sample of pairs.
        limit: take that many pairs at random where there are more.

    Returns:
        pairs, equal_share, auroc, auroc_without_normal_pairs, and recall and precision of S >= 0.999. NaN where all
        pairs are equal, or none.
    """
    i, j = _pairs(len(vectors), limit, np.random.default_rng(seed))
    same, normal = _equal(sets, i, j)
    s = np.concatenate(
        [
            np.einsum("nd,nd->n", vectors[i[k : k + 100_000]], vectors[j[k : k + 100_000]])
            for k in range(0, len(i), 100_000)
        ]
    )
    return {
        "pairs": len(i),
        "equal_share": float(same.mean()),
        "auroc": _auroc(same, s),
        "auroc_without_normal_pairs": _auroc(same[~normal], s[~normal]),
        **_relation(same, s >= EQUAL),
    }


def equal_finding_agreement(
    texts: Sequence[str], tags: Sequence[str], seed: int = 0, limit: int = 5_000_000
) -> dict[str, float]:
    """Return recall and precision of "the texts state the same findings" for "the tags are the same", over pairs."""
    i, j = _pairs(len(texts), limit, np.random.default_rng(seed))
    same, _ = _equal(tag_sets(tags), i, j)
    return _relation(same, _equal([_present(text) for text in texts], i, j)[0])


def _pairs(n: int, limit: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    if n * (n - 1) // 2 <= limit:
        return np.triu_indices(n, 1)
    i = rng.integers(n, size=limit)
    return i, (i + 1 + rng.integers(n - 1, size=limit)) % n


def _equal(sets: Sequence[frozenset[str]], i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return whether each pair has the same set, and whether both are empty."""
    number: dict[frozenset[str], int] = {frozenset(): 0}
    ids = np.array([number.setdefault(s, len(number)) for s in sets])
    return ids[i] == ids[j], (ids[i] == 0) & (ids[j] == 0)


def _auroc(same: np.ndarray, s: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    # Rounded, since products that are equal but for the last bits would count as ranked.
    return float(roc_auc_score(same, s.round(5))) if 0 < same.sum() < len(same) else float("nan")


def _relation(same: np.ndarray, said: np.ndarray) -> dict[str, float]:
    hits = float((same & said).sum())
    return {"recall": hits / max(int(same.sum()), 1), "precision": hits / max(int(said.sum()), 1)}


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if "findings" in result:
        table = Table(
            "finding", "tagged", "found", "precision", "recall", "F1", title="findings of the text against tags"
        )
        for kind, figures in result["findings"].items():
            counts = [str(figures[key]) for key in ("tagged", "found")]
            table.add_row(kind, *counts, *(f"{figures[key]:.2f}" for key in ("precision", "recall", "f1")))
        console.print(table)
        equal = result["equal_findings"]
        console.print(
            f"pairs with equal findings in the text, for pairs with equal tags: recall {equal['recall']:.3f}, "
            f"precision {equal['precision']:.3f}"
        )
    table = Table("", *result["sources"], title=f"report similarity, {result['reports']} reports")
    for key, name in {
        "dimensions": "dimensions",
        "offset": "offset o",
        "repeated_images": "texts that recur",
        "identical_pairs": "pairs with identical text",
        "equal_semantics": f"pairs with S' >= {EQUAL}",
        "median": "median S'",
    }.items():
        table.add_row(name, *(_number(figures[key]) for figures in result["sources"].values()))
    if "findings" in result:
        for key, name in {
            "equal_share": "pairs with equal tags",
            "auroc": "AUROC of S for equal tags",
            "auroc_without_normal_pairs": "the same without normal pairs",
            "recall": f"recall of S >= {EQUAL}",
            "precision": f"precision of S >= {EQUAL}",
        }.items():
            table.add_row(name, *(_number(figures["tags"][key]) for figures in result["sources"].values()))
    console.print(table)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"
