"""Streams and communicators on the host that behave as CUDA's and NCCL's do: things happen later, on another thread.

A send ends when the other side has received it; with a peer that is gone both hang until they are aborted; an abort
lets the stream go on, and tells the peer nothing.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import uuid
import weakref
from collections.abc import Callable
from typing import Any

PATIENCE_S = 30.0  # whatever hangs longer in a test is a fault of the test


class HostEvent:
    def __init__(self) -> None:
        self.passed = threading.Event()

    def query(self) -> bool:
        return self.passed.is_set()


class HostStream:
    """Work in order on a thread of its own."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.errors: list[BaseException] = []
        self.before_work: Callable[[], None] = lambda: None  # tests slow a stream down here
        threading.Thread(target=_work_off, args=(self._work, self.errors), daemon=True).start()
        weakref.finalize(
            self, self._work.put, None
        )  # a thread that outlives its stream may crash the interpreter's end

    @property
    def handle(self) -> int:
        return id(self)

    def run(self, work: Callable[[], None]) -> None:
        self._work.put(lambda: (self.before_work(), work()))

    def wait(self, event: Any) -> None:
        self._work.put(lambda: self._wait(event))

    def record(self) -> HostEvent:
        event = HostEvent()
        self._work.put(event.passed.set)
        return event

    @staticmethod
    def _wait(event: HostEvent) -> None:
        assert event.passed.wait(PATIENCE_S), "nobody has recorded the event"


def _work_off(work: queue.SimpleQueue[Callable[[], None] | None], errors: list[BaseException]) -> None:
    while (item := work.get()) is not None:
        try:
            item()
        except BaseException as error:
            errors.append(error)
        del item


class Wire:
    """What joins two ranks. faults: called in a send's stream before its bytes go; says whether they do."""

    def __init__(self) -> None:
        self.messages: queue.SimpleQueue[tuple[bytes, threading.Event]] = queue.SimpleQueue()
        self.both_here = threading.Barrier(2)
        self.faults: Callable[[int], bool] = lambda number: True
        self.num_sends = 0
        self.num_bytes = 0


class HostCommunicator:
    """One end of a wire."""

    def __init__(self, wire: Wire, watcher: Callable[[Any, int], None]) -> None:
        self.wire = wire
        self.aborted = threading.Event()
        self.num_aborts = 0
        self._watcher = watcher  # hears of receives that begin (+1) and end (-1)

    def send(self, pointer: int, num_bytes: int, stream: HostStream) -> None:
        assert not self.aborted.is_set(), "a call after the abort"
        stream.run(lambda: self._send(pointer, num_bytes))

    def recv(self, pointer: int, num_bytes: int, stream: HostStream) -> None:
        assert not self.aborted.is_set(), "a call after the abort"
        self._watcher(self, 1)
        stream.run(lambda: self._recv(pointer, num_bytes))

    def abort(self) -> None:
        self.num_aborts += 1
        self.aborted.set()

    def _send(self, pointer: int, num_bytes: int) -> None:
        number, self.wire.num_sends = self.wire.num_sends, self.wire.num_sends + 1
        if self.aborted.is_set():
            return
        received = threading.Event()
        if self.wire.faults(number):
            self.wire.messages.put((ctypes.string_at(pointer, num_bytes), received))
        while not received.wait(0.001):
            if self.aborted.is_set():
                return
        self.wire.num_bytes += num_bytes

    def _recv(self, pointer: int, num_bytes: int) -> None:
        try:
            while not self.aborted.is_set():
                try:
                    data, received = self.wire.messages.get(timeout=0.001)
                except queue.Empty:
                    continue
                assert len(data) == num_bytes, f"a receive of {num_bytes} bytes met a send of {len(data)}"
                ctypes.memmove(pointer, data, num_bytes)
                received.set()
                return
        finally:
            self._watcher(self, -1)


class HostTransport:
    """A Transport; all of one process can reach each other."""

    wires: dict[bytes, Wire] = {}

    def __init__(self, gpu: str = "host", version: str = "1") -> None:
        self.gpu = gpu
        self.version = version
        self.communicators: list[HostCommunicator] = []
        self.streams: list[HostStream] = []
        self.posted: dict[HostCommunicator, int] = {}  # receives that hang in each communicator now
        self.most_at_once = 0  # communicators with such receives
        self._lock = threading.Lock()

    def make_unique_id(self) -> bytes:
        name = uuid.uuid4().bytes
        self.wires[name] = Wire()
        return name

    def connect(self, unique_id: bytes, rank: int) -> HostCommunicator:
        wire = self.wires[unique_id]
        wire.both_here.wait(PATIENCE_S)
        self.communicators.append(HostCommunicator(wire, self._watch))
        return self.communicators[-1]

    def new_stream(self) -> HostStream:
        self.streams.append(HostStream())
        return self.streams[-1]

    def _watch(self, communicator: HostCommunicator, change: int) -> None:
        with self._lock:
            self.posted[communicator] = self.posted.get(communicator, 0) + change
            self.most_at_once = max(self.most_at_once, sum(count > 0 for count in self.posted.values()))


class HostMapping:
    """A tensor of another end, which lives as long as this does."""

    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self.address: int = memory.data_ptr()
        self.closed = False

    def close(self) -> None:
        assert not self.closed
        self.closed = True


class HostMemory:
    """A Transport of the cuda_ipc channel; all of one process can map what they lend each other."""

    lent: dict[bytes, Any] = {}

    def __init__(self, gpu: str = "host", host: str = "here", peers: list[str] | None = None) -> None:
        self.gpu = gpu
        self.host = host
        self.peers = peers
        self.mappings: list[HostMapping] = []
        self.streams: list[HostStream] = []
        self.refuses: str | None = None  # what the driver says to whoever maps

    def lend(self, memory: Any) -> bytes:
        handle = uuid.uuid4().bytes
        self.lent[handle] = memory
        return handle

    def borrow(self, handle: bytes) -> HostMapping:
        if self.refuses is not None:
            raise RuntimeError(self.refuses)
        self.mappings.append(HostMapping(self.lent[handle]))
        return self.mappings[-1]

    def new_stream(self) -> HostStream:
        self.streams.append(HostStream())
        return self.streams[-1]
