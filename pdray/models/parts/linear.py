"""Matrix products with their weights."""

from __future__ import annotations

import torch

from pdray.kernels.collective.group import PendingSum, RankGroup
from pdray.kernels.linear.linear import linear, pack_weight
from pdray.kernels.linear.norm_linear import norm_linear
from pdray.models.parts.norm import RMSNorm
from pdray.models.parts.part import Part, Placement
from pdray.models.shards import Cut, Span


class Linear(Part):
    """One product for one or several projections of a checkpoint that read the same input.

    Args:
        out_features: of each projection, by its name in the checkpoint, in the order in which they lie in the weight.
        in_features: of which the weight has columns.

    Attributes:
        weight: [sum of out_features, in_features], or packed; see pack_weight().
        bias: [sum of out_features], or None.
    """

    def __init__(
        self, out_features: dict[str, Span], in_features: Span, placement: Placement, *, bias: bool = False
    ) -> None:
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features.size
        self._columns = in_features
        total = sum(span.size for span in out_features.values())
        self.weight = placement.empty(total, self.in_features)
        self.bias = placement.empty(total) if bias else None

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[M, in_features] -> [M, sum of out_features]; see pdray.kernels.linear.linear."""
        return linear(x, self.weight, self.bias, residual, out)

    def begin(self, x: torch.Tensor, residual: torch.Tensor) -> PendingSum:
        """The same, of which other ranks may have their part to add; see RankGroup.begin_sum."""
        return PendingSum.made(self(x, residual))

    def of_normed(self, x: torch.Tensor, norm: RMSNorm, *, gated: bool = False) -> torch.Tensor:
        """The product with norm(x), and the gated activation of that; see norm_linear()."""
        return norm_linear(x, norm.weight, norm.eps, self.weight, self.bias, gated=gated)

    def own_weights(self) -> dict[str, torch.Tensor]:
        """See Part."""
        weight = self.weight.to_dense() if self.weight.is_mkldnn else self.weight
        named = self._split("weight", weight)
        return named if self.bias is None else named | self._split("bias", self.bias)

    def own_cuts(self) -> dict[str, Cut]:
        """See Part."""
        kinds = ("weight",) if self.bias is None else ("weight", "bias")
        rows = {f"{name}.{k}": Cut(0, span) for name, span in self.out_features.items() for k in kinds}
        cut = {name: cut for name, cut in rows.items() if not cut.span.is_whole}
        columns = {f"{name}.weight": Cut(1, self._columns) for name in self.out_features}
        return cut if self._columns.is_whole else cut | columns

    def _split(self, kind: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        views = tensor.split([span.size for span in self.out_features.values()])
        return {f"{name}.{kind}": view for name, view in zip(self.out_features, views, strict=True)}

    def pack_own(self) -> None:
        """See Part."""
        self.weight = pack_weight(self.weight)


class SummedLinear(Linear):
    """A product of which each rank has some columns: what comes of them is added up."""

    def __init__(
        self,
        out_features: dict[str, Span],
        in_features: Span,
        placement: Placement,
        group: RankGroup,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__(out_features, in_features, placement, bias=bias)
        self._group = group

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See Linear; the same on every rank. Bias and residual are rank 0's to add."""
        total = self._group.sum(self._part(x, residual))
        return total if out is None else out.copy_(total)

    def begin(self, x: torch.Tensor, residual: torch.Tensor) -> PendingSum:
        """See Linear."""
        return self._group.begin_sum(self._part(x, residual))

    def _part(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        return super().__call__(x, residual) if self._group.rank == 0 else linear(x, self.weight)


def summed_linear(
    out_features: dict[str, Span], in_features: Span, placement: Placement, *, bias: bool = False
) -> Linear:
    """The product that follows what each rank computes of its own heads or features."""
    if placement.group is None:
        return Linear(out_features, in_features, placement, bias=bias)
    return SummedLinear(out_features, in_features, placement, placement.group, bias=bias)
