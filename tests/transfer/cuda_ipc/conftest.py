"""A decode worker with any number of writers, at rest in the end (see cuda_ipc_world.py)."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location("cuda_ipc_world", Path(__file__).with_name("cuda_ipc_world.py"))
assert _spec is not None and _spec.loader is not None
cuda_ipc_world = sys.modules["cuda_ipc_world"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cuda_ipc_world)


@pytest.fixture
async def world() -> AsyncIterator[Any]:
    world = cuda_ipc_world.World()
    yield world
    await at_rest(world)


async def at_rest(world: Any) -> None:
    """Close it, and see that nothing is left."""
    for end in world.ends:
        await asyncio.to_thread(end.channel.close)
        assert len(end.channel._writer.ids.ring) == 0 and all(mapping.closed for mapping in end.mappings)
    await world.receiver.close()
    assert world.fatal == []
    workers = [world.worker, *(end.worker for end in world.ends)]
    streams = [stream for worker in workers for transport in worker.transports for stream in transport.streams]
    assert [error for stream in streams for error in stream.errors] == []
    for worker in workers:
        worker.close()


@pytest.fixture
async def world_of() -> AsyncIterator[Callable[[int, int], Any]]:
    """Makes a decode worker of a model with so many heads, and so many ranks."""
    worlds: list[Any] = []

    def make(num_heads: int, num_ranks: int) -> Any:
        worlds.append(cuda_ipc_world.World(num_heads, num_ranks))
        return worlds[-1]

    yield make
    for world in worlds:
        await at_rest(world)
