"""The side that accepts sessions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from pdray.errors import HandshakeError
from pdray.wire import handshake
from pdray.wire.handshake import Hello
from pdray.wire.peers import PeerName
from pdray.wire.session import Session, SessionHandler

logger = logging.getLogger(__name__)


class SessionServer:
    """Accepts sessions. One session for each peer id: a new one replaces an older.

    Args:
        timeout_s: a peer that is silent, or not back after a lost connection, for so long is gone.
        admits: asked with the address of whoever connects, before a byte is read; None admits all. The secret guards
            the session in any case.
    """

    def __init__(
        self,
        me: PeerName,
        secret: bytes,
        handler: SessionHandler,
        *,
        timeout_s: float,
        admits: Callable[[str], Awaitable[bool]] | None = None,
    ) -> None:
        self.me = me
        self._admits = admits
        self._secret = secret
        self._handler = handler
        self._timeout_s = timeout_s
        self._sessions: dict[str, Session] = {}  # by peer id
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._stopped = False

    async def start(self, host: str, port: int = 0) -> int:
        """Listen; returns the port."""
        self._server = await asyncio.start_server(self._accept, host, port)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Stop listening and end every session (their peers are told). Idempotent."""
        self._stopped = True
        if self._server is not None:
            self._server.close()
        await asyncio.gather(*(session.close() for session in list(self._sessions.values())))
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            if self._stopped:  # it was accepted just before
                return
            if self._admits is not None and not await self._admits(writer.get_extra_info("peername")[0]):
                logger.warning("%s: sent %s away", self.me.id, writer.get_extra_info("peername")[0])
                return
            session = await self._handshake(reader, writer)
            reason = await session.receive(reader)
            if session.closed:
                self._forget(session)
            elif not session.connected:
                self._wait_for_return(session, reason)
        except HandshakeError as error:
            logger.warning("%s: refused a connection: %s", self.me.id, error)
            handshake.reject(writer, str(error))
        except (OSError, EOFError) as error:
            logger.warning("%s: a connection ended in its handshake: %r", self.me.id, error)
        finally:
            writer.close()
            self._connections.discard(task)

    async def _handshake(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Session:
        async with asyncio.timeout(self._timeout_s):
            hello = await handshake.accept(reader, writer, me=self.me, secret=self._secret)
        if self._stopped:
            raise HandshakeError(f"{self.me.id} stops")
        session = self._find(hello)
        if session.connected:
            session.drop_connection()  # an older connection that this side has not yet seen lost
        handshake.welcome(writer, hello, me=self.me, secret=self._secret, received=session.received)
        session.attach(writer, hello.received)
        if not hello.resume:
            try:
                self._handler.on_open(session)
            except Exception as error:
                logger.exception("session with %s failed", session.peer.id)
                session.end(f"internal error: {error!r}", tell=True)
        return session

    def _find(self, hello: Hello) -> Session:
        """The session that the peer means.

        Raises:
            HandshakeError: it wants to resume one that is not there.
        """
        existing = self._sessions.get(hello.peer.id)
        if hello.resume:
            if existing is None or existing.session_id != hello.session_id or existing.closed:
                raise HandshakeError("unknown session")
            return existing
        if existing is not None:
            existing.end("replaced by a new session", tell=True)
        session = self._sessions[hello.peer.id] = Session(hello.peer, hello.session_id, self._handler, self._timeout_s)
        return session

    def _wait_for_return(self, session: Session, reason: str) -> None:
        timer = asyncio.get_running_loop().call_later
        timer(self._timeout_s, self._give_up, session, session.lost_at, reason)

    def _give_up(self, session: Session, lost_at: float, reason: str) -> None:
        """The connection was lost at that time; ends the session unless it was restored since."""
        if session.lost_at == lost_at and not session.connected:
            session.end(f"connection lost ({reason}) and not restored within {self._timeout_s:g} s", tell=False)
            self._forget(session)

    def _forget(self, session: Session) -> None:
        if self._sessions.get(session.peer.id) is session:
            del self._sessions[session.peer.id]
