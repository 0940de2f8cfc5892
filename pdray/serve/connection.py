"""The client's connection: work that ends when the client goes away, and streams that always let go."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

MAX_STALL_S = 300.0  # a client whose connection takes no more bytes for so long is gone

T = TypeVar("T")


class ClientGone(Exception):
    """The client has closed its connection; nobody reads the answer."""


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The work's result, unless the client goes away first: then the work is cancelled, and has ended on return.

    Behind Serve's proxy a disconnect cancels the caller; uvicorn, and so direct ingress, only tells it through
    receive(). Both end the work.

    Args:
        receive: of the request, its body already read.

    Raises:
        ClientGone: it went away.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone from gone.exception()
        return task.result()
    finally:
        pending = [each for each in (task, gone) if not each.done()]
        for each in pending:
            each.cancel()
        if pending:
            await asyncio.wait(pending)


async def _wait_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events, each made when the connection has room for it.

    Args:
        events: encoded events. It may end early, or never be asked for its first one.
        release: called when the response is over, in whatever way.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], release: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events = events
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(MAX_STALL_S):
                await send(message)

        try:
            # What is suppressed (TimeoutError is an OSError) says that nobody reads any more; the status has been sent.
            with contextlib.suppress(ClientGone, OSError):
                await unless_gone(receive, self.stream_response(send_in_time))
        finally:
            self._release()
            await self._events.aclose()
