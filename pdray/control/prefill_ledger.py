"""The prefill worker's legs: what is computed, what is pushed, and when a writer has truly stopped.

A leg asks its decode worker for permission to write (BeginPut) as soon as it arrives, and computes
meanwhile; puts are held back until the answer. One that arrives before its lease is granted asks once it is
(LeaseConfirmed). Its first tokens go to the router as soon as they
are sampled. PutDone follows the last put. A leg that ends with its first token has no decode worker
and no puts. A leg that is cancelled, aborted or broken issues no more puts; once none is in flight it
says so (PutAborted) and its blocks are unpinned, never before.

A guest has no blocks: it begins to compute when the answer brings the lease's, puts nothing, and what stops it waits
for the end of every step that writes to them.

Pure: time, messages and completions go in, effects come out. Single-threaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from msgspec import structs

from pdray.control.effects import FlushPuts, LedgerEffect, Release, Send, StartCompute, StopCompute
from pdray.engine.request import Reservation
from pdray.wire.message import LegKey, Verdict
from pdray.wire.prefill_messages import FirstTokens, PrefillFailed, PrefillRequest
from pdray.wire.put_messages import BeginPut, PutAborted, PutDone


@dataclass(slots=True)
class _Task:
    """What is to be done about one leg."""

    router_id: str
    request: PrefillRequest
    asked: bool = False  # BeginPut was sent
    may_put: bool | None = None  # the decode worker's answer to BeginPut
    puts_issued: int = 0
    puts_in_flight: int = 0
    given: Reservation | None = None  # a guest's blocks for it
    is_writing: bool = False  # a guest's engine may be computing in them
    first_tokens: FirstTokens | None = None
    computed_at: float = 0.0
    done_sent: bool = False
    stopping: bool = False  # no further puts; leaves once none is in flight
    owes_aborted: bool = False  # the decode worker waits for PutAborted


class PrefillLedger:
    """All legs of one prefill worker.

    Args:
        is_guest: it computes in its decode worker's pool.
    """

    def __init__(self, *, is_guest: bool = False) -> None:
        self._is_guest = is_guest
        self._legs: dict[LegKey, _Task] = {}

    def __len__(self) -> int:
        return len(self._legs)

    def leg(self, key: LegKey) -> PrefillRequest | None:
        """The request of a live leg."""
        leg = self._legs.get(key)
        return None if leg is None else leg.request

    def given(self, key: LegKey) -> Reservation | None:
        """The blocks that a guest is to compute the leg in."""
        return self._legs[key].given

    def may_put(self, key: LegKey) -> bool:
        """Whether a put of this leg may be issued now."""
        leg = self._legs.get(key)
        return leg is not None and leg.may_put is True and not leg.stopping

    def may_hold(self, key: LegKey) -> bool:
        """Whether puts of this leg should be kept for FlushPuts."""
        leg = self._legs.get(key)
        return leg is not None and leg.may_put is None and not leg.stopping

    # routers

    def keys(self) -> list[LegKey]:
        """Legs that the engine holds blocks for."""
        return [key for key, leg in self._legs.items() if not self._is_guest or (leg.is_writing and not leg.stopping)]

    def request(self, router_id: str, message: PrefillRequest, epoch: int | None) -> list[LedgerEffect]:
        """A new leg. ``epoch`` is the channel's to its decode worker now; None if there is no channel."""
        if message.key in self._legs:
            return []
        if message.decode_worker_id is None and self._is_guest:
            reason = "this worker has no blocks of its own, and the leg names no decode worker"
            return [Send(router_id, PrefillFailed(*message.key, reason))]
        if message.decode_worker_id is None:
            self._legs[message.key] = _Task(router_id, message, may_put=False)
            return [StartCompute(message.key)]
        if epoch != message.epoch:
            reason = f"no channel to {message.decode_worker_id} in epoch {message.epoch} (now {epoch})"
            return [Send(router_id, PrefillFailed(*message.key, reason))]
        leg = self._legs[message.key] = _Task(router_id, message)
        asked = self._ask(message.key, leg) if message.has_lease else []
        return asked if self._is_guest else [StartCompute(message.key), *asked]

    def lease_confirmed(self, key: LegKey, num_cached_tokens: int) -> list[LedgerEffect]:
        """The lease of a leg that came without one was granted. One that has ended since is not asked about."""
        leg = self._legs.get(key)
        if leg is None or leg.stopping or leg.asked:
            return []
        leg.request = structs.replace(leg.request, num_cached_tokens=num_cached_tokens, has_lease=True)
        return self._ask(key, leg)

    def _ask(self, key: LegKey, leg: _Task) -> list[LedgerEffect]:
        assert leg.request.decode_worker_id is not None, key
        leg.asked = True
        return [Send(leg.request.decode_worker_id, BeginPut(*key, leg.request.epoch))]

    def cancel(self, key: LegKey) -> list[LedgerEffect]:
        """The router wants no more of this leg. Unknown keys are ignored."""
        leg = self._legs.get(key)
        return [] if leg is None or leg.done_sent else self._stop(key, leg)

    def router_gone(self, router_id: str) -> list[LedgerEffect]:
        """Cancel every leg of a router that died or was cut off."""
        return self._for_each(lambda leg: leg.router_id == router_id, self.cancel)

    # decode workers

    def begin_put_reply(self, key: LegKey, granted: bool, given: Reservation | None = None) -> list[LedgerEffect]:
        """The decode worker's answer. Refused: the lease is gone, and so is the leg.

        Args:
            given: the lease's blocks, for a guest.
        """
        leg = self._legs.get(key)
        if leg is None:
            return []
        if leg.stopping:
            leg.may_put, leg.owes_aborted = granted, leg.owes_aborted or granted
            return self._leave_if_idle(key, leg)
        is_first, leg.may_put = leg.may_put is None, granted
        if granted and not self._is_guest:
            return [FlushPuts(key)]
        if granted:
            if not is_first:
                return []
            leg.given, leg.is_writing = given, True
            return [StartCompute(key)]
        return self.fail(key, "its lease no longer stands")

    def abort_put(self, decode_worker_id: str, key: LegKey) -> list[LedgerEffect]:
        """The lease was closed. The answer PutAborted comes once no put is in flight."""
        leg = self._legs.get(key)
        if leg is None:
            return [Send(decode_worker_id, PutAborted(*key))]
        leg.owes_aborted, leg.may_put = True, True
        return self._stop(key, leg)

    def decode_worker_gone(self, worker_id: str) -> list[LedgerEffect]:
        """Fail the legs of a decode worker that was seen dead, or whose channel was closed."""

        def lose(key: LegKey) -> list[LedgerEffect]:
            leg = self._legs[key]
            leg.may_put, leg.owes_aborted = False, False
            return self.fail(key, f"the channel to {worker_id} was lost", lost_worker_id=worker_id)

        return self._for_each(lambda leg: leg.request.decode_worker_id == worker_id, lose)

    # engine and channels

    def computed(self, now: float, message: FirstTokens) -> list[LedgerEffect]:
        """The leg's first tokens were sampled; all its layer groups were issued or held before."""
        leg = self._legs.get(message.key)
        if leg is None or leg.stopping:
            return []
        leg.first_tokens, leg.computed_at, leg.is_writing = message, now, False
        return [Send(leg.router_id, message), *self._finish_if_pushed(now, message.key, leg)]

    def put_issued(self, key: LegKey) -> None:
        leg = self._legs[key]
        assert leg.may_put is True and not leg.stopping, key
        leg.puts_issued += 1
        leg.puts_in_flight += 1

    def puts_flushed(self, now: float, key: LegKey) -> list[LedgerEffect]:
        """Every held put was issued."""
        leg = self._legs.get(key)
        return [] if leg is None else self._finish_if_pushed(now, key, leg)

    def put_completed(self, key: LegKey, error: str | None = None) -> list[LedgerEffect]:
        """A put is no longer in flight; with an error, it never arrived and the leg fails."""
        leg = self._legs[key]
        leg.puts_in_flight -= 1
        if error is not None and not leg.stopping:
            return self.fail(key, error)
        return self._leave_if_idle(key, leg)

    def stopped(self, key: LegKey) -> list[LedgerEffect]:
        """No step writes to the blocks of a leg that was to be stopped."""
        leg = self._legs[key]
        leg.is_writing = False
        return self._leave_if_idle(key, leg)

    def fail(
        self, key: LegKey, reason: str, verdict: Verdict = "lost", *, param: str | None = None, lost_worker_id: str = ""
    ) -> list[LedgerEffect]:
        """The leg cannot go on: its router hears why."""
        leg = self._legs.get(key)
        if leg is None or leg.stopping:
            return [] if leg is None else self._leave_if_idle(key, leg)
        failed = PrefillFailed(*key, reason, verdict, param, lost_worker_id)
        return [Send(leg.router_id, failed), *self._stop(key, leg)]

    # transitions

    def _stop(self, key: LegKey, leg: _Task) -> list[LedgerEffect]:
        is_first, leg.stopping = not leg.stopping, True
        if leg.may_put:
            leg.owes_aborted = True
        if leg.is_writing:
            return [StopCompute(key)] if is_first else []
        return self._leave_if_idle(key, leg)

    def _finish_if_pushed(self, now: float, key: LegKey, leg: _Task) -> list[LedgerEffect]:
        if leg.stopping or leg.done_sent or leg.first_tokens is None:
            return []
        if leg.request.decode_worker_id is None:
            leg.done_sent = True
            return self._leave_if_idle(key, leg)
        if leg.may_put is not True:
            return []
        leg.done_sent = True
        done = PutDone(*key, leg.puts_issued, leg.first_tokens.tokens, now - leg.computed_at)
        return [Send(leg.request.decode_worker_id, done), *self._leave_if_idle(key, leg)]

    def _leave_if_idle(self, key: LegKey, leg: _Task) -> list[LedgerEffect]:
        """The leg is forgotten once nothing of it can happen any more."""
        if leg.puts_in_flight or leg.is_writing or not (leg.done_sent or leg.stopping):
            return []
        if leg.stopping and leg.asked and leg.may_put is None:
            return []  # BeginPut is under way: its answer decides whether PutAborted is owed
        del self._legs[key]
        effects: list[LedgerEffect] = [Release(key)]
        if leg.owes_aborted:
            assert leg.request.decode_worker_id is not None, key
            effects.append(Send(leg.request.decode_worker_id, PutAborted(*key)))
        return effects

    def _for_each(
        self, condition: Callable[[_Task], bool], action: Callable[[LegKey], list[LedgerEffect]]
    ) -> list[LedgerEffect]:
        keys = [key for key, leg in self._legs.items() if condition(leg)]
        return [effect for key in keys for effect in action(key)]
