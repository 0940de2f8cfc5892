"""The Triton counterpart of history.remember: clear the slots, then scatter all ids at once."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pdray.kernels.sampling import history as reference
from pdray.kernels.sampling.history import Joins

CLEARED, SCATTERED = 4096, 1024  # words, and ids, of a program
PROMPT = tl.constexpr(reference.PROMPT)
END = tl.constexpr(reference.END)
BIAS_SHIFT = tl.constexpr(reference.BIAS_SHIFT)
BIASES = tl.constexpr(reference.BIASES)
HEADER = tl.constexpr(reference.HEADER)


@triton.jit
def clear_kernel(history_ptr, joins_ptr, SLOT_SIZE: tl.constexpr, NUM: tl.constexpr):
    slot = tl.load(joins_ptr + tl.program_id(1) * HEADER).to(tl.int64)
    at = tl.program_id(0) * NUM + tl.arange(0, NUM)
    tl.store(history_ptr + slot * SLOT_SIZE + at, tl.zeros([NUM], tl.int32), mask=at < SLOT_SIZE)


@triton.jit
def scatter_kernel(history_ptr, joins_ptr, SLOT_SIZE: tl.constexpr, NUM: tl.constexpr):
    header_ptr = joins_ptr + tl.program_id(1) * HEADER
    history_ptr += tl.load(header_ptr).to(tl.int64) * SLOT_SIZE + BIASES
    at = tl.load(header_ptr + 1) + tl.program_id(0) * NUM + tl.arange(0, NUM)
    end_of_prompt, end_of_outputs = tl.load(header_ptr + 2), tl.load(header_ptr + 3)
    end_of_ends, end_of_biased = tl.load(header_ptr + 4), tl.load(header_ptr + 5)
    end_of_places, end = tl.load(header_ptr + 6), tl.load(header_ptr + 7)
    part = tl.load(joins_ptr + at, mask=at < end, other=0)
    is_output = (at >= end_of_prompt) & (at < end_of_outputs)
    is_biased = (at >= end_of_ends) & (at < end_of_biased)
    place = tl.load(joins_ptr + at + (end_of_biased - end_of_ends), mask=is_biased, other=0)
    bits = tl.where(at < end_of_prompt, PROMPT, tl.where(is_biased, place << BIAS_SHIFT, END))
    words = tl.where(at < end_of_biased, part, 0)
    tl.atomic_add(history_ptr + words, tl.full([NUM], 1, tl.int32), mask=is_output)
    tl.atomic_or(history_ptr + words, bits, mask=(at < end_of_biased) & (is_output == 0))
    tl.store(history_ptr - 1 - (at - end_of_places), part, mask=(at >= end_of_places) & (at < end))


def triton_remember(history: Tensor, joins: Joins) -> None:
    """See history.remember; ``joins`` on the device. On the current stream."""
    size = history.shape[1]
    if joins.num:
        clear_kernel[(triton.cdiv(size, CLEARED), joins.num)](history, joins.words, SLOT_SIZE=size, NUM=CLEARED)
        scatter_kernel[(triton.cdiv(max(joins.longest, 1), SCATTERED), joins.num)](
            history, joins.words, SLOT_SIZE=size, NUM=SCATTERED
        )
