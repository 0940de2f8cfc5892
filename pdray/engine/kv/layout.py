"""The layout of keys and values in memory: the one place that knows a pool's shape and bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pdray.models.model_config import ModelConfig
from pdray.models.shards import kv_heads_of


@dataclass(frozen=True, slots=True)
class KVLayout:
    """A block holds the keys, then the values, of ``block_size`` tokens of one layer.

    Two pools of equal layouts can exchange blocks byte by byte.

    Attributes:
        num_kv_heads: of one rank.
    """

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, model: ModelConfig, block_size: int, dtype: torch.dtype, num_ranks: int = 1) -> KVLayout:
        """A model's layout, the same on each rank."""
        num_kv_heads = kv_heads_of(model.num_kv_heads, 0, num_ranks).size
        return cls(model.num_layers, block_size, num_kv_heads, model.head_dim, dtype)

    @property
    def block_shape(self) -> tuple[int, int, int, int]:
        """Shape of one layer's block: [2, block_size, num_kv_heads, head_dim]."""
        return 2, self.block_size, self.num_kv_heads, self.head_dim

    def shape(self, num_blocks: int) -> tuple[int, ...]:
        """Shape of a pool: [num_layers, num_blocks, 2, block_size, num_kv_heads, head_dim]."""
        return self.num_layers, num_blocks, *self.block_shape

    @property
    def layer_block_bytes(self) -> int:
        """Bytes of one layer's block."""
        return 2 * self.block_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in all layers."""
        return self.num_layers * self.layer_block_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers."""
        return self.block_bytes // self.block_size

    def holds_layers(self, layers: range) -> bool:
        """Whether these are some of its layers."""
        return 0 <= layers.start < layers.stop <= self.num_layers

    def __str__(self) -> str:
        """A description that is the same for two layouts only if they are equal."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.num_layers}x{self.block_size}x{self.num_kv_heads}x{self.head_dim}-{dtype}"
