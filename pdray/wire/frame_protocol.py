"""Frames of a connection, handed on from where its bytes are read: no task is woken for them.

A connection begins as a stream, for its handshake; take_over() makes it a source of frames.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

logger = logging.getLogger(__name__)

SIZE_BYTES = 4
CHUNK_BYTES = 64 * 1024


class FrameProtocol(asyncio.Protocol):
    """Hands each frame's body on until the connection is lost, or `take` raises.

    Args:
        former: the stream's protocol, whose writer is still used; hears of what concerns it.
        take: called with each body in turn. limit: bytes of the longest body.

    Attributes:
        ended: done with why no more frames will come; what `take` raised is raised.
        heard_at: loop time of the last frame.
    """

    def __init__(self, former: asyncio.BaseProtocol, take: Callable[[bytes], None], limit: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._former = former
        self._take = take
        self._limit = limit
        self._buffer = bytearray()
        self.ended: asyncio.Future[str] = self._loop.create_future()
        self.heard_at = self._loop.time()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self.ended.done():
            return
        self._buffer += data
        start, buffer = 0, self._buffer
        while not self.ended.done() and len(buffer) - start >= SIZE_BYTES:
            size = int.from_bytes(buffer[start : start + SIZE_BYTES], "big")
            if size > self._limit:
                self.end(f"a frame of {size} bytes is over the limit of {self._limit}")
                break
            stop = start + SIZE_BYTES + size
            if len(buffer) < stop:
                break
            body = bytes(buffer[start + SIZE_BYTES : stop])
            start = stop
            self.heard_at = self._loop.time()
            try:
                self._take(body)
            except Exception as error:  # whoever waits for the end learns of it
                if not self.ended.done():
                    self.ended.set_exception(error)
        del buffer[:start]

    def eof_received(self) -> bool:
        """See asyncio.Protocol."""
        self.end("the peer has closed the connection")
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio.Protocol."""
        self.end(str(error) if error is not None else "the connection was closed")
        self._former.connection_lost(error)

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        self._former.pause_writing()

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self._former.resume_writing()

    def end(self, reason: str) -> None:
        """No more frames will come."""
        if not self.ended.done():
            self.ended.set_result(reason)


async def take_over(
    reader: asyncio.StreamReader, transport: asyncio.Transport, take: Callable[[bytes], None], limit: int
) -> FrameProtocol:
    """From now on the connection's bytes are frames, beginning with what the reader has not been asked for: also those
    that came before a connection that is lost by now."""
    early, at_end = bytearray(), False
    while not at_end:
        if not transport.is_closing():
            transport.pause_reading()  # else bytes might come to the reader after it has been asked for the last time
        try:
            async with asyncio.timeout(0):  # what is there comes without waiting
                chunk = await reader.read(CHUNK_BYTES)
        except TimeoutError:
            break
        except OSError as error:
            logger.debug("a connection was lost before its first frame: %s", error)
            chunk = b""
        early += chunk
        at_end = not chunk
    protocol = FrameProtocol(transport.get_protocol(), take, limit)
    is_open = not (at_end or transport.is_closing())
    if is_open:
        transport.set_protocol(protocol)
    protocol.data_received(bytes(early))
    if not is_open:
        protocol.end("the connection was closed")
    elif not transport.is_closing():
        transport.resume_reading()
    return protocol
