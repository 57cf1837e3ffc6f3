"""`sista sweep`: methods x seeds x tasks x label fractions from one YAML file."""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sista_pl import runs
from sista_pl.book import Book, mixed
from sista_pl.cli import THEN
from sista_pl.commands.worker import Worker
from sista_pl.errors import SistaError
from sista_pl.sweep import PRETRAIN, Cell, Sweep, read_sweep

_HELP = """\
Pre-train each method with each seed, take each encoder through each task with each share of the labels, and compare.
A sweep that was stopped goes on where it was: finished cells are left alone, a started training resumes. A cell that
was made by other options or configurations, or on an encoder that was made again since, is refused: the line says what
to delete.

  sista sweep --config benchmark/smoke.yaml
  sista sweep --config mine.yaml --cell 3/12      # one task of an array job: a share of the pre-trainings, all it needs
  sista sweep --config benchmark/phantom.yaml --config benchmark/with_controls.yaml    # more methods, the same folder
  sista sweep --config mine.yaml --dry-run        # the commands, and which of them are done

The file:
  pretrain: {config: pretrain.yaml, options: {trainer.max_epochs: 5}}
  methods:
    random: null                                  # no pre-training
    clip: {config: method/clip.yaml}
    sista: {config: method/sia_sta_batch.yaml}
  tasks:
    cls_chexpert: {config: cls_chexpert.yaml, subsets: {0.01: 10}}    # ten draws of 1 % of the labels with each seed
    zeroshot: {config: zeroshot_chexpert.yaml, fits: false}   # an evaluation: no labels, nothing to fit
  tune: {options: {model.lr: [5.0e-4, 1.0e-3]}, task: cls_chexpert, fraction: 0.01}   # the same budget for each method
  fractions: [0.01, 0.1, 1.0]
  seeds: [0, 1, 2]
  reference: clip

Where there is `tune`, each method is pre-trained with each of the values, with the first seed, and the validation
figure of the task decides (left out: the first that is fitted, its smallest fraction); test sets are not looked at,
and tuning.csv says what was tried.

The folder then holds cells.csv (a line a cell, what `sista compare --table` reads), figures.csv (each figure of each
test with its interval, and the hash of the code that made it), compare.md, report.html (all of it on one page), and
the runs, each of them an MLflow run, too.
"""


def main(argv: list[str]) -> int:
    """Run `sista sweep` and return the exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("sista sweep", description=_HELP, formatter_class=raw, allow_abbrev=False)
    parser.add_argument(
        "-c", "--config", required=True, action="append",
        help="the sweep: a file, or the name of a packaged one; a further --config adds to it, methods for example",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder of the sweep (default: sweeps/NAME)")
    parser.add_argument("--cell", default="0/1", metavar="I/N", help="the I-th of N shares, from 0, for an array job")
    parser.add_argument("--jobs", type=int, help="cells at once (default: one a GPU, else one a CPU core, at most 8)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--keep-going", action="store_true", help="go on with the others where a cell fails")
    options = parser.parse_args(argv)
    sweep = read_sweep(*options.config)
    book = Book(options.out or Path("sweeps") / sweep.name)
    part = _part(options.cell)
    if options.dry_run:
        return _tell(sweep, book, part)
    if options.jobs is not None and options.jobs < 1:
        raise SistaError(f"sweep: --jobs is {options.jobs}; give at least 1")
    devices = _devices()
    jobs = options.jobs or len(devices) or min(os.cpu_count() or 1, 8)
    from sista_pl.report.swept import write_plan  # after the parser: it brings torch

    write_plan(book.root, sweep)
    run = _Run(sweep, book, jobs, devices, options.keep_going)
    failed = run.all(sweep.cells(part))
    if not failed:
        run.left(sweep.cells(part))  # refuses those whose configurations were edited while others ran
    _show(sweep, book)
    if failed:
        cell, why = failed[0]
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise SistaError(f"sweep: {cell.name} failed{more}: {why}; see {book.log(cell)}, mend it and run again")
    return 0


def _part(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise SistaError(f"sweep: --cell is {text!r}; give I/N with 0 <= I < N, as 0/12")
    return int(index), int(count)


def _devices() -> list[str]:
    """Return the GPUs that there are for this sweep, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count, given = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[:count] if given else [str(place) for place in range(count)]


def _tell(sweep: Sweep, book: Book, part: tuple[int, int]) -> int:
    """Print what a sweep would do."""
    for cell in sweep.cells(part):
        if book.is_done(cell):
            print(f"# {cell.name}: done")
            continue
        try:
            commands = sweep.commands(cell, book.runs)
        except SistaError:
            wants = f"{cell.encoder.name} has an encoder" if cell.task else f"the setting of {cell.method} is chosen"
            print(f"# {cell.name}: once {wants}")
            continue
        for command in commands:
            print("sista " + shlex.join(command))
    return 0


class _Run:
    """Runs cells in child processes that import the libraries once, each cell after the pre-training that it needs."""

    def __init__(self, sweep: Sweep, book: Book, jobs: int, devices: list[str], keep_going: bool):
        self.sweep, self.book, self.jobs, self.keep_going = sweep, book, jobs, keep_going
        # each worker has a device, where there are any; one whose cell failed has ended, and its device gets another
        self.devices = deque(devices[job % len(devices)] if devices else None for job in range(jobs))
        self.idle: deque[tuple[Worker, str | None]] = deque()
        self.busy: set[Worker] = set()
        self.failed: list[tuple[Cell, str]] = []
        self.stop = threading.Event()

    def all(self, cells: list[Cell]) -> list[tuple[Cell, str]]:
        """Run what is not done yet; return what failed, and why."""
        waiting = self.left(cells)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console, began = Console(stderr=True), time.monotonic()
        with Progress(*columns, console=console) as bar, ThreadPoolExecutor(self.jobs) as pool:
            told = bar.add_task("cells", total=len(cells), completed=len(cells) - len(waiting))
            running: dict = {}
            try:
                while waiting or running:
                    for cell in [c for c in waiting if self.ready(c)][: self.jobs - len(running)]:
                        waiting.remove(cell)
                        running[pool.submit(self.one, cell)] = cell
                    if not running:
                        break  # the rest needs an encoder that failed
                    bar.update(told, description=", ".join(cell.name for cell in running.values()))
                    ended, _ = wait(running, timeout=5, return_when=FIRST_COMPLETED)
                    for job in ended:
                        cell = running.pop(job)
                        if why := job.result():
                            self.failed.append((cell, why))
                        else:
                            bar.advance(told)
                            if not console.is_terminal:  # a bar would say nothing until the end
                                minutes = (time.monotonic() - began) / 60
                                done = int(bar.tasks[told].completed)
                                console.print(f"{done} of {len(cells)}, {minutes:.0f} min: {cell.name}", soft_wrap=True)
                            self.book.write_table(self.sweep)
                    if self.failed and not self.keep_going:
                        waiting = []
            except KeyboardInterrupt:
                self.stop.set()
                for worker in list(self.busy):
                    worker.process.terminate()
                raise
            finally:
                pool.shutdown()
                for worker, _ in self.idle:
                    worker.end()
        return self.failed

    def left(self, cells: list[Cell]) -> list[Cell]:
        """Return the cells that are not done yet.

        Raises:
            SistaError: one was made otherwise than the sweep would make it now.
        """
        return [cell for cell in cells if not self.ready(cell) or not self.book.done(self.sweep, cell)]

    def ready(self, cell: Cell) -> bool:
        """Whether all that a cell needs is there: the encoder of a task, what chooses the setting of a pre-training."""
        return all(map(self.book.is_done, self.sweep.needs(cell)))

    def one(self, cell: Cell) -> str:
        """Run a cell's commands; return why it failed, or nothing."""
        log = self.book.log(cell)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab", buffering=0) as sink:
            try:
                with self.book.alone(cell):
                    return self.made(cell, sink)
            except SistaError as why:
                sink.write(f"sista: {why}\n".encode())
                return str(why).removeprefix("sweep: ")

    def made(self, cell: Cell, sink: IO[bytes]) -> str:
        """Make a cell that no other sweep is at; return why it failed, or nothing.

        Raises:
            SistaError: it was made, or begun, otherwise, or its commands still run.
        """
        if self.book.done(self.sweep, cell):
            return ""
        with self.prepared(cell) as release:
            if self.stop.is_set():  # while it waited for the data
                return "stopped"
            began, commands = time.monotonic(), self.sweep.commands(cell, self.book.runs)
            if self.book.begin(self.sweep, cell) and commands[0][0] == "fit":
                commands[0] += ["--ckpt_path", "last"]
            code = self.child(cell, commands, sink, release)
        if code:
            return "stopped" if self.stop.is_set() else _last_line(self.book.log(cell))
        self.book.finish(self.sweep, cell, time.monotonic() - began)
        return ""

    def child(self, cell: Cell, commands: list[list[str]], sink, release) -> int:
        """Run commands in a worker; return the exit code."""
        words: list[str] = []
        for command in commands:
            words += [*([THEN] if words else []), *command, "--trainer.enable_progress_bar", "false"]
            if not any(word.startswith("--trainer.logger") for word in command):
                words += ["--trainer.logger.init_args.experiment_name", self.sweep.name]
        worker, device = self.worker()
        self.busy.add(worker)
        code = None
        try:
            if self.stop.is_set():  # after the others were told
                worker.process.terminate()
            worker.start(words, Path(sink.name), self.book.lock(cell))
            while (code := worker.code(0.2)) is None:
                if (found := runs.runs_of(self.book.runs, cell.name)) and (found[-1] / "config.yaml").is_file():
                    release()
            return code
        finally:
            self.busy.discard(worker)
            if code == 0:
                self.idle.append((worker, device))
            else:
                worker.end()
                self.devices.append(device)

    def worker(self) -> tuple[Worker, str | None]:
        """Return a worker that waits for a cell, or a new one, and its device."""
        try:
            return self.idle.popleft()
        except IndexError:
            device = self.devices.popleft()
        environment = dict(os.environ)
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        elif self.jobs > 1:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.jobs))
        return Worker(environment), device

    @contextmanager
    def prepared(self, cell: Cell) -> Iterator:
        """Let one cell of a kind draw and prepare its data alone; once it trains, the others may."""
        mark = self.book.root / "prepared" / (cell.task or PRETRAIN)
        mark.parent.mkdir(parents=True, exist_ok=True)
        with mark.with_suffix(".lock").open("w") as lock:
            if not mark.is_file():
                fcntl.flock(lock, fcntl.LOCK_EX)

            def release() -> None:
                mark.touch()
                fcntl.flock(lock, fcntl.LOCK_UN)

            if mark.is_file():
                fcntl.flock(lock, fcntl.LOCK_UN)
            yield release


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return (lines or ["it said nothing"])[-1].removeprefix("sista: ")[:300]


def _show(sweep: Sweep, book: Book) -> None:
    """Print a table of what is done, and compare the methods where there is more than one."""
    from rich.table import Table

    cells = sweep.cells()
    done = [cell for cell in cells if book.is_done(cell)]
    console = Console()
    console.print(f"{len(done)} of {len(cells)} cells done: {book.root}", soft_wrap=True)
    if not done:
        return
    path = book.write_table(sweep)
    if sweep.tune is not None:
        console.print(f"tuning, {sweep.tune.told()}:", soft_wrap=True)
        for _, row in (tried := book.tuned(sweep))[tried["chosen"]].iterrows():
            console.print(f"  {row['method']}: {row['options']}, {row['figure']} {row['value']:.3f}", soft_wrap=True)
    figures = book.table(sweep)
    if note := mixed(figures):
        console.print(note, soft_wrap=True)
    pretrained = figures[(figures["task"] == PRETRAIN) & (figures["metric"] == "R_mean")]
    if len(pretrained):
        table = Table("method", "seeds", "R_mean, mean over seeds", title="retrieval of the test split")
        for method, rows in pretrained.groupby("method", sort=False):
            table.add_row(str(method), str(len(rows)), f"{rows['value'].mean():.3f}")
        console.print(table)
    tested = {cell.method for cell in done if cell.task is not None}
    if len(tested) > 1:
        from sista_pl.commands.compare import main as compare

        reference = ["--reference", sweep.reference] if sweep.reference in tested else []
        compare(["--table", str(path), "--out", str(book.root), *reference])
    from sista_pl.commands.report import main as report

    report([str(book.root)])
