"""The two ends of a channel without engines: pools of random blocks, a session, and the channel."""

from __future__ import annotations

import asyncio
import statistics
import struct
import time
from collections.abc import Awaitable, Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from pdray.background import BackgroundTasks
from pdray.bench.pool_spec import PoolSpec
from pdray.config import Config
from pdray.engine.kv.pool import KVPool
from pdray.errors import TransferError
from pdray.transfer.channel import Kind, Link, Put, PutResult, Receiver, Sender, Site
from pdray.transfer.pending_writes import PendingWrites
from pdray.transfer.registry import load_kind
from pdray.wire.cluster_view import ChannelOffer
from pdray.wire.dial import connect
from pdray.wire.message import LegKey
from pdray.wire.messages import AnyMessage
from pdray.wire.peers import PeerName, Role
from pdray.wire.put_messages import ChannelMessage
from pdray.wire.server import SessionServer
from pdray.wire.session import Session

HOST = "127.0.0.1"
ACKNOWLEDGED = "acknowledged"  # stands where a kind of channel does
TIME = struct.Struct("d")  # of time.monotonic(), which is one clock for all processes of a machine


class Rate(NamedTuple):
    """Attributes:
    num_bytes, seconds: of all puts together.
    latency_s, worst_s: median and maximum of one put, until the receiver counts it, or else its sender knows of it.
    """

    num_puts: int
    num_bytes: int
    seconds: float
    latency_s: float
    worst_s: float


async def send_puts(
    channel: Sender,
    leg: str,
    layers: range,
    source: list[int],
    seconds: float,
    window: int,
    *,
    on_arrival: Callable[[], None] = lambda: None,
    usable: Callable[[], Awaitable[float]] | None = None,
) -> Rate:
    """Put these blocks of one leg again and again, ``window`` times at once; at least once.

    Args:
        usable: waits for the receiver's word on one more put; returns when it counted that. One put at a time.

    Raises:
        TransferError: a put failed, or was refused.
    """
    started, num_bytes = time.monotonic(), 0
    latencies: list[float] = []
    flying: set[asyncio.Future[PutResult]] = set()
    try:
        while flying or not latencies or time.monotonic() - started < seconds:
            while len(flying) < window and (not latencies or time.monotonic() - started < seconds):
                put = Put(LegKey(leg, 0), layers, source, 0)
                began = time.monotonic()
                flying.add(asyncio.wrap_future(channel.put(put)))
            done, flying = await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED)
            for result in await asyncio.gather(*done):
                if not result.accepted:
                    raise TransferError("a put was refused")
                num_bytes += result.num_bytes
                latencies.append(result.seconds if usable is None else await usable() - began)
                on_arrival()
    finally:
        await asyncio.gather(*flying, return_exceptions=True)
    took = time.monotonic() - started
    return Rate(len(latencies), num_bytes, took, statistics.median(latencies), max(latencies))


class _Peer:
    """Args:
    make_kind: the channel kind's class; default: as the spec names it.
    """

    role: Role

    def __init__(self, spec: PoolSpec, make_kind: Callable[[Site], Kind] | None = None) -> None:
        if spec.device == "cpu":
            torch.set_num_threads(1)
        self.spec = spec
        self.me = PeerName(spec.name, "1", self.role)
        self.fatal: list[str] = []  # what made the device unreliable
        settings: dict[str, Any] = {
            "transfer_staging_bytes": spec.staging_bytes,
            "worker_timeout_s": spec.timeout_s,
        }
        config = Config(**settings)
        device = torch.device(spec.device)
        peers = self.role is Role.PREFILL, spec.num_peer_ranks
        site = Site(config, spec.name, device, 1, lambda error: self.fatal.append(repr(error)), "", *peers)
        self.kind = (make_kind or load_kind(spec.kind))(site)
        self.pool = self._make_pool(site).tensor

    def _make_pool(self, site: Site) -> KVPool:
        """With the kind attached to it."""
        pool = self.spec.allocate(self.kind.spare_bytes)
        self.kind.attach(pool)
        return pool

    def describe(self) -> dict[str, str]:
        """The channel kind's facts about this end."""
        return self.kind.facts

    def _send(self, session: Session, epoch: int, payload: bytes) -> None:
        session.send(ChannelMessage(self.kind.name, epoch, payload))

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
    """Takes whatever any number of senders send. Sink and SessionHandler of its own; a Ray actor, for kinds that call
    one."""

    role = Role.DECODE

    def __init__(self, spec: PoolSpec, make_kind: Callable[[Site], Kind] | None = None) -> None:
        super().__init__(spec, make_kind)
        self._receiver: Receiver | None = None
        self._server = SessionServer(self.me, spec.secret, self, timeout_s=spec.timeout_s)
        self._destination: list[int] = []
        self._sessions: dict[str, Session] = {}
        self.num_received = 0
        self._tasks = BackgroundTasks(lambda error: self.fatal.append(repr(error)))

    @property
    def receiver(self) -> Receiver:
        """Made on the event loop."""
        if self._receiver is None:
            self._receiver = self.kind.make_receiver(self, PendingWrites())
        return self._receiver

    async def start(self) -> int:
        """Listen; returns the port."""
        return await self._server.start(HOST)

    async def accept(self, sender: str, epoch: int) -> ChannelOffer:
        """Accept a sender's channel, as a decode worker does."""
        await self.receiver.close_link(sender)
        return ChannelOffer(self.kind.name, await self.receiver.accept(sender, epoch))

    def aim(self, destination: list[int]) -> None:
        """Set the destination blocks of every following put, in order."""
        self._destination = destination

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
        return self.num_received, sorted(self.receiver.senders()), self.fatal

    async def close(self) -> None:
        await self.receiver.close()
        await self._server.stop()

    async def receive_array(
        self, kind: str, worker_id: str, epoch: int, payload: bytes, array: np.ndarray[Any, Any]
    ) -> bool:
        """Receive an array, as a decode worker does."""
        return await self.receiver.on_array(worker_id, epoch, payload, array)

    def resolve(self, key: Hashable, worker_id: str, epoch: int, layers: range, positions: range) -> list[int] | None:
        return self._destination[positions.start : positions.stop]

    def put_received(self, key: Hashable, worker_id: str, epoch: int) -> bool:
        self.num_received += 1
        if worker_id in self._sessions:
            self._sessions[worker_id].send(ChannelMessage(ACKNOWLEDGED, epoch, TIME.pack(time.monotonic())))
        return True

    def is_connected(self, worker_id: str) -> bool:
        session = self._sessions.get(worker_id)
        return session is not None and session.connected

    def on_open(self, session: Session) -> None:
        self._sessions[session.peer.id] = session

    def on_message(self, session: Session, message: AnyMessage) -> None:
        assert isinstance(message, ChannelMessage)
        send = partial(self._send, session, message.epoch)
        self.receiver.on_message(session.peer.id, message.epoch, message.payload, send)

    def on_closed(self, session: Session, reason: str) -> None:
        if self._sessions.get(session.peer.id) is session:
            del self._sessions[session.peer.id]
        self._tasks.spawn(self.receiver.close_link(session.peer.id))


class SendingPeer(_Peer):
    """Sends what it is told to. SessionHandler of its own."""

    role = Role.PREFILL

    def __init__(self, spec: PoolSpec, make_kind: Callable[[Site], Kind] | None = None) -> None:
        super().__init__(spec, make_kind)
        self._channel: Sender | None = None
        self._session: Session | None = None
        self.failures: list[str] = []
        self._num_legs = 0
        self._usable_at: asyncio.Queue[float] = asyncio.Queue()

    async def connect(self, receiver: str, port: int, epoch: int, offer: ChannelOffer) -> float:
        """Connect as a prefill worker does; returns the seconds that it took."""
        started = time.monotonic()
        await self.disconnect()
        self._session = await connect(
            HOST,
            port,
            me=self.me,
            expect=PeerName(receiver, "1", Role.DECODE),
            secret=self.spec.secret,
            handler=self,
            timeout_s=self.spec.timeout_s,
        )
        await self.open(
            Link(receiver, epoch, partial(self._send, self._session, epoch), _no_call, self.failures.append), offer
        )
        return time.monotonic() - started

    async def open(self, link: Link, offer: ChannelOffer) -> None:
        """Open the channel, and see that it works."""
        self._channel = await self.kind.open(link, offer.data)
        await self._channel.check()

    async def disconnect(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await asyncio.to_thread(channel.close)
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def send(self, source: list[int], seconds: float, window: int) -> Rate:
        """Put all layers of these blocks repeatedly, ``window`` puts at a time; at least one put.

        Raises:
            TransferError: one of them failed.
        """
        assert self._channel is not None
        self._usable_at = asyncio.Queue()
        usable = self._usable_at.get if window == 1 and self._session is not None else None
        layers = range(self.spec.num_layers)
        return await send_puts(self._channel, self._next_leg(), layers, source, seconds, window, usable=usable)

    def _next_leg(self) -> str:
        """Each has destinations of its own; see ReceivingPeer.aim()."""
        self._num_legs += 1
        return f"leg {self._num_legs}"

    async def send_until_it_fails(self, source: list[int], limit_s: float) -> tuple[str, float]:
        """Returns the failure's text, and the seconds since the last put that arrived.

        Raises:
            TransferError: nothing failed for limit_s.
        """
        assert self._channel is not None
        arrived = [time.monotonic()]
        try:
            await send_puts(
                self._channel,
                self._next_leg(),
                range(self.spec.num_layers),
                source,
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
        assert isinstance(message, ChannelMessage)
        if message.kind == ACKNOWLEDGED:
            self._usable_at.put_nowait(*TIME.unpack(message.payload))
        elif self._channel is not None:
            self._channel.on_message(message.epoch, message.payload)

    def on_closed(self, session: Session, reason: str) -> None: ...


def _no_call(payload: bytes, array: np.ndarray[Any, Any]) -> Any:
    raise TransferError("this peer has no actor to call")
