"""The first step of a sequence whose KV comes from elsewhere, in an engine that has nothing else to do.

Nothing runs before it, behind which the host could do its part: all of it would be seen between the first token and the
second. So its inputs are prepared while the KV is under way, but for the first token, which the step takes from where a
step before it would have left it (``Lane.sampled``). What happens otherwise in between makes them void.

And code that has not run for as long as a prompt takes needs two to four times its time. So while a sequence is near,
the engine's thread sleeps for moments only, and goes through what will be left to do.
"""

from __future__ import annotations

import logging
import threading
import time
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


logger = logging.getLogger(__name__)

NEAR_S = 0.25  # since the last news of a sequence's KV


class _Prepared(NamedTuple):
    """Inputs of a step that is not planned yet.

    Attributes:
        chunk: the step's only one. block_row: its sequence's, as the inputs hold it.
        place: where the inputs were padded to run.
    """

    chunk: Chunk
    block_row: np.ndarray[Any, Any]
    place: Place
    inputs: StepInputs

    def fits(self, plan: StepPlan, place: Place) -> bool:
        """Whether these are the plan's inputs, but for its token."""
        chunk = self.chunk._replace(late_row=None)
        return (
            plan.chunks == [chunk]
            and plan.is_decode
            and not plan.copies
            and chunk.sequence.block_row is self.block_row
            and place == self.place
        )


class Ahead:
    """The inputs that a lane has prepared before their plan, if any. Guarded by the engine's lock."""

    def __init__(self) -> None:
        self._prepared: _Prepared | None = None

    @property
    def sequence(self) -> Sequence | None:
        """Whose step is prepared, as long as that may still come; None: nobody's."""
        sequence = None if self._prepared is None else self._prepared.chunk.sequence
        return sequence if sequence is not None and sequence.status is SequenceStatus.RESERVED else None

    def prepare(self, lane: Lane, plan: StepPlan) -> None:
        """Make lane.prepare() of this plan, if it is called with no other before, a matter of its token."""
        (chunk,), inputs = plan.chunks, lane.prepare(plan)
        self._prepared = _Prepared(chunk, chunk.sequence.block_row, lane.place, inputs)

    def take(self, lane: Lane, plan: StepPlan) -> StepInputs | None:
        """The plan's inputs if they were prepared; nothing is prepared from now on."""
        prepared, self._prepared = self._prepared, None
        if prepared is None:
            return None
        if not prepared.fits(plan, lane.place):
            lane.take_back()
            return None
        lane.give_token(prepared.chunk.sequence.token_ids[prepared.chunk.start])
        return prepared.inputs

    def drop(self) -> None:
        """The lane's buffers hold something else now."""
        self._prepared = None


def first_step(sequence: Sequence, block_size: int) -> StepPlan | None:
    """The plan of the step behind the first token of a sequence that holds blocks for its prompt.

    It is for Ahead.prepare() alone: nothing is marked as planned. None where more than the token is not known yet:
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
    """Knows which sequence is expected. lock: the engine's, which guards scheduler and lane.

    Attributes:
        stays_awake: while a step is near. Not where the CPU computes: others can use it meanwhile.
    """

    def __init__(self, scheduler: Scheduler, lane: Lane, lock: threading.Lock) -> None:
        self._scheduler = scheduler
        self._lane = lane
        self._lock = lock
        self._expected: Hashable = None
        self._near_until = 0.0
        self.stays_awake = lane.pool.device.type == "cuda"

    @property
    def _is_idle(self) -> bool:
        scheduler = self._scheduler
        return not (scheduler.running or scheduler.waiting or scheduler.plans_in_flight)

    def _reserved(self, key: Hashable) -> Sequence | None:
        """The leading sequence of a request that holds blocks and has not begun."""
        live = self._scheduler.requests.get(key)
        return None if live is None or live.lead.status is not SequenceStatus.RESERVED else live.lead

    def expect(self, key: Hashable) -> None:
        """This reservation's KV is under way, or some more of it has come; of several the first one counts."""
        with self._lock:
            self._near_until = time.perf_counter() + NEAR_S
            if self._lane.ahead.sequence is None and self._reserved(self._expected) is None:
                self._expected = key

    def prepare(self) -> None:
        """Prepare the expected step if nothing is to be computed before it. The engine's thread, between two steps."""
        with self._lock:
            key, self._expected = self._expected, None
            sequence = self._reserved(key)
            plan = first_step(sequence, self._scheduler.limits.block_size) if sequence and self._is_idle else None
            if plan is None:
                return
            try:
                self._lane.ahead.prepare(self._lane, plan)
            except Exception:  # the step itself will fail for it, and end what it concerns
                logger.exception("the first step of %s could not be prepared", key)

    def near_s(self) -> float:
        """Seconds for which a first step is near, if there is no more news of it; 0: none is."""
        return max(0.0, self._near_until - time.perf_counter())

    def keep_warm(self) -> bool:
        """Do nothing, by way of what comes before the launch of an expected step. The engine's thread.

        Returns:
            Whether one is near: then call again after a moment.
        """
        with self._lock:
            now = time.perf_counter()
            if not self.stays_awake or now > self._near_until:
                return False
            if not self._is_idle:
                return True  # it has come: the engine will be woken
            if self._lane.ahead.sequence is None:
                return False
            self._scheduler.schedule(now)
        self._lane.give_token(0)
        return True

    def launched(self) -> None:
        """Offer to the prefix cache what has come from elsewhere: it takes time that no first step is to wait for."""
        scheduler = self._scheduler
        if not scheduler.received:
            return
        with self._lock:
            received, scheduler.received = scheduler.received, []
            for sequence in received:
                if sequence.status is SequenceStatus.RUNNING:
                    num_stored = sequence.num_computed_tokens - sequence.num_in_flight
                    scheduler.allocator.cache_computed(sequence, num_stored)
