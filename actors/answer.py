"""Waiting for an actor's answer in a task that may be cancelled."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from typing import Any

from ray.util.client.common import ClientObjectRef


async def answer_of(ref: Any) -> Any:
    """The result of awaiting an actor's answer.

    Through Ray Client, cancelling the await would cancel Ray's own future, and when the answer comes Ray prints a
    traceback from a thread of its own: there the future is left alone, and its answer is dropped.
    """
    if not isinstance(ref, ClientObjectRef):
        return await ref
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Any] = loop.create_future()

    def take(future: concurrent.futures.Future[Any]) -> None:
        if answer.done():
            return
        if (error := future.exception()) is not None:
            answer.set_exception(error)
        else:
            answer.set_result(future.result())

    def done(future: concurrent.futures.Future[Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(take, future)

    ref.future().add_done_callback(done)
    return await answer
