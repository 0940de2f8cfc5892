"""The prefill worker's half of the nccl channel.

As soon as a put's KV is final the receiver is told (Staged), and once it has granted the put everything is enqueued at
once, in each of the sender's lanes (see SendLane): one, where both workers have one rank. Other ranks send theirs when
this one, rank 0, asks them. Puts are told, granted and sent in the order in which they were made.

Threads: put() and on_message() belong to the event loop; one thread does everything on the device; a watchdog aborts
the communicators when a transfer does not get on. Nothing waits for a peer on the compute stream, or on the host.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from pdray.engine.kv.layout import KVLayout
from pdray.errors import TransferError
from pdray.transfer.asking import wait_until_ended
from pdray.transfer.channel import Put, PutResult, Sender
from pdray.transfer.nccl.communicator import run_all
from pdray.transfer.nccl.messages import (
    ChannelFailed,
    GrantTransfers,
    RefuseTransfer,
    Staged,
    ToSender,
    decode_to_sender,
    encode,
)
from pdray.transfer.nccl.other_sends import OtherSends
from pdray.transfer.nccl.send_lane import SendLane
from pdray.transfer.nccl.threads import PollingThread, Watchdog
from pdray.wire.message import LegKey

logger = logging.getLogger(__name__)

GRANT_TIMEOUT_FACTOR = 4  # a receiver may have to give others up before it comes to a put
NO_PUT = Put(("", 0), range(0), [], 0)  # what a probe says that it is


@dataclass(eq=False, slots=True)
class Outgoing:
    """A put from put() until its future is done; put is None for a probe.

    Attributes:
        told_at: when the receiver was told.
    """

    seq: int
    put: Put | None
    future: Future[PutResult]
    started: float
    told_at: float = 0.0

    @property
    def is_final(self) -> bool:
        """Whether the device has computed what is to be sent."""
        return self.put is None or self.put.ready is None or self.put.ready.query()


class NcclSender(Sender):
    """A Sender over communicators. See the module.

    Args:
        layout: of the blocks that are put, with the heads of all ranks.
        lanes: of this process, this channel's alone until close() has returned.
        others: other ranks that send, once they are connected.
        timeout_s: a granted transfer that does not get on for so long fails the channel.
        send: hands the receiver a message; called from the channel's thread.
        on_failed: called once, from any thread, when the channel has failed by itself; its owner then closes it.
    """

    kind = "nccl"

    def __init__(
        self,
        layout: KVLayout,
        lanes: list[SendLane],
        others: OtherSends,
        *,
        name: str,
        epoch: int,
        timeout_s: float,
        send: Callable[[bytes], None],
        on_failed: Callable[[str], None],
    ) -> None:
        self.epoch = epoch
        self._layout = layout
        self._name = name
        self._lanes = lanes
        self._others = others
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
        self._undone: set[int] = set()  # granted, and not said to have arrived
        self._asked = 0  # sends of other ranks that have not ended; each rank watches its own
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
                    self._send_granted(self._told.pop(seq))
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
        got_on = [lane.poll() for lane in self._lanes]
        if any(got_on):
            self._progress_at = time.monotonic()
        while self._to_tell and self._to_tell[0].is_final:
            self._tell(self._to_tell.popleft())
        self._watchdog.set(self._deadline())  # a send can hang
        for lane in self._lanes:
            lane.start()
        self._watchdog.set(self._deadline())
        return bool(self._to_tell) or self._is_sending

    @property
    def _is_sending(self) -> bool:
        return any(lane.is_busy for lane in self._lanes)

    def _deadline(self) -> float | None:
        if self._undone:
            waits_for_others = self._asked and not self._is_sending
            return None if waits_for_others else self._progress_at + self._timeout_s
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

    def _send_granted(self, outgoing: Outgoing) -> None:
        put = outgoing.put or NO_PUT
        for lane in self._lanes:
            lane.send(put.layers, put.source_blocks)
        for future in self._others.send(put.layers, put.source_blocks):
            self._asked += 1
            future.add_done_callback(lambda done: self._thread.post(lambda: self._rank_sent(done)))

    def _rank_sent(self, future: Future[bytes]) -> None:
        """Another rank has sent its part of a put, or could not."""
        future.result()
        self._asked -= 1
        self._progress_at = time.monotonic()

    def _settle(self, outgoing: Outgoing, accepted: bool) -> None:
        with self._lock:
            pending = self._pending.pop(outgoing.seq, None)
        if pending is not None:
            put = outgoing.put or NO_PUT
            size = len(put.layers) * len(put.source_blocks) * self._layout.layer_block_bytes
            num_bytes = size if accepted else 0
            outgoing.future.set_result(PutResult(accepted, num_bytes, time.monotonic() - outgoing.started))

    # the end, from any thread

    def _thread_failed(self, error: BaseException) -> None:
        self._fail(f"{type(error).__name__}: {error}", str(error))

    def _expired(self) -> None:
        reason = f"a transfer did not get on for {self._timeout_s:g} s (worker_timeout_s)"
        self._fail(reason, reason)

    def _fail(self, reason: str, told: str) -> None:
        """End by itself: the owner is told, and closes the channel."""
        if self._refuse(reason):
            try:
                self._end()
            except TransferError:  # close() comes to the same, and its owner hears of it
                logger.exception("channel %s of epoch %d does not end", self._name, self.epoch)
            self._on_failed(told)

    def _refuse(self, reason: str) -> bool:
        """Take no puts any more. True if it was this call that ended the channel."""
        with self._lock:
            first = self._ended is None
            if first:
                self._ended = f"channel {self._name} of epoch {self.epoch}: {reason}"
            return first

    def _end(self) -> None:
        """Abort, then fail what is pending.

        Raises:
            TransferError: another rank does not end.
        """
        closing = self._others.close()
        run_all([lane.communicator.close for lane in self._lanes])
        wait_until_ended(closing)
        with self._lock:
            text, pending = self._ended, list(self._pending.values())
            self._pending = {}
        for outgoing in pending:
            outgoing.future.set_exception(TransferError(text))

    def close(self) -> None:
        """See Sender. Afterwards the staging is free for another channel, in every rank.

        Raises:
            TransferError: a device still holds what was enqueued: it cannot be trusted with another channel.
        """
        self._refuse("closed")
        self._end()
        self._thread.stop()
        self._watchdog.stop()
        for lane in self._lanes:
            lane.close(self._name)
