"""The router on an event loop: what the API calls, and the hands of its state machine.

Prompts are tokenized and checked here; then RouterMachine decides, and its effects are performed. Everything runs on
one event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pdray.background import BackgroundTasks, LoopFailures
from pdray.config import Config
from pdray.control.effects import Send
from pdray.control.pair_health import BrokenPair
from pdray.errors import ConfigError, NoWorkerError, PdrayError
from pdray.models.generation_config import NEUTRAL, SamplingDefaults
from pdray.outputs import Outcome
from pdray.router.connections import Connections
from pdray.router.effects import (
    BecameReady,
    Connect,
    Disconnect,
    Ended,
    Granted,
    ProbesDone,
    Progress,
    ReportBroken,
    RouterEffect,
    TickAt,
)
from pdray.router.link import NO_CREDIT
from pdray.router.machine import RouterMachine
from pdray.router.request import Request
from pdray.router.requests import Metrics
from pdray.router.routed import RoutedRequest
from pdray.router.tokenization import encoder_of
from pdray.router.validation import WorkerLimits, check_request, tokenize_all
from pdray.sampling_params import SamplingParams
from pdray.wire.cluster_view import ClusterView
from pdray.wire.messages import AnyMessage
from pdray.wire.peers import PeerName, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

HOUSEKEEPING_S = 0.25

Report = Callable[[BrokenPair], Awaitable[None]]


class DecodePool(NamedTuple):
    """Blocks of one decode worker's KV pool. free_blocks: those that a new lease could get."""

    num_blocks: int
    free_blocks: int
    block_size: int


class Router:
    """See the module.

    Args:
        tokenizer: None serves token ids only. A ConfigError if it has no tokenizer.json, or its decoder does not work
            token by token.
        router_id: must be unique in the cluster.
        watch: returns the first view newer than the version given, or after a while the same.
        sampling_defaults: what the API's requests get where they leave sampling parameters out.
        report_broken: told of workers that are connected and do not serve.

    Attributes:
        machine: what decides, and what is known; to be looked at.
        tasks: everything that runs beside.
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
        self.failures = LoopFailures()
        self.tasks = BackgroundTasks(self._failed, self.failures)
        self.machine = RouterMachine(config, router_id, metrics)
        self._metrics = metrics
        self._report_broken = report_broken
        me = PeerName(router_id, "1", Role.ROUTER)
        self._connections = Connections(me, secret, watch, config.worker_timeout_s, self, self.tasks)
        self._routed: dict[str, RoutedRequest] = {}
        self._became_ready = asyncio.Event()
        self._reports: asyncio.Queue[list[BrokenPair] | None] = asyncio.Queue()  # of a round of probes; None ends it

    # for the API

    async def start(self) -> None:
        """Follow the cluster. Returns at once; see wait_ready()."""
        self._connections.start()
        self.tasks.keep_running("keep house", self._keep_house)
        self.tasks.keep_running("renew leases", self._renew_leases)
        if self.config.probe_interval_s is not None:
            self.tasks.keep_running("probe pairs", self._probe_pairs)

    async def stop(self) -> None:
        """End what runs or waits, with an error: half an answer must not look whole. Close the sessions."""
        self._perform(self.machine.stop(time.monotonic(), "this router is stopping; try again shortly"))
        self.tasks.cancel()  # before anything is awaited: a worker's next message would find nobody
        await self._connections.close()
        await self.tasks.stop()

    def drain(self, left_s: float, reason: str) -> None:
        """This router is about to end: what still runs after `left_s` is told so. New requests are still taken."""
        self._perform(self.machine.drain(time.monotonic(), left_s, reason))

    @property
    def ready(self) -> bool:
        """Whether a request could be served: a pair, or a worker that does both, is connected."""
        return self.machine.ready

    @property
    def why_not_ready(self) -> str:
        return self.machine.why_not_ready

    async def wait_ready(self) -> None:
        await self._became_ready.wait()

    @property
    def max_model_len(self) -> int | None:
        """Tokens of prompt and output; None before any worker is known."""
        return self.machine.workers.max_model_len

    @property
    def pools(self) -> list[DecodePool]:
        """The connected decode workers' KV blocks, as they have told last."""
        return [
            DecodePool(link.info.num_blocks, link.credit.free_blocks, link.info.block_size)
            for link in self.machine.workers.open_links(Role.DECODE, Role.BOTH)
            if link.credit is not NO_CREDIT
        ]

    @property
    def vocab_size(self) -> int | None:
        """The model's, None before any worker is known. A prompt may hold ids that the tokenizer has not."""
        return self.machine.workers.vocab_size

    def stats(self) -> dict[str, Any]:
        """For `pdray status`."""
        running = sum(request.granted for request in self.machine.requests.values())
        queue_depth = self.machine.queue_depth
        stats = {"router_id": self.router_id, "ready": self.ready, "queue_depth": queue_depth, "running": running}
        return stats | ({"loop_failures": self.failures.describe()} if self.failures.counts else {})

    async def tokenize(self, prompts: Sequence[str | list[int]], keep_last: int | None = None) -> list[list[int]]:
        """Token ids of prompts that belong together: one that cannot be served refuses all, before any is submitted.

        Args:
            keep_last: see tokenize_all.

        Raises:
            InvalidRequestError: see tokenize_all. NoWorkerError: nobody is there.
        """
        try:
            return await tokenize_all(self.tokenizer, prompts, self._context_length(), self.vocab_size, keep_last)
        except PdrayError:
            self._note_rejected()
            raise

    async def check(
        self, prompt: str | list[int], params: SamplingParams, default_max_tokens: int | None = None
    ) -> tuple[list[int], SamplingParams]:
        """What submit() would make of them: the prompt's token ids, and the parameters with nothing left open.

        Raises:
            InvalidRequestError: it can never be served. NoWorkerError: nobody is there.
        """
        limits = WorkerLimits(self._context_length(), self.machine.workers.max_num_seqs, self.vocab_size)
        parser = self.config.reasoning_parser
        return await check_request(prompt, params, self.tokenizer, limits, parser, default_max_tokens)

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
        is_checked: bool = False,
        whole: bool = False,
    ) -> RoutedRequest:
        """Take a request; returns once it has its lease. Cancelling this call gives the request up.

        Args:
            priority: lower goes first.
            default_max_tokens: stands in for params.max_tokens where that is None, as far as the context allows.
            text: what a prompt of token ids was made from.
            arrival: when it came (time.monotonic()), if not now.
            is_checked: prompt and params are what check() has returned. If nobody is there now, it waits.
            whole: nothing will be read before its end; tokens come in fewer messages then.

        Raises:
            InvalidRequestError: it can never be served. QueueFullError: not now. NoWorkerError: nobody is there.
            WorkerDiedError: workers died under it more than max_replays times. RequestTimeoutError: it took too long.
            RequestFailedError: an engine failed on it.
        """
        arrival = time.monotonic() if arrival is None else arrival
        text = prompt if isinstance(prompt, str) else text
        try:
            if not is_checked:
                prompt, params = await self.check(prompt, params, default_max_tokens)
            assert not isinstance(prompt, str)
            request = Request(request_id, text, prompt, params, priority, self.tokenizer, arrival, whole=whole)
            effects = self.machine.submit(time.monotonic(), request)
        except PdrayError:
            self._note_rejected()
            raise
        routed = self._routed[request_id] = RoutedRequest(request, self._abort)
        self._perform(effects)
        try:
            await routed.granted
        except asyncio.CancelledError:
            routed.abort()
            raise
        return routed

    def _abort(self, request: Request) -> None:
        self._perform(self.machine.abort(time.monotonic(), request))

    def _context_length(self) -> int:
        max_model_len = self.max_model_len
        if max_model_len is None or not self.ready:
            raise NoWorkerError(self.why_not_ready)
        return max_model_len

    def _note_rejected(self) -> None:
        if self._metrics is not None:
            self._metrics.on_finished(Outcome.REJECTED, None)

    # ConnectionsOwner

    def on_view(self, view: ClusterView) -> None:
        """See ConnectionsOwner."""
        self._perform(self.machine.view(time.monotonic(), view))

    def on_opened(self, worker_id: str, incarnation: str) -> None:
        """See ConnectionsOwner."""
        self._perform(self.machine.opened(worker_id, incarnation))

    def on_worker_message(self, worker_id: str, message: AnyMessage) -> None:
        """See ConnectionsOwner."""
        self._perform(self.machine.received(time.monotonic(), worker_id, message))

    def on_closed(self, worker_id: str, reason: str) -> None:
        """See ConnectionsOwner."""
        self._perform(self.machine.closed(time.monotonic(), worker_id, reason))

    # effects

    def _perform(self, effects: Iterable[RouterEffect]) -> None:
        """None of it calls the machine before this returns."""
        for effect in effects:
            match effect:
                case Progress(request):
                    self._routed[request.request_id].wake()
                case Send(to, message):
                    self._connections.send(to, message)
                case Granted(request):
                    self._routed[request.request_id].begin()
                case Ended(request, error):
                    self._routed.pop(request.request_id).end(error)
                case TickAt(at):
                    asyncio.get_running_loop().call_later(max(0.0, at - time.monotonic()), self._tick)
                case Connect(worker, delay_s):
                    self._connections.connect(worker, delay_s)
                case Disconnect(worker_id):
                    self._connections.disconnect(worker_id)
                case BecameReady():
                    self._became_ready.set()
                case ReportBroken(pairs):
                    self._reports.put_nowait(pairs)
                case ProbesDone():
                    self._reports.put_nowait(None)

    # background

    def _tick(self) -> None:
        self._perform(self.machine.tick(time.monotonic()))

    async def _keep_house(self) -> None:
        """Ends what waits or runs for too long."""
        while True:
            self._tick()
            await asyncio.sleep(HOUSEKEEPING_S)

    async def _renew_leases(self) -> None:
        """Apart from all other work: leases end without it."""
        while True:
            self._perform(self.machine.renew(time.monotonic()))
            await asyncio.sleep(HOUSEKEEPING_S)

    async def _probe_pairs(self) -> None:
        while True:
            await asyncio.sleep(self.config.probe_interval_s or 0.0)
            await self.probe_round()

    async def probe_round(self) -> None:
        """Probe every pair once, as long as there is nothing else to do, and report those that do not serve."""
        self._reports = asyncio.Queue()
        self._perform(self.machine.start_probes(time.monotonic()))
        while (pairs := await self._reports.get()) is not None:
            if self._report_broken is not None:
                for pair in pairs:
                    await self._report_broken(pair)

    def _failed(self, error: BaseException) -> None:
        logger.error("%s: internal error", self.router_id, exc_info=error)
