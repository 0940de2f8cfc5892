"""Token ids to vectors, and vectors to logits."""

from __future__ import annotations

import torch

from pdray.kernels.collective.group import RankGroup
from pdray.kernels.elementwise.embedding import embed
from pdray.kernels.linear.linear import linear, pack_weight
from pdray.models.model_config import ModelConfig
from pdray.models.parts.part import Part, Placement
from pdray.models.shards import Cut, Shard


class Embedding(Part):
    """Attributes:
    weight: [vocab_size, hidden_size].
    """

    def __init__(self, rows: int, hidden_size: int, placement: Placement) -> None:
        super().__init__()
        self.weight = placement.empty(rows, hidden_size)

    def __call__(self, input_ids: torch.Tensor, sampled: torch.Tensor | None = None) -> torch.Tensor:
        """[T] int64 -> [T, hidden_size].

        Args:
            sampled: [R] int64; what ids below 0 stand for: -1 - i for sampled[i].
        """
        return embed(input_ids, self.weight, input_ids[:0] if sampled is None else sampled)

    def own_weights(self) -> dict[str, torch.Tensor]:
        """See Part."""
        return {"weight": self.weight}


class ShardedEmbedding(Embedding):
    """Each rank has the vectors of some tokens.

    Attributes:
        weight: [vocabulary_rows, hidden_size], of which the last rank's last rows may mean nothing.
    """

    def __init__(self, shard: Shard, hidden_size: int, placement: Placement, group: RankGroup) -> None:
        super().__init__(shard.vocabulary_rows, hidden_size, placement)
        self._vocabulary = shard.vocabulary
        self._group = group

    def __call__(self, input_ids: torch.Tensor, sampled: torch.Tensor | None = None) -> torch.Tensor:
        """See Embedding; the same on every rank."""
        own, late = self._vocabulary, input_ids[:0] if sampled is None else sampled
        return self._group.sum(embed(input_ids, self.weight, late, own=(own.start, own.stop)))

    def own_weights(self) -> dict[str, torch.Tensor]:
        """See Part."""
        return {"weight": self.weight[: self._vocabulary.size]}

    def own_cuts(self) -> dict[str, Cut]:
        """See Part."""
        return {"weight": Cut(0, self._vocabulary)}


class OutputHead(Part):
    """The product of hidden states with the output matrix.

    Args:
        tied: the embedding whose weight it is; a checkpoint then names no other.
    """

    def __init__(self, rows: int, hidden_size: int, placement: Placement, *, tied: Embedding | None = None) -> None:
        super().__init__()
        self._is_tied = tied is not None
        self.weight = placement.empty(rows, hidden_size) if tied is None else tied.weight

    def __call__(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[M, hidden_size] -> [M, vocab_size] in the model's dtype, into ``out`` where it is given (CUDA).

        Of several ranks the first one alone gets them: the others get no rows.
        """
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


class ShardedHead(OutputHead):
    """Each rank computes the logits of its tokens, and the first one puts them together."""

    def __init__(
        self, shards: list[Shard], hidden_size: int, placement: Placement, group: RankGroup, tied: Embedding | None
    ) -> None:
        super().__init__(shards[0].vocabulary_rows, hidden_size, placement, tied=tied)
        self._vocabularies = [shard.vocabulary for shard in shards]
        self._group = group

    def __call__(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See OutputHead."""
        own = super().__call__(hidden)
        parts = self._group.gather(own) if len(own) else None
        if parts is None:
            return own.new_empty(0, self._vocabularies[0].whole)
        known = [part[:, : span.size] for part, span in zip(parts, self._vocabularies, strict=True)]
        return torch.cat(known, dim=1, out=out)

    def own_weights(self) -> dict[str, torch.Tensor]:
        """See Part."""
        num_tokens = self._vocabularies[self._group.rank].size
        return {name: weight[:num_tokens] for name, weight in super().own_weights().items()}

    def own_cuts(self) -> dict[str, Cut]:
        """See Part."""
        return {} if self._is_tied else {"weight": Cut(0, self._vocabularies[self._group.rank])}


def make_embedding(config: ModelConfig, placement: Placement) -> Embedding:
    """The whole of it, or a rank's shard."""
    if placement.group is None:
        return Embedding(config.vocab_size, config.hidden_size, placement)
    return ShardedEmbedding(placement.shard(config), config.hidden_size, placement, placement.group)


def make_head(config: ModelConfig, placement: Placement, embedding: Embedding) -> OutputHead:
    """The whole of it, or a rank's shard."""
    tied = embedding if config.tie_word_embeddings else None
    group = placement.group
    if group is None:
        return OutputHead(config.vocab_size, config.hidden_size, placement, tied=tied)
    shards = [Shard.of(config, rank, group.size) for rank in range(group.size)]
    return ShardedHead(shards, config.hidden_size, placement, group, tied)
