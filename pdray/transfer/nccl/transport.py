"""NCCL as the nccl channel uses it: 2-rank communicators of cupy.cuda.nccl, over torch's device and streams.

cupy and torch share a process's CUDA context; pointers and streams of one are the other's.
"""

from __future__ import annotations

from typing import Any

import torch

from pdray.transfer.nccl.communicator import Communicator
from pdray.transfer.streams import CudaStream, Stream

NUM_RANKS = 2


def nccl_version() -> str:
    """Version of the NCCL that cupy has loaded, e.g. "22809"; "" where it cannot be used."""
    try:
        from cupy.cuda import nccl
    except ImportError:
        return ""
    return str(nccl.get_version()) if getattr(nccl, "available", True) else ""


class NcclCommunicator:
    """A Communicator. The constructor blocks until the other rank is there too, forever if it never comes.

    send() and recv() return before anything has moved, except the first in each direction, which wait for the peer's.
    It must be aborted before it is forgotten: Python's garbage collector would wait for the peer.
    """

    def __init__(self, unique_id: Any, rank: int, device: torch.device) -> None:
        from cupy.cuda import nccl

        torch.cuda.set_device(device)
        self._peer = NUM_RANKS - 1 - rank
        self._byte = nccl.NCCL_UINT8
        self._inner = nccl.NcclCommunicator(NUM_RANKS, unique_id, rank)

    def send(self, pointer: int, num_bytes: int, stream: Stream) -> None:
        self._inner.send(pointer, num_bytes, self._byte, self._peer, stream.handle)

    def recv(self, pointer: int, num_bytes: int, stream: Stream) -> None:
        self._inner.recv(pointer, num_bytes, self._byte, self._peer, stream.handle)

    def abort(self) -> None:
        self._inner.abort()


class CudaTransport:
    """A Transport over the GPU of this process."""

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        self.gpu = str(torch.cuda.get_device_properties(self._device).uuid)
        self.version = nccl_version()

    def make_unique_id(self) -> Any:
        from cupy.cuda import nccl

        return nccl.get_unique_id()

    def connect(self, unique_id: Any, rank: int) -> Communicator:
        return NcclCommunicator(unique_id, rank, self._device)

    def new_stream(self) -> Stream:
        return CudaStream(self._device)
