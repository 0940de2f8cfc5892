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
HEADER = tl.constexpr(reference.HEADER)


@triton.jit
def clear_kernel(history_ptr, joins_ptr, VOCAB_SIZE: tl.constexpr, NUM: tl.constexpr):
    slot = tl.load(joins_ptr + tl.program_id(1) * HEADER).to(tl.int64)
    at = tl.program_id(0) * NUM + tl.arange(0, NUM)
    tl.store(history_ptr + slot * VOCAB_SIZE + at, tl.zeros([NUM], tl.int32), mask=at < VOCAB_SIZE)


@triton.jit
def scatter_kernel(history_ptr, joins_ptr, VOCAB_SIZE: tl.constexpr, NUM: tl.constexpr):
    header_ptr = joins_ptr + tl.program_id(1) * HEADER
    slot = tl.load(header_ptr).to(tl.int64)
    end_of_prompt, end_of_outputs, end = tl.load(header_ptr + 2), tl.load(header_ptr + 3), tl.load(header_ptr + 4)
    at = tl.load(header_ptr + 1) + tl.program_id(0) * NUM + tl.arange(0, NUM)
    words = history_ptr + slot * VOCAB_SIZE + tl.load(joins_ptr + at, mask=at < end, other=0)
    is_output = (at >= end_of_prompt) & (at < end_of_outputs)
    tl.atomic_add(words, tl.full([NUM], 1, tl.int32), mask=is_output)
    bits = tl.where(at < end_of_prompt, PROMPT, END)
    tl.atomic_or(words, bits, mask=(at < end) & (is_output == 0))


def triton_remember(history: Tensor, joins: Joins) -> None:
    """See history.remember; ``joins`` on the device. On the current stream."""
    vocab_size = history.shape[1]
    if joins.num:
        clear_kernel[(triton.cdiv(vocab_size, CLEARED), joins.num)](
            history, joins.words, VOCAB_SIZE=vocab_size, NUM=CLEARED
        )
        scatter_kernel[(triton.cdiv(max(joins.longest, 1), SCATTERED), joins.num)](
            history, joins.words, VOCAB_SIZE=vocab_size, NUM=SCATTERED
        )
