"""A decode worker and those who write to it through the cuda_ipc channel, over memory of this process."""

from __future__ import annotations

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
from pdray.transfer.channel import Link, Put, PutResult, Site
from pdray.transfer.cuda_ipc.kind import CudaIpcKind
from pdray.transfer.cuda_ipc.messages import Places, Written, decode_to_receiver, decode_to_sender
from pdray.transfer.cuda_ipc.sender import CudaIpcSender
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
CPU = torch.device("cpu")


def assert_(condition: bool) -> None:
    assert condition


class Worker(WorkerOfRanks):
    """Its ranks' kinds and pools."""

    def __init__(self, name: str, num_heads: int, num_ranks: int, num_blocks: int, site: Site, *, lends: bool) -> None:
        self.transports = [fake_device.HostMemory(gpu=f"{name}.{rank}") for rank in range(num_ranks)]
        self.kinds = [CudaIpcKind(site, transport) for transport in self.transports]
        heads = kv_heads_of(num_heads, 0, num_ranks).size
        layout, spare = dataclasses.replace(LAYOUT, num_kv_heads=heads), self.kinds[0].spare_bytes if lends else 0
        self.pools = [KVPool.allocate(layout, num_blocks, CPU, spare_bytes=spare) for _ in range(num_ranks)]
        super().__init__(self.kinds, self.pools, num_heads)


class PrefillEnd:
    """One prefill worker's kind, and its channel in each epoch. ``said``: what it told the receiver."""

    def __init__(self, world: World, name: str, timeout_s: float, num_ranks: int = 1) -> None:
        self.world, self.name = world, name
        site = Site(Config(worker_timeout_s=timeout_s), name, CPU, 1, world.fatal.append)
        self.worker = Worker(name, world.num_heads, num_ranks, 70, site, lends=False)
        self.transport, self.kind, self.pool = self.worker.transports[0], self.worker.kinds[0], self.worker.pools[0]
        self.data = torch.randn(6, 70, 2, 4, world.num_heads, 8)
        self.worker.fill(self.data)
        self.epoch = 0
        self.said: list[Any] = []
        self.heard: list[Any] = []
        self.failures: list[str] = []
        self.deaf = False
        self.channel: CudaIpcSender

    @property
    def mappings(self) -> list[Any]:
        """Of all ranks."""
        return [mapping for transport in self.worker.transports for mapping in transport.mappings]

    @property
    def stream(self) -> Any:
        return self.transport.streams[-1]

    async def open(self) -> None:
        """As the two workers do, without the test write."""
        self.epoch += 1
        await self.world.receiver.close_link(self.name)
        offer = await self.world.receiver.accept(self.name, self.epoch)
        link = Link(self.name, self.epoch, self._send, print, self.failures.append)
        self.channel = await self.kind.open(link, offer)

    async def connect(self) -> None:
        await self.open()
        await self.channel.check()

    def _send(self, payload: bytes) -> None:
        self.said.append(decode_to_receiver(payload))
        if not self.deaf:
            self.world.receiver.on_message(self.name, self.epoch, payload, self.hear)

    def hear(self, payload: bytes) -> None:
        self.heard.append(decode_to_sender(payload))
        self.channel.on_message(self.epoch, payload)

    def lease(self, name: str, blocks: list[int], *, lend: bool = True) -> LegKey:
        """A leg that this worker may fill; its blocks are lent at once, as after BeginPut, or only if it asks."""
        key = LegKey(f"{self.name}-{name}", 0)
        self.world.leases.open[key] = blocks
        if lend:
            self.world.receiver.let_in(key, self.name, self.epoch, range(len(blocks)))
        return key

    def put(self, key: LegKey, layers: range, source: list[int], **more: Any) -> Future[PutResult]:
        return self.channel.put(Put(key, layers, source, **{"first_position": 0} | more))

    def written(self) -> list[list[Places]]:
        return [message.puts for message in self.said if isinstance(message, Written)]


class World:
    """The decode worker, and who writes to it. num_heads: of the model."""

    def __init__(self, num_heads: int = LAYOUT.num_kv_heads, num_ranks: int = 1) -> None:
        self.num_heads = num_heads
        self.fatal: list[BaseException] = []
        self.leases = conftest.Leases()
        site = Site(Config(), "decode", CPU, 1, self.fatal.append)
        self.worker = Worker("decode", num_heads, num_ranks, NUM_BLOCKS, site, lends=True)
        self.transport, self.kind, self.pool = self.worker.transports[0], self.worker.kinds[0], self.worker.pools[0]
        self.receiver = self.kind.make_receiver(self.leases, PendingWrites())
        self.ends: list[PrefillEnd] = []

    async def sender(self, name: str, timeout_s: float = 5.0, num_ranks: int = 1) -> PrefillEnd:
        end = PrefillEnd(self, name, timeout_s, num_ranks)
        self.ends.append(end)
        await end.connect()
        return end

    def take(self, layers: range, blocks: list[int]) -> torch.Tensor:
        """What these blocks hold; they are zeros again."""
        part = self.pool.tensor[layers.start : layers.stop]
        taken = part[:, blocks].clone()
        part[:, blocks] = 0
        return taken
