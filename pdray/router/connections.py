"""A router's sessions to all workers of the cluster, as its view changes and connections come and go."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

from pdray.background import BackgroundTasks, LoopFailures
from pdray.errors import HandshakeError, WorkerDiedError
from pdray.router.link import WorkerLink
from pdray.wire.cluster_view import ClusterView, Draining, WorkerInfo
from pdray.wire.dial import connect
from pdray.wire.handshake import PeerName
from pdray.wire.lease_messages import RenewLeases
from pdray.wire.messages import AnyMessage
from pdray.wire.prefill_messages import Ping
from pdray.wire.session import Session

logger = logging.getLogger(__name__)

RECONNECT_S = 0.5
WATCH_DEADLINE_S = 30.0  # a view, old or new, comes sooner; whoever gives it is asked again

Watch = Callable[[int], Awaitable[ClusterView]]


class ConnectionsOwner(Protocol):
    """Called on the event loop's thread."""

    def on_worker_message(self, link: WorkerLink, message: AnyMessage) -> None: ...

    def on_worker_lost(self, link: WorkerLink, reason: str) -> None:
        """Its process died, or what it held for this router is lost with the session. The link is closed."""

    def on_view(self) -> None:
        """Workers or pairs have changed."""


class WorkerConnections:
    """One link to each worker that the view names; a lost session is opened again for as long as it does.

    Args:
        watch: returns the first view newer than the version given, or after a while the same.

    Attributes:
        links: by worker id, open or not.
        pairs: (prefill, decode) worker ids to the epoch of their channel, without those that are broken in that epoch.
        broken: pairs that did not serve, with the epoch of their channel then.
        error: what kept a worker from starting or a pair from connecting, as the last view tells it.
        draining: the workers are about to end, as the last view tells it.
    """

    def __init__(
        self,
        router_id: str,
        secret: bytes,
        watch: Watch,
        timeout_s: float,
        owner: ConnectionsOwner,
        failures: LoopFailures,
    ) -> None:
        self.links: dict[str, WorkerLink] = {}
        self.pairs: dict[tuple[str, str], int] = {}
        self._all_pairs: dict[tuple[str, str], int] = {}  # as the last view names them
        self.broken: dict[tuple[str, str], int] = {}  # the epoch in which they did not serve
        self.error: str | None = None
        self.draining: Draining | None = None
        self._router_id = router_id
        self._secret = secret
        self._watch = watch
        self._timeout_s = timeout_s
        self._owner = owner
        self._workers: dict[str, WorkerInfo] = {}  # as the last view names them
        self._tasks = BackgroundTasks(self._failed, failures)

    def start(self) -> None:
        self._tasks.keep_running("follow the view", self._follow_view)

    async def stop(self) -> None:
        """Close every session. The owner is not told."""
        await self._tasks.stop()
        links, self.links = self.links, {}
        await asyncio.gather(*(link.session.close() for link in links.values() if link.session is not None))

    @property
    def can_serve(self) -> bool:
        """Whether a pair, or a worker that does both, is connected."""
        return any(
            (link.info.role == "both" and not link.broken)
            or any(self.is_open(p) for p, d in self.pairs if d == link.info.worker_id)
            for link in self.open_links("decode", "both")
        )

    def open_links(self, *roles: str) -> list[WorkerLink]:
        return [link for link in self.links.values() if link.is_open and link.info.role in roles]

    def mark_broken(self, prefill_id: str, decode_id: str) -> None:
        """The pair gets no requests until its channel was opened anew."""
        self.broken[prefill_id, decode_id] = self.pairs[prefill_id, decode_id]
        self._leave_out_broken()

    def _leave_out_broken(self) -> None:
        self.broken = {p: epoch for p, epoch in self.broken.items() if self._all_pairs.get(p) == epoch}
        self.pairs = {p: epoch for p, epoch in self._all_pairs.items() if p not in self.broken}

    def is_open(self, worker_id: str) -> bool:
        link = self.links.get(worker_id)
        return link is not None and link.is_open

    def send(self, worker_id: str, message: AnyMessage) -> None:
        """To a worker without a session nothing is sent: its loss was or will be told."""
        link = self.links.get(worker_id)
        if link is not None and link.session is not None:
            link.session.send(message)

    # sessions

    def on_open(self, session: Session) -> None:
        """See SessionHandler. The first answer tells how busy the worker is."""
        link = self.links.get(session.peer.id)
        if link is not None and link.info.incarnation == session.peer.incarnation:
            link.session = session
            session.send(Ping() if link.info.role == "prefill" else RenewLeases([]))

    def on_message(self, session: Session, message: AnyMessage) -> None:
        """See SessionHandler."""
        link = self.links.get(session.peer.id)
        if link is not None and link.session is session:
            self._owner.on_worker_message(link, message)

    def on_closed(self, session: Session, reason: str) -> None:
        """See SessionHandler."""
        link = self.links.get(session.peer.id)
        if link is not None and link.session is session:
            logger.warning("%s: session with %s closed: %s", self._router_id, session.peer.id, reason)
            self._unlink(link, reason)
            if self._workers.get(session.peer.id) == link.info:  # perhaps only the session was lost
                self._link(link.info, RECONNECT_S)

    def _unlink(self, link: WorkerLink, reason: str) -> None:
        link.session = None
        del self.links[link.info.worker_id]
        self._owner.on_worker_lost(link, reason)

    # background

    async def _follow_view(self) -> None:
        version = -1
        while True:
            try:
                async with asyncio.timeout(WATCH_DEADLINE_S):
                    view = await self._watch(version)
            except (WorkerDiedError, TimeoutError) as error:
                reason = str(error) or f"no view of the cluster within {WATCH_DEADLINE_S:g} s"
                logger.warning("%s: %s", self._router_id, reason)
                version = -1  # a Coordinator that was started again counts anew
                await asyncio.sleep(RECONNECT_S)
                continue
            version, self.error, self.draining = view.version, view.error, view.draining
            self._all_pairs = {(p.prefill_worker_id, p.decode_worker_id): p.epoch for p in view.pairs}
            self._leave_out_broken()
            self._workers = {info.worker_id: info for info in view.workers}
            for link in list(self.links.values()):
                info = self._workers.get(link.info.worker_id)
                if info is None or info.incarnation != link.info.incarnation:
                    session = link.session
                    self._unlink(link, "it died")
                    if session is not None:
                        self._tasks.spawn(session.close())
            for info in view.workers:
                if info.worker_id not in self.links:
                    self._link(info)
            self._owner.on_view()

    def _link(self, info: WorkerInfo, delay_s: float = 0.0) -> None:
        link = self.links[info.worker_id] = WorkerLink(info)
        self._tasks.keep_running("connect to a worker", partial(self._connect, link, delay_s), of=info.incarnation)

    async def _connect(self, link: WorkerLink, delay_s: float) -> None:
        """Open the link's session; tries until it is there or the worker has left the view."""
        info = link.info
        await asyncio.sleep(delay_s)
        while self.links.get(info.worker_id) is link:
            try:
                session = await connect(
                    info.host,
                    info.port,
                    me=PeerName(self._router_id, "1"),
                    expect=PeerName(info.worker_id, info.incarnation),
                    secret=self._secret,
                    handler=self,
                    timeout_s=self._timeout_s,
                )
            except (OSError, HandshakeError) as error:
                logger.warning("%s: cannot reach %s: %s", self._router_id, info.worker_id, error)
                await asyncio.sleep(RECONNECT_S)
            else:
                if link.session is not session:  # the view has changed meanwhile
                    await session.close()
                return

    def _failed(self, error: BaseException) -> None:
        logger.error("%s: internal error", self._router_id, exc_info=error)
