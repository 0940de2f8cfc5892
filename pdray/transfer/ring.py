"""Memory that is handed out around and around."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

ALIGNMENT = 512


@dataclass(eq=False, slots=True)
class Region:
    """Bytes of a ring that are in use."""

    offset: int
    num_bytes: int
    freed: bool = False


class Ring:
    """Hands out bytes of [0, capacity) around and around; they may come back in any order."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._used: deque[Region] = deque()  # by age
        self._head = 0

    def __len__(self) -> int:
        """Regions in use."""
        return sum(not region.freed for region in self._used)

    def allocate(self, num_bytes: int) -> Region | None:
        """None while there is no room."""
        num_bytes = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        assert 0 < num_bytes <= self.capacity, num_bytes
        if not self._used:
            self._head = 0
        tail = self._used[0].offset if self._used else self.capacity
        wrapped = bool(self._used) and self._head <= tail
        if wrapped and tail - self._head < num_bytes:
            return None
        if not wrapped and self.capacity - self._head < num_bytes:
            if tail < num_bytes:
                return None
            self._head = 0
        region = Region(self._head, num_bytes)
        self._head += num_bytes
        self._used.append(region)
        return region

    def free(self, region: Region) -> None:
        assert not region.freed
        region.freed = True
        while self._used and self._used[0].freed:
            self._used.popleft()
