"""Queues of device work, as a channel needs them: CUDA streams, and in tests a queue on the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

from pdray.errors import TransferError

HIGH_PRIORITY = -1  # a small copy need not stand behind a prefill's waves of blocks
DRAIN_TIMEOUT_S = 10.0
DRAIN_POLL_S = 1e-3


class Event(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """Whether the stream has come past it. Never blocks."""
        ...


class Stream(Protocol):
    """Does what it is given in order, later. No call waits for the device. One thread at a time."""

    @property
    def handle(self) -> int:
        """The cudaStream_t."""
        ...

    def run(self, work: Callable[[], None]) -> None:
        """Enqueue what ``work`` launches."""

    def wait(self, event: Event) -> None:
        """What follows begins after the event. One that a peer must bring about: only if an abort ends it."""

    def record(self) -> Event:
        """An event after all that was enqueued so far."""
        ...


class CudaStream:
    """A Stream of its own on a device."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=HIGH_PRIORITY)

    @property
    def handle(self) -> int:
        return int(self._stream.cuda_stream)

    def run(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def wait(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        self._stream.wait_event(event)

    def record(self) -> Event:
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def synchronize(self) -> None:
        """Wait until all that was enqueued is done."""
        self._stream.synchronize()


def drain(streams: list[Stream], name: str) -> None:
    """Return once the streams are empty; polls, so that no thread hangs in the driver.

    Raises:
        TransferError: they are not after DRAIN_TIMEOUT_S.
    """
    events = [stream.record() for stream in streams]
    deadline = time.monotonic() + DRAIN_TIMEOUT_S
    while not all(event.query() for event in events):
        if time.monotonic() > deadline:
            raise TransferError(f"channel {name}: its streams have not drained {DRAIN_TIMEOUT_S:g} s after the abort")
        time.sleep(DRAIN_POLL_S)
