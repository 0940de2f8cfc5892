"""The decoder of the Llama, Qwen2 and Qwen3 families over a paged KV pool: a loop over its parts."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pdray.kernels.attention.paged import AttentionMetadata
from pdray.kernels.collective.group import RankGroup
from pdray.models.arena import Arena
from pdray.models.halves import is_worth_halves, run_in_halves
from pdray.models.model_config import ModelConfig
from pdray.models.parts.attention import Attention
from pdray.models.parts.embedding import make_embedding, make_head
from pdray.models.parts.linear import Linear
from pdray.models.parts.mlp import GatedMLP
from pdray.models.parts.norm import RMSNorm
from pdray.models.parts.part import Part, Placement
from pdray.models.rope import RotaryTable, build_rotary_table


class DecoderLayer(Part):
    """Attention and feed-forward, each behind a norm and added to its input."""

    def __init__(self, config: ModelConfig, rotary: RotaryTable, placement: Placement) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_norm = self.add("input_layernorm", RMSNorm(hidden, eps, placement))
        self.attention = self.add("self_attn", Attention(config, rotary, placement))
        self.post_attention_norm = self.add("post_attention_layernorm", RMSNorm(hidden, eps, placement))
        self.mlp = self.add("mlp", GatedMLP(config, placement))

    def attend(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        kv_layer: torch.Tensor,
        meta: AttentionMetadata,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The first half, [T, hidden_size], or of ``rows`` alone; see Decoder.forward."""
        attended = self.attention(hidden, self.input_norm, positions, kv_layer, meta)
        if rows is not None:
            attended, hidden = attended[rows], hidden[rows]
        return self.attention.o(attended, residual=hidden)

    def feed_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The second half, [M, hidden_size]."""
        return self.mlp(hidden, self.post_attention_norm)

    def linears(self) -> list[Linear]:
        """Every matrix product, in the order of a step."""
        return [self.attention.qkv, self.attention.o, self.mlp.gate_up, self.mlp.down]

    def run_products(self, hidden: torch.Tensor) -> None:
        """Every matrix product, and nothing else; see Decoder.run_products."""
        self.attention.qkv.of_normed(hidden, self.input_norm)
        attended = hidden.new_zeros(len(hidden), self.attention.o.in_features)
        self.feed_forward(self.attention.o(attended, residual=hidden))


def shapes_of_layer(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> DecoderLayer:
    """A layer on the device "meta": its parts have shapes and no values."""
    placement = Placement(dtype, torch.device("meta"))
    half = config.head_dim // 2
    return DecoderLayer(config, RotaryTable(placement.empty(0, half), placement.empty(0, half)), placement)


def num_weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Size of the arena that a decoder's weights fill."""
    arena = Arena.unlimited()
    Decoder(config, 1, dtype, torch.device("meta"), arena)
    return arena.num_bytes


class Decoder(Part):
    """Weights of a model and its forward pass. Built with uninitialised weights; a loader fills parameters().

    Run it under torch.inference_mode. It keeps no state between calls, so that calls of several threads need only
    disjoint slots of the KV pool.

    Args:
        arena: that holds the weights, on ``device``; default: torch's own memory.
        group: ranks that share the model, of which this process is one. All must make the same calls, in one order.

    Attributes:
        max_len: positions that the rotary table covers. shard: what this rank has of the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
        arena: Arena | None = None,
        group: RankGroup | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.max_len = max_len
        self.dtype = dtype
        self.device = device
        self.group = group
        self.num_ranks = 1 if group is None else group.size
        placement = Placement(dtype, device, arena, group)
        self.shard = placement.shard(config)
        rotary = build_rotary_table(config, max_len, device)
        self.embed_tokens = self.add("model.embed_tokens", make_embedding(config, placement))
        self.layers = [
            self.add(f"model.layers.{i}", DecoderLayer(config, rotary, placement)) for i in range(config.num_layers)
        ]
        self.norm = self.add("model.norm", RMSNorm(config.hidden_size, config.rms_norm_eps, placement))
        self.lm_head = self.add("lm_head", make_head(config, placement, self.embed_tokens))

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv: torch.Tensor,
        meta: AttentionMetadata,
        on_layer: Callable[[int], None] | None = None,
        sampled: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        *,
        is_rehearsal: bool = False,
    ) -> torch.Tensor:
        """Hidden states after the final norm, of every token or of ``rows``; writes the tokens' KV into kv.

        Args:
            input_ids: [T] int64; -1 - i stands for sampled[i].
            positions: [T] int64, below max_len.
            kv: [num_layers, num_blocks, 2, block_size, num_kv_heads, head_dim], of this rank's heads.
            on_layer: called with i as soon as layer i's KV is stored, on every rank, and its attention done (on CUDA:
                enqueued).
            sampled: [R] int64; needed where an id is below 0.
            rows: [S] int64, tokens. The last layer computes nothing but KV for others.
            is_rehearsal: run the first and the last layer alone, which load every kernel that the others use. The
                result means nothing.

        Returns:
            [T, hidden_size], or [S, hidden_size].
        """
        hidden = self.embed_tokens(input_ids, sampled)
        last = len(self.layers) - 1
        order = sorted({0, last}) if is_rehearsal else list(range(last + 1))
        if is_worth_halves(hidden, self.group):
            hidden = run_in_halves(self.layers, order[:-1], hidden, positions, kv, meta, on_layer)
            order = [last]
        for i in order:
            layer = self.layers[i]
            hidden = layer.attend(hidden, positions, kv[i], meta, rows if i == last else None)
            if i == last and self.group is not None and not len(hidden):
                self.group.sum(hidden.new_zeros(1))  # of no rows there was no sum: on_layer speaks for all ranks
            if on_layer is not None:
                on_layer(i)
            hidden = layer.feed_forward(hidden)
        return self.norm(hidden)

    @torch.inference_mode()
    def run_products(self, num_tokens: int) -> None:
        """One layer's matrix products over so many zeros: loads the kernels that the library picks for this size."""
        hidden = torch.zeros(num_tokens, self.config.hidden_size, dtype=self.dtype, device=self.device)
        self.layers[0].run_products(hidden)
        if is_worth_halves(hidden, self.group):
            for half in hidden.chunk(2):
                self.layers[0].run_products(half)

    def compute_logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[M, hidden_size] -> [M, vocab_size] in the model's dtype, into ``out`` where it is given (CUDA).

        Of several ranks the first one alone gets them: the others get no rows.
        """
        return self.lm_head(hidden, out)
