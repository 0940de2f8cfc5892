"""Memory that one process allocates and others of its machine map: on a GPU, and on the host."""

from __future__ import annotations

import mmap
import os
import secrets
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from pdray.engine.kv.device_memory import allocate_alone
from pdray.errors import OutOfMemoryError, TransferError

CUDA_PAGE_BYTES = 2 * 1024 * 1024  # a smaller allocation may share its page, which is what a handle stands for

REMEDY = "if it still lives, set channel to object_store"


class LentMemory(Protocol):
    """One kind of device's memory."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8 zeros, one allocation that nothing else lies in.

        Raises:
            OutOfMemoryError: there is not so much.
        """
        ...

    def lend(self, memory: torch.Tensor) -> str:
        """A handle by which other processes of this machine can map what allocate() gave, for as long as this one
        lives; what they have mapped they keep.

        Args:
            memory: or any tensor that begins where it does.
        """
        ...

    def borrow(self, handle: str, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8 of another process, mapped for as long as this one lives. Blocks.

        Raises:
            TransferError: it cannot be.
        """
        ...


def lent_memory(device: torch.device) -> LentMemory:
    """The kind for this device. lending_obstacle() must have found nothing."""
    return HostMemory() if device.type == "cpu" else CudaMemory(device)


def lending_obstacle(device: torch.device) -> str | None:
    """Why memory of this device cannot be lent; None if it can."""
    if device.type == "cpu":
        return None if hasattr(os, "memfd_create") else "this system has no memfd_create"
    try:
        import cupy.cuda  # noqa: F401
    except ImportError:
        return "there is no cupy: install pdray[cuda12] or pdray[cuda13]"
    return None


class HostMemory:
    """Anonymous files in memory, which end with the last process that has them mapped.

    A handle names a process, its descriptor of the file, and the file's random name, so that neither can be mistaken
    for another one's later.
    """

    def __init__(self) -> None:
        self._files: dict[int, tuple[int, str]] = {}  # descriptor and name, by address

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """See LentMemory. Pages are taken when they are used."""
        name = f"pdray-{secrets.token_hex(8)}"
        descriptor = os.memfd_create(name)
        try:
            os.ftruncate(descriptor, num_bytes)
            memory = _map(descriptor, num_bytes)
        except OSError as error:
            os.close(descriptor)
            raise OutOfMemoryError(f"{num_bytes} bytes of shared memory could not be allocated: {error}") from None
        self._files[memory.data_ptr()] = descriptor, name
        return memory

    def lend(self, memory: torch.Tensor) -> str:
        """See LentMemory."""
        descriptor, name = self._files[memory.data_ptr()]
        return f"{os.getpid()}:{descriptor}:{name}"

    def borrow(self, handle: str, num_bytes: int) -> torch.Tensor:
        """See LentMemory."""
        pid, number, name = handle.split(":")
        path = Path(f"/proc/{int(pid)}/fd/{int(number)}")
        try:
            descriptor = os.open(path, os.O_RDWR)
            try:
                found, size = os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size
                if not found.startswith(f"/memfd:{name} ") or size != num_bytes:
                    raise TransferError(f"{path} is {found} of {size} bytes, not {num_bytes} bytes of {name}")
                return _map(descriptor, num_bytes)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise TransferError(f"memory of process {pid} cannot be mapped: {error}; {REMEDY}") from error


def _map(descriptor: int, num_bytes: int) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(mmap.mmap(descriptor, num_bytes), dtype=np.uint8))


class CudaMemory:
    """CUDA IPC between processes that see the same GPU, through the CUDA runtime that cupy shares with torch."""

    def __init__(self, device: torch.device) -> None:
        self._index = torch.cuda.current_device() if device.index is None else device.index

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """See LentMemory."""
        whole = -(-num_bytes // CUDA_PAGE_BYTES) * CUDA_PAGE_BYTES
        return allocate_alone(whole, torch.device("cuda", self._index)).zero_()[:num_bytes]

    def lend(self, memory: torch.Tensor) -> str:
        """See LentMemory."""
        from cupy.cuda import runtime

        runtime.setDevice(self._index)
        return bytes(runtime.ipcGetMemHandle(memory.data_ptr())).hex()

    def borrow(self, handle: str, num_bytes: int) -> torch.Tensor:
        """See LentMemory. The size is its lender's word."""
        from cupy.cuda import runtime

        runtime.setDevice(self._index)
        try:
            address = runtime.ipcOpenMemHandle(bytes.fromhex(handle))
        except runtime.CUDARuntimeError as error:
            raise TransferError(f"memory of another process on this GPU cannot be mapped: {error}; {REMEDY}") from None
        return torch.as_tensor(_Mapped(address, num_bytes), device=torch.device("cuda", self._index))


class _Mapped:
    """Bytes that torch takes as a CUDA array. Never unmapped: what is built over them lives as long as its process."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "strides": None,
        }
