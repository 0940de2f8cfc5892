"""A worker's engine on its thread, and when that hears of work which the event loop has given it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from pdray.engine.loop import EngineLoop
from pdray.engine.request import RequestUpdate

if TYPE_CHECKING:
    from pdray.engine.engine import Engine


def start_engine(
    engine: Engine,
    loop: asyncio.AbstractEventLoop,
    on_updates: Callable[[list[RequestUpdate]], None],
    on_error: Callable[[BaseException], None],
) -> EngineLoop:
    """Step the engine on a thread of its own, from now on; see EngineLoop. To be called on the loop's thread."""
    engine_loop = EngineLoop(engine, on_updates, on_error)
    engine.on_work = GatheredWake(loop, engine_loop.wake)
    engine_loop.start()
    return engine_loop


class GatheredWake:
    """Called when there is work: wakes the engine's thread, but once for all messages that have come in one piece.

    Woken by the first of many prompts, the engine would compute a step of that one alone, and launch it while the event
    loop is busy with the others. Made on the loop's thread; a call from another one wakes at once.

    Args:
        wake: of the engine's loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, wake: Callable[[], None]) -> None:
        self._loop = loop
        self._wake = wake
        self._thread = threading.get_ident()
        self._is_due = False

    def __call__(self) -> None:
        if threading.get_ident() != self._thread:
            self._wake()
        elif not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._wake_now)

    def _wake_now(self) -> None:
        self._is_due = False
        self._wake()
