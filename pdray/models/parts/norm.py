"""RMSNorm with its weight."""

from __future__ import annotations

import torch

from pdray.kernels.elementwise.rms_norm import rms_norm
from pdray.models.parts.part import Part, Placement


class RMSNorm(Part):
    """Attributes:
    weight: [width].
    """

    def __init__(self, width: int, eps: float, placement: Placement) -> None:
        super().__init__()
        self.eps = eps
        self.weight = placement.empty(width)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] -> the same."""
        return rms_norm(x, self.weight, self.eps)

    def own_weights(self) -> dict[str, torch.Tensor]:
        """See Part."""
        return {"weight": self.weight}
