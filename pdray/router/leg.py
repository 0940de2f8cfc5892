"""One leg of a request at its router: where it waits, whom it was given to, how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field

from pdray.cluster.admission import Waiting
from pdray.cluster.messages import LegKey
from pdray.cluster.policy import Choice, Demand
from pdray.cluster.request_tracker import Leg
from pdray.router.request import RoutedRequest


@dataclass(slots=True, eq=False)
class RoutedLeg:
    """Attributes:
    leg: which completions, from where, in which attempt.
    entry: its place in the queue, kept while it has a lease.
    choice: who was asked for a lease, or holds it; None while it waits.
    granted: the lease stands.
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

    def demand(self, block_size: int) -> Demand:
        """Blocks for prompt, earlier outputs and one token; a place for each completion; tokens to prefill."""
        num_tokens = len(self.request.output.prompt_token_ids) + len(self.leg.output_token_ids)
        return Demand(-(-(num_tokens + 1) // block_size), len(self.leg.indices), num_tokens)
