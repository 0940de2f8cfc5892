"""What the cuda_ipc channel needs of the machine: memory that one process lends to another, and streams."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from pdray.transfer.cuda_ipc.peers import peer_gpus
from pdray.transfer.streams import CudaStream, Stream

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Mapping(Protocol):
    """Another process's memory, as long as it is mapped here.

    The memory lives on until then, also if the process that has lent it is gone.

    Attributes:
        address: of its first byte, in this process.
    """

    address: int

    def close(self) -> None:
        """Nothing may be using it. Once."""


class Transport(Protocol):
    """Tests put their own in its place.

    Attributes:
        gpu: names the physical GPU. host: names the machine, the same for all processes that run on it now.
        peers: GPUs that this one can write to; None where only trying can tell.
    """

    gpu: str
    host: str
    peers: list[str] | None

    def lend(self, memory: torch.Tensor) -> bytes:
        """A handle by which other processes of this machine can map an allocation that begins with this tensor."""
        ...

    def borrow(self, handle: bytes) -> Mapping:
        """Map what another process has lent. Blocks; raises what the driver says if it cannot."""
        ...

    def new_stream(self) -> Stream: ...


class CudaMapping:
    """A Mapping over CUDA IPC."""

    def __init__(self, handle: bytes, device_index: int) -> None:
        from cupy.cuda import runtime

        self._device_index = device_index
        runtime.setDevice(device_index)
        self.address: int = runtime.ipcOpenMemHandle(handle)

    def close(self) -> None:
        from cupy.cuda import runtime

        runtime.setDevice(self._device_index)
        runtime.ipcCloseMemHandle(self.address)


class CudaTransport:
    """A Transport over the GPU of this process, through the CUDA runtime that cupy shares with torch."""

    def __init__(self, device: torch.device) -> None:
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self.gpu = str(torch.cuda.get_device_properties(self._index).uuid)
        self.host = BOOT_ID.read_text().strip()
        self.peers = peer_gpus(self.gpu)

    def lend(self, memory: torch.Tensor) -> bytes:
        from cupy.cuda import runtime

        runtime.setDevice(self._index)
        return bytes(runtime.ipcGetMemHandle(memory.data_ptr()))

    def borrow(self, handle: bytes) -> Mapping:
        return CudaMapping(handle, self._index)

    def new_stream(self) -> Stream:
        return CudaStream(torch.device("cuda", self._index))


def has_cupy() -> bool:
    """Whether cupy can be used in this process."""
    try:
        from cupy.cuda import runtime
    except ImportError:
        return False
    return bool(runtime.getDeviceCount())
