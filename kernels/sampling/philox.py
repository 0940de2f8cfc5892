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
        # int64 multiplication wraps, which leaves 64 right bits. x1 and x3 keep them all: nothing but
        # their low halves reaches a result.
        product0 = x0 * MULTIPLIER_0
        product1 = x2 * MULTIPLIER_1
        x0 = ((product1 >> 32) ^ x1 ^ key0) & MASK_32
        x2 = ((product0 >> 32) ^ x3 ^ key1) & MASK_32
        x1, x3 = product1, product0
        key0 = (key0 + WEYL_0) & MASK_32
        key1 = (key1 + WEYL_1) & MASK_32
    return Words(x0, x1 & MASK_32, x2, x3 & MASK_32)


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
    group = torch.arange(-(-vocab_size // 4), device=seeds.device)[None]
    words = _draw(seeds[:, None], positions[:, None], group)
    return _to_uniform(torch.stack(words, dim=-1).flatten(1)[:, :vocab_size])


def philox_uniform_at(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """philox_uniform's number for each of N triples, all [N] int64; returns [N] float32."""
    words = torch.stack(_draw(seeds, positions, token_ids // 4))
    return _to_uniform(words.gather(0, (token_ids % 4)[None])[0])


def _draw(seeds: Tensor, positions: Tensor, group: Tensor) -> Words:
    position0, position1 = _split(positions)
    return philox4x32(Words(group, position0, position1, torch.zeros_like(positions)), *_split(seeds))


def _to_uniform(bits: Tensor) -> Tensor:
    return ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp_(max=LARGEST_UNIFORM)


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high 32 bits."""
    return x & MASK_32, (x >> 32) & MASK_32
