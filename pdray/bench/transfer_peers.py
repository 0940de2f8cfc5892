"""The two ends of a nccl channel without engines: pools of random blocks, a session, and the channel."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import torch

from pdray.background import BackgroundTasks
from pdray.cluster.messages import AnyMessage, ChannelOffer, LegKey, OpenChannel, Staged
from pdray.cluster.session import PeerName, Session, SessionServer, connect
from pdray.errors import TransferError
from pdray.transfer.channel import Put, PutResult, SendChannel
from pdray.transfer.communicator import RECEIVER_RANK, Transport
from pdray.transfer.nccl import CudaTransport
from pdray.transfer.nccl_open import check, open_nccl_channel
from pdray.transfer.nccl_receiver import NcclReceiver
from pdray.transfer.nccl_sender import NcclSendChannel
from pdray.transfer.pending_writes import PendingWrites
from pdray.transfer.staging import Staging

HOST = "127.0.0.1"


class PoolSpec(NamedTuple):
    """A pool of bfloat16, the staging before it, and who its owner is.

    Attributes:
        block_bytes: of one layer.
        timeout_s: of sessions and transfers.
    """

    name: str
    num_layers: int
    num_blocks: int
    block_bytes: int
    secret: bytes
    staging_bytes: int = 128 * 1024 * 1024
    timeout_s: float = 2.0
    device: str = "cuda"

    def allocate(self) -> torch.Tensor:
        """[num_layers, num_blocks, 2, 16, 1, block_bytes / 64] of zeros."""
        shape = (self.num_layers, self.num_blocks, 2, 16, 1, self.block_bytes // 64)
        return torch.zeros(shape, dtype=torch.bfloat16, device=self.device)


class Rate(NamedTuple):
    """Attributes:
    num_bytes, seconds: of all puts together. latency_s: median of one put.
    """

    num_puts: int
    num_bytes: int
    seconds: float
    latency_s: float


async def send_puts(
    channel: SendChannel,
    layers: range,
    source: list[int],
    destination: list[int],
    seconds: float,
    window: int,
    *,
    on_arrival: Callable[[], None] = lambda: None,
) -> Rate:
    """Put these blocks again and again, ``window`` times at once; at least once.

    Raises:
        TransferError: a put failed, or was refused.
    """
    started, num_bytes = time.monotonic(), 0
    latencies: list[float] = []
    flying: set[asyncio.Future[PutResult]] = set()
    try:
        while flying or not latencies or time.monotonic() - started < seconds:
            while len(flying) < window and (not latencies or time.monotonic() - started < seconds):
                put = Put(LegKey("put", len(latencies)), layers, source, destination)
                flying.add(asyncio.wrap_future(channel.put(put)))
            done, flying = await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED)
            for result in await asyncio.gather(*done):
                if not result.accepted:
                    raise TransferError("a put was refused")
                num_bytes += result.num_bytes
                latencies.append(result.seconds)
                on_arrival()
    finally:
        await asyncio.gather(*flying, return_exceptions=True)
    return Rate(len(latencies), num_bytes, time.monotonic() - started, statistics.median(latencies))


class _Peer:
    def __init__(self, spec: PoolSpec, transport: Transport | None = None) -> None:
        self.spec = spec
        self.me = PeerName(spec.name, "1")
        self.transport: Transport = transport or CudaTransport(torch.device(spec.device))
        self.pool = spec.allocate()
        self.buffer = torch.zeros(spec.staging_bytes, dtype=torch.uint8, device=spec.device)
        Staging(self.pool, self.buffer).warm_up()

    def describe(self) -> tuple[str, str]:
        """GPU, and NCCL's version."""
        return self.transport.gpu, self.transport.version

    def fill(self, seed: int) -> None:
        """Random blocks, the same wherever the same seed is used on the same kind of device."""
        generator = torch.Generator(self.pool.device).manual_seed(seed)
        numbers = self.pool.view(torch.int16)
        for layer in range(len(numbers)):
            numbers[layer].random_(-(2**15), 2**15, generator=generator)

    def works(self) -> bool:
        """Whether the device still computes, allocates and frees."""
        a = torch.randn(512, 512, device=self.pool.device)
        same = torch.equal(a @ torch.eye(512, device=self.pool.device), a)
        return same and torch.equal(self.pool.clone().view(torch.int16), self.pool.view(torch.int16))


class ReceivingPeer(_Peer):
    """Takes whatever it is sent. BlockSink and SessionHandler of its own."""

    def __init__(self, spec: PoolSpec, transport: Transport | None = None) -> None:
        super().__init__(spec, transport)
        self._receiver: NcclReceiver | None = None
        self._server = SessionServer(self.me, spec.secret, self, timeout_s=spec.timeout_s)
        self._offered: dict[str, tuple[int, Any]] = {}
        self.num_received = 0
        self.fatal: list[str] = []
        self._tasks = BackgroundTasks(lambda error: self.fatal.append(repr(error)))

    async def start(self) -> int:
        """Listen; returns the port."""
        self._receiver = NcclReceiver(
            Staging(self.pool, self.buffer),
            self.transport.new_stream,
            self,
            PendingWrites(),
            name=self.spec.name,
            timeout_s=self.spec.timeout_s,
            on_fatal=lambda error: self.fatal.append(repr(error)),
        )
        return await self._server.start(HOST)

    async def accept(self, sender: str, epoch: int) -> ChannelOffer:
        """As a decode worker does."""
        assert self._receiver is not None
        await self._receiver.close_link(sender)
        unique_id = await asyncio.to_thread(self.transport.make_unique_id)
        self._offered[sender] = epoch, unique_id
        return ChannelOffer("nccl", unique_id, self._receiver.piece_bytes)

    def holds(self, seed: int, source: list[int], destination: list[int]) -> bool:
        """Whether the pool's destination blocks are the source blocks of a pool filled with the seed; its others are
        made zero again."""
        mine = self.pool[:, destination].clone()
        others = self.pool.index_fill_(1, torch.tensor(destination, device=self.pool.device), 0)
        is_clean = not others.any()
        self.fill(seed)
        same = torch.equal(self.pool[:, source].view(torch.int16), mine.view(torch.int16))
        self.pool.zero_()
        return same and bool(is_clean)

    def status(self) -> tuple[int, list[str], list[str]]:
        """Puts received, senders whose channel is open, and what made the device unreliable."""
        assert self._receiver is not None
        return self.num_received, sorted(self._receiver.senders()), self.fatal

    async def close(self) -> None:
        if self._receiver is not None:
            await self._receiver.close()
        await self._server.stop()

    def may_write(self, key: Hashable, worker_id: str, epoch: int) -> bool:
        return True

    def put_received(self, key: Hashable, worker_id: str, epoch: int) -> bool:
        self.num_received += 1
        return True

    def on_open(self, session: Session) -> None: ...

    def on_message(self, session: Session, message: AnyMessage) -> None:
        assert self._receiver is not None
        peer = session.peer.id
        if isinstance(message, Staged):
            self._receiver.on_staged(peer, message)
        elif isinstance(message, OpenChannel):
            epoch, unique_id = self._offered.pop(peer)
            assert epoch == message.epoch
            connecting = partial(self.transport.connect, unique_id, RECEIVER_RANK)
            self._tasks.spawn(self._receiver.join(peer, epoch, connecting, session.send))

    def on_closed(self, session: Session, reason: str) -> None:
        assert self._receiver is not None
        self._tasks.spawn(self._receiver.close_link(session.peer.id))


class SendingPeer(_Peer):
    """Sends what it is told to. SessionHandler of its own."""

    def __init__(self, spec: PoolSpec, transport: Transport | None = None) -> None:
        super().__init__(spec, transport)
        self._channel: NcclSendChannel | None = None
        self._session: Session | None = None
        self.failures: list[str] = []

    async def connect(self, receiver: str, port: int, epoch: int, offer: ChannelOffer) -> float:
        """As a prefill worker does; returns the seconds that it took."""
        started = time.monotonic()
        await self.disconnect()
        self._session = await connect(
            HOST,
            port,
            me=self.me,
            expect=PeerName(receiver, "1"),
            secret=self.spec.secret,
            handler=self,
            timeout_s=self.spec.timeout_s,
        )
        self._channel = await open_nccl_channel(
            self.transport,
            Staging(self.pool, self.buffer),
            offer,
            peer=receiver,
            epoch=epoch,
            timeout_s=self.spec.timeout_s,
            send=self._session.send,
            on_failed=self.failures.append,
        )
        await check(self._channel)
        return time.monotonic() - started

    async def disconnect(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await asyncio.to_thread(channel.close)
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def send(self, source: list[int], destination: list[int], seconds: float, window: int) -> Rate:
        """All layers of these blocks, again and again, ``window`` puts at a time; at least one.

        Raises:
            TransferError: one of them failed.
        """
        assert self._channel is not None
        return await send_puts(self._channel, range(self.spec.num_layers), source, destination, seconds, window)

    async def send_until_it_fails(self, source: list[int], destination: list[int], limit_s: float) -> tuple[str, float]:
        """Returns the failure's text, and the seconds since the last put that arrived.

        Raises:
            TransferError: nothing failed for limit_s.
        """
        assert self._channel is not None
        arrived = [time.monotonic()]
        try:
            await send_puts(
                self._channel,
                range(self.spec.num_layers),
                source,
                destination,
                limit_s,
                4,
                on_arrival=lambda: arrived.append(time.monotonic()),
            )
        except TransferError as error:
            return str(error), time.monotonic() - arrived[-1]
        raise TransferError(f"nothing has failed within {limit_s:g} s")

    async def close(self) -> None:
        await self.disconnect()

    def on_open(self, session: Session) -> None: ...

    def on_message(self, session: Session, message: AnyMessage) -> None:
        if self._channel is not None:
            self._channel.on_message(message)  # type: ignore[arg-type]

    def on_closed(self, session: Session, reason: str) -> None: ...
