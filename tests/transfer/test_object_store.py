"""The receiving half of the object store channel; the sending half is driven by tests/actors."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pdray.transfer import pool_blocks
from pdray.transfer.object_store.kind import ArrayHeader, ObjectStoreReceiver, blocks_to_array, encode
from pdray.transfer.pending_writes import PendingWrites
from pdray.wire.message import LegKey

_spec = importlib.util.spec_from_file_location("transfer_conftest", Path(__file__).with_name("conftest.py"))
assert _spec is not None and _spec.loader is not None
conftest = sys.modules["transfer_conftest"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(conftest)

LAYERS = range(2, 5)
KEY = LegKey("leg", 0)
BLOCKS = [7, 3]


class World:
    """A receiver over a pool of zeros, and one put for it.

    Attributes:
        gate: writing waits for it. writing: set while it does.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pool = conftest.make_pool(0.0)
        self.leases = conftest.Leases()
        self.leases.open[KEY] = BLOCKS
        self.writes = PendingWrites()
        self.receiver = ObjectStoreReceiver(
            pool_blocks.PoolBlocks(self.pool), self.pool.dtype, self.leases, self.writes
        )
        self.data = torch.randn(len(LAYERS), 2, *conftest.BLOCK)
        self.gate, self.writing = threading.Event(), threading.Event()
        self.gate.set()
        scatter = pool_blocks.scatter_blocks

        def gated(*args: Any) -> None:
            self.writing.set()
            assert self.gate.wait(20)
            scatter(*args)

        monkeypatch.setattr(pool_blocks, "scatter_blocks", gated)

    def receive(self) -> asyncio.Task[bool]:
        array = blocks_to_array(self.data)
        array.flags.writeable = False  # as Ray's are
        header = encode(ArrayHeader(*KEY, LAYERS.start, LAYERS.stop, 0, len(BLOCKS)))
        return asyncio.ensure_future(self.receiver.on_array("prefill-0", 1, header, array))

    async def receive_half(self) -> asyncio.Task[bool]:
        """A put that is being written until the gate is opened."""
        self.gate.clear()
        task = self.receive()
        await asyncio.to_thread(self.writing.wait, 20)
        return task

    @property
    def written(self) -> bool:
        return torch.equal(self.pool[LAYERS.start : LAYERS.stop, BLOCKS], self.data)


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    world = World(monkeypatch)
    yield world
    world.gate.set()
    await world.receiver.close()


async def test_a_put_is_written_and_counts(world: World) -> None:
    assert await world.receive()
    assert world.written and world.leases.received == [KEY]
    world.pool[LAYERS.start : LAYERS.stop, BLOCKS] = 0
    assert not world.pool.any()


async def test_without_a_lease_nothing_is_written(world: World) -> None:
    world.leases.open.clear()
    assert not await world.receive()
    assert not world.pool.any() and not world.writing.is_set()


async def test_the_loop_goes_on_while_the_pool_is_written(world: World) -> None:
    """A device that is busy must not make a worker miss its heartbeats."""
    task = await world.receive_half()
    await asyncio.sleep(0)
    assert not task.done()
    world.gate.set()
    assert await task and world.written


async def test_a_lease_that_ends_meanwhile_is_freed_when_the_blocks_are_there(world: World) -> None:
    task, freed = await world.receive_half(), []
    world.leases.open.clear()
    world.writes.when_done(KEY, lambda: freed.append(world.written))
    world.writes.when_done("another", lambda: freed.append("at once"))
    settled = asyncio.ensure_future(world.writes.settle())
    await asyncio.sleep(0.02)
    assert freed == ["at once"] and not settled.done()
    world.gate.set()
    assert not await task, "it does not count"
    await settled
    assert freed == ["at once", True] and world.leases.received == []


async def test_a_put_that_cannot_be_written_fails_and_is_over(world: World) -> None:
    world.data = world.data[:, :1]
    freed: list[str] = []
    with pytest.raises(ValueError, match="the blocks are"):
        await world.receive()
    world.writes.when_done(KEY, lambda: freed.append("free"))
    assert freed == ["free"] and world.leases.received == []
