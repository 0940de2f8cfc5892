"""Late draws that a few tokens decide: the first two of their kernels.

survey_kernel takes the largest logit of each group of tokens, with many programs a row. The k-th largest of those is
not above the k-th largest logit, so a row's k groups hold what top_k leaves; choose_kernel finds them, loads them at
once and draws. For top_p alone it takes the groups with the largest logits, and is done if they hold the mass. A row
that more groups might have to say in is left to search_kernel and to the draw of all tokens; see late_draw_triton.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from pdray.kernels.dependent_launch import begin
from pdray.kernels.sampling.draw_triton import BOUNDED, DRAWN, OPEN
from pdray.kernels.sampling.philox_triton import gumbel, philox_uniform_groups
from pdray.kernels.sampling.row_triton import (
    LATE,
    MIN_P,
    POSITION,
    SEED,
    SHIFTED,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    clamp_temperature,
    keep_token,
    load_changes,
    load_float,
    load_int,
    load_logits,
    load_long,
)
from pdray.kernels.sampling.threshold_triton import find_in, to_key

GROUP = 128  # token ids
SURVEYED = 32  # groups of a program

LOG2_E = tl.constexpr(1.4426950408889634)
# Tokens below the largest logit by so many temperatures hold less than V * 4e-18 of the mass: 1 - top_p is never that
# small.
REACH = tl.constexpr(40.0)
SMALLEST_TOP_P = tl.constexpr(1e-30)  # a target of 0 would be reached by nothing at all
LESS = tl.constexpr(1e-6)  # more than what logits whose quotients are equal may differ by, of themselves


@triton.jit
def lower(x):
    """Not above any number whose quotient by a temperature is x's."""
    return x - tl.abs(x) * LESS


@triton.jit
def min_p_floor(records_ptr, row, largest, temperature):
    """Of logit / T; -inf without min_p."""
    min_p = load_float(records_ptr, row, MIN_P)
    top = tl.div_rn(largest, temperature)
    return tl.where(min_p > 0, top + tl.log(tl.minimum(min_p, 1.0)), float("-inf"))


@triton.jit
def survey_kernel(
    logits_ptr,
    records_ptr,
    history_ptr,
    masks_ptr,
    group_max_ptr,
    group_mass_ptr,
    stride_row,
    VOCAB_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM: tl.constexpr,
    GROUP: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    begin(DEPENDENT)
    row = tl.program_id(1)
    flags, history_ptr, masks_ptr, repetition, presence, frequency = load_changes(
        records_ptr, row, history_ptr, masks_ptr, VOCAB_SIZE
    )
    if (flags & LATE) != 0:
        groups = tl.program_id(0) * NUM + tl.arange(0, NUM)
        token_ids = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        row_ptr = logits_ptr + row.to(tl.int64) * stride_row
        inside = token_ids < VOCAB_SIZE
        x = load_logits(row_ptr, history_ptr, masks_ptr, token_ids, inside, flags, repetition, presence, frequency)
        largest = tl.max(x, 1)
        at = row * NUM_GROUPS + groups
        tl.store(group_max_ptr + at, largest, mask=groups < NUM_GROUPS)
        if load_float(records_ptr, row, TOP_P) < 1:
            scale = LOG2_E / clamp_temperature(load_float(records_ptr, row, TEMPERATURE))
            base = tl.where(largest > float("-inf"), largest, 0.0)
            mass = tl.sum(tl.exp2((x - base[:, None]) * scale), 1)
            tl.store(group_mass_ptr + at, mass, mask=groups < NUM_GROUPS)


@triton.jit
def find_last_id(is_equal, token_ids, num_kept, VOCAB_SIZE: tl.constexpr):
    """The num_kept-th lowest of the ids that are equal."""
    low, high = tl.full([], -1, tl.int32), tl.full([], VOCAB_SIZE - 1, tl.int32)  # low < the answer <= high
    while high - low > 1:
        middle = (low + high) // 2
        enough = tl.sum((is_equal & (token_ids <= middle)).to(tl.int32)) >= num_kept
        low, high = tl.where(enough, low, middle), tl.where(enough, middle, high)
    return high


@triton.jit
def count_kept(masses_above, target, crossing, largest, scale, VOCAB_SIZE: tl.constexpr):
    """Of the tokens at the crossing, how many the mass that is missing above them takes; at least one."""
    missing = (target - masses_above) / tl.exp2((crossing - largest) * scale)
    return tl.maximum(tl.ceil(tl.minimum(missing, VOCAB_SIZE)), 1.0).to(tl.int32)


@triton.jit
def draw_few(
    row_ptr,
    records_ptr,
    row,
    history_ptr,
    masks_ptr,
    flags,
    repetition,
    presence,
    frequency,
    chosen_ptr,  # num groups, in order
    num,
    bound,  # see choose_kernel
    beyond,
    whole,  # the mass of all tokens, if some are not above ``beyond``
    largest,
    floor,
    temperature,
    has_top_k,
    has_top_p,
    shift,
    out_ptr,
    VOCAB_SIZE: tl.constexpr,
    MOST: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Draw from the chosen groups. Returns DRAWN, or OPEN if they do not decide the row."""
    state = tl.full([], DRAWN, tl.int32)
    last = tl.full([], VOCAB_SIZE, tl.int32)
    scale = LOG2_E / temperature
    end_key = to_key(largest, shift) + 1
    lanes = tl.arange(0, MOST)
    firsts = tl.load(chosen_ptr + lanes, mask=lanes < num, other=0) * GROUP
    token_ids = firsts[:, None] + tl.arange(0, GROUP)[None, :]
    inside = (lanes < num)[:, None] & (token_ids < VOCAB_SIZE)
    x = load_logits(row_ptr, history_ptr, masks_ptr, token_ids, inside, flags, repetition, presence, frequency)
    x = tl.where(x > beyond, x, float("-inf"))
    scaled = tl.div_rn(x, temperature)
    if has_top_k:
        one = tl.full([MOST, GROUP], 1.0, tl.float32)
        top_k = load_int(records_ptr, row, TOP_K).to(tl.float32)
        kth = find_in(x, one, to_key(bound, shift), end_key, top_k, shift)
        floor = tl.maximum(floor, tl.div_rn(kth, temperature))
    if has_top_p:
        weight = tl.exp2((x - largest) * scale)
        mass = tl.sum(tl.where(scaled >= floor, weight, 0.0))
        if beyond == float("-inf"):
            whole = mass
        target = tl.maximum(load_float(records_ptr, row, TOP_P), SMALLEST_TOP_P) * whole
        if (beyond > float("-inf")) & (mass < target):
            state = tl.full([], OPEN, tl.int32)
        else:
            start = tl.maximum(largest - REACH * temperature, lower(floor * temperature))
            start_key = to_key(tl.maximum(start, beyond), shift)
            crossing = find_in(x, weight, start_key, end_key, target, shift)
            value = tl.div_rn(crossing, temperature)
            if (beyond > float("-inf")) & (value <= tl.div_rn(beyond, temperature)):
                state = tl.full([], OPEN, tl.int32)
            elif value >= floor:
                above = tl.sum(tl.where(scaled > value, weight, 0.0))
                num_kept = count_kept(above, target, crossing, largest, scale, VOCAB_SIZE)
                is_equal = scaled == value
                if num_kept < tl.sum(is_equal.to(tl.int32)):
                    last = find_last_id(is_equal, token_ids, num_kept, VOCAB_SIZE)
                floor = value
    if state == DRAWN:
        seed, position = load_long(records_ptr, row, SEED), load_long(records_ptr, row, POSITION)
        stays = inside & ((scaled > floor) | ((scaled == floor) & (token_ids <= last)))
        scores = scaled + gumbel(philox_uniform_groups(seed, position, firsts, MOST, GROUP))
        scores = tl.where(stays, scores, float("-inf"))
        best = tl.max(scores)
        token_id = tl.min(tl.where(scores == best, token_ids, 0x7FFFFFFF))
        keep_token(out_ptr, row, token_id, flags, history_ptr)
    return state


@triton.jit
def choose_kernel(
    logits_ptr,
    records_ptr,
    history_ptr,
    masks_ptr,
    group_max_ptr,
    group_mass_ptr,
    chosen_ptr,
    floors_ptr,
    lasts_ptr,
    states_ptr,
    out_ptr,
    stride_row,
    VOCAB_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    FEW: tl.constexpr,  # groups that are looked into: a tile of so many if they are enough
    MOST: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    begin(DEPENDENT)
    row = tl.program_id(0)
    state = tl.full([], DRAWN, tl.int32)
    flags, history_ptr, masks_ptr, repetition, presence, frequency = load_changes(
        records_ptr, row, history_ptr, masks_ptr, VOCAB_SIZE
    )
    if (flags & LATE) != 0:
        temperature = clamp_temperature(load_float(records_ptr, row, TEMPERATURE))
        scale = LOG2_E / temperature
        top_k, top_p = load_int(records_ptr, row, TOP_K), load_float(records_ptr, row, TOP_P)
        is_random = load_float(records_ptr, row, TEMPERATURE) > 0
        has_top_k, has_top_p = is_random & (top_k > 0) & (top_k < VOCAB_SIZE), is_random & (top_p < 1)
        shift = tl.where((flags & SHIFTED) != 0, 0, SHIFT)

        groups = tl.arange(0, PADDED_GROUPS)
        group_max = tl.load(group_max_ptr + row * NUM_GROUPS + groups, mask=groups < NUM_GROUPS, other=float("-inf"))
        largest = tl.max(group_max, 0)
        end_key = to_key(largest, shift) + 1
        ones = tl.full([PADDED_GROUPS], 1.0, tl.float32)
        floor = min_p_floor(records_ptr, row, largest, temperature)
        floor = tl.where(is_random, floor, float("-inf"))
        bound = largest * 0.0 + float("-inf")  # not above the k-th largest logit
        is_used = group_max > float("-inf")
        num_used = tl.sum(is_used.to(tl.int32), 0)
        low_key = to_key(tl.min(tl.where(is_used, group_max, float("inf")), 0), shift)
        if has_top_k & (top_k <= num_used):
            bound = find_in(group_max, ones, low_key, end_key, top_k.to(tl.float32), shift)
        least = lower(tl.maximum(floor * temperature, bound))
        selected = is_used & (group_max >= least)
        num = tl.sum(selected.to(tl.int32), 0)
        beyond = largest * 0.0 + float("-inf")  # only logits above it are looked at
        if (num > MOST) & has_top_p & (has_top_k == 0) & (floor == float("-inf")):
            beyond = find_in(group_max, ones, low_key, end_key, MOST + 1.0, shift)
            selected = is_used & (group_max > beyond)
            num = tl.sum(selected.to(tl.int32), 0)

        if largest == float("-inf"):  # nothing to draw from
            keep_token(out_ptr, row, tl.full([], 0, tl.int32), flags, history_ptr)
        elif (num > MOST) | (is_random == 0):
            state = tl.where(has_top_k | has_top_p, OPEN, BOUNDED).to(tl.int32)
            tl.store(floors_ptr + row, floor)
            tl.store(lasts_ptr + row, VOCAB_SIZE)
        else:
            at = tl.cumsum(selected.to(tl.int32), 0) - 1
            row_ptr, chosen_ptr = logits_ptr + row.to(tl.int64) * stride_row, chosen_ptr + row * MOST
            tl.store(chosen_ptr + at, groups, mask=selected)
            tl.debug_barrier()
            whole = largest * 0.0
            if beyond > float("-inf"):
                group_mass = tl.load(group_mass_ptr + row * NUM_GROUPS + groups, mask=is_used, other=0.0)
                whole = tl.sum(tl.where(is_used, group_mass * tl.exp2((group_max - largest) * scale), 0.0), 0)
            if num <= FEW:
                state = draw_few(
                    row_ptr, records_ptr, row, history_ptr, masks_ptr, flags, repetition, presence, frequency,
                    chosen_ptr, num, bound, beyond, whole, largest, floor, temperature, has_top_k, has_top_p, shift,
                    out_ptr, VOCAB_SIZE, FEW, GROUP,
                )  # fmt: skip
            else:
                state = draw_few(
                    row_ptr, records_ptr, row, history_ptr, masks_ptr, flags, repetition, presence, frequency,
                    chosen_ptr, num, bound, beyond, whole, largest, floor, temperature, has_top_k, has_top_p, shift,
                    out_ptr, VOCAB_SIZE, MOST, GROUP,
                )  # fmt: skip
    tl.store(states_ptr + row, state)
