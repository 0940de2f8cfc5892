"""A router's account of one request: its legs, and every token exactly once and in order.

A first leg runs all n completions. A leg that is lost (its worker died) is replaced by one leg for each
completion that it had not finished, carrying what that completion has produced so far; positions
go on from there. Tokens of a leg that was replaced are dropped wherever they turn up.

Pure: single-threaded, no time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from pdray.outputs import SampledToken
from pdray.wire.message import LegKey


class Leg(NamedTuple):
    """One attempt. output_token_ids is empty unless the leg replays a single completion."""

    key: LegKey
    indices: tuple[int, ...]
    output_token_ids: tuple[int, ...]


@dataclass(slots=True)
class RequestTracker:
    """Args:
    request_id: of the whole request. n: number of completions.
    """

    request_id: str
    n: int
    _legs: dict[LegKey, Leg] = field(default_factory=dict, init=False)
    _tokens: list[list[int]] = field(default_factory=list, init=False)
    _finished: set[int] = field(default_factory=set, init=False)
    _next_attempt: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._tokens = [[] for _ in range(self.n)]

    @property
    def legs(self) -> list[Leg]:
        """The live ones."""
        return list(self._legs.values())

    @property
    def done(self) -> bool:
        """Whether every completion has ended."""
        return len(self._finished) == self.n

    def has_ended(self, index: int) -> bool:
        return index in self._finished

    def start(self) -> Leg:
        """The first leg: all completions, from the prompt."""
        assert self._next_attempt == 0, self.request_id
        return self._open(tuple(range(self.n)), ())

    def accept(self, key: LegKey, tokens: list[SampledToken]) -> list[SampledToken]:
        """The tokens that are new, in order; stale legs, repeated positions and ended completions give none."""
        leg = self._legs.get(key)
        if leg is None:
            return []
        fresh = []
        for token in sorted(tokens, key=_place) if len(tokens) > 1 else tokens:
            produced = self._tokens[token.index]
            if token.index not in leg.indices or token.index in self._finished or token.position < len(produced):
                continue
            assert token.position == len(produced), f"{key}: position {token.position} after {len(produced)} tokens"
            produced.append(token.token_id)
            fresh.append(token)
            if token.finish_reason is not None:
                self.finish(token.index)
        return fresh

    def finish(self, index: int) -> None:
        """End a completion: by its last token, or by a stop string that only the router sees."""
        self._finished.add(index)

    def ended_legs(self) -> list[Leg]:
        """Legs all of whose completions have ended; they are forgotten, and their leases can be closed."""
        ended = [leg for leg in self._legs.values() if self._finished.issuperset(leg.indices)]
        for leg in ended:
            del self._legs[leg.key]
        return ended

    def replace(self, key: LegKey) -> list[Leg]:
        """A leg is lost: the legs that take its unfinished completions over, in higher attempts."""
        lost = self._legs.pop(key, None)
        if lost is None:
            return []
        unfinished = [index for index in lost.indices if index not in self._finished]
        if not any(self._tokens[index] for index in unfinished):
            return [self._open(tuple(unfinished), ())] if unfinished else []
        return [self._open((index,), tuple(self._tokens[index])) for index in unfinished]

    def drop(self) -> list[Leg]:
        """The request is over, whatever its completions did: the legs to close."""
        legs = self.legs
        self._legs.clear()
        return legs

    def _open(self, indices: tuple[int, ...], output_token_ids: tuple[int, ...]) -> Leg:
        leg = Leg(LegKey(self.request_id, self._next_attempt), indices, output_token_ids)
        self._next_attempt += 1
        self._legs[leg.key] = leg
        return leg


def _place(token: SampledToken) -> tuple[int, int]:
    return token.index, token.position
