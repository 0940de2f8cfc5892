"""Block ids on their way to the device: where from and where to each block of a write goes."""

from __future__ import annotations

import torch

from pdray.transfer.ring import Region, Ring

CAPACITY = 256 * 1024  # ids
MAX_BLOCKS = CAPACITY // 8  # of one write: two ids each, and room for others beside it
ID_BYTES = 4


class BlockIds:
    """Pinned memory on the host, and as much on the device. One thread at a time.

    A region is in use from allocate() until free(), for which the device must have passed what reads it.
    """

    def __init__(self, device: torch.device, capacity: int = CAPACITY) -> None:
        self.ring = Ring(capacity * ID_BYTES)
        self._host = torch.zeros(capacity, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._numbers = self._host.numpy()
        self._device = torch.zeros(capacity, dtype=torch.int32, device=device)

    def allocate(self, source: list[int], target: list[int]) -> Region | None:
        """Room for these ids, and the ids in it on the host; None while there is none."""
        region = self.ring.allocate(2 * len(source) * ID_BYTES)
        if region is not None:
            self._numbers[self._slice(region, 2 * len(source))] = source + target
        return region

    def upload(self, region: Region, num_blocks: int) -> torch.Tensor:
        """[2, num_blocks] int32 on the device, copied there on the current stream."""
        part = self._slice(region, 2 * num_blocks)
        self._device[part].copy_(self._host[part], non_blocking=True)
        return self._device[part].view(2, num_blocks)

    def free(self, region: Region) -> None:
        self.ring.free(region)

    @staticmethod
    def _slice(region: Region, count: int) -> slice:
        first = region.offset // ID_BYTES
        return slice(first, first + count)
