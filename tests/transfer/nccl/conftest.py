"""Workers of several ranks joined by nccl, at rest in the end (see nccl_world.py)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location("nccl_world", Path(__file__).with_name("nccl_world.py"))
assert _spec is not None and _spec.loader is not None
nccl_world = sys.modules["nccl_world"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(nccl_world)


@pytest.fixture
async def world_of() -> AsyncIterator[Callable[..., Any]]:
    """Makes a decode worker of a model with so many heads, so many ranks, and peers of so many; see World."""
    worlds: list[Any] = []

    def make(*sizes: int, **more: Any) -> Any:
        worlds.append(nccl_world.World(*sizes, **more))
        return worlds[-1]

    yield make
    for world in worlds:
        await world.close()
