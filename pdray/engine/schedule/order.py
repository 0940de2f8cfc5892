"""Orders of the batch and the queue, what is queued, and the condition for going on while a token is pending."""

from __future__ import annotations

import enum
from itertools import islice

from pdray.engine.schedule.sequence import Sequence

MAX_COUNTED = 64  # queued sequences; more make no difference to the next step


def batch_order(sequence: Sequence) -> tuple[int, int, int]:
    """Rank in the batch; the last is preempted first."""
    return sequence.order


def queue_order(sequence: Sequence) -> tuple[bool, tuple[int, int, int]]:
    """Rank in the queue: preempted ones, then by priority, then by arrival.

    Preempted ones hold places: behind a request that waits for places they would wait for each other.
    """
    return not sequence.preempted, sequence.order


def num_known_tokens(sequence: Sequence) -> int:
    """Tokens of prompt and output that the host knows."""
    return len(sequence.token_ids)


def may_go_on(sequence: Sequence) -> bool:
    """Whether its next token can be computed now, also while the one before it is pending."""
    live = sequence.request
    if not live.may_draw:
        return False
    if not sequence.num_pending:
        return True
    has_forks_to_wait_for = not live.forked and len(live.sequences) > 1
    will_end = sequence.num_tokens >= sequence.max_total_tokens or live.prefill_only
    return not (will_end or has_forks_to_wait_for)


def num_queued_tokens(waiting: list[Sequence], num_places: int, room: int) -> int:
    """Tokens to compute of queued sequences, without those that must wait for others to end.

    Args:
        num_places: free ones in the batch. room: tokens of free blocks.
    """
    return min(room, sum(s.num_uncomputed_tokens for s in islice(waiting, min(num_places, MAX_COUNTED))))


def may_decode(sequence: Sequence, lane: enum.Enum) -> bool:
    """Whether a step of that lane may compute its next token."""
    return sequence.num_uncomputed_tokens == 1 and may_go_on(sequence) and is_free_for(sequence, lane)


def may_continue(sequence: Sequence, lane: enum.Enum) -> bool:
    """Whether a step of that lane may compute more of its prompt."""
    return sequence.num_uncomputed_tokens > 1 and sequence.request.may_draw and is_free_for(sequence, lane)


def is_free_for(sequence: Sequence, lane: enum.Enum) -> bool:
    """Whether a step of that lane may compute it: what another lane computes of it is not there before it is booked."""
    return not sequence.num_in_flight or sequence.lane is lane
