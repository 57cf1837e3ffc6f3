"""What was written is read back by the library that it is for: its noise kept away, its numbers compared."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import version

from torch import Tensor

from sista_pl.errors import SistaError

TOLERANCE = 1e-5


def agree(library: str, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    """Return the largest difference, as a share of the largest value of its features.

    Raises:
        SistaError: another shape, or more than 1e-5.
    """
    largest = 0.0
    for name, (before, after) in pairs.items():
        if before.shape != after.shape:
            raise SistaError(
                f"export: {library} {version(library)} gives {name} of {tuple(after.shape)} where the encoder gives "
                f"{tuple(before.shape)}; nothing is written, please report it"
            )
        difference = float((before - after).abs().max() / before.abs().max().clamp_min(1e-12))
        if not difference <= TOLERANCE:
            raise SistaError(
                f"export: read back by {library} {version(library)}, {name} differs by {difference:.1e} of its largest "
                f"value, more than {TOLERANCE:.0e}; nothing is written, try --to another form, or another {library}"
            )
        largest = max(largest, difference)
    return largest


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' progress, notes and warnings from the user; what matters is raised."""
    from transformers.utils import logging as library

    level, bar = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except (SistaError, OSError):
        raise
    except Exception as why:  # torch's exporter and the libraries raise almost anything
        reason = (str(why).strip().splitlines() or [type(why).__name__])[0][:200]
        raise SistaError(
            f"export: this encoder can't be written so ({type(why).__name__}: {reason}); use another --to"
        ) from why
    finally:
        logging.disable(logging.NOTSET)
        library.set_verbosity(level)
        if bar:
            library.enable_progress_bar()
