"""Sums of small tensors by one kernel: the memory that the ranks of one machine write for each other."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import torch
from torch import Tensor

from pdray.kernels.collective.group import RankGroup

HANDLE = "8q"  # of CUDA IPC: 64 bytes


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
    mine = _Memory(inbox_packets(group.size, max_programs) * 8, device)
    rows = _gather_all(group, mine.row.to(device))
    if len({int(row[8]) for row in rows}) < group.size:
        addresses: list[int] | str = "several ranks are on one GPU"
    else:
        addresses = mine.map_all([struct.pack(HANDLE, *row[:8].tolist()) for row in rows], group.rank)
    failed = torch.tensor([int(isinstance(addresses, str))], dtype=torch.int64, device=device)
    if int(group.sum(failed).item()):
        return addresses if isinstance(addresses, str) else "another rank cannot write this one's memory"
    inboxes = torch.tensor(addresses, dtype=torch.int64, device=device)
    return OneShot(group.rank, inboxes, torch.zeros(max_programs, dtype=torch.int32, device=device))


class _Memory:
    """Zeros of this process's GPU that others can map. They last as long as the process: others may still write there.

    Attributes:
        row: [9] int64 on the host: its handle, and which GPU it is on.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        from cupy.cuda import runtime

        index = torch.cuda.current_device() if device.index is None else device.index
        runtime.setDevice(index)
        self._runtime: Any = runtime
        self.address: int = runtime.malloc(num_bytes)
        runtime.memset(self.address, 0, num_bytes)
        runtime.deviceSynchronize()
        gpu = hashlib.sha256(str(torch.cuda.get_device_properties(index).uuid).encode()).digest()[:8]
        handle = bytes(runtime.ipcGetMemHandle(self.address))
        self.row = torch.tensor([*struct.unpack(HANDLE, handle), *struct.unpack("q", gpu)], dtype=torch.int64)

    def map_all(self, handles: list[bytes], rank: int) -> list[int] | str:
        """Where each rank's memory lies in this process; this one's own is ``rank``'s. Else, what the driver says."""
        try:
            return [
                self.address if number == rank else int(self._runtime.ipcOpenMemHandle(handle))
                for number, handle in enumerate(handles)
            ]
        except self._runtime.CUDARuntimeError as error:
            return f"memory of another rank cannot be mapped: {error}"


def _gather_all(group: RankGroup, row: Tensor) -> Tensor:
    """[size, n] on the host: every rank's row."""
    rows = row.new_zeros(group.size, len(row))
    parts = group.gather(row)
    if parts is not None:
        rows.copy_(torch.stack(parts))
    group.broadcast(rows)
    return rows.cpu()
