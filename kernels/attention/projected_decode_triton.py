"""A decode step's head norms, rotary embedding, KV store and paged attention in one kernel (Flash-Decoding).

Each program reads its queries as the projection left them, and the first of a sequence's programs also its new key and
value, which it stores. So all that a program reads of the cache was there before the step: its first tiles of keys and
values are loaded while the projection still runs.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disable-error-code="assignment"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdray.kernels.attention.decode_triton import launch_merge, make_partial
from pdray.kernels.attention.online_softmax_triton import LOG2_E, MIN_DOT_ROWS, absorb, attend, load_tile
from pdray.kernels.attention.paged import AttentionMetadata
from pdray.kernels.attention.rotary_store import HeadOperations
from pdray.kernels.crossover import DECODE_MAX_SPLITS, PROJECTED_MIN_PROGRAMS, PROJECTED_MIN_TOKENS_PER_SPLIT
from pdray.kernels.dependent_launch import begin, dependent_launch
from pdray.kernels.processors import num_processors


class DecodePlan(NamedTuple):
    """num_splits: programs that share one sequence's keys. block_n: keys at a time. prefetch: tiles that are loaded
    before the kernel before this one has ended.
    """

    num_splits: int
    block_n: int
    num_warps: int
    num_stages: int
    prefetch: int


@triton.jit
def load_norm(norm_ptr, dims, partner, inside, HAS_NORM: tl.constexpr):
    """A head norm's weights [1, BLOCK_D] float32, and those of the other half."""
    own = (dims * 0).to(tl.float32)
    other = own
    if HAS_NORM:
        own = tl.load(norm_ptr + dims, mask=inside, other=0.0).to(tl.float32)
        other = tl.load(norm_ptr + partner, mask=inside, other=0.0).to(tl.float32)
    return own, other


@triton.jit
def rotated(
    head_ptr, dims, partner, mask, own_norm, other_norm, cos, sin, eps, HEAD_DIM: tl.constexpr, HAS_NORM: tl.constexpr
):
    """Heads [R, BLOCK_D], normalised and rotated, rounded where rotate_and_store() rounds. head_ptr: [R, 1]."""
    dtype = head_ptr.dtype.element_ty
    own = tl.load(head_ptr + dims, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(head_ptr + partner, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(own * own, 1)[:, None] / HEAD_DIM + eps)
        own = ((own * scale).to(dtype).to(tl.float32) * own_norm).to(dtype).to(tl.float32)
        other = ((other * scale).to(dtype).to(tl.float32) * other_norm).to(dtype).to(tl.float32)
    return (own * cos + other * sin).to(dtype)


@triton.jit
def projected_decode_kernel(
    qkv_ptr,  # [B, heads of queries, keys, values, HEAD_DIM]
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    kv_ptr,
    slot_mapping_ptr,
    partial_ptr,  # [B, Hq, num_splits, HEAD_DIM] float32, normalised; of one split, the result itself
    lse_ptr,  # [B, Hq, num_splits] float32, base 2; -inf for an empty split
    table_ptr,
    seq_lens_ptr,
    eps,
    scale_log2,
    stride_table,
    num_splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PREFETCH: tl.constexpr,
    HAS_NORM: tl.constexpr,
    WHOLE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    STRIDE_TOKEN: tl.constexpr = KV_HEADS * HEAD_DIM
    HALF: tl.constexpr = HEAD_DIM // 2
    program = tl.program_id(0)
    split = program % num_splits
    kv_head = program // num_splits % KV_HEADS
    sequence = (program // num_splits // KV_HEADS).to(tl.int64)
    kv_len = tl.load(seq_lens_ptr + sequence)
    position = tl.load(positions_ptr + sequence)
    slot = tl.load(slot_mapping_ptr + sequence)
    cached = tl.maximum(kv_len - 1, 0)
    per_split = tl.cdiv(tl.cdiv(cached, num_splits), BLOCK_N) * BLOCK_N
    start = split * per_split
    end = tl.minimum(start + per_split, cached)
    table_ptr += sequence * stride_table
    cache_ptr = kv_ptr + kv_head * HEAD_DIM

    keys = ()
    values = ()
    for i in tl.static_range(PREFETCH):
        k, v = load_tile(
            cache_ptr, table_ptr, start + i * BLOCK_N, end, STRIDE_TOKEN, BLOCK_SIZE, BLOCK_N, HEAD_DIM, BLOCK_D, True
        )
        keys = keys + (k,)
        values = values + (v,)
    dims = tl.arange(0, BLOCK_D)[None, :]
    inside = dims < HEAD_DIM
    is_first = dims < HALF
    partner = tl.where(is_first, dims + HALF, dims - HALF)
    angle = position * HALF + tl.where(is_first, dims, partner)
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0)
    sin = tl.where(is_first, -sin, sin)
    q_norm, q_partner_norm = load_norm(q_norm_ptr, dims, partner, inside, HAS_NORM)
    k_norm, k_partner_norm = load_norm(k_norm_ptr, dims, partner, inside, HAS_NORM)
    begin(DEPENDENT)  # lengths, tables and the cache of earlier tokens, above, were there before the step

    rows = tl.arange(0, ROWS)
    head = kv_head * GROUP + rows
    io_mask = (rows < GROUP)[:, None] & inside
    qkv_ptr += sequence * (KV_HEADS * (GROUP + 2) * HEAD_DIM)
    q_ptr = qkv_ptr + (head * HEAD_DIM)[:, None]
    q = rotated(q_ptr, dims, partner, io_mask, q_norm, q_partner_norm, cos, sin, eps, HEAD_DIM, HAS_NORM)
    # The first split begins with the new key.
    is_new = dims < tl.where(split == 0, HEAD_DIM, 0)
    new_ptr = qkv_ptr + (tl.zeros([1, 1], tl.int32) + (KV_HEADS * GROUP + kv_head) * HEAD_DIM)
    new_k = rotated(new_ptr, dims, partner, is_new, k_norm, k_partner_norm, cos, sin, eps, HEAD_DIM, HAS_NORM)
    new_v = tl.load(new_ptr + KV_HEADS * HEAD_DIM + dims, mask=is_new, other=0.0)
    place = (slot // BLOCK_SIZE * 2 * BLOCK_SIZE + slot % BLOCK_SIZE) * STRIDE_TOKEN
    tl.store(cache_ptr + place + dims, new_k, mask=is_new)
    tl.store(cache_ptr + place + BLOCK_SIZE * STRIDE_TOKEN + dims, new_v, mask=is_new)
    sees_new = rows < tl.where(split == 0, kv_len, 0) * ROWS
    score = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), 1) * scale_log2
    row_max = tl.where(sees_new, score, float("-inf"))
    row_sum = tl.where(sees_new, 1.0, 0.0)
    acc = tl.where(sees_new[:, None], new_v.to(tl.float32), 0.0)

    visible = tl.zeros([ROWS], tl.int32) + end
    for i in tl.static_range(PREFETCH):
        acc, row_max, row_sum = absorb(
            acc, row_max, row_sum, q, keys[i], values[i], start + i * BLOCK_N, visible, scale_log2, BLOCK_N, True
        )
    acc, row_max, row_sum = attend(
        acc, row_max, row_sum, q, visible, start + PREFETCH * BLOCK_N, end, cache_ptr, table_ptr, STRIDE_TOKEN,
        scale_log2, BLOCK_SIZE, BLOCK_N, HEAD_DIM, BLOCK_D, True,
    )  # fmt: skip
    divisor = tl.where(row_sum > 0, row_sum, 1.0)
    row = sequence * KV_HEADS * GROUP + head
    if WHOLE:
        result = (acc / divisor[:, None]).to(partial_ptr.dtype.element_ty)
        tl.store(partial_ptr + (row * HEAD_DIM)[:, None] + dims, result, mask=io_mask)
    else:
        lse = tl.where(row_sum > 0, row_max + tl.log2(divisor), float("-inf"))
        index = row * num_splits + split
        tl.store(lse_ptr + index, lse, mask=rows < GROUP)
        tl.store(partial_ptr + (index * HEAD_DIM)[:, None] + dims, acc / divisor[:, None], mask=io_mask)


def triton_projected_decode(
    qkv: Tensor,
    heads: HeadOperations,
    positions: Tensor,
    kv_layer: Tensor,
    meta: AttentionMetadata,
    scale: float,
    plan: DecodePlan,
) -> Tensor:
    """See projected.projected_attention, of a step whose sequences have one query token each."""
    assert qkv.is_contiguous() and kv_layer.is_contiguous() and kv_layer.dtype == qkv.dtype
    _, _, block_size, num_kv_heads, head_dim = kv_layer.shape
    batch, num_heads, num_splits = len(qkv), heads.num_heads, plan.num_splits
    group = num_heads // num_kv_heads
    out = torch.empty(batch, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    partial, lse = make_partial(out, batch, num_splits)
    projected_decode_kernel[(num_splits * num_kv_heads * batch,)](
        qkv, heads.q_norm, heads.k_norm, heads.cos, heads.sin, positions, kv_layer, meta.slot_mapping, partial, lse,
        meta.block_tables, meta.seq_lens, heads.eps, scale * LOG2_E, meta.block_tables.stride(0), num_splits,
        KV_HEADS=num_kv_heads, GROUP=group, ROWS=max(MIN_DOT_ROWS, triton.next_power_of_2(group)),
        BLOCK_SIZE=block_size, BLOCK_N=plan.block_n, HEAD_DIM=head_dim,
        BLOCK_D=max(MIN_DOT_ROWS, triton.next_power_of_2(head_dim)), PREFETCH=plan.prefetch,
        HAS_NORM=heads.q_norm is not None, WHOLE=lse is None,
        num_warps=plan.num_warps, num_stages=plan.num_stages, **dependent_launch(qkv.device),
    )  # fmt: skip
    if lse is not None:
        launch_merge(partial, lse, out)
    return out


def plan_of(qkv: Tensor, kv_layer: Tensor, meta: AttentionMetadata) -> DecodePlan | None:
    """See choose_plan."""
    _, _, block_size, num_kv_heads, _ = kv_layer.shape
    max_kv_len = meta.block_tables.shape[1] * block_size
    return choose_plan(len(qkv) * num_kv_heads, max_kv_len, num_processors(qkv.device), qkv.element_size())


def choose_plan(num_programs: int, max_kv_len: int, num_processors: int, element_size: int) -> DecodePlan | None:
    """How so many programs, times the splits, run; None where the kernels one by one are as fast.

    By sweeps on one H100 in the chain of Qwen3-0.6B's and 8B's layers, 600 to 8,192 tokens a sequence. Registers that
    hold tiles leave room for fewer programs: two a processor are best, or up to four with small tiles in one round.
    """
    if 3 * num_processors <= num_programs <= 4 * num_processors and element_size == 2:
        return DecodePlan(1, 32, 4, 3, 3)
    if num_programs < PROJECTED_MIN_PROGRAMS or 2 * num_programs >= 3 * num_processors:
        return None
    most = min(DECODE_MAX_SPLITS, max_kv_len // PROJECTED_MIN_TOKENS_PER_SPLIT)
    wanted = 2 * num_processors // num_programs if num_programs <= num_processors else 2
    num_splits = max(1, min(wanted, most))
    if element_size == 4:
        return DecodePlan(num_splits, 32, 4, 2, 1)
    if num_splits * num_programs <= num_processors:
        return DecodePlan(num_splits, 64, 8, 3, 1)
    return DecodePlan(num_splits, 64, 4, 3, 2)
