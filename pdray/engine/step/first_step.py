"""The first step of a sequence whose KV comes from elsewhere, in an engine that has nothing else to do.

Nothing runs before it, behind which the host could do its part: all of it would be seen between the first token and the
second. So its inputs are prepared while the KV is under way, but for the first token, which the step takes from where a
step before it would have left it (``Lane.sampled``). What happens otherwise in between makes them void.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pdray.engine.schedule.plan import Chunk, Draw, StepPlan
from pdray.engine.schedule.sequence import Sequence, SequenceStatus
from pdray.kernels.sampling.rows import needs_slot

if TYPE_CHECKING:
    from pdray.engine.schedule.scheduler import Scheduler
    from pdray.engine.step.inputs import StepInputs
    from pdray.engine.step.lane import Lane, Place


class Ahead(NamedTuple):
    """Inputs of a step that is not planned yet.

    Attributes:
        chunk: the step's only one. block_row: its sequence's, as the inputs hold it.
        place: where the inputs were padded to run.
    """

    chunk: Chunk
    block_row: np.ndarray[Any, Any]
    place: Place
    inputs: StepInputs

    @property
    def sequence(self) -> Sequence:
        return self.chunk.sequence

    def fits(self, plan: StepPlan, place: Place) -> bool:
        """Whether these are the plan's inputs, but for its token."""
        chunk = self.chunk._replace(late_row=None)
        return (
            plan.chunks == [chunk]
            and plan.is_decode
            and not plan.copies
            and self.sequence.block_row is self.block_row
            and place == self.place
        )


def first_step(sequence: Sequence, block_size: int) -> StepPlan | None:
    """The plan of the step behind the first token of a sequence that holds blocks for its prompt.

    It is for Lane.prepare_ahead() alone: nothing is marked as planned. None where more than the token is not known yet:
    several completions, rules, or draws that look at earlier tokens.
    """
    live, start = sequence.request, len(sequence.token_ids)
    params = live.params
    is_plain = not (live.has_rules or live.num_alone_steps or needs_slot(params, params.min_tokens))
    if len(live.sequences) > 1 or not is_plain or len(sequence.block_table) * block_size <= start:
        return None
    draw = Draw(sequence, 0, sequence.num_output_tokens + 1)
    chunk = Chunk(sequence, start, 1, [draw], late_row=0)
    return StepPlan([chunk], num_tokens=1, num_draws=1, num_decodes=1)


class FirstSteps:
    """Knows which sequence is expected. lock: the engine's, which guards scheduler and lane."""

    def __init__(self, scheduler: Scheduler, lane: Lane, lock: threading.Lock) -> None:
        self._scheduler = scheduler
        self._lane = lane
        self._lock = lock
        self._expected: Hashable = None

    def expect(self, key: Hashable) -> None:
        """This reservation's KV is under way; of several the first one counts."""
        with self._lock:
            ahead = self._lane.ahead
            if self._expected is None and (ahead is None or ahead.sequence.status is not SequenceStatus.RESERVED):
                self._expected = key

    def prepare(self) -> None:
        """Prepare the expected step if nothing is to be computed before it. The engine's thread, between two steps."""
        with self._lock:
            key, self._expected = self._expected, None
            scheduler = self._scheduler
            live = scheduler.requests.get(key)
            if live is None or scheduler.running or scheduler.waiting or scheduler.plans_in_flight:
                return
            if live.lead.status is SequenceStatus.RESERVED:
                plan = first_step(live.lead, scheduler.limits.block_size)
                if plan is not None:
                    self._lane.prepare_ahead(plan)

    def launched(self) -> None:
        """Offer to the prefix cache what has come from elsewhere: it takes time that no first step is to wait for."""
        scheduler = self._scheduler
        with self._lock:
            received, scheduler.received = scheduler.received, []
            for sequence in received:
                if sequence.status is SequenceStatus.RUNNING:
                    num_stored = sequence.num_computed_tokens - sequence.num_in_flight
                    scheduler.allocator.cache_computed(sequence, num_stored)
