"""The Triton counterpart of draw_tokens: many programs a row find its best tokens, then one finds the best of those.

Two logarithms a token cost more than reading its logit. So they are computed for a tile of tokens only if the cheap
upper bound of its scores beats what its program has found before.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdray.kernels.crossover import DRAW_LONG_SPAN, DRAW_MANY_PROGRAMS, DRAW_SHORT_SPAN
from pdray.kernels.dependent_launch import begin, dependent_launch
from pdray.kernels.sampling.philox_triton import gumbel, largest_gumbel, philox_uniform

IDS_PER_WARP = 256  # of a tile
# As in draw.py. The lowest logit stands for -inf, which the division below cannot take.
LARGEST_LOGIT = tl.constexpr(2.0**99)
MIN_TEMPERATURE = tl.constexpr(1e-7)
MAX_TEMPERATURE = tl.constexpr(1e7)


@triton.jit
def lowest_best(scores, token_ids):
    """The largest score and, among its equals, the lowest id."""
    best = tl.max(scores, 0)
    return best, tl.min(tl.where(scores == best, token_ids, 0x7FFFFFFF), 0)


@triton.jit
def clamp_temperature(temperature):
    """What to divide by; 1 where greedy."""
    return tl.where(temperature > 0, tl.minimum(tl.maximum(temperature, MIN_TEMPERATURE), MAX_TEMPERATURE), 1.0)


@triton.jit
def draw_kernel(
    logits_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    scores_ptr,
    token_ids_ptr,
    stride_row,
    span,  # token ids of a program, a multiple of TILE
    VOCAB_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    begin(DEPENDENT)
    split, row = tl.program_id(0), tl.program_id(1)
    start = split * span
    at = tl.arange(0, TILE)
    temperature = tl.load(temperature_ptr + row)
    seed, position = tl.load(seeds_ptr + row), tl.load(positions_ptr + row)
    row_ptr = logits_ptr + row.to(tl.int64) * stride_row
    is_random = temperature > 0
    temperature = clamp_temperature(temperature)
    inverse = tl.div_rn(1.0, temperature)
    best = tl.full([TILE], float("-inf"), tl.float32)
    best_ids = start + at
    bar = tl.full([], float("-inf"), tl.float32)
    for first in range(start, tl.minimum(start + span, VOCAB_SIZE), TILE):
        token_ids = first + at
        mask = token_ids < VOCAB_SIZE
        scores = tl.load(row_ptr + token_ids, mask=mask, other=float("-inf")).to(tl.float32)
        scores = tl.minimum(tl.where(scores > -LARGEST_LOGIT, scores, -LARGEST_LOGIT), LARGEST_LOGIT)  # NaN is low too
        if is_random:
            uniform = philox_uniform(seed, position, first, TILE)
            quotient = scores * inverse
            quotient = tl.fma(tl.fma(-quotient, temperature, scores), inverse, quotient)  # as if divided
            bound = tl.max(quotient + largest_gumbel(uniform), 0)
            if bound + tl.abs(bound) * 1e-5 + 1e-4 > bar:
                scores = quotient + gumbel(uniform)
                bar = tl.maximum(bar, tl.max(scores, 0))
                better = (scores > best) & mask
                best = tl.where(better, scores, best)
                best_ids = tl.where(better, token_ids, best_ids)
        else:
            better = (scores > best) & mask
            best = tl.where(better, scores, best)
            best_ids = tl.where(better, token_ids, best_ids)
    score, token_id = lowest_best(best, best_ids)
    partial = row * tl.num_programs(0) + split
    tl.store(scores_ptr + partial, score)
    tl.store(token_ids_ptr + partial, token_id)


@triton.jit(do_not_specialize=["num_splits"])
def merge_kernel(scores_ptr, token_ids_ptr, out_ptr, num_splits, PADDED_SPLITS: tl.constexpr, DEPENDENT: tl.constexpr):
    begin(DEPENDENT)
    row = tl.program_id(0)
    split = tl.arange(0, PADDED_SPLITS)
    mask = split < num_splits
    scores = tl.load(scores_ptr + row * num_splits + split, mask=mask, other=float("-inf"))
    token_ids = tl.load(token_ids_ptr + row * num_splits + split, mask=mask, other=0x7FFFFFFF)
    _, token_id = lowest_best(scores, token_ids)
    tl.store(out_ptr + row, token_id.to(tl.int64))


def choose_span(num_rows: int, vocab_size: int) -> int:
    """Token ids of a program."""
    return DRAW_SHORT_SPAN if num_rows * vocab_size <= DRAW_MANY_PROGRAMS * DRAW_SHORT_SPAN else DRAW_LONG_SPAN


def triton_draw_tokens(
    logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, out: Tensor, span: int | None = None
) -> None:
    """See draw.draw_tokens; rows of logits contiguous, everything else contiguous. On the current stream."""
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1 and out.is_contiguous()
    if num_rows == 0:
        return
    span = span or choose_span(num_rows, vocab_size)
    num_warps = 4 if span == DRAW_SHORT_SPAN else 1
    num_splits = triton.cdiv(vocab_size, span)
    launch = dependent_launch(logits.device)
    scores = torch.empty((num_rows, num_splits), dtype=torch.float32, device=logits.device)
    token_ids = torch.empty((num_rows, num_splits), dtype=torch.int32, device=logits.device)
    draw_kernel[(num_splits, num_rows)](
        logits, temperature, seeds, positions, scores, token_ids, logits.stride(0), span,
        VOCAB_SIZE=vocab_size, TILE=num_warps * IDS_PER_WARP, num_warps=num_warps, **launch,
    )  # fmt: skip
    merge_kernel[(num_rows,)](
        scores, token_ids, out, num_splits,
        PADDED_SPLITS=triton.next_power_of_2(triton.cdiv(vocab_size, DRAW_SHORT_SPAN)), num_warps=1, **launch,
    )  # fmt: skip
