"""Sums of small tensors by one kernel: the memory that the ranks of one machine write for each other."""

from __future__ import annotations

import torch
from torch import Tensor

from pdray.kernels.collective.group import RankGroup
from pdray.kernels.collective.peer_memory import PeerMemory, map_everywhere


class OneShot:
    """Sums of small tensors, in place, on the current stream; can be captured.

    All ranks call in the same order, as for RankGroup. A rank that never comes is waited for on the device, for ever.
    """

    def __init__(self, rank: int, inboxes: Tensor, turns: Tensor) -> None:
        from pdray.kernels.collective.one_shot_triton import TYPES, WORDS, triton_one_shot_sum

        self._rank, self._inboxes, self._turns = rank, inboxes, turns
        self._launch, self._types = triton_one_shot_sum, TYPES
        self._max_bytes = len(turns) * WORDS * 4

    def takes(self, x: Tensor) -> bool:
        """Whether it is one of those."""
        num_bytes = x.numel() * x.element_size()
        return 0 < num_bytes <= self._max_bytes and num_bytes % 4 == 0 and x.dtype in self._types

    def sum(self, x: Tensor) -> None:
        """``x`` is contiguous, and one that takes() takes."""
        self._launch(x, self._inboxes, self._turns, self._rank)


def open_one_shot(group: RankGroup, max_bytes: int, device: torch.device) -> OneShot | str:
    """Exchange memory with the other ranks; the same outcome on each. Launches on the current stream, and waits for it.

    Args:
        max_bytes: of the largest sum, about.

    Returns:
        Why it cannot be, if some ranks cannot write each other's memory.
    """
    from pdray.kernels.collective.one_shot_triton import WORDS, inbox_packets

    max_programs = -(-max_bytes // (4 * WORDS))
    mine = PeerMemory(inbox_packets(group.size, max_programs) * 8, device)
    addresses = map_everywhere(group, [mine])
    if isinstance(addresses, str):
        return addresses
    inboxes = torch.tensor(addresses[0], dtype=torch.int64, device=device)
    return OneShot(group.rank, inboxes, torch.zeros(max_programs, dtype=torch.int32, device=device))
