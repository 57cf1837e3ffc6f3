"""A process that imports the libraries once and runs one command line after the other: the cells of a sweep."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from sista_pl import cli


class Worker:
    """A child process that runs commands; it ends with the first that fails, or is told to.

    Args:
        environment: of the process.
    """

    def __init__(self, environment: Mapping[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=dict(environment),
        )  # fmt: skip

    def start(self, words: Sequence[str], log: Path) -> None:
        """Begin a command, whose output goes to the end of a file."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"words": list(words), "log": str(log)}) + "\n")
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
    try:
        for line in asked:
            told = json.loads(line)
            with open(told["log"], "ab") as sink:
                os.dup2(sink.fileno(), 1)
                os.dup2(sink.fileno(), 2)
            code = _run(told["words"])
            print(code, file=answers, flush=True)
            if code:
                return code
    except KeyboardInterrupt:  # between two commands
        return 130
    return 0


def _run(words: list[str]) -> int:
    try:
        code = cli.main(words)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    sys.exit(main())
