"""The Triton counterpart of draw_tokens: many programs a row find its best tokens, then one finds the best of those.

Two logarithms a token cost more than reading its logit. So they are computed for a tile of tokens only if the cheap
upper bound of its scores beats what its program has found before.

The same two kernels end the draws of late rows, once it is known which of their tokens stay.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdray.kernels.crossover import DRAW_LONG_SPAN, DRAW_MANY_PROGRAMS, DRAW_SHORT_SPAN
from pdray.kernels.dependent_launch import begin, dependent_launch
from pdray.kernels.sampling.philox_triton import gumbel, largest_gumbel, philox_uniform
from pdray.kernels.sampling.row_triton import (
    FLAGS,
    LARGEST_LOGIT,
    LATE,
    POSITION,
    SEED,
    TEMPERATURE,
    clamp_temperature,
    keep_token,
    load_changes,
    load_float,
    load_int,
    load_logits,
    load_long,
)
from pdray.kernels.sampling.rows import DrawTable

IDS_PER_WARP = 256  # of a tile

# Where a late row's draw stands; other rows count as drawn.
DRAWN, BOUNDED, OPEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class Bounds(NamedTuple):
    """Which tokens of late rows stay: those with logit / T above the floor, and of those at it, up to id ``last``.

    Attributes:
        floors: [S] float32. lasts: [S] int32. states: [S] int32; only BOUNDED rows are yet to be drawn.
    """

    floors: Tensor
    lasts: Tensor
    states: Tensor


@triton.jit
def lowest_best(scores, token_ids):
    """The largest score and, among its equals, the lowest id."""
    best = tl.max(scores, 0)
    return best, tl.min(tl.where(scores == best, token_ids, 0x7FFFFFFF), 0)


@triton.jit
def is_wanted(records_ptr, states_ptr, row, BOUNDED_ROWS: tl.constexpr):
    """Whether a launch draws this row: one of those that are not late, or one of those that are bounded."""
    if BOUNDED_ROWS:  # noqa: SIM108
        wanted = tl.load(states_ptr + row) == BOUNDED
    else:
        wanted = (load_int(records_ptr, row, FLAGS) & LATE) == 0
    return wanted


@triton.jit
def draw_kernel(
    logits_ptr,
    records_ptr,
    history_ptr,
    masks_ptr,
    floors_ptr,
    lasts_ptr,
    states_ptr,
    scores_ptr,
    token_ids_ptr,
    stride_row,
    span,  # token ids of a program, a multiple of TILE
    VOCAB_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    BOUNDED_ROWS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    begin(DEPENDENT)
    split, row = tl.program_id(0), tl.program_id(1)
    if is_wanted(records_ptr, states_ptr, row, BOUNDED_ROWS):
        start = split * span
        at = tl.arange(0, TILE)
        seed, position = load_long(records_ptr, row, SEED), load_long(records_ptr, row, POSITION)
        temperature = load_float(records_ptr, row, TEMPERATURE)
        flags, history_ptr, masks_ptr, repetition, presence, frequency = load_changes(
            records_ptr, row, history_ptr, masks_ptr, VOCAB_SIZE
        )
        row_ptr = logits_ptr + row.to(tl.int64) * stride_row
        is_random = temperature > 0
        temperature = clamp_temperature(temperature)
        inverse = tl.div_rn(1.0, temperature)
        if BOUNDED_ROWS:
            floor, last = tl.load(floors_ptr + row), tl.load(lasts_ptr + row)
        best = tl.full([TILE], float("-inf"), tl.float32)
        best_ids = start + at
        bar = tl.full([], float("-inf"), tl.float32)
        for first in range(start, tl.minimum(start + span, VOCAB_SIZE), TILE):
            token_ids = first + at
            mask = token_ids < VOCAB_SIZE
            scores = load_logits(
                row_ptr, history_ptr, masks_ptr, token_ids, mask, flags, repetition, presence, frequency
            )
            if BOUNDED_ROWS:
                scaled = tl.div_rn(scores, temperature)
                mask = mask & ((scaled > floor) | ((scaled == floor) & (token_ids <= last)))
                scores = tl.where(mask, scores, float("-inf"))
            scores = tl.maximum(scores, -LARGEST_LOGIT)  # stands for -inf, which the division below cannot take
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
def merge_kernel(
    scores_ptr,
    token_ids_ptr,
    records_ptr,
    history_ptr,
    masks_ptr,
    states_ptr,
    out_ptr,
    num_splits,
    VOCAB_SIZE: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    BOUNDED_ROWS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    begin(DEPENDENT)
    row = tl.program_id(0)
    if is_wanted(records_ptr, states_ptr, row, BOUNDED_ROWS):
        split = tl.arange(0, PADDED_SPLITS)
        mask = split < num_splits
        scores = tl.load(scores_ptr + row * num_splits + split, mask=mask, other=float("-inf"))
        token_ids = tl.load(token_ids_ptr + row * num_splits + split, mask=mask, other=0x7FFFFFFF)
        _, token_id = lowest_best(scores, token_ids)
        flags, history_ptr, _, _, _, _ = load_changes(records_ptr, row, history_ptr, masks_ptr, VOCAB_SIZE)
        keep_token(out_ptr, row, token_id, flags, history_ptr)


def choose_span(num_rows: int, vocab_size: int) -> int:
    """Token ids of a program."""
    return DRAW_SHORT_SPAN if num_rows * vocab_size <= DRAW_MANY_PROGRAMS * DRAW_SHORT_SPAN else DRAW_LONG_SPAN


def triton_draw_tokens(logits: Tensor, table: DrawTable, out: Tensor, span: int | None = None) -> None:
    """See draw_rows.draw_tokens; rows of logits contiguous. On the current stream."""
    launch_draw(logits, table, out, span=span)


def launch_draw(
    logits: Tensor, table: DrawTable, out: Tensor, bounds: Bounds | None = None, span: int | None = None
) -> None:
    """Draw the rows that are not late; with bounds, those that are bounded."""
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1 and out.is_contiguous() and vocab_size == table.vocab_size
    if num_rows == 0:
        return
    span = span or choose_span(num_rows, vocab_size)
    num_warps = 4 if span == DRAW_SHORT_SPAN else 1
    num_splits = triton.cdiv(vocab_size, span)
    options = {"BOUNDED_ROWS": bounds is not None, **dependent_launch(logits.device)}
    floors, lasts, states = bounds or (None, None, None)
    scores = torch.empty((num_rows, num_splits), dtype=torch.float32, device=logits.device)
    token_ids = torch.empty((num_rows, num_splits), dtype=torch.int32, device=logits.device)
    draw_kernel[(num_splits, num_rows)](
        logits, *table, floors, lasts, states, scores, token_ids, logits.stride(0), span,
        VOCAB_SIZE=vocab_size, TILE=num_warps * IDS_PER_WARP, num_warps=num_warps, enable_fp_fusion=False, **options,
    )  # fmt: skip
    merge_kernel[(num_rows,)](
        scores, token_ids, *table, states, out, num_splits, VOCAB_SIZE=vocab_size,
        PADDED_SPLITS=triton.next_power_of_2(triton.cdiv(vocab_size, DRAW_SHORT_SPAN)), num_warps=1, **options,
    )  # fmt: skip
