"""Memory of a GPU that other ranks of the machine map, and write."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import torch
from torch import Tensor

from pdray.kernels.collective.group import RankGroup

HANDLE = "8q"  # of CUDA IPC: 64 bytes


class PeerMemory:
    """Zeros of this process's GPU that others can map. They last as long as the process: others may still write there.

    Attributes:
        tensor: [num_bytes] uint8.
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
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
            "strides": None,
        }
        self.tensor = torch.as_tensor(self, device=torch.device("cuda", index))
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


def map_everywhere(group: RankGroup, memories: list[PeerMemory], obstacle: str = "") -> list[list[int]] | str:
    """Addresses of all ranks' memories in this process: for each of ``memories``, by rank. Waits for the stream.

    Args:
        obstacle: why it cannot be, as far as this rank knows; "": nothing is in the way.

    Returns:
        Why it cannot be, if some ranks cannot write each other's memory; then on all ranks.
    """
    found: list[list[int]] = []
    for memory in memories:
        rows = _gather_all(group, memory.row.to(memory.tensor.device))
        if len({int(row[8]) for row in rows}) < group.size:
            obstacle = obstacle or "several ranks are on one GPU"
        if not obstacle:
            mapped = memory.map_all([struct.pack(HANDLE, *row[:8].tolist()) for row in rows], group.rank)
            if isinstance(mapped, str):
                obstacle = mapped
            else:
                found.append(mapped)
    return agree(group, obstacle, memories[0].tensor.device) or found


def agree(group: RankGroup, obstacle: str, device: torch.device) -> str:
    """What is in the way of any rank; empty on all of them if nothing is. Waits for the stream."""
    failed = torch.tensor([int(bool(obstacle))], dtype=torch.int64, device=device)
    if int(group.sum(failed).item()):
        return obstacle or "another rank cannot write this one's memory"
    return ""


def _gather_all(group: RankGroup, row: Tensor) -> Tensor:
    """[size, n] on the host: every rank's row."""
    rows = row.new_zeros(group.size, len(row))
    parts = group.gather(row)
    if parts is not None:
        rows.copy_(torch.stack(parts))
    group.broadcast(rows)
    return rows.cpu()
