"""The nccl receiver on the device: receives the pieces of one grant at a time, and unpacks what it is told to."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from pdray.errors import TransferError
from pdray.transfer.nccl.communicator import GuardedCommunicator
from pdray.transfer.nccl.staging import PROBE_BYTES, Piece, Region, Staging
from pdray.transfer.nccl.threads import PollingThread, Watchdog
from pdray.transfer.streams import DRAIN_TIMEOUT_S, Event, Stream
from pdray.wire.message import LegKey


@dataclass(eq=False, slots=True)
class Link:
    """One sender's communicator. error: why it was given up."""

    name: str
    epoch: int
    communicator: GuardedCommunicator
    stream: Stream
    error: str | None = None
    failed_at: float = 0.0


@dataclass(eq=False, slots=True)
class Transfer:
    """A put, or a probe (which has no pieces), that was granted.

    Attributes:
        layers, positions: as the sender named them. blocks: of the pool, for each position.
    """

    link: Link
    seq: int
    key: LegKey
    layers: range
    positions: range
    blocks: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    num_left: int = 0  # pieces that are neither written nor dropped; the receiver's
    refused: bool = False


@dataclass(eq=False, slots=True)
class Arrival:
    """A piece of a transfer in staging; None: a probe. done: after its receive, then after its unpacking."""

    transfer: Transfer
    piece: Piece | None
    region: Region
    done: Event


class ReceiveEvents(Protocol):
    """What the thread tells, on the event loop's thread and in order."""

    def arrived(self, arrival: Arrival) -> None:
        """A piece lies in staging: unpack() or discard() it."""

    def written(self, arrival: Arrival) -> None:
        """A piece is in the pool."""

    def probed(self, arrival: Arrival) -> None:
        """A probe came; refused if it was another pattern."""

    def grant_ended(self) -> None:
        """Everything of the grant has been received, or its link was given up and nothing of it is in flight."""

    def link_failed(self, link: Link, reason: str) -> None:
        """A link was given up by this thread or its watchdog."""

    def failed(self, error: BaseException) -> None:
        """The thread has ended: the device cannot be relied on."""


class ReceiveThread:
    """One thread and one watchdog for all links. Every method may be called from any thread.

    Args:
        staging: this thread's alone. Unpacking runs on a stream of its own, receives run on their links'.
        timeout_s: a link whose granted pieces do not get on for so long is given up.
        call_soon: runs a call on the event loop's thread; in order.
    """

    def __init__(
        self,
        staging: Staging,
        unpack_stream: Stream,
        events: ReceiveEvents,
        *,
        name: str,
        timeout_s: float,
        call_soon: Callable[[Callable[[], None]], None],
    ) -> None:
        self._staging = staging
        self._unpack_stream = unpack_stream
        self._events = events
        self._timeout_s = timeout_s
        self._call_soon = call_soon
        self._lock = threading.Lock()  # of links' errors

        self._link: Link | None = None  # that has the grant; the rest is the thread's own
        self._to_receive: deque[tuple[Transfer, Piece | None]] = deque()
        self._receiving: deque[Arrival] = deque()
        self._unpacking: deque[Arrival] = deque()
        self._progress_at = 0.0

        self._thread = PollingThread(f"nccl-receive-{name}", self._poll, self._thread_failed)
        self._watchdog = Watchdog(f"nccl-receive-watch-{name}", self._expired)

    def receive(self, transfers: list[Transfer]) -> None:
        """Receive these puts of one link; not before the last grant has ended."""
        self._thread.post(lambda: self._begin(transfers))

    def unpack(self, arrival: Arrival) -> None:
        """Write the piece into the pool."""
        self._thread.post(lambda: self._unpack(arrival))

    def discard(self, arrival: Arrival) -> None:
        self._thread.post(lambda: self._staging.ring.free(arrival.region))

    def give_up(self, link: Link, reason: str) -> bool:
        """Abort a link; False if it was given up before. Takes about half a second."""
        with self._lock:
            first = link.error is None
            if first:
                link.error, link.failed_at = reason, time.monotonic()
        link.communicator.close()
        self._thread.post(lambda: None)
        return first

    def stop(self) -> None:
        """Not from the thread itself. Links must have been given up before."""
        self._thread.stop()
        self._watchdog.stop()

    # the thread

    def _begin(self, transfers: list[Transfer]) -> None:
        assert self._link is None and not self._receiving, "two grants at a time"
        self._link, self._progress_at = transfers[0].link, time.monotonic()
        for transfer in transfers:
            pieces: list[Piece | None] = [*transfer.pieces] or [None]
            self._to_receive.extend((transfer, piece) for piece in pieces)

    def _poll(self) -> bool:
        while self._receiving and self._receiving[0].done.query():
            self._on_received(self._receiving.popleft())
        while self._unpacking and self._unpacking[0].done.query():
            arrival = self._unpacking.popleft()
            self._staging.ring.free(arrival.region)
            self._tell(self._events.written if arrival.piece else self._events.probed, arrival)
        self._watch()  # a receive can hang
        while self._receive_next():
            pass
        if self._link is not None and not self._to_receive and not self._receiving:
            self._link = None
            self._call_soon(self._events.grant_ended)
        self._watch()
        return bool(self._receiving or self._unpacking)

    def _receive_next(self) -> bool:
        """Post one more receive; False if there is none, or no room."""
        link = self._link
        if link is None or not self._to_receive:
            return False
        if link.error is not None:
            self._to_receive.clear()
            return False
        transfer, piece = self._to_receive[0]
        staging = self._staging
        region = staging.allocate_probe() if piece is None else staging.allocate(piece)
        if region is None:
            return False
        num_bytes = PROBE_BYTES if piece is None else staging.num_bytes(piece)
        try:
            link.communicator.recv(staging.pointer(region), num_bytes, link.stream)
        except Exception as error:  # NCCL's, or the watchdog's abort; what was posted before ends with it
            self._fail(link, f"{type(error).__name__}: {error}")
            self._to_receive.clear()
            # the region stays in use until the stream has passed: the call may have enqueued something
        else:
            self._to_receive.popleft()
        self._receiving.append(Arrival(transfer, piece, region, link.stream.record()))
        return True

    def _on_received(self, arrival: Arrival) -> None:
        link, self._progress_at = arrival.transfer.link, time.monotonic()
        if link.error is not None:
            self._staging.ring.free(arrival.region)
        elif arrival.piece is not None:
            self._tell(self._events.arrived, arrival)
        else:
            self._unpack_stream.run(partial(self._check_probe, arrival))
            self._unpacked_later(arrival)

    def _check_probe(self, arrival: Arrival) -> None:
        transfer = arrival.transfer
        transfer.refused = not self._staging.is_probe(arrival.region, transfer.link.epoch)

    def _unpack(self, arrival: Arrival) -> None:
        piece, blocks = arrival.piece, arrival.transfer.blocks
        assert piece is not None
        self._unpack_stream.run(partial(self._staging.unpack, arrival.region, piece, blocks))
        self._unpacked_later(arrival)

    def _unpacked_later(self, arrival: Arrival) -> None:
        arrival.done = self._unpack_stream.record()
        self._unpacking.append(arrival)

    def _tell(self, event: Callable[[Arrival], None], arrival: Arrival) -> None:
        self._call_soon(lambda: event(arrival))

    def _watch(self) -> None:
        link, now = self._link, time.monotonic()
        if link is not None and link.error is not None and self._receiving and now > link.failed_at + DRAIN_TIMEOUT_S:
            raise TransferError(f"{link.name}: its stream has not drained {DRAIN_TIMEOUT_S:g} s after the abort")
        active = link is not None and link.error is None
        self._watchdog.set(self._progress_at + self._timeout_s if active else None)

    # failures

    def _fail(self, link: Link, reason: str) -> None:
        if self.give_up(link, reason):
            self._call_soon(lambda: self._events.link_failed(link, reason))

    def _expired(self) -> None:
        """The watchdog's thread."""
        link = self._link
        if link is not None and time.monotonic() >= self._progress_at + self._timeout_s:
            self._fail(link, f"a transfer did not get on for {self._timeout_s:g} s (worker_timeout_s)")

    def _thread_failed(self, error: BaseException) -> None:
        self._call_soon(lambda: self._events.failed(error))
