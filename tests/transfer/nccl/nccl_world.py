"""A decode worker and those who send to it through the nccl channel, whose ranks are threads, over fake devices."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from pdray.config import Config
from pdray.engine.kv.layout import KVLayout
from pdray.engine.kv.pool import KVPool
from pdray.models.shards import kv_heads_of
from pdray.testing.patience import PATIENCE_S
from pdray.transfer.channel import Link, Put, PutResult, Site
from pdray.transfer.nccl.kind import NcclKind
from pdray.transfer.nccl.messages import decode_to_receiver, decode_to_sender
from pdray.transfer.nccl.sender import NcclSender
from pdray.transfer.pending_writes import PendingWrites
from pdray.wire.message import LegKey

_spec = importlib.util.spec_from_file_location("transfer_conftest", Path(__file__).parents[1] / "conftest.py")
assert _spec is not None and _spec.loader is not None
conftest = sys.modules["transfer_conftest"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(conftest)
fake_device = sys.modules["fake_device"]  # see conftest.py
WorkerOfRanks: Any = sys.modules["worker_of_ranks"].WorkerOfRanks

ALL_LAYERS = range(0, 6)
LAYOUT = KVLayout(6, 4, 2, 8, torch.float32)
NUM_BLOCKS = 60
STAGING_BYTES = 60_000
CPU = torch.device("cpu")


class Worker(WorkerOfRanks):
    """Its ranks' kinds and pools."""

    def __init__(
        self, name: str, num_heads: int, sizes: tuple[int, int], timeout_s: float, fatal: list[Any], *, sends: bool
    ) -> None:
        num_ranks, num_peer_ranks = sizes
        settings: dict[str, Any] = {"worker_timeout_s": timeout_s, "transfer_staging_bytes": STAGING_BYTES}
        config = Config(tensor_parallel_size=num_ranks, **settings)
        site = Site(config, name, CPU, 1, fatal.append, "", sends, num_peer_ranks)
        self.transports = [fake_device.HostTransport(gpu=f"{name}.{rank}") for rank in range(num_ranks)]
        self.kinds = [NcclKind(site, transport) for transport in self.transports]
        heads = kv_heads_of(num_heads, 0, num_ranks).size
        layout = dataclasses.replace(LAYOUT, num_kv_heads=heads)
        self.pools = [KVPool.allocate(layout, NUM_BLOCKS, CPU) for _ in range(num_ranks)]
        super().__init__(self.kinds, self.pools, num_heads)

    @property
    def streams(self) -> list[Any]:
        return [stream for transport in self.transports for stream in transport.streams]

    @property
    def communicators(self) -> list[Any]:
        return [each for transport in self.transports for each in transport.communicators]

    def check(self, *, some_died: bool) -> None:
        """What must hold after every test."""
        assert [error for stream in self.streams for error in stream.errors] == []
        assert all(each.num_aborts == 1 for each in self.communicators) or some_died
        for rank, kind in enumerate(self.kinds):
            stagings = [staging for each in kind._stagings_of.values() for staging in each]
            assert all(len(staging.ids) == 0 for staging in stagings) or (some_died and rank), "staging leaks"
            assert self.transports[rank].most_at_once <= max(1, len(stagings)), "two senders' receives at once"


class PrefillEnd:
    """One prefill worker, and its channel in each epoch. ``said``: what it told the receiver."""

    def __init__(self, world: World, name: str, timeout_s: float, num_ranks: int) -> None:
        self.world, self.name = world, name
        sizes = num_ranks, len(world.worker.pools)
        self.worker = Worker(name, world.num_heads, sizes, timeout_s, world.fatal, sends=True)
        self.kind = self.worker.kinds[0]
        self.data = torch.randn(6, NUM_BLOCKS, 2, 4, world.num_heads, 8)
        self.worker.fill(self.data)
        self.epoch = 0
        self.said: list[Any] = []
        self.heard: list[Any] = []
        self.failures: list[str] = []
        self.channel: NcclSender | None = None

    async def open(self) -> None:
        """As the two workers do, without the probe."""
        self.epoch += 1
        self.channel = None
        await self.world.receiver.close_link(self.name)
        offer = await self.world.receiver.accept(self.name, self.epoch)
        link = Link("decode", self.epoch, self._send, print, self.failures.append)
        self.channel = await self.kind.open(link, offer)

    async def connect(self) -> None:
        await self.open()
        assert self.channel is not None
        await self.channel.check()

    async def disconnect(self) -> None:
        if self.channel is not None:
            await asyncio.to_thread(self.channel.close)

    def _send(self, payload: bytes) -> None:
        self.said.append(decode_to_receiver(payload))
        self.world.receiver.on_message(self.name, self.epoch, payload, self.hear)

    def hear(self, payload: bytes) -> None:
        self.heard.append(decode_to_sender(payload))
        if self.channel is not None:
            self.channel.on_message(self.epoch, payload)

    def lease(self, name: str, blocks: list[int]) -> LegKey:
        """A leg that this worker may fill."""
        key = LegKey(f"{self.name}-{name}", 0)
        self.world.leases.open[key] = blocks
        return key

    def put(self, key: LegKey, layers: range, source: list[int], **more: Any) -> Future[PutResult]:
        assert self.channel is not None
        return self.channel.put(Put(key, layers, source, **{"first_position": 0} | more))

    def wire(self, source: int, target: int) -> Any:
        """What joins these two ranks now."""
        theirs = {each.wire for each in self.world.worker.transports[target].communicators}
        (wire,) = (each.wire for each in self.worker.transports[source].communicators[-2:] if each.wire in theirs)
        return wire


class World:
    """The decode worker, and who sends to it. num_heads: of the model."""

    def __init__(self, num_heads: int, num_ranks: int, num_peer_ranks: int, timeout_s: float = PATIENCE_S) -> None:
        self.num_heads, self.num_peer_ranks = num_heads, num_peer_ranks
        self.fatal: list[BaseException] = []
        self.leases = conftest.Leases()
        self.writes = PendingWrites()
        self.worker = Worker("decode", num_heads, (num_ranks, num_peer_ranks), timeout_s, self.fatal, sends=False)
        self.receiver = self.worker.kinds[0].make_receiver(self.leases, self.writes)
        self.ends: list[PrefillEnd] = []
        self.some_died = False

    def end(self, name: str, timeout_s: float = PATIENCE_S) -> PrefillEnd:
        """Not connected."""
        self.ends.append(PrefillEnd(self, name, timeout_s, self.num_peer_ranks))
        return self.ends[-1]

    async def sender(self, name: str, timeout_s: float = PATIENCE_S) -> PrefillEnd:
        end = self.end(name, timeout_s)
        await end.connect()
        return end

    async def close(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            for end in self.ends:
                await end.disconnect()
                await self.receiver.close_link(end.name)
            await self.receiver.close()
        assert self.fatal == [] and not self.writes._number
        workers = [self.worker, *(end.worker for end in self.ends)]
        for worker in workers:
            worker.check(some_died=self.some_died)
            worker.close()
