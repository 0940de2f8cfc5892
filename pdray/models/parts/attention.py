"""Attention with rotary embedding over a paged KV pool."""

from __future__ import annotations

import torch

from pdray.kernels.attention.paged import AttentionMetadata
from pdray.kernels.attention.projected import projected_attention
from pdray.kernels.attention.rotary_store import HeadOperations
from pdray.models.model_config import ModelConfig
from pdray.models.parts.linear import Linear, summed_linear
from pdray.models.parts.norm import RMSNorm
from pdray.models.parts.part import Part, Placement
from pdray.models.rope import RotaryTable
from pdray.models.shards import Span


class Attention(Part):
    """Projections of queries, keys and values, norms of the heads where the model has them, and the output product.

    Attributes:
        qkv: heads of queries, keys, values. o: the output product, which callers apply: see DecoderLayer.
        q_norm, k_norm: over each head, of models with qk_norm.
    """

    def __init__(self, config: ModelConfig, rotary: RotaryTable, placement: Placement) -> None:
        super().__init__()
        head_dim, eps, hidden = config.head_dim, config.rms_norm_eps, Span.all_of(config.hidden_size)
        shard = placement.shard(config)
        queries, keys = shard.heads.times(head_dim), shard.kv_heads.times(head_dim)
        self._num_heads = shard.heads.size
        self._scale = head_dim**-0.5
        self._eps = eps
        self._rotary = rotary
        sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        self.qkv = self.add("", Linear(sizes, hidden, placement, bias=config.qkv_bias))
        self.o = self.add("", summed_linear({"o_proj": hidden}, queries, placement, bias=config.o_bias))
        self.q_norm = self.add("q_norm", RMSNorm(head_dim, eps, placement)) if config.qk_norm else None
        self.k_norm = self.add("k_norm", RMSNorm(head_dim, eps, placement)) if config.qk_norm else None

    def __call__(
        self,
        hidden: torch.Tensor,
        norm: RMSNorm,
        positions: torch.Tensor,
        kv_layer: torch.Tensor,
        meta: AttentionMetadata,
    ) -> torch.Tensor:
        """Attention of every token, before the output product; writes the tokens' keys and values into the pool.

        Args:
            hidden: [T, hidden_size]; ``norm`` is applied to it first.
            positions: [T] int64.
            kv_layer: [num_blocks, 2, block_size, num_kv_heads, head_dim], of this rank's heads.

        Returns:
            [T, num_heads * head_dim], of this rank's heads.
        """
        return self.of_projected(self.qkv.of_normed(hidden, norm), positions, kv_layer, meta)

    def of_projected(
        self, qkv: torch.Tensor, positions: torch.Tensor, kv_layer: torch.Tensor, meta: AttentionMetadata
    ) -> torch.Tensor:
        """The same, of heads of queries, keys and values, [T, all of them * head_dim], before their norms."""
        q_norm, k_norm = (None if each is None else each.weight for each in (self.q_norm, self.k_norm))
        heads = HeadOperations(q_norm, k_norm, self._eps, *self._rotary, self._num_heads)
        attended = projected_attention(qkv, heads, positions, kv_layer, meta, self._scale)
        return attended.reshape(len(qkv), self.o.in_features)
