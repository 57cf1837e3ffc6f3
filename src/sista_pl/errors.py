"""The exceptions that are a user's mistake or a bad file, and not a defect of ours."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable


class SistaError(Exception):
    """A mistake in the input: printed as one line `sista: <thing>: <why>; <next step>`, exit code 2, no traceback.

    Line breaks of the message become blanks, and a junk value of thousands of characters is cut.
    """

    def __init__(self, message: str):
        line = " ".join(str(message).split("\n"))
        super().__init__(line if len(line) <= 1000 else f"{line[:700]} … {line[-250:]}")


class BadImage(Exception):
    """An image or mask file that cannot be used; the message is the reason."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return `did you mean X?` for the nearest known name, else the list of known names; YAML may give 5 as a name."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known) or 'none'}"


def unwritable(place: object, error: OSError) -> Exception:
    """Return the line on a folder, given to be written, that cannot be, or else the error as it was."""
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG):
        return error
    return SistaError(f"{place}: cannot be written ({error.strerror}); give another folder")


def disk_full(error: BaseException | None) -> bool:
    """Return whether an error, or one that it was raised from, is that of a full disk, or of a full quota."""
    while error is not None:
        # numpy's and SQLite's have no errno
        told = re.search(r"^\d+ requested and \d+ written|database or disk is full", str(error))
        if told or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False
