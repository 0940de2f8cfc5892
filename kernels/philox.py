"""Philox4x32-10, the counter-based random generator behind sampling.

J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC'11), section 3.3;
constants as in Random123. A draw is a pure function of (seed, position, token id): no state to hand over when a
request moves to another worker, and the same bits on CPU and GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MULTIPLIER_0 = 0xD2511F53
MULTIPLIER_1 = 0xCD9E8D57
WEYL_0 = 0x9E3779B9
WEYL_1 = 0xBB67AE85
NUM_ROUNDS = 10
MASK_32 = 0xFFFFFFFF
LARGEST_UNIFORM = 1.0 - 2.0**-24


class Words(NamedTuple):
    """Four 32-bit words, each in an int64 tensor, between 0 and 2**32 - 1."""

    x0: Tensor
    x1: Tensor
    x2: Tensor
    x3: Tensor


def philox4x32(counter: Words, key0: Tensor, key1: Tensor) -> Words:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit words and broadcast with each other."""
    x0, x1, x2, x3 = counter
    for _ in range(NUM_ROUNDS):
        high0, low0 = _multiply(MULTIPLIER_0, x0)
        high1, low1 = _multiply(MULTIPLIER_1, x2)
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, low1, high0 ^ x3 ^ key1, low0
        key0 = (key0 + WEYL_0) & MASK_32
        key1 = (key1 + WEYL_1) & MASK_32
    return Words(x0, x1, x2, x3)


def philox_uniform(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """One uniform number for each (row, token id).

    The key is the 64-bit seed, the counter is (token_id // 4, position low, position high, 0), and the token
    takes word token_id % 4 of the result. The number is the float32 nearest to word + 0.5 (two roundings: of
    the word, of the sum) times 2**-32, and at most 1 - 2**-24. So small numbers, which win in Gumbel-max
    through -log1p(-u), are not coarser than the 32 bits they come from.

    Args:
        seeds: [B] int64. positions: [B] int64, 0-based index of the output token to draw.

    Returns:
        [B, vocab_size] float32 in (0, 1).
    """
    key0, key1 = _split(seeds[:, None])
    position0, position1 = _split(positions[:, None])
    group = torch.arange(-(-vocab_size // 4), device=seeds.device)[None]
    words = philox4x32(Words(group, position0, position1, torch.zeros_like(position0)), key0, key1)
    bits = torch.stack(words, dim=-1).flatten(1)[:, :vocab_size]
    return _to_uniform(bits)


def _to_uniform(bits: Tensor) -> Tensor:
    return ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp_(max=LARGEST_UNIFORM)


def _multiply(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product; int64 wraps, so the sign bit is masked away."""
    product = x * multiplier
    return (product >> 32) & MASK_32, product & MASK_32


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    return x & MASK_32, (x >> 32) & MASK_32
