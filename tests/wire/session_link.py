"""A server, a client, and between them a proxy that cuts, delays and swallows."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable

from pdray.testing.patience import PATIENCE_S
from pdray.wire.dial import connect
from pdray.wire.lease_messages import RenewLeases
from pdray.wire.message import LegKey
from pdray.wire.messages import AnyMessage
from pdray.wire.peers import PeerName, Role
from pdray.wire.server import SessionServer
from pdray.wire.session import Session

SECRET = b"secret of the test"
SERVER = PeerName("decode-0", "d1", Role.DECODE)
CLIENT = PeerName("router-0", "r1", Role.ROUTER)


def numbered(number: int, size: int = 0) -> RenewLeases:
    """A message that carries a number, and about size bytes."""
    return RenewLeases([LegKey("x" * size, number)])


class Recorder:
    """A SessionHandler that keeps what it is told.

    Attributes:
        on_opened: called with every session, before anything is delivered.
    """

    def __init__(self, on_opened: Callable[[Session], None] = lambda session: None) -> None:
        self.on_opened = on_opened
        self.opened: list[Session] = []
        self.numbers: list[int] = []
        self.closed: list[str] = []
        self._changed = asyncio.Event()

    def on_open(self, session: Session) -> None:
        self.on_opened(session)
        self.opened.append(session)
        self._changed.set()

    def on_message(self, session: Session, message: AnyMessage) -> None:
        assert not self.closed and isinstance(message, RenewLeases)
        self.numbers.append(message.keys[0].attempt)
        self._changed.set()

    def on_closed(self, session: Session, reason: str) -> None:
        self.closed.append(reason)
        self._changed.set()

    async def wait(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


class Proxy:
    """Forwards to a port, except what ``cut_after`` (bytes of one direction of one connection, None: all) swallows.

    Attributes:
        frozen: connections stay up and carry nothing, not even their end. refusing: new connections are closed at once.
    """

    def __init__(self, port: int, cut_after: Callable[[], int | None] = lambda: None, max_delay_s: float = 0.0) -> None:
        self._target = port
        self._cut_after = cut_after
        self._max_delay_s = max_delay_s
        self._writers: set[asyncio.StreamWriter] = set()
        self._random = random.Random(0)
        self.frozen = self.refusing = False
        self.num_connections = 0

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        self.frozen = False
        self._server.close()
        self.cut()

    def cut(self) -> None:
        """Reset every connection."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refusing:
            writer.close()
            return
        self.num_connections += 1
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._target)
        pair = {writer, server_writer}
        self._writers |= pair
        try:
            await asyncio.gather(self._pump(reader, server_writer, pair), self._pump(server_reader, writer, pair))
        finally:
            self._writers -= pair

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pair: set[asyncio.StreamWriter]
    ) -> None:
        left = self._cut_after()
        with contextlib.suppress(OSError):
            while data := await reader.read(4096):
                if self.frozen:
                    continue
                if self._max_delay_s:
                    await asyncio.sleep(self._random.uniform(0, self._max_delay_s))
                writer.write(data if left is None else data[:left])
                await writer.drain()
                if left is not None and (left := left - len(data)) <= 0:
                    break
        while self.frozen:
            await asyncio.sleep(0.005)
        for each in pair:
            each.close()


class Link:
    """A server, a proxy before it, and a connected client.

    Args:
        timeout_s: of sessions, from when they are open: a machine that stalls may take longer to open one.
    """

    def __init__(self, timeout_s: float = 5.0, cut_after: Callable[[], int | None] = lambda: None, delay: float = 0.0):
        self._timeout_s, self._cut_after, self._delay = timeout_s, cut_after, delay
        self.client_side, self.server_side = Recorder(self._set_timeout), Recorder(self._set_timeout)
        self.server = SessionServer(SERVER, SECRET, self.server_side, timeout_s=PATIENCE_S)

    def _set_timeout(self, session: Session) -> None:
        session.timeout_s = self.server._timeout_s = self._timeout_s

    async def start(self) -> Link:
        self.port = await self.server.start("127.0.0.1")
        self.proxy = Proxy(self.port, self._cut_after, self._delay)
        self.proxy_port = await self.proxy.start()
        return self

    async def connect(
        self, *, me: PeerName = CLIENT, expect: PeerName = SERVER, secret: bytes = SECRET, direct: bool = False
    ) -> Session:
        return await connect(
            "127.0.0.1",
            self.port if direct else self.proxy_port,
            me=me,
            expect=expect,
            secret=secret,
            handler=self.client_side,
            timeout_s=PATIENCE_S,
        )

    async def stop(self) -> None:
        for session in self.client_side.opened:
            await session.close()
        await self.server.stop()
        await self.proxy.stop()


Connect = Callable[..., Awaitable[Link]]
