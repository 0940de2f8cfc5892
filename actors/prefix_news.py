"""What a worker tells its routers of its prefix cache; they send prompts where most of them is cached."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pdray.background import BackgroundTasks
from pdray.control.prefixes import ToldPrefixes
from pdray.wire.session import Session
from pdray.wire.worker_news import PrefixUpdate

if TYPE_CHECKING:
    from pdray.engine.engine import Engine

INTERVAL_S = 0.5


class PrefixNews:
    """Event loop's thread only.

    Args:
        routers: open sessions to routers. tasks: of the worker; a long list is told in one of them.
    """

    def __init__(self, routers: Callable[[], list[Session]], tasks: BackgroundTasks) -> None:
        self._routers = routers
        self._tasks = tasks
        self._told = ToldPrefixes()

    def greet(self, session: Session) -> None:
        """Tell a new router everything: the first part now, the others by and by."""
        updates = self._told.tell_all()
        if (first := next(updates, None)) is not None:
            session.send(first)
            self._tasks.spawn(self._tell(session, updates))

    async def publish(self, engine: Engine) -> None:
        """Tell all routers what changes, for ever."""
        while True:
            added, removed = engine.take_prefix_changes()
            for update in self._told.tell(added, removed):
                for session in self._routers():
                    session.send(update)
                await asyncio.sleep(0)
            await asyncio.sleep(INTERVAL_S)

    async def _tell(self, session: Session, updates: Iterator[PrefixUpdate]) -> None:
        for update in updates:
            if session.closed:
                return
            session.send(update)
            await asyncio.sleep(0)
