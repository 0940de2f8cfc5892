"""Numbers as integers that order as they do, and the search for one of them by what lies above it."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl

KEY_SHIFT = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}  # low bits of a float32 that such numbers leave 0


@triton.jit
def to_key(value, shift):
    """int64 that orders as float32 values do."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # + 0.0 makes -0.0 equal to 0.0
    return (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> shift).to(tl.int64)


@triton.jit
def from_key(key, shift):
    """The number of a key, among those whose ``shift`` low bits are 0."""
    shifted = (key << shift).to(tl.int32)
    bits = tl.where(shifted < 0, (shifted ^ 0x7FFFFFFF) >> shift << shift, shifted)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def find_in(x, weight, low, high, target, shift):
    """The largest number such that the ``x`` that are not below it weigh at least ``target``.

    Splits the interval low <= key < high, in which the answer is, in four, again and again. Sums keep one order, so
    that a larger set is never lighter.
    """
    while high - low > 1:
        step = (high - low + 3) // 4
        num_heavy = (tl.sum(tl.where(x >= from_key(low + step, shift), weight, 0.0)) >= target).to(tl.int64)
        num_heavy += (tl.sum(tl.where(x >= from_key(low + 2 * step, shift), weight, 0.0)) >= target).to(tl.int64)
        num_heavy += (tl.sum(tl.where(x >= from_key(low + 3 * step, shift), weight, 0.0)) >= target).to(tl.int64)
        low += num_heavy * step
        high = tl.minimum(high, low + step)
    return from_key(low, shift)
