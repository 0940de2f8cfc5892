"""Sessions: reliable, ordered messages between two processes over TCP, across lost connections.

Each Data frame has a sequence number and acknowledges what its sender has received; what is not acknowledged is kept
and sent again after a reconnect, so that the layers above see every message exactly once and in order, or the
session's end. Every connection begins with the handshake, which proves that both sides know the cluster's secret.

Everything here belongs to one event loop's thread. A handler's on_message must not block.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol

from pdray.background import BackgroundTasks
from pdray.errors import HandshakeError
from pdray.wire import handshake
from pdray.wire.frames import MAX_FRAME_BYTES, Ack, Close, Data, decode_frame, encode_frame, read_frame
from pdray.wire.handshake import Hello, PeerName
from pdray.wire.messages import AnyMessage

logger = logging.getLogger(__name__)

MAX_UNACKED_BYTES = MAX_FRAME_BYTES  # not more: no frame that a peer would refuse is ever sent
MAX_UNACKED_MESSAGES = 256 * 1024
ACK_DELAY_S = 0.05
CLOSE_TIMEOUT_S = 1.0
RECONNECT_INTERVAL_S = 0.05


class SessionHandler(Protocol):
    """Called on the event loop's thread. After on_closed nothing more comes of that session."""

    def on_open(self, session: Session) -> None: ...
    def on_message(self, session: Session, message: AnyMessage) -> None: ...
    def on_closed(self, session: Session, reason: str) -> None: ...


class Session:
    """One conversation with one peer process. Made by connect() or by a SessionServer.

    Attributes:
        peer: who is at the other end.
    """

    def __init__(self, peer: PeerName, session_id: str, handler: SessionHandler, timeout_s: float) -> None:
        self.peer = peer
        self.session_id = session_id
        self._handler = handler
        self._timeout_s = timeout_s
        self._unacked: deque[tuple[int, bytes]] = deque()
        self._unacked_bytes = 0
        self._next_seq = 1
        self._received = 0
        self._acked = 0  # the last number that the peer was told
        self._writer: asyncio.StreamWriter | None = None
        self._ack_timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._overflowed = False
        self._lost_at = 0.0  # loop time at which the last connection ended
        self._tasks = BackgroundTasks(self._failed)

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def delivered(self) -> bool:
        """Whether the peer has acknowledged everything that was sent, or there is none any more."""
        return self._closed or not self._unacked

    def send(self, message: AnyMessage) -> None:
        """Queue a message; never blocks. On a closed session it does nothing: on_closed has said so.

        More than MAX_UNACKED_BYTES or MAX_UNACKED_MESSAGES that the peer has not acknowledged close the session:
        nothing more is sent, and on_closed follows, never from within this call.
        """
        if self._closed or self._overflowed:
            return
        frame = encode_frame(Data(self._next_seq, self._received, message))
        self._unacked.append((self._next_seq, frame))
        self._unacked_bytes += len(frame)
        self._next_seq += 1
        if self._unacked_bytes > MAX_UNACKED_BYTES or len(self._unacked) > MAX_UNACKED_MESSAGES:
            self._overflowed = True
            reason = (
                f"overflow: {self.peer.id} does not keep up, {len(self._unacked)} messages of {self._unacked_bytes} "
                f"bytes are unacknowledged (limits: {MAX_UNACKED_MESSAGES} messages, {MAX_UNACKED_BYTES} bytes)"
            )
            asyncio.get_running_loop().call_soon(self._abort, reason)
        else:
            self._write(frame)
            self._acked = self._received

    async def close(self) -> None:
        """Say goodbye and end. on_closed is not called on this side.

        A peer that does not read delays it no longer than CLOSE_TIMEOUT_S.
        """
        if not self._closed:
            writer = self._writer
            self._finish("closed here", tell=True)
            if writer is not None:
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    def _abort(self, reason: str) -> None:
        """End without a goodbye: it would stand behind everything that the peer has not read."""
        if self._writer is not None:
            self._writer.transport.abort()
            self._writer = None
        self._end(reason, tell=False)

    def _end(self, reason: str, *, tell: bool) -> None:
        if not self._closed:
            self._finish(reason, tell=tell)
            self._handler.on_closed(self, reason)

    def _finish(self, reason: str, *, tell: bool) -> None:
        self._closed = True
        if self._ack_timer is not None:
            self._ack_timer.cancel()
        if self._writer is not None:
            if tell:
                self._write(encode_frame(Close(reason)))
            self._writer.close()
            asyncio.get_running_loop().call_later(CLOSE_TIMEOUT_S, self._writer.transport.abort)
            self._writer = None
        self._unacked.clear()
        self._tasks.cancel()

    def _write(self, frame: bytes) -> None:
        """Without a live connection it is lost, and sent again if it was a message."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame)

    def _attach(self, writer: asyncio.StreamWriter, peer_received: int) -> None:
        """A connection is up: forget what the peer has, send the rest again."""
        self._drop_acked(peer_received)
        self._writer = writer
        for _, frame in self._unacked:
            self._write(frame)

    def _drop_acked(self, ack: int) -> None:
        while self._unacked and self._unacked[0][0] <= ack:
            self._unacked_bytes -= len(self._unacked.popleft()[1])

    async def _receive(self, reader: asyncio.StreamReader) -> str:
        """Deliver frames until the connection is lost; returns why. A peer that is alive is never silent."""
        writer = self._writer
        keepalive = self._tasks.spawn(self._keep_alive())
        try:
            while not self._closed:
                try:
                    async with asyncio.timeout(self._timeout_s):
                        body = await read_frame(reader, MAX_FRAME_BYTES)
                except TimeoutError:
                    return f"silent for {self._timeout_s:g} s"
                except (OSError, EOFError) as error:
                    return str(error) or type(error).__name__
                if not self._closed:  # it may have ended since the frame came
                    self._take(decode_frame(body))
        except Exception as error:  # the peer would send the same again: a new connection cannot help
            logger.exception("session with %s failed", self.peer.id)
            self._end(f"internal error: {error!r}", tell=True)
        finally:
            keepalive.cancel()
            if self._writer is writer:  # else another connection has taken over already
                self._writer = None
                self._lost_at = asyncio.get_running_loop().time()
            if writer is not None and not self._closed:
                writer.transport.abort()  # what the peer has not read is sent again
        return "closed"

    def _take(self, frame: Data | Ack | Close) -> None:
        match frame:
            case Data(seq, ack, message):
                self._drop_acked(ack)
                if seq == self._received + 1:
                    self._received = seq
                    self._schedule_ack()
                    self._handler.on_message(self, message)
                elif seq > self._received:
                    raise RuntimeError(f"message {seq} came after {self._received}")
            case Ack(ack):
                self._drop_acked(ack)
            case Close(reason):
                self._end(reason, tell=False)

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(self._timeout_s / 4)
            self._write_ack()

    def _schedule_ack(self) -> None:
        if self._ack_timer is None:
            self._ack_timer = asyncio.get_running_loop().call_later(ACK_DELAY_S, self._ack_if_due)

    def _ack_if_due(self) -> None:
        self._ack_timer = None
        if self._acked < self._received:
            self._write_ack()

    def _write_ack(self) -> None:
        self._write(encode_frame(Ack(self._received)))
        self._acked = self._received

    def _failed(self, error: BaseException) -> None:
        logger.error("session with %s failed", self.peer.id, exc_info=error)
        self._end(f"internal error: {error}", tell=True)


async def connect(
    host: str,
    port: int,
    *,
    me: PeerName,
    expect: PeerName,
    secret: bytes,
    handler: SessionHandler,
    timeout_s: float,
) -> Session:
    """Open a session to a SessionServer; it reconnects by itself for up to timeout_s after a loss.

    on_open is called before this returns.

    Raises:
        HandshakeError: the peer is not ``expect`` or does not know the secret. OSError: unreachable.
    """
    session = Session(expect, secrets.token_hex(8), handler, timeout_s)
    reader = await _dial(session, host, port, me, secret, resume=False)
    try:
        handler.on_open(session)
    except BaseException:
        session._finish("its owner failed to open it", tell=True)
        raise
    session._tasks.spawn(_stay_connected(session, reader, host, port, me, secret))
    return session


async def _stay_connected(
    session: Session, reader: asyncio.StreamReader, host: str, port: int, me: PeerName, secret: bytes
) -> None:
    while True:
        reason = await session._receive(reader)
        try:
            async with asyncio.timeout(session._timeout_s):
                while not session.closed:
                    try:
                        reader = await _dial(session, host, port, me, secret, resume=True)
                        break
                    except ConnectionRefusedError as error:
                        session._end(f"nobody listens any more ({error})", tell=False)
                    except OSError:
                        await asyncio.sleep(RECONNECT_INTERVAL_S)
        except TimeoutError:
            session._end(f"connection lost ({reason}) and not restored within {session._timeout_s:g} s", tell=False)
        except HandshakeError as error:
            session._end(str(error), tell=False)
        if session.closed:
            return


async def _dial(
    session: Session, host: str, port: int, me: PeerName, secret: bytes, *, resume: bool
) -> asyncio.StreamReader:
    # a resume has time for several attempts: one of them may be swallowed
    async with asyncio.timeout(session._timeout_s / 4 if resume else session._timeout_s):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            peer_received = await handshake.initiate(
                reader,
                writer,
                me=me,
                expect=session.peer,
                secret=secret,
                session_id=session.session_id,
                resume=resume,
                received=session._received,
                address=f"{host}:{port}",
            )
        except BaseException:
            writer.close()
            raise
    session._attach(writer, peer_received)
    return reader


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
            reason = await session._receive(reader)
            if session.closed:
                self._forget(session)
            elif session._writer is None:
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
        if session._writer is not None:
            session._writer.transport.abort()  # an older connection that this side has not yet seen lost
        handshake.welcome(writer, hello, me=self.me, secret=self._secret, received=session._received)
        session._attach(writer, hello.received)
        if not hello.resume:
            try:
                self._handler.on_open(session)
            except Exception as error:
                logger.exception("session with %s failed", session.peer.id)
                session._end(f"internal error: {error!r}", tell=True)
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
            existing._end("replaced by a new session", tell=True)
        session = self._sessions[hello.peer.id] = Session(hello.peer, hello.session_id, self._handler, self._timeout_s)
        return session

    def _wait_for_return(self, session: Session, reason: str) -> None:
        timer = asyncio.get_running_loop().call_later
        timer(self._timeout_s, self._give_up, session, session._lost_at, reason)

    def _give_up(self, session: Session, lost_at: float, reason: str) -> None:
        """The connection was lost at that time; ends the session unless it was restored since."""
        if session._lost_at == lost_at and session._writer is None:
            session._end(f"connection lost ({reason}) and not restored within {self._timeout_s:g} s", tell=False)
            self._forget(session)

    def _forget(self, session: Session) -> None:
        if self._sessions.get(session.peer.id) is session:
            del self._sessions[session.peer.id]
