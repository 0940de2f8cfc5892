"""A router's state machine in a simulated network with a simulated clock, and what must always hold of it.

Whoever owns it moves the clock and the messages; effects are performed here. Violations are collected in `problems`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, NamedTuple

from msgspec import structs

from pdray.config import Config
from pdray.control.effects import Send
from pdray.errors import NoWorkerError, PdrayError, QueueFullError, RequestFailedError
from pdray.outputs import SampledToken
from pdray.router.completion import GrowingCompletion
from pdray.router.effects import Connect, Disconnect, Ended, Granted, Progress, RouterEffect, TickAt
from pdray.router.leg import LegState
from pdray.router.machine import RouterMachine
from pdray.router.request import Request
from pdray.wire.cluster_view import ClusterView, WorkerInfo
from pdray.wire.lease_messages import LeaseClosed, RenewLeases
from pdray.wire.message import LegKey
from pdray.wire.messages import AnyMessage
from pdray.wire.prefill_messages import PrefillFailed
from pdray.wire.worker_news import StepFailed

if TYPE_CHECKING:
    from pdray.sampling_params import SamplingParams

NOBODY = LegKey("nobody", 0)
STOP_STRING = "stop string"
ERRORS_OF_REFUSAL = (QueueFullError, NoWorkerError)

TokenAt = Callable[[str, int, int], int]  # request id, completion, position


class Held(NamedTuple):
    """An open session: the worker process at its other end."""

    worker_id: str
    incarnation: str


class StoppingCompletion(GrowingCompletion):
    """A completion with a stop string that ends with the token at a position; its worker does not know of it."""

    def __init__(self, index: int, prompt_token_ids: list[int], params: SamplingParams, stop_at: int) -> None:
        super().__init__(index, None, prompt_token_ids, params)
        self._stop_at = stop_at

    def take(self, token: SampledToken) -> str | None:
        super().take(token)
        if token.position < self._stop_at or token.finish_reason is not None:
            return None
        self.output.finish_reason, self.output.stop_reason = "stop", STOP_STRING
        return STOP_STRING


class SimulatedRouter:
    """Args:
    send: passes a message on to the process at the other end of a session.
    hang_up: tells that process that the session was closed here.
    token_at: what every worker samples there; what a request has received must agree.
    poison: ids of requests on which engines fail, in every step or in those of decoding. One of the latter that loses
        its decode worker after each first token gets on, and may end without a step of decoding.
    prefilled: tokens that prefill workers have sampled: request id, completion, position.

    Attributes:
        wanted: workers to which a session is to be opened; see open().
        sessions: open ones, by worker id.
        timers: when tick() is to be called besides its regular calls; a heap.
        outcomes: of requests, once for each end: finished, aborted, rejected, blamed or failed.
        num_attempts: of the request that needed most.
    """

    def __init__(
        self,
        config: Config,
        name: str,
        send: Callable[[Held, AnyMessage], None],
        hang_up: Callable[[Held], None],
        token_at: TokenAt,
        poison: Container[str] = (),
        prefilled: Container[tuple[str, int, int]] = (),
    ) -> None:
        self.machine = RouterMachine(config, name)
        self.wanted: dict[str, WorkerInfo] = {}
        self.sessions: dict[str, Held] = {}
        self.timers: list[float] = []
        self.outcomes: dict[str, list[str]] = {}
        self.problems: list[str] = []
        self.num_attempts = 0
        self._config = config
        self._send = send
        self._hang_up = hang_up
        self._token_at = token_at
        self._poison = poison
        self._prefilled = prefilled
        self._begun: set[str] = set()
        self._num_checked: dict[tuple[str, int], int] = {}  # tokens, by request and completion
        self._aborting: str | None = None

    # events

    def submit(self, now: float, request_id: str, params: SamplingParams, *, stop_at: int | None = None) -> None:
        """As Router.submit().

        Args:
            stop_at: position of the token at which a stop string ends the first completion.
        """
        prompt = [1]
        request = Request(request_id, None, prompt, params, 0, None, now)
        if stop_at is not None:
            request.completions[0] = StoppingCompletion(0, prompt, params, stop_at)
            request.output.outputs[0] = request.completions[0].output
        if not self.machine.ready:
            self._ended(request, NoWorkerError(self.machine.why_not_ready))
            return
        try:
            effects = self.machine.submit(now, request)
        except PdrayError as error:
            self._ended(request, error)
        else:
            self._perform(effects)

    def abort(self, now: float, request: Request) -> None:
        self._aborting = request.request_id
        self._perform(self.machine.abort(now, request))
        self._aborting = None

    def stop(self, now: float) -> None:
        self._perform(self.machine.stop(now, "stopping"))

    def view(self, now: float, view: ClusterView) -> None:
        self._perform(self.machine.view(now, view))

    def open(self, worker_id: str) -> None:
        """The session that is wanted to this worker is there."""
        info = self.wanted.pop(worker_id)
        self.sessions[worker_id] = Held(worker_id, info.incarnation)
        self._perform(self.machine.opened(worker_id, info.incarnation))

    def lose(self, now: float, held: Held) -> None:
        """A session has ended by itself, unless it had been closed here before."""
        if self.sessions.get(held.worker_id) == held:
            del self.sessions[held.worker_id]
            self._perform(self.machine.closed(now, held.worker_id, "lost"))

    def receive(self, now: float, source: Held, message: AnyMessage) -> None:
        """A message that came through a session; of one that has ended it is dropped."""
        if self.sessions.get(source.worker_id) != source:
            return
        blames = self._check_blame(message)
        before = {name: request.losses.num for name, request in self.machine.requests.items()} if blames else {}
        self._perform(self.machine.received(now, source.worker_id, message))
        for name, num_losses in before.items():
            request = self.machine.requests.get(name)
            if request is not None and request.losses.num > num_losses:
                self.problems.append(f"{name}: a failure that somebody is to blame for counts")

    def tick(self, now: float) -> None:
        while self.timers and self.timers[0] <= now:
            heapq.heappop(self.timers)
        self._perform(self.machine.tick(now))

    def renew(self, now: float) -> None:
        """Heartbeats name somebody, so that workers can leave them unanswered: an answer would hide that somebody who
        waits was forgotten."""
        effects = self.machine.renew(now)
        for number, effect in enumerate(effects):
            if isinstance(effect, Send) and isinstance(effect.message, RenewLeases):
                named = structs.replace(effect.message, keys=effect.message.keys or [NOBODY])
                effects[number] = Send(effect.to, named)
        self._perform(effects)

    # effects

    def _perform(self, effects: list[RouterEffect]) -> None:
        for effect in effects:
            match effect:
                case Send(to, message):
                    if (held := self.sessions.get(to)) is not None:
                        self._send(held, message)
                case Connect(worker, _):
                    self.wanted[worker.worker_id] = worker
                case Disconnect(worker_id):
                    self.wanted.pop(worker_id, None)
                    if (held := self.sessions.pop(worker_id, None)) is not None:
                        self._hang_up(held)
                case Granted(request):
                    if request.request_id in self._begun:
                        self.problems.append(f"{request.request_id} has begun twice")
                    self._begun.add(request.request_id)
                case Progress(request):
                    if request.request_id not in self._begun:
                        self.problems.append(f"{request.request_id} gets on, and has not begun")
                    self._check_tokens(request)
                case Ended(request, error):
                    self._ended(request, error)
                case TickAt(at):
                    heapq.heappush(self.timers, at)
        self._check_queue()

    def _ended(self, request: Request, error: Exception | None) -> None:
        self._check_tokens(request)
        request_id = request.request_id
        if error is None and request_id != self._aborting:
            outcome = "finished"
            for completion in request.output.outputs:
                stops = completion.stop_reason == STOP_STRING
                if not stops and len(completion.token_ids) != request.params.max_tokens:
                    self.problems.append(f"{request_id}: finished with {completion}")
        elif error is None:
            outcome = "aborted"
        elif isinstance(error, RequestFailedError):
            outcome = "blamed"
        elif request_id not in self._begun and isinstance(error, ERRORS_OF_REFUSAL):
            outcome = "rejected"
        else:
            outcome = "failed"
        self.outcomes.setdefault(request_id, []).append(outcome)
        if outcome == "blamed" and request_id not in self._poison:
            self.problems.append(f"{request_id} is blamed, and is no poison")
        if len(self.outcomes[request_id]) > 1:
            self.problems.append(f"{request_id} has ended {self.outcomes[request_id]}")
        if (request.ended and request.legs) or request_id in self.machine.requests:
            self.problems.append(f"{request_id} has ended and is not forgotten")

    # what must hold

    def _check_tokens(self, request: Request) -> None:
        """Each token once, in order, and the right one."""
        for completion in request.output.outputs:
            place = request.request_id, completion.index
            first = self._num_checked.get(place, 0)
            for position in range(first, len(completion.token_ids)):
                if completion.token_ids[position] != self._token_at(*place, position):
                    self.problems.append(f"{place}: wrong token at {position} of {completion.token_ids}")
                if request.request_id in self._poison and (*place, position) not in self._prefilled:
                    self.problems.append(f"{place}: token {position} of a step that fails: it is poison")
            if first > len(completion.token_ids):
                self.problems.append(f"{place}: tokens were taken back")
            self._num_checked[place] = len(completion.token_ids)
        self.num_attempts = max([self.num_attempts, *(key.attempt + 1 for key in request.legs)])

    def _check_queue(self) -> None:
        """Who was never let out is bound; who came back keeps its place beyond that."""
        legs = [leg for request in self.machine.requests.values() for leg in request.legs.values()]
        waiting = [leg for leg in legs if leg.state is LegState.WAITING]
        if len(waiting) != self.machine.queue_depth:
            self.problems.append(f"{len(waiting)} legs wait, but {self.machine.queue_depth} are in the queue")
        new = [leg for leg in waiting if not leg.asked_at and not leg.num_losses]
        if len(new) > self._config.max_queue_size:
            self.problems.append(f"{len(new)} new requests wait (max_queue_size {self._config.max_queue_size})")

    def _check_blame(self, message: AnyMessage) -> bool:
        """Whether the message blames somebody. Who is suspected again was not alone, as it should have been."""
        if isinstance(message, StepFailed):
            suspects = [LegKey(*key) for key in message.suspects]
            if len({key.request_id for key in suspects}) > 1:
                self._check_not_alone(suspects)
            return bool(suspects)
        if isinstance(message, LeaseClosed | PrefillFailed):
            if message.verdict == "suspect":
                self._check_not_alone([message.key])
            return message.verdict != "lost"
        return False

    def _check_not_alone(self, keys: list[LegKey]) -> None:
        for key in keys:
            request = self.machine.requests.get(key.request_id)
            leg = None if request is None else request.legs.get(key)
            if leg is not None and leg.alone and key.request_id in self._poison:
                self.problems.append(f"{key} was to be alone, and was computed with others")
