"""Checks of a prepared store or a raw release: leaks, duplicates, masks, labels, reports, intensity.

N images; a row is an image's place in the table.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from sista_pl.data.findings import extract_findings
from sista_pl.data.formats import SPLITS, Release
from sista_pl.data.images import IGNORE, BadImage, fit, fit_box, fit_mask, image_size, read_gray, read_mask
from sista_pl.data.masks import Rle
from sista_pl.data.store import Store

LEVELS = ("ok", "note", "warning", "problem")
BATCHES = (32, 144, 512)
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
# Measured on 400 phantoms and 219 films of the public COVID set: a film written again as JPEG of quality 30, at two
# thirds of its size, or with another contrast differs in 4 to 28 of the 256 bits (median 4 to 16) and its details
# correlate by 0.87 at least; of two films, the nearest differ in 40 and correlate by 0.76. A crop of 3% is not found.
NEAR_BITS = 30
NEAR_CORRELATION = 0.85
# The same films: of 619 one correlates with the median image by less than 0, of their negatives 95% by less than -0.28.
INVERTED = -0.2
_WINDOW = 2_000
_CANDIDATES = 20_000
_TOKENS_A_WORD = 1.3
_PIXELS = 256
# Bits of a byte; numpy counts them itself from 2.0 on.
_ONES = np.array([number.bit_count() for number in range(256)], np.uint8)


@dataclass
class Check:
    """What one check says.

    Args:
        name: of the check.
        level: one of `LEVELS`.
        text: one line.
        step: what to do next; "" where nothing.
        figures: all numbers, for `doctor.json`.
        examples: (rows that stand side by side, what is wrong with them).
    """

    name: str
    level: str
    text: str
    step: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    examples: list[tuple[list[int], str]] = field(default_factory=list)


@dataclass
class Subject:
    """What is examined.

    Args:
        kind: "store" or "release".
        table: (N) the columns of a store's manifest; `file`, the path of the image, where `kind` is "release".
        rows: of the table, those with pixels.
        image: row → (size, size) uint8.
        mask: row → the same, or None where no image has a mask.
        size: side of the squares in pixels.
        skipped: what the reader or the preparation left out, and why.
        key: of the hash that stands for an image's id.
    """

    kind: str
    name: str
    version: str
    split: str
    phantom: bool
    options: dict[str, Any]
    table: pd.DataFrame
    rows: np.ndarray
    image: Callable[[int], np.ndarray]
    mask: Callable[[int], np.ndarray] | None
    size: int
    skipped: list[tuple[str, str]]
    key: str

    @classmethod
    def of_store(cls, store: Store) -> Subject:
        with (store.path / "skipped.csv").open(encoding="utf-8", newline="") as file:
            skipped = [(row[0], row[1]) for row in list(csv.reader(file))[1:]]
        info = store.info
        return cls(
            "store", store.name, store.version, info["split"]["name"], store.phantom, info["options"], store.manifest,
            np.arange(len(store)), store.image, store.mask if store.has_masks else None, store.size, skipped,
            store.hash,
        )  # fmt: skip

    @classmethod
    def of_release(cls, release: Release, pixels: int = 0, seed: int = 0) -> Subject:
        """Look at a reader's rows, and at the pixels of `pixels` images drawn at random."""
        names = ("image_id", "patient_id", "study_id", "view", "split", "findings", "impression", "source")
        columns: dict[str, Any] = {name: [getattr(row, name) for row in release.rows] for name in names}
        for label in dict.fromkeys(label for row in release.rows for label in row.labels):
            columns[f"label_{label}"] = np.array([row.labels.get(label, np.nan) for row in release.rows], np.float32)
        columns["has_mask"] = np.array([row.mask is not None for row in release.rows], bool)
        columns["boxes"] = [None if row.boxes is None else json.dumps(row.boxes) for row in release.rows]
        columns["file"] = [str(row.image) for row in release.rows]
        table = pd.DataFrame(columns)
        skipped = list(release.skipped)
        images, masks = {}, {}
        order = np.random.default_rng(seed).permutation(len(table))[:pixels]
        sizes = np.zeros((2, len(table)), np.int32)
        for index in sorted(order.tolist()):
            row = release.rows[index]
            try:
                image, (width, height) = read_gray(row.image, _PIXELS), image_size(row.image)
                mask = np.full((_PIXELS, _PIXELS), IGNORE, np.uint8)
                if isinstance(row.mask, Rle):
                    mask = fit_mask(row.mask.decode(), _PIXELS)
                elif row.mask is not None:
                    mask = read_mask(row.mask, _PIXELS)
                if row.boxes is not None:
                    boxes = [fit_box(box, width, height, _PIXELS) for box in row.boxes]
                    table.loc[index, "boxes"] = json.dumps(boxes)
            except BadImage as why:
                skipped.append((row.image_id, str(why)))
                continue
            images[index], masks[index], sizes[:, index] = image, mask, (width, height)
        table["width"], table["height"] = sizes
        return cls(
            "release", release.name, release.version, release.split, release.phantom, release.options, table,
            np.array(sorted(images), int), images.__getitem__,
            masks.__getitem__ if table["has_mask"].any() else None, _PIXELS, skipped, release.name,
        )  # fmt: skip

    def content(self, row: int) -> tuple[int, int, int, int]:
        """Return left, top, right, bottom of the image in its square; the rest is padding."""
        width, height = (int(self.table[name].to_numpy()[row]) for name in ("width", "height"))
        scale, dx, dy = fit(width, height, self.size)
        right, bottom = dx + max(1, round(width * scale)), dy + max(1, round(height * scale))
        return dx, dy, min(self.size, right), min(self.size, bottom)


@dataclass
class Scan:
    """What one pass over the pixels keeps; arrays are over `Subject.rows`."""

    digest: np.ndarray  # of the pixels
    hash: np.ndarray  # (N, 4) uint64, perceptual
    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    small: np.ndarray  # (N, 256) means of 16 × 16 fields
    mask_digest: np.ndarray  # "" without a mask
    mask_object: np.ndarray  # pixels
    mask_strange: np.ndarray  # values other than 0, 127, 255

    @property
    def flat(self) -> np.ndarray:
        """Images without content: they are alike, and no duplicates."""
        return (self.std < 3) | (self.high.astype(int) - self.low < 8)


def scan(subject: Subject, advance: Callable[[int], None] = lambda n: None) -> Scan:
    """Read every image and mask once."""
    rows = subject.rows
    n = len(rows)
    found = Scan(
        digest=np.zeros(n, "S16"), hash=np.zeros((n, 4), np.uint64), low=np.zeros(n, np.uint8),
        high=np.zeros(n, np.uint8), mean=np.zeros(n, np.float32), std=np.zeros(n, np.float32),
        small=np.zeros((n, 256), np.uint8), mask_digest=np.zeros(n, "S16"), mask_object=np.zeros(n, int),
        mask_strange=np.zeros(n, bool),
    )  # fmt: skip
    has_mask = subject.table["has_mask"].to_numpy(bool)
    for i, row in enumerate(rows.tolist()):
        square = subject.image(row)
        left, top, right, bottom = subject.content(row)
        image = np.ascontiguousarray(square[top:bottom, left:right])
        found.digest[i] = _hex(square)
        found.hash[i] = perceptual_hash(image)
        found.small[i] = _resized(image, 16).ravel()
        found.low[i], found.high[i] = image.min(), image.max()
        found.mean[i], found.std[i] = image.mean(), image.std()
        if subject.mask and has_mask[row]:
            mask = subject.mask(row)
            found.mask_digest[i] = _hex(mask)
            found.mask_object[i] = np.count_nonzero(mask == 255)
            found.mask_strange[i] = not np.isin(mask, (0, IGNORE, 255)).all()
        advance(1)
    return found


def _hex(array: np.ndarray) -> bytes:
    return hashlib.blake2b(array.data, digest_size=8).hexdigest().encode()


def _resized(image: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX), np.float32)


_DCT = np.cos(np.pi / 32 * np.outer(np.arange(16), np.arange(32) + 0.5)).astype(np.float32)
# Neighbouring frequencies say alike things: each band of 16 bits gets some of all.
_MIXED = np.random.default_rng(0).permutation(256)


def perceptual_hash(image: np.ndarray) -> np.ndarray:
    """Return (4,) uint64: which of the 16 × 16 lowest frequencies (DCT of 32 × 32 means) are above their median."""
    spectrum = (_DCT @ _resized(image, 32) @ _DCT.T).ravel()
    spectrum[0] = np.median(spectrum[1:])
    return np.packbits((spectrum > spectrum[0])[_MIXED]).view(np.uint64)


def near_pairs(hashes: np.ndarray, group: np.ndarray, bits: int = NEAR_BITS) -> tuple[np.ndarray, np.ndarray, bool]:
    """Find pairs of near hashes of different groups without comparing all pairs.

    Only rows that agree in one of 16 bands of 16 bits are compared: of the pairs that differ in fewer than 16 bits all,
    in 20 bits 99%, in 30 bits 90%.

    Args:
        hashes: (N, 4) uint64.
        group: (N) the split of each.
        bits: greatest distance.

    Returns:
        pairs (M, 2), nearest first, their distances (M), and whether bands were so common that not all were compared.
    """
    bands, best, capped = hashes.view(np.uint16), dict[tuple[int, int], int](), False
    for band in bands.T:
        order = np.lexsort((*hashes.T, band))
        ranked = band[order]
        alive = np.arange(len(order))
        for step in range(1, _WINDOW):
            alive = alive[alive + step < len(order)]
            alive = alive[ranked[alive] == ranked[alive + step]]
            if not len(alive):
                break
            i, j = order[alive], order[alive + step]
            across = group[i] != group[j]
            i, j = i[across], j[across]
            distance = _ONES[(hashes[i] ^ hashes[j]).view(np.uint8)].sum(1)
            for a, b, d in zip(*(v[distance <= bits].tolist() for v in (i, j, distance)), strict=True):
                best[min(a, b), max(a, b)] = d
        else:
            capped = True
    ordered = sorted(best, key=lambda pair: (best[pair], pair))[:_CANDIDATES]
    pairs = np.array(ordered, int).reshape(-1, 2)
    return pairs, np.array([best[pair] for pair in ordered], int), capped or len(best) > _CANDIDATES


def likeness(first: np.ndarray, second: np.ndarray) -> float:
    """Return the correlation of the details of two images: 64 × 64 means, less their surroundings."""
    details = []
    for image in (first, second):
        small = _resized(image, 64)
        blurred = np.asarray(Image.fromarray(_resized(image, 8)).resize((64, 64), Image.Resampling.BICUBIC))
        details.append((small - blurred).ravel())
    a, b = (detail - detail.mean() for detail in details)
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm else 0.0


# --- the checks ----------------------------------------------------------------


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
    return [*checks, _boxes(subject), _labels(subject), *_texts(subject, max_tokens, count_tokens)]


def _share(part: float, whole: float) -> str:
    share = part / whole if whole else 0.0
    return f"{share:.1%}" if share >= 0.001 or not part else "< 0.1%"


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
    here |= {name.removeprefix("label_"): int((table[name] == 1).sum()) for name in table if name.startswith("label_")}
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
    text = f"{len(subject.skipped):,} left out ({_share(len(subject.skipped), total)}): "
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
    share = (missing + empty) / len(subject.table)
    text = f"{missing:,} image files are missing, {empty:,} are empty ({_share(missing + empty, len(subject.table))})"
    step = "download them again; more than 1% stop a preparation"
    return Check("files", "problem" if share > 0.01 else "warning", text, step, figures)


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
    text = f"{extra:,} images repeat the pixels of another{of} ({_share(extra, len(subject.rows))})"
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
    return Check("intensity", level, f"{text} ({_share(strange, len(subject.rows))})", step, figures, examples)


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
        f"{empty:,} of them empty ({_share(empty, total)})" if empty else "none of them empty"
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
    names = [name for name in table if name.startswith("label_")]
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
    text = f"{len(names)} labels, {_share(unknown, len(names) * len(table))} of the values unknown"
    if not lacking:
        return Check("labels", "ok", text, figures=figures)
    more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
    step = "AUROC is undefined there: leave the label out of the metrics, or choose another split"
    return Check("labels", "warning", f"{'; '.join(lacking[:3])}{more}; {text}", step, figures)


def _texts(subject: Subject, max_tokens: int, count_tokens: Callable[[list[str]], list[int]] | None) -> list[Check]:
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
    told = f"{_share(written.sum(), len(table))} of the images have a report"
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
    told = (
        f"{figures['words_median']:.0f} words (95%: {figures['words_p95']:.0f}), {_share(long, len(reports))} longer "
    )
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


def worst(checks: Sequence[Check]) -> str:
    """Return the highest level."""
    return max((check.level for check in checks), key=LEVELS.index, default="ok")
