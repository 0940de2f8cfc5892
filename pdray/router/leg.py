"""One leg of a request at its router: where it waits, whom it was given to, how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field

from pdray.config import Config
from pdray.control.admission import Waiting
from pdray.control.policy import Choice
from pdray.control.request_tracker import Leg
from pdray.engine.schedule.demand import Demand, lease_demand
from pdray.router.request import RoutedRequest
from pdray.wire.message import LegKey


@dataclass(slots=True, eq=False)
class RoutedLeg:
    """Attributes:
    leg: which completions, from where, in which attempt.
    entry: its place in the queue, kept while it has a lease.
    choice: who was asked for a lease, or holds it; None while it waits.
    granted: the lease stands, or none is needed and its prefill worker was told to begin.
    prefix_hashes: short hashes of its full blocks, in order; empty without prefix caching.
    filling: its prefill worker was told to begin, and the decode worker has not shown a token yet.
    alone: it is under suspicion: its workers compute its first steps alone.
    num_losses: legs before it that were lost, each going on where the one before had been.
    """

    request: RoutedRequest
    leg: Leg
    entry: Waiting[RoutedLeg] = field(init=False)
    choice: Choice | None = None
    asked_at: float = 0.0
    granted: bool = False
    filling: bool = False
    prefix_hashes: list[int] = field(default_factory=list)
    alone: bool = False
    num_losses: int = 0

    @property
    def key(self) -> LegKey:
        return self.leg.key

    @property
    def ends_with_first_token(self) -> bool:
        """Whether each of its completions ends with the next token, whatever it is: nobody has to decode."""
        return self._max_tokens - len(self.leg.output_token_ids) == 1

    def demand(self, config: Config) -> Demand:
        """What it takes of its workers; the decode worker's own formula."""
        num_prompt_tokens = len(self.request.output.prompt_token_ids)
        return lease_demand(
            num_prompt_tokens + len(self.leg.output_token_ids),
            num_prompt_tokens + self._max_tokens,
            len(self.leg.indices),
            block_size=config.block_size,
            headroom_tokens=config.decode_headroom_tokens,
        )

    @property
    def _max_tokens(self) -> int:
        max_tokens = self.request.params.max_tokens
        assert max_tokens is not None, "see complete_params()"
        return max_tokens
