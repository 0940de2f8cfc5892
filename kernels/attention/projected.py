"""From the projection of queries, keys and values to attention's result."""

from __future__ import annotations

from torch import Tensor

from pdray.kernels.attention.paged import AttentionMetadata, paged_attention
from pdray.kernels.attention.rotary_store import HeadOperations, rotate_and_store


def projected_attention(
    qkv: Tensor, heads: HeadOperations, positions: Tensor, kv_layer: Tensor, meta: AttentionMetadata, scale: float
) -> Tensor:
    """paged_attention() of what rotate_and_store() makes of ``qkv``; see there. Writes the tokens' KV into the layer.

    On CUDA one kernel where every sequence has one query token and that is faster; see choose_plan().

    Args:
        qkv: [T, (num_heads + 2 * num_kv_heads) * d]; on CUDA it may be overwritten.
        positions: [T] int64.

    Returns:
        [T, num_heads, d].
    """
    if qkv.is_cuda and len(qkv) == meta.num_decodes == len(meta.seq_lens):
        from pdray.kernels.attention.projected_decode_triton import plan_of, triton_projected_decode

        if (plan := plan_of(qkv, kv_layer, meta)) is not None:
            return triton_projected_decode(qkv, heads, positions, kv_layer, meta, scale, plan)
    q_norm, k_norm, eps, cos, sin, num_heads = heads
    q, k, v = rotate_and_store(
        qkv, q_norm, k_norm, eps, cos, sin, positions, kv_layer, meta.slot_mapping, num_heads
    )  # fmt: skip
    return paged_attention(q, kv_layer, meta, scale, k, v)
