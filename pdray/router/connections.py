"""A router's end of the network: the view of the cluster as it changes, and a session to each worker that is wanted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

from pdray.background import BackgroundTasks
from pdray.errors import HandshakeError, WorkerDiedError
from pdray.wire.cluster_view import ClusterView, WorkerInfo
from pdray.wire.dial import connect
from pdray.wire.messages import AnyMessage
from pdray.wire.peers import PeerName
from pdray.wire.session import Session

logger = logging.getLogger(__name__)

RETRY_S = 0.5
WATCH_DEADLINE_S = 30.0  # a view, old or new, comes sooner; whoever gives it is asked again

Watch = Callable[[int], Awaitable[ClusterView]]


class ConnectionsOwner(Protocol):
    """Called on the event loop's thread."""

    def on_view(self, view: ClusterView) -> None: ...
    def on_opened(self, worker_id: str, incarnation: str) -> None: ...
    def on_worker_message(self, worker_id: str, message: AnyMessage) -> None: ...

    def on_closed(self, worker_id: str, reason: str) -> None:
        """The session has ended by itself; it is not opened again unless connect() is called."""


class _Link:
    """One wish for a session to one process."""

    def __init__(self, worker: WorkerInfo) -> None:
        self.worker = worker
        self.session: Session | None = None  # until it is open


class Connections:
    """See the module. Performs Connect, Disconnect and Send; decides nothing.

    Args:
        me: this router.
        watch: returns the first view newer than the version given, or after a while the same.
        timeout_s: of sessions.
        tasks: the owner's.
    """

    def __init__(
        self,
        me: PeerName,
        secret: bytes,
        watch: Watch,
        timeout_s: float,
        owner: ConnectionsOwner,
        tasks: BackgroundTasks,
    ) -> None:
        self._me = me
        self._secret = secret
        self._watch = watch
        self._timeout_s = timeout_s
        self._owner = owner
        self._tasks = tasks
        self._links: dict[str, _Link] = {}

    def start(self) -> None:
        """Follow the view."""
        self._tasks.keep_running("follow the view", self._follow_view)

    async def close(self) -> None:
        """Close every session. The owner is not told."""
        links, self._links = self._links, {}
        await asyncio.gather(*(link.session.close() for link in links.values() if link.session is not None))

    def connect(self, worker: WorkerInfo, delay_s: float) -> None:
        """See Connect."""
        link = self._links[worker.worker_id] = _Link(worker)
        self._tasks.keep_running("connect to a worker", partial(self._connect, link, delay_s), of=worker.incarnation)

    def disconnect(self, worker_id: str) -> None:
        """See Disconnect."""
        link = self._links.pop(worker_id, None)
        if link is not None and link.session is not None:
            self._tasks.spawn(link.session.close())

    def send(self, worker_id: str, message: AnyMessage) -> None:
        """To a worker without a session nothing is sent: its loss was or will be told."""
        link = self._links.get(worker_id)
        if link is not None and link.session is not None:
            link.session.send(message)

    # SessionHandler

    def on_open(self, session: Session) -> None:
        """See SessionHandler."""
        link = self._links.get(session.peer.id)
        if link is not None and link.worker.incarnation == session.peer.incarnation:
            link.session = session
            self._owner.on_opened(session.peer.id, session.peer.incarnation)

    def on_message(self, session: Session, message: AnyMessage) -> None:
        """See SessionHandler."""
        worker_id = session.peer.id
        link = self._links.get(worker_id)
        if link is not None and link.session is session:
            self._owner.on_worker_message(worker_id, message)

    def on_closed(self, session: Session, reason: str) -> None:
        """See SessionHandler."""
        worker_id = session.peer.id
        link = self._links.get(worker_id)
        if link is not None and link.session is session:
            logger.warning("%s: session with %s closed: %s", self._me.id, worker_id, reason)
            del self._links[worker_id]
            self._owner.on_closed(worker_id, reason)

    # background

    async def _follow_view(self) -> None:
        version = -1
        while True:
            try:
                async with asyncio.timeout(WATCH_DEADLINE_S):
                    view = await self._watch(version)
            except (WorkerDiedError, TimeoutError) as error:
                reason = str(error) or f"no view of the cluster within {WATCH_DEADLINE_S:g} s"
                logger.warning("%s: %s", self._me.id, reason)
                version = -1  # a Coordinator that was started again counts anew
                await asyncio.sleep(RETRY_S)
                continue
            version = view.version
            self._owner.on_view(view)

    async def _connect(self, link: _Link, delay_s: float) -> None:
        """Open the link's session; tries until it is there or nobody wants it any more."""
        worker = link.worker
        await asyncio.sleep(delay_s)
        while self._links.get(worker.worker_id) is link:
            try:
                session = await connect(
                    worker.host,
                    worker.port,
                    me=self._me,
                    expect=PeerName(worker.worker_id, worker.incarnation, worker.role),
                    secret=self._secret,
                    handler=self,
                    timeout_s=self._timeout_s,
                )
            except (OSError, HandshakeError) as error:
                logger.warning("%s: cannot reach %s: %s", self._me.id, worker.worker_id, error)
                await asyncio.sleep(RETRY_S)
            else:
                if link.session is not session:  # it was given up meanwhile
                    await session.close()
                return
