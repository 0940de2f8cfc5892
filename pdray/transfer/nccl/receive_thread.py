"""The nccl receiver on the device: receives what one link was granted, and unpacks it.

Everything of a grant is enqueued at once: a receive into a slot on the link's stream, and behind it the unpacking,
which frees the slot. An abort of the link's communicator ends its receives, and what is unpacked then goes to blocks of
leases that are held until it has (PendingWrites), and that never count.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

from pdray.errors import TransferError
from pdray.transfer.nccl.communicator import GuardedCommunicator
from pdray.transfer.nccl.staging import PROBE_BYTES, Slot, Span, Staging
from pdray.transfer.nccl.threads import PollingThread, Watchdog
from pdray.transfer.ring import Region
from pdray.transfer.streams import DRAIN_TIMEOUT_S, Event, Stream
from pdray.wire.message import LegKey

CROWDED_TIMEOUT_S = 1.0  # an event loop that is busy with other things answers a grant within a fifth of that


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
    """A put, or a probe (which has no spans), that was granted.

    Attributes:
        layers, positions: as the sender named them. blocks: of the pool, for each position.
        arrived: all of it is where it should be; probe: where it lies on the host. Set by the thread.
    """

    link: Link
    seq: int
    key: LegKey
    layers: range
    positions: range
    blocks: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    arrived: bool = False
    probe: int | None = None


class Receiving(NamedTuple):
    """A receive, or the end of a grant, which ends nothing else."""

    link: Link
    done: Event
    ends_grant: bool = False


class Unpacking(NamedTuple):
    """Attributes:
    ids: that nothing needs after it. transfer: which is over with it.
    """

    done: Event
    ids: Region | None = None
    transfer: Transfer | None = None


class ReceiveEvents(Protocol):
    """Events of the thread, called on the event loop's thread and in order."""

    def transfer_ended(self, transfer: Transfer) -> None:
        """Nothing of it is written any more. Comes once for each transfer that was granted, also of a failed link."""

    def grant_ended(self) -> None:
        """Everything of one receive() has been received, or its link was given up and nothing of it is in flight."""

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

    Attributes:
        others_wait: another link's puts wait for the grant's end, so that it is given up after CROWDED_TIMEOUT_S. Its
            sender may be dead, or may have lost its puts; if it was only slow it connects again.
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
        self.others_wait = False
        self._call_soon = call_soon
        self._lock = threading.Lock()  # of links' errors
        self._active: Link | None = None  # whose receives are under way; for the watchdog

        # the thread's own
        self._grants: deque[list[Transfer]] = deque()
        self._work: Iterator[None] | None = None  # enqueues the next grant
        self._receiving: deque[Receiving] = deque()  # all of one link
        self._unpacking: deque[Unpacking] = deque()
        self._progress_at = 0.0

        self._thread = PollingThread(f"nccl-receive-{name}", self._poll, self._thread_failed)
        self._watchdog = Watchdog(f"nccl-receive-watch-{name}", self._expired)

    def receive(self, transfers: list[Transfer]) -> None:
        """Receive these puts of one link. Another link's: not before the grants before have ended."""
        self._thread.post(lambda: self._grants.append(transfers))

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
        """End the thread. Not from the thread itself; links must have been given up before."""
        self._thread.stop()
        self._watchdog.stop()

    # the thread

    def _poll(self) -> bool:
        while self._receiving and self._receiving[0].done.query():
            if self._receiving.popleft().ends_grant:
                self._call_soon(self._events.grant_ended)
            self._progress_at = time.monotonic()
        while self._unpacking and self._unpacking[0].done.query():
            self._unpacked(self._unpacking.popleft())
        self._watch()  # a receive can hang
        while self._work is not None or self._grants:
            if self._work is None:
                self._progress_at = time.monotonic()
                self._work = self._receive_all(self._grants.popleft())
            if next(self._work, self) is not self:
                break
            self._work = None
        self._watch()
        return bool(self._receiving or self._unpacking)

    def _receive_all(self, transfers: list[Transfer]) -> Iterator[None]:
        """Enqueue a grant. Yields while there is no room for block ids."""
        link = transfers[0].link
        assert all(receiving.link is link for receiving in self._receiving), "two links' receives at a time"
        for transfer in transfers:
            if not transfer.spans:
                self._receive_probe(transfer)
            for span in transfer.spans:
                while (ids := self._staging.allocate_ids(span)) is None:
                    yield
                self._receive_span(transfer, span, ids)
            self._unpacking.append(Unpacking(self._unpack_stream.record(), transfer=transfer))
        self._receiving.append(Receiving(link, link.stream.record(), ends_grant=True))

    def _receive_span(self, transfer: Transfer, span: Span, ids: Region) -> None:
        staging, stream = self._staging, self._unpack_stream
        stream.run(partial(staging.load_ids, ids, span, transfer.blocks))
        for piece in span.pieces:
            slot = staging.next_slot()
            if self._receive(transfer.link, slot, staging.num_bytes(piece)):
                stream.run(partial(staging.unpack, slot, piece, span, ids))
                slot.free_after = stream.record()
        self._unpacking.append(Unpacking(stream.record(), ids))

    def _receive_probe(self, transfer: Transfer) -> None:
        slot, transfer.probe = self._staging.next_slot(), self._staging.next_probe()
        if self._receive(transfer.link, slot, PROBE_BYTES):
            self._unpack_stream.run(partial(self._staging.read_probe, slot, transfer.probe))
            slot.free_after = self._unpack_stream.record()

    def _receive(self, link: Link, slot: Slot, num_bytes: int) -> bool:
        """Enqueue a receive, and let the unpacking wait for it. False if the link has been given up."""
        if link.error is not None:
            return False
        if slot.free_after is not None:
            link.stream.wait(slot.free_after)
        try:
            link.communicator.recv(self._staging.pointer(slot), num_bytes, link.stream)
        except Exception as error:  # NCCL's, or the watchdog's abort; what was enqueued before ends with it
            self._fail(link, f"{type(error).__name__}: {error}")
        slot.free_after = link.stream.record()  # also of a call that failed: it may have enqueued something
        self._receiving.append(Receiving(link, slot.free_after))
        self._unpack_stream.wait(slot.free_after)
        return link.error is None

    def _unpacked(self, unpacking: Unpacking) -> None:
        if unpacking.ids is not None:
            self._staging.ids.free(unpacking.ids)
        transfer = unpacking.transfer
        if transfer is not None:
            link, row = transfer.link, transfer.probe
            transfer.arrived = link.error is None and (row is None or self._staging.is_probe(row, link.epoch))
            self._call_soon(partial(self._events.transfer_ended, transfer))

    def _watch(self) -> None:
        link = self._receiving[0].link if self._receiving else None
        now = time.monotonic()
        if link is not None and link.error is not None and now > link.failed_at + DRAIN_TIMEOUT_S:
            raise TransferError(f"{link.name}: its stream has not drained {DRAIN_TIMEOUT_S:g} s after the abort")
        self._active = link if link is not None and link.error is None else None
        self._watchdog.set(None if self._active is None else self._progress_at + self._patience_s)

    # failures

    @property
    def _patience_s(self) -> float:
        return min(self._timeout_s, CROWDED_TIMEOUT_S) if self.others_wait else self._timeout_s

    def _fail(self, link: Link, reason: str) -> None:
        if self.give_up(link, reason):
            self._call_soon(lambda: self._events.link_failed(link, reason))

    def _expired(self) -> None:
        """The watchdog's thread."""
        link, patience_s = self._active, self._patience_s
        if link is not None and time.monotonic() >= self._progress_at + patience_s:
            why = "worker_timeout_s" if patience_s == self._timeout_s else "others waited"
            self._fail(link, f"a transfer did not get on for {patience_s:g} s ({why})")

    def _thread_failed(self, error: BaseException) -> None:
        self._call_soon(lambda: self._events.failed(error))
