"""Host memory that the ranks of a worker share, without a name that could be left behind."""

from __future__ import annotations

import mmap
import os

import torch

PAGE = mmap.ALLOCATIONGRANULARITY


class SharedMemory:
    """A file in memory, which processes that inherit its descriptor map.

    Every process takes the same sizes in the same order, and so gets the same memory each time.

    Args:
        fd: of os.memfd_create(); it stays its maker's to close.
        pinned: CUDA may copy from and to it while the host goes on.
    """

    def __init__(self, fd: int, *, pinned: bool) -> None:
        self._fd = fd
        self._pinned = pinned
        self._end = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8, zeros before anybody has written."""
        start, self._end = self._end, self._end + -(-num_bytes // PAGE) * PAGE
        os.posix_fallocate(self._fd, 0, self._end)
        memory = torch.frombuffer(mmap.mmap(self._fd, self._end - start, offset=start), dtype=torch.uint8)
        if self._pinned:
            status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
            if int(status):
                raise RuntimeError(f"CUDA cannot pin {memory.numel()} bytes of shared memory: {status}")
        return memory[:num_bytes]
