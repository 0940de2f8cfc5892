"""Every request of a router from its submission to its one end: its tokens, its losses, its replays.

Pure: time is passed in, effects are appended to `out`. Single-threaded.
"""

from __future__ import annotations

import logging
from typing import Protocol

from pdray.config import Config
from pdray.control.losses import Loss, blame
from pdray.errors import InvalidRequestError, NoWorkerError, PdrayError, RequestTimeoutError
from pdray.outputs import Outcome, RequestOutput, RequestTimings, SampledToken
from pdray.router.dispatch import Dispatch
from pdray.router.effects import Ended, Progress, RouterEffect
from pdray.router.leg import Leg, LegState
from pdray.router.link import WorkerLink
from pdray.router.replay import final_error, loss_of, replay_delay_s
from pdray.router.request import Request
from pdray.wire.lease_messages import LeaseClosed, LeaseDenied, LeaseGranted, LegTokens
from pdray.wire.message import LegKey
from pdray.wire.prefill_messages import FirstTokens, PrefillFailed
from pdray.wire.worker_news import StepFailed

logger = logging.getLogger(__name__)


class Metrics(Protocol):
    """Told of what happens; pdray.metrics.RouterMetrics in a Ray process. Changes nothing."""

    def on_queue_depth(self, depth: int) -> None: ...
    def on_first_token(self, timings: RequestTimings) -> None: ...
    def on_inter_token(self, seconds: float) -> None: ...
    def on_finished(self, outcome: Outcome, output: RequestOutput | None) -> None: ...
    def on_replay(self) -> None: ...


class Requests:
    """See the module.

    Attributes:
        live: those that were submitted and have not ended, by id.
    """

    def __init__(
        self, config: Config, router_id: str, dispatch: Dispatch, out: list[RouterEffect], metrics: Metrics | None
    ) -> None:
        self.live: dict[str, Request] = {}
        self._config = config
        self._router_id = router_id
        self._dispatch = dispatch
        self._out = out
        self._metrics = metrics

    def submit(self, now: float, request: Request) -> None:
        """Take a request. It ends with Ended, unless this raises.

        Raises:
            InvalidRequestError: its id is in use, or no worker is large enough for it. QueueFullError: not now.
        """
        if request.request_id in self.live:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use; choose another", "request_id")
        self._dispatch.enter(now, request.start())
        self.live[request.request_id] = request

    def abort(self, now: float, request: Request) -> None:
        """Its consumer gives it up. Nothing happens after its end."""
        if not request.ended:
            request.give_up()
            self._end(now, request, Outcome.ABORT)

    # what workers say

    def granted(self, now: float, link: WorkerLink, message: LeaseGranted) -> None:
        """A leg has its lease, or finds that nobody can prefill it any more."""
        if (loss := self._dispatch.granted(now, link, message)) is not None:
            self._lose(now, self._dispatch.legs[message.key], loss)
        elif (leg := self._dispatch.legs.get(message.key)) is not None and leg.first_tokens is not None:
            self._take_first(now, leg, leg.first_tokens)

    def denied(self, now: float, link: WorkerLink, message: LeaseDenied) -> None:
        """A leg waits again, or its request can never be served."""
        if (refused := self._dispatch.denied(link, message)) is not None:
            self.refuse(now, refused.leg.request, refused.error)

    def first_tokens(self, now: float, link: WorkerLink, message: FirstTokens) -> None:
        """A prefill worker is done with a leg."""
        link.prefill_ended(message.key)
        leg = self._dispatch.legs.get(message.key)
        if leg is None:
            return
        if leg.state is LegState.ASKED:  # the lease may still be denied, and the leg be computed elsewhere
            leg.first_tokens, leg.first_tokens_at = message, now
        else:
            self._take_first(now, leg, message)

    def _take_first(self, now: float, leg: Leg, message: FirstTokens) -> None:
        leg.request.note_prefill(leg, message)
        self._book(now, leg, message.tokens)
        if leg.key not in self._dispatch.legs and not leg.request.outruns.intersection(leg.indices):
            self._dispatch.expect_credit(leg)  # it never joined the batch, so no step will tell

    def tokens(self, now: float, message: LegTokens) -> None:
        """A decode worker's step has computed a leg."""
        leg = self._dispatch.legs.get(message.key)
        if leg is not None:
            leg.state = LegState.RUNNING
            leg.request.note_steps(leg, message)
            self._book(now, leg, message.tokens)

    def leg_failed(self, now: float, worker_id: str, message: LeaseClosed | PrefillFailed) -> None:
        """A worker cannot go on with a leg."""
        if (leg := self._dispatch.legs.get(message.key)) is not None:
            self._lose(now, leg, loss_of(worker_id, message))

    def step_failed(self, now: float, worker_id: str, message: StepFailed) -> None:
        """Whatever depended on that worker is lost, and it is known whose step has broken it."""
        suspects = {LegKey(*key) for key in message.suspects}
        reason = f"{worker_id} failed ({message.reason})"
        suspected = Loss(reason, worker_id, blame(message.suspects))
        other = Loss(reason, worker_id, "innocent" if suspects else "lost")
        for leg in self._dispatch.depending_on(worker_id):
            self._lose(now, leg, suspected if leg.key in suspects else other)

    def worker_lost(self, now: float, worker_id: str, reason: str) -> None:
        """Whatever depended on that worker is lost."""
        loss = Loss(f"{worker_id} is gone ({reason})", worker_id)
        for leg in self._dispatch.depending_on(worker_id):
            self._lose(now, leg, loss)

    def _book(self, now: float, leg: Leg, tokens: list[SampledToken]) -> None:
        """Book tokens of a live leg; end what they end."""
        request = leg.request
        is_first, before = request.first_token_at is None, request.last_token_at
        ended = request.take(now, leg, tokens)
        if ended is None:
            return
        self._out.append(Progress(request))
        if self._metrics is not None:
            if is_first:
                self._metrics.on_first_token(request.output.timings)
            else:
                self._metrics.on_inter_token(now - before)
        if not ended:
            return
        if request.done:
            self._end(now, request, Outcome(request.output.outputs[0].finish_reason or "stop"))
            return
        for ended_leg in request.take_ended_legs():
            self._close(ended_leg, "finished")
        if leg.key in self._dispatch.legs:
            for index in request.outruns.intersection(ended):
                self._dispatch.end_completion(leg, index)

    def _lose(self, now: float, leg: Leg, loss: Loss) -> None:
        """Other workers go on from prompt and tokens so far, unless that is of no use."""
        request, key = leg.request, leg.key
        if key not in request.legs:  # it has ended with another of its legs
            return
        request.losses.count(loss, leg.num_losses)
        if (error := final_error(request, loss, self._config.max_replays)) is not None:
            self._end(now, request, Outcome.ERROR, error)
            return
        what = (self._router_id, key.attempt, key.request_id, loss.verdict, loss.reason)
        logger.warning("%s: attempt %d of %s is %s: %s", *what)
        if self._metrics is not None:
            self._metrics.on_replay()
        self._dispatch.close(leg, "it is replayed elsewhere")
        for successor in request.replace(leg, alone=leg.alone or loss.verdict == "suspect"):
            self._dispatch.enter_again(now, successor, leg, replay_delay_s(successor.num_losses))

    # ends

    def end_late(self, now: float) -> None:
        """End what takes longer than request_timeout_s."""
        if (limit := self._config.request_timeout_s) is not None:
            for request in [r for r in self.live.values() if now - r.arrival > limit]:
                error = RequestTimeoutError(f"not finished within {limit:g} s (request_timeout_s)")
                self._end(now, request, Outcome.TIMEOUT, error)

    def end_all(self, now: float, reason: str) -> None:
        for request in list(self.live.values()):
            self.refuse(now, request, NoWorkerError(reason))

    def end_waiting(self, now: float, reason: str) -> None:
        """Requests that have not begun are better off with whoever comes next."""
        for request in list(self.live.values()):
            if not request.granted:
                self.refuse(now, request, NoWorkerError(reason))

    def refuse(self, now: float, request: Request, error: PdrayError) -> None:
        """It cannot be served, or not any longer."""
        self._end(now, request, Outcome.ERROR if request.granted else Outcome.REJECTED, error)

    def _end(self, now: float, request: Request, outcome: Outcome, error: PdrayError | None = None) -> None:
        """The one way out: close what is open, tell the consumer, forget the request."""
        if request.ended:
            return
        for leg in request.take_legs():
            self._close(leg, outcome)
        del self.live[request.request_id]
        request.end(now, error)
        if self._metrics is not None:
            self._metrics.on_finished(outcome, request.output)
        self._out.append(Ended(request, error))

    def _close(self, leg: Leg, reason: str) -> None:
        """Its workers are told, unless they have ended every completion of it by themselves."""
        self._dispatch.close(leg, reason, tell=not leg.request.ended_by_worker(leg))
