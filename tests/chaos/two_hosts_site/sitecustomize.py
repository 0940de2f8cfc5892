"""Python imports this by itself, in every process whose PYTHONPATH names this folder: nccl works on CPU, over TCP.

Everything of the channel is real but its communicator and its streams. Like NCCL's, the communicator's id holds an
address of the process that makes it: of the interface that NCCL_SOCKET_IFNAME names, or else the first one by name
that is not the loopback device. So it shows whether the two ends agree on a network.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

from pdray.testing.patched_import import patch_when_loaded

KIND = "pdray.transfer.nccl.kind"
PATIENCE_S = 30.0
JOINED = b"!"


def nccl_address() -> str:
    """As NCCL chooses it; "=name" means just that interface."""
    import psutil

    wanted = os.environ.get("NCCL_SOCKET_IFNAME", "")
    for name, addresses in sorted(psutil.net_if_addrs().items()):
        chosen = name == wanted[1:] if wanted.startswith("=") else name.startswith(wanted) and name != "lo"
        for each in addresses:
            if chosen and each.family is socket.AF_INET:
                return str(each.address)
    raise OSError(f"no interface for NCCL_SOCKET_IFNAME={wanted!r}")


class HostEvent:
    def __init__(self) -> None:
        self.passed = threading.Event()

    def query(self) -> bool:
        return self.passed.is_set()


class HostStream:
    """Work in order, on a thread of its own."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    handle = 0

    def _run(self) -> None:
        while True:
            self._work.get()()

    def run(self, work: Callable[[], None]) -> None:
        self._work.put(work)

    def wait(self, event: HostEvent) -> None:
        self._work.put(lambda: event.passed.wait(PATIENCE_S))

    def record(self) -> HostEvent:
        event = HostEvent()
        self._work.put(event.passed.set)
        return event


class TcpCommunicator:
    """One rank of two; bytes go through one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.settimeout(PATIENCE_S)

    def send(self, pointer: int, num_bytes: int, stream: HostStream) -> None:
        import ctypes

        stream.run(lambda: self._try(lambda: self._connection.sendall(ctypes.string_at(pointer, num_bytes))))

    def recv(self, pointer: int, num_bytes: int, stream: HostStream) -> None:
        import ctypes

        def receive() -> None:
            memory = memoryview((ctypes.c_char * num_bytes).from_address(pointer)).cast("B")
            got = 0
            while got < num_bytes:
                count = self._connection.recv_into(memory[got:])
                if not count:
                    raise ConnectionError("the other rank is gone")
                got += count

        stream.run(lambda: self._try(receive))

    @staticmethod
    def _try(work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:  # the channel's deadlines see to it
            print(f"tcp communicator: {error}", file=sys.stderr)

    def abort(self) -> None:
        self._connection.close()


def join_two(listener: socket.socket) -> None:
    """Relay what the first two that connect send, once both are there."""
    with listener:
        ends = [listener.accept()[0] for _ in range(2)]
    for end in ends:
        end.sendall(JOINED)
    for pair in (ends, ends[::-1]):
        threading.Thread(target=relay, args=pair, daemon=True).start()


def relay(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):  # one of them is gone
        while data := source.recv(2**16):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


class TcpTransport:
    """A Transport of the nccl channel."""

    version = "tcp"

    def __init__(self) -> None:
        self.gpu = f"cpu {id(self)} of {os.getpid()}"

    def make_unique_id(self) -> bytes:
        """Any two processes that connect with it are joined, by way of this one."""
        listener = socket.create_server((nccl_address(), 0))
        listener.settimeout(PATIENCE_S)
        threading.Thread(target=join_two, args=(listener,), daemon=True).start()
        host, port = listener.getsockname()[:2]
        return f"{host}:{port}".encode()

    def connect(self, unique_id: bytes, rank: int) -> TcpCommunicator:
        host, port = unique_id.decode().rsplit(":", 1)
        connection = socket.create_connection((host, int(port)), PATIENCE_S)
        if connection.recv(1) != JOINED:
            raise ConnectionError("the other rank has not come")
        return TcpCommunicator(connection)

    def new_stream(self) -> HostStream:
        return HostStream()


def patch(module: ModuleType) -> None:
    make = module.NcclKind.__init__
    module.NcclKind.__init__ = lambda kind, site, transport=None: make(kind, site, transport or TcpTransport())


if __name__ == "sitecustomize":
    patch_when_loaded(KIND, patch)
