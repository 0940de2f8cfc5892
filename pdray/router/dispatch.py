"""Gives every leg a lease: who waits, whom to ask, and what a lease that ends leaves behind.

The queue is strict, but for legs that no connected worker is large enough for: they step aside, and are refused once
every worker is there and none is. A leg that ends with its first token needs no decode worker, and so no lease.

What becomes of a request is its caller's to decide: what cannot go on is returned. Pure: time is passed in, effects
are appended to `out`. Single-threaded.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import NamedTuple

from pdray.config import Config
from pdray.control.admission import AdmissionQueue
from pdray.control.effects import Send
from pdray.control.losses import Loss
from pdray.errors import InvalidRequestError, PdrayError, RequestFailedError
from pdray.router.effects import Granted, RouterEffect, TickAt
from pdray.router.leg import Leg, LegState
from pdray.router.link import WorkerLink
from pdray.router.placement import Placement
from pdray.router.workers import Workers
from pdray.wire.lease_messages import CloseLease, EndCompletion, LeaseDenied, LeaseGranted, RenewLeases
from pdray.wire.message import LegKey
from pdray.wire.messages import AnyMessage
from pdray.wire.peers import Role
from pdray.wire.prefill_messages import CancelPrefill, LeaseConfirmed, Ping

WORKER_ROLES = (Role.PREFILL, Role.DECODE, Role.BOTH)


class Refused(NamedTuple):
    """A leg that will never get a lease."""

    leg: Leg
    error: PdrayError


class Dispatch:
    """See the module.

    Attributes:
        legs: every leg that has entered and was not closed.
    """

    def __init__(self, config: Config, workers: Workers, out: list[RouterEffect]) -> None:
        self.legs: dict[LegKey, Leg] = {}
        self.queue: AdmissionQueue[Leg] = AdmissionQueue(config.max_queue_size, config.max_queue_wait_s)
        self._config = config
        self._workers = workers
        self._out = out
        self._placement = Placement(config, workers)
        self._resting: list[tuple[float, LegKey]] = []  # a heap, by when they may wait again

    # into the queue and out of it

    def enter(self, now: float, leg: Leg) -> None:
        """Take a new request's leg.

        Raises:
            InvalidRequestError: no worker is large enough for it.
            QueueFullError: nobody has credit for it, and it may not wait.
        """
        if (error := self._placement.refusal(leg)) is not None:
            raise error
        leg.entry = self.queue.ticket(leg.request.arrival, leg.request.priority)
        if len(self.queue) or not self._ask(now, leg):
            self.queue.push(now, leg.entry, leg)
        self.legs[leg.key] = leg

    def enter_again(self, now: float, leg: Leg, predecessor: Leg, delay_s: float) -> None:
        """Take the leg that goes on where a lost one was: in its predecessor's place, and never refused."""
        leg.entry = self.queue.ticket(now, leg.request.priority, order=predecessor.entry.order)
        self.legs[leg.key] = leg
        if delay_s:
            leg.state = LegState.RESTING
            heapq.heappush(self._resting, (now + delay_s, leg.key))
            self._out.append(TickAt(now + delay_s))
        else:
            self.queue.push_back(leg.entry, leg)

    def wake(self, now: float) -> None:
        """Let those wait again that have rested."""
        while self._resting and self._resting[0][0] <= now:
            leg = self.legs.get(heapq.heappop(self._resting)[1])
            if leg is not None:
                leg.state = LegState.WAITING
                self.queue.push_back(leg.entry, leg)

    def pump(self, now: float) -> list[Refused]:
        """Ask for leases for those who wait, in order, while there is credit.

        Returns:
            Those that will never get one, for the caller to close.
        """
        position = 0
        impossible: list[Leg] = []
        while (leg := self.queue.peek(position)) is not None:
            if self._ask(now, leg):
                self.queue.remove(leg.entry)
            elif self._placement.fits(leg, self._workers.open_links(*WORKER_ROLES)):
                self._await_credit(leg)
                break
            else:
                impossible.append(leg)
                position += 1
        refusals = ((leg, self._placement.refusal(leg)) for leg in impossible)
        return [Refused(leg, error) for leg, error in refusals if error is not None]

    def _await_credit(self, leg: Leg) -> None:
        """Who waits first is told by every worker that could take it, as soon as it can."""
        demand = leg.demand(self._config)
        if not self._placement.needs_lease(leg):
            return  # it waits for a prefill worker's queue
        for link in self._workers.open_links(Role.DECODE, Role.BOTH):
            if link.could_decode(demand) and link.want(demand):
                self._send(link.info.worker_id, RenewLeases([], link.wanted))

    def _ask(self, now: float, leg: Leg) -> bool:
        """Ask for a lease, or begin what needs none, if somebody can take it now."""
        demand = leg.demand(self._config)
        choice = self._placement.choose(leg, demand)
        if choice is None:
            return False
        leg.choice, leg.asked_at, leg.state = choice, now, LegState.ASKED
        leg.is_ahead = not leg.alone and self._placement.may_start_ahead(choice, demand)
        prefill_id, decode_id = choice
        if prefill_id is not None:
            prefill = self._workers.links[prefill_id]
            cached_tokens = prefill.prefill_state(leg.prefix_hashes(self._config)).cached_tokens
            prefill.queued[leg.key] = demand.tokens - cached_tokens
        if decode_id is None:
            assert prefill_id is not None
            self._begin(now, leg, 0)
            self._prefill(leg, prefill_id, None, 0, 0)
            return True
        if leg.is_ahead:
            assert prefill_id is not None
            epoch = self._workers.pairs[prefill_id, decode_id]
            self._send(prefill_id, leg.prefill_request(decode_id, epoch, 0, has_lease=False))
        self._workers.links[decode_id].ask(leg.key, demand)
        self._send(decode_id, leg.lease_request(prefill_id))
        return True

    # answers

    def granted(self, now: float, link: WorkerLink, message: LeaseGranted) -> Loss | None:
        """A decode worker's yes.

        Returns:
            What the leg was lost with, if nobody can prefill it any more.
        """
        leg = self._answered(link, message)
        if leg is None:
            self._send(link.info.worker_id, CloseLease(*message.key, "nobody waits for it"))
            return None
        assert leg.choice is not None
        self._begin(now, leg, message.num_cached_tokens)
        prefill_id, decode_id = leg.choice
        if prefill_id is None:
            return None
        assert decode_id is not None
        epoch = self._workers.pairs.get((prefill_id, decode_id))
        if epoch is None or not self._workers.is_open(prefill_id):
            return Loss(f"{prefill_id} was lost before it could begin", prefill_id)
        if leg.is_ahead:
            leg.state = LegState.FILLING
            self._send(prefill_id, LeaseConfirmed(*leg.key, message.num_cached_tokens))
        else:
            self._prefill(leg, prefill_id, decode_id, epoch, message.num_cached_tokens)
        return None

    def _begin(self, now: float, leg: Leg, num_cached_tokens: int) -> None:
        leg.state = LegState.RUNNING
        self.queue.admitted(now)
        if not leg.request.granted:
            self._out.append(Granted(leg.request))
        leg.request.begin(now, leg, num_cached_tokens)

    def _prefill(self, leg: Leg, prefill_id: str, decode_id: str | None, epoch: int, num_cached_tokens: int) -> None:
        leg.state = LegState.FILLING
        self._send(prefill_id, leg.prefill_request(decode_id, epoch, num_cached_tokens))

    def denied(self, link: WorkerLink, message: LeaseDenied) -> Refused | None:
        """A decode worker's no. A leg that may ask again waits in its old place, in a new attempt; else it is returned.

        Its prefill worker may have begun, and what it still says is about the former attempt.
        """
        leg = self._answered(link, message)
        if message.retriable:
            link.denied = True
        if leg is None:
            return None
        if not message.retriable:
            if message.verdict == "failed":
                return Refused(leg, RequestFailedError(message.reason))
            return Refused(leg, InvalidRequestError(message.reason, message.param))
        assert leg.choice is not None
        self._end_prefill(leg)
        leg.choice, leg.state, leg.is_ahead, leg.first_tokens = None, LegState.WAITING, False, None
        del self.legs[leg.key]
        leg.request.renumber(leg)
        self.legs[leg.key] = leg
        self.queue.push_back(leg.entry, leg)
        return None

    def _answered(self, link: WorkerLink, message: LeaseGranted | LeaseDenied) -> Leg | None:
        link.answered(message.key)
        link.update_credit(message.credit)
        return self.legs.get(message.key)

    # ends

    def close(self, leg: Leg, reason: str, *, tell: bool = True) -> None:
        """Forget a leg, in whatever state it is. Idempotent.

        Args:
            tell: False if its workers have ended it by themselves.
        """
        if self.legs.pop(leg.key, None) is None:
            return
        self.queue.remove(leg.entry)
        if leg.choice is None:
            return
        decode_id = leg.choice.decode_worker_id
        if decode_id is not None:
            if (decode := self._workers.links.get(decode_id)) is not None:
                decode.answered(leg.key)
            if tell:
                if leg.granted:
                    self.expect_credit(leg)
                self._send(decode_id, CloseLease(*leg.key, reason))
        self._end_prefill(leg, tell=tell)

    def _end_prefill(self, leg: Leg, *, tell: bool = True) -> None:
        """A leg needs its prefill worker no longer."""
        assert leg.choice is not None
        prefill_id = leg.choice.prefill_worker_id
        if prefill_id is None or (prefill := self._workers.links.get(prefill_id)) is None:
            return
        if not (leg.granted or leg.is_ahead):  # it was never sent
            prefill.queued.pop(leg.key, None)
            return
        prefill.prefill_ended(leg.key)
        if tell:
            self._send(prefill_id, CancelPrefill(*leg.key))

    def end_completion(self, leg: Leg, index: int) -> None:
        """One completion of a leg has ended with a stop string; others go on."""
        assert leg.choice is not None and leg.choice.decode_worker_id is not None
        self._send(leg.choice.decode_worker_id, EndCompletion(*leg.key, index))

    def expect_credit(self, leg: Leg) -> None:
        """A lease ends of which no step of its worker will tell: count on what it held."""
        assert leg.choice is not None
        decode_id = leg.choice.decode_worker_id
        if decode_id is not None and (link := self._workers.links.get(decode_id)) is not None:
            demand = leg.demand(self._config)
            link.expect_credit(demand.blocks, demand.places)

    def depending_on(self, worker_id: str) -> list[Leg]:
        """Legs that are lost with that worker."""
        return [leg for leg in self.legs.values() if leg.depends_on(worker_id)]

    # heartbeats

    def renew(self, also: Iterable[tuple[str, LegKey]]) -> None:
        """Name every lease asked for or held to its decode worker, and ask prefill workers for their queues.

        Args:
            also: further leases, by decode worker.
        """
        keys: dict[str, list[LegKey]] = {}
        for leg in self.legs.values():
            if leg.choice is not None and leg.choice.decode_worker_id is not None:
                keys.setdefault(leg.choice.decode_worker_id, []).append(leg.key)
        for worker_id, key in also:
            keys.setdefault(worker_id, []).append(key)
        for link in self._workers.open_links(Role.DECODE, Role.BOTH):
            worker_id = link.info.worker_id
            self._send(worker_id, RenewLeases(keys.get(worker_id, []), link.wanted))

        self.ask_for_queues()

    def ask_for_queues(self) -> None:
        """Prefill workers answer with how much they have to do."""
        for link in self._workers.open_links(Role.PREFILL):
            self._send(link.info.worker_id, Ping())

    def _send(self, worker_id: str, message: AnyMessage) -> None:
        self._out.append(Send(worker_id, message))
