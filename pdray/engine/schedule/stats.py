"""The engine's state between two steps, from its scheduler's."""

from __future__ import annotations

from pdray.engine.request import EngineRoom, EngineStats
from pdray.engine.schedule.bookkeeping import Bookkeeper
from pdray.engine.schedule.scheduler import Scheduler
from pdray.engine.schedule.sequence import SequenceStatus


def engine_room(scheduler: Scheduler) -> EngineRoom:
    """Takes no lock, and no time for each sequence of the batch: it is asked for with every lease and every step.

    While a step is planned the numbers may be of different moments; those after it is booked are not.
    """
    waiting = tuple(scheduler.waiting)
    return EngineRoom(
        free_blocks=scheduler.pool.num_free,
        free_places=scheduler.limits.max_num_seqs - scheduler.num_places,
        running=len(scheduler.running),
        waiting=sum(1 if s.request.forked else len(s.request.sequences) for s in waiting),
        preempted=sum(s.preempted for s in waiting),
    )


def engine_stats(bookkeeper: Bookkeeper, num_blocks: int, num_steps: int, num_pipelined_steps: int) -> EngineStats:
    """Under the engine's lock."""
    scheduler = bookkeeper.scheduler
    room = engine_room(scheduler)
    prefilling = [s for s in scheduler.running if s.num_uncomputed_tokens > 1]
    counters = scheduler.counters
    return EngineStats(
        num_blocks=num_blocks,
        **room._asdict(),
        reserved=sum(r.lead.status is SequenceStatus.RESERVED for r in scheduler.requests.values()),
        queued_tokens=sum(s.num_uncomputed_tokens for s in (*prefilling, *scheduler.waiting)),
        num_steps=num_steps,
        num_preemptions=counters.num_preemptions,
        prefix_cache_queries=counters.prefix_cache_queries,
        prefix_cache_hits=counters.prefix_cache_hits,
        num_prompt_tokens=bookkeeper.num_prompt_tokens,
        num_output_tokens=bookkeeper.num_output_tokens,
        num_pipelined_steps=num_pipelined_steps,
    )
