"""Attention of a tile of query rows over a sequence's paged keys, by an online softmax.

Dao et al. 2022, FlashAttention, algorithm 1. The query heads that share a KV head are packed into the rows of one tile,
so that each key is loaded once per KV head.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
MIN_DOT_ROWS = 16  # tl.dot wants at least so many


class Tiles(NamedTuple):
    """rows: query rows of a prefill program (a decode program has one KV head's). block_n: keys at a time."""

    rows: int
    block_n: int
    num_warps: int
    num_stages: int


@triton.jit
def load_tile(
    kv_ptr,
    table_ptr,
    first,
    end,
    stride_token,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Keys and values [BLOCK_N, BLOCK_D] from token ``first`` on; masked: zeros from ``end`` on; see attend()."""
    dims = tl.arange(0, BLOCK_D)
    token = first + tl.arange(0, BLOCK_N)
    if MASKED:
        valid = token < end
        block = tl.load(table_ptr + token // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
        load_mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
    else:
        block = tl.load(table_ptr + token // BLOCK_SIZE).to(tl.int64)
        load_mask = (token >= 0)[:, None] & (dims < HEAD_DIM)[None, :]
    row = block * (2 * BLOCK_SIZE) + token % BLOCK_SIZE
    k_ptr = kv_ptr + (row * stride_token)[:, None] + dims[None, :]
    k = tl.load(k_ptr, mask=load_mask, other=0.0)
    v = tl.load(k_ptr + BLOCK_SIZE * stride_token, mask=load_mask, other=0.0)
    return k, v


@triton.jit
def absorb(acc, row_max, row_sum, q, k, v, first, visible, scale_log2, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    """One step of the online softmax, over a tile of keys and values. Arguments: attend()."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    if MASKED:
        token = first + tl.arange(0, BLOCK_N)
        scores = tl.where(token[None, :] < visible[:, None], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # A row that has seen no key keeps -inf; -inf - -inf is replaced by -inf - 0.
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - base[:, None])
    rescale = tl.exp2(row_max - base)
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return acc, new_max, row_sum


@triton.jit
def attend(
    acc,  # [ROWS, BLOCK_D] float32, numerators so far
    row_max,  # [ROWS] float32, base-2 logits
    row_sum,  # [ROWS] float32
    q,  # [ROWS, BLOCK_D]
    visible,  # [ROWS] how many keys each row sees
    start,
    end,
    kv_ptr,  # the layer, advanced to the KV head
    table_ptr,  # the sequence's blocks
    stride_token,  # the layer is contiguous: [block, key or value, token, head, dim]
    scale_log2,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Continue the online softmax over keys start..end. Unmasked: every row sees them all, whole tiles only."""
    for first in range(start, end, BLOCK_N):
        k, v = load_tile(kv_ptr, table_ptr, first, end, stride_token, BLOCK_SIZE, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
        acc, row_max, row_sum = absorb(acc, row_max, row_sum, q, k, v, first, visible, scale_log2, BLOCK_N, MASKED)
    return acc, row_max, row_sum
