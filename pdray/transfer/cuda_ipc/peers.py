"""Which GPUs of this machine a GPU can write to, as NVIDIA's management library knows it.

A worker's process sees its own GPU alone, so that CUDA cannot be asked.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Any

logger = logging.getLogger(__name__)

LIBRARY = "libnvidia-ml.so.1"  # comes with the driver
UUID_BYTES = 96
P2P_WRITE = 1  # NVML_P2P_CAPS_INDEX_WRITE
P2P_OK = 0  # NVML_P2P_STATUS_OK


class NvmlError(Exception):
    """A call of the library has failed."""


def peer_gpus(gpu: str) -> list[str] | None:
    """UUIDs of the GPUs that this one can write to, itself left out; None if the library is not there or does not know.

    Args:
        gpu: its UUID, without the prefix "GPU-", as torch writes it.
    """
    try:
        library = ctypes.CDLL(LIBRARY)
        _call(library.nvmlInit_v2)
        try:
            return _peers(library, gpu)
        finally:
            library.nvmlShutdown()
    except (OSError, AttributeError, NvmlError) as error:
        logger.info("peers of GPU %s are not known: %s", gpu, error)
        return None


def _peers(library: ctypes.CDLL, gpu: str) -> list[str] | None:
    count = ctypes.c_uint()
    _call(library.nvmlDeviceGetCount_v2, ctypes.byref(count))
    handles: dict[str, ctypes.c_void_p] = {}
    for index in range(count.value):
        handle, uuid = ctypes.c_void_p(), ctypes.create_string_buffer(UUID_BYTES)
        _call(library.nvmlDeviceGetHandleByIndex_v2, index, ctypes.byref(handle))
        _call(library.nvmlDeviceGetUUID, handle, uuid, UUID_BYTES)
        handles[uuid.value.decode().removeprefix("GPU-")] = handle
    if gpu not in handles:  # a part of a GPU, or one that the library is not shown
        return None
    peers = []
    for uuid_, handle in handles.items():
        status = ctypes.c_int()
        if uuid_ != gpu:
            _call(library.nvmlDeviceGetP2PStatus, handles[gpu], handle, P2P_WRITE, ctypes.byref(status))
            if status.value == P2P_OK:
                peers.append(uuid_)
    return peers


def _call(function: Any, *arguments: Any) -> None:
    code = function(*arguments)
    if code:
        raise NvmlError(f"{function.__name__} returned {code}")
