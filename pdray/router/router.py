"""The router: takes requests, brings their tokens home, replays what a worker has lost, and ends what must end.

It follows the cluster's view and holds one session to each worker. Everything runs on one event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pdray.background import BackgroundTasks, LoopFailures
from pdray.config import Config
from pdray.control.losses import Loss
from pdray.errors import (
    ConfigError,
    InvalidRequestError,
    NoWorkerError,
    PdrayError,
    QueueFullError,
    RequestFailedError,
    RequestTimeoutError,
    WorkerDiedError,
)
from pdray.models.generation_config import NEUTRAL, SamplingDefaults
from pdray.outputs import RequestOutput, RequestTimings, SampledToken
from pdray.router.connections import WorkerConnections
from pdray.router.dispatcher import Dispatcher
from pdray.router.drain import Drain
from pdray.router.leg import RoutedLeg
from pdray.router.link import WorkerLink
from pdray.router.probe import PairProbe, Report
from pdray.router.request import RoutedRequest
from pdray.router.tokenization import encoder_of
from pdray.router.validation import check_tokenizer, complete_params, tokenize, tokenize_all
from pdray.sampling_params import SamplingParams
from pdray.wire.cluster_view import ClusterView
from pdray.wire.lease_messages import (
    CreditUpdate,
    LeaseClosed,
    LeaseDenied,
    LeaseGranted,
    LegTokens,
    RenewLeases,
    Tokens,
)
from pdray.wire.messages import AnyMessage
from pdray.wire.prefill_messages import FirstTokens, Ping, Pong, PrefillFailed
from pdray.wire.worker_news import PrefixUpdate, StepFailed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

HOUSEKEEPING_S = 0.25
REPLAY_DELAY_S = 0.05  # before the second replay; doubles with each
MAX_REPLAY_DELAY_S = 1.0


class Metrics(Protocol):
    """What a router reports; pdray.metrics.RouterMetrics in a Ray process."""

    def on_queue_depth(self, depth: int) -> None: ...
    def on_first_token(self, timings: RequestTimings) -> None: ...
    def on_inter_token(self, seconds: float) -> None: ...
    def on_finished(self, outcome: str, output: RequestOutput | None) -> None: ...
    def on_replay(self) -> None: ...


class Router:
    """See the module.

    Args:
        tokenizer: None serves token ids only. A ConfigError if it has no tokenizer.json, or its decoder does not work
            token by token.
        router_id: must begin with "router" and be unique in the cluster.
        watch: returns the first view newer than the version given, or after a while the same.
        sampling_defaults: what the API's requests get where they leave sampling parameters out.
        report_broken: told of workers that are connected and do not serve.
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
        sampling_defaults: SamplingDefaults = NEUTRAL,
        report_broken: Report | None = None,
    ) -> None:
        if tokenizer is not None and not tokenizer.is_fast:
            raise ConfigError(
                f"the tokenizer of {config.tokenizer or config.model} is a {type(tokenizer).__name__}, which cannot "
                "decode token by token; set tokenizer to one with a tokenizer.json"
            )
        if tokenizer is not None:
            encoder_of(tokenizer)  # refuses one that it cannot read, and takes a moment
        self.config = config
        self.tokenizer = tokenizer
        self.router_id = router_id
        self.sampling_defaults = sampling_defaults
        self._metrics = metrics
        self.failures = LoopFailures()
        self._connections = WorkerConnections(router_id, secret, watch, config.worker_timeout_s, self, self.failures)
        self._dispatcher = Dispatcher(config, self._connections, self)
        self._requests: dict[str, RoutedRequest] = {}
        self._tasks = BackgroundTasks(self._failed, self.failures)
        self._became_ready = asyncio.Event()
        self.drain = Drain(self._end_all)
        self._probe = PairProbe(
            router_id,
            self._connections,
            lambda: not self._requests,
            report_broken,
            interval_s=config.probe_interval_s or 0.0,
            timeout_s=config.probe_timeout_s,
        )

    # for the API

    async def start(self) -> None:
        """Follow the cluster. Returns at once; see wait_ready()."""
        self._connections.start()
        self._tasks.keep_running("keep house", self._keep_house)
        self._tasks.keep_running("renew leases", self._renew_leases)
        if self.config.probe_interval_s is not None:
            self._tasks.keep_running("probe pairs", self._probe.run)

    async def stop(self) -> None:
        """End what runs or waits, with an error: half an answer must not look whole. Close the sessions."""
        self._end_all("this router is stopping; try again shortly")
        self.drain.cancel()
        await self._connections.stop()
        await self._tasks.stop()

    @property
    def ready(self) -> bool:
        """Whether a request could be served: a pair, or a worker that does both, is connected."""
        return self._connections.can_serve and self.drain.refuses is None

    @property
    def why_not_ready(self) -> str:
        if self.drain.refuses is not None:
            return self.drain.refuses
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
        queue_depth = len(self._dispatcher.queue)
        stats = {"router_id": self.router_id, "ready": self.ready, "queue_depth": queue_depth, "running": running}
        return stats | ({"loop_failures": self.failures.describe()} if self.failures.counts else {})

    @property
    def vocab_size(self) -> int | None:
        """The model's, None before any worker is known. A prompt may hold ids that the tokenizer has not."""
        sizes = (link.info.vocab_size for link in self._connections.links.values())
        return min((size for size in sizes if size is not None), default=None)

    async def tokenize(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """Token ids of prompts that belong together: one that cannot be served refuses all, before any is submitted.

        Raises:
            InvalidRequestError: see tokenize_all. NoWorkerError: nobody is there.
        """
        try:
            return await tokenize_all(self.tokenizer, prompts, self._context_length(), self.vocab_size)
        except PdrayError:
            self._report("rejected", None)
            raise

    async def submit(
        self,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        default_max_tokens: int | None = None,
        text: str | None = None,
        arrival: float | None = None,
    ) -> RoutedRequest:
        """Take a request; returns once it has its lease. Cancelling this call gives the request up.

        Args:
            priority: lower goes first.
            default_max_tokens: stands in for params.max_tokens where that is None, as far as the context allows.
            text: what a prompt of token ids was made from.
            arrival: when it came (time.monotonic()), if not now.

        Raises:
            InvalidRequestError: it can never be served. QueueFullError: not now. NoWorkerError: nobody is there.
            WorkerDiedError: workers died under it more than max_replays times. RequestTimeoutError: it took too long.
            RequestFailedError: an engine failed on it.
        """
        arrival = time.monotonic() if arrival is None else arrival
        try:
            request = await self._make_request(prompt, params, request_id, priority, text, arrival, default_max_tokens)
            self._dispatcher.submit(RoutedLeg(request, request.tracker.start()), arrival)
        except PdrayError:
            self._report("rejected", None)
            raise
        self._requests[request_id] = request
        self.on_queue_changed()
        try:
            await request.granted
        except asyncio.CancelledError:
            request.abort()
            raise
        return request

    def _context_length(self) -> int:
        max_model_len = self.max_model_len
        if max_model_len is None or not self.ready:
            raise NoWorkerError(self.why_not_ready)
        return max_model_len

    async def check(
        self, prompt: str | list[int], params: SamplingParams, default_max_tokens: int | None = None
    ) -> tuple[list[int], SamplingParams]:
        """What submit() would make of them: the prompt's token ids, and the parameters with nothing left open.

        Raises:
            InvalidRequestError: it can never be served. NoWorkerError: nobody is there.
        """
        max_model_len = self._context_length()
        max_num_seqs = min(link.info.max_num_seqs for link in self._connections.links.values())
        if params.n > max_num_seqs:
            raise InvalidRequestError(
                f"n is {params.n}, but a worker runs {max_num_seqs} sequences (max_num_seqs); lower n", "n"
            )
        check_tokenizer(params, self.tokenizer)
        ids = await tokenize(self.tokenizer, prompt, max_model_len, self.vocab_size)
        return ids, complete_params(params, len(ids), max_model_len, default_max_tokens)

    async def _make_request(
        self,
        prompt: str | list[int],
        params: SamplingParams,
        request_id: str,
        priority: int,
        text: str | None,
        arrival: float,
        default_max_tokens: int | None,
    ) -> RoutedRequest:
        ids, params = await self.check(prompt, params, default_max_tokens)
        if request_id in self._requests:
            raise InvalidRequestError(f"request id {request_id!r} is in use; choose another", "request_id")
        text = prompt if isinstance(prompt, str) else text
        return RoutedRequest(request_id, text, ids, params, priority, self.tokenizer, arrival, self._abort)

    # DispatchOwner

    def on_granted(self, leg: RoutedLeg, num_cached_tokens: int) -> None:
        """See DispatchOwner."""
        request = leg.request
        if request.first_token_at is None:
            timings = request.output.timings
            timings.queue = leg.asked_at - request.arrival
            timings.lease_wait = time.monotonic() - leg.asked_at
            request.output.num_cached_tokens = num_cached_tokens
        if not request.granted.done():
            request.granted.set_result(None)

    def on_rejected(self, leg: RoutedLeg, error: PdrayError) -> None:
        """See DispatchOwner."""
        self._end(leg.request, "error" if leg.request.granted.done() else "rejected", error)

    def on_lost(self, leg: RoutedLeg, loss: Loss) -> None:
        """See DispatchOwner. Other workers go on from prompt and tokens so far, unless that is of no use."""
        request = leg.request
        request.losses.count(loss, leg.num_losses)
        if (error := self._final(request, loss)) is not None:
            self._end(request, "error", error)
            return
        logger.warning(
            "%s: attempt %d of %s is %s: %s",
            self.router_id,
            leg.key.attempt,
            request.request_id,
            loss.verdict,
            loss.reason,
        )
        if self._metrics is not None:
            self._metrics.on_replay()
        self._dispatcher.close(leg, "it is replayed elsewhere")
        alone, num_losses = leg.alone or loss.verdict == "suspect", leg.num_losses + 1
        delay = 0.0 if num_losses == 1 else min(MAX_REPLAY_DELAY_S, REPLAY_DELAY_S * 2**num_losses)
        for successor in request.tracker.replace(leg.key):
            self._dispatcher.resubmit(RoutedLeg(request, successor, alone=alone, num_losses=num_losses), leg, delay)

    def _final(self, request: RoutedRequest, loss: Loss) -> PdrayError | None:
        """Why a request that has lost a leg cannot go on; None if it can."""
        if loss.verdict == "invalid":
            return InvalidRequestError(loss.reason, loss.param)
        if loss.verdict == "failed":
            return RequestFailedError(
                f"the engine failed while it computed request {request.request_id} and no other, so it is not tried "
                f"again: {loss.reason}"
            )
        if request.losses.num > self.config.max_replays:
            return WorkerDiedError(
                f"request {request.request_id} was lost {request.losses.num} times (max_replays is "
                f"{self.config.max_replays}), at last because {loss.reason}"
            )
        return None

    def on_queue_changed(self) -> None:
        """See DispatchOwner."""
        if self._metrics is not None:
            self._metrics.on_queue_depth(len(self._dispatcher.queue))

    # tokens

    def _tokens(self, leg: RoutedLeg, tokens: list[SampledToken]) -> None:
        """Book tokens of a live leg; end what they end."""
        request = leg.request
        fresh = request.tracker.accept(leg.key, tokens)
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
            self._end(request, request.output.outputs[0].finish_reason or "stop")
            return
        for ended in request.tracker.ended_legs():
            self._close(self._dispatcher.legs[ended.key], "finished")
        if leg.key in self._dispatcher.legs:
            for index in {token.index for token in fresh} & request.outruns:
                self._dispatcher.end_completion(leg, index)

    def _first_tokens(self, link: WorkerLink, message: FirstTokens) -> None:
        link.prefill_ended(message.key)
        leg = self._dispatcher.legs.get(message.key)
        if leg is None:
            return
        output = leg.request.output
        if leg.request.first_token_at is None:
            output.timings.prefill_queue, output.timings.prefill = message.prefill_queue, message.prefill
        self._note_cached(leg, message.num_cached_tokens)
        self._tokens(leg, message.tokens)
        if leg.key not in self._dispatcher.legs and not leg.request.outruns.intersection(leg.leg.indices):
            self._dispatcher.expect_credit(leg)  # it never joined the batch, so no step will tell

    def _leg_tokens(self, message: LegTokens) -> None:
        leg = self._dispatcher.legs.get(message.key)
        if leg is None:
            return
        leg.filling = False
        if message.prefill is not None or message.first_decode_step is not None:
            self._note_timings(leg.request.output, message)
        if message.num_cached_tokens is not None:
            self._note_cached(leg, message.num_cached_tokens)
        self._tokens(leg, message.tokens)

    @staticmethod
    def _note_timings(output: RequestOutput, message: LegTokens) -> None:
        for name in ("prefill_queue", "prefill", "transfer_wait", "first_decode_step"):
            seconds = getattr(message, name)
            if seconds is not None and getattr(output.timings, name) is None:
                setattr(output.timings, name, seconds)

    @staticmethod
    def _note_cached(leg: RoutedLeg, num_cached_tokens: int) -> None:
        """Of the prompt; a leg that goes on from outputs finds those in the cache, too."""
        if not leg.leg.output_token_ids:
            output = leg.request.output
            output.num_cached_tokens = max(output.num_cached_tokens, num_cached_tokens)

    # ends

    def _abort(self, request: RoutedRequest) -> None:
        for completion in request.output.outputs:
            completion.finish_reason = completion.finish_reason or "abort"
        self._end(request, "abort")

    def _end(self, request: RoutedRequest, outcome: str, error: BaseException | None = None) -> None:
        """The one way out: close what is open, tell the consumer, forget the request."""
        if request.ended:
            return
        for leg in request.tracker.drop():
            self._close(self._dispatcher.legs[leg.key], outcome)
        self._requests.pop(request.request_id, None)
        request.end(error)
        self._report(outcome, request.output)
        self.on_queue_changed()
        self._dispatcher.pump()

    def _end_all(self, reason: str) -> None:
        for request in list(self._requests.values()):
            self._end(request, "error" if request.granted.done() else "rejected", NoWorkerError(reason))

    def _end_waiting(self, reason: str) -> None:
        """Requests that have not begun are better off with whoever comes next."""
        for request in list(self._requests.values()):
            if not request.granted.done():
                self._end(request, "rejected", NoWorkerError(reason))

    def _close(self, leg: RoutedLeg, reason: str) -> None:
        """Its workers are told, unless they have ended every completion of it by themselves."""
        request = leg.request
        by_itself = all(request.tracker.has_ended(i) and i not in request.outruns for i in leg.leg.indices)
        self._dispatcher.close(leg, reason, tell=not by_itself)

    # ConnectionsOwner

    def on_worker_message(self, link: WorkerLink, message: AnyMessage) -> None:
        """See ConnectionsOwner."""
        if self._probe.takes(message):
            if isinstance(message, LeaseGranted | LeaseDenied):
                link.update_credit(message.credit)
            return
        match message:
            case Tokens():
                link.update_credit(message.credit)
                for update in message.updates:
                    if not self._probe.takes(update):
                        self._leg_tokens(update)
            case FirstTokens():
                self._first_tokens(link, message)
            case LeaseGranted():
                self._dispatcher.granted(link, message)
            case LeaseDenied():
                self._dispatcher.denied(link, message)
            case CreditUpdate():
                link.update_credit(message.credit)
                self._note_ready()
            case Pong():
                link.told_queued_tokens = message.queued_tokens
                self._note_ready()
            case PrefixUpdate():
                link.update_prefixes(message)
                return
            case LeaseClosed() | PrefillFailed():
                if (leg := self._dispatcher.legs.get(message.key)) is not None:
                    self.on_lost(leg, _loss(link, message))
            case StepFailed():
                link.failed = True
                self._dispatcher.step_failed(link.info.worker_id, message)
            case _:
                raise TypeError(f"a router takes no {type(message).__name__} (from {link.info.worker_id})")
        self._dispatcher.pump()

    def on_worker_lost(self, link: WorkerLink, reason: str) -> None:
        """See ConnectionsOwner."""
        self._dispatcher.worker_lost(link.info.worker_id, reason)

    def on_view(self) -> None:
        """See ConnectionsOwner."""
        draining = self._connections.draining
        if draining is not None:
            self.drain.begin(draining.left_s, draining.reason, refuse=True)
            self._end_waiting(draining.reason)
        elif self.drain.refuses is not None:
            self.drain.cancel()
        self._note_ready()
        self._dispatcher.pump()

    # background

    async def _keep_house(self) -> None:
        """Ends what waits or runs for too long."""
        while True:
            now = time.monotonic()
            for entry in self._dispatcher.queue.expired(now):
                self.on_rejected(entry.item, self._waited_too_long(now))
            self._end_late_requests(now)
            await asyncio.sleep(HOUSEKEEPING_S)

    async def _renew_leases(self) -> None:
        """Renews leases and asks prefill workers for their queues. No other work here: leases end without it."""
        renew_at = 0.0
        while True:
            now = time.monotonic()
            if now >= renew_at:
                self._renew()
                renew_at = now + self.config.lease_timeout_s / 4
            elif len(self._dispatcher.queue):  # other routers' prompts may be done
                self._ask_for_queues()
            await asyncio.sleep(HOUSEKEEPING_S)

    def _waited_too_long(self, now: float) -> PdrayError:
        if not self.ready:
            return NoWorkerError(self.why_not_ready)
        wait = f"{self.config.max_queue_wait_s:g} s (max_queue_wait_s)"
        return QueueFullError(f"no worker had a place within {wait}", self._dispatcher.queue.retry_after_s(now))

    def _end_late_requests(self, now: float) -> None:
        limit = self.config.request_timeout_s
        if limit is None:
            return
        for request in [r for r in self._requests.values() if now - r.arrival > limit]:
            error = RequestTimeoutError(f"not finished within {limit:g} s (request_timeout_s)")
            self._end(request, "timeout", error)

    def _renew(self) -> None:
        leases = self._dispatcher.leases()
        for worker_id, keys in self._probe.leases().items():
            leases.setdefault(worker_id, []).extend(keys)
        for link in self._connections.open_links("decode", "both"):
            keys = leases.get(link.info.worker_id, [])
            self._connections.send(link.info.worker_id, RenewLeases(keys, link.wanted))
        self._ask_for_queues()

    def _ask_for_queues(self) -> None:
        for link in self._connections.open_links("prefill"):
            self._connections.send(link.info.worker_id, Ping())

    # small things

    def _note_ready(self) -> None:
        if self.ready:
            self._became_ready.set()

    def _report(self, outcome: str, output: RequestOutput | None) -> None:
        if self._metrics is not None:
            self._metrics.on_finished(outcome, output)

    def _failed(self, error: BaseException) -> None:
        logger.error("%s: internal error", self.router_id, exc_info=error)


def _loss(link: WorkerLink, message: LeaseClosed | PrefillFailed) -> Loss:
    """What a worker tells of one leg."""
    param = message.param if isinstance(message, PrefillFailed) else None
    if message.verdict == "invalid":
        return Loss(message.reason, link.info.worker_id, message.verdict, param)
    reason = f"{link.info.worker_id}: {message.reason}"
    return Loss(reason, message.lost_worker_id or reason, message.verdict)
