"""The router's bounded queue: order, limits, and the Retry-After of those it refuses.

Pure: time is passed in. Single-threaded.
"""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pdray.errors import QueueFullError

T = TypeVar("T")

DRAIN_HALF_LIFE_S = 10.0
FIRST_GUESS_S = 1.0  # Retry-After before anything was admitted


class DrainRate:
    """Admissions per second, as an exponentially weighted average of what was seen."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._since: float | None = None
        self._last = 0.0

    def admitted(self, now: float) -> None:
        """One request left the queue (or passed it)."""
        self._decay(now)
        self._weight += 1.0

    def per_second(self, now: float) -> float | None:
        """Admissions per second; None before the first one."""
        if self._since is None:
            return None
        self._decay(now)
        time_constant = DRAIN_HALF_LIFE_S / math.log(2.0)
        observed = time_constant * (1.0 - math.exp(-(now - self._since) / time_constant))
        return self._weight / max(observed, 1.0)

    def _decay(self, now: float) -> None:
        if self._since is None:
            self._since = self._last = now
        self._weight *= 0.5 ** ((now - self._last) / DRAIN_HALF_LIFE_S)
        self._last = now


@dataclass(order=True, slots=True)
class Waiting(Generic[T]):
    """A place in the line, kept for as long as the request lives. Lower priority values go first; then who came first.

    Attributes:
        item: who waits here; None: nobody does now.
    """

    priority: int
    order: int
    since: float = field(compare=False)
    item: T | None = field(default=None, compare=False)


class AdmissionQueue(Generic[T]):
    """A bounded queue, FIFO within a priority.

    Args:
        max_size: entries that may wait; with 0 none may.
        max_wait_s: entries that wait longer are handed out by expired().
    """

    def __init__(self, max_size: int, max_wait_s: float) -> None:
        self.max_size = max_size
        self.max_wait_s = max_wait_s
        self.drain_rate = DrainRate()
        self._line: list[Waiting[T]] = []  # sorted
        self._order = itertools.count()
        self._congested_since: float | None = None  # since when the queue has never been empty
        self._num_admitted = 0  # since then

    def __len__(self) -> int:
        return len(self._line)

    def ticket(self, now: float, priority: int, order: int | None = None) -> Waiting[T]:
        """A place behind those who came before, or where `order` stood; nobody waits there yet."""
        return Waiting(priority, next(self._order) if order is None else order, now)

    def push(self, now: float, entry: Waiting[T], item: T) -> None:
        """Wait.

        Raises:
            QueueFullError: no place, or its turn would come after max_wait_s; with when to come back.
        """
        if len(self) >= self.max_size:
            raise QueueFullError(
                f"the queue is full: {self._line_text()}; try again later",
                self.retry_after_s(now),
            )
        if self._congested_since is None:
            self._congested_since, self._num_admitted = now, 0
        elif (wait := self.expected_wait_s(now)) is not None and wait > self.max_wait_s:
            raise QueueFullError(
                f"{len(self)} requests are waiting, and this one's turn would come in {wait:.0f} s, after "
                f"max_queue_wait_s ({self.max_wait_s:g} s); try again later",
                self.retry_after_s(now),
            )
        self.push_back(entry, item)

    def _line_text(self) -> str:
        """Describe the queue for an error. Requests that come back after a denial or a loss are not bounded."""
        beyond = len(self) - self.max_size
        back = f", {beyond} of them back from a worker" if beyond > 0 else ""
        return f"max_queue_size is {self.max_size}, and {len(self)} requests are waiting{back}"

    def admitted(self, now: float) -> None:
        """One request was given a place."""
        self.drain_rate.admitted(now)
        self._num_admitted += 1

    def expected_wait_s(self, now: float) -> float | None:
        """Seconds until the turn of a request that came now, from what was admitted since requests began to wait.

        None before that is known: admissions while no request waits measure arrivals, not capacity.
        """
        if self._congested_since is None or (congested_s := now - self._congested_since) < self.max_wait_s / 4:
            return None
        return len(self) * congested_s / max(self._num_admitted, 1)

    def push_back(self, entry: Waiting[T], item: T) -> None:
        """Wait again, in one's old place: one who was let out already is not refused."""
        assert entry.item is None
        entry.item = item
        bisect.insort(self._line, entry)

    def peek(self, position: int = 0) -> T | None:
        """Who is next, or so many places behind that."""
        return self._line[position].item if position < len(self._line) else None

    def remove(self, entry: Waiting[T]) -> None:
        """Take an entry out, wherever it stands. Idempotent."""
        if entry.item is not None:
            entry.item = None
            place = bisect.bisect_left(self._line, entry)
            while self._line[place] is not entry:  # legs that replay one leg stand in the same place
                place += 1
            del self._line[place]
            if not self._line:
                self._congested_since = None

    def expired(self, now: float) -> list[T]:
        """Take out and return those who have waited longer than max_wait_s."""
        late = [(entry, entry.item) for entry in self._line if now - entry.since >= self.max_wait_s]
        for entry, _ in late:
            self.remove(entry)
        return [item for _, item in late if item is not None]

    def retry_after_s(self, now: float) -> float:
        """Seconds until a request that came now would have its turn, from the measured drain rate."""
        rate = self.drain_rate.per_second(now)
        if rate is None:
            return FIRST_GUESS_S
        wait = (len(self) + 1) / rate if rate > 0 else self.max_wait_s
        return min(max(wait, 1.0), max(self.max_wait_s, 1.0))
