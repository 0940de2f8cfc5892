"""An answer that comes after its waiter has gone harms nobody."""

from __future__ import annotations

import asyncio
import concurrent.futures
from typing import Any

import pytest

from pdray.actors import answer as answer_module
from pdray.actors.answer import answer_of


class FakeClientRef:
    """Ray Client's reference: its future is completed by Ray, whoever has cancelled it."""

    def __init__(self) -> None:
        self._future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def future(self) -> concurrent.futures.Future[Any]:
        return self._future


@pytest.fixture
def ref(monkeypatch: pytest.MonkeyPatch) -> FakeClientRef:
    monkeypatch.setattr(answer_module, "ClientObjectRef", FakeClientRef)
    return FakeClientRef()


async def test_answers_and_errors_are_passed_on(ref: FakeClientRef) -> None:
    waiting = asyncio.create_task(answer_of(ref))
    await asyncio.sleep(0)
    ref.future().set_result(7)
    assert await waiting == 7
    failing = FakeClientRef()
    failing.future().set_exception(KeyError("x"))
    with pytest.raises(KeyError):
        await answer_of(failing)


@pytest.mark.parametrize("error", [None, ConnectionError("disconnected")])
def test_one_that_comes_after_the_end_is_dropped(ref: FakeClientRef, error: Exception | None) -> None:
    async def give_up() -> None:
        waiting = asyncio.create_task(answer_of(ref))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(give_up())
    if error is None:
        ref.future().set_result(7)  # raises if the future was cancelled
    else:
        ref.future().set_exception(error)


async def test_others_are_simply_awaited() -> None:
    assert await answer_of(asyncio.sleep(0, 3)) == 3
