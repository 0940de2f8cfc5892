"""Weights in one piece of memory, so that they can be lent to another process as a whole.

A model's parts take their weights in the order in which they are made, which its configuration decides. So two
processes that build the same model find every weight in the same place, without a table.
"""

from __future__ import annotations

import math

import torch

ALIGNMENT = 256  # bytes, as of any allocation on a GPU
UNLIMITED_BYTES = 2**60


class Arena:
    """Hands out consecutive parts of its memory.

    Args:
        memory: [n] uint8. On the device "meta", to find out how much is needed: see unlimited().

    Attributes:
        num_bytes: handed out so far.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self.num_bytes = 0

    @classmethod
    def unlimited(cls) -> Arena:
        """One that counts and holds nothing."""
        return cls(torch.empty(UNLIMITED_BYTES, dtype=torch.uint8, device="meta"))

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The next weight's place."""
        start, size = self.num_bytes, math.prod(shape) * dtype.itemsize
        end = start + -(-size // ALIGNMENT) * ALIGNMENT
        assert end <= len(self._memory), f"an arena of {len(self._memory)} bytes has none for {shape} behind {start}"
        self.num_bytes = end
        return self._memory[start : start + size].view(dtype).view(shape)
