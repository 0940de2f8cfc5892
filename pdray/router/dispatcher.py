"""Gives every leg a lease: who waits, whom to ask, and what a lease that ends leaves behind.

A leg is in one place: resting after a loss, in the queue, with a lease asked for, or with a lease held. One that ends
with its first token needs no decode worker, and so no lease. The queue is strict, but for legs that no connected worker
is large enough for: they step aside, and are refused once every worker is there and none is. Everything runs on the
router's event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from pdray.config import Config
from pdray.control.admission import AdmissionQueue
from pdray.control.losses import Loss, blame
from pdray.engine.kv.block_pool import hash_blocks, short_hash
from pdray.errors import InvalidRequestError, PdrayError, RequestFailedError
from pdray.router.connections import WorkerConnections
from pdray.router.leg import RoutedLeg
from pdray.router.link import WorkerLink
from pdray.router.placement import Placement
from pdray.wire.lease_messages import CloseLease, EndCompletion, LeaseDenied, LeaseGranted, LeaseRequest, RenewLeases
from pdray.wire.message import LegKey, Verdict
from pdray.wire.prefill_messages import CancelPrefill, PrefillRequest
from pdray.wire.worker_news import StepFailed

ROLES = ("prefill", "decode", "both")


class DispatchOwner(Protocol):
    """Told what becomes of legs. It may close any leg from within."""

    def on_granted(self, leg: RoutedLeg, num_cached_tokens: int) -> None:
        """It begins. num_cached_tokens: found in the decode worker's prefix cache."""

    def on_rejected(self, leg: RoutedLeg, error: PdrayError) -> None:
        """It will never get a lease."""

    def on_lost(self, leg: RoutedLeg, loss: Loss) -> None:
        """Its lease, or the prefill worker that was to fill it, is gone."""

    def on_queue_changed(self) -> None: ...


class Dispatcher:
    """See the module.

    Attributes:
        legs: every leg that was submitted and not closed.
    """

    def __init__(self, config: Config, connections: WorkerConnections, owner: DispatchOwner) -> None:
        self.legs: dict[LegKey, RoutedLeg] = {}
        self.queue: AdmissionQueue[RoutedLeg] = AdmissionQueue(config.max_queue_size, config.max_queue_wait_s)
        self._config = config
        self._connections = connections
        self._owner = owner
        self._placement = Placement(config, connections)

    def submit(self, leg: RoutedLeg, arrival: float) -> None:
        """Take a new request's leg.

        Raises:
            InvalidRequestError: no worker is large enough for it.
            QueueFullError: nobody has credit for it, and it may not wait.
        """
        if (error := self._placement.refusal(leg)) is not None:
            raise error
        self._hash(leg)
        leg.entry = self.queue.ticket(arrival, leg, leg.request.priority)
        if len(self.queue) or not self._ask(leg):
            self.queue.push(time.monotonic(), leg.entry)
        self.legs[leg.key] = leg
        self.pump()

    def resubmit(self, leg: RoutedLeg, predecessor: RoutedLeg, delay_s: float) -> None:
        """Take the leg that goes on where a lost one was: in its predecessor's place, and never refused."""
        self._hash(leg)
        leg.entry = self.queue.ticket(time.monotonic(), leg, leg.request.priority, order=predecessor.entry.order)
        self.legs[leg.key] = leg
        if delay_s:
            asyncio.get_running_loop().call_later(delay_s, self._wake, leg)
        else:
            self._wake(leg)

    def _hash(self, leg: RoutedLeg) -> None:
        if self._config.enable_prefix_caching:
            token_ids = [*leg.request.output.prompt_token_ids, *leg.leg.output_token_ids]
            # The last token is always computed, so a block that it completes is of no use.
            leg.prefix_hashes = [short_hash(h) for h in hash_blocks(token_ids[:-1], self._config.block_size)]

    def _wake(self, leg: RoutedLeg) -> None:
        if self.legs.get(leg.key) is leg:
            self.queue.push_back(leg.entry)
            self.pump()

    def pump(self) -> None:
        """Ask for leases for those who wait, in order, while there is credit."""
        changed, position = False, 0
        impossible: list[RoutedLeg] = []
        while (entry := self.queue.peek(position)) is not None:
            if self._ask(entry.item):
                self.queue.remove(entry)
                changed = True
                continue
            if self._placement.fits(entry.item, self._connections.open_links(*ROLES)):
                self._await_credit(entry.item)
                break
            impossible.append(entry.item)
            position += 1
        for leg in impossible:
            if self.legs.get(leg.key) is leg and (error := self._placement.refusal(leg)) is not None:
                self._owner.on_rejected(leg, error)
        if changed:
            self._owner.on_queue_changed()

    def close(self, leg: RoutedLeg, reason: str, *, tell: bool = True) -> None:
        """Forget a leg, in whatever state it is. Idempotent.

        Args:
            tell: False if its workers have ended it by themselves.
        """
        if self.legs.pop(leg.key, None) is None:
            return
        self.queue.remove(leg.entry)
        if leg.choice is None:
            return
        prefill_id, decode_id = leg.choice
        if decode_id is not None:
            if (decode := self._connections.links.get(decode_id)) is not None:
                decode.asked.pop(leg.key, None)
            if tell:
                if leg.granted:
                    self.expect_credit(leg)
                self._connections.send(decode_id, CloseLease(*leg.key, reason))
        if prefill_id is not None and (prefill := self._connections.links.get(prefill_id)) is not None:
            if not leg.granted:  # it was never sent
                prefill.queued.pop(leg.key, None)
                return
            prefill.prefill_ended(leg.key)
            if tell:
                self._connections.send(prefill_id, CancelPrefill(*leg.key))

    def end_completion(self, leg: RoutedLeg, index: int) -> None:
        """One completion of a leg has ended with a stop string; others go on."""
        assert leg.choice is not None and leg.choice.decode_worker_id is not None
        self._connections.send(leg.choice.decode_worker_id, EndCompletion(*leg.key, index))

    def expect_credit(self, leg: RoutedLeg) -> None:
        """A lease ends of which no step of its worker will tell: count on what it held."""
        assert leg.choice is not None
        decode_id = leg.choice.decode_worker_id
        if decode_id is not None and (link := self._connections.links.get(decode_id)) is not None:
            demand = leg.demand(self._config)
            link.expect_credit(demand.blocks, demand.places)

    def granted(self, link: WorkerLink, message: LeaseGranted) -> None:
        """A decode worker's yes."""
        leg = self._answered(link, message)
        if leg is None:
            self._connections.send(link.info.worker_id, CloseLease(*message.key, "nobody waits for it"))
            return
        leg.granted = True
        self.queue.admitted(time.monotonic())
        self._owner.on_granted(leg, message.num_cached_tokens)
        self._start_prefill(leg, message)

    def denied(self, link: WorkerLink, message: LeaseDenied) -> None:
        """A decode worker's no. One that is not final waits in its old place."""
        leg = self._answered(link, message)
        if message.retriable:
            link.denied = True
        if leg is None:
            return
        if not message.retriable:
            failed = message.verdict == "failed"
            refusal = (
                RequestFailedError(message.reason) if failed else InvalidRequestError(message.reason, message.param)
            )
            self._owner.on_rejected(leg, refusal)
            return
        assert leg.choice is not None
        prefill_id, leg.choice = leg.choice.prefill_worker_id, None
        if prefill_id is not None and (prefill := self._connections.links.get(prefill_id)) is not None:
            prefill.queued.pop(leg.key, None)
        self.queue.push_back(leg.entry)
        self._owner.on_queue_changed()

    def worker_lost(self, worker_id: str, reason: str) -> None:
        """Whatever depended on that worker is lost."""
        self._lose(worker_id, lambda leg: Loss(f"{worker_id} is gone ({reason})", worker_id))

    def step_failed(self, worker_id: str, message: StepFailed) -> None:
        """Whatever depended on that worker is lost, and it is known whose step has broken it."""
        suspects, blamed = {LegKey(*key) for key in message.suspects}, blame(message.suspects)
        others: Verdict = "innocent" if suspects else "lost"
        reason = f"{worker_id} failed ({message.reason})"
        self._lose(worker_id, lambda leg: Loss(reason, worker_id, blamed if leg.key in suspects else others))

    def _lose(self, worker_id: str, loss_of: Callable[[RoutedLeg], Loss]) -> None:
        for leg in list(self.legs.values()):
            if leg.choice is None or self.legs.get(leg.key) is not leg:
                continue
            prefill_id, decode_id = leg.choice
            if decode_id == worker_id or (leg.filling and prefill_id == worker_id):
                self._owner.on_lost(leg, loss_of(leg))

    def leases(self) -> dict[str, list[LegKey]]:
        """Leases asked for or held, by decode worker."""
        keys: dict[str, list[LegKey]] = {}
        for leg in self.legs.values():
            if leg.choice is not None and leg.choice.decode_worker_id is not None:
                keys.setdefault(leg.choice.decode_worker_id, []).append(leg.key)
        return keys

    def _answered(self, link: WorkerLink, message: LeaseGranted | LeaseDenied) -> RoutedLeg | None:
        link.asked.pop(message.key, None)
        link.update_credit(message.credit)
        return self.legs.get(message.key)

    def _ask(self, leg: RoutedLeg) -> bool:
        """Ask for a lease, or begin what needs none, if somebody can take it now."""
        demand = leg.demand(self._config)
        choice = self._placement.choose(leg, demand)
        if choice is None:
            return False
        if leg.asked_at:  # denied before; a denial and a later grant must not be mixed up
            self.legs.pop(leg.key)
            (leg.leg,) = leg.request.tracker.replace(leg.key)
            self.legs[leg.key] = leg
        leg.choice, leg.asked_at = choice, time.monotonic()
        if choice.prefill_worker_id is not None:
            prefill = self._connections.links[choice.prefill_worker_id]
            prefill.queued[leg.key] = demand.tokens - prefill.prefill_state(leg.prefix_hashes).cached_tokens
        if choice.decode_worker_id is None:
            assert choice.prefill_worker_id is not None
            self._begin(leg, choice.prefill_worker_id)
            return True
        self._connections.links[choice.decode_worker_id].asked[leg.key] = (demand.blocks, demand.places)
        self._connections.send(
            choice.decode_worker_id,
            LeaseRequest(
                *leg.key,
                leg.request.output.prompt_token_ids,
                leg.request.params,
                list(leg.leg.indices),
                list(leg.leg.output_token_ids),
                choice.prefill_worker_id,
                leg.request.priority,
                leg.alone,
            ),
        )
        return True

    def _await_credit(self, leg: RoutedLeg) -> None:
        """Who waits first is told by every worker that could take it, as soon as it can."""
        demand = leg.demand(self._config)
        if leg.ends_with_first_token and self._connections.open_links("prefill"):
            return  # it waits for a prefill worker's queue
        for link in self._connections.open_links("decode", "both"):
            if link.could_decode(demand) and link.want(demand):
                self._connections.send(link.info.worker_id, RenewLeases([], link.wanted))

    def _start_prefill(self, leg: RoutedLeg, grant: LeaseGranted) -> None:
        assert leg.choice is not None
        prefill_id, decode_id = leg.choice
        if prefill_id is None:
            return
        assert decode_id is not None
        epoch = self._connections.pairs.get((prefill_id, decode_id))
        if epoch is None or not self._connections.is_open(prefill_id):
            self._owner.on_lost(leg, Loss(f"{prefill_id} was lost before it could begin", prefill_id))
            return
        self._send_prefill(leg, prefill_id, decode_id, epoch, grant.num_cached_tokens)

    def _begin(self, leg: RoutedLeg, prefill_id: str) -> None:
        """Without a lease."""
        leg.granted = True
        self.queue.admitted(time.monotonic())
        self._owner.on_granted(leg, 0)
        self._send_prefill(leg, prefill_id, None, 0, 0)

    def _send_prefill(
        self,
        leg: RoutedLeg,
        prefill_id: str,
        decode_id: str | None,
        epoch: int,
        num_cached_tokens: int,
    ) -> None:
        leg.filling = True
        self._connections.send(
            prefill_id,
            PrefillRequest(
                *leg.key,
                leg.request.output.prompt_token_ids,
                leg.request.params,
                list(leg.leg.indices),
                list(leg.leg.output_token_ids),
                decode_id,
                epoch,
                num_cached_tokens,
                leg.request.priority,
                leg.alone,
            ),
        )
