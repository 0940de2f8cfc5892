"""Writes into the pool that are under way: the leases of their legs must not be freed before they end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable


class PendingWrites:
    """Counts what a decode worker's channels write, by leg. Event loop's thread only."""

    def __init__(self) -> None:
        self._number: dict[Hashable, int] = {}
        self._calls: dict[Hashable, list[Callable[[], None]]] = {}

    def begin(self, key: Hashable) -> None:
        self._number[key] = self._number.get(key, 0) + 1

    def end(self, key: Hashable) -> None:
        """One write of this leg has ended, of as many as have begun."""
        self._number[key] -= 1
        if not self._number[key]:
            del self._number[key]
            for call in self._calls.pop(key, []):
                call()

    def when_done(self, key: Hashable, call: Callable[[], None]) -> None:
        """Call once nothing of this leg is being written: now, or later."""
        if key in self._number:
            self._calls.setdefault(key, []).append(call)
        else:
            call()

    async def settle(self) -> None:
        """Return when all that is being written now is in the pool."""
        loop = asyncio.get_running_loop()
        for key in list(self._number):
            done = loop.create_future()
            self.when_done(key, lambda done=done: done.done() or done.set_result(None))  # type: ignore[misc]
            await done

    def abandon(self) -> None:
        """Forget all writes, because the device has failed and they will never end."""
        self._number.clear()
        for key in list(self._calls):
            for call in self._calls.pop(key):
                call()
