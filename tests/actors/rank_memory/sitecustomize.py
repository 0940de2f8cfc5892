"""Python imports this by itself, in every process whose PYTHONPATH names this folder: ranks on CPU write into each
other's pools by the cuda_ipc channel, over files in memory in place of GPUs, and send to each other by nccl, over TCP.
Kernels are the torch references.
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

KIND, POOL, NCCL_KIND = "pdray.transfer.cuda_ipc.kind", "pdray.engine.kv.pool", "pdray.transfer.nccl.kind"
TESTS = Path(__file__).parents[2]


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


def over_tcp(init: Callable[..., None]) -> Callable[..., None]:
    """NcclKind.__init__ with such a transport."""
    tcp = load("two_hosts_site", TESTS / "chaos" / "two_hosts_site" / "sitecustomize.py")

    @wraps(init)
    def with_transport(self: Any, site: Any, transport: Any = None) -> None:
        init(self, site, transport or tcp.TcpTransport())

    return with_transport


def fake_stream() -> Callable[[], Any]:
    stream: Callable[[], Any] = load("fake_device", TESTS / "transfer" / "fake_device.py").HostStream
    return stream


def load(name: str, path: Path) -> Any:
    """That file, once, under this name."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _patch_kind(module: ModuleType) -> None:
    module.CudaIpcKind.__init__ = with_files(module.CudaIpcKind.__init__)


def _patch_nccl_kind(module: ModuleType) -> None:
    module.NcclKind.__init__ = over_tcp(module.NcclKind.__init__)


def _patch_pool(module: ModuleType) -> None:
    module.KVPool.allocate = in_files(module.KVPool.__dict__["allocate"])


if __name__ == "sitecustomize":
    patch_when_loaded(POOL, _patch_pool)
    patch_when_loaded(KIND, _patch_kind)
    patch_when_loaded(NCCL_KIND, _patch_nccl_kind)
