"""The event loop on which messages between processes are read and written."""

from __future__ import annotations

import asyncio


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A loop of the kind that Ray gives its async actors: uvloop's where it is installed, as Ray's `serve` extra does.

    It hands a message on in half the time of asyncio's own.
    """
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
