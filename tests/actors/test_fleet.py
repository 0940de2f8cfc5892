"""How long the Coordinator waits for a heartbeat."""

from __future__ import annotations

import asyncio
import time

import pytest

from pdray.actors.questions import within

TIMEOUT_S = 0.3


async def later(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "alive"


async def test_an_answer_in_time_and_one_too_late() -> None:
    assert await within(later(0.01), TIMEOUT_S) == "alive"
    with pytest.raises(TimeoutError):
        await within(later(30), TIMEOUT_S)
    with pytest.raises(ZeroDivisionError):
        await within(asyncio.to_thread(lambda: 1 // 0), TIMEOUT_S)


async def test_a_loop_that_stood_still_itself_blames_nobody() -> None:
    """The answer needs two turns of the loop, as Ray's do, which come after the timer's."""
    asyncio.get_running_loop().call_later(0.05, time.sleep, 2 * TIMEOUT_S)
    assert await within(later(0.9 * TIMEOUT_S), TIMEOUT_S) == "alive"
    asyncio.get_running_loop().call_later(0.05, time.sleep, 2 * TIMEOUT_S)
    with pytest.raises(TimeoutError):
        await within(later(30), TIMEOUT_S)


async def test_what_is_no_longer_waited_for_is_cancelled() -> None:
    pending = asyncio.ensure_future(later(30))
    with pytest.raises(TimeoutError):
        await within(pending, 0.01)
    await asyncio.sleep(0)
    assert pending.cancelled()
