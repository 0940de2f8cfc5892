"""The prefill worker's half of the cuda_ipc channel.

A put is one kernel on the channel's stream, behind the event after which its source is final: it writes blocks of the
pool here straight into blocks of the pool there. Where they go is known before: the decode worker lends a leg's blocks
when it lets this worker write (Lend), and is asked for the others (Ask). Once the host has seen a write end, one
message tells (Written). Puts of one step that become final together share a kernel and a message. Of several ranks each
writes its heads; the others do so when this one, rank 0, asks them.

Nothing waits for the peer: a write goes on while its process is stopped, and ends in memory that nobody reads if it is
dead. What must not be written into, its lease table holds until this end has said that it has stopped.

Threads: everything belongs to the event loop but close(). No other thread: work is put on the stream in microseconds
and long before the device comes to it, and whoever hears of a step's end calls step_ended().
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Hashable
from concurrent.futures import Future
from functools import partial

import msgspec

from pdray.engine.kv.layout import KVLayout
from pdray.errors import TransferError, describe_error
from pdray.transfer.channel import Link, Put, PutResult, Sender
from pdray.transfer.cuda_ipc.messages import (
    Ask,
    Lend,
    Probe,
    Proven,
    Refuse,
    ToSender,
    Unfit,
    Written,
    decode_to_sender,
    encode,
)
from pdray.transfer.cuda_ipc.other_ranks import OtherWriters
from pdray.transfer.cuda_ipc.outgoing import Outgoing, Part, Write, cut, take_alike
from pdray.transfer.cuda_ipc.writer import PoolWriter
from pdray.wire.message import LegKey

POLL_S = 1e-3  # while the device has not come to a write, or is long at it
SPIN_S = 2e-3  # a write takes as long at most, nearly always: 600 MB
HIDDEN_PROGRAMS = 32  # of a write beside a step that goes on; they reach most of the link's rate


class CudaIpcSender(Sender):
    """A Sender into memory of another process. See the module.

    Args:
        layout: of the blocks that are put, with the heads of all ranks.
        writer: this process's part; others: those of the other ranks, after open().
        num_blocks: of the peer's pool.
        timeout_s: a question that is not answered for so long fails the channel.
    """

    kind = "cuda_ipc"

    def __init__(
        self,
        layout: KVLayout,
        writer: PoolWriter,
        others: OtherWriters,
        num_blocks: int,
        link: Link,
        timeout_s: float,
    ) -> None:
        self.epoch = link.epoch
        self._layout = layout
        self._writer = writer
        self._others = others
        self._num_blocks = num_blocks
        self._link = link
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._proof: asyncio.Future[None] = self._loop.create_future()

        self._lent: dict[LegKey, dict[int, int]] = {}  # position to block, of legs that are not over
        self._asked: dict[int, Outgoing] = {}
        self._next_seq = 0
        self._timer: asyncio.Handle | None = None
        self._spin_until: float | None = None  # of the first write's polling

        self._lock = threading.Lock()  # guards the rest
        self._ended: str | None = None  # why
        self._pending: set[Outgoing] = set()
        self._to_write: deque[Part] = deque()
        self._writing: deque[Write] = deque()
        self._close_lock = threading.Lock()
        self._is_closed = False

    async def check(self) -> None:
        """See Sender: a test write arrives."""
        done = self._writer.write_probe(self.epoch)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._others.probe(self.epoch)
                while not done.query():
                    await asyncio.sleep(POLL_S)
                self._link.send(encode(Probe()))
                await self._proof
        except TimeoutError:
            raise TransferError(
                f"channel to {self._link.peer}: its test write was not answered for {self._timeout_s:g} s"
            ) from None

    def put(self, put: Put) -> Future[PutResult]:
        """See Sender."""
        assert put.source_blocks
        outgoing = Outgoing(put, Future(), time.monotonic())
        with self._lock:
            ended = self._ended
            if ended is None:
                self._pending.add(outgoing)
        if ended is not None:
            outgoing.future.set_exception(TransferError(ended))
        elif self._find_targets(outgoing):
            self._write_soon(outgoing)
        else:
            self._ask(outgoing)
        return outgoing.future

    def end_leg(self, key: Hashable) -> None:
        """See Sender."""
        self._lent.pop(LegKey(*key), None)  # type: ignore[misc]

    def step_ended(self) -> None:
        """See Sender."""
        if self._writing or self._to_write:
            self._stop_timer()
            self._poll()

    def on_message(self, epoch: int, payload: bytes) -> None:
        """See Sender. Messages of another epoch are ignored; one that makes no sense fails the channel."""
        if epoch != self.epoch or self._ended is not None:
            return
        try:
            self._take(decode_to_sender(payload))
        except (msgspec.DecodeError, TransferError) as error:
            self._fail(f"the receiver said what it must not: {error}")

    def _take(self, message: ToSender) -> None:
        match message:
            case Proven():
                if not self._proof.done():
                    self._proof.set_result(None)
            case Unfit():
                if not self._proof.done():
                    self._proof.set_exception(TransferError(message.reason))
            case Lend():
                self._take_lent(message)
            case Refuse():
                self._settle(self._answered(message.seq), accepted=False)

    # where blocks go

    def _find_targets(self, outgoing: Outgoing) -> bool:
        """Whether all of its blocks are lent, and it names layers that there are."""
        put = outgoing.put
        lent = self._lent.get(LegKey(*put.key), {})  # type: ignore[misc]
        targets = [lent.get(position, 0) for position in put.positions]
        if not all(targets) or not self._layout.holds_layers(put.layers):
            return False
        outgoing.targets = targets
        return True

    def _ask(self, outgoing: Outgoing) -> None:
        seq, self._next_seq = self._next_seq, self._next_seq + 1
        self._asked[seq] = outgoing
        self._link.send(encode(Ask(seq, outgoing.places)))
        self._loop.call_later(self._timeout_s, self._expire, seq)

    def _expire(self, seq: int) -> None:
        if seq in self._asked:
            self._fail(f"a question was not answered for {self._timeout_s:g} s (worker_timeout_s)")

    def _answered(self, seq: int) -> Outgoing:
        if seq not in self._asked:
            raise TransferError(f"an answer to question {seq}, which is none")
        return self._asked.pop(seq)

    def _take_lent(self, message: Lend) -> None:
        blocks, first = message.block_ids, message.first_position
        if not all(0 < block < self._num_blocks for block in blocks) or len(set(blocks)) < len(blocks):
            raise TransferError(f"blocks {min(blocks)} to {max(blocks)} of {self._num_blocks}, or one twice")
        lent = self._lent.setdefault(LegKey(message.request_id, message.attempt), {})
        lent.update(zip(range(first, first + len(blocks)), blocks, strict=True))
        if message.seq is not None:
            outgoing = self._answered(message.seq)
            if not self._find_targets(outgoing):
                raise TransferError(f"blocks for another put than {outgoing.places}")
            self._write_soon(outgoing)

    # writing

    def _write_soon(self, outgoing: Outgoing) -> None:
        """With what else becomes known in this turn of the loop."""
        with self._lock:
            self._to_write.extend(cut(outgoing))
        self._poll_soon()

    def _poll_soon(self) -> None:
        self._stop_timer()
        self._timer = self._loop.call_soon(self._poll)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _poll(self) -> None:
        """See what has been written, and start what waits."""
        self._timer = None
        try:
            with self._lock:
                if self._ended is not None:
                    return
                landed = self._take_landed()
                while self._to_write and self._start_write():
                    pass
                delay = self._next_poll() if self._writing else None
        except Exception as error:  # the device's: close() finds out whether it is lost
            self._fail(describe_error(error))
            return
        if landed:
            self._link.send(encode(Written([outgoing.places for outgoing in landed])))
        for outgoing in landed:
            self._settle(outgoing, accepted=True)
        if delay is not None and self._timer is None:
            call_again = self._loop.call_soon if delay == 0 else partial(self._loop.call_later, delay)
            self._timer = call_again(self._poll)

    def _take_landed(self) -> list[Outgoing]:
        if self._others.ranks:
            for write in self._writing:
                write.done.query()  # the others begin once it is final, whatever is still written before it
        landed = []
        while self._writing and self._writing[0].done.query():
            write = self._writing.popleft()
            self._spin_until = None
            self._writer.ids.free(write.region)
            for part in write.parts:
                part.outgoing.num_left -= 1
                if not part.outgoing.num_left:
                    landed.append(part.outgoing)
        return landed

    def _next_poll(self) -> float:
        """Seconds until the next one: none while the device is at what somebody waits for.

        That may be behind writes that were hidden: of a step that has ended meanwhile.
        """
        if not any(self._is_awaited(write.parts[0]) for write in self._writing):
            return POLL_S
        now = time.monotonic()
        if self._spin_until is None:
            self._spin_until = now + SPIN_S
        return 0.0 if now < self._spin_until else POLL_S

    def _is_awaited(self, part: Part) -> bool:
        """Whether it is all that is left of its step."""
        return not self._is_beside_a_step(part) and (part.ready is None or part.ready.query())

    def _start_write(self) -> bool:
        """Enqueue the parts that come next; False if there is no room for their ids."""
        parts = take_alike(self._to_write)
        source = [block for part in parts for block in part.outgoing.put.source_blocks[part.start : part.stop]]
        target = [block for part in parts for block in part.outgoing.targets[part.start : part.stop]]
        layers, ready = parts[0].layers, parts[0].ready
        num_programs = HIDDEN_PROGRAMS if self._is_beside_a_step(parts[0]) else None
        own = self._writer.write(layers, source, target, ready, num_programs)
        if own is None:
            return False
        for _ in parts:
            self._to_write.popleft()
        done = self._others.follow(own.done, ready, layers, source, target, num_programs, self._rank_wrote)
        self._writing.append(Write(parts, own.region, done))
        return True

    def _rank_wrote(self) -> None:
        """Another rank has ended a write; on any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.step_ended)

    def _is_beside_a_step(self, part: Part) -> bool:
        """Whether more layers follow, in whose shadow it is written."""
        return part.ready is not None and part.layers.stop < self._layout.num_layers

    def _settle(self, outgoing: Outgoing, *, accepted: bool) -> None:
        with self._lock:
            if outgoing not in self._pending:
                return  # close() was first
            self._pending.remove(outgoing)
        put = outgoing.put
        size = len(put.layers) * len(put.source_blocks) * self._layout.layer_block_bytes
        outgoing.future.set_result(PutResult(accepted, size if accepted else 0, time.monotonic() - outgoing.started))

    # the end

    def _fail(self, reason: str) -> None:
        """Refuse what follows, and let the owner close the channel; that fails what is pending."""
        with self._lock:
            first, self._ended = self._ended is None, self._ended or f"channel to {self._link.peer}: {reason}"
        if first:
            self._link.on_failed(reason)

    def close(self) -> None:
        """See Sender. Afterwards the peer's memory is not mapped any more.

        Raises:
            TransferError: what was enqueued does not end: the device cannot be trusted with another channel.
        """
        with self._lock:
            self._ended = self._ended or f"channel to {self._link.peer} of epoch {self.epoch} is closed"
        with self._close_lock:
            if not self._is_closed:
                self._others.close()
                self._writer.close(self._link.peer)
                self._is_closed = True
        with self._lock:
            pending, self._pending = self._pending, set()
            for write in self._writing:
                self._writer.ids.free(write.region)
            self._writing.clear()
            self._to_write.clear()
        for outgoing in pending:
            outgoing.future.set_exception(TransferError(self._ended))
