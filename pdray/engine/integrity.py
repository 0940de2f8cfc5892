"""Does the block accounting add up? For tests, and for operators who suspect that it does not."""

from __future__ import annotations

from collections import Counter, defaultdict

from pdray.engine.scheduler import Scheduler
from pdray.engine.sequence import Sequence, SequenceStatus


def check_integrity(scheduler: Scheduler) -> list[str]:
    """What is wrong with the scheduler's state; empty if nothing is. The caller holds the engine's lock.

    Blocks in use are exactly those of live requests; a block is in two tables only where both hold the same
    prefix; places are counted; queue and batch hold what their statuses say.
    """
    live = list(scheduler.requests.values())
    known = {id(sequence): sequence for request in live for sequence in request.sequences}
    sequences = list((known | {id(sequence): sequence for sequence in scheduler.leaving}).values())
    uses: Counter[int] = Counter()
    for sequence in sequences:
        uses.update(sequence.block_table)
        if sequence.pending_copy is not None:
            uses[sequence.pending_copy.source] += 1
    for plan in scheduler.plans_in_flight:
        uses.update(copy.source for copy in plan.copies)
    problems = scheduler.pool.check(uses)
    problems += _check_sharing(sequences, scheduler.limits.block_size)
    for sequence in sequences:
        problems += _check_sequence(scheduler, sequence)
    num_places = sum(request.num_places for request in live if request.has_places)
    if num_places != scheduler.num_places or num_places > scheduler.limits.max_num_seqs:
        problems.append(
            f"{scheduler.num_places} places counted, {num_places} in use of {scheduler.limits.max_num_seqs}"
        )
    return problems


def _check_sharing(sequences: list[Sequence], block_size: int) -> list[str]:
    """Tables that share a block must agree on all tokens up to its end."""
    prefixes: dict[int, set[tuple[int, ...]]] = defaultdict(set)
    counts = Counter(block for sequence in sequences for block in sequence.block_table)
    problems = []
    for sequence in sequences:
        for i, block in enumerate(sequence.block_table):
            if counts[block] > 1:
                end = (i + 1) * block_size
                if end > len(sequence.token_ids):
                    problems.append(f"block {block} is shared, but request {sequence.request.key!r} writes to it")
                prefixes[block].add(tuple(sequence.token_ids[:end]))
    return problems + [f"block {b} stands for {len(p)} different prefixes" for b, p in prefixes.items() if len(p) > 1]


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
