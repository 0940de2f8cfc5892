"""The base of prefill and decode workers: an engine on its thread, and sessions on the event loop.

A worker is a plain class: the Coordinator makes it a Ray actor, tests make it an object. Threads: the event loop's
(everything public here), and the engine's (steps only). Updates cross to the loop by call_soon_threadsafe, in order.

The Coordinator imports this module only to name the class: what needs torch is imported where a worker uses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from pdray.actors.assembly import Assembly, assemble, log_start
from pdray.actors.engine_thread import start_engine
from pdray.actors.engine_watch import check_when_idle, describe_engine, fingerprint, report_metrics, wait_until_hung
from pdray.actors.orphan_watch import OrphanWatch
from pdray.actors.placement import OneNode, listen_address, origin
from pdray.actors.prefix_news import PrefixNews
from pdray.actors.untraced import without_tracing
from pdray.background import SWITCH_INTERVAL_S, BackgroundTasks, LoopFailures, unless_ended
from pdray.config import Config
from pdray.control.effects import Send
from pdray.engine.request import LayerGroupReady, RequestUpdate
from pdray.errors import RankDiedError, StepFailedError, describe_error
from pdray.garbage_collection import quiet_garbage_collection
from pdray.logs import log_to_stderr
from pdray.metrics import LoopMetrics, WorkerMetrics
from pdray.wire.cluster_view import Heartbeat, WorkerIdentity, WorkerInfo, WorkerLoading
from pdray.wire.message import LegKey
from pdray.wire.messages import AnyMessage
from pdray.wire.peers import PeerName, Role
from pdray.wire.put_messages import ChannelMessage
from pdray.wire.server import SessionServer
from pdray.wire.session import Session
from pdray.wire.worker_news import StepFailed

if TYPE_CHECKING:
    from pdray.ranks.leader import Leader
    from pdray.transfer.channel import Kind

logger = logging.getLogger(__name__)

SETTLE_S = 0.2
TELL_TIMEOUT_S = 0.5  # for routers to acknowledge the last message; one that does not may lose it
TELL_POLL_S = 0.01
# A loop that is longer at telling of first tokens has other things to do. Of a step: the device has the next one
# already, and the host needs the rest of it to launch the one after that.
TELL_FIRST_TIMEOUT_S = 1e-3
TELL_FIRST_SHARE = 0.25
TELL_FIRST_MIN_S = 1e-4  # less is not worth a switch of threads


class Worker(ABC):
    """Base of PrefillWorker and DecodeWorker.

    Lifecycle: start() loads the model, warms the engine up and listens; stop() ends it. join() waits
    for stop(), so that a caller's pending join() is also its notice of this process's death.
    """

    role: Role

    def __init__(
        self, config: Config, worker_id: str, incarnation: str, secret: bytes, *, app_name: str = "local"
    ) -> None:
        without_tracing(type(self))
        self.config = config
        self.app_name = app_name
        self.worker_id = worker_id
        self.incarnation = incarnation
        self.secret = secret
        self.sessions: dict[str, Session] = {}
        self.metrics: WorkerMetrics | None = None
        self._failures = LoopFailures()
        self._tasks = BackgroundTasks(self._fail, self._failures)
        self._orphan_watch = OrphanWatch(worker_id, lambda: bool(self._routers()))
        self._writers: dict[str, WorkerInfo] = {}  # that may write into this pool, by incarnation, until seen dead
        self._prefix_news = PrefixNews(self._routers, self._tasks)
        self.kinds: dict[str, Kind] = {}  # of channels, by name
        self.lender: WorkerInfo | None = None  # whose guest it is to be
        self._leader: Leader | None = None
        self._started = self._ending = False
        self._starting = asyncio.Lock()
        self._start_error: BaseException | None = None
        self._stopped = asyncio.Event()
        self._fatal: BaseException | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.app_name}:{self.worker_id})"

    async def start(self) -> WorkerInfo:
        """Load, warm up, listen. Returns what peers need to know; raises what loading raises.

        A second call has the outcome of the first: of a Coordinator that died meanwhile.
        """
        async with self._starting:
            if self._start_error is not None:
                raise self._start_error
            if not self._started:
                try:
                    await self._start()
                except BaseException as error:
                    self._start_error = error
                    raise
            return self.info

    async def _start(self) -> None:
        if in_ray := ray.is_initialized():
            log_to_stderr()
        self._loop = asyncio.get_running_loop()
        assembly = await unless_ended(asyncio.to_thread(self._assemble), self.join())
        self.device, self.kinds, self.engine, lent, self._leader = assembly
        is_guest = self.engine.pool.borrowed
        self.engine.on_layer_group = None if is_guest else self._layer_group_from_engine
        self._engine_loop = start_engine(self.engine, self._loop, self._updates_from_engine, self._engine_failed)
        address = listen_address(self.config)
        self._server = SessionServer(
            PeerName(self.worker_id, self.incarnation, self.role),
            self.secret,
            self,
            timeout_s=self.config.worker_timeout_s,
            admits=OneNode(self.config, address).admits,
        )
        port = await self._server.start(address.bind)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        quiet_garbage_collection()
        self.info = WorkerInfo(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            role=self.role,
            host=address.dial,
            port=port,
            pid=os.getpid(),
            node_id=ray.get_runtime_context().get_node_id() if in_ray else "",
            device=str(self.device),
            fingerprint=fingerprint(self.engine),
            num_blocks=self.engine.num_blocks,
            block_size=self.engine.block_size,
            max_model_len=self.engine.max_model_len,
            max_num_seqs=self.engine.config.max_num_seqs,
            max_num_batched_tokens=self.engine.config.max_num_batched_tokens,
            channels={name: kind.facts for name, kind in self.kinds.items()},
            vocab_size=self.engine.model.config.vocab_size,
            lends=lent,
            lender=self.lender.incarnation if is_guest and self.lender is not None else "",
            num_ranks=self.engine.model.decoder.num_ranks,
        )
        self._start_loops(self.engine.config.step_timeout_s, in_ray=in_ray)
        self._started = True
        log_start(str(self), self.config, self.info, self.engine.pool.layout.dtype)

    def _assemble(self) -> Assembly:
        ends = self._fail, lambda error: self._loop.call_soon_threadsafe(self._end_with_step, error)
        return assemble(self.config, self.role, self.worker_id, *ends, self.lender)

    def _start_loops(self, step_timeout_s: float | None, *, in_ray: bool) -> None:
        if step_timeout_s is not None:
            self._tasks.keep_running("end if hung", partial(self._end_if_hung, step_timeout_s))
        if in_ray:
            self.metrics = metrics = WorkerMetrics(
                self.worker_id, self.role, application=self.app_name, model=self.config.model_name
            )
            self._failures.on_failure = LoopMetrics(self.worker_id, self.app_name).on_failure
            self._tasks.keep_running("report metrics", partial(report_metrics, self.engine, metrics, self._leader))
            check = partial(check_when_idle, self.engine, self.check_integrity, metrics, self.worker_id)
            self._tasks.keep_running("check when idle", check)
            self._tasks.keep_running("end if orphaned", self._orphan_watch.run)
        if self.config.enable_prefix_caching:
            self._tasks.keep_running("publish prefixes", partial(self._prefix_news.publish, self.engine))

    async def stop(self) -> None:
        """End the sessions, then the engine's thread, then the engine. Idempotent."""
        if not self._stopped.is_set():
            self._stopped.set()
            self._tasks.cancel()
            await self._server.stop()
            await asyncio.to_thread(self._engine_loop.stop)
            await asyncio.to_thread(self.engine.close)  # nothing is launched any more
            if self._leader is not None:
                await asyncio.to_thread(self._leader.close)

    async def join(self) -> None:
        """Returns when the worker was stopped; raises what made its engine fail."""
        await self._stopped.wait()
        if self._fatal is not None:
            raise self._fatal

    async def heartbeat(self) -> Heartbeat:
        """Answers while the event loop lives.

        Called by the Coordinator. A worker that hears nothing of it, and has no session with a router either, for
        orphan_watch.ORPHANED_AFTER_S ends itself: while requests come, a Coordinator that hangs costs it nothing.
        """
        self._orphan_watch.heard()
        return Heartbeat(self._epochs(), self._router_ids(), self._failures.describe())

    def _routers(self) -> list[Session]:
        return [session for session in self.sessions.values() if session.peer.role is Role.ROUTER]

    def _router_ids(self) -> list[str]:
        return sorted(session.peer.id for session in self._routers())

    async def identify(self) -> WorkerIdentity | WorkerLoading:
        """Describe this worker to a Coordinator that was started again."""
        if not self._started:
            lender = "" if self.lender is None else self.lender.incarnation
            return WorkerLoading(self.worker_id, self.incarnation, origin(self.config, self.secret), lender)
        writers = list(self._writers.values())
        return WorkerIdentity(self.info, origin(self.config, self.secret), self._epochs(), writers)

    @abstractmethod
    def _epochs(self) -> dict[str, int]: ...

    async def check_integrity(self) -> list[str]:
        """Problems of the block accounting; empty if there are none.

        The engine must hold blocks for leases, or legs, and for nothing else. News of a step takes a moment to arrive,
        so only what stays odd counts.
        """
        problems = await asyncio.to_thread(self.engine.check_integrity)
        odd = self._live_keys() ^ self.engine.live_keys()
        if odd:
            await asyncio.sleep(SETTLE_S)
            odd &= self._live_keys() ^ self.engine.live_keys()
        return problems + [f"{key} is known to the engine or to the control code, not to both" for key in odd]

    @abstractmethod
    def _live_keys(self) -> set[Hashable]:
        """Keys of the leases or legs that hold blocks."""

    async def describe(self) -> dict[str, Any]:
        """State for `pdray status`."""
        return {
            "worker_id": self.worker_id,
            "role": self.role,
            "device": self.info.device,
            "pid": self.info.pid,
            "address": f"{self.info.host}:{self.info.port}",
            "routers": self._router_ids(),
        } | describe_engine(self.engine, self._leader)

    # engine's thread

    def _updates_from_engine(self, updates: list[RequestUpdate]) -> None:
        """First tokens of legs that came from elsewhere leave before the next step is planned.

        Planning would hold Python's lock, and the device has something to do: a step was launched before this one was
        read.
        """
        step_s = max((update.first_decode_step or 0.0 for update in updates), default=0.0)
        limit_s = min(TELL_FIRST_TIMEOUT_S, TELL_FIRST_SHARE * step_s)
        if limit_s < TELL_FIRST_MIN_S:
            self._loop.call_soon_threadsafe(self._on_updates, updates)
            return
        told = threading.Event()

        def tell() -> None:
            try:
                self._on_updates(updates)
            finally:
                told.set()

        self._loop.call_soon_threadsafe(tell)
        told.wait(limit_s)

    def _layer_group_from_engine(self, ready: LayerGroupReady) -> None:
        self._loop.call_soon_threadsafe(self._on_layer_group, ready)

    def _engine_failed(self, error: BaseException) -> None:
        cause = error if self._leader is None else self._leader.cause_of(error)
        keys = cause.keys if isinstance(cause, StepFailedError) else ()
        self._loop.call_soon_threadsafe(self._end_with_step, cause, keys)

    # event loop's thread

    async def _end_if_hung(self, step_timeout_s: float) -> None:
        self._end_with_step(await wait_until_hung(self._engine_loop, step_timeout_s))

    def _end_with_step(self, error: BaseException, keys: Iterable[Hashable] | None = None) -> None:
        """A step has broken the engine: routers hear which legs it computed. A killed rank is a process's death."""
        if self._ending:
            return
        if not self._started or (isinstance(error, RankDiedError) and error.was_killed):
            return self._fail(error)
        self._ending = True
        suspects = [LegKey(*key) for key in (self.engine.suspects() if keys is None else keys)]  # type: ignore[misc]
        logger.error("%s: the engine failed in a step of %s", self.worker_id, suspects)
        self._tasks.spawn(self._tell_and_fail(error, StepFailed(describe_error(error), suspects)))

    async def _tell_and_fail(self, error: BaseException, news: StepFailed) -> None:
        routers = self._routers()
        for session in routers:
            session.send(news)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TELL_TIMEOUT_S):
                while not all(session.delivered for session in routers):
                    await asyncio.sleep(TELL_POLL_S)
        await self._server.stop()  # no router asks for a lease here any more
        self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Stop for good: join() raises the reason, and the process is replaced."""
        logger.error("%s cannot go on", self.worker_id, exc_info=error)
        self._fatal = error
        self._stopped.set()

    @abstractmethod
    def _on_updates(self, updates: list[RequestUpdate]) -> None: ...

    @abstractmethod
    def _on_layer_group(self, ready: LayerGroupReady) -> None: ...

    def on_open(self, session: Session) -> None:
        self.sessions[session.peer.id] = session
        if session.peer.role is Role.ROUTER:
            self._prefix_news.greet(session)

    @abstractmethod
    def on_message(self, session: Session, message: AnyMessage) -> None: ...

    def on_closed(self, session: Session, reason: str) -> None:
        if self.sessions.get(session.peer.id) is session:
            del self.sessions[session.peer.id]

    def _send(self, sends: Sequence[Send]) -> None:
        """Perform effects. A peer without a session is gone: its leases and legs end by their rules."""
        for send in sends:
            session = self.sessions.get(send.to)
            if session is not None:
                session.send(send.message)

    @staticmethod
    def _send_on_channel(session: Session, kind: str, epoch: int, payload: bytes) -> None:
        session.send(ChannelMessage(kind, epoch, payload))

    @staticmethod
    def _now() -> float:
        return time.monotonic()
