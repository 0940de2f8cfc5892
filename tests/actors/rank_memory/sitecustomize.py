"""Python imports this by itself, in every process whose PYTHONPATH names this folder: ranks on CPU write into each
other's pools by the cuda_ipc channel, over files in memory in place of GPUs. Kernels are the torch references.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from pdray.testing.patched_import import patch_when_loaded

KIND, POOL = "pdray.transfer.cuda_ipc.kind", "pdray.engine.kv.pool"


class Mapped:
    """A Mapping; the memory stays mapped, as nobody may be using it."""

    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self.address: int = memory.data_ptr()

    def close(self) -> None: ...


class Files:
    """A Transport between processes of this machine."""

    peers = None

    def __init__(self, memory: Any, stream: Callable[[], Any]) -> None:
        self.gpu, self.host = str(os.getpid()), "here"
        self._memory = memory
        self.new_stream = stream

    def lend(self, memory: Any) -> bytes:
        handle: str = self._memory.lend(memory)
        return handle.encode()

    def borrow(self, handle: bytes) -> Mapped:
        pid, number, _ = handle.decode().split(":")
        size = os.stat(f"/proc/{pid}/fd/{number}").st_size
        return Mapped(self._memory.borrow(handle.decode(), size))


def host_memory() -> Any:
    """This process's, which knows what it has allocated."""
    from pdray.engine.kv.lent_memory import HostMemory

    module: Any = sys.modules[POOL]
    if not hasattr(module, "files"):
        module.files = HostMemory()
    return module.files


def with_files(init: Callable[..., None]) -> Callable[..., None]:
    """CudaIpcKind.__init__ with such a transport."""

    @wraps(init)
    def with_transport(self: Any, site: Any, transport: Any = None) -> None:
        init(self, site, transport or Files(host_memory(), fake_stream()))

    return with_transport


def in_files(allocate: Any) -> Any:
    """KVPool.allocate, of memory that can be lent."""

    def allocate_file(cls: Any, *args: Any, memory: Any = None, **more: Any) -> Any:
        return allocate.__func__(cls, *args, memory=memory or host_memory().allocate, **more)

    return classmethod(allocate_file)


def fake_stream() -> Callable[[], Any]:
    if "fake_device" not in sys.modules:
        path = Path(__file__).parents[2] / "transfer" / "fake_device.py"
        spec = importlib.util.spec_from_file_location("fake_device", path)
        assert spec is not None and spec.loader is not None
        sys.modules["fake_device"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["fake_device"])
    stream: Callable[[], Any] = sys.modules["fake_device"].HostStream
    return stream


def _patch_kind(module: ModuleType) -> None:
    module.CudaIpcKind.__init__ = with_files(module.CudaIpcKind.__init__)


def _patch_pool(module: ModuleType) -> None:
    module.KVPool.allocate = in_files(module.KVPool.__dict__["allocate"])


if __name__ == "sitecustomize":
    patch_when_loaded(POOL, _patch_pool)
    patch_when_loaded(KIND, _patch_kind)
