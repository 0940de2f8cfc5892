"""Opening a Coordinator from a driver: it is created while another process tells whether it can import pdray."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pdray.actors import client
from pdray.actors.client import CoordinatorClient
from pdray.config import Config
from pdray.errors import PdrayError

CONFIG = Config(device="cpu")


async def never() -> Any:
    await asyncio.Event().wait()


async def fails() -> Any:
    raise PdrayError("the Coordinator does not answer")


async def opens() -> Any:
    return "the Coordinator"


async def cannot_import() -> str:
    await asyncio.sleep(0.01)
    return "install it on every node"


async def can_import() -> None:
    await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("opening", "probe", "expected"),
    [
        (opens, never, None),  # it has been imported then
        (opens, can_import, None),
        (never, cannot_import, "install it on every node"),
        (fails, cannot_import, "install it on every node"),
        (fails, can_import, "does not answer"),
    ],
)
async def test_why_a_coordinator_does_not_open(
    opening: Any, probe: Any, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CoordinatorClient, "_open", lambda config, app_name, *, detached: opening())
    monkeypatch.setattr(client, "why_not_importable", probe)
    before = asyncio.all_tasks()
    call = CoordinatorClient.open(CONFIG, "app", detached=False)
    if expected is None:
        assert await call == "the Coordinator"  # type: ignore[comparison-overlap]
    else:
        with pytest.raises(PdrayError, match=expected):
            await call
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before, "nobody waits any more"


async def test_a_replica_has_imported_it_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CoordinatorClient, "_open", lambda config, app_name, *, detached: opens())
    monkeypatch.setattr(client, "why_not_importable", fails)
    assert await CoordinatorClient.open(CONFIG, "app", detached=True) == "the Coordinator"  # type: ignore[comparison-overlap]
