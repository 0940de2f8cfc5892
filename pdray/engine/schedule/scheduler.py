"""Continuous batching: chooses the tokens that the next step computes.

Decoding sequences come first, one token each; what is left of the token budget goes to prompts, in chunks, in the
same forward pass (Agrawal et al. 2024, "Sarathi-Serve"). All blocks of a prompt are allocated when it is admitted, so
only decoding can run out of them; then the youngest sequence of the lowest priority gives its blocks back and is
computed again later, from prompt and outputs. Pure: no tensors, no clock, no lock.

A step may be planned while the one before it is in flight: its tokens are pending then, and taken for tokens that end
nothing. Where that is wrong, the step computes one token too many, which is dropped. Steps of two lanes may run beside
each other: a sequence changes lanes only when none of its steps is in flight.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Hashable
from concurrent.futures import Future
from itertools import count

from pdray.engine.grammar.grammar import Grammar
from pdray.engine.kv.allocator import KVAllocator
from pdray.engine.kv.block_pool import BlockPool
from pdray.engine.request import EngineRequest, RequestUpdate, Reservation
from pdray.engine.schedule.counters import Counters
from pdray.engine.schedule.limits import EngineLimits
from pdray.engine.schedule.order import batch_order, may_continue, may_decode, num_known_tokens, queue_order
from pdray.engine.schedule.plan import EVERYTHING, Share, StepPlan
from pdray.engine.schedule.refusals import refuse
from pdray.engine.schedule.sequence import LiveRequest, Sequence, SequenceStatus
from pdray.engine.schedule.token_budget import FixedBudget, TokenBudget, tokens_beside
from pdray.engine.schedule.turns import Turn, Turns
from pdray.errors import InvalidRequestError
from pdray.outputs import SampledToken


class Scheduler:
    """All live requests, the queue, the batch and the block pool. Callers hold the engine's lock.

    Attributes:
        budget: of each step; default: max_num_batched_tokens.
        requests: live ones by key; a released one is no longer here, though a step may still use it.
        waiting: queued sequences, next one first. Of a request that is not forked only the first sequence is here.
        running: the batch, in batch_order.
        plans_in_flight: steps planned and not booked, oldest first; at most two of each lane.
        leaving: finished sequences whose blocks a step in flight still writes to.
        num_places: sequences counted against max_num_seqs. turns: keeps requests apart that are to be computed alone.
        is_short: decodes need more blocks than there are, and wait until no step is in flight.
        updates: news that no step has produced. compiling: requests whose grammar is not there yet.
        received: sequences that go on from KV that has arrived, and is not offered to the prefix cache yet.
    """

    def __init__(
        self,
        limits: EngineLimits,
        pool: BlockPool,
        budget: TokenBudget | None = None,
        allocator: KVAllocator | None = None,
    ) -> None:
        self.limits = limits
        self.budget = budget or FixedBudget(limits.max_num_batched_tokens)
        self.pool = pool
        self.allocator = allocator or KVAllocator(limits, pool)
        self.requests: dict[Hashable, LiveRequest] = {}
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.plans_in_flight: deque[StepPlan] = deque()
        self.leaving: list[Sequence] = []
        self.num_places = 0
        self.turns, self.is_short = Turns(), False
        self.updates: list[RequestUpdate] = []
        self.compiling: list[LiveRequest] = []
        self.received: list[Sequence] = []
        self.counters = Counters()
        self._arrivals = count()

    # requests

    def prepare(self, request: EngineRequest, *, reserved: bool, grammar: Future[Grammar] | None = None) -> LiveRequest:
        """Check a request and hash its prompt. Thread-safe: needs no lock.

        Args:
            grammar: of its structured outputs. Nothing of it is computed before that is compiled.

        Raises:
            InvalidRequestError: it can never be served.
        """
        self.limits.check(request, reserved)
        limits = self.limits
        live = LiveRequest(
            request, next(self._arrivals), limits.max_total_tokens(request), limits.end_token_ids(request), grammar
        )
        self.allocator.hash_prompt(live.lead)
        return live

    def add(self, live: LiveRequest, now: float) -> None:
        """Queue a prepared request."""
        self._enter(live)
        live.queued_at = now
        insort(self.waiting, live.lead, key=queue_order)

    def reserve(self, live: LiveRequest) -> Reservation | None:
        """Blocks, head-room and places for every completion of a prepared request; None if not possible now."""
        lead = live.lead
        if any(s.preempted for s in self.waiting) or not self._has_places(live):
            return None
        if not self.allocator.allocate(self.allocator.owners(lead), self.limits.num_reserved_tokens(live.request)):
            return None
        self._enter(live)
        self._take_places(live)
        self._count_prefix_hits(live)
        for sequence in live.sequences:
            sequence.status = SequenceStatus.RESERVED
        return self.allocator.reservation(lead)

    def lend(self, key: Hashable) -> Reservation:
        """A reservation's blocks, for another to compute its prompt in: one of them at least is not cached."""
        live = self._reserved(key)
        self.allocator.leave_last_block_to_compute(live)
        return self.allocator.reservation(live.lead)

    def start_prefill(self, key: Hashable, now: float) -> None:
        """Compute a reserved request here."""
        live = self._reserved(key)
        if live.refusal is not None:
            return self.updates.append(refuse(self, key, live.refusal))
        self.allocator.leave_last_block_to_compute(live)
        live.queued_at = now
        self._run(live.lead)

    def start_decode(self, key: Hashable, tokens: list[SampledToken], now: float) -> None:
        """The reserved blocks hold the prompt's KV; go on from these first tokens, one for each index."""
        live = self._reserved(key)
        by_index, wanted = {token.index: token for token in tokens}, [s.index for s in live.sequences]
        if by_index.keys() != set(wanted) or len(by_index) != len(tokens):
            raise ValueError(f"request {key!r} starts with tokens of indices {[t.index for t in tokens]}, not {wanted}")
        if live.refusal is not None:
            return self.updates.append(refuse(self, key, live.refusal))
        live.started_at = now
        live.scores = None  # told by whoever has computed the prompt
        live.lead.num_computed_tokens = len(live.lead.token_ids)
        self.received.append(live.lead)
        if len(tokens) > 1 or tokens[0].finish_reason is not None:  # else that can wait: see FirstSteps.launched()
            self.allocator.cache_computed(live.lead, live.lead.num_computed_tokens)
        self.allocator.fork(live)
        for sequence in live.sequences:
            token = by_index[sequence.index]
            sequence.append(token.token_id)
            if token.finish_reason is None:
                self._run(sequence)
            else:
                self.finish(sequence)
        if live.num_places == 0:
            del self.requests[key]
            self.updates.append(RequestUpdate(key, finished=True))

    def release(self, key: Hashable) -> None:
        """End a request in any state. What steps in flight write to returns when they are booked."""
        live = self.requests.pop(key, None)
        if live is None:
            return
        self.waiting = [s for s in self.waiting if s.request is not live]
        self.running = [s for s in self.running if s.request is not live]
        for sequence in live.sequences:
            self.finish(sequence)

    def finish(self, sequence: Sequence, *, hold_blocks: bool = False) -> None:
        """The sequence gives up its place, and its blocks unless they are to be held: at once, or with the last step in
        flight that computes it."""
        if sequence.status is SequenceStatus.FINISHED:
            return
        if sequence.status is SequenceStatus.RUNNING:
            self.running = [s for s in self.running if s is not sequence]
        if sequence.request.has_places and sequence.status is not SequenceStatus.HELD:
            self.num_places -= 1
        if hold_blocks:
            sequence.status = SequenceStatus.HELD
            return
        sequence.status = SequenceStatus.FINISHED
        if sequence.num_in_flight:
            self.leaving.append(sequence)
        else:
            self.allocator.free(sequence)
            sequence.request.let_go()

    # the step

    def schedule(self, now: float, share: Share = EVERYTHING) -> StepPlan:
        """Choose the next step's work: at most max_num_batched_tokens tokens of max_num_seqs sequences.

        Returns a plan in flight; without chunks if there is nothing to do before a step in flight is booked."""
        assert sum(plan.lane is share.lane for plan in self.plans_in_flight) < 2, "two steps are in flight"
        plan = StepPlan(lane=share.lane)
        turns = self.turns.choose(self.running, self.waiting, [plan.alone for plan in self.plans_in_flight])
        for turn in turns:
            self.turns.last = turn
            # One that is to be alone and cannot begin waits for blocks, which those behind it must not take meanwhile.
            plan = self._plan(turn, share, may_overtake=turn is turns[0])
            if plan.chunks:
                break
        for chunk in plan.chunks:
            chunk.sequence.request.note_scheduled(now)
        plan.planned_at = now
        if plan.chunks:
            self.plans_in_flight.append(plan)
        return plan

    def planned_keys(self) -> list[Hashable]:
        """Requests that the last schedule() may have looked at."""
        sequences = self.turns.of((*self.running, *self.waiting), self.turns.last)
        return list(dict.fromkeys(s.request.key for s in sequences))

    def _plan(self, turn: Turn, share: Share, *, may_overtake: bool) -> StepPlan:
        """A step of one request alone, or of all others.

        Args:
            may_overtake: admit also those that are queued behind one that is to be alone.
        """
        plan = StepPlan(alone=turn, lane=share.lane)
        decoding = [s for s in self.turns.of(self.running, turn) if share.decodes and may_decode(s, share.lane)]
        if share.decodes:
            self.is_short = sum(self.allocator.needs_block(s) for s in decoding) > self.pool.num_free
        if self.plans_in_flight and self.is_short:
            return plan  # to preempt is to compute again, from tokens that are all known
        num_preemptions = self.counters.num_preemptions
        ready = [s for s in decoding if s.status is SequenceStatus.RUNNING and self._make_room(s)]
        # The longest first: attention takes them in this order, and a long one that begins last ends long after all.
        for sequence in sorted(ready, key=num_known_tokens, reverse=True):
            plan.add(sequence, 1)
        # A sequence that gave blocks back in this step would only take them again, unless no other can use them.
        may_admit = self.counters.num_preemptions == num_preemptions or not plan.chunks
        self._schedule_prefills(plan, share, admit=may_admit, may_overtake=may_overtake)
        return plan

    def discard(self, plan: StepPlan) -> None:
        """The last step planned will never be booked; its requests were released."""
        assert self.plans_in_flight.pop() is plan, "a later step is in flight"
        self.pool.free([copy.source for copy in plan.copies])
        for chunk in plan.chunks:
            for draw in chunk.draws:
                draw.sequence.num_pending -= 1
            self.booked(chunk.sequence)

    def booked(self, sequence: Sequence) -> None:
        sequence.num_in_flight -= 1  # one of the steps that compute it is through
        if sequence.status is SequenceStatus.FINISHED and not sequence.num_in_flight:
            self.leaving.remove(sequence)
            self.allocator.free(sequence)
            sequence.request.let_go()

    def _schedule_prefills(self, plan: StepPlan, share: Share, admit: bool, may_overtake: bool) -> None:
        """Spend what is left of the token budget on prompts: those begun, then, if ``admit``, queued ones."""
        begun = [s for s in self.turns.of(self.running, plan.alone) if may_continue(s, plan.lane)]
        budget = tokens_beside(self, plan, begun, share) if begun or self.waiting else 0
        most = len(plan.chunks) + (budget if share.prompts is None else share.prompts)
        for sequence in begun:
            if plan.num_tokens < budget and len(plan.chunks) < most:
                plan.add(sequence, min(budget - plan.num_tokens, sequence.num_uncomputed_tokens))
        while admit and plan.num_tokens < budget and len(plan.chunks) < most:
            queue = [s for s in self.waiting if s.request.may_draw] if self.compiling else self.waiting
            first = self.turns.next_of(queue, plan.alone, may_overtake=may_overtake)
            if first is None or not self._admit(first):
                break
            self.waiting.remove(first)
            plan.add(first, min(budget - plan.num_tokens, first.num_uncomputed_tokens))

    def _make_room(self, sequence: Sequence) -> bool:
        """A block for the token to be computed, from others if need be. False if the sequence itself was preempted."""
        if not self.allocator.needs_block(sequence):
            return True
        while not self.allocator.grow(sequence):
            victim = next(s for s in reversed(self.running) if not s.request.prefill_only)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        owners = self.allocator.owners(sequence)
        for owner in owners:
            self.allocator.free(owner)
            owner.status = SequenceStatus.WAITING
        self.running.remove(sequence)
        sequence.preempted = True
        insort(self.waiting, sequence, key=queue_order)
        self.counters = self.counters._replace(num_preemptions=self.counters.num_preemptions + 1)

    def _admit(self, sequence: Sequence) -> bool:
        """Move a queued sequence into the batch if there are places and blocks; its caller takes it off the queue.

        One block is left for each sequence that may grow, so that admission is not undone by the next steps.
        """
        live = sequence.request
        if not live.has_places and not self._has_places(live):
            return False
        owners = self.allocator.owners(sequence)
        margin = sum(not s.request.prefill_only for s in self.running)
        if not self.allocator.allocate(owners, len(sequence.token_ids), keep_free=margin):
            return False
        self._count_prefix_hits(live)
        if not live.has_places:
            self._take_places(live)
        sequence.preempted = False
        self._run(sequence)
        return True

    def _run(self, sequence: Sequence) -> None:
        """Join the batch. The other sequences of a request that is not forked wait for the first one."""
        if not sequence.request.forked:
            for other in sequence.request.sequences[1:]:
                other.status = SequenceStatus.FORKING
        sequence.status = SequenceStatus.RUNNING
        insort(self.running, sequence, key=batch_order)

    def fork(self, live: LiveRequest) -> None:
        """The first sequence has computed the prompt: the others join the batch."""
        self.allocator.fork(live)
        for sequence in live.sequences[1:]:
            self._run(sequence)

    # accounts

    def _enter(self, live: LiveRequest) -> None:
        if live.key in self.requests:
            raise InvalidRequestError(f"request key {live.key!r} is in use")
        self.allocator.accept(live)
        self.requests[live.key] = live
        self.turns.add(live)
        if not live.may_draw:
            self.compiling.append(live)

    def _reserved(self, key: Hashable) -> LiveRequest:
        live = self.requests.get(key)
        if live is None or live.lead.status is not SequenceStatus.RESERVED:
            raise KeyError(f"request {key!r} is not reserved")
        return live

    def _has_places(self, live: LiveRequest) -> bool:
        return self.num_places + len(live.sequences) <= self.limits.max_num_seqs

    def _take_places(self, live: LiveRequest) -> None:
        live.has_places = True
        self.num_places += len(live.sequences)

    def _count_prefix_hits(self, live: LiveRequest) -> None:
        if live.num_cached_tokens is None:
            live.num_cached_tokens = live.lead.num_computed_tokens
            queries = self.counters.prefix_cache_queries + len(live.lead.token_ids)
            hits = self.counters.prefix_cache_hits + live.num_cached_tokens
            self.counters = self.counters._replace(prefix_cache_queries=queries, prefix_cache_hits=hits)
