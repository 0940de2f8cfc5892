"""The base of every message between processes.

msgspec structs, tagged, array-like, encoded as msgpack. A *leg* is one attempt to run some of a
request's completions on one decode worker; the pair (request_id, attempt) names it, and every
message about it carries that pair, so that a stale attempt is recognised anywhere. Durations are
in seconds, measured by the sender on its own clock; no message holds a time of day.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

# Why a leg cannot go on where it is. lost: no leg's fault, it goes on elsewhere. innocent: another leg's step has
# broken the worker. suspect: it was in that step, with others. failed: it was in that step alone. invalid: it can never
# be served.
Verdict = Literal["lost", "innocent", "suspect", "failed", "invalid"]


class LegKey(NamedTuple):
    """Names one leg. Attempts of a request are numbered from 0, in the order they are made."""

    request_id: str
    attempt: int


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of every message."""


class LegMessage(Message, frozen=True):
    """Base of every message about one leg."""

    request_id: str
    attempt: int

    @property
    def key(self) -> LegKey:
        return LegKey(self.request_id, self.attempt)
