"""A decode worker and those who write to it through the cuda_ipc channel, over memory of this process."""

from __future__ import annotations

import importlib.util
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from pdray.config import Config
from pdray.engine.kv.layout import KVLayout
from pdray.engine.kv.pool import KVPool
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

ALL_LAYERS = range(0, 6)
LAYOUT = KVLayout(6, 4, 2, 8, torch.float32)
NUM_BLOCKS = 60
CPU = torch.device("cpu")


def assert_(condition: bool) -> None:
    assert condition


class PrefillEnd:
    """One prefill worker's kind, and its channel in each epoch. ``said``: what it told the receiver."""

    def __init__(self, world: World, name: str, timeout_s: float) -> None:
        self.world, self.name = world, name
        self.transport = fake_device.HostMemory(gpu=name)
        site = Site(Config(worker_timeout_s=timeout_s), name, CPU, 1, world.fatal.append)
        self.kind = CudaIpcKind(site, self.transport)
        self.pool = KVPool.allocate(LAYOUT, 70, CPU)
        self.pool.tensor.normal_()
        self.kind.attach(self.pool)
        self.epoch = 0
        self.said: list[Any] = []
        self.heard: list[Any] = []
        self.failures: list[str] = []
        self.deaf = False
        self.channel: CudaIpcSender

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
    """The decode worker, and who writes to it."""

    def __init__(self) -> None:
        self.fatal: list[BaseException] = []
        self.leases = conftest.Leases()
        self.transport = fake_device.HostMemory(gpu="decode")
        self.kind = CudaIpcKind(Site(Config(), "decode", CPU, 1, self.fatal.append), self.transport)
        self.pool = KVPool.allocate(LAYOUT, NUM_BLOCKS, CPU, spare_bytes=self.kind.spare_bytes)
        self.kind.attach(self.pool)
        self.receiver = self.kind.make_receiver(self.leases, PendingWrites())
        self.ends: list[PrefillEnd] = []

    async def sender(self, name: str, timeout_s: float = 5.0) -> PrefillEnd:
        end = PrefillEnd(self, name, timeout_s)
        self.ends.append(end)
        await end.connect()
        return end

    def take(self, layers: range, blocks: list[int]) -> torch.Tensor:
        """What these blocks hold; they are zeros again."""
        part = self.pool.tensor[layers.start : layers.stop]
        taken = part[:, blocks].clone()
        part[:, blocks] = 0
        return taken
