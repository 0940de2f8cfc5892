"""A scripted cluster: real sessions and real messages, workers whose every answer the test decides."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Literal

import pytest
from msgspec import structs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pdray.config import Config
from pdray.control.pair_health import BrokenPair
from pdray.outputs import Logprob, RequestOutput, RequestTimings, SampledToken
from pdray.router.routed import RoutedRequest
from pdray.router.router import Router
from pdray.sampling_params import SamplingParams
from pdray.testing.patience import PATIENCE_S
from pdray.wire.cluster_view import ClusterView, Draining, Pair, WorkerInfo
from pdray.wire.lease_messages import (
    Credit,
    CreditUpdate,
    CreditWanted,
    LeaseDenied,
    LeaseGranted,
    LegTokens,
    RenewLeases,
    Tokens,
)
from pdray.wire.message import LegKey
from pdray.wire.messages import AnyMessage
from pdray.wire.peers import PeerName, Role
from pdray.wire.prefill_messages import FirstTokens, LeaseConfirmed, Ping, Pong, PrefillRequest
from pdray.wire.server import SessionServer
from pdray.wire.session import Session

SECRET = b"secret of the test"
EOS = 128
GREEDY = SamplingParams(temperature=0, max_tokens=8)


def ascii_tokenizer() -> PreTrainedTokenizerFast:
    """Token id = ASCII code; EOS is 128."""
    vocabulary = {chr(code): code for code in range(128)}
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, "<eos>": EOS}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


class FakeWorker:
    """Answers heartbeats by itself and keeps everything else that routers send.

    Attributes:
        credit, queued_tokens, max_num_seqs, max_num_batched_tokens, num_blocks, max_model_len: what it tells.
        vocab_size, lender: likewise.
        wanted: the credit that routers have asked for with RenewLeases, each once.
        on_received: called with every message that it keeps.
    """

    def __init__(self, worker_id: str, role: Literal["prefill", "decode", "both"], incarnation: str = "1") -> None:
        self.worker_id, self.role, self.incarnation = worker_id, Role(role), incarnation
        self.credit = Credit(free_blocks=1000, free_places=64, running=0, waiting=0, leases=0)
        self.queued_tokens = 0
        self.max_num_seqs, self.max_num_batched_tokens = 64, 2048
        self.num_blocks, self.max_model_len = 1000, 100
        self.wanted: list[CreditWanted] = []
        self.vocab_size: int | None = None
        self.lender = ""
        self.received: list[Any] = []
        self.renewed: set[LegKey] = set()
        self.session: Session | None = None
        self.on_received: Callable[[Any], None] = lambda message: None
        self._changed = asyncio.Event()
        self._server = SessionServer(PeerName(worker_id, incarnation, self.role), SECRET, self, timeout_s=5)

    async def start(self) -> WorkerInfo:
        port = await self._server.start("127.0.0.1")
        place = {"host": "127.0.0.1", "port": port, "pid": 0, "node_id": "", "device": "cpu"}
        self.info = WorkerInfo(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            role=self.role,
            fingerprint="f",
            num_blocks=self.num_blocks,
            block_size=16,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            vocab_size=self.vocab_size,
            lender=self.lender,
            **place,  # type: ignore[arg-type]
        )
        return self.info

    async def die(self) -> None:
        """As a killed process: the port refuses, connections are reset, nobody says goodbye."""
        assert self._server._server is not None
        self._server._server.close()
        if self.session is not None and self.session._writer is not None:
            self.session._writer.transport.abort()

    async def stop(self) -> None:
        await self._server.stop()

    def on_open(self, session: Session) -> None:
        self.session = session
        self._changed.set()

    def on_closed(self, session: Session, reason: str) -> None:
        if self.session is session:
            self.session = None
        self._changed.set()

    def on_message(self, session: Session, message: AnyMessage) -> None:
        if isinstance(message, Ping):
            session.send(Pong(self.queued_tokens))
        elif isinstance(message, RenewLeases):
            self.renewed |= set(message.keys)
            if message.wanted is not None and not message.keys:
                self.wanted.append(message.wanted)
            session.send(CreditUpdate(self.credit))
        else:
            self.received.append(message)
            self.on_received(message)
        self._changed.set()

    def send(self, message: AnyMessage) -> None:
        assert self.session is not None
        self.session.send(message)

    async def wait(self, condition: Callable[[], Any]) -> Any:
        async with asyncio.timeout(PATIENCE_S):
            while not (result := condition()):
                self._changed.clear()
                await self._changed.wait()
        return result

    async def expect(self, kind: type, request_id: str, attempt: int = 0) -> Any:
        """The first message of that kind about that leg, once it is there; of a leg to prefill, once it has a lease."""
        message = await self.hear(kind, request_id, attempt)
        if isinstance(message, PrefillRequest) and not message.has_lease:
            await self.hear(LeaseConfirmed, request_id, attempt)
        return message

    async def hear(self, kind: type, request_id: str, attempt: int = 0) -> Any:
        """The first message of that kind about that leg, once it is there."""
        key = LegKey(request_id, attempt)
        return await self.wait(
            lambda: next((m for m in self.received if isinstance(m, kind) and getattr(m, "key", None) == key), None)
        )

    def about(self, request_id: str) -> list[str]:
        """Names of the messages about a request, in order."""
        return [type(m).__name__ for m in self.received if m.request_id == request_id]

    # answers

    def grant(self, request_id: str, attempt: int = 0, *, cached: int = 0) -> None:
        self.send(LeaseGranted(request_id, attempt, cached, self.credit))

    def deny(self, request_id: str, reason: str, *, retriable: bool, attempt: int = 0) -> None:
        self.send(LeaseDenied(request_id, attempt, reason, retriable, self.credit))

    def first(
        self,
        request_id: str,
        text: str,
        *,
        finish: str | None = None,
        attempt: int = 0,
        position: int = 0,
        cached: int = 0,
    ) -> None:
        """First tokens: one character for each completion."""
        tokens = [sampled(index, position, text[index], finish) for index in range(len(text))]
        self.send(FirstTokens(request_id, attempt, tokens, cached, 0.01, 0.02))

    def tokens(
        self,
        request_id: str,
        position: int,
        text: str,
        *,
        finish: str | None = None,
        index: int = 0,
        attempt: int = 0,
        **timings: float,
    ) -> None:
        """Tokens of one completion, from a position on; the last one ends it if finish is given."""
        last = len(text) - 1
        tokens = [sampled(index, position + i, char, finish if i == last else None) for i, char in enumerate(text)]
        self.send(Tokens([LegTokens(request_id, attempt, tokens, **timings)], self.credit))  # type: ignore[arg-type]


def sampled(index: int, position: int, char: str, finish: str | None) -> SampledToken:
    logprobs = {ord(char): Logprob(-0.5, 1)} if char.isupper() else None  # capitals have logprobs
    return SampledToken(index, position, EOS if char == "$" else ord(char), logprobs, finish)


class RecordingMetrics:
    """Everything a router reported."""

    def __init__(self) -> None:
        self.outcomes: list[tuple[str, RequestOutput | None]] = []
        self.depths: list[int] = []
        self.first_tokens: list[RequestTimings] = []
        self.gaps: list[float] = []
        self.num_replays = 0

    def on_queue_depth(self, depth: int) -> None:
        self.depths.append(depth)

    def on_first_token(self, timings: RequestTimings) -> None:
        assert timings.ttft is not None
        self.first_tokens.append(timings)

    def on_inter_token(self, seconds: float) -> None:
        self.gaps.append(seconds)

    def on_replay(self) -> None:
        self.num_replays += 1

    def on_finished(self, outcome: str, output: RequestOutput | None) -> None:
        self.outcomes.append((outcome, output))


class Cluster:
    """Workers, the view of them, and one router.

    Attributes:
        broken: pairs that the router has reported, each time.
    """

    def __init__(self, **config: Any) -> None:
        self.config = Config(
            model="config.json",
            skip_tokenizer_init=True,
            **{"max_num_seqs": 64, "lease_timeout_s": 1, "worker_timeout_s": 60, "max_queue_size": 10} | config,
        )
        self.metrics = RecordingMetrics()
        self.broken: list[BrokenPair] = []
        self.workers: dict[str, FakeWorker] = {}
        self._view = ClusterView(0, [], [])
        self._changed = asyncio.Condition()
        self.router = Router(
            self.config,
            ascii_tokenizer(),
            router_id="router-0",
            secret=SECRET,
            watch=self.watch,
            metrics=self.metrics,
            report_broken=self._report_broken,
        )

    async def _report_broken(self, pair: BrokenPair) -> None:
        self.broken.append(pair)

    async def watch(self, version: int) -> ClusterView:
        async with self._changed:
            await self._changed.wait_for(lambda: self._view.version > version)
            return self._view

    async def show(self, *workers: FakeWorker) -> None:
        """Publish a view with these workers, every prefill worker connected to every decode worker."""
        for worker in workers:
            worker.max_num_seqs = self.config.max_num_seqs
            worker.max_num_batched_tokens = self.config.max_num_batched_tokens
        infos = [worker.info if worker.session else await worker.start() for worker in workers]
        pairs = [
            Pair(p.worker_id, d.worker_id, epoch=7)
            for p in infos
            for d in infos
            if (p.role, d.role) == ("prefill", "decode")
        ]
        self.workers.update({worker.worker_id: worker for worker in workers})
        async with self._changed:
            self._view = ClusterView(self._view.version + 1, infos, pairs)
            self._changed.notify_all()

    async def show_pairs(self, epoch: int) -> None:
        """Publish the same view, every pair connected in this epoch."""
        pairs = [structs.replace(pair, epoch=epoch) for pair in self._view.pairs]
        async with self._changed:
            self._view = structs.replace(self._view, version=self._view.version + 1, pairs=pairs)
            self._changed.notify_all()

    async def show_draining(self, draining: Draining | None) -> None:
        """Publish the same view, with or without the news that the workers are about to end."""
        async with self._changed:
            self._view = structs.replace(self._view, version=self._view.version + 1, draining=draining)
            self._changed.notify_all()

    def __getattr__(self, name: str) -> FakeWorker:
        """cluster.decode and cluster.prefill are the first of their kind."""
        try:
            return self.workers[f"{name}-0"]
        except KeyError:
            raise AttributeError(name) from None

    new_worker = FakeWorker

    def submit(
        self, name: str, params: SamplingParams = GREEDY, *, prompt: str | list[int] = "prompt", priority: int = 0
    ) -> asyncio.Task[RoutedRequest]:
        task = asyncio.create_task(self.router.submit(prompt, params, request_id=name, priority=priority))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # a test may end without asking
        return task

    @staticmethod
    async def text_of(request: RoutedRequest) -> str:
        """What it streams from here on."""
        async with asyncio.timeout(PATIENCE_S):
            return "".join([delta.text async for deltas in request for delta in deltas])

    @staticmethod
    async def settled(condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0.005)

    def assert_clean(self) -> None:
        """The router remembers nothing of any request."""
        assert not self.router.machine.requests and not self.router.machine.queue_depth
        for link in self.router.machine.workers.links.values():
            assert not link.asked and not link.queued


@pytest.fixture
async def make_cluster() -> AsyncIterator[Callable[..., Awaitable[Cluster]]]:
    """Starts a router beside a prefill and a decode worker, or the workers given."""
    clusters: list[Cluster] = []

    async def make(*workers: FakeWorker, empty: bool = False, **config: Any) -> Cluster:
        cluster = Cluster(**config)
        clusters.append(cluster)
        await cluster.router.start()
        if not empty:
            await cluster.show(*(workers or (FakeWorker("prefill-0", "prefill"), FakeWorker("decode-0", "decode"))))
            async with asyncio.timeout(PATIENCE_S):
                await cluster.router.wait_ready()
        return cluster

    yield make
    for cluster in clusters:
        await cluster.router.stop()
        for worker in cluster.workers.values():
            await worker.stop()
