"""Sessions deliver every message exactly once and in order, or say that they ended, whatever the network does."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import pytest

from pdray.errors import HandshakeError
from pdray.testing.patience import PATIENCE_S
from pdray.wire import session as session_module
from pdray.wire.dial import connect
from pdray.wire.frame_protocol import FrameProtocol
from pdray.wire.frames import MAX_FRAME_BYTES, Data, encode_frame, read_frame
from pdray.wire.handshake import Challenge, Welcome, initiate
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
    """A SessionHandler that keeps what it is told."""

    def __init__(self) -> None:
        self.opened: list[Session] = []
        self.numbers: list[int] = []
        self.closed: list[str] = []
        self._changed = asyncio.Event()

    def on_open(self, session: Session) -> None:
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
    """A server, a proxy before it, and a connected client."""

    def __init__(self, timeout_s: float = 5.0, cut_after: Callable[[], int | None] = lambda: None, delay: float = 0.0):
        self.server_side, self.client_side = Recorder(), Recorder()
        self.server = SessionServer(SERVER, SECRET, self.server_side, timeout_s=timeout_s)
        self._timeout_s, self._cut_after, self._delay = timeout_s, cut_after, delay

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
            timeout_s=self._timeout_s,
        )

    async def stop(self) -> None:
        for session in self.client_side.opened:
            await session.close()
        await self.server.stop()
        await self.proxy.stop()


Connect = Callable[..., Awaitable[Link]]


@pytest.fixture
async def link() -> AsyncIterator[Connect]:
    """Makes a Link from its arguments."""
    made: list[Link] = []

    async def make(**kwargs: object) -> Link:
        made.append(await Link(**kwargs).start())  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        await each.stop()


async def exchange(link: Link, count: int, size: Callable[[], int]) -> None:
    """Both sides send, a few messages between two turns of the loop, until all have arrived."""
    client = await link.connect()
    await link.server_side.wait(lambda: link.server_side.opened)
    server = link.server_side.opened[0]
    for number in range(count):
        client.send(numbered(number, size()))
        server.send(numbered(number, size()))
        if number % 7 == 0:
            await asyncio.sleep(0.001)
    for side in (link.client_side, link.server_side):
        await side.wait(lambda side=side: len(side.numbers) >= count or side.closed)
        assert side.closed == []
        assert side.numbers == list(range(count))


async def test_both_ways_in_order(link: Connect) -> None:
    each = await link()
    await exchange(each, 10_000, lambda: 10)
    assert each.proxy.num_connections == 1


@pytest.mark.parametrize("seed", range(6))
async def test_exactly_once_across_cut_connections(link: Connect, seed: int) -> None:
    """Every connection dies at a random byte of either direction: in a handshake, a length, a body."""
    rng = random.Random(seed)
    most = [600, 2000, 6000][seed % 3]
    each = await link(cut_after=lambda: rng.randrange(most) if rng.random() < 0.8 else most * 2, delay=0.002)
    await connects(each)
    await exchange(each, 30 + most // 20, lambda: rng.choice([0, 5, 300]))
    assert each.proxy.num_connections > 3
    assert len(each.client_side.opened) == len(each.server_side.opened) == 1


async def connects(each: Link) -> None:
    """Make connect() insist: a first connection that is cut in its handshake is its caller's to try again."""
    plain = each.connect

    async def insist() -> Session:
        for _ in range(100):
            with contextlib.suppress(OSError):
                session = await plain()
                await each.server_side.wait(
                    lambda session=session: session.session_id in [s.session_id for s in each.server_side.opened]
                )
                each.server_side.opened = [s for s in each.server_side.opened if s.session_id == session.session_id]
                each.server_side.closed.clear()
                return session
        raise AssertionError("no connection in 100 tries")

    each.connect = insist  # type: ignore[method-assign]


async def test_what_was_sent_while_cut_off_arrives(link: Connect) -> None:
    each = await link()
    client = await each.connect()
    await each.server_side.wait(lambda: each.server_side.opened)
    each.proxy.refusing = True
    each.proxy.cut()
    for number in range(100):
        client.send(numbered(number))
        each.server_side.opened[0].send(numbered(number))
    await asyncio.sleep(0.1)
    assert each.server_side.numbers == each.client_side.numbers == []
    each.proxy.refusing = False
    for side in (each.client_side, each.server_side):
        await side.wait(lambda side=side: len(side.numbers) == 100)
        assert side.numbers == list(range(100)) and not side.closed


async def test_an_idle_session_lives(link: Connect) -> None:
    each = await link(timeout_s=0.3)
    client = await each.connect()
    await asyncio.sleep(1.2)
    client.send(numbered(1))
    await each.server_side.wait(lambda: each.server_side.numbers == [1])
    assert each.proxy.num_connections == 1 and not each.client_side.closed and not each.server_side.closed


async def test_acknowledged_messages_are_forgotten(link: Connect) -> None:
    each = await link(timeout_s=1.0)
    client = await each.connect()
    for number in range(50):
        client.send(numbered(number))
    await each.server_side.wait(lambda: len(each.server_side.numbers) == 50)
    async with asyncio.timeout(PATIENCE_S):
        while client._unacked:
            await asyncio.sleep(0.01)
    assert client._unacked_bytes == 0


@pytest.mark.parametrize("direct", [True, False])
async def test_wrong_secret(link: Connect, direct: bool, caplog: pytest.LogCaptureFixture) -> None:
    each = await link()
    with pytest.raises(HandshakeError, match="wrong secret"):
        await each.connect(secret=b"another", direct=direct)
    assert "wrong secret" in caplog.text
    assert each.server_side.opened == each.client_side.opened == []


async def test_the_server_must_know_the_secret_too(link: Connect) -> None:
    """A server that says yes to everybody learns nothing and is refused."""
    seen = bytearray()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(encode_frame(Challenge(SERVER, b"n" * 16)))
        seen.extend(await read_frame(reader, 4096))
        writer.write(encode_frame(Welcome(0, b"p" * 32)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(HandshakeError, match="does not know"):
        await connect("127.0.0.1", port, me=CLIENT, expect=SERVER, secret=SECRET, handler=Recorder(), timeout_s=2)
    assert SECRET not in seen
    server.close()


async def test_garbage_is_refused(link: Connect) -> None:
    each = await link(timeout_s=1.0)
    for data in (b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\4abcd", b"\xff" * 64, b"\0\0"):
        reader, writer = await asyncio.open_connection("127.0.0.1", each.port)
        writer.write(data)
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionError):
                await reader.read()  # until the server closes
        writer.close()
    client = await each.connect()
    client.send(numbered(3))
    await each.server_side.wait(lambda: each.server_side.numbers == [3])


async def test_another_incarnation_is_refused(link: Connect) -> None:
    each = await link()
    with pytest.raises(HandshakeError, match="d1"):
        await each.connect(expect=PeerName("decode-0", "d2", Role.DECODE))


async def test_an_unknown_role_is_refused(link: Connect) -> None:
    """By its name, to the peer itself; nothing is opened."""
    each = await link()
    unknown = PeerName("janitor-0", "1", "janitor")  # type: ignore[arg-type]
    with pytest.raises(HandshakeError, match="refused.*janitor"):
        await each.connect(me=unknown)
    assert not each.server_side.opened
    for role in Role:
        await each.connect(me=PeerName(f"{role}-1", "1", role))
    await each.server_side.wait(lambda: len(each.server_side.opened) == len(Role))
    assert [session.peer.role for session in each.server_side.opened] == list(Role)


async def test_another_role_is_refused(link: Connect) -> None:
    each = await link()
    with pytest.raises(HandshakeError, match="prefill"):
        await each.connect(expect=SERVER._replace(role=Role.PREFILL))


async def test_a_restarted_server_ends_the_session(link: Connect) -> None:
    """Another process behind the same address: nothing is delivered to it, and the client is told."""
    each = await link()
    client = await each.connect()
    await each.server_side.wait(lambda: each.server_side.opened)
    other_side = Recorder()
    other = SessionServer(PeerName("decode-0", "d2", Role.DECODE), SECRET, other_side, timeout_s=5)
    each.proxy._target = await other.start("127.0.0.1")
    each.proxy.cut()
    client.send(numbered(1))
    await each.client_side.wait(lambda: each.client_side.closed)
    assert "d2" in each.client_side.closed[0] and client.closed
    client.send(numbered(2))
    assert other_side.opened == [] and other_side.numbers == []
    await other.stop()


async def test_a_session_that_the_server_forgot_ends(link: Connect) -> None:
    each = await link(timeout_s=0.4)
    await each.connect()
    await each.server_side.wait(lambda: each.server_side.opened)
    each.server._sessions.clear()
    each.proxy.cut()
    await each.client_side.wait(lambda: each.client_side.closed)
    assert "unknown session" in each.client_side.closed[0]


async def test_a_new_session_of_a_peer_replaces_the_old(link: Connect) -> None:
    each = await link()
    await each.connect()
    await each.connect(me=CLIENT._replace(incarnation="r2"))
    await each.server_side.wait(lambda: len(each.server_side.opened) == 2)
    assert len(each.server_side.closed) == 1 and "replaced" in each.server_side.closed[0]
    await each.client_side.wait(lambda: each.client_side.closed)
    assert "replaced" in each.client_side.closed[0]


@pytest.mark.parametrize("limit", ["MAX_UNACKED_BYTES", "MAX_UNACKED_MESSAGES"])
async def test_overflow_ends_the_session(link: Connect, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """on_closed never comes from within send(), and memory stays bounded."""
    monkeypatch.setattr(session_module, limit, 20)
    each = await link(timeout_s=1.0)
    client = await each.connect()
    await each.server_side.wait(lambda: each.server_side.opened)
    each.proxy.frozen = True
    for number in range(1000):
        client.send(numbered(number))
        assert each.client_side.closed == []
    assert len(client._unacked) <= 21
    await each.client_side.wait(lambda: each.client_side.closed)
    assert each.client_side.closed[0].startswith("overflow")
    await each.server_side.wait(lambda: each.server_side.closed)
    assert len(each.client_side.closed) == len(each.server_side.closed) == 1


async def test_a_silent_connection_is_given_up(link: Connect) -> None:
    each = await link(timeout_s=0.4)
    await each.connect()
    await each.server_side.wait(lambda: each.server_side.opened)
    each.proxy.frozen = True
    for side in (each.client_side, each.server_side):
        await side.wait(lambda side=side: side.closed)
        assert "silent" in side.closed[0]


async def test_a_connection_that_stalls_for_a_while_is_resumed(link: Connect) -> None:
    each = await link(timeout_s=0.5)
    client = await each.connect()
    each.proxy.frozen = True
    client.send(numbered(7))
    await asyncio.sleep(0.7)
    each.proxy.frozen = False
    await each.server_side.wait(lambda: each.server_side.numbers == [7])
    assert not each.client_side.closed and not each.server_side.closed


async def test_a_dead_server_is_noticed(link: Connect) -> None:
    """Its connections are reset and its port refuses: the session ends without waiting for timeout_s."""
    each = await link(timeout_s=60.0)
    await each.connect(direct=True)
    await each.server_side.wait(lambda: each.server_side.opened)
    assert each.server._server is not None
    each.server._server.close()
    writer = each.server_side.opened[0]._writer
    assert writer is not None
    writer.transport.abort()
    await each.client_side.wait(lambda: each.client_side.closed)
    assert "nobody listens" in each.client_side.closed[0]


async def test_a_dead_client_is_noticed(link: Connect) -> None:
    each = await link(timeout_s=0.4)
    await each.connect()
    await each.server_side.wait(lambda: each.server_side.opened)
    each.proxy.refusing = True
    each.proxy.cut()
    await each.server_side.wait(lambda: each.server_side.closed)
    assert "not restored" in each.server_side.closed[0] and each.server._sessions == {}
    await each.client_side.wait(lambda: each.client_side.closed)


async def test_time_without_a_connection_counts_from_its_last_loss(link: Connect) -> None:
    """Away when timeout_s has passed since an earlier loss, that was restored, is no death."""
    each = await link(timeout_s=0.8)
    client = await each.connect()
    await each.server_side.wait(lambda: each.server_side.opened)
    each.proxy.cut()
    await asyncio.sleep(0.6)
    assert each.proxy.num_connections == 2
    each.proxy.refusing = True
    each.proxy.cut()
    await asyncio.sleep(0.4)
    each.proxy.refusing = False
    client.send(numbered(1))
    await each.server_side.wait(lambda: each.server_side.numbers == [1] or each.server_side.closed)
    assert not each.client_side.closed and not each.server_side.closed


async def test_a_frame_that_comes_twice_is_delivered_once(link: Connect) -> None:
    """As when an older connection still holds what a newer one has sent again."""
    each = await link()
    client = await each.connect()
    for number in range(3):
        client.send(numbered(number))
        for _, frame in client._unacked:
            client._write(frame)
    client.send(numbered(3))
    await each.server_side.wait(lambda: len(each.server_side.numbers) >= 4)
    assert each.server_side.numbers == [0, 1, 2, 3]


async def test_close_tells_the_peer(link: Connect) -> None:
    each = await link()
    client = await each.connect()
    client.send(numbered(1))
    await client.close()
    await each.server_side.wait(lambda: each.server_side.closed)
    assert each.server_side.numbers == [1] and each.client_side.closed == []
    async with asyncio.timeout(PATIENCE_S):
        while each.server._sessions:
            await asyncio.sleep(0)


async def test_close_does_not_wait_for_a_peer_that_does_not_read(
    link: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "CLOSE_TIMEOUT_S", 0.1)
    each = await link(timeout_s=60.0)
    client = await each.connect(direct=True)
    await each.server_side.wait(lambda: each.server_side.opened)
    connection = each.server_side.opened[0]._writer
    assert connection is not None
    connection.transport.pause_reading()  # type: ignore[attr-defined]
    for number in range(20):
        client.send(numbered(number, 1_000_000))
    async with asyncio.timeout(PATIENCE_S):
        await client.close()


@pytest.mark.parametrize("fails", ["client_side", "server_side"])
async def test_a_failing_handler_ends_the_session_on_both_sides(link: Connect, fails: str) -> None:
    each = await link()
    client = await each.connect()
    await each.server_side.wait(lambda: each.server_side.opened)

    def fail(session: Session, message: AnyMessage) -> None:
        raise ValueError("broken handler")

    getattr(each, fails).on_message = fail
    client.send(numbered(1))
    each.server_side.opened[0].send(numbered(1))
    for side in (each.client_side, each.server_side):
        await side.wait(lambda side=side: side.closed)
        assert "broken handler" in side.closed[0]


@pytest.mark.parametrize("fails", ["client_side", "server_side"])
@pytest.mark.parametrize("error", [ConnectionResetError, TimeoutError, EOFError])
async def test_a_handlers_network_error_is_no_lost_connection(
    link: Connect, fails: str, error: type[Exception]
) -> None:
    """Else the session would go on without the message that its handler failed to take."""
    each = await link()
    client = await each.connect()
    await each.server_side.wait(lambda: each.server_side.opened)

    def fail(session: Session, message: AnyMessage) -> None:
        raise error("of another connection")

    getattr(each, fails).on_message = fail
    client.send(numbered(1))
    each.server_side.opened[0].send(numbered(1))
    for side in (each.client_side, each.server_side):
        await side.wait(lambda side=side: side.closed)
        assert "of another connection" in side.closed[0]


async def test_nothing_is_delivered_after_the_end(link: Connect) -> None:
    """A frame may have come together with the one that ends the session."""
    each = await link()
    await each.connect()
    await each.server_side.wait(lambda: each.server_side.opened)
    session = each.server_side.opened[0]
    delivered: list[AnyMessage] = []

    def end(session: Session, message: AnyMessage) -> None:
        delivered.append(message)
        session.end("ended here", tell=True)

    each.server_side.on_message = end  # type: ignore[method-assign]
    assert session._writer is not None
    transport = session._writer.transport
    async with asyncio.timeout(PATIENCE_S):
        while not isinstance(transport.get_protocol(), FrameProtocol):
            await asyncio.sleep(0.001)
    protocol = transport.get_protocol()
    protocol.data_received(encode_frame(Data(1, 0, numbered(1))) + encode_frame(Data(2, 0, numbered(2))))
    await each.client_side.wait(lambda: each.client_side.closed)
    assert each.server_side.closed == ["ended here"] and delivered == [numbered(1)]


async def test_a_failing_on_open_ends_the_session(link: Connect) -> None:
    """It must not live on, resumed again and again, without an owner."""
    each = await link()

    def fail(session: Session) -> None:
        raise ValueError("broken handler")

    each.server_side.on_open = fail  # type: ignore[method-assign]
    await each.connect()
    await each.client_side.wait(lambda: each.client_side.closed)
    assert "broken handler" in each.client_side.closed[0] and each.server._sessions == {}


async def test_a_failing_on_open_ends_the_session_of_the_client(link: Connect) -> None:
    each = await link()

    def fail(session: Session) -> None:
        raise ValueError("broken handler")

    each.client_side.on_open = fail  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="broken handler"):
        await each.connect()
    await each.server_side.wait(lambda: each.server_side.closed)
    assert "failed to open" in each.server_side.closed[0]


async def test_no_session_opens_while_the_server_stops(link: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """stop() waits for a peer that does not read; who is in the handshake then is told, not left behind open."""
    monkeypatch.setattr(session_module, "CLOSE_TIMEOUT_S", 0.5)
    each = await link()
    slow = await each.connect(direct=True)
    await each.server_side.wait(lambda: each.server_side.opened)
    assert slow._writer is not None
    slow._writer.transport.pause_reading()  # type: ignore[attr-defined]
    for number in range(20):
        each.server_side.opened[0].send(numbered(number, 1_000_000))
    reader, writer = await asyncio.open_connection("127.0.0.1", each.port)
    async with asyncio.timeout(PATIENCE_S):
        while len(each.server._connections) < 2:
            await asyncio.sleep(0.01)
    stop = asyncio.create_task(each.server.stop())
    await asyncio.sleep(0.01)
    with pytest.raises(HandshakeError, match="stops"):
        await initiate(
            reader,
            writer,
            me=PeerName("router-1", "r1", Role.ROUTER),
            expect=SERVER,
            secret=SECRET,
            session_id="new",
            resume=False,
            received=0,
            address="the server",
        )
    await stop
    writer.close()
    assert len(each.server_side.opened) == 1 and not each.server._connections


async def test_a_proof_is_good_for_one_server_only(link: Connect) -> None:
    """Who took a dead worker's port must not enter elsewhere with the proofs of those who still call it."""
    each = await link()
    dead = PeerName("decode-9", "d9", Role.DECODE)

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        live_reader, live_writer = await asyncio.open_connection("127.0.0.1", each.port)
        challenge = msgspec.msgpack.decode(await read_frame(live_reader, 4096), type=Challenge)
        writer.write(encode_frame(Challenge(dead, challenge.nonce)))
        hello = await read_frame(reader, 4096)
        live_writer.write(len(hello).to_bytes(4, "big") + hello)
        answer = await read_frame(live_reader, 4096)
        writer.write(len(answer).to_bytes(4, "big") + answer)
        live_writer.close()
        writer.close()

    server = await asyncio.start_server(pass_on, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(HandshakeError, match="wrong secret"):
        await connect("127.0.0.1", port, me=CLIENT, expect=dead, secret=SECRET, handler=Recorder(), timeout_s=5)
    assert each.server_side.opened == []
    server.close()


@pytest.mark.parametrize(
    "body",
    [b"\x93\xa9Challenge\x92\xa1\xff\xa1a\xc4\x00", b"\x94\xa9Challenge\x92\xa1a\xa1b\xc4\x00" + b"\x91" * 4000, b"x"],
)
async def test_garbage_fails_as_a_handshake_on_either_side(
    link: Connect, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Not valid UTF-8, nested too deep, no msgpack: each a HandshakeError, for callers try again after that."""
    frame = len(body).to_bytes(4, "big") + body
    each = await link(timeout_s=2.0)
    reader, writer = await asyncio.open_connection("127.0.0.1", each.port)
    writer.write(frame)
    async with asyncio.timeout(PATIENCE_S):
        await reader.read()  # until the server closes
    writer.close()
    assert "refused a connection" in caplog.text and "does not speak" in caplog.text

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(HandshakeError, match="does not speak"):
        await connect("127.0.0.1", port, me=CLIENT, expect=SERVER, secret=SECRET, handler=Recorder(), timeout_s=2)
    server.close()


async def test_a_server_that_says_nothing_is_given_up(link: Connect) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(TimeoutError):
        await connect("127.0.0.1", port, me=CLIENT, expect=SERVER, secret=SECRET, handler=Recorder(), timeout_s=0.2)
    server.close()


async def test_a_message_that_no_frame_can_carry_is_never_sent(link: Connect) -> None:
    """The peer would refuse it on every connection."""
    each = await link()
    client = await each.connect()
    await each.server_side.wait(lambda: each.server_side.opened)
    client.send(numbered(1, MAX_FRAME_BYTES))
    await each.client_side.wait(lambda: each.client_side.closed)
    assert each.client_side.closed[0].startswith("overflow")
    await each.server_side.wait(lambda: each.server_side.closed)
    assert each.server_side.numbers == [] and each.proxy.num_connections == 1
