"""The router's state machine: what happens in the cluster goes in, what is to be done comes out.

Calls point one way, and nothing calls back: RouterMachine takes events, Requests decides about requests, Dispatch about
the leases of their legs, Workers holds what is known of workers. After each event the queue is looked at once.

Pure: time, messages and what becomes of sessions go in, effects come out, in the order to perform them.
Single-threaded.
"""

from __future__ import annotations

from pdray.config import Config
from pdray.control.effects import Send
from pdray.errors import NoWorkerError, PdrayError, QueueFullError
from pdray.router.dispatch import Dispatch
from pdray.router.drain import Drain
from pdray.router.effects import BecameReady, Connect, Disconnect, RouterEffect, TickAt
from pdray.router.probe import PairProbe
from pdray.router.request import Request
from pdray.router.requests import Metrics, Requests
from pdray.router.workers import Workers
from pdray.wire.cluster_view import ClusterView, WorkerInfo
from pdray.wire.lease_messages import CreditUpdate, LeaseClosed, LeaseDenied, LeaseGranted, RenewLeases, Tokens
from pdray.wire.message import LegMessage
from pdray.wire.messages import AnyMessage
from pdray.wire.peers import Role
from pdray.wire.prefill_messages import FirstTokens, Ping, Pong, PrefillFailed
from pdray.wire.worker_news import PrefixUpdate, StepFailed

RECONNECT_S = 0.5


class RouterMachine:
    """See the module. Every method is an event, and returns what is to be done.

    What an event that raises has decided before is returned by the next one.

    Attributes:
        workers: what is known of the cluster.
        requests: those that were submitted and have not ended, by id.
    """

    def __init__(self, config: Config, router_id: str, metrics: Metrics | None = None) -> None:
        self.workers = Workers()
        self._config = config
        self._metrics = metrics
        self._out: list[RouterEffect] = []
        self._dispatch = Dispatch(config, self.workers, self._out)
        self._requests = Requests(config, router_id, self._dispatch, self._out, metrics)
        self._probe = PairProbe(router_id, self.workers, self._out, config.probe_timeout_s)
        self._drain = Drain()
        self._was_ready = False
        self._told_depth: int | None = None
        self._renew_at = 0.0
        self.requests = self._requests.live

    @property
    def ready(self) -> bool:
        """Whether a request could be served: a pair, or a worker that does both, is connected."""
        return self._drain.refuses is None and self.workers.can_serve

    @property
    def why_not_ready(self) -> str:
        if self._drain.refuses is not None:
            return self._drain.refuses
        reason = self.workers.error
        return "no prefill and decode worker are connected now; try again shortly" + (f" ({reason})" if reason else "")

    @property
    def queue_depth(self) -> int:
        """Legs that wait for a worker's credit."""
        return len(self._dispatch.queue)

    # requests

    def submit(self, now: float, request: Request) -> list[RouterEffect]:
        """See Requests.submit."""
        self._requests.submit(now, request)
        return self._settle(now)

    def abort(self, now: float, request: Request) -> list[RouterEffect]:
        """See Requests.abort."""
        self._requests.abort(now, request)
        return self._settle(now)

    # the cluster

    def view(self, now: float, view: ClusterView) -> list[RouterEffect]:
        """Workers or pairs have changed."""
        changes = self.workers.update(view)
        for link in changes.gone:
            self._out.append(Disconnect(link.info.worker_id))
            self._requests.worker_lost(now, link.info.worker_id, "it died")
        for info in changes.new:
            self._connect(info, 0.0)
        if view.draining is not None:
            self._begin_drain(now, view.draining.left_s, view.draining.reason, refuse=True)
            self._requests.end_waiting(now, view.draining.reason)
        elif self._drain.refuses is not None:
            self._drain.cancel()
        self._note_ready()
        return self._settle(now)

    def opened(self, worker_id: str, incarnation: str) -> list[RouterEffect]:
        """A session to that process is open. Its first answer tells how busy it is."""
        link = self.workers.opened(worker_id, incarnation)
        if link is not None:
            self._out.append(Send(worker_id, Ping() if link.info.role == Role.PREFILL else RenewLeases([])))
        return self._take_effects()

    def closed(self, now: float, worker_id: str, reason: str) -> list[RouterEffect]:
        """The worker's session has ended by itself: it died, or what it held for this router is lost."""
        info = self.workers.closed(worker_id)
        self._requests.worker_lost(now, worker_id, reason)
        if info is not None:  # perhaps only the session was lost
            self._connect(info, RECONNECT_S)
        return self._settle(now)

    def _connect(self, info: WorkerInfo, delay_s: float) -> None:
        self.workers.link(info)
        self._out.append(Connect(info, delay_s))

    def received(self, now: float, worker_id: str, message: AnyMessage) -> list[RouterEffect]:
        """A connected worker's message."""
        link = self.workers.links[worker_id]
        match message:
            case Tokens():
                link.update_credit(message.credit)
                for update in message.updates:
                    if self._probe.is_about(update.key):
                        self._probe.receive(update)
                    else:
                        self._requests.tokens(now, update)
            case PrefixUpdate():
                link.update_prefixes(message)
                return self._take_effects()  # no reason to ask anybody
            case CreditUpdate():
                link.update_credit(message.credit)
                self._note_ready()
            case Pong():
                link.told_queued_tokens = message.queued_tokens
                self._note_ready()
            case StepFailed():
                link.failed = True
                self._requests.step_failed(now, worker_id, message)
            case LegMessage() if self._probe.is_about(message.key):
                if isinstance(message, LeaseGranted | LeaseDenied):
                    link.update_credit(message.credit)
                self._probe.receive(message)
            case FirstTokens():
                self._requests.first_tokens(now, link, message)
            case LeaseGranted():
                self._requests.granted(now, link, message)
            case LeaseDenied():
                self._requests.denied(now, link, message)
            case LeaseClosed() | PrefillFailed():
                self._requests.leg_failed(now, worker_id, message)
            case _:
                raise TypeError(f"a router takes no {type(message).__name__} (from {worker_id})")
        return self._settle(now)

    # time

    def tick(self, now: float) -> list[RouterEffect]:
        """End what waits or runs for too long, and let go on what was to rest. To be called often."""
        self._dispatch.wake(now)
        for leg in self._dispatch.queue.expired(now):
            self._requests.refuse(now, leg.request, self._waited_too_long(now))
        self._requests.end_late(now)
        if (reason := self._drain.due(now)) is not None:
            self._requests.end_all(now, reason)
        self._probe.tick(now)
        return self._settle(now)

    def renew(self, now: float) -> list[RouterEffect]:
        """Renew leases when that is due, and ask prefill workers for their queues. To be called often.

        Nothing else happens here: leases end without it.
        """
        if now >= self._renew_at:
            self._renew_at = now + self._config.lease_timeout_s / 4
            self._dispatch.renew(self._probe.leases())
        elif self.queue_depth:  # other routers' prompts may be done
            self._dispatch.ask_for_queues()
        return self._take_effects()

    def _waited_too_long(self, now: float) -> PdrayError:
        if not self.ready:
            return NoWorkerError(self.why_not_ready)
        wait = f"{self._config.max_queue_wait_s:g} s (max_queue_wait_s)"
        return QueueFullError(f"no worker had a place within {wait}", self._dispatch.queue.retry_after_s(now))

    # probes and the end

    def start_probes(self, now: float) -> list[RouterEffect]:
        """Probe every pair once, as long as there are no requests; see PairProbe. Ends with ProbesDone."""
        self._probe.start()
        return self._settle(now)

    def drain(self, now: float, left_s: float, reason: str) -> list[RouterEffect]:
        """This router is about to end: what still runs after `left_s` is told so."""
        self._begin_drain(now, left_s, reason, refuse=False)
        return self._settle(now)

    def stop(self, now: float, reason: str) -> list[RouterEffect]:
        """End what runs or waits, with an error: half an answer must not look whole. No worker is known any more."""
        self._requests.end_all(now, reason)
        self._drain.cancel()
        self.workers.links.clear()
        return self._take_effects()

    def _begin_drain(self, now: float, left_s: float, reason: str, *, refuse: bool) -> None:
        if (ends_at := self._drain.begin(now, left_s, reason, refuse=refuse)) is not None:
            self._out.append(TickAt(ends_at))

    # after every event

    def _settle(self, now: float) -> list[RouterEffect]:
        """Ask for those who wait, refuse those that nobody can ever serve, and go on with the probes."""
        while refused := self._dispatch.pump(now):
            for leg, error in refused:
                self._requests.refuse(now, leg.request, error)
        self._probe.next(now, idle=not self.requests)
        depth = self.queue_depth
        if depth != self._told_depth and self._metrics is not None:
            self._told_depth = depth
            self._metrics.on_queue_depth(depth)
        return self._take_effects()

    def _take_effects(self) -> list[RouterEffect]:
        effects = self._out[:]
        self._out.clear()
        return effects

    def _note_ready(self) -> None:
        if not self._was_ready and self.ready:
            self._was_ready = True
            self._out.append(BecameReady())
