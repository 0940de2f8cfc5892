"""Sessions: reliable, ordered messages between two processes over TCP, across lost connections.

Each Data frame has a sequence number and acknowledges what its sender has received; what is not acknowledged is kept
and sent again after a reconnect, so that the layers above see every message exactly once and in order, or the
session's end. dial.py opens them and server.py accepts them; every connection begins with the handshake, which proves
that both sides know the cluster's secret.

Everything here belongs to one event loop's thread. A handler's on_message must not block.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Coroutine
from typing import Any, Protocol, cast

from pdray.background import BackgroundTasks
from pdray.wire.frame_protocol import FrameProtocol, take_over
from pdray.wire.frames import MAX_FRAME_BYTES, Ack, Close, Data, decode_frame, encode_frame
from pdray.wire.messages import AnyMessage
from pdray.wire.peers import PeerName

logger = logging.getLogger(__name__)

MAX_UNACKED_BYTES = MAX_FRAME_BYTES  # not more: no frame that a peer would refuse is ever sent
MAX_UNACKED_MESSAGES = 256 * 1024
ACK_DELAY_S = 0.05
CLOSE_TIMEOUT_S = 1.0


class SessionHandler(Protocol):
    """Called on the event loop's thread. After on_closed nothing more comes of that session."""

    def on_open(self, session: Session) -> None: ...
    def on_message(self, session: Session, message: AnyMessage) -> None: ...
    def on_closed(self, session: Session, reason: str) -> None: ...


class _FailedError(Exception):
    """A frame could not be taken; its cause says why."""


class Session:
    """One conversation with one peer process. Made by connect() or by a SessionServer, which give it connections.

    Attributes:
        peer: who is at the other end.
        received: number of the last message that arrived.
        lost_at: loop time at which the last connection ended.
    """

    def __init__(self, peer: PeerName, session_id: str, handler: SessionHandler, timeout_s: float) -> None:
        self.peer = peer
        self.session_id = session_id
        self._handler = handler
        self.timeout_s = timeout_s
        self._unacked: deque[tuple[int, bytes]] = deque()
        self._unacked_bytes = 0
        self._next_seq = 1
        self.received = 0
        self._acked = 0  # the last number that the peer was told
        self._writer: asyncio.StreamWriter | None = None
        self._frames: FrameProtocol | None = None  # of the last connection
        self._ack_timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._overflowed = False
        self.lost_at = 0.0
        self._tasks = BackgroundTasks(self._failed)

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def connected(self) -> bool:
        """Whether there is a connection now; without one, messages wait."""
        return self._writer is not None

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
        frame = encode_frame(Data(self._next_seq, self.received, message))
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
            self._acked = self.received

    def drop_connection(self) -> None:
        """End the connection, not the session: what the peer has not read is sent again over the next one."""
        if self._writer is not None:
            self._writer.transport.abort()

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a task that ends with the session; its failure ends the session."""
        self._tasks.spawn(coroutine)

    async def close(self) -> None:
        """Say goodbye and end. on_closed is not called on this side.

        A peer that does not read delays it no longer than CLOSE_TIMEOUT_S.
        """
        if not self._closed:
            writer = self._writer
            self.finish("closed here", tell=True)
            if writer is not None:
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    def _abort(self, reason: str) -> None:
        """End without a goodbye: it would stand behind everything that the peer has not read."""
        if self._writer is not None:
            self._writer.transport.abort()
            self._writer = None
        self.end(reason, tell=False)

    def end(self, reason: str, *, tell: bool) -> None:
        if not self._closed:
            self.finish(reason, tell=tell)
            self._handler.on_closed(self, reason)

    def finish(self, reason: str, *, tell: bool) -> None:
        self._closed = True
        if self._frames is not None:
            self._frames.end("closed")
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
        """Write a frame. Without a live connection it is dropped, and sent again later if it was a message."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(frame)

    def attach(self, writer: asyncio.StreamWriter, peer_received: int) -> None:
        """A connection is up: forget what the peer has, send the rest again."""
        self._drop_acked(peer_received)
        self._writer = writer
        for _, frame in self._unacked:
            self._write(frame)

    def _drop_acked(self, ack: int) -> None:
        while self._unacked and self._unacked[0][0] <= ack:
            self._unacked_bytes -= len(self._unacked.popleft()[1])

    async def receive(self, reader: asyncio.StreamReader) -> str:
        """Deliver frames until the connection is lost; returns why. A peer that is alive is never silent."""
        writer = self._writer
        keepalive = self._tasks.spawn(self._keep_alive())
        try:
            if writer is not None and not self._closed:
                return await self._deliver(reader, writer)
        except OSError as error:
            return str(error) or type(error).__name__
        except _FailedError as failed:  # the peer would send the same again: a new connection cannot help
            logger.exception("session with %s failed", self.peer.id)
            self.end(f"internal error: {failed.__cause__!r}", tell=True)
        finally:
            keepalive.cancel()
            if self._writer is writer:  # else another connection has taken over already
                self._writer = None
                self.lost_at = asyncio.get_running_loop().time()
            if writer is not None and not self._closed:
                writer.transport.abort()  # what the peer has not read is sent again
        return "closed"

    async def _deliver(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        transport = cast(asyncio.Transport, writer.transport)  # a stream's can read, too
        self._frames = frames = await take_over(reader, transport, self._take_body, MAX_FRAME_BYTES)
        loop = asyncio.get_running_loop()
        while not (self._closed or frames.ended.done()):
            left = frames.heard_at + self.timeout_s - loop.time()
            if left <= 0:
                return f"silent for {self.timeout_s:g} s"
            await asyncio.wait([frames.ended], timeout=left)
        return frames.ended.result() if frames.ended.done() else "closed"

    def _take_body(self, body: bytes) -> None:
        """Take a frame; one of a session that has ended since it came is dropped."""
        try:
            if not self._closed:
                self._take(decode_frame(body))
        except Exception as error:
            raise _FailedError from error

    def _take(self, frame: Data | Ack | Close) -> None:
        match frame:
            case Data(seq, ack, message):
                self._drop_acked(ack)
                if seq == self.received + 1:
                    self.received = seq
                    self._schedule_ack()
                    self._handler.on_message(self, message)
                elif seq > self.received:
                    raise RuntimeError(f"message {seq} came after {self.received}")
            case Ack(ack):
                self._drop_acked(ack)
            case Close(reason):
                self.end(reason, tell=False)

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(self.timeout_s / 4)
            self._write_ack()

    def _schedule_ack(self) -> None:
        if self._ack_timer is None:
            self._ack_timer = asyncio.get_running_loop().call_later(ACK_DELAY_S, self._ack_if_due)

    def _ack_if_due(self) -> None:
        self._ack_timer = None
        if self._acked < self.received:
            self._write_ack()

    def _write_ack(self) -> None:
        self._write(encode_frame(Ack(self.received)))
        self._acked = self.received

    def _failed(self, error: BaseException) -> None:
        logger.error("session with %s failed", self.peer.id, exc_info=error)
        self.end(f"internal error: {error}", tell=True)
