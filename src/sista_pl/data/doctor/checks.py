"""Checks of a prepared store or a raw release: leaks, duplicates, masks, labels, reports, intensity.

N images; a row is an image's place in the table.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sista_pl.data.doctor.pixels import NEAR_CORRELATION, Scan, likeness, near_pairs, scan
from sista_pl.data.doctor.reports import texts
from sista_pl.data.doctor.subject import Check, Subject, share
from sista_pl.data.formats import SPLITS

# What the publishers say of a whole release: a figure is a count of images, studies, boxes, or of a label's positives.
PUBLISHED: dict[str, dict[str, int]] = {
    "mimic_cxr": {"images": 377_110, "studies": 227_827},
    "chexpert": {"images": 223_414 + 234},
    "rsna": {"images": 26_684, "Pneumonia": 6_012},
    "siim": {"images": 12_047, "Pneumothorax": 2_669},
    "covidx 9A": {"images": 30_130 + 400, "test": 400},
    "object_cxr": {"images": 8_000 + 1_000},
    "chestxray14": {"images": 112_120, "boxes": 984},
    "open_i": {"images": 7_470, "studies": 3_955},
}
# On 400 phantoms and 219 films of the public COVID set: of 619 one correlates with the median image by less than 0, of
# their negatives 95% by less than -0.28.
INVERTED = -0.2


def diagnose(
    subject: Subject, max_tokens: int = 112, count_tokens: Callable[[list[str]], list[int]] | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> list[Check]:  # fmt: skip
    """Run every check.

    Args:
        subject: of a store or a release.
        max_tokens: what a text encoder keeps of a report.
        count_tokens: texts → tokens of each; without it they are estimated from the words.
        advance: called with 1 after each image.
    """
    checks = [_counts(subject), _left_out(subject)]
    if subject.kind == "release":
        checks.append(_files(subject))
    checks += _cuts(subject)
    if len(subject.rows):
        seen = scan(subject, advance)
        checks += [_duplicates(subject, seen), _near(subject, seen), _intensity(subject, seen)]
        if subject.mask:
            checks += _masks(subject, seen)
    return [*checks, _boxes(subject), _labels(subject), *texts(subject, max_tokens, count_tokens)]


def _counts(subject: Subject) -> Check:
    table = subject.table
    counts = table["split"].value_counts()
    figures: dict[str, Any] = {
        "images": len(table), "studies": table["study_id"].nunique(), "patients": table["patient_id"].nunique(),
        "splits": {split: int(counts[split]) for split in SPLITS if split in counts},
    }  # fmt: skip
    told = f"{len(table):,} images, {figures['studies']:,} studies, {figures['patients']:,} patients ("
    told += ", ".join(f"{count:,} {split}" for split, count in figures["splits"].items()) + ")"
    known = PUBLISHED.get(subject.name) or PUBLISHED.get("covidx 9A" if "9A" in subject.version else "", {})
    if subject.phantom or not known:
        why = "a phantom, no comparison" if subject.phantom else "no published counts to compare with"
        return Check("counts", "ok", f"{told}; {why}", figures=figures)
    boxes = table["boxes"].dropna()
    here = {"boxes": sum(len(json.loads(text)) for text in boxes), **figures, **figures["splits"]}
    labels = [str(name) for name in table if str(name).startswith("label_")]
    here |= {name.removeprefix("label_"): int((table[name] == 1).sum()) for name in labels}
    other = [f"{here.get(name, 0):,} of {count:,} {name}" for name, count in known.items() if here.get(name) != count]
    figures["published"] = known
    if not other:
        return Check("counts", "ok", f"{told}; as published", figures=figures)
    step = "expected where options choose rows; else compare the download with its list of files"
    return Check("counts", "note", f"{told}; published differs: {', '.join(other)}", step, figures)


def reason(why: str) -> str:
    """Return why something was left out, without names, numbers and ids."""
    why = re.sub(r"'[^']*'|\"[^\"]*\"", "…", why.split(": ", 1)[-1] if ": " in why else why)
    return re.sub(r"\S*\d\S*|\S*/\S*", "#", why)[:120]


def _left_out(subject: Subject) -> Check:
    total = len(subject.table) + len(subject.skipped)
    reasons = Counter(reason(why) for _, why in subject.skipped)
    figures = {"left_out": len(subject.skipped), "of": total, "reasons": dict(reasons.most_common())}
    if not reasons:
        return Check("left out", "ok", "nothing was left out", figures=figures)
    text = f"{len(subject.skipped):,} left out ({share(len(subject.skipped), total)}): "
    text += "; ".join(f"{count:,} × {why}" for why, count in reasons.most_common(4))
    step = "see skipped.csv in the store" if subject.kind == "store" else "repair them, or download them again"
    return Check("left out", "warning" if len(subject.skipped) > 0.01 * total else "note", text, step, figures)


def _files(subject: Subject) -> Check:
    missing = empty = 0
    for file in subject.table["file"]:
        try:
            empty += Path(file).stat().st_size == 0
        except OSError:
            missing += 1
    figures = {"missing": missing, "empty": empty}
    if not missing and not empty:
        return Check("files", "ok", "every image file is there", figures=figures)
    lost = (missing + empty) / len(subject.table)
    text = f"{missing:,} image files are missing, {empty:,} are empty ({share(missing + empty, len(subject.table))})"
    step = "download them again; more than 1% stop a preparation"
    return Check("files", "problem" if lost > 0.01 else "warning", text, step, figures)


def _cuts(subject: Subject) -> list[Check]:
    """No patient, study or image may lie in two splits."""
    table, checks = subject.table, []
    column = "file" if subject.kind == "release" else "image_id"
    for name, key in (("patients", "patient_id"), ("studies", "study_id"), ("image files", column)):
        part = table[table[key] != ""]
        cut = part.groupby(key)["split"].nunique()
        names = cut.index[cut > 1]
        figures = {"groups": len(cut), "in_two_splits": len(names)}
        if not len(names):
            checks.append(Check(f"{name} in one split", "ok", f"each of {len(cut):,} lies in one split", "", figures))
            continue
        examples: list[tuple[list[int], str]] = []
        for group in names[:6]:
            rows = np.flatnonzero((table[key] == group).to_numpy())
            splits = table["split"].to_numpy()[rows]
            pair = [int(rows[0]), int(rows[np.flatnonzero(splits != splits[0])[0]])]
            examples.append((pair, " and ".join(map(str, table["split"].to_numpy()[pair]))))
        text = f"{len(names):,} of {len(cut):,} {name} in more than one split"
        step = "split by patient: choose another split, or correct the table's"
        checks.append(Check(f"{name} in one split", "problem", text, step, figures, examples))
    return checks


def _duplicates(subject: Subject, seen: Scan) -> Check:
    frame = pd.DataFrame({"digest": seen.digest, "split": subject.table["split"].to_numpy()[subject.rows]})
    frame["row"] = subject.rows
    frame = frame[~seen.flat]
    groups = frame[frame.duplicated("digest", keep=False)].groupby("digest", sort=False)
    examples, crossing = list[tuple[list[int], str]](), 0
    for across in (True, False):
        for _, group in groups:
            if (group["split"].nunique() > 1) == across:
                crossing += across
                if len(examples) < 6:
                    two = group.drop_duplicates("split") if across else group
                    examples.append((two["row"].tolist()[:2], " and ".join(two["split"].tolist()[:2])))
    extra = int(sum(len(group) - 1 for _, group in groups))
    figures = {"images": len(subject.rows), "groups": groups.ngroups, "copies": extra, "groups_across": crossing}
    of = "" if subject.kind == "store" else f" in a sample of {len(subject.rows):,}"
    if not groups.ngroups:
        return Check("exact duplicates", "ok", f"no two images have the same pixels{of}", figures=figures)
    text = f"{extra:,} images repeat the pixels of another{of} ({share(extra, len(subject.rows))})"
    if crossing:
        text += f", {crossing:,} groups across splits"
        return Check("exact duplicates", "problem", text, "put all copies in one split", figures, examples)
    return Check("exact duplicates", "warning", text, "keep one of each, or live with the weight", figures, examples)


def _near(subject: Subject, seen: Scan) -> Check:
    splits = pd.factorize(subject.table["split"])[0][subject.rows]
    places = np.flatnonzero(~seen.flat)
    pairs, distances, capped = near_pairs(seen.hash[places], splits[places])
    kept = []
    for (a, b), bits in zip(places[pairs].tolist(), distances.tolist(), strict=True):
        if seen.digest[a] == seen.digest[b]:
            continue
        rows = [int(subject.rows[a]), int(subject.rows[b])]
        alike = likeness(*(_cropped(subject, row) for row in rows))
        if alike >= NEAR_CORRELATION:
            names = subject.table["split"].to_numpy()[rows]
            kept.append((rows, f"{' and '.join(names)}: {bits} of 256 bits differ, correlation {alike:.2f}"))
    figures = {"pairs_across": len(kept), "candidates": len(pairs), "all_compared": not capped}
    if not kept:
        return Check("near-duplicates", "ok", "no near-identical images in two splits", figures=figures)
    images = len({row for rows, _ in kept for row in rows})
    text = f"{'at least ' if capped else ''}{len(kept):,} near-identical pair{'s' * (len(kept) > 1)} "
    text += f"of images in two splits ({images:,} images)"
    step = "look at the pairs; where they are one film, put them in one split"
    return Check("near-duplicates", "warning", text, step, figures, kept[:8])


def _cropped(subject: Subject, row: int) -> np.ndarray:
    left, top, right, bottom = subject.content(row)
    return np.ascontiguousarray(subject.image(row)[top:bottom, left:right])


def _intensity(subject: Subject, seen: Scan) -> Check:
    kinds: dict[str, np.ndarray] = {}
    left = np.ones(len(subject.rows), bool)
    for name, said in {
        "nearly black": seen.mean < 6,
        "nearly white": seen.mean > 249,
        "constant": seen.flat,
        "of a narrow range (maximum below 64)": seen.high < 64,
        "perhaps inverted": inverted(seen),
    }.items():
        kinds[name] = said & left
        left &= ~said
    counts = {name: int(said.sum()) for name, said in kinds.items()}
    figures = {"images": len(subject.rows), **counts, "mean": float(seen.mean.mean()), "std": float(seen.std.mean())}
    strange = sum(counts.values())
    if not strange:
        return Check("intensity", "ok", f"mean {figures['mean']:.0f}, no image is blank or inverted", figures=figures)
    examples = [([int(subject.rows[i])], name) for name, said in kinds.items() for i in np.flatnonzero(said)[:3]]
    text = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    step = "look at them; blank ones are best left out, inverted ones turned"
    level = "warning" if strange > 0.005 * len(subject.rows) else "note"
    return Check("intensity", level, f"{text} ({share(strange, len(subject.rows))})", step, figures, examples)


def inverted(seen: Scan) -> np.ndarray:
    """Return (N,) bool: images that look like the negative of the others, or the others where those are negatives."""
    known = np.flatnonzero(~seen.flat)
    if len(known) < 8:
        return np.zeros(len(seen.flat), bool)
    some = known[:: max(1, len(known) // 2_000)]
    median = np.median(seen.small[some], 0).reshape(16, 16)
    # the middle of a chest is brighter than the air around it
    if np.median(median[4:12, 4:12]) < np.median(np.concatenate([median[0], median[:, 0], median[:, -1]])) - 20:
        median = 255 - median
    film = seen.small - seen.small.mean(1, keepdims=True, dtype=np.float32)
    usual = (median - median.mean()).ravel().astype(np.float32)
    norm = np.linalg.norm(film, axis=1) * np.linalg.norm(usual)
    return film @ usual < INVERTED * norm


def _masks(subject: Subject, seen: Scan) -> list[Check]:
    split = subject.table["split"].to_numpy()[subject.rows]
    having = seen.mask_digest != b""
    total, empty, strange = int(having.sum()), int((having & (seen.mask_object == 0)).sum()), seen.mask_strange
    figures = {"masks": total, "empty": empty, "strange_values": int(strange.sum())}
    text = f"{total:,} masks, " + (
        f"{empty:,} of them empty ({share(empty, total)})" if empty else "none of them empty"
    )
    if strange.any():
        examples = [([int(row)], "other values than 0, 127, 255") for row in subject.rows[strange][:4]]
        text, step = f"{int(strange.sum()):,} masks have other values than 0, 127, 255; {text}", "write them anew"
        values = Check("masks", "problem", text, step, figures, examples)
    elif total and empty == total:
        values = Check("masks", "warning", f"{text}: nothing to segment", "check which value is the object", figures)
    else:
        values = Check("masks", "ok", text, figures=figures)
    frame = pd.DataFrame({"digest": seen.digest, "mask": seen.mask_digest, "split": split, "row": subject.rows})
    frame = frame[having & ~seen.flat]
    differing = frame.groupby("digest")["mask"].nunique()
    differing = differing[differing > 1].index
    leaks, examples = 0, list[tuple[list[int], str]]()
    for _, group in frame[frame["digest"].isin(differing)].groupby("digest", sort=False):
        leaks += group["split"].nunique() > 1
        two = group.drop_duplicates("mask")
        two = two.drop_duplicates("split") if two["split"].nunique() > 1 else two
        if len(examples) < 6:
            examples.append((two["row"].tolist()[:2], " and ".join(two["split"].tolist()[:2])))
    figures = {"images": len(differing), "across_splits": int(leaks)}
    if not len(differing):
        return [values, Check("one mask an image", "ok", "no image comes with two masks", figures=figures)]
    text = f"{len(differing):,} images come twice with different masks, {leaks:,} of them in two splits"
    step = "unite the masks of an image (SIIM-ACR: split siim/grouped, not siim/mgca-rows)"
    return [values, Check("one mask an image", "problem" if leaks else "warning", text, step, figures, examples)]


def _boxes(subject: Subject) -> Check:
    boxes = subject.table["boxes"].dropna()
    sized = set(subject.rows.tolist())
    total = outside = void = none = 0
    examples = list[tuple[list[int], str]]()
    for row, text in zip(boxes.index, boxes, strict=True):
        listed = json.loads(text)
        none += not listed
        for box in listed:
            total += 1
            place = np.array([box["x"], box["y"], box["w"], box["h"]], float)
            bad = not np.isfinite(place).all() or place[2] <= 0 or place[3] <= 0
            void += bad
            if row in sized and not bad:
                left, top, right, bottom = subject.content(row)
                # places are rounded to 1/100, the image to whole pixels
                over = [left - place[0], top - place[1], place[0] + place[2] - right, place[1] + place[3] - bottom]
                bad = max(over) > 1
                outside += bad
            if bad and len(examples) < 6 and row in sized:
                examples.append(([int(row)], "a box outside, or without area"))
    figures = {"images": len(boxes), "images_without": none, "boxes": total, "outside": outside, "no_area": void}
    if not len(boxes):
        return Check("boxes", "ok", "nobody looked for boxes", figures=figures)
    text = f"{total:,} boxes on {len(boxes):,} images, {none:,} of them without any"
    if outside or void:
        text = f"{outside:,} boxes leave their image, {void:,} have no area; {text}"
        return Check("boxes", "problem", text, "correct the table and prepare again", figures, examples)
    return Check("boxes", "ok", text, figures=figures)


def _labels(subject: Subject) -> Check:
    table = subject.table
    figures: dict[str, Any] = {}
    lacking = []
    names = [str(name) for name in table if str(name).startswith("label_")]
    splits = [split for split in SPLITS if (table["split"] == split).any()]
    for name in names:
        label = name.removeprefix("label_")
        figures[label] = {}
        for split in splits:
            values = table.loc[table["split"] == split, name]
            counts = {"present": int((values == 1).sum()), "absent": int((values == 0).sum())}
            figures[label][split] = counts | {"unknown": len(values) - sum(counts.values())}
        if any(counts["present"] + counts["absent"] for counts in figures[label].values()):
            for kind in ("present", "absent"):
                without = [split for split, counts in figures[label].items() if not counts[kind]]
                lacking += [f"{label} has no {kind} one in {', '.join(without)}"] if without else []
    if not names:
        return Check("labels", "ok", "no labels", figures=figures)
    cells = [counts for label in figures.values() for counts in label.values()]
    unknown = sum(counts["unknown"] for counts in cells)
    text = f"{len(names)} labels, {share(unknown, len(names) * len(table))} of the values unknown"
    if not lacking:
        return Check("labels", "ok", text, figures=figures)
    more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
    step = "AUROC is undefined there: leave the label out of the metrics, or choose another split"
    return Check("labels", "warning", f"{'; '.join(lacking[:3])}{more}; {text}", step, figures)
