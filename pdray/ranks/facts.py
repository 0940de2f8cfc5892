"""What each rank says of itself in shared memory: that it lives, how far it is, and how much it holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from pdray.engine.ranks.shared_memory import SharedMemory

if TYPE_CHECKING:
    import torch

MEMORY_STEPS = 256  # between two looks at the memory
PULSE_S = 0.25


class RankState(NamedTuple):
    """For `pdray status` and metrics.

    Attributes:
        num_steps: that it has launched; on CPU, computed.
        memory_bytes: of its GPU that torch holds; on CPU, of the process.
    """

    rank: int
    pid: int
    num_steps: int
    memory_bytes: int


class RankFacts:
    """Args:
    memory: of which every rank takes this first.
    """

    def __init__(self, memory: SharedMemory, num_ranks: int) -> None:
        import torch

        self._rows = memory.take(num_ranks * 24).view(torch.int64).view(num_ranks, 3).numpy()

    def of(self, rank: int, pid: int) -> RankState:
        """What that rank has said; zeros before it is ready."""
        num_steps, memory_bytes, _ = self._rows[rank].tolist()
        return RankState(rank, pid, num_steps, memory_bytes)

    def silent_s(self, rank: int) -> float:
        """Seconds since that rank was last seen to live; 0 before it is ready."""
        pulse_ns = int(self._rows[rank, 2])
        return (time.monotonic_ns() - pulse_ns) / 1e9 if pulse_ns else 0.0

    def beat(self, rank: int) -> None:
        """Say that this rank lives, for ever."""
        while True:
            self._rows[rank, 2] = time.monotonic_ns()  # the same clock in all processes of a machine
            time.sleep(PULSE_S)

    def writer(self, rank: int, device: torch.device) -> Callable[[], None]:
        """Says what this rank holds; what it returns is to be called after each step."""
        row, num_steps = self._rows[rank], 0
        row[1] = memory_bytes(device)

        def note_step() -> None:
            nonlocal num_steps
            num_steps += 1
            row[0] = num_steps
            if num_steps % MEMORY_STEPS == 0:
                row[1] = memory_bytes(device)

        return note_step


def memory_bytes(device: torch.device) -> int:
    """Of its GPU that torch holds in this process; on CPU, of the process."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.memory_reserved(device))
    import psutil

    return int(psutil.Process().memory_info().rss)
