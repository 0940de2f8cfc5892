"""The prefill worker's half of the nccl channel.

A put is cut into pieces that fit the staging ring. Each is packed there as soon as its KV is final and there is room;
when the first one lies there the receiver is told (Staged), and once it has granted the put the pieces are sent, in
order, while the next ones are packed. Puts are staged, granted and sent in the order in which they were made.

Threads: put() and on_message() belong to the event loop; one thread does everything on the device; a watchdog aborts
the communicator when a transfer does not get on. Nothing waits for a peer on the compute stream, or on the host.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from pdray.errors import HandshakeError, TransferError
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
from pdray.transfer.nccl.outgoing import NO_PUT, Outgoing, Packed
from pdray.transfer.nccl.staging import PROBE_BYTES, Staging
from pdray.transfer.nccl.threads import PollingThread, Watchdog
from pdray.transfer.streams import Stream, drain
from pdray.wire.message import LegKey

GRANT_TIMEOUT_FACTOR = 4  # a receiver may have to give others up before it comes to a put


class NcclSender(Sender):
    """A Sender over a communicator. See the module.

    Args:
        staging: this channel's alone until close() has returned.
        new_stream: makes one; twice.
        piece_bytes: of the receiver's offer: both sides cut puts alike.
        timeout_s: a granted transfer that does not get on for so long fails the channel.
        send: hands the receiver a message; called from the channel's thread.
        on_failed: called once, from any thread, when the channel has failed by itself; its owner then closes it.

    Raises:
        HandshakeError: the receiver's pieces do not fit this staging.
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
        if piece_bytes > staging.piece_bytes:
            raise HandshakeError(
                f"{name} takes pieces of {piece_bytes} bytes, and {staging.piece_bytes} fit the staging here: "
                "transfer_staging_bytes must be the same everywhere"
            )
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
        self._to_pack: deque[Outgoing] = deque()
        self._packing: deque[tuple[Outgoing, Packed]] = deque()
        self._granted: deque[Outgoing] = deque()
        self._sending: deque[Packed] = deque()
        self._announced: dict[int, Outgoing] = {}  # not answered yet
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
            self._thread.post(lambda: self._begin(outgoing))
        return future

    # channel's thread

    def _begin(self, outgoing: Outgoing) -> None:
        put = outgoing.put
        if put is not None:
            outgoing.pieces = self._staging.split(put.layers, len(put.source_blocks), self._piece_bytes)
        self._to_pack.append(outgoing)

    def _take(self, message: ToSender) -> None:
        match message:
            case GrantTransfers():
                for seq in message.seqs:
                    outgoing = self._announced.pop(seq)
                    outgoing.granted = True
                    self._granted.append(outgoing)
                    self._undone.add(seq)
                self._progress_at = time.monotonic()
            case RefuseTransfer():
                self._refuse(self._announced.pop(message.seq))
            case ChannelFailed():
                raise TransferError(f"the receiver gave up: {message.reason}")
            case _:
                self._undone.remove(message.seq)
                self._progress_at = time.monotonic()
                self._settle(message.seq, message.written)

    def _poll(self) -> bool:
        while self._packing and self._packing[0][1].done.query():
            self._on_packed(self._packing.popleft()[0])
        while self._sending and self._sending[0].done.query():
            self._staging.ring.free(self._sending.popleft().region)
            self._progress_at = time.monotonic()
        self._watchdog.set(self._deadline())  # a send can hang
        while self._send_next() or self._pack_next():
            pass
        self._watchdog.set(self._deadline())
        return bool(self._packing or self._sending)

    def _deadline(self) -> float | None:
        if self._undone:
            return self._progress_at + self._timeout_s
        if self._announced:
            first = next(iter(self._announced.values()))
            assert first.announced_at is not None
            return max(first.announced_at, self._progress_at) + GRANT_TIMEOUT_FACTOR * self._timeout_s
        return None

    def _pack_next(self) -> bool:
        """Enqueue the packing of one more piece; False if there is none, or no room."""
        if not self._to_pack:
            return False
        outgoing, staging, stream = self._to_pack[0], self._staging, self._pack_stream
        put, number = outgoing.put, outgoing.num_packed
        if put is None:
            region, num_bytes = staging.allocate_probe(), PROBE_BYTES
        else:
            region, num_bytes = staging.allocate(outgoing.pieces[number]), staging.num_bytes(outgoing.pieces[number])
        if region is None:
            return False
        if put is None:
            stream.run(partial(staging.write_probe, region, self.epoch))
        else:
            if put.ready is not None:
                stream.wait(put.ready)
            stream.run(partial(staging.pack, region, outgoing.pieces[number], put.source_blocks))
        packed = Packed(region, num_bytes, stream.record())
        outgoing.num_packed += 1
        outgoing.packed.append(packed)
        self._packing.append((outgoing, packed))
        if outgoing.num_packed == outgoing.num_pieces:
            self._to_pack.popleft()
        return True

    def _on_packed(self, outgoing: Outgoing) -> None:
        """One more of its pieces lies in staging."""
        if outgoing.refused:
            self._drop_if_packed(outgoing)
        elif outgoing.announced_at is None:
            outgoing.announced_at = time.monotonic()
            self._announced[outgoing.seq] = outgoing
            put = outgoing.put or NO_PUT
            key, layers = LegKey(*put.key), put.layers  # type: ignore[misc]
            where = layers.start, layers.stop, put.first_position, len(put.source_blocks)
            self._send(encode(Staged(outgoing.seq, *key, *where)))

    def _send_next(self) -> bool:
        """Enqueue the send of the oldest granted put's next piece; False if there is none in staging."""
        if not self._granted or not self._granted[0].packed:
            return False
        outgoing = self._granted[0]
        packed = outgoing.packed.popleft()
        self._send_stream.wait(packed.done)
        self._communicator.send(self._staging.pointer(packed.region), packed.num_bytes, self._send_stream)
        self._sending.append(Packed(packed.region, packed.num_bytes, self._send_stream.record()))
        if outgoing.num_packed == outgoing.num_pieces and not outgoing.packed:
            self._granted.popleft()
        return True

    def _refuse(self, outgoing: Outgoing) -> None:
        outgoing.refused = True
        if self._to_pack and self._to_pack[0] is outgoing:
            self._to_pack.popleft()
        self._drop_if_packed(outgoing)

    def _drop_if_packed(self, outgoing: Outgoing) -> None:
        """A refused put is over once nothing reads its source any more."""
        if not any(other is outgoing for other, _ in self._packing):
            for packed in outgoing.packed:
                self._staging.ring.free(packed.region)
            outgoing.packed.clear()
            self._settle(outgoing.seq, False)

    def _settle(self, seq: int, accepted: bool) -> None:
        with self._lock:
            outgoing = self._pending.pop(seq, None)
        if outgoing is not None:
            num_bytes = sum(self._staging.num_bytes(piece) for piece in outgoing.pieces) if accepted else 0
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
