"""Frames however their bytes come, and from a connection that was a stream before."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdray.testing.patience import PATIENCE_S
from pdray.wire.frame_protocol import FrameProtocol, take_over

LIMIT = 100_000


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


@given(st.lists(st.binary(max_size=20), max_size=12), st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_bytes_may_be_cut_anywhere(bodies: list[bytes], cuts: list[int]) -> None:
    async def run() -> None:
        taken: list[bytes] = []
        protocol = FrameProtocol(asyncio.Protocol(), taken.append, 20)
        data = b"".join(map(framed, bodies)) + framed(b"x" * 21)
        for number in range(len(data)):
            size = cuts[number % len(cuts)]
            protocol.data_received(data[:size])
            data = data[size:]
        assert taken == bodies, "and nothing of the one that is too long"
        assert "21 bytes is over the limit of 20" in protocol.ended.result()

    asyncio.run(run())


async def test_nothing_is_taken_after_a_failure_or_the_end() -> None:
    def fail(body: bytes) -> None:
        taken.append(body)
        raise ValueError("broken")

    taken: list[bytes] = []
    protocol = FrameProtocol(asyncio.Protocol(), fail, LIMIT)
    protocol.data_received(framed(b"1") + framed(b"2"))
    protocol.data_received(framed(b"3"))
    with pytest.raises(ValueError, match="broken"):
        await protocol.ended
    assert taken == [b"1"]
    ended = FrameProtocol(asyncio.Protocol(), taken.append, LIMIT)
    ended.end("enough")
    ended.data_received(framed(b"4"))
    assert taken == [b"1"] and await ended.ended == "enough"


@pytest.mark.parametrize("closes", [False, True], ids=["stays", "closes at once"])
@pytest.mark.parametrize("pause_s", [0.0, 0.02])
async def test_what_came_with_the_handshake_is_not_lost(closes: bool, pause_s: float) -> None:
    """Whether it is there when the frames begin, or comes later, and also if the peer is gone by then."""
    bodies = [bytes([number]) * (7_000 * number) for number in range(12)]
    taken: list[bytes] = []
    reasons: asyncio.Queue[str] = asyncio.Queue()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readexactly(5) == b"hello"
        await asyncio.sleep(pause_s)
        protocol = await take_over(reader, writer.transport, taken.append, LIMIT)  # type: ignore[arg-type]
        reasons.put_nowait(await protocol.ended)
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    _, writer = await asyncio.open_connection("127.0.0.1", server.sockets[0].getsockname()[1])
    writer.write(b"hello" + b"".join(map(framed, bodies[:6])))
    if not closes:
        await asyncio.sleep(0.01)
    writer.write(b"".join(map(framed, bodies[6:])))
    if not closes:
        async with asyncio.timeout(PATIENCE_S):
            while len(taken) < len(bodies):
                await asyncio.sleep(0.001)
    writer.close()
    async with asyncio.timeout(PATIENCE_S):
        assert "closed" in await reasons.get()
    assert taken == bodies
    server.close()
