"""One leg of a request at its router: which completions it runs, where it stands, and who has it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from pdray.config import Config
from pdray.control.admission import Waiting
from pdray.control.policy import Choice
from pdray.engine.kv.block_pool import hash_blocks, salted, short_hash
from pdray.engine.schedule.demand import Demand, lease_demand
from pdray.wire.lease_messages import LeaseRequest
from pdray.wire.message import LegKey
from pdray.wire.prefill_messages import FirstTokens, PrefillRequest

if TYPE_CHECKING:
    from pdray.router.request import Request


class LegState(StrEnum):
    """Where a leg stands.

    RESTING: after a loss, before it may wait again. WAITING: in the queue. ASKED: for a lease; not answered yet, while
    its prefill worker may be computing it ahead.
    FILLING: its prefill worker was told to begin, and the decode worker has not shown a token yet. RUNNING: only the
    decode worker matters.
    """

    RESTING = "resting"
    WAITING = "waiting"
    ASKED = "asked"
    FILLING = "filling"
    RUNNING = "running"


@dataclass(slots=True, eq=False)
class Leg:
    """Attributes:
    indices: completions that it runs: all of a request's on a first attempt.
    output_token_ids: what its one completion had produced before; empty unless it replays a single one.
    alone: it is under suspicion: its workers compute its first steps alone.
    num_losses: legs before it that were lost, each going on where the one before had been.
    entry: its place in the queue, kept while it has a lease.
    choice: who was asked for a lease, or holds it; None while it waits.
    asked_at: when a lease was last asked for; 0 before that.
    is_ahead: its prefill worker was told to begin before the lease was granted.
    first_tokens: that came before the lease was granted; nobody else sees them before that.
    first_tokens_at: when they came.
    """

    request: Request
    key: LegKey
    indices: tuple[int, ...]
    output_token_ids: tuple[int, ...] = ()
    alone: bool = False
    num_losses: int = 0
    state: LegState = LegState.WAITING
    entry: Waiting[Leg] = field(init=False)
    choice: Choice | None = None
    asked_at: float = 0.0
    is_ahead: bool = False
    first_tokens: FirstTokens | None = None
    first_tokens_at: float = 0.0
    _prefix_hashes: list[int] | None = field(default=None, init=False)

    @property
    def granted(self) -> bool:
        """The lease stands, or none is needed and its prefill worker was told to begin."""
        return self.state is LegState.FILLING or self.state is LegState.RUNNING

    @property
    def ends_with_first_token(self) -> bool:
        """Whether each of its completions ends with the next token, whatever it is: nobody has to decode."""
        return self._max_tokens - len(self.output_token_ids) == 1

    def depends_on(self, worker_id: str) -> bool:
        """Whether it is lost with this worker."""
        if self.choice is None:
            return False
        prefill_id, decode_id = self.choice
        return decode_id == worker_id or (self.is_prefilled and prefill_id == worker_id)

    @property
    def is_prefilled(self) -> bool:
        """Its prefill worker was told to begin, and still matters."""
        return self.state is LegState.FILLING or (self.state is LegState.ASKED and self.is_ahead)

    def lease_wait(self, now: float) -> float:
        """Seconds for which the lease, granted now, has held the leg up."""
        if not self.is_ahead:
            return now - self.asked_at
        return 0.0 if self.first_tokens is None else now - self.first_tokens_at

    def demand(self, config: Config) -> Demand:
        """What it takes of its workers; the decode worker's own formula."""
        num_prompt_tokens = len(self.request.output.prompt_token_ids)
        return lease_demand(
            num_prompt_tokens + len(self.output_token_ids),
            num_prompt_tokens + self._max_tokens,
            len(self.indices),
            block_size=config.block_size,
            headroom_tokens=config.decode_headroom_tokens,
        )

    def prefix_hashes(self, config: Config) -> list[int]:
        """Short hashes of its full blocks, in order; empty without prefix caching. Made where a choice depends on them.

        The last token is always computed, so a block that it completes is of no use.
        """
        if self._prefix_hashes is None:
            self._prefix_hashes = []
            if config.enable_prefix_caching:
                token_ids = [*self.request.output.prompt_token_ids, *self.output_token_ids]
                hashes = hash_blocks(token_ids[:-1], config.block_size, salted(self.request.params.cache_salt))
                self._prefix_hashes = [short_hash(each) for each in hashes]
        return self._prefix_hashes

    def lease_request(self, prefill_worker_id: str | None) -> LeaseRequest:
        """What its decode worker is asked."""
        return LeaseRequest(
            *self.key,
            self.request.output.prompt_token_ids,
            self.request.params,
            list(self.indices),
            list(self.output_token_ids),
            prefill_worker_id,
            self.request.priority,
            self.alone,
            self.request.whole,
        )

    def prefill_request(
        self, decode_worker_id: str | None, epoch: int, num_cached_tokens: int, *, has_lease: bool = True
    ) -> PrefillRequest:
        """What its prefill worker is told to do. The arguments are PrefillRequest's."""
        return PrefillRequest(
            *self.key,
            self.request.output.prompt_token_ids,
            self.request.params,
            list(self.indices),
            list(self.output_token_ids),
            decode_worker_id,
            epoch,
            num_cached_tokens,
            self.request.priority,
            self.alone,
            has_lease,
        )

    @property
    def _max_tokens(self) -> int:
        max_tokens = self.request.params.max_tokens
        assert max_tokens is not None, "see complete_params()"
        return max_tokens
