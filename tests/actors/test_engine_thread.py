"""When a worker's engine is woken, and what its event loop spends on a call. Without Ray's processes."""

from __future__ import annotations

import asyncio
import inspect
import threading
from typing import Any

from ray.util.tracing.tracing_helper import _inject_tracing_into_class

from pdray.actors.engine_thread import GatheredWake
from pdray.actors.untraced import TRACING, without_tracing
from pdray.testing.patience import PATIENCE_S


async def test_an_engine_is_woken_once_for_all_that_came_in_one_piece() -> None:
    seen: list[str] = []
    wake = GatheredWake(asyncio.get_running_loop(), lambda: seen.append("woken"))
    for number in range(3):
        seen.append(f"message {number}")
        wake()
    assert seen == ["message 0", "message 1", "message 2"]
    await asyncio.sleep(0)
    assert seen[3:] == ["woken"]
    wake()
    await asyncio.sleep(0)
    assert seen[4:] == ["woken"], "and again for what comes later"


async def test_work_that_another_thread_brings_waits_for_no_message() -> None:
    woken: list[int] = []
    wake = GatheredWake(asyncio.get_running_loop(), lambda: woken.append(threading.get_ident()))
    thread = threading.Thread(target=wake)
    thread.start()
    thread.join(PATIENCE_S)
    assert woken == [thread.ident]


class Actor:
    def __init__(self) -> None:
        without_tracing(type(self))

    def each_token(self, token: int) -> int:
        return token + 1

    async def called_by_others(self) -> int:
        return self.each_token(1)

    @staticmethod
    def plain() -> str:
        return "plain"


def test_only_what_other_processes_call_is_traced() -> None:
    class AsActor(Actor):
        """As Ray makes it: a class of its own, whose methods are wrapped."""

    _inject_tracing_into_class(AsActor)
    wrapped: Any = AsActor.each_token
    assert wrapped is not Actor.each_token and wrapped.__globals__["__name__"] == TRACING
    actor = AsActor()
    assert inspect.unwrap(AsActor.each_token) is AsActor.each_token
    assert AsActor.called_by_others.__globals__["__name__"] == TRACING  # type: ignore[attr-defined]
    assert asyncio.run(actor.called_by_others()) == 2 and actor.plain() == "plain"
    assert actor.each_token(2) == 3
