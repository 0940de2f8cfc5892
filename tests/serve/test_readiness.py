"""When the replica that stands for the workers tells what is waited for, by an error; no Serve, no clock."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from pdray.config import Config
from pdray.control.startup import NO_ROUTER, StartState
from pdray.errors import StartTimeoutError
from pdray.serve import readiness
from pdray.serve.readiness import TELL_AFTER_S, WorkersReplica


def wait_ready(monkeypatch: pytest.MonkeyPatch, reasons: list[str]) -> float:
    """What a Coordinator says each second, and that all is ready after it; returns when the replica was ready."""
    now = 1000.0
    states = iter([*(StartState(False, reason=reason) for reason in reasons), StartState(True)])

    async def start_state(with_router: bool) -> StartState:
        nonlocal now
        assert with_router
        now += 1.0
        return next(states)

    async def tell(at_most: int) -> bool:
        return True

    monkeypatch.setattr(readiness, "time", SimpleNamespace(monotonic=lambda: now))
    replica: Any = object.__new__(WorkersReplica)
    replica._config = Config(start_timeout_s=60)
    replica._coordinator = SimpleNamespace(start_state=start_state, tell=tell)
    asyncio.run(replica._wait_ready())
    return now - 1000


def test_a_router_that_comes_soon_after_workers_that_have_loaded_for_long_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loading = [""] * 20
    assert wait_ready(monkeypatch, [*loading, NO_ROUTER, NO_ROUTER]) == 23
    assert wait_ready(monkeypatch, [*["no GPU is free"] * 5, NO_ROUTER, NO_ROUTER, NO_ROUTER, NO_ROUTER]) == 10


@pytest.mark.parametrize("reasons", [[NO_ROUTER] * 20, ["no GPU is free"] * 20, [*[""] * 20, "decode-0 died"]])
def test_what_is_waited_for_is_told(monkeypatch: pytest.MonkeyPatch, reasons: list[str]) -> None:
    with pytest.raises(StartTimeoutError, match=reasons[-1]):
        wait_ready(monkeypatch, reasons)


def test_a_router_that_does_not_come_is_told_a_while_after_the_workers_are_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loading = [""] * 20
    assert wait_ready(monkeypatch, [*loading, *[NO_ROUTER] * round(TELL_AFTER_S)]) == 21 + TELL_AFTER_S
    with pytest.raises(StartTimeoutError, match=NO_ROUTER):
        wait_ready(monkeypatch, [*loading, *[NO_ROUTER] * round(TELL_AFTER_S + 2)])


def test_it_ends_once_the_start_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartTimeoutError, match=r"within 60 s \(start_timeout_s\)"):
        wait_ready(monkeypatch, [""] * 100)
