"""Tokens that a router can wait for: told many steps at once.

A message for each step costs the worker as much as a small part of the step, on an event loop that takes Python's lock
from the engine's thread; and it costs the router the same for every token. Where somebody streams, or looks for a stop
string, that is the price of hearing at once. Where the whole answer is wanted nothing is lost by a tenth of a second.
"""

from __future__ import annotations

import time
from collections.abc import Hashable

from pdray.engine.request import RequestUpdate

TOLD_STEPS = 16
TOLD_AFTER_S = 0.1
TOLD_TOKENS = 1024  # the answers end once the router has booked the last message: 2 to 5 us a token


class ToldLate:
    """Joins the updates of some steps into one for each request. For the engine's thread."""

    def __init__(self) -> None:
        self._held: dict[Hashable, RequestUpdate] = {}
        self._num_steps = self._num_tokens = 0
        self._since = 0.0

    def take(self, updates: list[RequestUpdate]) -> list[RequestUpdate] | None:
        """A step's updates have come: what is to be told now, in order for each request; None: nothing yet.

        Everything is told together with the first update that cannot wait: ends, failures, first and second tokens with
        their durations, and requests of routers that do not wait.
        """
        if not updates or not all(map(self._is_plain, updates)):
            return self._join(updates)
        if not self._num_steps:
            self._since = time.monotonic()
        self._num_steps += 1
        self._num_tokens += sum(len(update.tokens) for update in updates)
        is_much = self._num_steps >= TOLD_STEPS or self._num_tokens >= TOLD_TOKENS
        if is_much or time.monotonic() - self._since >= TOLD_AFTER_S:
            return self._join(updates)
        held = self._held
        for update in updates:
            if (earlier := held.get(update.key)) is None:
                held[update.key] = update
            else:
                earlier.tokens += update.tokens
        return None

    @staticmethod
    def _is_plain(update: RequestUpdate) -> bool:
        """Whether it is nothing but tokens, which can wait."""
        return (
            update.whole
            and not update.finished
            and update.failure is None
            and update.prefill is None
            and update.num_cached_tokens is None
            and update.join_wait is None
            and update.first_decode_step is None
            and bool(update.tokens)
            and update.tokens[0].position > 1
        )

    def _join(self, updates: list[RequestUpdate]) -> list[RequestUpdate]:
        """All that was held, with these."""
        self._num_steps = self._num_tokens = 0
        if not self._held:
            return updates
        held, self._held = self._held, {}
        for update in updates:
            if (earlier := held.pop(update.key, None)) is not None:
                update.tokens[:0] = earlier.tokens
        return [*held.values(), *updates]
