"""Paged attention on CUDA: the Triton counterpart of torch_paged_attention.

Both kernels walk a sequence's keys in tiles with an online softmax (Dao et al. 2022, FlashAttention, algorithm 1) and
pack the query heads that share a KV head into the rows of one tile, so that each key is loaded once per KV head.

- decode, for the first ``num_decodes`` sequences, of one query token each: the keys are split over ``num_splits``
  programs, whose partial results a second kernel merges by their log-sum-exp (Flash-Decoding).
- prefill, for all others: one program for each (tile of query tokens, KV head), which finds its sequence by binary
  search (as vLLM's unified attention does); tiles that need no mask come first. Long prompts without a cached prefix
  go to flash_attention.py where that is available.

The launch grids depend on the shapes of the tensors alone and the lengths are read on the GPU, so that a captured graph
serves any lengths. Keys at or past a row's visible length are never read.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdray.kernels.attention.flash import first_flash_sequence, flash_prefill
from pdray.kernels.attention.paged import AttentionMetadata
from pdray.kernels.crossover import DECODE_MAX_SPLITS, DECODE_MIN_TOKENS_PER_SPLIT
from pdray.kernels.dependent_launch import begin, dependent_launch

LOG2_E = 1.4426950408889634
MIN_DOT_ROWS = 16  # tl.dot wants at least so many


class Tiles(NamedTuple):
    """rows: query rows of a prefill program (a decode program has one KV head's). block_n: keys at a time."""

    rows: int
    block_n: int
    num_warps: int
    num_stages: int


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
    dims = tl.arange(0, BLOCK_D)
    for first in range(start, end, BLOCK_N):
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
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        if MASKED:
            scores = tl.where(token[None, :] < visible[:, None], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A row that has seen no key keeps -inf; -inf - -inf is replaced by -inf - 0.
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - base[:, None])
        rescale = tl.exp2(row_max - base)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        row_max = new_max
    return acc, row_max, row_sum


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
    DEPENDENT: tl.constexpr,
):
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


def triton_paged_attention(
    q: Tensor,
    kv_layer: Tensor,
    meta: AttentionMetadata,
    scale: float,
    new_k: Tensor | None = None,
    new_v: Tensor | None = None,
    *,
    num_splits: int | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """The Triton path of paged_attention, same contract. Runs on the current stream and never synchronises.

    Args:
        num_splits: programs that share one sequence's decode step; default: see choose_num_splits.
    """
    assert q.stride(2) == 1 and kv_layer.is_contiguous(), "q's head_dim and all of kv_layer must be contiguous"
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    flash = first_flash_sequence(q, meta) if new_k is not None else len(meta.seq_lens)
    if meta.num_decodes < flash:
        _launch_prefill(q, kv_layer, meta, flash, scale, out, tiles)
    if flash < len(meta.seq_lens):
        assert new_k is not None and new_v is not None
        flash_prefill(q, new_k, new_v, meta, flash, scale, out)
    if meta.num_decodes:
        _launch_decode(q, kv_layer, meta, scale, out, num_splits, tiles)
    return out


def _launch_prefill(
    q: Tensor,
    kv_layer: Tensor,
    meta: AttentionMetadata,
    num_sequences: int,
    scale: float,
    out: Tensor,
    tiles: Tiles | None,
) -> None:
    """Of the sequences between the decodes and ``num_sequences``."""
    _, _, block_size, num_kv_heads, head_dim = kv_layer.shape
    group = q.shape[1] // num_kv_heads
    if tiles is None:
        tiles = Tiles(64, 32, 8, 2) if q.element_size() == 4 else Tiles(64, 64, 4, 2)
    rows = max(tiles.rows, triton.next_power_of_2(group))
    tokens = rows // group
    is_all = num_sequences == len(meta.seq_lens)
    num_tokens = len(q) - meta.num_decodes if is_all else sum(meta.query_lens[meta.num_decodes : num_sequences])
    grid = (num_tokens // tokens + num_sequences - meta.num_decodes, num_kv_heads)
    prefill_kernel[grid](
        q, kv_layer, out, meta.block_tables, meta.cu_seqlens_q, meta.seq_lens, meta.num_decodes, num_sequences,
        scale * LOG2_E, q.stride(0), q.stride(1), out.stride(0), out.stride(1), kv_layer.stride(2),
        meta.block_tables.stride(0),
        GROUP=group, ROWS=rows, BLOCK_SIZE=block_size, BLOCK_N=tiles.block_n, HEAD_DIM=head_dim,
        BLOCK_D=max(MIN_DOT_ROWS, triton.next_power_of_2(head_dim)),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **dependent_launch(q.device),
    )  # fmt: skip


def _launch_decode(
    q: Tensor,
    kv_layer: Tensor,
    meta: AttentionMetadata,
    scale: float,
    out: Tensor,
    num_splits: int | None,
    tiles: Tiles | None,
) -> None:
    _, _, block_size, num_kv_heads, head_dim = kv_layer.shape
    num_heads = q.shape[1]
    group = num_heads // num_kv_heads
    batch = meta.num_decodes
    if num_splits is None:
        num_splits = choose_num_splits(
            batch * num_kv_heads, meta.block_tables.shape[1] * block_size, _num_processors(q.device)
        )
    if tiles is None:
        tiles = Tiles(0, 32, 4, 2) if q.element_size() == 4 else Tiles(0, 64, 4, 3)
    whole = num_splits == 1
    partial = (
        out if whole else torch.empty(batch, num_heads, num_splits, head_dim, dtype=torch.float32, device=q.device)
    )
    lse = None if whole else torch.empty(batch, num_heads, num_splits, dtype=torch.float32, device=q.device)
    block_d = max(MIN_DOT_ROWS, triton.next_power_of_2(head_dim))
    decode_kernel[(num_splits * num_kv_heads * batch,)](
        q, kv_layer, partial, lse, meta.block_tables, meta.seq_lens, scale * LOG2_E,
        q.stride(0), q.stride(1), kv_layer.stride(2), meta.block_tables.stride(0), num_splits,
        KV_HEADS=num_kv_heads, GROUP=group, ROWS=max(MIN_DOT_ROWS, triton.next_power_of_2(group)),
        BLOCK_SIZE=block_size, BLOCK_N=tiles.block_n, HEAD_DIM=head_dim, BLOCK_D=block_d, WHOLE=whole,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **dependent_launch(q.device),
    )  # fmt: skip
    if whole:
        return
    merge_kernel[(num_heads * batch,)](
        partial, lse, out, out.stride(0), out.stride(1), num_splits,
        HEADS=num_heads, SPLITS=triton.next_power_of_2(num_splits), HEAD_DIM=head_dim, BLOCK_D=block_d, num_warps=4,
        **dependent_launch(q.device),
    )  # fmt: skip


def choose_num_splits(num_programs: int, max_kv_len: int, num_processors: int) -> int:
    """Splits that bring a small grid to four programs a processor, none shorter than DECODE_MIN_TOKENS_PER_SPLIT at
    max_kv_len. By a sweep on one H100: more, or splits of a grid of two a processor, cost more in merging.
    """
    wanted = -(-4 * num_processors // num_programs) if num_programs < 2 * num_processors else 1
    return max(1, min(wanted, DECODE_MAX_SPLITS, max_kv_len // DECODE_MIN_TOKENS_PER_SPLIT))


@lru_cache(maxsize=16)
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
