"""The feed-forward half of a layer: silu(gate) * up, then down."""

from __future__ import annotations

import torch

from pdray.kernels.collective.group import PendingSum
from pdray.kernels.elementwise.activation import silu_and_mul
from pdray.models.model_config import ModelConfig
from pdray.models.parts.linear import Linear, summed_linear
from pdray.models.parts.norm import RMSNorm
from pdray.models.parts.part import Part, Placement
from pdray.models.shards import Span


class GatedMLP(Part):
    """Attributes:
    gate_up: gate before up. down: the product that follows.
    """

    def __init__(self, config: ModelConfig, placement: Placement) -> None:
        super().__init__()
        hidden, inner, bias = Span.all_of(config.hidden_size), placement.shard(config).inner, config.mlp_bias
        self.gate_up = self.add("", Linear({"gate_proj": inner, "up_proj": inner}, hidden, placement, bias=bias))
        self.down = self.add("", summed_linear({"down_proj": hidden}, inner, placement, bias=bias))

    def __call__(self, hidden: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """hidden + mlp(norm(hidden)), [M, hidden_size]. The memory of ``hidden`` may be used for the result."""
        return self.down(self.gate_up.of_normed(hidden, norm, gated=True), residual=hidden)

    def begin(self, hidden: PendingSum, norm: RMSNorm) -> PendingSum:
        """The same of a sum that the ranks are making, while they add up what comes of it."""
        normed = hidden.normed(norm.weight, norm.eps)
        return self.down.begin(silu_and_mul(self.gate_up(normed)), residual=hidden.wait())
