"""The decoder of the Llama, Qwen2 and Qwen3 families over a paged KV pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pdray.kernels.attention import AttentionMetadata, paged_attention
from pdray.kernels.embedding import embed
from pdray.kernels.layernorm import rms_norm
from pdray.kernels.linear import linear, pack_weight
from pdray.kernels.norm_linear import norm_linear
from pdray.kernels.rotary_store import rotate_and_store
from pdray.models.model_config import ModelConfig
from pdray.models.rope import build_rotary_table


@dataclass(slots=True)
class DecoderLayer:
    """Weights of one layer, projections as [out, in]; heads are laid out query, key, value and gate before up.

    Attributes:
        q_norm, k_norm: [head_dim], of models with qk_norm.
    """

    input_norm: torch.Tensor
    qkv_weight: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o_weight: torch.Tensor
    o_bias: torch.Tensor | None
    post_attention_norm: torch.Tensor
    gate_up_weight: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down_weight: torch.Tensor
    down_bias: torch.Tensor | None


class Decoder:
    """Weights of a model and its forward pass. Built with uninitialised weights; a loader fills parameters().

    Run it under torch.inference_mode. It keeps no state between calls, so that calls of several threads need only
    disjoint slots of the KV pool.

    Attributes:
        max_len: positions that the rotary table covers.
    """

    def __init__(self, config: ModelConfig, max_len: int, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.max_len = max_len
        self.dtype = dtype
        self.device = device
        self._scale = config.head_dim**-0.5
        self._cos, self._sin = build_rotary_table(config, max_len, device)
        self.embed_tokens = self._empty(config.vocab_size, config.hidden_size)
        self.layers = [self._empty_layer() for _ in range(config.num_layers)]
        self.norm = self._empty(config.hidden_size)
        tied = config.tie_word_embeddings
        self.lm_head = self.embed_tokens if tied else self._empty(config.vocab_size, config.hidden_size)

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _empty_layer(self) -> DecoderLayer:
        config = self.config
        hidden, inner = config.hidden_size, config.intermediate_size
        q_size = config.num_heads * config.head_dim
        qkv_size = q_size + 2 * config.num_kv_heads * config.head_dim
        return DecoderLayer(
            input_norm=self._empty(hidden),
            qkv_weight=self._empty(qkv_size, hidden),
            qkv_bias=self._empty(qkv_size) if config.qkv_bias else None,
            q_norm=self._empty(config.head_dim) if config.qk_norm else None,
            k_norm=self._empty(config.head_dim) if config.qk_norm else None,
            o_weight=self._empty(hidden, q_size),
            o_bias=self._empty(hidden) if config.o_bias else None,
            post_attention_norm=self._empty(hidden),
            gate_up_weight=self._empty(2 * inner, hidden),
            gate_up_bias=self._empty(2 * inner) if config.mlp_bias else None,
            down_weight=self._empty(hidden, inner),
            down_bias=self._empty(hidden) if config.mlp_bias else None,
        )

    def parameters(self) -> dict[str, torch.Tensor]:
        """Every parameter under its Hugging Face name; parts of fused tensors are views to be written into.

        A tied lm_head.weight is not listed. After pack_weights() what was packed comes as copies, for reading only.
        """
        config = self.config
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        named: dict[str, torch.Tensor | None] = {"model.embed_tokens.weight": self.embed_tokens}
        for i, layer in enumerate(self.layers):
            prefix = f"model.layers.{i}."
            named[prefix + "input_layernorm.weight"] = layer.input_norm
            named[prefix + "post_attention_layernorm.weight"] = layer.post_attention_norm
            named[prefix + "self_attn.q_norm.weight"] = layer.q_norm
            named[prefix + "self_attn.k_norm.weight"] = layer.k_norm
            named[prefix + "self_attn.o_proj.weight"] = _dense(layer.o_weight)
            named[prefix + "self_attn.o_proj.bias"] = layer.o_bias
            named[prefix + "mlp.down_proj.weight"] = _dense(layer.down_weight)
            named[prefix + "mlp.down_proj.bias"] = layer.down_bias
            for kind, qkv, gate_up in (
                ("weight", _dense(layer.qkv_weight), _dense(layer.gate_up_weight)),
                ("bias", layer.qkv_bias, layer.gate_up_bias),
            ):
                if qkv is not None:
                    parts = qkv.split((q_size, kv_size, kv_size))
                    for name, part in zip("qkv", parts, strict=True):
                        named[f"{prefix}self_attn.{name}_proj.{kind}"] = part
                if gate_up is not None:
                    named[f"{prefix}mlp.gate_proj.{kind}"], named[f"{prefix}mlp.up_proj.{kind}"] = gate_up.chunk(2)
        named["model.norm.weight"] = self.norm
        if not config.tie_word_embeddings:
            named["lm_head.weight"] = _dense(self.lm_head)
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def pack_weights(self) -> None:
        """Bring the loaded weights into the layout that the device's linear() likes best; call it once, after loading.

        Replaces tensors one at a time. A tied output matrix becomes a copy of its own where the layout differs.
        """
        for layer in self.layers:
            layer.qkv_weight = pack_weight(layer.qkv_weight)
            layer.o_weight = pack_weight(layer.o_weight)
            layer.gate_up_weight = pack_weight(layer.gate_up_weight)
            layer.down_weight = pack_weight(layer.down_weight)
        self.lm_head = pack_weight(self.lm_head)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv: torch.Tensor,
        meta: AttentionMetadata,
        on_layer: Callable[[int], None] | None = None,
        sampled: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states after the final norm, of every token or of ``rows``; writes the tokens' KV into kv.

        Args:
            input_ids: [T] int64; -1 - i stands for sampled[i].
            positions: [T] int64, below max_len.
            kv: [num_layers, num_blocks, 2, block_size, num_kv_heads, head_dim].
            on_layer: called with i as soon as layer i's KV is stored and its attention done (on CUDA: enqueued).
            sampled: [R] int64; needed where an id is below 0.
            rows: [S] int64, tokens. The last layer computes nothing but KV for others.

        Returns:
            [T, hidden_size], or [S, hidden_size].
        """
        eps = self.config.rms_norm_eps
        hidden = embed(input_ids, self.embed_tokens, input_ids[:0] if sampled is None else sampled)
        for i, layer in enumerate(self.layers):
            qkv = norm_linear(hidden, layer.input_norm, eps, layer.qkv_weight, layer.qkv_bias)
            attended = self._attention(layer, qkv, positions, kv[i], meta)
            if rows is not None and i == len(self.layers) - 1:
                attended, hidden = attended[rows], hidden[rows]
            hidden = linear(attended, layer.o_weight, layer.o_bias, residual=hidden)
            if on_layer is not None:
                on_layer(i)
            gate_up = layer.gate_up_weight, layer.gate_up_bias
            inner = norm_linear(hidden, layer.post_attention_norm, eps, *gate_up, gated=True)
            hidden = linear(inner, layer.down_weight, layer.down_bias, residual=hidden)
        return rms_norm(hidden, self.norm, eps)

    def _attention(
        self,
        layer: DecoderLayer,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        kv_layer: torch.Tensor,
        meta: AttentionMetadata,
    ) -> torch.Tensor:
        config = self.config
        table = self._cos, self._sin, positions
        q, k, v = rotate_and_store(
            qkv, layer.q_norm, layer.k_norm, config.rms_norm_eps, *table, kv_layer, meta.slot_mapping, config.num_heads
        )
        attended = paged_attention(q, kv_layer, meta, self._scale, k, v)
        return attended.reshape(-1, config.num_heads * config.head_dim)

    @torch.inference_mode()
    def run_products(self, num_tokens: int) -> None:
        """One layer's matrix products over so many zeros: loads the kernels that the library picks for this size."""
        layer, eps = self.layers[0], self.config.rms_norm_eps
        hidden = torch.zeros(num_tokens, self.config.hidden_size, dtype=self.dtype, device=self.device)
        norm_linear(hidden, layer.input_norm, eps, layer.qkv_weight, layer.qkv_bias)
        attended = hidden.new_zeros(num_tokens, self.config.num_heads * self.config.head_dim)
        hidden = linear(attended, layer.o_weight, layer.o_bias, residual=hidden)
        gate_up = layer.gate_up_weight, layer.gate_up_bias
        inner = norm_linear(hidden, layer.post_attention_norm, eps, *gate_up, gated=True)
        linear(inner, layer.down_weight, layer.down_bias, residual=hidden)

    def compute_logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[M, hidden_size] -> [M, vocab_size] in the model's dtype, into ``out`` where it is given (CUDA)."""
        if hidden.is_cuda:  # one product whether there is an ``out`` or not: a graph draws what an eager step draws
            return torch.mm(hidden, self.lm_head.t(), out=out)
        return linear(hidden, self.lm_head)


def _dense(weight: torch.Tensor) -> torch.Tensor:
    return weight.to_dense() if weight.is_mkldnn else weight
