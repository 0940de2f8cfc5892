"""Steps of one request alone: what such a step does, it does because of that request.

A request under suspicion (EngineRequest.alone) gets steps of its own, every other one while others want to go on too.
None of them overlaps with a step of others.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows

from pdray.engine.schedule.sequence import LiveRequest, Sequence

Turn = LiveRequest | None  # whose step it is: a request's alone, or everyone else's


class Turns:
    """The order of steps between requests that run alone and all others.

    Attributes:
        last: whose was planned last.
    """

    def __init__(self) -> None:
        self.last: Turn = None
        self._alone: list[LiveRequest] = []

    def add(self, live: LiveRequest) -> None:
        """A request has come."""
        if live.num_alone_steps:
            self._alone.append(live)

    @property
    def has_alone(self) -> bool:
        """Whether a request is to be computed alone, or was until the last choose()."""
        return bool(self._alone)

    def choose(self, in_batch: Rows[Sequence], queued: Rows[Sequence], in_flight: list[Turn]) -> list[Turn]:
        """The turns that may be next, best first; none if the steps in flight must be booked before.

        Args:
            in_flight: turns of steps that were planned and not booked.
        """
        if not self._alone:
            return [None] if not in_flight or in_flight[-1] is None else []
        self._alone = [live for live in self._alone if live.num_alone_steps and live.is_live]
        sequences = [*in_batch, *queued]  # who is in the batch can go on; who is queued may have to wait for room
        alone = next((s.request for s in sequences if s.request.num_alone_steps), None)
        turns: list[Turn] = [None]
        if alone is not None:
            others = any(not s.request.num_alone_steps for s in sequences)
            turns = [None, alone] if others and self.last is not None else [alone, None]
        if not in_flight:
            return turns
        return turns[:1] if turns[0] is in_flight[-1] else []

    def of(self, sequences: Iterable[Sequence], turn: Turn) -> Iterable[Sequence]:
        """Sequences that may be in a step of that turn."""
        if turn is not None:
            return (s for s in sequences if s.request is turn)
        return (s for s in sequences if not s.request.num_alone_steps) if self._alone else sequences

    def next_of(self, queue: Rows[Sequence], turn: Turn, *, may_overtake: bool) -> Sequence | None:
        """The first that may be in a step of that turn; unless it may overtake, none behind one that is to be alone."""
        sequence = next(iter(self.of(queue, turn)), None)
        overtakes = turn is None and sequence is not None and queue[0].request.num_alone_steps
        return sequence if may_overtake or not overtakes else None
