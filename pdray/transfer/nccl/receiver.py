"""The decode worker's half of the nccl channels: one receiver for all its prefill workers.

Senders say what is ready; the receiver grants one sender's puts at a time, posts the receives with the grant, and
turns to another sender when it has them. So no device ever holds two receives that wait for different senders, and
whatever is posted has its data on the way: nothing can wait in a circle, however many pairs share a GPU.

This class belongs to the event loop's thread, where the leases are; the device belongs to a ReceiveThread. A put is
checked against its lease when it is granted, and the lease's blocks are held (PendingWrites) from then until nothing of
the put is written any more; whether it counts is asked again at its end.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from pdray.background import BackgroundTasks
from pdray.errors import TransferError
from pdray.transfer.channel import Receiver, Sink
from pdray.transfer.nccl.communicator import RECEIVER_RANK, Communicator, Transport, open_communicator
from pdray.transfer.nccl.messages import (
    ChannelFailed,
    GrantTransfers,
    NcclMessage,
    OpenCommunicator,
    RefuseTransfer,
    Staged,
    TransferDone,
    decode_to_receiver,
    encode,
)
from pdray.transfer.nccl.receive_thread import Link, ReceiveThread, Transfer
from pdray.transfer.nccl.staging import Staging
from pdray.transfer.pending_writes import PendingWrites
from pdray.wire.message import LegKey

GRANT_BYTES = 256 << 20  # about as many are granted to one sender while another waits: a millisecond of the link


@dataclass(eq=False, slots=True)
class _Sender:
    """A prefill worker in one epoch: its pieces (see OpenCommunicator), and its link once its communicator is there."""

    worker_id: str
    epoch: int
    piece_bytes: int
    send_bytes: Callable[[bytes], None]
    link: Link | None = None
    waiting: deque[Staged] = field(default_factory=deque)

    def send(self, message: NcclMessage) -> None:
        self.send_bytes(encode(message))


class Offer(NamedTuple):
    """The data with which a sender opens a channel.

    Attributes:
        unique_id: of the communicator; opaque. piece_bytes: the largest that fits a slot of the receiver's staging.
    """

    unique_id: Any
    piece_bytes: int


class NcclReceiver(Receiver):
    """See the module.

    Args:
        staging: this receiver's alone.
        sink: asked before a put is granted, and told when it has arrived.
        writes: is told of each put from its grant to its end.
        timeout_s: a granted transfer that does not get on for so long ends its channel.
        on_fatal: called if the device cannot be relied on any more.

    Attributes:
        piece_bytes: for the offer to senders.
    """

    kind = "nccl"

    def __init__(
        self,
        staging: Staging,
        transport: Transport,
        sink: Sink,
        writes: PendingWrites,
        *,
        name: str,
        timeout_s: float,
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self.piece_bytes = staging.piece_bytes
        self._staging = staging
        self._transport = transport
        self._sink = sink
        self._writes = writes
        self._on_fatal = on_fatal
        self._tasks = BackgroundTasks(on_fatal)
        self._offered: dict[str, tuple[int, Any]] = {}  # epoch and communicator's id, by prefill worker
        self._senders: dict[str, _Sender] = {}
        self._turns: deque[str] = deque()  # worker ids; whose turn is next stands first
        self._granted: Link | None = None
        self._num_grants = 0  # of that link that have not ended
        loop = asyncio.get_running_loop()
        self._thread = ReceiveThread(
            staging,
            transport.new_stream(),
            self,
            name=name,
            timeout_s=timeout_s,
            call_soon=lambda call: _call_soon(loop, call),
        )

    async def accept(self, worker_id: str, epoch: int) -> Offer:
        """See Receiver."""
        unique_id = await asyncio.to_thread(self._transport.make_unique_id)
        self._offered[worker_id] = (epoch, unique_id)
        return Offer(unique_id, self.piece_bytes)

    def on_message(self, worker_id: str, epoch: int, payload: bytes, send: Callable[[bytes], None]) -> None:
        """See Receiver. What belongs to another epoch is ignored.

        Raises:
            msgspec.DecodeError: the bytes are no message.
        """
        match decode_to_receiver(payload):
            case OpenCommunicator(piece_bytes):
                offered, unique_id = self._offered.pop(worker_id, (None, None))
                if offered == epoch:
                    connect = partial(self._transport.connect, unique_id, RECEIVER_RANK)
                    self._tasks.spawn(self.join(worker_id, epoch, piece_bytes, connect, send))
            case staged:
                sender = self._senders.get(worker_id)
                if sender is not None and sender.epoch == epoch:
                    sender.waiting.append(staged)
                    self._grant_next()

    async def join(
        self,
        worker_id: str,
        epoch: int,
        piece_bytes: int,
        connect: Callable[[], Communicator],
        send: Callable[[bytes], None],
        *,
        on_stuck: Callable[[str], None] | None = None,
    ) -> None:
        """Enter the communicator of a sender's new epoch, and serve it. Its older one must have been closed.

        If that fails the sender is told (ChannelFailed).

        Args:
            piece_bytes: see OpenCommunicator.
            connect, on_stuck: see open_communicator(). send: hands the sender a message; does nothing once it is gone.
        """
        assert worker_id not in self._senders, worker_id
        sender = _Sender(worker_id, epoch, piece_bytes, send)
        if not self._staging.bytes_per_block <= piece_bytes <= self.piece_bytes:
            limits = f"{self._staging.bytes_per_block} to {self.piece_bytes}"
            sender.send(ChannelFailed(f"{worker_id} sends pieces of {piece_bytes} bytes; here they have {limits}"))
            return
        self._senders[worker_id] = sender
        self._turns.append(worker_id)
        try:
            communicator = await open_communicator(connect, on_stuck=on_stuck)
        except TransferError as error:
            if self._is_current(sender):
                self._forget(sender)
                sender.send(ChannelFailed(str(error)))
            return
        if not self._is_current(sender):
            await asyncio.to_thread(communicator.close)
            return
        sender.link = Link(worker_id, epoch, communicator, self._transport.new_stream())
        self._grant_next()

    def close_link(self, worker_id: str) -> Coroutine[Any, Any, None]:
        """See Receiver."""
        sender = self._senders.get(worker_id)
        if sender is not None:
            self._forget(sender)
        return self._end_link(None if sender is None else sender.link)

    async def _end_link(self, link: Link | None) -> None:
        if link is not None:
            await asyncio.to_thread(self._thread.give_up, link, "closed")
        await self._writes.settle()

    def senders(self) -> list[str]:
        """See Receiver."""
        return [sender.worker_id for sender in self._senders.values() if sender.link is not None]

    async def close(self) -> None:
        """See Receiver; ends the thread, too."""
        await self._tasks.stop()
        for worker_id in list(self._senders):
            await self.close_link(worker_id)
        await asyncio.to_thread(self._thread.stop)

    # grants

    def _grant_next(self) -> None:
        """Grant the puts of the sender whose turn it is, or more of the one that has its turn while no other waits."""
        self._grant_to_next()
        self._thread.others_wait = any(
            s.waiting and s.link not in (None, self._granted) for s in self._senders.values()
        )

    def _grant_to_next(self) -> None:
        for _ in range(len(self._turns)):
            sender = self._senders[self._turns[0]]
            if self._granted is not None and (sender.link is not self._granted or self._others_wait(sender)):
                return
            self._turns.rotate(-1)
            transfers = self._take_waiting(sender)
            if transfers:
                self._granted = sender.link
                self._num_grants += 1
                self._thread.receive(transfers)
                sender.send(GrantTransfers([transfer.seq for transfer in transfers]))
                return

    def _others_wait(self, sender: _Sender) -> bool:
        return any(other.waiting for other in self._senders.values() if other is not sender and other.link is not None)

    def _take_waiting(self, sender: _Sender) -> list[Transfer]:
        """The sender's next puts that may be written, of about GRANT_BYTES; refuses the others."""
        transfers: list[Transfer] = []
        if sender.link is None:
            return transfers
        room = GRANT_BYTES
        while sender.waiting and (room > 0 or not transfers):
            staged = sender.waiting.popleft()
            transfer = Transfer(
                sender.link,
                staged.seq,
                LegKey(staged.request_id, staged.attempt),
                range(staged.first_layer, staged.last_layer),
                range(staged.first_position, staged.first_position + staged.num_blocks),
            )
            if staged.num_blocks:
                blocks = self._resolve(transfer)
                if blocks is None:
                    sender.send(RefuseTransfer(staged.seq))
                    continue
                transfer.blocks = blocks
                transfer.spans = self._staging.split(transfer.layers, len(blocks), sender.piece_bytes)
                room -= len(transfer.layers) * len(blocks) * self._staging.bytes_per_block
                self._writes.begin(transfer.key)
            transfers.append(transfer)
        return transfers

    def _resolve(self, transfer: Transfer) -> list[int] | None:
        link = transfer.link
        return self._sink.resolve(transfer.key, link.name, link.epoch, transfer.layers, transfer.positions)

    # what the thread tells

    def transfer_ended(self, transfer: Transfer) -> None:
        """See ReceiveEvents."""
        link, counts = transfer.link, transfer.arrived
        if transfer.spans:
            counts = counts and self._sink.put_received(transfer.key, link.name, link.epoch)
            self._writes.end(transfer.key)
        sender = self._senders.get(link.name)
        if sender is not None and sender.link is link:
            sender.send(TransferDone(transfer.seq, counts))

    def grant_ended(self) -> None:
        """See ReceiveEvents."""
        self._num_grants -= 1
        if not self._num_grants:
            self._granted = None
        self._grant_next()

    def link_failed(self, link: Link, reason: str) -> None:
        sender = self._senders.get(link.name)
        if sender is not None and sender.link is link:
            self._forget(sender)
            sender.send(ChannelFailed(reason))

    def failed(self, error: BaseException) -> None:
        self._on_fatal(error)
        self._writes.abandon()

    def _is_current(self, sender: _Sender) -> bool:
        return self._senders.get(sender.worker_id) is sender

    def _forget(self, sender: _Sender) -> None:
        del self._senders[sender.worker_id]
        self._turns.remove(sender.worker_id)


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Call on the event loop; ignored where the loop is closed, because its worker has ended."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(call)
