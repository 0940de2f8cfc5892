"""The prefill worker's half of the nccl channel.

As soon as a put's KV is final the receiver is told (Staged), and once it has granted the put everything is enqueued at
once: its pieces are packed into slots of the staging on one stream and sent on another, each slot again as soon as the
device has sent what it held. Puts are told, granted and sent in the order in which they were made.

Threads: put() and on_message() belong to the event loop; one thread does everything on the device; a watchdog aborts
the communicator when a transfer does not get on. Nothing waits for a peer on the compute stream, or on the host.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from pdray.errors import TransferError
from pdray.transfer.channel import Put, PutResult, Sender
from pdray.transfer.nccl.communicator import GuardedCommunicator
from pdray.transfer.nccl.messages import (
    ChannelFailed,
    GrantTransfers,
    RefuseTransfer,
    Staged,
    ToSender,
    decode_to_sender,
    encode,
)
from pdray.transfer.nccl.staging import PROBE_BYTES, Staging
from pdray.transfer.nccl.threads import PollingThread, Watchdog
from pdray.transfer.ring import Region
from pdray.transfer.streams import Event, Stream, drain
from pdray.wire.message import LegKey

GRANT_TIMEOUT_FACTOR = 4  # a receiver may have to give others up before it comes to a put
NO_PUT = Put(("", 0), range(0), [], 0)  # what a probe says that it is


@dataclass(eq=False, slots=True)
class Outgoing:
    """A put from put() until its future is done; put is None for a probe.

    Attributes:
        num_bytes: set when it is sent. told_at: when the receiver was told.
    """

    seq: int
    put: Put | None
    future: Future[PutResult]
    started: float
    num_bytes: int = 0
    told_at: float = 0.0

    @property
    def is_final(self) -> bool:
        """Whether the device has computed what is to be sent."""
        return self.put is None or self.put.ready is None or self.put.ready.query()


class NcclSender(Sender):
    """A Sender over a communicator. See the module.

    Args:
        staging: this channel's alone until close() has returned.
        new_stream: makes one; twice.
        piece_bytes: as the receiver was told (OpenCommunicator): both sides cut puts alike.
        timeout_s: a granted transfer that does not get on for so long fails the channel.
        send: hands the receiver a message; called from the channel's thread.
        on_failed: called once, from any thread, when the channel has failed by itself; its owner then closes it.
    """

    kind = "nccl"

    def __init__(
        self,
        staging: Staging,
        communicator: GuardedCommunicator,
        new_stream: Callable[[], Stream],
        *,
        name: str,
        epoch: int,
        piece_bytes: int,
        timeout_s: float,
        send: Callable[[bytes], None],
        on_failed: Callable[[str], None],
    ) -> None:
        assert piece_bytes <= staging.piece_bytes
        self.epoch = epoch
        self._name = name
        self._staging = staging
        self._communicator = communicator
        self._pack_stream, self._send_stream = new_stream(), new_stream()
        self._piece_bytes = piece_bytes
        self._timeout_s = timeout_s
        self._send = send
        self._on_failed = on_failed

        self._lock = threading.Lock()  # guards the next three
        self._ended: str | None = None  # why
        self._pending: dict[int, Outgoing] = {}
        self._next_seq = 0

        # the channel's thread only
        self._to_tell: deque[Outgoing] = deque()  # not final yet
        self._told: dict[int, Outgoing] = {}  # not answered yet
        self._granted: deque[Outgoing] = deque()
        self._work: Iterator[None] | None = None  # enqueues what is granted
        self._sending: deque[tuple[Event, Region | None]] = deque()  # by piece; ids that nothing needs after it
        self._undone: set[int] = set()  # granted, and not said to have arrived
        self._progress_at = 0.0

        self._thread = PollingThread(f"nccl-send-{name}-{epoch}", self._poll, self._thread_failed)
        self._watchdog = Watchdog(f"nccl-send-watch-{name}-{epoch}", self._expired)

    # event loop's thread

    def put(self, put: Put) -> Future[PutResult]:
        """See Sender."""
        assert put.source_blocks
        return self._add(put)

    def probe(self) -> Future[PutResult]:
        """Send a pattern that the receiver checks; done once it has arrived. accepted is False if it was another."""
        return self._add(None)

    async def check(self) -> None:
        """See Sender: a first, small transfer goes through."""
        result = await asyncio.wrap_future(self.probe())
        if not result.accepted:
            raise TransferError(f"a probe of the channel of epoch {self.epoch} did not arrive as it was sent")

    def on_message(self, epoch: int, payload: bytes) -> None:
        """See Sender. Messages of another epoch are ignored; one that cannot be read fails the channel."""
        if epoch == self.epoch:
            self._thread.post(lambda: self._take(decode_to_sender(payload)))

    def _add(self, put: Put | None) -> Future[PutResult]:
        future: Future[PutResult] = Future()
        with self._lock:
            ended = self._ended
            if ended is None:
                outgoing = Outgoing(self._next_seq, put, future, time.monotonic())
                self._next_seq += 1
                self._pending[outgoing.seq] = outgoing
        if ended is not None:
            future.set_exception(TransferError(ended))
        else:
            self._thread.post(lambda: self._to_tell.append(outgoing))
        return future

    # channel's thread

    def _take(self, message: ToSender) -> None:
        match message:
            case GrantTransfers():
                for seq in message.seqs:
                    self._granted.append(self._told.pop(seq))
                    self._undone.add(seq)
                self._progress_at = time.monotonic()
            case RefuseTransfer():
                self._settle(self._told.pop(message.seq), False)
            case ChannelFailed():
                raise TransferError(f"the receiver gave up: {message.reason}")
            case _:
                self._undone.remove(message.seq)
                self._progress_at = time.monotonic()
                with self._lock:
                    outgoing = self._pending.get(message.seq)
                if outgoing is not None:
                    self._settle(outgoing, message.written)

    def _poll(self) -> bool:
        while self._sending and self._sending[0][0].query():
            _, ids = self._sending.popleft()
            if ids is not None:
                self._staging.ids.free(ids)
            self._progress_at = time.monotonic()
        while self._to_tell and self._to_tell[0].is_final:
            self._tell(self._to_tell.popleft())
        self._watchdog.set(self._deadline())  # a send can hang
        self._send_granted()
        self._watchdog.set(self._deadline())
        return bool(self._to_tell or self._sending)

    def _deadline(self) -> float | None:
        if self._undone:
            return self._progress_at + self._timeout_s
        if self._told:
            first = next(iter(self._told.values()))
            return max(first.told_at, self._progress_at) + GRANT_TIMEOUT_FACTOR * self._timeout_s
        return None

    def _tell(self, outgoing: Outgoing) -> None:
        """Ask for a grant. What is granted depends on nothing any more but on the grants before it."""
        outgoing.told_at = time.monotonic()
        self._told[outgoing.seq] = outgoing
        put = outgoing.put or NO_PUT
        key, layers = LegKey(*put.key), put.layers  # type: ignore[misc]
        where = layers.start, layers.stop, put.first_position, len(put.source_blocks)
        self._send(encode(Staged(outgoing.seq, *key, *where)))

    def _send_granted(self) -> None:
        """Enqueue all that was granted, or as much as there is room for block ids."""
        while self._work is not None or self._granted:
            if self._work is None:
                outgoing = self._granted.popleft()
                self._work = self._send_probe() if outgoing.put is None else self._send_put(outgoing, outgoing.put)
            if next(self._work, self) is not self:
                return
            self._work = None

    def _send_put(self, outgoing: Outgoing, put: Put) -> Iterator[None]:
        """Yields while there is no room."""
        staging, stream = self._staging, self._pack_stream
        for span in staging.split(put.layers, len(put.source_blocks), self._piece_bytes):
            while (ids := staging.allocate_ids(span)) is None:
                yield
            stream.run(partial(staging.load_ids, ids, span, put.source_blocks))
            for piece in span.pieces:
                slot, num_bytes = staging.next_slot(), staging.num_bytes(piece)
                if slot.free_after is not None:
                    stream.wait(slot.free_after)
                stream.run(partial(staging.pack, slot, piece, span, ids))
                self._send_stream.wait(stream.record())
                self._communicator.send(staging.pointer(slot), num_bytes, self._send_stream)
                slot.free_after = self._send_stream.record()
                self._sending.append((slot.free_after, ids if piece is span.pieces[-1] else None))
                outgoing.num_bytes += num_bytes

    def _send_probe(self) -> Iterator[None]:
        slot, stream = self._staging.next_slot(), self._pack_stream
        if slot.free_after is not None:
            stream.wait(slot.free_after)
        stream.run(partial(self._staging.write_probe, slot, self.epoch))
        self._send_stream.wait(stream.record())
        self._communicator.send(self._staging.pointer(slot), PROBE_BYTES, self._send_stream)
        slot.free_after = self._send_stream.record()
        self._sending.append((slot.free_after, None))
        yield from ()

    def _settle(self, outgoing: Outgoing, accepted: bool) -> None:
        with self._lock:
            pending = self._pending.pop(outgoing.seq, None)
        if pending is not None:
            num_bytes = outgoing.num_bytes if accepted else 0
            outgoing.future.set_result(PutResult(accepted, num_bytes, time.monotonic() - outgoing.started))

    # the end, from any thread

    def _thread_failed(self, error: BaseException) -> None:
        if self._fail(f"{type(error).__name__}: {error}"):
            self._on_failed(str(error))

    def _expired(self) -> None:
        reason = f"a transfer did not get on for {self._timeout_s:g} s (worker_timeout_s)"
        if self._fail(reason):
            self._on_failed(reason)

    def _fail(self, reason: str) -> bool:
        """Abort, then fail what is pending. True if it was this call that ended the channel."""
        with self._lock:
            first = self._ended is None
            if first:
                self._ended = f"channel {self._name} of epoch {self.epoch}: {reason}"
            text = self._ended
            pending, self._pending = list(self._pending.values()), {}
        self._communicator.close()
        for outgoing in pending:
            outgoing.future.set_exception(TransferError(text))
        return first

    def close(self) -> None:
        """See Sender. Afterwards the staging is free for another channel.

        Raises:
            TransferError: the device still holds what was enqueued: it cannot be trusted with another channel.
        """
        self._fail("closed")
        self._thread.stop()
        self._watchdog.stop()
        drain([self._pack_stream, self._send_stream], self._name)
        self._staging.reset()
