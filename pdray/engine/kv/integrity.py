"""Checks that the block accounting adds up, for tests and operators.

All of it at once would hold the engine's lock for half a second at half a million blocks. So it goes in slices, each of
which looks at the state as it is then and relies on nothing that an earlier slice has seen.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np

from pdray.engine.kv.block_pool import CHECK_SLICE
from pdray.engine.schedule.scheduler import Scheduler
from pdray.engine.schedule.sequence import Sequence, SequenceStatus

CHECK_PAUSE_S = 20e-6  # between two slices: who has waited for the lock gets it only if it is free for a moment


def check_integrity(scheduler: Scheduler) -> list[str]:
    """Problems of the scheduler's state; empty if there are none. The caller holds the engine's lock.

    Blocks in use are exactly those of live requests; a block is in two tables only where both hold the same
    prefix; places are counted; queue and batch hold what their statuses say.
    """
    return list(chain.from_iterable(check_in_slices(scheduler)))


def check_in_pauses(scheduler: Scheduler, lock: threading.Lock) -> list[str]:
    """The same, with the engine's lock taken for moments only. Takes a while for a large pool."""
    problems: dict[str, None] = {}
    slices = check_in_slices(scheduler)
    while True:
        with lock:
            found = next(slices, None)
        if found is None:
            return list(problems)
        problems |= dict.fromkeys(found)
        time.sleep(CHECK_PAUSE_S)


def check_in_slices(scheduler: Scheduler) -> Iterator[list[str]]:
    """check_integrity() in slices: the lock is needed for each step of the iteration, and not between two."""
    pool = scheduler.pool
    for first in range(0, pool.num_blocks, CHECK_SLICE):
        yield pool.check_blocks(first, _count_uses(scheduler, first, min(first + CHECK_SLICE, pool.num_blocks)))
    yield from pool.check_cache()
    holders: dict[int, _Holder] = {}
    for sequence in _sequences(scheduler):
        yield [*_check_sharing(scheduler, sequence, holders), *_check_sequence(scheduler, sequence)]
    num_places = sum(request.num_places for request in scheduler.requests.values() if request.has_places)
    if num_places != scheduler.num_places or num_places > scheduler.limits.max_num_seqs:
        yield [f"{scheduler.num_places} places counted, {num_places} in use of {scheduler.limits.max_num_seqs}"]


def _sequences(scheduler: Scheduler) -> list[Sequence]:
    """All sequences that may hold blocks."""
    known = {id(sequence): sequence for request in scheduler.requests.values() for sequence in request.sequences}
    return list((known | {id(sequence): sequence for sequence in scheduler.leaving}).values())


def _count_uses(scheduler: Scheduler, first: int, end: int) -> list[int]:
    """Number of users of each block from first to end. _check_sequence() compares block rows to block tables."""
    sequences = _sequences(scheduler)
    copies = [s.pending_copy.source for s in sequences if s.pending_copy is not None]
    copies += [copy.source for plan in scheduler.plans_in_flight for copy in plan.copies]
    rows = [sequence.block_row[: len(sequence.block_table)] for sequence in sequences]
    blocks = np.concatenate([np.array(copies, dtype=np.int32), *rows])
    uses: list[int] = np.bincount(blocks[(blocks >= first) & (blocks < end)] - first, minlength=end - first).tolist()
    return uses


class _Holder(NamedTuple):
    """A sequence that holds a block, and the index in its table."""

    sequence: Sequence
    position: int

    def holds(self, block: int) -> bool:
        """Whether it still does."""
        table = self.sequence.block_table
        return self.position < len(table) and table[self.position] == block


def _check_sharing(scheduler: Scheduler, sequence: Sequence, holders: dict[int, _Holder]) -> list[str]:
    """Tables that share a block must agree on all tokens up to its end.

    Args:
        holders: of shared blocks seen so far; they may have let go since.
    """
    block_size, tokens = scheduler.limits.block_size, sequence.token_ids
    num_equal: dict[int, int] = {}  # leading tokens known to be those of another sequence, by its id
    problems = []
    for position, block in enumerate(sequence.block_table):
        if not scheduler.pool.is_shared(block):
            continue
        holder = holders.get(block)
        if holder is None or not holder.holds(block):
            holders[block] = _Holder(sequence, position)  # the other user may be a copy that is to be done
            continue
        other, end = holder.sequence, (position + 1) * block_size
        for writer in (sequence, other):
            if end > len(writer.token_ids):
                problems.append(f"block {block} is shared, but request {writer.request.key!r} writes to it")
        start = num_equal.get(id(other), 0)
        if holder.position == position and tokens[start:end] == other.token_ids[start:end]:
            num_equal[id(other)] = end
        else:
            problems.append(f"block {block} stands for 2 different prefixes")
    return problems


def _check_sequence(scheduler: Scheduler, sequence: Sequence) -> list[str]:
    """Status, blocks, queue and batch of one sequence must agree."""
    status = sequence.status
    name = f"completion {sequence.index} of request {sequence.request.key!r} ({status.name})"
    problems = []
    if scheduler.requests.get(sequence.request.key) is sequence.request:
        is_running = any(s is sequence for s in scheduler.running)
        is_queued = any(s is sequence for s in scheduler.waiting)
        owns_queue_entry = sequence.request.forked or sequence is sequence.request.lead
        if is_running != (status is SequenceStatus.RUNNING):
            problems.append(f"{name} is{'' if is_running else ' not'} in the batch")
        if is_queued != (status is SequenceStatus.WAITING and owns_queue_entry):
            problems.append(f"{name} is{'' if is_queued else ' not'} in the queue")
    holds_nothing = status is SequenceStatus.WAITING or (
        status is SequenceStatus.FINISHED and not sequence.num_in_flight
    )
    if holds_nothing and sequence.block_table:
        problems.append(f"{name} holds {len(sequence.block_table)} blocks")
    if sequence.block_row[: len(sequence.block_table)].tolist() != sequence.block_table:
        problems.append(f"{name} has a block row that differs from its block table")
    room = len(sequence.block_table) * scheduler.limits.block_size
    if status is SequenceStatus.RUNNING and not sequence.num_computed_tokens <= min(room, sequence.num_tokens):
        problems.append(f"{name} has computed {sequence.num_computed_tokens} tokens in room for {room}")
    return problems
