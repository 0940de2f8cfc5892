"""Paged attention of one query token for each sequence (Flash-Decoding).

The keys are split over ``num_splits`` programs, whose partial results a second kernel merges by their log-sum-exp.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdray.kernels.attention.online_softmax_triton import LOG2_E, MIN_DOT_ROWS, Tiles, attend
from pdray.kernels.attention.paged import AttentionMetadata
from pdray.kernels.crossover import DECODE_MAX_SPLITS, DECODE_MIN_TOKENS_PER_SPLIT
from pdray.kernels.dependent_launch import begin, dependent_launch
from pdray.kernels.processors import num_processors


@triton.jit
def decode_kernel(
    q_ptr,
    kv_ptr,
    partial_ptr,  # [B, Hq, num_splits, HEAD_DIM] float32, normalised; of one split, the result itself
    lse_ptr,  # [B, Hq, num_splits] float32, base 2; -inf for an empty split
    table_ptr,
    seq_lens_ptr,
    scale_log2,
    stride_q_token,
    stride_q_head,
    stride_token,
    stride_table,
    num_splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    program = tl.program_id(0)
    split = program % num_splits
    kv_head = program // num_splits % KV_HEADS
    sequence = program // num_splits // KV_HEADS
    kv_len = tl.load(seq_lens_ptr + sequence)
    per_split = tl.cdiv(tl.cdiv(kv_len, num_splits), BLOCK_N) * BLOCK_N
    start = split * per_split
    end = tl.minimum(start + per_split, kv_len)
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + rows
    io_mask = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q_row = sequence.to(tl.int64) * stride_q_token + head * stride_q_head
    begin(DEPENDENT)
    q = tl.load(q_ptr + q_row[:, None] + dims[None, :], mask=io_mask, other=0.0)

    visible = tl.zeros([ROWS], tl.int32) + kv_len
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc, row_max, row_sum = attend(
        acc, row_max, row_sum, q, visible, start, end, kv_ptr + kv_head * HEAD_DIM,
        table_ptr + sequence.to(tl.int64) * stride_table, stride_token, scale_log2,
        BLOCK_SIZE, BLOCK_N, HEAD_DIM, BLOCK_D, True,
    )  # fmt: skip
    divisor = tl.where(row_sum > 0, row_sum, 1.0)
    if WHOLE:
        out_row = (sequence.to(tl.int64) * KV_HEADS * GROUP + head) * HEAD_DIM
        result = (acc / divisor[:, None]).to(partial_ptr.dtype.element_ty)
        tl.store(partial_ptr + out_row[:, None] + dims[None, :], result, mask=io_mask)
    else:
        lse = tl.where(row_sum > 0, row_max + tl.log2(divisor), float("-inf"))
        index = (sequence.to(tl.int64) * KV_HEADS * GROUP + head) * num_splits + split
        tl.store(lse_ptr + index, lse, mask=rows < GROUP)
        tl.store(partial_ptr + index[:, None] * HEAD_DIM + dims[None, :], acc / divisor[:, None], mask=io_mask)


@triton.jit
def merge_kernel(
    partial_ptr,
    lse_ptr,
    out_ptr,
    stride_out_token,
    stride_out_head,
    num_splits,
    HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One head of one sequence: the splits' results, weighted by their share of the softmax."""
    begin(DEPENDENT)
    head = tl.program_id(0) % HEADS
    sequence = tl.program_id(0) // HEADS
    split = tl.arange(0, SPLITS)
    dims = tl.arange(0, BLOCK_D)
    index = (sequence.to(tl.int64) * HEADS + head) * num_splits + split
    lse = tl.load(lse_ptr + index, mask=split < num_splits, other=float("-inf"))
    largest = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(largest == float("-inf"), 0.0, largest))
    mask = (split < num_splits)[:, None] & (dims < HEAD_DIM)[None, :]
    partial = tl.load(partial_ptr + index[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
    total = tl.sum(weights, 0)
    result = tl.sum(partial * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    out_row = sequence.to(tl.int64) * stride_out_token + head * stride_out_head
    tl.store(out_ptr + out_row + dims, result.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


def launch_decode(
    q: Tensor,
    kv_layer: Tensor,
    meta: AttentionMetadata,
    scale: float,
    out: Tensor,
    num_splits: int | None,
    tiles: Tiles | None,
) -> None:
    """Attention of the first ``num_decodes`` sequences."""
    _, _, block_size, num_kv_heads, head_dim = kv_layer.shape
    num_heads = q.shape[1]
    group = num_heads // num_kv_heads
    batch = meta.num_decodes
    if num_splits is None:
        num_splits = choose_num_splits(
            batch * num_kv_heads, meta.block_tables.shape[1] * block_size, num_processors(q.device)
        )
    if tiles is None:
        tiles = Tiles(0, 32, 4, 2) if q.element_size() == 4 else Tiles(0, 64, 4, 3)
    partial, lse = make_partial(out, batch, num_splits)
    block_d = max(MIN_DOT_ROWS, triton.next_power_of_2(head_dim))
    decode_kernel[(num_splits * num_kv_heads * batch,)](
        q, kv_layer, partial, lse, meta.block_tables, meta.seq_lens, scale * LOG2_E,
        q.stride(0), q.stride(1), kv_layer.stride(2), meta.block_tables.stride(0), num_splits,
        KV_HEADS=num_kv_heads, GROUP=group, ROWS=max(MIN_DOT_ROWS, triton.next_power_of_2(group)),
        BLOCK_SIZE=block_size, BLOCK_N=tiles.block_n, HEAD_DIM=head_dim, BLOCK_D=block_d, WHOLE=lse is None,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **dependent_launch(q.device),
    )  # fmt: skip
    if lse is not None:
        launch_merge(partial, lse, out)


def make_partial(out: Tensor, batch: int, num_splits: int) -> tuple[Tensor, Tensor | None]:
    """What so many sequences' splits write, and launch_merge() makes ``out`` [B.., Hq, d] of; one split writes it."""
    if num_splits == 1:
        return out, None
    _, num_heads, head_dim = out.shape
    shape = batch, num_heads, num_splits
    lse = torch.empty(shape, dtype=torch.float32, device=out.device)
    return torch.empty(*shape, head_dim, dtype=torch.float32, device=out.device), lse


def launch_merge(partial: Tensor, lse: Tensor, out: Tensor) -> None:
    """The results of a sequence's splits, [B, Hq, num_splits, d] and as decode_kernel leaves them, to [B.., Hq, d]."""
    batch, num_heads, num_splits, head_dim = partial.shape
    merge_kernel[(num_heads * batch,)](
        partial, lse, out, out.stride(0), out.stride(1), num_splits,
        HEADS=num_heads, SPLITS=triton.next_power_of_2(num_splits), HEAD_DIM=head_dim,
        BLOCK_D=max(MIN_DOT_ROWS, triton.next_power_of_2(head_dim)), num_warps=4, **dependent_launch(out.device),
    )  # fmt: skip


def choose_num_splits(num_programs: int, max_kv_len: int, num_processors: int) -> int:
    """How many programs share one sequence's keys, none of them fewer than DECODE_MIN_TOKENS_PER_SPLIT at max_kv_len.

    By sweeps on one H100, 640 to 8,192 tokens a sequence: a small grid is best with nearly four programs a processor,
    which run at once; a few more than that are a second round of them. From three quarters of a program a processor on
    two splits are as fast, and merged sooner; from one and a half on whole sequences are.
    """
    if 4 * num_programs < 3 * num_processors:
        wanted = 4 * num_processors // num_programs
    else:
        wanted = 2 if 2 * num_programs < 3 * num_processors else 1
    return max(1, min(wanted, DECODE_MAX_SPLITS, max_kv_len // DECODE_MIN_TOKENS_PER_SPLIT))
