"""The decode worker's half of the cuda_ipc channels: it lends its pool, says where blocks go, and hears when they came.

Nothing is received, so nothing here runs while blocks come. A leg's blocks are lent to its writer the moment it is let
in, and stay its own until it has said that it has stopped or its process was seen dead: the lease table's rule for
every channel, which is all that keeps a mapped pool safe. What is said to be written is looked up again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

from pdray.background import BackgroundTasks
from pdray.engine.kv.pool import KVPool
from pdray.errors import TransferError
from pdray.transfer.asking import answers_of
from pdray.transfer.channel import OtherRank, Receiver, Sink
from pdray.transfer.cuda_ipc.messages import (
    NUM_PROBES,
    PROBE_BYTES,
    Ask,
    CannotMap,
    CudaIpcMessage,
    Lend,
    Offer,
    Places,
    Probe,
    Proven,
    Refuse,
    Unfit,
    Written,
    decode_to_receiver,
    encode,
    probe_pattern,
)
from pdray.transfer.cuda_ipc.other_ranks import ask_all
from pdray.transfer.cuda_ipc.probes import Probes
from pdray.transfer.cuda_ipc.rank_orders import LendPool, ReadProbe
from pdray.transfer.cuda_ipc.transport import Transport
from pdray.wire.message import LegKey

POLL_S = 1e-3


@dataclass(eq=False, slots=True)
class _Sender:
    """A prefill worker in one epoch.

    Attributes:
        probe: where in the spare memory its test write goes.
        send_bytes: hands it a message.
        is_proven: its test write has come.
    """

    worker_id: str
    epoch: int
    probe: int
    send_bytes: Callable[[bytes], None]
    is_proven: bool = False

    def send(self, message: CudaIpcMessage) -> None:
        self.send_bytes(encode(message))


class _Offered(NamedTuple):
    """A prefill worker that was accepted, and has not written yet."""

    epoch: int
    probe: int


class CudaIpcReceiver(Receiver):
    """See the module.

    Args:
        pool: with spare memory; see KVPool.
        others: ranks of this worker; each lends its pool, too.
        sink: asked for the blocks of each leg, and again when they are said to be written.
        on_fatal: called if the device cannot be relied on any more.
    """

    kind = "cuda_ipc"

    def __init__(
        self,
        pool: KVPool,
        transport: Transport,
        others: list[OtherRank],
        sink: Sink,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self._layers = range(pool.layout.num_layers)
        self._num_blocks = pool.num_blocks
        self._probes = Probes(pool, transport)
        self._handle = transport.lend(pool.tensor)
        self._others = others
        self._lent: list[Future[bytes]] = ask_all(others, LendPool())  # the others' handles
        self._sink = sink
        self._tasks = BackgroundTasks(on_fatal)
        self._offered: dict[str, _Offered] = {}  # these and the next by prefill worker
        self._senders: dict[str, _Sender] = {}
        self._failures: dict[str, str] = {}

    async def accept(self, worker_id: str, epoch: int) -> Offer:
        """See Receiver.

        Raises:
            TransferError: too many senders are connecting. RankDiedError: a rank is gone.
        """
        self._offered.pop(worker_id, None)
        taken = {offered.probe for offered in self._offered.values()}
        taken |= {sender.probe for sender in self._senders.values() if not sender.is_proven}
        probe = next((number for number in range(NUM_PROBES) if number not in taken), None)
        if probe is None:
            raise TransferError(f"{len(taken)} prefill workers are connecting over cuda_ipc already, as many as can be")
        self._offered[worker_id] = _Offered(epoch, probe)
        await self._read_probe(probe, clear=True)
        handles = self._handle, *await answers_of(self._lent)
        return Offer(handles, self._num_blocks, self._probes.offset + probe * PROBE_BYTES)

    def on_message(self, worker_id: str, epoch: int, payload: bytes, send: Callable[[bytes], None]) -> None:
        """See Receiver. What belongs to another epoch, or comes before the test write, is ignored.

        Raises:
            msgspec.DecodeError: the bytes are no message.
        """
        message = decode_to_receiver(payload)
        match message:
            case CannotMap() | Probe():
                offered = self._offered.get(worker_id)
                if offered is not None and offered.epoch == epoch:
                    del self._offered[worker_id]
                    self._begin(message, _Sender(worker_id, epoch, offered.probe, send))
            case Ask():
                sender = self._find(worker_id, epoch)
                if sender is not None:
                    blocks = self._resolve(sender, message.places)
                    key, first = self._key(message.places), message.places.first_position
                    answer = Refuse(message.seq) if blocks is None else Lend(message.seq, *key, first, blocks)
                    sender.send(answer)
            case Written():
                sender = self._find(worker_id, epoch)
                if sender is not None:
                    self._count(sender, message.puts)

    def _count(self, sender: _Sender, puts: list[Places]) -> None:
        for places in puts:
            if self._resolve(sender, places) is not None:
                self._sink.put_received(self._key(places), sender.worker_id, sender.epoch)

    def _find(self, worker_id: str, epoch: int) -> _Sender | None:
        """A sender that may say something."""
        sender = self._senders.get(worker_id)
        return sender if sender is not None and sender.epoch == epoch and sender.is_proven else None

    def _begin(self, message: CannotMap | Probe, sender: _Sender) -> None:
        if isinstance(message, CannotMap):
            self._refuse(sender, message.reason)
        else:
            self._senders[sender.worker_id] = sender
            self._tasks.spawn(self._prove(sender))

    def let_in(self, key: Hashable, worker_id: str, epoch: int, positions: range) -> None:
        """See Receiver."""
        sender = self._find(worker_id, epoch)
        if sender is None or not positions:
            return
        blocks = self._sink.resolve(key, worker_id, epoch, self._layers, positions)
        if blocks is not None:
            leg = LegKey(*key)  # type: ignore[misc]
            sender.send(Lend(None, *leg, positions.start, blocks))

    def take_failure(self, worker_id: str) -> str | None:
        """See Receiver."""
        return self._failures.pop(worker_id, None)

    def senders(self) -> list[str]:
        """See Receiver."""
        return [sender.worker_id for sender in self._senders.values() if sender.is_proven]

    def close_link(self, worker_id: str) -> Coroutine[Any, Any, None]:
        """See Receiver. What the sender has begun goes on, into blocks that are held for it."""
        self._senders.pop(worker_id, None)
        return super().close_link(worker_id)

    async def close(self) -> None:
        """See Receiver. The pool's memory lives on while a sender has it mapped."""
        self._offered.clear()
        self._senders.clear()
        await self._tasks.stop()

    async def _prove(self, sender: _Sender) -> None:
        found = await self._read_probe(sender.probe)
        if self._senders.get(sender.worker_id) is not sender:
            return
        pattern = probe_pattern(sender.epoch).numpy().tobytes()
        if all(part == pattern for part in found):
            sender.is_proven = True
            sender.send(Proven())
        else:
            self._refuse(sender, f"a test write of {sender.worker_id} did not arrive as it was sent")

    def _refuse(self, sender: _Sender, reason: str) -> None:
        self._failures[sender.worker_id] = reason
        sender.send(Unfit(reason))

    async def _read_probe(self, probe: int, *, clear: bool = False) -> list[bytes]:
        """What lies there in each rank's memory."""
        asked = ask_all(self._others, ReadProbe(probe, clear))
        read = self._probes.read(probe, clear=clear)
        while not read.done.query():
            await asyncio.sleep(POLL_S)
        return [read.found.numpy().tobytes(), *await answers_of(asked)]

    def _resolve(self, sender: _Sender, places: Places) -> list[int] | None:
        layers = range(places.first_layer, places.last_layer)
        positions = range(places.first_position, places.first_position + places.num_blocks)
        return self._sink.resolve(self._key(places), sender.worker_id, sender.epoch, layers, positions)

    @staticmethod
    def _key(places: Places) -> LegKey:
        return LegKey(places.request_id, places.attempt)
