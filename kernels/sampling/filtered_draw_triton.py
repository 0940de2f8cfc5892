"""The Triton counterpart of draw_filtered: one program a row, which reads the row several times and sorts nothing.

The k-th largest logit, and the one at which the mass crosses top_p, are found by splitting an interval of
order-preserving integer keys in four, again and again: each time, one pass over the row weighs what lies above the
three cuts, by number or by mass. Temperature keeps the order, so raw logits are compared; the boundary itself is then
applied to logits / T, where distinct logits may have become equal.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdray.kernels.dependent_launch import begin, dependent_launch
from pdray.kernels.sampling.draw_triton import LARGEST_LOGIT, clamp_temperature, lowest_best
from pdray.kernels.sampling.philox_triton import gumbel, philox_uniform

TILE = 4096  # token ids at a time
NUM_WARPS = 16
KEY_SHIFT = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}  # low bits of a float32 that such numbers leave 0

LOG2_E = tl.constexpr(1.4426950408889634)
# Tokens below the largest logit by so many temperatures hold less than V * 4e-18 of the mass: 1 - top_p is never that
# small.
REACH = tl.constexpr(40.0)
SMALLEST_TOP_P = tl.constexpr(1e-30)  # a target of 0 would be reached by nothing at all


@triton.jit
def to_key(value, SHIFT: tl.constexpr):
    """int64 that orders as float32 values do."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # + 0.0 makes -0.0 equal to 0.0
    return (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> SHIFT).to(tl.int64)


@triton.jit
def from_key(key, SHIFT: tl.constexpr):
    """The number of a key, among those whose SHIFT low bits are 0."""
    shifted = (key << SHIFT).to(tl.int32)
    bits = tl.where(shifted < 0, (shifted ^ 0x7FFFFFFF) >> SHIFT << SHIFT, shifted)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def load_tile(row_ptr, first, VOCAB_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Logits as draw.clean_logits() has them."""
    token_ids = first + tl.arange(0, TILE)
    x = tl.load(row_ptr + token_ids, mask=token_ids < VOCAB_SIZE, other=float("-inf")).to(tl.float32)
    return tl.minimum(tl.where(x > -LARGEST_LOGIT, x, float("-inf")), LARGEST_LOGIT)


@triton.jit
def find_threshold(
    row_ptr,
    low,  # keys: the answer is in low <= key < high
    high,
    target,
    largest,
    scale,
    VOCAB_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SHIFT: tl.constexpr,
    BY_MASS: tl.constexpr,
):
    """The largest number such that what is not below it weighs at least ``target``.

    The weight of x is 1, or 2 ** ((x - largest) * scale). Sums keep one order, so that a larger set is never lighter.
    """
    while high - low > 1:
        step = (high - low + 3) // 4
        cut_1 = from_key(low + step, SHIFT)
        cut_2 = from_key(low + 2 * step, SHIFT)
        cut_3 = from_key(low + 3 * step, SHIFT)
        above_1 = tl.zeros([TILE], tl.float32)
        above_2 = tl.zeros([TILE], tl.float32)
        above_3 = tl.zeros([TILE], tl.float32)
        for first in range(0, VOCAB_SIZE, TILE):
            x = load_tile(row_ptr, first, VOCAB_SIZE, TILE)
            weight = tl.full([TILE], 1.0, tl.float32)
            if BY_MASS:
                weight = tl.exp2((x - largest) * scale)
            above_1 += tl.where(x >= cut_1, weight, 0.0)
            above_2 += tl.where(x >= cut_2, weight, 0.0)
            above_3 += tl.where(x >= cut_3, weight, 0.0)
        num_heavy = (tl.sum(above_1, 0) >= target).to(tl.int64)
        num_heavy += (tl.sum(above_2, 0) >= target).to(tl.int64)
        num_heavy += (tl.sum(above_3, 0) >= target).to(tl.int64)
        low += num_heavy * step
        high = tl.minimum(high, low + step)
    return from_key(low, SHIFT)


@triton.jit
def find_last_equal(row_ptr, value, temperature, num_kept, VOCAB_SIZE: tl.constexpr, TILE: tl.constexpr):
    """The id of the num_kept-th token whose logit / T is ``value``."""
    last = tl.full([], -1, tl.int32)
    num_before = tl.full([], 0, tl.int32)
    for first in range(0, VOCAB_SIZE, TILE):
        equal = (tl.div_rn(load_tile(row_ptr, first, VOCAB_SIZE, TILE), temperature) == value).to(tl.int32)
        num_equal = tl.sum(equal, 0)
        if (num_before < num_kept) & (num_before + num_equal >= num_kept):
            ranks = num_before + tl.cumsum(equal, 0)
            token_ids = first + tl.arange(0, TILE)
            last = tl.max(tl.where((equal > 0) & (ranks == num_kept), token_ids, -1), 0)
        num_before += num_equal
    return last


@triton.jit
def draw_filtered_kernel(
    logits_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    min_p_ptr,
    top_k_ptr,
    top_p_ptr,
    out_ptr,
    stride_row,
    VOCAB_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    begin(DEPENDENT)
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * stride_row
    temperature = tl.load(temperature_ptr + row)
    is_random = temperature > 0
    temperature = clamp_temperature(temperature)
    scale = LOG2_E / temperature

    best = tl.full([TILE], float("-inf"), tl.float32)
    for first in range(0, VOCAB_SIZE, TILE):
        best = tl.maximum(best, load_tile(row_ptr, first, VOCAB_SIZE, TILE))
    largest = tl.max(best, 0)
    is_random = is_random & (largest > float("-inf"))  # else there is nothing to draw from: id 0
    top = tl.div_rn(largest, temperature)
    high = to_key(largest, SHIFT) + 1

    # tokens stay if logit / T is above the floor, or is the floor and the id is at most last
    floor = tl.full([], float("-inf"), tl.float32)
    last = tl.full([], VOCAB_SIZE, tl.int32)
    if HAS_MIN_P:
        min_p = tl.load(min_p_ptr + row)
        floor = tl.where(min_p > 0, top + tl.log(tl.minimum(min_p, 1.0)), float("-inf"))
    if HAS_TOP_K:
        top_k = tl.load(top_k_ptr + row)
        if is_random & (top_k > 0) & (top_k < VOCAB_SIZE):
            # each lane's largest is not below the smallest of them, so that at least TILE tokens are not
            bound = tl.where(top_k <= TILE, tl.min(best, 0), float("-inf"))
            target = top_k.to(tl.float32)
            kth = find_threshold(
                row_ptr, to_key(bound, SHIFT), high, target, largest, scale, VOCAB_SIZE, TILE, SHIFT, False
            )
            floor = tl.maximum(floor, tl.div_rn(kth, temperature))
    if HAS_TOP_P:
        top_p = tl.load(top_p_ptr + row)
        if is_random & (top_p < 1):
            masses = tl.zeros([TILE], tl.float32)
            for first in range(0, VOCAB_SIZE, TILE):
                x = load_tile(row_ptr, first, VOCAB_SIZE, TILE)
                masses += tl.where(tl.div_rn(x, temperature) >= floor, tl.exp2((x - largest) * scale), 0.0)
            target = tl.maximum(top_p, SMALLEST_TOP_P) * tl.sum(masses, 0)
            bound = tl.maximum(largest - REACH * temperature, floor * temperature - tl.abs(floor * temperature) * 1e-6)
            crossing = find_threshold(
                row_ptr, to_key(bound, SHIFT), high, target, largest, scale, VOCAB_SIZE, TILE, SHIFT, True
            )
            value = tl.div_rn(crossing, temperature)
            if value >= floor:
                masses = tl.zeros([TILE], tl.float32)
                equals = tl.zeros([TILE], tl.int32)
                for first in range(0, VOCAB_SIZE, TILE):
                    x = load_tile(row_ptr, first, VOCAB_SIZE, TILE)
                    scaled = tl.div_rn(x, temperature)
                    masses += tl.where(scaled > value, tl.exp2((x - largest) * scale), 0.0)
                    equals += (scaled == value).to(tl.int32)
                missing = (target - tl.sum(masses, 0)) / tl.exp2((crossing - largest) * scale)
                num_kept = tl.maximum(tl.ceil(tl.minimum(missing, VOCAB_SIZE)), 1.0).to(tl.int32)
                if num_kept < tl.sum(equals, 0):
                    last = find_last_equal(row_ptr, value, temperature, num_kept, VOCAB_SIZE, TILE)
                floor = value

    seed, position = tl.load(seeds_ptr + row), tl.load(positions_ptr + row)
    at = tl.arange(0, TILE)
    best = tl.full([TILE], float("-inf"), tl.float32)
    best_ids = at
    for first in range(0, VOCAB_SIZE, TILE):
        token_ids = first + at
        scores = tl.div_rn(load_tile(row_ptr, first, VOCAB_SIZE, TILE), temperature)
        stays = (scores > floor) | ((scores == floor) & (token_ids <= last))
        if tl.max(stays.to(tl.int32), 0) > 0:
            if is_random:
                scores += gumbel(philox_uniform(seed, position, first, TILE))
            better = stays & (scores > best)
            best = tl.where(better, scores, best)
            best_ids = tl.where(better, token_ids, best_ids)
    _, token_id = lowest_best(best, best_ids)
    tl.store(out_ptr + row, token_id.to(tl.int64))


def triton_draw_filtered(
    logits: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    out: Tensor,
    min_p: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    num_warps: int = NUM_WARPS,
) -> None:
    """See draw.draw_filtered; rows of logits contiguous, everything else contiguous. On the current stream."""
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1 and out.is_contiguous()
    if num_rows:
        draw_filtered_kernel[(num_rows,)](
            logits, temperature, seeds, positions, min_p, top_k, top_p, out, logits.stride(0),
            VOCAB_SIZE=vocab_size, TILE=TILE, SHIFT=KEY_SHIFT[logits.dtype],
            HAS_MIN_P=min_p is not None, HAS_TOP_K=top_k is not None, HAS_TOP_P=top_p is not None,
            num_warps=num_warps, **dependent_launch(logits.device),
        )  # fmt: skip
