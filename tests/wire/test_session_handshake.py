"""Who may open a session: one who knows the secret, is whom it says, and speaks the protocol."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
import pytest
from session_link import CLIENT, SECRET, SERVER, Connect, Recorder, numbered

from pdray.errors import HandshakeError
from pdray.testing.patience import PATIENCE_S
from pdray.wire.dial import connect
from pdray.wire.frames import encode_frame, read_frame
from pdray.wire.handshake import Challenge, Welcome
from pdray.wire.peers import PeerName, Role


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
    each = await link()
    each.server._timeout_s = 0.2  # two bytes are not even a length: it waits for more
    for data in (b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\4abcd", b"\xff" * 64, b"\0\0"):
        reader, writer = await asyncio.open_connection("127.0.0.1", each.port)
        writer.write(data)
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionError):
                await reader.read()  # until the server closes
        writer.close()
    each.server._timeout_s = PATIENCE_S
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
