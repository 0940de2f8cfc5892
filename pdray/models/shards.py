"""Which part of a model each rank of a worker holds. Pure."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pdray.errors import ConfigError
from pdray.models.model_config import ModelConfig

VOCABULARY_MULTIPLE = 16  # rows of a rank's embedding, so that rows of its logits are aligned; the last are padding


class Span(NamedTuple):
    """Indices from ``start`` to ``stop`` of ``whole``."""

    start: int
    stop: int
    whole: int

    @classmethod
    def all_of(cls, whole: int) -> Span:
        return cls(0, whole, whole)

    @classmethod
    def share(cls, whole: int, rank: int, num_ranks: int) -> Span:
        """One of ``num_ranks`` equal parts."""
        size = whole // num_ranks
        return cls(rank * size, (rank + 1) * size, whole)

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        return self.size == self.whole

    def times(self, unit: int) -> Span:
        """The same of what has ``unit`` elements for each index."""
        return Span(self.start * unit, self.stop * unit, self.whole * unit)


class Cut(NamedTuple):
    """What a rank holds of a checkpoint's tensor: ``span`` of dimension ``dim``."""

    dim: int
    span: Span

    @property
    def indices(self) -> tuple[slice, ...]:
        """Of the whole tensor."""
        return *(slice(None),) * self.dim, slice(self.span.start, self.span.stop)

    def whole_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """Of the checkpoint's tensor, by the rank's."""
        return *shape[: self.dim], self.span.whole, *shape[self.dim + 1 :]


class Shard(NamedTuple):
    """A rank's part of every layer, and of the vocabulary.

    Attributes:
        heads: of queries. kv_heads: of keys and values; where there are fewer than ranks, several ranks hold the same.
        inner: features between the two halves of the feed-forward part.
        vocabulary: token ids. vocabulary_rows: rows of each rank's embedding, padding included.
    """

    heads: Span
    kv_heads: Span
    inner: Span
    vocabulary: Span
    vocabulary_rows: int

    @classmethod
    def of(cls, model: ModelConfig, rank: int = 0, num_ranks: int = 1) -> Shard:
        """Raises:
        ConfigError: the model cannot be divided by so many.
        """
        check_divisible(model, num_ranks)
        rows = model.vocab_size
        if num_ranks > 1:
            rows = -(-rows // (num_ranks * VOCABULARY_MULTIPLE)) * VOCABULARY_MULTIPLE
        return cls(
            heads=Span.share(model.num_heads, rank, num_ranks),
            kv_heads=kv_heads_of(model.num_kv_heads, rank, num_ranks),
            inner=Span.share(model.intermediate_size, rank, num_ranks),
            vocabulary=vocabulary_of(model.vocab_size, rows, rank),
            vocabulary_rows=rows,
        )


def kv_heads_of(num_kv_heads: int, rank: int, num_ranks: int) -> Span:
    """Heads of keys and values of one rank: those that its heads of queries look at."""
    if num_kv_heads >= num_ranks:
        return Span.share(num_kv_heads, rank, num_ranks)
    head = rank * num_kv_heads // num_ranks
    return Span(head, head + 1, num_kv_heads)


def vocabulary_of(vocab_size: int, rows: int, rank: int) -> Span:
    """Token ids of one rank; of a small vocabulary the last may have none."""
    return Span(min(rank * rows, vocab_size), min((rank + 1) * rows, vocab_size), vocab_size)


def check_divisible(model: ModelConfig, num_ranks: int, setting: str = "tensor_parallel_size") -> None:
    """Args:
        setting: that the number comes from.

    Raises:
    ConfigError: the model cannot be divided by so many.
    """
    if reasons := _obstacles(model, num_ranks):
        fitting = [n for n in range(1, model.num_heads + 1) if not _obstacles(model, n)]
        raise ConfigError(
            f"{setting} is {num_ranks}, by which the model's {' and '.join(reasons)} cannot be divided; "
            f"set it to {' or '.join(map(str, fitting))}"
        )


def _obstacles(model: ModelConfig, num_ranks: int) -> list[str]:
    found = [
        f"{name} ({value})"
        for name, value in (("num_attention_heads", model.num_heads), ("intermediate_size", model.intermediate_size))
        if value % num_ranks
    ]
    if model.num_kv_heads % num_ranks and num_ranks % model.num_kv_heads:
        found.append(f"num_key_value_heads ({model.num_kv_heads})")
    return found
