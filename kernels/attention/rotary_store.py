"""The operations between the query-key-value product and attention: head norms, rotary embedding, KV store."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pdray.kernels.attention.rotary import apply_rotary
from pdray.kernels.elementwise.rms_norm import rms_norm
from pdray.kernels.kv.blocks import store_kv


class Heads(NamedTuple):
    """Attributes:
    q: [T, num_heads, d]. k, v: [T, num_kv_heads, d], which are in the cache too. d is contiguous.
    """

    q: Tensor
    k: Tensor
    v: Tensor


class HeadOperations(NamedTuple):
    """What a layer does to projected heads before attention: the arguments of rotate_and_store() of these names."""

    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    cos: Tensor
    sin: Tensor
    num_heads: int


def rotate_and_store(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    kv_layer: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
) -> Heads:
    """Normalise and rotate queries and keys, and write keys and values into their slots of one layer.

    On CUDA one kernel, which rounds wherever rms_norm(), apply_rotary() and store_kv() one by one would.

    Args:
        qkv: [T, (num_heads + 2 * num_kv_heads) * d], heads of queries, keys, values; on CUDA overwritten.
        q_norm, k_norm: [d], of models that normalise each head; both or neither.
        cos, sin: [max_len, d / 2] float32, of all positions.
        positions: [T] int64.
        kv_layer: [num_blocks, 2, block_size, num_kv_heads, d]; written in place.
        slot_mapping: [T] int64; see store_kv.

    Returns:
        The normalised and rotated heads; on CUDA views of ``qkv``.
    """
    assert (q_norm is None) == (k_norm is None)
    num_kv_heads, head_dim = kv_layer.shape[-2:]
    heads = qkv.view(-1, num_heads + 2 * num_kv_heads, head_dim)
    if qkv.is_cuda:
        from pdray.kernels.attention.rotary_store_triton import triton_rotate_and_store

        triton_rotate_and_store(qkv, q_norm, k_norm, eps, cos, sin, positions, kv_layer, slot_mapping, num_heads)
        return Heads(*heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1))
    qk, v = heads[:, : num_heads + num_kv_heads], heads[:, num_heads + num_kv_heads :]
    if q_norm is not None and k_norm is not None:
        normed = rms_norm(qk[:, :num_heads], q_norm, eps), rms_norm(qk[:, num_heads:], k_norm, eps)
        qk = torch.cat(normed, dim=1)
    qk = apply_rotary(qk, cos[positions], sin[positions])
    q, k = qk[:, :num_heads], qk[:, num_heads:]
    store_kv(k, v, kv_layer, slot_mapping)
    return Heads(q, k, v)
