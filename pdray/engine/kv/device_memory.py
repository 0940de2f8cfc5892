"""GPU memory outside torch's caching allocator: an allocation of its own, as CUDA exports it to other processes."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from pdray.errors import OutOfMemoryError


class _Allocation:
    """Bytes from cudaMalloc, given back once nothing refers to them; torch takes it as a CUDA array."""

    def __init__(self, num_bytes: int) -> None:
        from cupy.cuda import runtime

        self.address: int = runtime.malloc(num_bytes)
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
            "strides": None,
        }
        finalizer = weakref.finalize(self, runtime.free, self.address)
        finalizer.atexit = False  # the driver takes it back with the process, whose CUDA may be gone by then


def allocate_alone(num_bytes: int, device: torch.device) -> torch.Tensor:
    """[num_bytes] uint8, not initialised: one allocation that nothing else lies in.

    Needs cupy, which shares the process's CUDA context with torch.

    Raises:
        OutOfMemoryError: the device does not have so much.
    """
    from cupy.cuda import runtime

    index = torch.cuda.current_device() if device.index is None else device.index
    runtime.setDevice(index)
    torch.cuda.empty_cache()  # what torch keeps for itself and does not use
    try:
        memory = _Allocation(num_bytes)
    except runtime.CUDARuntimeError as error:
        raise OutOfMemoryError(
            f"{num_bytes} bytes for the KV pool could not be allocated on {device}: {error}"
        ) from None
    return torch.as_tensor(memory, device=torch.device("cuda", index))
