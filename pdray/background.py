"""Tasks and threads that run beside their owner, and what becomes of those that fail.

Nothing in pdray makes a task or a thread any other way (a test goes through the tree), so that none can end unseen:

- `BackgroundTasks.spawn`: it comes to an end by itself; what it raises goes to its owner's on_error.
- `BackgroundTasks.keep_running`: it must not end. An exception is logged, counted, shown in `pdray status` and in the
  metric pdray_loop_failures, and after a pause it runs again.
- `start_thread`: what it raises goes to its owner's on_error, which ends what cannot go on without the thread.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 5.0
RAN_WELL_S = 60.0  # a loop that has run for so long has recovered: its next pause is short again
SWITCH_INTERVAL_S = 20e-6  # Python's default of 5 ms would be added to every launch beside a busy event loop

T = TypeVar("T")

MakeLoop = Callable[[], Coroutine[Any, Any, None]]


@dataclass(slots=True)
class LoopFailures:
    """Exceptions of one process's loops.

    Attributes:
        counts: by name of the loop.
        last: what each of them raised last.
        on_failure: called with a loop's name at each failure; for a metric.
    """

    counts: dict[str, int] = field(default_factory=dict)
    last: dict[str, str] = field(default_factory=dict)
    on_failure: Callable[[str], None] | None = None

    def note(self, name: str, error: BaseException) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1
        self.last[name] = f"{type(error).__name__}: {error}"
        if self.on_failure is not None:
            self.on_failure(name)

    def describe(self) -> dict[str, str]:
        """For each loop that has failed: the number of failures and the last reason."""
        return {name: f"{count} times, last: {self.last[name]}" for name, count in self.counts.items()}


class BackgroundTasks:
    """Keeps tasks alive while they run, and never loses what one of them raises. Event loop's thread only.

    Args:
        on_error: called with what a task of spawn() raised; cancellation is no error.
        failures: where those of keep_running() are noted; shared by all owners of a process that has a status.

    Attributes:
        loops: the tasks of keep_running() that run, by name.
    """

    def __init__(self, on_error: Callable[[BaseException], None], failures: LoopFailures | None = None) -> None:
        self._on_error = on_error
        self.failures = LoopFailures() if failures is None else failures
        self.loops: dict[str, asyncio.Task[Any]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run beside."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def keep_running(self, name: str, loop: MakeLoop, *, of: str = "") -> asyncio.Task[Any]:
        """Run loop() until it returns or is cancelled. Whenever it raises, it is started anew after a pause.

        Args:
            name: of the loop, in logs, metrics and status.
            of: tells loops of one name apart.
        """
        task = self.spawn(self._repeat(name, loop))
        key = f"{name} {of}" if of else name
        self.loops[key] = task
        task.add_done_callback(lambda done: self.loops.pop(key, None) if self.loops.get(key) is done else None)
        return task

    async def _repeat(self, name: str, loop: MakeLoop) -> None:
        pause_s, now = FIRST_PAUSE_S, asyncio.get_running_loop().time
        while True:
            began = now()
            try:
                return await loop()
            except Exception as error:
                self.failures.note(name, error)
                pause_s = FIRST_PAUSE_S if now() - began > RAN_WELL_S else pause_s
                logger.exception("%s failed; it runs again in %g s", name, pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)

    def cancel(self) -> None:
        """Cancel all but the caller, if it is one of them; they end later."""
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()

    async def stop(self) -> None:
        """Cancel all, and return when they have ended. Not for one of them to call."""
        self.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_error(error)


async def unless_ended(work: Awaitable[T], end: Awaitable[None]) -> T:
    """What ``work`` returns or raises; or what ``end`` raises, if that comes first: then nobody waits for ``work``."""
    working, ending = asyncio.ensure_future(work), asyncio.ensure_future(end)
    try:
        await asyncio.wait({working, ending}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            await ending
        return await working
    finally:
        ending.cancel()


def start_thread(name: str, target: Callable[[], None], on_error: Callable[[BaseException], None]) -> threading.Thread:
    """Run target() on a daemon thread; what it raises goes to on_error, on that thread."""

    def run() -> None:
        try:
            target()
        except BaseException as error:
            on_error(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread
