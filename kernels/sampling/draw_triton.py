"""The Triton counterpart of draw_tokens: many programs a row find its best tokens, then one finds the best of those.

Two logarithms a token cost more than reading its logit. So they are computed for a tile of tokens only if the cheap
upper bound of its scores beats what its program has found before.

The same two kernels end the draws of late rows, once it is known which of their tokens stay.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdray.kernels.crossover import DRAW_LONG_SPAN, DRAW_MANY_PROGRAMS, DRAW_SHORT_SPAN
from pdray.kernels.dependent_launch import begin, dependent_launch
from pdray.kernels.launcher import Launcher
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
# Which rows a launch draws: those that are not late, all late ones, or those of them that are bounded.
EARLY_ROWS, LATE_ROWS, BOUNDED_ROWS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


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
def is_wanted(records_ptr, states_ptr, row, ROWS: tl.constexpr):
    """Whether a launch draws this row."""
    if ROWS == BOUNDED_ROWS:
        wanted = tl.load(states_ptr + row) == BOUNDED
    elif ROWS == LATE_ROWS:
        wanted = (load_int(records_ptr, row, FLAGS) & LATE) != 0
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
    ROWS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    begin(DEPENDENT)
    split, row = tl.program_id(0), tl.program_id(1)
    if is_wanted(records_ptr, states_ptr, row, ROWS):
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
        if ROWS == BOUNDED_ROWS:
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
            if ROWS == BOUNDED_ROWS:
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
    ROWS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    begin(DEPENDENT)
    row = tl.program_id(0)
    if is_wanted(records_ptr, states_ptr, row, ROWS):
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
    num_rows, vocab_size = logits.shape
    if num_rows == 0:
        return
    launch = DrawLaunch.of(logits, table, out, None, EARLY_ROWS.value, span)
    scores = torch.empty((num_rows, launch.num_splits), dtype=torch.float32, device=logits.device)
    token_ids = torch.empty((num_rows, launch.num_splits), dtype=torch.int32, device=logits.device)
    draw_kernel[launch.grid](*launch.draw_args(scores, token_ids), **launch.options)
    merge_kernel[(num_rows,)](*launch.merge_args(scores, token_ids), **launch.merge_options)


class DrawLaunch(NamedTuple):
    """How draw_kernel and merge_kernel are launched.

    Attributes:
        bounds: where ``rows`` is BOUNDED_ROWS.
    """

    logits: Tensor
    table: DrawTable
    out: Tensor
    bounds: Bounds | None
    rows: int
    span: int
    num_splits: int
    num_warps: int
    dependent: dict[str, bool]

    @classmethod
    def of(
        cls, logits: Tensor, table: DrawTable, out: Tensor, bounds: Bounds | None, rows: int, span: int | None = None
    ) -> DrawLaunch:
        num_rows, vocab_size = logits.shape
        assert logits.stride(1) == 1 and out.is_contiguous() and vocab_size == table.vocab_size
        span = span or choose_span(num_rows, vocab_size)
        num_warps = 4 if span == DRAW_SHORT_SPAN else 1
        dependent = dependent_launch(logits.device)
        return cls(logits, table, out, bounds, rows, span, triton.cdiv(vocab_size, span), num_warps, dependent)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.num_splits, len(self.logits), 1

    @property
    def key(self) -> tuple[Any, ...]:
        """What the compiled kernels depend on, for one vocabulary."""
        return self.rows, self.logits.dtype, self.logits.stride(0), self.span

    def draw_args(self, scores: Tensor, token_ids: Tensor) -> tuple[Any, ...]:
        """scores, token_ids: one for each program of the grid, float32 and int32."""
        return (
            self.logits, *self.table, *(self.bounds or (None, None, None)), scores, token_ids, self.logits.stride(0),
            self.span, self.logits.shape[1], self.num_warps * IDS_PER_WARP, self.rows, self.dependent["DEPENDENT"],
        )  # fmt: skip

    def merge_args(self, scores: Tensor, token_ids: Tensor) -> tuple[Any, ...]:
        vocab_size = self.logits.shape[1]
        padded_splits = triton.next_power_of_2(triton.cdiv(vocab_size, DRAW_SHORT_SPAN))
        states = None if self.bounds is None else self.bounds.states
        return (
            scores, token_ids, *self.table, states, self.out, self.num_splits, vocab_size, padded_splits, self.rows,
            self.dependent["DEPENDENT"],
        )  # fmt: skip

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "enable_fp_fusion": False, **self._pdl}

    @property
    def merge_options(self) -> dict[str, Any]:
        return {"num_warps": 1, **self._pdl}

    @property
    def _pdl(self) -> dict[str, bool]:
        return {name: value for name, value in self.dependent.items() if name != "DEPENDENT"}


def launch_draw(launch: DrawLaunch, scores: Tensor, token_ids: Tensor, launcher: Launcher) -> None:
    """Draw rows one by one with what was allocated; see DrawLaunch.draw_args."""
    draw_args, merge_args = launch.draw_args(scores, token_ids), launch.merge_args(scores, token_ids)
    launcher.launch(launch.key, draw_kernel, launch.grid, draw_args, **launch.options)
    launcher.launch(launch.key, merge_kernel, (len(launch.logits), 1, 1), merge_args, **launch.merge_options)
