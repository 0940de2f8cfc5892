"""Token ids to vectors, and vectors to logits."""

from __future__ import annotations

import torch

from pdray.kernels.elementwise.embedding import embed
from pdray.kernels.linear.linear import linear, pack_weight
from pdray.models.parts.part import Part, Placement


class Embedding(Part):
    """Attributes:
    weight: [vocab_size, hidden_size].
    """

    def __init__(self, vocab_size: int, hidden_size: int, placement: Placement) -> None:
        super().__init__()
        self.weight = placement.empty(vocab_size, hidden_size)

    def __call__(self, input_ids: torch.Tensor, sampled: torch.Tensor | None = None) -> torch.Tensor:
        """[T] int64 -> [T, hidden_size].

        Args:
            sampled: [R] int64; what ids below 0 stand for: -1 - i for sampled[i].
        """
        return embed(input_ids, self.weight, input_ids[:0] if sampled is None else sampled)

    def own_weights(self) -> dict[str, torch.Tensor]:
        """See Part."""
        return {"weight": self.weight}


class OutputHead(Part):
    """The product of hidden states with the output matrix.

    Args:
        tied: the embedding whose weight it is; a checkpoint then names no other.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, placement: Placement, *, tied: Embedding | None = None
    ) -> None:
        super().__init__()
        self._is_tied = tied is not None
        self.weight = placement.empty(vocab_size, hidden_size) if tied is None else tied.weight

    def __call__(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[M, hidden_size] -> [M, vocab_size] in the model's dtype, into ``out`` where it is given (CUDA)."""
        if hidden.is_cuda:  # one product whether there is an ``out`` or not: a graph draws what an eager step draws
            return torch.mm(hidden, self.weight.t(), out=out)
        return linear(hidden, self.weight)

    def own_weights(self) -> dict[str, torch.Tensor]:
        """See Part."""
        if self._is_tied:
            return {}
        return {"weight": self.weight.to_dense() if self.weight.is_mkldnn else self.weight}

    def pack_own(self) -> None:
        """See Part. A tied matrix becomes a copy of its own where the layout differs."""
        self.weight = pack_weight(self.weight)
