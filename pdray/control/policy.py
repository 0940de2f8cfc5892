"""The choice of workers for a request: pure functions of a router's knowledge.

Among decode workers with credit the least loaded is taken, where a prompt that is cached there counts as
CACHED_PROMPT_WORTH sequences less: it need not be sent, or, by a worker that prefills too, computed. With it goes the
prefill worker that would be done first: whose queue, and what of this prompt it has not cached, are the fewest tokens.
One whose queue holds more than MAX_QUEUED_BATCHES gets nothing: a lease would only sit idle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pdray.control.credit import covers
from pdray.engine.schedule.demand import Demand
from pdray.wire.lease_messages import Credit

MAX_QUEUED_BATCHES = 2
AMPLE = 2  # times what a request takes: other routers' requests may come first
CACHED_PROMPT_WORTH = {False: 1.0, True: 4.0}  # sequences; by whether the worker prefills too


class DecodeState(NamedTuple):
    """A decode worker as the router knows it.

    Attributes:
        prefills: whether it can prefill by itself (role "both").
        cached_tokens: leading tokens of the request's prompt that its prefix cache holds.
        asked_blocks, asked_places: of leases asked for and not yet answered, which credit does not show.
    """

    worker_id: str
    prefills: bool
    credit: Credit
    num_blocks: int
    asked_blocks: int = 0
    asked_places: int = 0
    cached_tokens: int = 0


class PrefillState(NamedTuple):
    """A prefill worker as the router knows it; queued_tokens includes what it was sent since.

    Attributes:
        batch_tokens: that it computes at once.
        cached_tokens: leading tokens of the request's prompt that its prefix cache holds.
    """

    worker_id: str
    queued_tokens: int
    batch_tokens: int
    cached_tokens: int = 0


class Choice(NamedTuple):
    """Attributes:
    prefill_worker_id: None where the decode worker prefills.
    decode_worker_id: None where the prefill worker's first token ends the request.
    """

    prefill_worker_id: str | None
    decode_worker_id: str | None


def choose(
    demand: Demand,
    decode: Sequence[DecodeState],
    prefill: Sequence[PrefillState],
    pairs: set[tuple[str, str]],
    *,
    local_prefill_max_tokens: int,
) -> Choice | None:
    """The workers for a request, or None if no worker has credit now.

    Args:
        pairs: connected (prefill, decode) ids.
        local_prefill_max_tokens: prompts with at most so many uncached tokens are prefilled by the decode worker.
    """
    for worker in sorted(decode, key=lambda worker: _cost(worker, demand)):
        if not has_credit(worker, demand):
            continue
        if worker.prefills or demand.tokens - worker.cached_tokens <= local_prefill_max_tokens:
            return Choice(None, worker.worker_id)
        first = choose_prefill([p for p in prefill if (p.worker_id, worker.worker_id) in pairs])
        if first is not None:
            return Choice(first, worker.worker_id)
    return None


def choose_prefill(prefill: Sequence[PrefillState]) -> str | None:
    """The prefill worker that would be done first; None if all their queues are too long."""
    open_queues = [p for p in prefill if p.queued_tokens <= MAX_QUEUED_BATCHES * p.batch_tokens]
    first = min(open_queues, key=lambda p: (p.queued_tokens - p.cached_tokens, p.worker_id), default=None)
    return None if first is None else first.worker_id


def has_credit(worker: DecodeState, demand: Demand) -> bool:
    """Whether it can take the request now."""
    return covers(worker.credit, demand.blocks + worker.asked_blocks, demand.places + worker.asked_places)


def may_start_ahead(decode: DecodeState, prefill: PrefillState, demand: Demand) -> bool:
    """Whether a prompt may be computed while its lease is being asked for.

    Only by a prefill worker that has nothing to do: nothing that has a lease waits for it then. Only where the lease
    is as good as granted: a denial makes the work useless, from its beginning until the prefill worker hears of it.
    """
    blocks, places = demand.blocks + decode.asked_blocks, demand.places + decode.asked_places
    return prefill.queued_tokens == 0 and covers(decode.credit, AMPLE * blocks, AMPLE * places)


def _cost(worker: DecodeState, demand: Demand) -> tuple[float, float, str]:
    """Sequences in or on their way into the batch, less what the cache is worth; then share of blocks in use."""
    credit = worker.credit
    sequences = credit.running + credit.waiting + worker.asked_places
    used = 1.0 - (credit.free_blocks - worker.asked_blocks) / max(1, worker.num_blocks)
    cached = CACHED_PROMPT_WORTH[worker.prefills] * min(1.0, worker.cached_tokens / max(1, demand.tokens))
    return sequences - cached, used, worker.worker_id
