"""Matrix products with their weights."""

from __future__ import annotations

import torch

from pdray.kernels.linear.linear import linear, pack_weight
from pdray.kernels.linear.norm_linear import norm_linear
from pdray.models.parts.norm import RMSNorm
from pdray.models.parts.part import Part, Placement


class Linear(Part):
    """One product for one or several projections of a checkpoint that read the same input.

    Args:
        out_features: of each projection, by its name in the checkpoint, in the order in which they lie in the weight.

    Attributes:
        weight: [sum of out_features, in_features], or packed; see pack_weight().
        bias: [sum of out_features], or None.
    """

    def __init__(
        self, out_features: dict[str, int], in_features: int, placement: Placement, *, bias: bool = False
    ) -> None:
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features
        total = sum(out_features.values())
        self.weight = placement.empty(total, in_features)
        self.bias = placement.empty(total) if bias else None

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """[M, in_features] -> [M, sum of out_features]; see pdray.kernels.linear.linear."""
        return linear(x, self.weight, self.bias, residual)

    def of_normed(self, x: torch.Tensor, norm: RMSNorm, *, gated: bool = False) -> torch.Tensor:
        """The product with norm(x), and the gated activation of that; see norm_linear()."""
        return norm_linear(x, norm.weight, norm.eps, self.weight, self.bias, gated=gated)

    def own_weights(self) -> dict[str, torch.Tensor]:
        """See Part."""
        weight = self.weight.to_dense() if self.weight.is_mkldnn else self.weight
        named = self._split("weight", weight)
        return named if self.bias is None else named | self._split("bias", self.bias)

    def _split(self, kind: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        views = tensor.split(list(self.out_features.values()))
        return {f"{name}.{kind}": view for name, view in zip(self.out_features, views, strict=True)}

    def pack_own(self) -> None:
        """See Part."""
        self.weight = pack_weight(self.weight)
