"""`sista data`: make, convert and look at data; needs neither torch nor Lightning."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from sista_pl.commands.options import natural

_EPILOG = """\
From nothing to a store, without any data of your own:
  sista data phantom --out raw/phantom --studies 500
  sista data prepare mimic_cxr --root raw/phantom --out stores/phantom
  sista data doctor stores/phantom

MIMIC-CXR-JPG, with mimic-cxr-reports.zip in or beside it:
  sista data prepare mimic_cxr --root physionet.org/files/mimic-cxr-jpg/2.1.0 --out stores/mimic --workers 8

Real reports with drawn films, from the tags of Open-i / IU X-ray (or of any CSV of findings, impression and MeSH):
  sista data phantom --layout open_i --reports indiana_reports.csv --out raw/mesh

Your own images and reports, one table of paths and texts:
  sista data prepare table --root studies.csv --out stores/ours \\
    --option columns.image=path --option columns.report=text --option columns.patient=patient
"""
_PREPARE_EPILOG = """\
A run that was stopped goes on where it was when the same command is given again.
An array job gives each task its part; the last to end makes the store, with the bytes of a single run:
  sista data prepare mimic_cxr --root raw --out stores/mimic --workers 8 --shard $SLURM_ARRAY_TASK_ID/16

Options of a reader are written KEY=VALUE, the value as YAML; the first of several values is the default:
  mimic_cxr    reports=PATH  views=[PA, AP]  labels=chexpert|negbio|none
               test_labels=same|radiologist  hold_out=FILE (its patients do not train; MS-CXR's)
  ms_cxr       table=FILE
  chexpert     split=chexpert/competition  uncertain=competition|unknown|ones|zeros  labels=all|competition
               views=[frontal]  blank=absent|unknown  test=valid|official
  rsna         split=rsna/mgca|rsna/gloria-cls
  siim         split=siim/grouped|siim/mgca-rows
  covidx       split=covidx/official  version=V9A (where several lie there)
  chestxray14  split=chestxray14/official|chestxray14/grouped
  object_cxr   split=object_cxr/official
  open_i       views=[frontal, ""] ("" is unknown)  split=open_i/grouped
  table        table=FILE  columns.image=COLUMN …  images=FOLDER  where.COLUMN=VALUE  require_report=true|false
               boxes=FILE  seed=0
Example:
  sista data prepare table --root data --out stores/ours --option table=studies.csv --option where.projection=frontal
"""


def main(argv: list[str]) -> int:
    """Run `sista data …`; `similarity` and `doctor` have parsers of their own.

    Raises:
        SistaError: a mistake of the user.
    """
    if argv[:1] == ["similarity"]:
        from sista_pl.commands.similarity import main as similarity

        return similarity(argv[1:])
    if argv[:1] == ["doctor"]:
        from sista_pl.commands.doctor import main as doctor

        return doctor(argv[1:])
    arguments = vars(_parser().parse_args(argv))
    arguments.pop("run")(**arguments)
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "sista data", description="Make, convert and look at data.", epilog=_EPILOG, formatter_class=raw
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    phantom = verbs.add_parser("phantom", help="draw chest X-rays with reports, in the layout of a real release")
    phantom.add_argument("--layout", default="mimic_cxr", help="name of the release's reader (default: %(default)s)")
    phantom.add_argument("--out", type=Path, required=True, help="folder to write")
    phantom.add_argument("--studies", type=int, help="number of studies (default: 500; with --reports all of them)")
    phantom.add_argument(
        "--reports", type=Path, metavar="FILE", help="take the words of real reports and draw what their MeSH tags say"
    )
    phantom.add_argument("--seed", type=natural, default=0, help="another seed, other studies (default: %(default)s)")
    phantom.add_argument("--size", type=int, default=256, help="side of the images in pixels (default: %(default)s)")
    phantom.add_argument("--contrast", type=float, default=1.0, help="factor on that of lesions, where films are small "
                         "(default: %(default)s)")  # fmt: skip
    phantom.add_argument("--workers", type=int, default=0, help="parallel workers (default: %(default)s)")
    phantom.set_defaults(run=_phantom)

    prepare = verbs.add_parser(
        "prepare", help="convert a raw release to a store, once", epilog=_PREPARE_EPILOG, formatter_class=raw
    )
    prepare.add_argument("name", metavar="NAME", help="the format: one of `sista list datasets`")
    prepare.add_argument("--root", type=Path, required=True, help="folder (or table) of the raw release")
    prepare.add_argument("--out", type=Path, required=True, help="folder of the store")
    prepare.add_argument("--size", type=int, default=256, help="side of the stored images (default: %(default)s)")
    prepare.add_argument("--workers", type=int, default=0, help="decoding threads (default: %(default)s)")
    prepare.add_argument(
        "--shard",
        type=_part,
        default=(0, 1),
        metavar="I/N",
        help="part I of N of the work, for an array job: 0/8 … 7/8",
    )
    prepare.add_argument(
        "--max-bad", type=float, default=0.01, help="share of unreadable images to live with (default: %(default)s)"
    )
    prepare.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", dest="options", help="an option of the reader"
    )
    prepare.set_defaults(run=_prepare)

    verbs.add_parser("similarity", help="how alike the reports of a store are (see its own --help)", add_help=False)

    verbs.add_parser("doctor", help="leaks, duplicates, masks, labels: what is wrong with a store", add_help=False)

    show = verbs.add_parser("show", help="counts, splits, texts and labels of a store")
    show.add_argument("store", type=Path, metavar="STORE", help="folder of the store")
    show.set_defaults(run=_show)
    return parser


def _phantom(
    layout: str, out: Path, studies: int | None, seed: int, size: int, workers: int, reports: Path | None,
    contrast: float,
) -> None:  # fmt: skip
    from sista_pl.data.phantom import read_real_reports, write_phantom

    real = None
    if reports is not None:
        real = read_real_reports(reports)
        studies = len(real.reports) if studies is None else studies
    studies = 500 if studies is None else studies
    write_phantom(layout, out, studies, seed, size, workers, reports=real, contrast=contrast)
    if real is not None:
        drawn, missing = real.coverage(studies)
        others = ", ".join(f"{name} {count}" for name, count in missing.most_common(5)) or "none"
        left_out = ", ".join(f"{count} {why}" for why, count in real.left_out.items()) or "none"
        print(
            f"PHANTOM DATA with the words of real reports, which keep their licence: {studies} of {len(real.reports)} "
            f"reports, left out {left_out}; {drawn} of {drawn + missing.total()} tags drawn, not drawn most: {others}"
        )
    print(f"{studies} phantom studies in {out}; next: sista data prepare {layout} --root {out} --out {out}-store")


def _part(text: str) -> tuple[int, int]:
    index, slash, parts = text.partition("/")
    if not (slash and index.isdecimal() and parts.isdecimal() and int(index) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part; the first of four is 0/4, the last 3/4")
    return int(index), int(parts)


def _prepare(
    name: str, root: Path, out: Path, size: int, workers: int, shard: tuple[int, int], max_bad: float,
    options: list[str],
) -> None:  # fmt: skip
    from sista_pl.commands.options import parse
    from sista_pl.data.formats import READERS
    from sista_pl.data.prepare import prepare_part

    release = READERS.build({"name": name, "root": root, **parse(options)})
    if release.phantom:
        print("PHANTOM DATA: drawn, not taken from patients")
    print(f"{release.version}: {len(release.rows)} images, {len(release.skipped)} left out")
    progress = sys.stderr.isatty()
    store = prepare_part(release, out, shard, size=size, workers=workers, max_bad=max_bad, progress=progress)
    if store is None:
        print(f"{out}: part {shard[0]} of {shard[1]} is done, others are missing; the last to end makes the store")
        return
    counts = ", ".join(f"{count} {split}" for split, count in store.info["counts"].items())
    print(f"{out}: {len(store)} images ({counts}), {store.info['skipped']} left out, listed in {out}/skipped.csv")


def _show(store: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from sista_pl.data.store import Store

    opened = Store.open(store)
    rows = opened.manifest
    gigabytes = sum(file["bytes"] for file in opened.contents["files"].values()) / 1e9
    console = Console()
    if opened.phantom:
        console.print("PHANTOM DATA: drawn, not taken from patients", style="bold")
    console.print(
        f"{store}: {opened.name} {opened.version}, {len(opened)} images of {opened.size} px, {gigabytes:.3g} GB"
    )
    console.print(f"left out {opened.info['skipped']}, written by {opened.info['created_by']}, hash {opened.hash[:12]}")

    splits = Table("split", "images", "studies", "patients", "texts", "distinct", "masks", "boxes")
    for split, part in [*((name, rows[rows["split"] == name]) for name in opened.info["counts"]), ("all", rows)]:
        text = part["findings"] + "\n" + part["impression"]
        written = text[text != "\n"]
        counts = [len(part), part["study_id"].nunique(), part["patient_id"].nunique()]
        counts += [len(written), written.nunique(), int(part["has_mask"].sum()), int(part["boxes"].notna().sum())]
        splits.add_row(split, *map(str, counts))
    console.print(splits)
    views = Counter(view or "unknown" for view in rows["view"])
    console.print("views: " + ", ".join(f"{view} {count}" for view, count in views.most_common()))

    labels = [name for name in rows.columns if name.startswith("label_")]
    if labels:
        table = Table("label", "present", "absent", "unknown", "prevalence where known")
        for name in labels:
            known = rows[name].dropna()
            share = f"{known.mean():.3f}" if len(known) else "-"
            present = int((known == 1).sum())
            table.add_row(
                name.removeprefix("label_"), *map(str, (present, len(known) - present, len(rows) - len(known))), share
            )
        console.print(table)
