"""The order of the queue where first tokens have a target: prompts that can still meet it first, late ones last.

A late prompt has missed its target whatever happens; computed before others, it makes them late too. Where more comes
than can be served in time, a queue in order of arrival is late as a whole.

Pure: no clock, no device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

LATE_TURN = 8  # prompts that begin while late ones wait, of which one is late

T = TypeVar("T")


class LateLast(Generic[T]):
    """Sorts a queue again and again; no prompt starves, as one of LATE_TURN is the first of the late ones.

    Args:
        key: the order among those that are late, and among those that are not.
        rank: comes before lateness, as a priority does.
        has_begun: of a prompt that waits no longer; others were aborted.
    """

    def __init__(
        self,
        key: Callable[[T], Any],
        rank: Callable[[T], Any] = lambda item: 0,
        has_begun: Callable[[T], bool] = lambda item: True,
    ) -> None:
        self._key = key
        self._rank = rank
        self._has_begun = has_begun
        self._waited: list[tuple[T, bool]] = []  # with whether each was late
        self._num_in_time = 0  # that have begun since the last late one

    def sort(self, queue: list[T], is_late: Callable[[T], bool], is_overdue: Callable[[T], bool]) -> bool:
        """Sort prompts that have not begun, in place, before each step that may begin some.

        Returns:
            Whether the first is a late one that has its turn, or has waited for too long.
        """
        lateness = {id(item): is_late(item) for item in queue}
        gone = [(item, was_late) for item, was_late in self._waited if id(item) not in lateness]
        begun = [was_late for item, was_late in gone if self._has_begun(item)]
        late = [item for item in queue if lateness[id(item)]]
        self._waited = [(item, lateness[id(item)]) for item in queue]
        self._num_in_time = 0 if any(begun) or not late else self._num_in_time + len(begun)
        oldest = min(late, key=self._key, default=None)
        has_turn = oldest is not None and (self._num_in_time >= LATE_TURN - 1 or is_overdue(oldest))
        first = oldest if has_turn else None
        queue.sort(key=lambda item: (self._rank(item), item is not first, lateness[id(item)], self._key(item)))
        return has_turn and queue[0] is first
