"""Loss components, one subject a file; a method is a weighted sum of them, written in YAML.

A loss is a module whose `forward(pair)` returns `(loss, diagnostics)`: a scalar in fp32 and a dict of detached
scalars to log. It gathers over ranks inside `forward`, so that ranks change nothing; but `sta` with
`negatives: batch` contrasts the pairs of a rank, and a `detector` computes its losses of a rank's images.
"""

from sista_pl.registry import Registry

LOSSES = Registry("loss")

from sista_pl.losses import (  # noqa: E402, F401  registration
    boxes,
    findings,
    gloria,
    instance,
    labels,
    masks,
    mgca,
    semantic,
    sigmoid,
    token,
)
