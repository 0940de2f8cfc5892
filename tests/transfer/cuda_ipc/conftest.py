"""A decode worker with any number of writers, at rest in the end (see cuda_ipc_world.py)."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import AsyncIterator
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
    for end in world.ends:
        await asyncio.to_thread(end.channel.close)
        assert len(end.channel._ids.ring) == 0 and all(mapping.closed for mapping in end.transport.mappings)
    await world.receiver.close()
    assert world.fatal == []
    streams = [*world.transport.streams, *(stream for end in world.ends for stream in end.transport.streams)]
    assert [error for stream in streams for error in stream.errors] == []
