"""The Triton counterpart of report: the raw logits are read once, by many programs a row, then a few of them again.

The first kernel takes each group's largest logit, and the sums and counts of its program. The n most likely tokens are
in the n groups that come first by (largest logit, lowest ids): each of those has a token that comes before whatever
another group holds. The second kernel picks those groups, then their tokens, one after the other.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdray.kernels.dependent_launch import begin, dependent_launch
from pdray.kernels.sampling import draw_rows
from pdray.kernels.sampling.groups_triton import GROUP, LOG2_E, SURVEYED
from pdray.kernels.sampling.row_triton import FLAGS, NUM_LOGPROBS, REPORTED, load_int, load_raw_logits
from pdray.kernels.sampling.rows import DrawTable
from pdray.kernels.sampling.threshold_triton import from_key, to_key

SURVEY_WARPS, REPORT_WARPS = 8, 8
HEAD = tl.constexpr(draw_rows.REPORT_HEAD)
TAKEN = tl.constexpr(-(2**63))  # below every key


@triton.jit
def survey_raw_kernel(
    logits_ptr,
    records_ptr,
    drawn_ptr,
    group_max_ptr,
    split_max_ptr,
    split_sum_ptr,
    split_larger_ptr,
    stride_row,
    VOCAB_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM: tl.constexpr,
    GROUP: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    begin(DEPENDENT)
    split, row = tl.program_id(0), tl.program_id(1)
    if (load_int(records_ptr, row, FLAGS) & REPORTED) != 0:
        row_ptr = logits_ptr + row.to(tl.int64) * stride_row
        drawn = load_raw_logits(row_ptr, tl.load(drawn_ptr + row), True)
        groups = split * NUM + tl.arange(0, NUM)
        token_ids = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x = load_raw_logits(row_ptr, token_ids, token_ids < VOCAB_SIZE)
        group_max = tl.max(x, 1)
        tl.store(group_max_ptr + row * NUM_GROUPS + groups, group_max, mask=groups < NUM_GROUPS)
        largest = tl.max(group_max, 0)
        base = tl.where(largest > float("-inf"), largest, 0.0)
        partial = row * tl.num_programs(0) + split
        tl.store(split_max_ptr + partial, largest)
        tl.store(split_sum_ptr + partial, tl.sum(tl.exp2((x - base) * LOG2_E)))
        tl.store(split_larger_ptr + partial, tl.sum((x > drawn).to(tl.int32)))


@triton.jit
def ordered(x, ids):
    """int64 that orders by (x, lowest id)."""
    return (to_key(x, 0) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def id_of(key):
    return (0x7FFFFFFF - (key & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def logprob_of(x, log_sum):
    """-inf where the logit is, also if all of the row's are."""
    return tl.where(x > float("-inf"), x - log_sum, float("-inf"))


@triton.jit
def report_kernel(
    logits_ptr,
    records_ptr,
    drawn_ptr,
    group_max_ptr,
    split_max_ptr,
    split_sum_ptr,
    split_larger_ptr,
    out_ptr,
    stride_row,
    num_splits,
    VOCAB_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    NUM_TOP: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    begin(DEPENDENT)
    row = tl.program_id(0)
    out_ptr += row * (HEAD + 2 * NUM_TOP)
    drawn_id = tl.load(drawn_ptr + row)
    tl.store(out_ptr, drawn_id.to(tl.int32))
    if (load_int(records_ptr, row, FLAGS) & REPORTED) != 0:
        row_ptr = logits_ptr + row.to(tl.int64) * stride_row
        splits = tl.arange(0, PADDED_SPLITS)
        at, is_split = row * num_splits + splits, splits < num_splits
        split_max = tl.load(split_max_ptr + at, mask=is_split, other=float("-inf"))
        largest = tl.max(split_max, 0)
        base = tl.where(largest > float("-inf"), largest, 0.0)
        sums = tl.load(split_sum_ptr + at, mask=is_split, other=0.0)
        total = tl.sum(tl.where(split_max > float("-inf"), sums * tl.exp2((split_max - base) * LOG2_E), 0.0), 0)
        log_sum = base + tl.log(total)
        rank = 1 + tl.sum(tl.load(split_larger_ptr + at, mask=is_split, other=0), 0)
        tl.store(out_ptr + 1, rank)
        logprob = logprob_of(load_raw_logits(row_ptr, drawn_id, True), log_sum)
        tl.store(out_ptr + 2, logprob.to(tl.int32, bitcast=True))

        asked = tl.minimum(tl.minimum(load_int(records_ptr, row, NUM_LOGPROBS), NUM_TOP), VOCAB_SIZE)
        lanes = tl.arange(0, LANES)
        groups = tl.arange(0, PADDED_GROUPS)
        group_max = tl.load(group_max_ptr + row * NUM_GROUPS + groups, mask=groups < NUM_GROUPS, other=float("-inf"))
        keys = tl.where(groups < NUM_GROUPS, ordered(group_max, groups), TAKEN)
        num_groups = tl.minimum(asked, NUM_GROUPS)
        firsts = tl.zeros([LANES], tl.int32)
        for i in range(num_groups):
            best = tl.max(keys, 0)
            keys = tl.where(keys == best, TAKEN, keys)
            firsts = tl.where(lanes == i, id_of(best) * GROUP, firsts)
        token_ids = firsts[:, None] + tl.arange(0, GROUP)[None, :]
        inside = (lanes < num_groups)[:, None] & (token_ids < VOCAB_SIZE)
        x = load_raw_logits(row_ptr, token_ids, inside)
        candidates = tl.where(inside, ordered(x, token_ids), TAKEN)
        top = tl.full([LANES], TAKEN, tl.int64)
        for i in range(asked):
            best = tl.max(candidates)
            candidates = tl.where(candidates == best, TAKEN, candidates)
            top = tl.where(lanes == i, best, top)
        is_asked = lanes < asked
        logprobs = logprob_of(from_key(top >> 32, 0), log_sum)
        tl.store(out_ptr + HEAD + lanes, tl.where(is_asked, id_of(top), -1), mask=lanes < NUM_TOP)
        tl.store(out_ptr + HEAD + NUM_TOP + lanes, logprobs.to(tl.int32, bitcast=True), mask=is_asked)


def triton_report(logits: Tensor, table: DrawTable, token_ids: Tensor, num_top: int) -> Tensor:
    """See draw_rows.report; rows of logits contiguous. On the current stream."""
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1 and token_ids.is_contiguous()
    device, num_groups = logits.device, triton.cdiv(vocab_size, GROUP)
    num_splits = triton.cdiv(num_groups, SURVEYED)
    out = torch.empty((num_rows, draw_rows.REPORT_HEAD + 2 * num_top), dtype=torch.int32, device=device)
    if num_rows == 0:
        return out
    options = dependent_launch(device)
    group_max = torch.empty((num_rows, num_groups), dtype=torch.float32, device=device)
    split_max, split_sum = torch.empty((2, num_rows, num_splits), dtype=torch.float32, device=device)
    split_larger = torch.empty((num_rows, num_splits), dtype=torch.int32, device=device)
    inputs = logits, table.records, token_ids, group_max, split_max, split_sum, split_larger
    survey_raw_kernel[(num_splits, num_rows)](
        *inputs, logits.stride(0), VOCAB_SIZE=vocab_size, NUM_GROUPS=num_groups, NUM=SURVEYED, GROUP=GROUP,
        num_warps=SURVEY_WARPS, **options,
    )  # fmt: skip
    report_kernel[(num_rows,)](
        *inputs, out, logits.stride(0), num_splits, VOCAB_SIZE=vocab_size, NUM_GROUPS=num_groups,
        PADDED_GROUPS=max(32, triton.next_power_of_2(num_groups)), PADDED_SPLITS=triton.next_power_of_2(num_splits),
        NUM_TOP=num_top, LANES=max(2, triton.next_power_of_2(num_top)), GROUP=GROUP, num_warps=REPORT_WARPS, **options,
    )  # fmt: skip
    return out
