"""From the projection of queries, keys and values to attention's result."""

from __future__ import annotations

from torch import Tensor

from pdray.kernels.attention.paged import AttentionMetadata, paged_attention
from pdray.kernels.attention.rotary_store import HeadOperations, rotate_and_store
from pdray.kernels.crossover import MERGED_ROW_MAX_WEIGHT_ELEMENTS


def projected_attention(
    qkv: Tensor, heads: HeadOperations, positions: Tensor, kv_layer: Tensor, meta: AttentionMetadata, scale: float
) -> Tensor:
    """paged_attention() of what rotate_and_store() makes of ``qkv``; see there. Writes the tokens' KV into the layer.

    On CUDA one kernel where every sequence has one query token.

    Args:
        qkv: [T, (num_heads + 2 * num_kv_heads) * d]; on CUDA it may be overwritten.
        positions: [T] int64.

    Returns:
        [T, num_heads, d].
    """
    if qkv.is_cuda and len(qkv) == meta.num_decodes == len(meta.seq_lens):
        from pdray.kernels.attention.projected_decode_triton import triton_projected_decode

        return triton_projected_decode(qkv, heads, positions, kv_layer, meta, scale)
    q_norm, k_norm, eps, cos, sin, num_heads = heads
    arguments = q_norm, k_norm, eps, cos, sin, positions, kv_layer, meta.slot_mapping, num_heads
    q, k, v = rotate_and_store(qkv, *arguments)
    return paged_attention(q, kv_layer, meta, scale, k, v)


def can_project_row(hidden: Tensor, weight: Tensor, meta: AttentionMetadata) -> bool:
    """Whether projected_row() takes this step and this output product, whose weight is small."""
    return (
        hidden.is_cuda
        and len(hidden) == meta.num_decodes == len(meta.seq_lens) == 1
        and hidden.element_size() == 2
        and weight.numel() <= MERGED_ROW_MAX_WEIGHT_ELEMENTS
    )


def projected_row(
    qkv: Tensor,
    heads: HeadOperations,
    positions: Tensor,
    kv_layer: Tensor,
    meta: AttentionMetadata,
    scale: float,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
) -> Tensor:
    """linear(projected_attention(...), weight, bias, residual) where can_project_row(); [1, N].

    The product merges what the programs that share the sequence have found, which is a kernel less.
    """
    from pdray.kernels.attention.projected_decode_triton import launch_splits, row_plan
    from pdray.kernels.linear.merged_row_triton import triton_merged_linear

    num_splits, min_tiles = row_plan(meta.block_tables.shape[1] * kv_layer.shape[2])
    results = launch_splits(
        qkv, heads, positions, kv_layer, meta, scale, num_splits=num_splits, min_tiles=min_tiles, as_parts=True
    )
    assert not isinstance(results, Tensor)
    return triton_merged_linear(results, weight, bias, residual)
