"""What runs background loops and threads: they go on after an exception, and say so."""

from __future__ import annotations

import asyncio

import pytest

from pdray.background import BackgroundTasks, LoopFailures, start_thread, unless_ended


class InjectedError(Exception):
    """What no loop expects."""


async def test_a_loop_that_raises_is_counted_and_runs_again_after_a_pause(caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []
    failures = LoopFailures(on_failure=told.append)
    tasks = BackgroundTasks(pytest.fail, failures)
    ran: list[float] = []

    async def loop() -> None:
        ran.append(asyncio.get_running_loop().time())
        if len(ran) < 4:
            raise InjectedError(f"number {len(ran)}")

    await tasks.keep_running("work", loop)
    assert len(ran) == 4 and told == ["work"] * 3
    assert failures.describe() == {"work": "3 times, last: InjectedError: number 3"}
    pauses = [after - before for before, after in zip(ran, ran[1:], strict=False)]
    assert pauses == sorted(pauses) and pauses[0] >= 0.09  # each is longer than the one before
    assert "work failed" in caplog.text and not tasks.loops


async def test_a_loop_ends_when_it_is_cancelled_and_one_of_a_name_does_not_hide_another() -> None:
    tasks = BackgroundTasks(pytest.fail)
    first = tasks.keep_running("heartbeats", asyncio.Event().wait, of="a")  # type: ignore[arg-type]
    tasks.keep_running("heartbeats", asyncio.Event().wait, of="b")  # type: ignore[arg-type]
    assert set(tasks.loops) == {"heartbeats a", "heartbeats b"}
    await asyncio.sleep(0)
    await tasks.stop()
    await asyncio.sleep(0)
    assert first.cancelled() and not tasks.loops


async def test_what_a_thread_raises_reaches_its_owner() -> None:
    errors: list[BaseException] = []
    start_thread("t", lambda: 1 // 0, errors.append).join(10)
    assert [type(error) for error in errors] == [ZeroDivisionError]


async def test_work_that_hangs_is_not_waited_for_when_its_owner_has_ended() -> None:
    async def end() -> None:
        raise InjectedError

    with pytest.raises(InjectedError):
        await unless_ended(asyncio.Event().wait(), end())
    assert await unless_ended(asyncio.sleep(0, "done"), asyncio.Event().wait()) == "done"  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        await unless_ended(asyncio.to_thread(lambda: 1 // 0), asyncio.Event().wait())  # type: ignore[arg-type]
