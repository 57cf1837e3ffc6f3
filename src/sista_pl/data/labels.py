"""Labels of a prepared store.

K labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sista_pl.data.store import Store
from sista_pl.errors import SistaError, did_you_mean

PREFIX = "label_"


def label_names(store: Store) -> list[str]:
    """Return the names of the label columns, in their order."""
    return [name.removeprefix(PREFIX) for name in store.manifest.columns if name.startswith(PREFIX)]


def read_labels(store: Store, names: Sequence[str]) -> np.ndarray:
    """Return (rows of the store, K) float32 labels: 1, 0, or NaN = unknown.

    Args:
        store: of which.
        names: of the columns, in the order that is wanted.

    Raises:
        SistaError: a label that the store has not.
    """
    known = label_names(store)
    for name in names:
        if name not in known:
            raise SistaError(f"data: {store.path} has no label {name!r}; {did_you_mean(name, known)}")
    return store.manifest[[PREFIX + name for name in names]].to_numpy(np.float32)
