"""Losses of detection; `takes = "boxes"`: forward(components) → (loss, diagnostics).

Which anchor answers for which box is a detector's own affair, so it computes its losses itself; what stands here names
one of them, so that a configuration can weigh it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sista_pl.errors import SistaError, did_you_mean
from sista_pl.losses import LOSSES


@LOSSES.register("detector")
class DetectorLoss(nn.Module):
    """One of the losses that a detector computes, such as `classification` or `bbox_regression` of `retinanet`.

    Args:
        component: which.
    """

    takes = "boxes"

    def __init__(self, component: str):
        super().__init__()
        self.component = component

    def forward(self, components: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Args: components: the detector's losses by name, scalars.

        Raises:
            SistaError: the detector has no loss of that name.
        """
        if self.component not in components:
            near = did_you_mean(self.component, components)
            raise SistaError(f"loss 'detector': no component {self.component!r}; {near}")
        return components[self.component].float(), {}
