"""How many multiprocessors (SMs) the kernels that are launched now will have: grids that fill the device follow it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch

_available: ContextVar[int | None] = ContextVar("available", default=None)


@contextmanager
def limit_processors(num_sms: int | None) -> Iterator[None]:
    """What is launched or captured within, by this thread, runs on a partition of so many SMs; None: on all."""
    before = _available.get()
    token = _available.set(num_sms)
    tell_blas(num_sms)
    try:
        yield
    finally:
        tell_blas(before)
        _available.reset(token)


def tell_blas(num_sms: int | None) -> None:
    """Let cuBLAS choose its tiles for so many SMs; None: for all. It does not see partitions by itself."""
    if torch.cuda.is_initialized() and (blas := _load_blas()) is not None:
        handle = ctypes.c_void_p(torch.cuda.current_blas_handle())
        status = blas.cublasSetSmCountTarget(handle, ctypes.c_int(num_sms or 0))
        assert status == 0, f"cublasSetSmCountTarget({num_sms}) returned {status}"


@lru_cache(maxsize=1)
def _load_blas() -> ctypes.CDLL | None:
    """torch's cuBLAS; None where it is linked in otherwise, and tiles are those for the whole device."""
    try:
        return ctypes.CDLL(f"libcublas.so.{(torch.version.cuda or '').partition('.')[0]}")
    except OSError:
        return None


def num_processors(device: torch.device) -> int:
    """SMs of the partition that is in force, else of the device."""
    return _available.get() or device_processors(device)


@lru_cache(maxsize=16)
def device_processors(device: torch.device) -> int:
    """SMs of the whole device."""
    return torch.cuda.get_device_properties(device).multi_processor_count
