"""Whom a phantom draws, and how its folder is made: every layout of a release gets the same patients and films."""

from __future__ import annotations

import hashlib
import inspect
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sista_pl.allocator import keep_memory
from sista_pl.data.formats.open_i import TaggedReport
from sista_pl.data.masks import encode_rle
from sista_pl.data.phantom import knobs
from sista_pl.data.phantom.film import Rendering, render
from sista_pl.data.phantom.mesh import findings_from_mesh
from sista_pl.data.phantom.objects import Shape, draw_objects, outline, put_objects
from sista_pl.data.phantom.real import RealReports, read_real_reports, real_document, study_from_mesh
from sista_pl.data.phantom.report import Report, document, stated, write_report
from sista_pl.data.phantom.study import Study, draw_patient, draw_study, with_share
from sista_pl.errors import SistaError, unwritable
from sista_pl.registry import Registry

PHANTOM_VERSION = "1.3"
NOTICE = "PHANTOM DATA: drawn by a program, no patient"
REAL_NOTICE = "PHANTOM DATA: films drawn by a program, no patient's; the reports are real ones"
# Patient-disjoint and even from the first patients on: the golden ratio spreads patients over [0, 1).
_SPLITS = (("train", 0.76), ("validate", 0.91), ("test", 1.0))
_STUDIES_A_PATIENT = (0.45, 0.27, 0.17, 0.11)
LAYOUTS = Registry("phantom layout")


def generator_hash(layout: Layout | None = None) -> str:
    """SHA-256 over the version, the source files of this package and that of the layout."""
    digest = hashlib.sha256(PHANTOM_VERSION.encode())
    files = sorted(Path(__file__).parent.glob("*.py"))
    if layout is not None:
        files.append(Path(inspect.getfile(layout.write_study)))
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Plan:
    """Which study is drawn: all else follows from the seed and these two numbers."""

    patient: int
    study: int

    @property
    def subject_id(self) -> int:
        return 10_000_000 + (self.patient * 6_180_339 + 32) % 10_000_000

    @property
    def study_id(self) -> int:
        return 50_000_000 + ((4 * self.patient + self.study) * 4_142_137 + 414_267) % 10_000_000

    @property
    def split(self) -> str:
        u = (self.patient + 0.5) * 0.6180339887498949 % 1
        return next(name for name, edge in _SPLITS if u < edge)


def _plans(studies: int, seed: int, single: bool = False) -> Iterator[Plan]:
    patient = 0
    while studies > 0:
        u = np.random.default_rng([seed, patient, 9]).random()
        count = 1 if single else min(studies, 1 + int(np.searchsorted(np.cumsum(_STUDIES_A_PATIENT), u)))
        yield from (Plan(patient, study) for study in range(count))
        studies, patient = studies - count, patient + 1


@dataclass(frozen=True)
class Drawn:
    """One study as it is handed to a layout.

    Args:
        seed, plan: which one it is.
        study: its attributes.
        report: its words.
        rendering: the frontal film with masks and boxes, in the aspect of a real film; the boxes of the foreign
            objects come last.
        shapes: of the foreign objects, one for each of `study.objects`.
        words, extra: the random streams of the text and of all that a layout draws beyond the film.
        size: longer side of the films in pixels.
        real: the report whose words and tags these are, where the phantom was given real ones.
    """

    seed: int
    plan: Plan
    study: Study
    report: Report
    rendering: Rendering
    shapes: list[Shape]
    words: np.random.Generator
    extra: np.random.Generator
    size: int
    real: TaggedReport | None = None

    def name(self, number: int = 0) -> str:
        """40 hexadecimal digits, another for each film of the study."""
        text = f"{self.seed} {self.plan.patient} {self.plan.study} {number}"
        return hashlib.sha256(text.encode()).hexdigest()[:40]

    def document(self) -> str:
        """The report as a text file of MIMIC-CXR."""
        return real_document(self.real) if self.real else document(self.study, self.report, self.words)

    def _of_real(self) -> dict[str, str]:
        """Which report it is, and its tags that are not on the film."""
        if self.real is None:
            return {}
        return {"report": self.real.uid, "not_drawn": json.dumps(findings_from_mesh(self.real.tags).missing)}

    def truth(self, image_id: str, **more: Any) -> dict[str, Any]:
        """The row of `phantom/truth.parquet`; masks as column-major run lengths, boxes in pixels of the film."""
        return {
            "image_id": image_id,
            "patient": self.plan.patient,
            "split": self.plan.split,
            **more,
            **self._of_real(),
            "attributes": json.dumps(sorted(self.study.attributes())),
            "drawn": json.dumps(asdict(self.study)),
            "stated": json.dumps(sorted(stated(self.study, self.report))),
            "boxes": json.dumps(self.rendering.boxes),
            "masks": json.dumps({name: encode_rle(mask) for name, mask in self.rendering.masks.items()}),
            "rows": self.rendering.image.shape[0],
            "columns": self.rendering.image.shape[1],
        }


@dataclass(frozen=True)
class Layout:
    """How one release lies on disk.

    Args:
        write_study: (drawn, root) → record with at least `truth`; writes the files of one study, in a worker process,
            and touches nothing else. A function of a module, so that it can be sent there.
        write_tables: (root, records) → writes the tables of the release; records come in the order of the cohort.
        aspect: False leaves the film square, where a release has only square ones.
        contrast: factor on that of every lesion.
        positive: (kind, share) of the finding that a release was gathered for, where it has more of it than a hospital.
        objects: (share, most): how many films have foreign objects, and how many one film has.
        single: True gives each patient one study, where a release does not tell which studies are of one.
    """

    write_study: Callable[[Drawn, Path], dict[str, Any]]
    write_tables: Callable[[Path, list[dict[str, Any]]], None]
    aspect: bool = True
    contrast: float = 1.0
    positive: tuple[str, float] | None = None
    objects: tuple[float, int] = (knobs.OBJECT_SHARE, knobs.OBJECT_MOST)
    single: bool = False

    def study(self, plan: Plan, seed: int) -> Study:
        """Draw the attributes of one study: a pure function of (seed, patient, study) and the layout."""
        person = draw_patient(np.random.default_rng([seed, plan.patient]))
        key = [seed, plan.patient, plan.study + 1]
        study = draw_study(np.random.default_rng([*key, 0]), person)
        if self.positive is not None:
            study = with_share(study, *self.positive, np.random.default_rng([*key, 5]))
        return replace(study, objects=draw_objects(np.random.default_rng([*key, 6]), *self.objects))


def draw(plan: Plan, seed: int, size: int, layout: Layout, real: TaggedReport | None = None) -> Drawn:
    """Draw the study of a plan: a pure function of (seed, patient, study, size), layout and real report, if any."""
    key = [seed, plan.patient, plan.study + 1]
    words, pixels, extra, things = (np.random.default_rng([*key, n]) for n in (1, 2, 3, 7))
    if real is None:
        study = layout.study(plan, seed)
        report = write_report(study, words)
    else:
        tagged = findings_from_mesh(real.tags)
        study = study_from_mesh(tagged, seed, plan.patient)
        report = Report(real.findings, real.impression, tagged.states)
    film = render(study, size, pixels, layout.contrast)
    film = _crop(film, pixels) if layout.aspect else film
    image, shapes = put_objects(film.image, study.objects, things)
    boxes = [(thing.kind, *outline(shape)) for thing, shape in zip(study.objects, shapes, strict=True)]
    film = Rendering(image, film.masks, [*film.boxes, *boxes])
    return Drawn(seed, plan, study, report, film, shapes, words, extra, size, real)


def write_phantom(
    layout: str | dict[str, Any],
    root: str | Path,
    studies: int | None = None,
    seed: int = 0,
    size: int = 320,
    workers: int = 0,
    progress: bool = True,
    reports: str | Path | RealReports | None = None,
    contrast: float = 1.0,
) -> Path:
    """Draw a phantom in the layout of a release, with the truth (`phantom/truth.parquet`).

    A study depends on (seed, patient, study) alone, so that the bytes do not depend on `workers`, and a larger
    phantom of the same seed begins with the smaller one.

    Args:
        layout: the name of the release's reader, "mimic_cxr".
        root: folder to make. One that holds the same phantom already is returned as it is.
        studies: number of studies, one frontal film each; with `reports` all of them where it is not given.
        seed: another seed, other patients.
        size: longer side of the films in pixels.
        workers: processes; 0 is one a core.
        progress: show a bar on standard error.
        reports: a CSV of real reports with their MeSH tags, or a folder of Open-i. Study i gets the words of report i,
            a film drawn from its tags (`mesh.py`), and a patient of its own; other layouts get the films alone.
        contrast: factor on that of every lesion, over 0 and at most 4: what a small film is to show has to be drawn
            stronger.

    Raises:
        SistaError: `root` holds something else, an unknown layout, the numbers make no sense, or there are fewer
            reports than studies.
    """
    root, form = Path(root), LAYOUTS.build(layout)
    real = read_real_reports(reports) if isinstance(reports, str | Path) else reports
    if real is not None:
        studies = len(real.reports) if studies is None else studies
        if studies > len(real.reports):
            raise SistaError(
                f"reports: {len(real.reports)} with text and tags, but studies is {studies}; give at most that"
            )
    if studies is None:
        raise SistaError("phantom: no number of studies; give studies, 4000 for example")
    if studies < 1 or size < 32 or workers < 0 or seed < 0:
        given = f"studies={studies} size={size} workers={workers} seed={seed}"
        raise SistaError(f"phantom: {given}; give 1, 32, 0 and 0 or more")
    if not 0 < contrast <= 4:
        raise SistaError(f"phantom: contrast={contrast}; give a factor over 0, at most 4")
    form = replace(form, contrast=form.contrast * contrast)
    told: dict[str, Any] = {"notice": REAL_NOTICE if real else NOTICE, "version": PHANTOM_VERSION}
    told |= {"generator": generator_hash(form), "layout": layout, "seed": seed, "studies": studies, "size": size}
    told |= {"contrast": contrast} if contrast != 1 else {}
    if real is not None:
        told["reports"] = real.sha256
    # A name of its own for each process: two that start together do not write into one folder.
    part = root.with_name(f".{root.name}.{os.getpid()}.part")
    try:
        if _is_there(root, told):
            return root
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    except OSError as why:
        raise unwritable(root, why) from None
    try:
        plans = list(_plans(studies, seed, form.single or real is not None))
        words = [None] * studies if real is None else real.reports[:studies]
        records = _draw_all(plans, words, form, part, seed, size, workers or os.cpu_count() or 1, progress)
        form.write_tables(part, records)
        (part / "phantom").mkdir()
        truth = pd.DataFrame([record["truth"] for record in records])
        truth.to_parquet(part / "phantom/truth.parquet", index=False)
        (part / "phantom/phantom.json").write_text(json.dumps(told, indent=2) + "\n")
        _move(part, root, told)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return root


def _is_there(root: Path, told: dict) -> bool:
    """True where `root` is this phantom; an error where it is something else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    file = root / "phantom/phantom.json"
    if not file.is_file():
        raise SistaError(f"{root}: not empty and not a phantom; choose another folder")
    try:
        there = json.loads(file.read_text())
    except ValueError:
        there = {}
    if there == told:
        return True
    keys = [key for key in dict.fromkeys((*told, *there)) if there.get(key) != told.get(key) and key != "notice"]
    differs = ", ".join(f"{key} {there.get(key)}" for key in keys)
    raise SistaError(f"{root}: holds another phantom ({differs}); remove it or choose another folder")


def _move(part: Path, root: Path, told: dict) -> None:
    if root.is_dir() and not any(root.iterdir()):
        root.rmdir()
    try:
        part.rename(root)
    except OSError:
        # Another process was faster; the same phantom is as good as ours.
        if not _is_there(root, told):
            raise


def _draw_all(
    plans: list[Plan], reals: Sequence[TaggedReport | None], form: Layout, root: Path, seed: int, size: int,
    workers: int, progress: bool,
) -> list[dict]:  # fmt: skip
    from rich.console import Console
    from rich.progress import track

    job = partial(_draw_one, form=form, root=root, seed=seed, size=size)

    def tracked(records: Iterable[dict]) -> list[dict]:
        console = Console(stderr=True)
        return list(track(records, "drawing phantom", total=len(plans), console=console, disable=not progress))

    if workers == 1:
        keep_memory()
        return tracked(map(job, plans, reals))
    # Not fork: a caller with threads (torch, a progress bar) may hold locks that a forked child never gets.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(plans)), mp_context=context, initializer=keep_memory) as pool:
        return tracked(pool.map(job, plans, reals, chunksize=8))


def _draw_one(plan: Plan, real: TaggedReport | None, form: Layout, root: Path, seed: int, size: int) -> dict:
    return form.write_study(draw(plan, seed, size, form, real), root)


def _crop(rendering: Rendering, rng: np.random.Generator) -> Rendering:
    """Cut the square to the aspect of a real film: a little off the sides or off the abdomen."""
    size = rendering.image.shape[0]
    lost = int(size * rng.uniform(0, 0.14))
    if rng.random() < 0.5:
        rows, columns = slice(0, size - lost), slice(0, size)
    else:
        lost //= 2
        rows, columns = slice(0, size), slice(lost, size - lost)
    return rendering.crop(rows, columns)


def decode_rle(text: str, shape: tuple[int, int]) -> np.ndarray:
    """The inverse of `encode_rle`: (H, W) bool."""
    flat = np.zeros(shape[0] * shape[1], bool)
    numbers = [int(n) for n in text.split()]
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        flat[start - 1 : start - 1 + length] = True
    return flat.reshape(shape, order="F")
