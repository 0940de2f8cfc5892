"""Links between a server and its clients (see session_link.py)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location("session_link", Path(__file__).with_name("session_link.py"))
assert _spec is not None and _spec.loader is not None
session_link = sys.modules["session_link"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(session_link)


@pytest.fixture
async def link() -> AsyncIterator[Callable[..., Awaitable[Any]]]:
    """Makes a Link from its arguments."""
    made: list[Any] = []

    async def make(**kwargs: object) -> Any:
        made.append(await session_link.Link(**kwargs).start())
        return made[-1]

    yield make
    for each in made:
        await each.stop()
