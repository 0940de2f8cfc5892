"""The router: finds a lease for each request, brings its tokens home, and ends what must end.

It follows the cluster's view, holds one session to each worker, and keeps every request in exactly one
place: the queue, a lease asked for, or a lease granted. Everything runs on one event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from pdray.cluster.admission import AdmissionQueue
from pdray.cluster.messages import (
    AnyMessage,
    CancelPrefill,
    CloseLease,
    ClusterView,
    CreditUpdate,
    FirstTokens,
    LeaseClosed,
    LeaseDenied,
    LeaseGranted,
    LeaseRequest,
    LegKey,
    LegTokens,
    Ping,
    Pong,
    PrefillFailed,
    PrefillRequest,
    RenewLeases,
    Tokens,
)
from pdray.cluster.policy import Choice, Demand, choose
from pdray.cluster.request_tracker import Leg
from pdray.config import Config
from pdray.errors import (
    ConfigError,
    InvalidRequestError,
    NoWorkerError,
    PdrayError,
    QueueFullError,
    WorkerDiedError,
)
from pdray.outputs import RequestOutput, RequestTimings, SampledToken
from pdray.router.connections import WorkerConnections
from pdray.router.link import WorkerLink
from pdray.router.request import RoutedRequest
from pdray.router.validation import complete_params, tokenize
from pdray.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

HOUSEKEEPING_S = 0.25


class Metrics(Protocol):
    """What a router reports; pdray.metrics.RouterMetrics in a Ray process."""

    def on_queue_depth(self, depth: int) -> None: ...
    def on_first_token(self, timings: RequestTimings) -> None: ...
    def on_inter_token(self, seconds: float) -> None: ...
    def on_finished(self, outcome: str, output: RequestOutput | None) -> None: ...


class Router:
    """See the module.

    Args:
        tokenizer: None serves token ids only. One without tokenizer.json is a ConfigError.
        router_id: must begin with "router" and be unique in the cluster.
        watch: returns the first view newer than the version given, or after a while the same.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        router_id: str,
        secret: bytes,
        watch: Callable[[int], Awaitable[ClusterView]],
        metrics: Metrics | None = None,
    ) -> None:
        if tokenizer is not None and not tokenizer.is_fast:
            raise ConfigError(
                f"the tokenizer of {config.tokenizer or config.model} is a {type(tokenizer).__name__}, which cannot "
                "decode token by token; set tokenizer to one with a tokenizer.json"
            )
        self.config = config
        self.tokenizer = tokenizer
        self.router_id = router_id
        self._metrics = metrics
        self._queue: AdmissionQueue[RoutedRequest] = AdmissionQueue(config.max_queue_size, config.max_queue_wait_s)
        self._connections = WorkerConnections(router_id, secret, watch, config.worker_timeout_s, self)
        self._requests: dict[str, RoutedRequest] = {}
        self._housekeeper: asyncio.Task[None] | None = None
        self._became_ready = asyncio.Event()

    # for the API

    async def start(self) -> None:
        """Follow the cluster. Returns at once; see wait_ready()."""
        self._connections.start()
        self._housekeeper = asyncio.create_task(self._keep_house())
        self._housekeeper.add_done_callback(self._house_left)

    async def stop(self) -> None:
        """Abort what runs, refuse what waits, close the sessions."""
        for request in list(self._requests.values()):
            if request.granted.done():
                request.abort()
            else:
                self._end(request, "rejected", NoWorkerError("this router is stopping; try again shortly"))
        await self._connections.stop()
        if self._housekeeper is not None:
            self._housekeeper.cancel()
            await asyncio.gather(self._housekeeper, return_exceptions=True)

    @property
    def ready(self) -> bool:
        """Whether a request could be served: a pair, or a worker that does both, is connected."""
        return self._connections.can_serve

    @property
    def why_not_ready(self) -> str:
        reason = self._connections.error
        return "no prefill and decode worker are connected now; try again shortly" + (f" ({reason})" if reason else "")

    async def wait_ready(self) -> None:
        await self._became_ready.wait()

    @property
    def max_model_len(self) -> int | None:
        """Tokens of prompt and output; None before any worker is known."""
        return min((link.info.max_model_len for link in self._connections.links.values()), default=None)

    def stats(self) -> dict[str, Any]:
        """For `pdray status`."""
        running = sum(request.granted.done() for request in self._requests.values())
        return {"router_id": self.router_id, "queue_depth": len(self._queue), "running": running}

    async def submit(
        self, prompt: str | list[int], params: SamplingParams, *, request_id: str, priority: int = 0
    ) -> RoutedRequest:
        """Take a request; returns once it has its lease. Cancelling this call gives the request up.

        Args:
            priority: lower goes first.

        Raises:
            InvalidRequestError: it can never be served. QueueFullError: not now. NoWorkerError: nobody is there.
            WorkerDiedError: the worker that was asked died.
        """
        arrival = time.monotonic()
        try:
            request = await self._make_request(prompt, params, request_id, priority, arrival)
            request.entry = self._queue.ticket(arrival, request, priority)
            if len(self._queue) or not self._dispatch(request):
                self._queue.push(time.monotonic(), request.entry)
        except PdrayError:
            self._report("rejected", None)
            raise
        self._requests[request_id] = request
        self._pump()
        self._queue_changed()
        try:
            await request.granted
        except asyncio.CancelledError:
            request.abort()
            raise
        return request

    async def _make_request(
        self, prompt: str | list[int], params: SamplingParams, request_id: str, priority: int, arrival: float
    ) -> RoutedRequest:
        max_model_len = self.max_model_len
        if max_model_len is None or not self.ready:
            raise NoWorkerError(self.why_not_ready)
        if params.n > self.config.max_num_seqs:
            raise InvalidRequestError(
                f"n is {params.n}, but a worker runs {self.config.max_num_seqs} sequences (max_num_seqs); lower n",
                "n",
            )
        ids = await tokenize(self.tokenizer, prompt)
        params = complete_params(params, len(ids), max_model_len)
        if request_id in self._requests:
            raise InvalidRequestError(f"request id {request_id!r} is in use; choose another", "request_id")
        text = prompt if isinstance(prompt, str) else None
        return RoutedRequest(request_id, text, ids, params, priority, self.tokenizer, arrival, self._abort)

    # admission

    def _pump(self) -> None:
        """Give leases to those who wait, in order, while there is credit."""
        while (entry := self._queue.peek()) is not None and self._dispatch(entry.item):
            self._queue.remove(entry)
            self._queue_changed()

    def _dispatch(self, request: RoutedRequest) -> bool:
        """Ask for a lease, if somebody has credit for it."""
        demand = self._demand(request)
        choice = choose(
            demand,
            [link.decode_state() for link in self._connections.open_links("decode", "both")],
            [link.prefill_state() for link in self._connections.open_links("prefill")],
            set(self._connections.pairs),
            max_queued_tokens=2 * self.config.max_num_batched_tokens,
            local_prefill_max_tokens=self.config.local_prefill_max_tokens,
        )
        if choice is None:
            return False
        leg = request.tracker.start() if request.key is None else request.tracker.replace(request.key)[0]
        request.key, request.choice, request.lease_asked_at = leg.key, choice, time.monotonic()
        link = self._connections.links[choice.decode_worker_id]
        link.asked[leg.key] = (demand.blocks, demand.places)
        if choice.prefill_worker_id is not None:
            self._connections.links[choice.prefill_worker_id].queued[leg.key] = demand.tokens
        self._connections.send(
            choice.decode_worker_id,
            LeaseRequest(
                *leg.key,
                request.output.prompt_token_ids,
                request.params,
                list(leg.indices),
                list(leg.output_token_ids),
                choice.prefill_worker_id,
                request.priority,
            ),
        )
        return True

    def _demand(self, request: RoutedRequest) -> Demand:
        num_tokens = len(request.output.prompt_token_ids)
        return Demand(-(-(num_tokens + 1) // self.config.block_size), request.params.n, num_tokens)

    def _granted(self, link: WorkerLink, message: LeaseGranted) -> None:
        request = self._leg_request(message.key)
        if request is None or request.choice is None:
            self._connections.send(link.info.worker_id, CloseLease(*message.key, "nobody waits for it"))
            return
        self._queue.drain_rate.admitted(time.monotonic())
        timings = request.output.timings
        timings.queue = request.lease_asked_at - request.arrival
        timings.lease_wait = time.monotonic() - request.lease_asked_at
        request.output.num_cached_tokens = message.num_cached_tokens
        if request.choice.prefill_worker_id is not None and not self._start_prefill(request, request.choice, message):
            return
        if not request.granted.done():
            request.granted.set_result(None)

    def _start_prefill(self, request: RoutedRequest, choice: Choice, grant: LeaseGranted) -> bool:
        prefill_id = choice.prefill_worker_id
        assert prefill_id is not None
        epoch = self._connections.pairs.get((prefill_id, choice.decode_worker_id))
        link = self._connections.links.get(prefill_id)
        if epoch is None or link is None or not link.is_open:
            self._lose(request, f"{prefill_id} was lost before it could begin")
            return False
        request.prefilling = True
        leg = next(leg for leg in request.tracker.legs if leg.key == grant.key)
        self._connections.send(
            prefill_id,
            PrefillRequest(
                *grant.key,
                request.output.prompt_token_ids,
                request.params,
                list(leg.indices),
                list(leg.output_token_ids),
                choice.decode_worker_id,
                epoch,
                grant.block_ids,
                grant.num_cached_tokens,
                request.priority,
            ),
        )
        return True

    def _denied(self, link: WorkerLink, message: LeaseDenied) -> None:
        request = self._leg_request(message.key)
        if message.retriable:
            link.denied = True
        if request is None:
            return
        if not message.retriable:
            self._end(request, "rejected", InvalidRequestError(message.reason))
        else:
            assert request.entry is not None and request.choice is not None
            prefill_id, request.choice = request.choice.prefill_worker_id, None
            if prefill_id is not None and (prefill := self._connections.links.get(prefill_id)) is not None:
                prefill.queued.pop(message.key, None)
            self._queue.push_back(request.entry)
            self._queue_changed()

    # tokens

    def _tokens(self, request: RoutedRequest, key: LegKey, tokens: list[SampledToken]) -> None:
        """Book tokens of a live leg."""
        fresh = request.tracker.accept(key, tokens)
        if not fresh:
            return
        is_first, before = request.first_token_at is None, request.last_token_at
        request.take(fresh)
        if self._metrics is not None:
            if is_first:
                self._metrics.on_first_token(request.output.timings)
            else:
                self._metrics.on_inter_token(request.last_token_at - before)
        if request.tracker.done:
            outcome = request.output.outputs[0].finish_reason or "stop"
            self._end(request, outcome, close=request.outruns)

    def _first_tokens(self, link: WorkerLink, message: FirstTokens) -> None:
        link.prefill_ended(message.key)
        request = self._leg_request(message.key)
        if request is not None:
            request.prefilling = False
            timings = request.output.timings
            timings.prefill_queue, timings.prefill = message.prefill_queue, message.prefill
            request.output.num_cached_tokens = max(request.output.num_cached_tokens, message.num_cached_tokens)
            self._tokens(request, message.key, message.tokens)
            if request.ended and not request.outruns:
                self._expect_credit(request)  # it never joined the batch, so no step will tell
        self._pump()

    def _leg_tokens(self, message: LegTokens) -> None:
        request = self._leg_request(message.key)
        if request is None:
            return
        request.prefilling = False  # the decode worker has it all, also if the prefill worker's answer never comes
        timings = request.output.timings
        for name in ("prefill_queue", "prefill", "transfer_wait", "first_decode_step"):
            seconds = getattr(message, name)
            if seconds is not None and getattr(timings, name) is None:
                setattr(timings, name, seconds)
        if message.num_cached_tokens is not None:
            request.output.num_cached_tokens = max(request.output.num_cached_tokens, message.num_cached_tokens)
        self._tokens(request, message.key, message.tokens)

    # ends

    def _abort(self, request: RoutedRequest) -> None:
        for completion in request.output.outputs:
            completion.finish_reason = completion.finish_reason or "abort"
        self._end(request, "abort")

    def _lose(self, request: RoutedRequest, reason: str) -> None:
        self._end(request, "error", WorkerDiedError(f"request {request.request_id} was lost: {reason}"))

    def _end(
        self, request: RoutedRequest, outcome: str, error: BaseException | None = None, *, close: bool = True
    ) -> None:
        """The one way out: close what is open, tell the consumer, forget the request.

        Args:
            close: False if its workers have ended it by themselves.
        """
        if request.ended:
            return
        if request.entry is not None:
            self._queue.remove(request.entry)
        for leg in request.tracker.drop():
            if request.choice is not None:
                self._close_leg(request, leg, outcome, close=close)
        self._requests.pop(request.request_id, None)
        request.end(error)
        self._report(outcome, request.output)
        self._queue_changed()
        self._pump()

    def _close_leg(self, request: RoutedRequest, leg: Leg, reason: str, *, close: bool) -> None:
        assert request.choice is not None
        prefill_id, decode_id = request.choice
        asked = (link := self._connections.links.get(decode_id)) is not None and link.asked.pop(
            leg.key, None
        ) is not None
        if close:
            if not asked:
                self._expect_credit(request)
            self._connections.send(decode_id, CloseLease(*leg.key, reason))
        if prefill_id is not None and (link := self._connections.links.get(prefill_id)) is not None:
            if asked:  # it was never sent
                link.queued.pop(leg.key, None)
                return
            link.prefill_ended(leg.key)
            if close:
                self._connections.send(prefill_id, CancelPrefill(*leg.key))

    def _expect_credit(self, request: RoutedRequest) -> None:
        assert request.choice is not None
        if (link := self._connections.links.get(request.choice.decode_worker_id)) is not None:
            demand = self._demand(request)
            link.expect_credit(demand.blocks, demand.places)

    # workers

    def on_worker_message(self, link: WorkerLink, message: AnyMessage) -> None:
        """See ConnectionsOwner."""
        match message:
            case Tokens():
                link.update_credit(message.credit)
                for update in message.updates:
                    self._leg_tokens(update)
                self._pump()
            case FirstTokens():
                self._first_tokens(link, message)
            case LeaseGranted() | LeaseDenied():
                link.asked.pop(message.key, None)
                link.update_credit(message.credit)
                if isinstance(message, LeaseGranted):
                    self._granted(link, message)
                else:
                    self._denied(link, message)
                self._pump()
            case CreditUpdate():
                link.update_credit(message.credit)
                self._note_ready()
                self._pump()
            case Pong():
                link.told_queued_tokens = message.queued_tokens
                self._note_ready()
                self._pump()
            case LeaseClosed() | PrefillFailed():
                if (request := self._leg_request(message.key)) is not None:
                    self._lose(request, f"{link.info.worker_id}: {message.reason}")
            case _:
                raise TypeError(f"a router takes no {type(message).__name__} (from {link.info.worker_id})")

    def on_worker_lost(self, link: WorkerLink, reason: str) -> None:
        """See ConnectionsOwner."""
        worker_id = link.info.worker_id
        for request in list(self._requests.values()):
            if request.choice is None:
                continue
            prefill_id, decode_id = request.choice
            if decode_id == worker_id or (request.prefilling and prefill_id == worker_id):
                self._lose(request, f"{worker_id} is gone ({reason})")

    def on_view(self) -> None:
        """See ConnectionsOwner."""
        self._note_ready()
        self._pump()

    # background

    async def _keep_house(self) -> None:
        """Renews leases, asks prefill workers for their queues, ends those who waited too long."""
        renew_at = 0.0
        while True:
            now = time.monotonic()
            for entry in self._queue.expired(now):
                wait = f"{self.config.max_queue_wait_s:g} s (max_queue_wait_s)"
                error = QueueFullError(f"no worker had a place within {wait}", self._queue.retry_after_s(now))
                self._end(entry.item, "rejected", error)
            if now >= renew_at:
                self._renew()
                renew_at = now + self.config.lease_timeout_s / 4
            elif len(self._queue):  # other routers' prompts may be done
                self._ask_for_queues()
            await asyncio.sleep(HOUSEKEEPING_S)

    def _renew(self) -> None:
        keys: dict[str, list[LegKey]] = {}
        for request in self._requests.values():
            if request.choice is not None:
                keys.setdefault(request.choice.decode_worker_id, []).extend(leg.key for leg in request.tracker.legs)
        for link in self._connections.open_links("decode", "both"):
            self._connections.send(link.info.worker_id, RenewLeases(keys.get(link.info.worker_id, [])))
        self._ask_for_queues()

    def _ask_for_queues(self) -> None:
        for link in self._connections.open_links("prefill"):
            self._connections.send(link.info.worker_id, Ping())

    # small things

    def _leg_request(self, key: LegKey) -> RoutedRequest | None:
        request = self._requests.get(key.request_id)
        return request if request is not None and any(leg.key == key for leg in request.tracker.legs) else None

    def _note_ready(self) -> None:
        if self.ready:
            self._became_ready.set()

    def _queue_changed(self) -> None:
        if self._metrics is not None:
            self._metrics.on_queue_depth(len(self._queue))

    def _report(self, outcome: str, output: RequestOutput | None) -> None:
        if self._metrics is not None:
            self._metrics.on_finished(outcome, output)

    def _house_left(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s: internal error; leases are no longer renewed", self.router_id, exc_info=error)
