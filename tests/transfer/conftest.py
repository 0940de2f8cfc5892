"""A receiver and any number of senders on one event loop, over fake devices (see fake_device.py)."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import AsyncIterator, Hashable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from pdray.engine.kv.pool import KVPool
from pdray.testing.patience import PATIENCE_S
from pdray.transfer.channel import Put, PutResult
from pdray.transfer.nccl.communicator import SENDER_RANK, open_communicator
from pdray.transfer.nccl.head_split import HeadSplit
from pdray.transfer.nccl.messages import (
    NcclMessage,
    OpenCommunicators,
    Staged,
    decode_to_receiver,
    decode_to_sender,
    encode,
)
from pdray.transfer.nccl.other_sends import OtherSends
from pdray.transfer.nccl.receiver import NcclReceiver
from pdray.transfer.nccl.send_lane import SendLane
from pdray.transfer.nccl.sender import NcclSender
from pdray.transfer.nccl.staging import ID_AREA_BYTES, NUM_SLOTS, Staging
from pdray.transfer.pending_writes import PendingWrites
from pdray.wire.message import LegKey

for _name in ("fake_device", "waits", "worker_of_ranks"):
    _spec = importlib.util.spec_from_file_location(_name, Path(__file__).with_name(f"{_name}.py"))
    assert _spec is not None and _spec.loader is not None
    _module = sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
fake_device = sys.modules["fake_device"]

NUM_LAYERS, NUM_BLOCKS = 6, 60
BLOCK = (2, 4, 2, 8)  # keys and values, block_size, heads, head_dim
BLOCK_BYTES = 2 * 4 * 2 * 8 * 4
PIECE_BYTES = 16 * BLOCK_BYTES
STAGING_BYTES = ID_AREA_BYTES + NUM_SLOTS * PIECE_BYTES
TIMEOUT_S = 5.0


def make_pool(fill: float | None = None) -> torch.Tensor:
    shape = (NUM_LAYERS, NUM_BLOCKS, *BLOCK)
    return torch.randn(shape) if fill is None else torch.full(shape, fill)


class Leases:
    """A Sink over open leases: the blocks that each holds, in order."""

    def __init__(self) -> None:
        self.open: dict[Hashable, list[int]] = {}
        self.received: list[Hashable] = []
        self.questions: list[Hashable] = []
        self.closes_after: int | None = None  # questions until every lease ends
        self.disconnected: set[str] = set()  # workers

    def resolve(self, key: Hashable, worker_id: str, epoch: int, layers: range, positions: range) -> list[int] | None:
        self.questions.append(key)
        if self.closes_after is not None and len(self.questions) > self.closes_after:
            self.open.clear()
        blocks = self.open.get(key)
        return None if blocks is None else blocks[positions.start : positions.stop]

    def put_received(self, key: Hashable, worker_id: str, epoch: int) -> bool:
        if key in self.open:
            self.received.append(key)
        return key in self.open

    def is_connected(self, worker_id: str) -> bool:
        return worker_id not in self.disconnected


class Sender:
    """One prefill worker: its pool, its staging, and a channel for each epoch."""

    def __init__(
        self, world: World, name: str, timeout_s: float = TIMEOUT_S, staging_bytes: int = STAGING_BYTES
    ) -> None:
        self.world = world
        self.name = name
        self.timeout_s = timeout_s
        self.pool = make_pool()
        self.transport = fake_device.HostTransport(gpu=name)
        self.buffer = torch.zeros(staging_bytes, dtype=torch.uint8)
        self.epoch = 0
        self.failures: list[str] = []
        self.replies: list[NcclMessage] = []
        self.channel: NcclSender

    @property
    def wire(self) -> Any:
        return self.transport.communicators[-1].wire

    async def connect(self) -> None:
        """A channel in the next epoch, probed."""
        self.epoch += 1
        world, loop = self.world, asyncio.get_running_loop()
        await world.receiver.close_link(self.name)
        _, offered = await world.receiver.accept(self.name, self.epoch)
        pool, unique_id = KVPool.of(self.pool), self.transport.make_unique_id()
        self.staging = Staging(pool, self.buffer)
        piece_bytes = min(self.staging.piece_bytes, offered)
        opening = encode(OpenCommunicators(piece_bytes, 1, [unique_id]))
        world.receiver.on_message(self.name, self.epoch, opening, self.take)
        communicator = await open_communicator(lambda: self.transport.connect(unique_id, SENDER_RANK))
        new_stream = self.transport.new_stream
        lane = SendLane(self.staging, communicator, new_stream, epoch=self.epoch, piece_bytes=piece_bytes)
        self.channel = NcclSender(
            pool.layout,
            [lane],
            OtherSends([], 1),
            name=self.name,
            epoch=self.epoch,
            timeout_s=self.timeout_s,
            send=lambda payload: loop.call_soon_threadsafe(self.deliver, payload),
            on_failed=self.failures.append,
        )
        await self.channel.check()

    def deliver(self, payload: bytes) -> None:
        message = decode_to_receiver(payload)
        assert isinstance(message, Staged)
        self.world.staged.append(message)
        self.world.receiver.on_message(self.name, self.epoch, payload, self.take)

    def take(self, payload: bytes) -> None:
        self.replies.append(decode_to_sender(payload))
        self.channel.on_message(self.epoch, payload)

    def put(
        self, number: int, layers: range, source: list[int], destination: list[int], **more: Any
    ) -> Future[PutResult]:
        """Its lease, if it is open, holds the destination blocks."""
        key = LegKey(f"{self.name}-{number}", 0)
        if key in self.world.leases.open:
            self.world.leases.open[key] = destination
        return self.channel.put(Put(key, layers, source, 0, **more))

    def lease(self, number: int) -> LegKey:
        key = LegKey(f"{self.name}-{number}", 0)
        self.world.leases.open[key] = []
        return key


class World:
    """The decode worker, and who sends to it."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self.pool = make_pool(0.0)
        self.leases = Leases()
        self.writes = PendingWrites()
        self.transport = fake_device.HostTransport(gpu="decode")
        self.staged: list[Staged] = []
        self.fatal: list[BaseException] = []
        self.senders: list[Sender] = []
        self.staging = Staging(KVPool.of(self.pool), torch.zeros(STAGING_BYTES, dtype=torch.uint8))
        self.receiver = NcclReceiver(
            [self.staging],
            HeadSplit(False, 1, 1, BLOCK[2], self.staging.piece_bytes, []),
            self.transport,
            self.leases,
            self.writes,
            name="decode",
            timeout_s=timeout_s,
            on_fatal=self.fatal.append,
        )
        self.unpack_stream = self.transport.streams[0]

    async def sender(self, name: str, **more: Any) -> Sender:
        sender = Sender(self, name, **more)
        self.senders.append(sender)
        await sender.connect()
        return sender

    async def close(self) -> None:
        for sender in self.senders:
            await asyncio.to_thread(sender.channel.close)
            await self.receiver.close_link(sender.name)
        async with asyncio.timeout(PATIENCE_S):
            while len(self.staging.ids):  # else staging leaks
                await asyncio.sleep(0.002)
        await self.receiver.close()

    def check(self) -> None:
        """What must hold after every test."""
        assert self.fatal == []
        streams = [*self.transport.streams, *(s for sender in self.senders for s in sender.transport.streams)]
        assert [error for stream in streams for error in stream.errors] == []
        assert self.transport.most_at_once <= 1, "receives of two senders were posted at once"


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    await world.close()
    world.check()


@pytest.fixture
async def hasty() -> AsyncIterator[World]:
    """A world with a short deadline."""
    world = World(timeout_s=0.3)
    yield world
    await world.close()
    world.check()
