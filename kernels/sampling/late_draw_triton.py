"""The Triton counterpart of draw_late: kernels that sort nothing, and decide most rows by a few of their tokens.

groups_triton.py draws the rows that a few tokens decide. For others, search_kernel finds which tokens stay: one program
a row reads it several times. The k-th largest logit, and the one at which the mass crosses top_p, are found by
splitting an interval of order-preserving integer keys in four, again and again: each time, one pass over the row weighs
what lies above the three cuts, by number or by mass. Temperature keeps the order, so undivided logits are compared; the
boundary itself is then applied to logits / T, where distinct logits may have become equal. At last those rows, and the
ones that nothing or min_p alone bounds, are drawn as other rows are, among the tokens that stay.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pdray.kernels.dependent_launch import begin, dependent_launch
from pdray.kernels.sampling.draw_triton import BOUNDED, BOUNDED_ROWS, LATE_ROWS, OPEN, DrawLaunch, launch_draw
from pdray.kernels.sampling.groups_triton import (
    GROUP,
    LOG2_E,
    REACH,
    SMALLEST_TOP_P,
    SURVEYED,
    choose_kernel,
    count_kept,
    lower,
    min_p_floor,
    survey_kernel,
)
from pdray.kernels.sampling.late_scratch import MOST_GROUPS, LateScratch
from pdray.kernels.sampling.row_triton import (
    SHIFTED,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    clamp_temperature,
    load_changes,
    load_float,
    load_int,
    load_logits,
)
from pdray.kernels.sampling.rows import DrawTable
from pdray.kernels.sampling.threshold_triton import KEY_SHIFT, from_key, to_key

TILE = 4096  # token ids of search_kernel at a time
SURVEY_WARPS, SEARCH_WARPS = 8, 16
FEW_GROUPS, CHOOSE_WARPS = 32, 16


@triton.jit
def find_threshold(
    row_ptr,
    history_ptr,
    mask_ptr,
    flags,
    repetition,
    presence,
    frequency,
    low,  # keys: the answer is in low <= key < high
    high,
    target,
    largest,
    scale,
    shift,
    VOCAB_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    BY_MASS: tl.constexpr,
):
    """The largest number such that what is not below it weighs at least ``target``.

    The weight of x is 1, or 2 ** ((x - largest) * scale). Sums keep one order, so that a larger set is never lighter.
    """
    while high - low > 1:
        step = (high - low + 3) // 4
        cut_1 = from_key(low + step, shift)
        cut_2 = from_key(low + 2 * step, shift)
        cut_3 = from_key(low + 3 * step, shift)
        above_1 = tl.zeros([TILE], tl.float32)
        above_2 = tl.zeros([TILE], tl.float32)
        above_3 = tl.zeros([TILE], tl.float32)
        for first in range(0, VOCAB_SIZE, TILE):
            ids = first + tl.arange(0, TILE)
            inside = ids < VOCAB_SIZE
            x = load_logits(row_ptr, history_ptr, mask_ptr, ids, inside, flags, repetition, presence, frequency)
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
    return from_key(low, shift)


@triton.jit
def search_kernel(
    logits_ptr,
    records_ptr,
    history_ptr,
    masks_ptr,
    floors_ptr,
    lasts_ptr,
    states_ptr,
    stride_row,
    VOCAB_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SHIFT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    begin(DEPENDENT)
    row = tl.program_id(0)
    if tl.load(states_ptr + row) == OPEN:
        flags, history_ptr, mask_ptr, repetition, presence, frequency = load_changes(
            records_ptr, row, history_ptr, masks_ptr, VOCAB_SIZE
        )
        row_ptr = logits_ptr + row.to(tl.int64) * stride_row
        shift = tl.where((flags & SHIFTED) != 0, 0, SHIFT)
        temperature = clamp_temperature(load_float(records_ptr, row, TEMPERATURE))
        scale = LOG2_E / temperature
        at = tl.arange(0, TILE)
        best = tl.full([TILE], float("-inf"), tl.float32)
        for first in range(0, VOCAB_SIZE, TILE):
            ids = first + at
            inside = ids < VOCAB_SIZE
            x = load_logits(row_ptr, history_ptr, mask_ptr, ids, inside, flags, repetition, presence, frequency)
            best = tl.maximum(best, x)
        largest = tl.max(best, 0)
        high = to_key(largest, shift) + 1
        floor = min_p_floor(records_ptr, row, largest, temperature)
        last = tl.full([], VOCAB_SIZE, tl.int32)
        top_k, top_p = load_int(records_ptr, row, TOP_K), load_float(records_ptr, row, TOP_P)
        if (top_k > 0) & (top_k < VOCAB_SIZE):
            # each lane's largest is not below the smallest of them, so that at least TILE tokens are not
            bound = tl.where(top_k <= TILE, tl.min(best, 0), float("-inf"))
            kth = find_threshold(
                row_ptr, history_ptr, mask_ptr, flags, repetition, presence, frequency, to_key(bound, shift), high,
                top_k.to(tl.float32), largest, scale, shift, VOCAB_SIZE, TILE, False,
            )  # fmt: skip
            floor = tl.maximum(floor, tl.div_rn(kth, temperature))
        if top_p < 1:
            masses = tl.zeros([TILE], tl.float32)
            for first in range(0, VOCAB_SIZE, TILE):
                ids = first + at
                inside = ids < VOCAB_SIZE
                x = load_logits(row_ptr, history_ptr, mask_ptr, ids, inside, flags, repetition, presence, frequency)
                masses += tl.where(tl.div_rn(x, temperature) >= floor, tl.exp2((x - largest) * scale), 0.0)
            target = tl.maximum(top_p, SMALLEST_TOP_P) * tl.sum(masses, 0)
            bound = tl.maximum(largest - REACH * temperature, lower(floor * temperature))
            crossing = find_threshold(
                row_ptr, history_ptr, mask_ptr, flags, repetition, presence, frequency, to_key(bound, shift), high,
                target, largest, scale, shift, VOCAB_SIZE, TILE, True,
            )  # fmt: skip
            value = tl.div_rn(crossing, temperature)
            if value >= floor:
                masses = tl.zeros([TILE], tl.float32)
                equals = tl.zeros([TILE], tl.int32)
                for first in range(0, VOCAB_SIZE, TILE):
                    ids = first + at
                    inside = ids < VOCAB_SIZE
                    x = load_logits(row_ptr, history_ptr, mask_ptr, ids, inside, flags, repetition, presence, frequency)
                    scaled = tl.div_rn(x, temperature)
                    masses += tl.where(scaled > value, tl.exp2((x - largest) * scale), 0.0)
                    equals += (scaled == value).to(tl.int32)
                num_kept = count_kept(tl.sum(masses, 0), target, crossing, largest, scale, VOCAB_SIZE)
                if num_kept < tl.sum(equals, 0):
                    last = tl.full([], -1, tl.int32)
                    num_before = tl.full([], 0, tl.int32)
                    for first in range(0, VOCAB_SIZE, TILE):
                        ids = first + at
                        inside = ids < VOCAB_SIZE
                        x = load_logits(
                            row_ptr, history_ptr, mask_ptr, ids, inside, flags, repetition, presence, frequency
                        )
                        equal = (tl.div_rn(x, temperature) == value).to(tl.int32)
                        num_equal = tl.sum(equal, 0)
                        if (num_before < num_kept) & (num_before + num_equal >= num_kept):
                            ranks = num_before + tl.cumsum(equal, 0)
                            last = tl.max(tl.where((equal > 0) & (ranks == num_kept), ids, -1), 0)
                        num_before += num_equal
                floor = value
        tl.store(floors_ptr + row, floor)
        tl.store(lasts_ptr + row, last)
        tl.store(states_ptr + row, BOUNDED)


def triton_draw_late(
    logits: Tensor,
    table: DrawTable,
    out: Tensor,
    *,
    may_filter: bool = True,
    may_need_search: bool = True,
    most_groups: int = MOST_GROUPS,
    scratch: LateScratch | None = None,
) -> None:
    """See draw_rows.draw_late; rows of logits contiguous. On the current stream.

    Args:
        most_groups: a power of two; rows that need more are searched. Without ``scratch``.
    """
    num_rows, vocab_size = logits.shape
    if num_rows == 0:
        return
    scratch = scratch or LateScratch.of(num_rows, vocab_size, logits.device, most_groups)
    scores, token_ids, launcher = scratch.scores, scratch.token_ids, scratch.launcher
    addresses = tuple(tensor.data_ptr() for tensor in (logits, out, *table))
    key = num_rows, logits.dtype, logits.stride(0), may_filter, may_need_search, addresses
    if launcher.repeat(key):
        return
    if may_filter:
        _bound(logits, table, out, scratch, may_need_search)
        launch_draw(DrawLaunch.of(logits, table, out, scratch.bounds, BOUNDED_ROWS.value), scores, token_ids, launcher)
    else:
        launch_draw(DrawLaunch.of(logits, table, out, None, LATE_ROWS.value), scores, token_ids, launcher)
    launcher.remember(key)


def _bound(logits: Tensor, table: DrawTable, out: Tensor, scratch: LateScratch, may_need_search: bool) -> None:
    """Draw the rows that few tokens decide, and bound the others."""
    assert logits.stride(1) == 1 and out.is_contiguous() and logits.shape[1] == table.vocab_size
    (num_rows, vocab_size), most_groups, bounds = logits.shape, scratch.chosen.shape[1], scratch.bounds
    num_groups, shift, stride = triton.cdiv(vocab_size, GROUP), KEY_SHIFT[logits.dtype], logits.stride(0)
    padded_groups = max(32, triton.next_power_of_2(num_groups))
    pdl = dict(dependent_launch(logits.device))
    dependent, options = pdl.pop("DEPENDENT"), {"enable_fp_fusion": False, **pdl}
    launch, key = scratch.launcher.launch, (logits.dtype, stride)
    launch(
        key, survey_kernel, (triton.cdiv(num_groups, SURVEYED), num_rows, 1),
        (logits, *table, scratch.group_max, scratch.group_mass, stride, vocab_size, num_groups, SURVEYED, GROUP,
         dependent),
        num_warps=SURVEY_WARPS, **options,
    )  # fmt: skip
    launch(
        key, choose_kernel, (num_rows, 1, 1),
        (logits, *table, scratch.group_max, scratch.group_mass, scratch.chosen, *bounds, out, stride, vocab_size,
         num_groups, padded_groups, min(FEW_GROUPS, most_groups), most_groups, GROUP, shift, dependent),
        num_warps=CHOOSE_WARPS, **options,
    )  # fmt: skip
    if may_need_search:
        launch(
            key, search_kernel, (num_rows, 1, 1),
            (logits, *table, *bounds, stride, vocab_size, TILE, shift, dependent),
            num_warps=SEARCH_WARPS, **options,
        )  # fmt: skip
