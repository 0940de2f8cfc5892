"""Losses of one request: their causes, and whether it may be tried again.

A worker's engine that fails says whose step it was. Those legs are suspects: each is replayed alone, and if the engine
fails on it again, its request fails, and costs no further worker. Other legs of that worker are replayed as if
nothing had happened. Both are bounded: an innocent suspect makes progress, or the faulty one is found.

Losses without a culprit (a worker was killed, or hung) count once for each event, however many of the request's legs
it hit.

Pure: single-threaded, no time.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import NamedTuple

from pdray.wire.message import Verdict


class Loss(NamedTuple):
    """The reason why a leg cannot go on.

    Attributes:
        source: the worker, or what else, whose end it is; legs that are lost with it have the same.
        param: the request's field that is invalid, if one is known.
    """

    reason: str
    source: str
    verdict: Verdict = "lost"
    param: str | None = None


class Losses:
    """The events that count against one request.

    Attributes:
        num: events that counted.
    """

    def __init__(self) -> None:
        self._events: set[tuple[str, int]] = set()

    @property
    def num(self) -> int:
        return len(self._events)

    def count(self, loss: Loss, num_losses: int) -> None:
        """A leg is lost, which stands at the end of so many losses.

        What hits legs of one depth in one place is one event; what hits their successors is another.
        """
        if loss.verdict == "lost":
            self._events.add((loss.source, num_losses))


def blame(suspects: Iterable[Hashable]) -> Verdict:
    """The verdict on a leg, by the keys (request_id, attempt) of all legs that its failed step computed."""
    requests = {key[0] if isinstance(key, tuple) else key for key in suspects}
    return "failed" if len(requests) == 1 else "suspect"
