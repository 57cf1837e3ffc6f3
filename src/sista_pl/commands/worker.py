"""A process that imports the libraries once and runs one command line after the other: the cells of a sweep."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TextIO

from sista_pl import cli


class Worker:
    """A child process that runs commands; it ends with the first that fails, is told to, or has lost its parent.

    Args:
        environment: of the process.
    """

    def __init__(self, environment: Mapping[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=dict(environment),
        )  # fmt: skip

    def start(self, words: Sequence[str], log: Path, lock: Path) -> None:
        """Begin a command, whose output goes to the end of a file; another that is locked by it is its alone."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"words": list(words), "log": str(log), "lock": str(lock)}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it was ended, as `code` will tell

    def code(self, seconds: float) -> int | None:
        """Return the exit code of the command, or None where it is not at its end after so many seconds."""
        answers = self.process.stdout
        assert answers is not None
        if not select.select([answers], [], [], seconds)[0]:
            return None
        line = answers.readline()
        return int(line) if line else self.process.wait() or 1

    def end(self) -> None:
        """Let it go, and wait until it has."""
        self.process.communicate()


def main() -> int:
    """Run the commands that stand on standard input, a line of JSON each; write the exit code of each to the output."""
    asked, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    commands: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
    busy = threading.Event()
    threading.Thread(target=_listen, args=(asked, commands, busy), daemon=True).start()
    try:
        while (told := commands.get()) is not None:
            busy.set()
            with open(told["log"], "ab") as sink:
                os.dup2(sink.fileno(), 1)
                os.dup2(sink.fileno(), 2)
            with open(told["lock"], "w") as lock:
                code = _run(told["words"], lock)
            busy.clear()
            print(code, file=answers, flush=True)
            if code:
                return code
    except KeyboardInterrupt:  # between two commands
        return 130
    return 0


def _listen(asked: TextIO, commands: SimpleQueue[dict[str, Any] | None], busy: threading.Event) -> None:
    """Pass on what is asked for; where nobody asks any more, stop the command as a machine that is taken away does."""
    for line in asked:
        commands.put(json.loads(line))
    commands.put(None)
    if busy.is_set():
        os.kill(os.getpid(), signal.SIGTERM)


def _run(words: list[str], lock: TextIO) -> int:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"sista: {lock.name}: another process is at work on this cell; wait until it has ended")
        return 2
    try:
        code = cli.main(words)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    fcntl.flock(lock, fcntl.LOCK_UN)  # whatever child of the command has it open, too
    return code


if __name__ == "__main__":
    sys.exit(main())
