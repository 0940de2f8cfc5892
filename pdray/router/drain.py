"""The end of a router's service, in order: requests that run go on until a deadline, and are then told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Drain:
    """Event loop's thread only.

    Args:
        end_all: called with the reason that every request is to end with.

    Attributes:
        refuses: why new requests are refused; None while they are taken.
    """

    def __init__(self, end_all: Callable[[str], None]) -> None:
        self.refuses: str | None = None
        self._end_all = end_all
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, left_s: float, reason: str, *, refuse: bool) -> None:
        """End what still runs after `left_s`. A deadline that is set already stays if it is the earlier one.

        Args:
            refuse: take no new requests from now on.
        """
        if refuse:
            self.refuses = reason
        loop = asyncio.get_running_loop()
        if self._timer is not None and not self._timer.cancelled():
            if self._timer.when() <= loop.time() + left_s:
                return
            self._timer.cancel()
        self._timer = loop.call_later(left_s, self._end_all, f"the answer was cut short: {reason}")

    def cancel(self) -> None:
        """Go on as before."""
        self.refuses = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
