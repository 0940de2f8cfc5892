"""A session that ends says so on both sides, once, and delivers nothing afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from session_link import CLIENT, SECRET, SERVER, Connect, Recorder, numbered

from pdray.errors import HandshakeError
from pdray.testing.patience import PATIENCE_S
from pdray.wire import session as session_module
from pdray.wire.frame_protocol import FrameProtocol
from pdray.wire.frames import Data, encode_frame
from pdray.wire.handshake import initiate
from pdray.wire.messages import AnyMessage
from pdray.wire.peers import PeerName, Role
from pdray.wire.server import SessionServer
from pdray.wire.session import Session


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


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
    each = await link()
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
    each = await link(timeout_s=PATIENCE_S)
    client = await each.connect()
    await each.server_side.wait(lambda: each.server_side.opened)
    (session,) = each.server_side.opened
    each.proxy.cut()
    await until(lambda: each.proxy.num_connections == 2 and session.lost_at and session.connected)
    first_loss = session.lost_at
    each.proxy.refusing = True
    each.proxy.cut()
    await until(lambda: not session.connected and session.lost_at > first_loss)
    each.server._give_up(session, first_loss, "as its timer does when timeout_s have passed")
    assert not each.server_side.closed
    each.proxy.refusing = False
    client.send(numbered(1))
    await each.server_side.wait(lambda: each.server_side.numbers == [1] or each.server_side.closed)
    assert not each.client_side.closed and not each.server_side.closed
    each.server._give_up(session, session.lost_at, "it is here")
    assert not each.server_side.closed


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
