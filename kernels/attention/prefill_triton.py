"""Paged attention of prompts and chunks of prompts: one program for each (tile of query tokens, KV head).

A program finds its sequence by binary search (as vLLM's unified attention does); tiles that need no mask come first.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pdray.kernels.attention.online_softmax_triton import LOG2_E, MIN_DOT_ROWS, Tiles, attend
from pdray.kernels.attention.paged import AttentionMetadata, FreshSplit
from pdray.kernels.dependent_launch import begin, dependent_launch


@triton.jit(do_not_specialize=["num_decodes", "num_sequences"])
def prefill_kernel(
    q_ptr,
    kv_ptr,
    out_ptr,
    table_ptr,
    cu_seqlens_q_ptr,
    seq_lens_ptr,
    num_decodes,
    num_sequences,  # decodes included
    count_ptr,  # the same, where the device knows it
    scale_log2,
    stride_q_token,
    stride_q_head,
    stride_out_token,
    stride_out_head,
    stride_token,
    stride_table,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COUNTED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if COUNTED:
        num_sequences = tl.load(count_ptr)
    TOKENS: tl.constexpr = ROWS // GROUP
    place = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    kv_head = tl.program_id(1)
    # Sequence i's tiles begin at (its first row) // TOKENS + i, which leaves room for all of them.
    base = tl.load(cu_seqlens_q_ptr + num_decodes)
    sequence = num_decodes
    above = num_sequences
    while sequence + 1 < above:
        middle = (sequence + above) // 2
        begins = (tl.load(cu_seqlens_q_ptr + middle) - base) // TOKENS + middle - num_decodes
        if begins <= place:
            sequence = middle
        else:
            above = middle
    first_row = tl.load(cu_seqlens_q_ptr + sequence)
    query_len = tl.load(cu_seqlens_q_ptr + sequence + 1) - first_row
    tile = place - (first_row - base) // TOKENS - (sequence - num_decodes)
    begin(DEPENDENT)  # lengths and block tables, above and below, were there before the step's first kernel
    if tile * TOKENS < query_len:
        kv_len = tl.load(seq_lens_ptr + sequence)
        rows = tl.arange(0, ROWS)
        dims = tl.arange(0, BLOCK_D)
        query = tile * TOKENS + rows // GROUP
        head = kv_head * GROUP + rows % GROUP
        row_valid = (rows < TOKENS * GROUP) & (query < query_len)
        io_mask = row_valid[:, None] & (dims < HEAD_DIM)[None, :]
        q_row = (first_row + query).to(tl.int64) * stride_q_token + head * stride_q_head
        q = tl.load(q_ptr + q_row[:, None] + dims[None, :], mask=io_mask, other=0.0)

        context = kv_len - query_len
        visible = tl.minimum(context + query + 1, kv_len)
        end = tl.minimum(context + (tile + 1) * TOKENS, kv_len)
        unmasked_end = (context + tile * TOKENS + 1) // BLOCK_N * BLOCK_N
        kv_ptr += kv_head * HEAD_DIM
        table_ptr += sequence.to(tl.int64) * stride_table
        acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
        row_max = tl.full([ROWS], float("-inf"), tl.float32)
        row_sum = tl.zeros([ROWS], tl.float32)
        acc, row_max, row_sum = attend(
            acc, row_max, row_sum, q, visible, 0, unmasked_end, kv_ptr, table_ptr, stride_token, scale_log2,
            BLOCK_SIZE, BLOCK_N, HEAD_DIM, BLOCK_D, False,
        )  # fmt: skip
        acc, row_max, row_sum = attend(
            acc, row_max, row_sum, q, visible, unmasked_end, end, kv_ptr, table_ptr, stride_token, scale_log2,
            BLOCK_SIZE, BLOCK_N, HEAD_DIM, BLOCK_D, True,
        )  # fmt: skip
        out_row = (first_row + query).to(tl.int64) * stride_out_token + head * stride_out_head
        result = acc / row_sum[:, None]
        tl.store(out_ptr + out_row[:, None] + dims[None, :], result.to(out_ptr.dtype.element_ty), mask=io_mask)


def launch_prefill(
    q: Tensor,
    kv_layer: Tensor,
    meta: AttentionMetadata,
    num_sequences: int,
    scale: float,
    out: Tensor,
    tiles: Tiles | None,
    split: FreshSplit | None = None,
) -> None:
    """Attention of the sequences between the decodes and ``num_sequences``.

    Args:
        split: of these, only the older ones.
    """
    _, _, block_size, num_kv_heads, head_dim = kv_layer.shape
    group = q.shape[1] // num_kv_heads
    if tiles is None:
        tiles = Tiles(64, 32, 8, 2) if q.element_size() == 4 else Tiles(64, 64, 4, 2)
    rows = max(tiles.rows, triton.next_power_of_2(group))
    tokens = rows // group
    is_all = num_sequences == len(meta.seq_lens)
    num_tokens = len(q) - meta.num_decodes if is_all else sum(meta.query_lens[meta.num_decodes : num_sequences])
    grid = (num_tokens // tokens + num_sequences - meta.num_decodes, num_kv_heads)
    starts, count = (meta.cu_seqlens_q, None) if split is None else (split.older_starts, split.num_older)
    prefill_kernel[grid](
        q, kv_layer, out, meta.block_tables, starts, meta.seq_lens, meta.num_decodes, num_sequences, count,
        scale * LOG2_E, q.stride(0), q.stride(1), out.stride(0), out.stride(1), kv_layer.stride(2),
        meta.block_tables.stride(0),
        GROUP=group, ROWS=rows, BLOCK_SIZE=block_size, BLOCK_N=tiles.block_n, HEAD_DIM=head_dim,
        BLOCK_D=max(MIN_DOT_ROWS, triton.next_power_of_2(head_dim)), COUNTED=count is not None,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **dependent_launch(q.device),
    )  # fmt: skip
