"""Sessions deliver every message exactly once and in order, whatever the network does."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable

import pytest
from session_link import Connect, Link, numbered

from pdray.testing.patience import PATIENCE_S
from pdray.wire.frames import MAX_FRAME_BYTES
from pdray.wire.session import Session


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
    each = await link(timeout_s=2.0)
    client = await each.connect()
    await asyncio.sleep(2.5)
    client.send(numbered(1))
    await each.server_side.wait(lambda: each.server_side.numbers == [1])
    assert each.proxy.num_connections == 1 and not each.client_side.closed and not each.server_side.closed


async def test_acknowledged_messages_are_forgotten(link: Connect) -> None:
    each = await link()
    client = await each.connect()
    for number in range(50):
        client.send(numbered(number))
    await each.server_side.wait(lambda: len(each.server_side.numbers) == 50)
    async with asyncio.timeout(PATIENCE_S):
        while client._unacked:
            await asyncio.sleep(0.01)
    assert client._unacked_bytes == 0


async def test_a_silent_connection_is_given_up(link: Connect) -> None:
    each = await link(timeout_s=0.4)
    await each.connect()
    await each.server_side.wait(lambda: each.server_side.opened)
    each.proxy.frozen = True
    for side in (each.client_side, each.server_side):
        await side.wait(lambda side=side: side.closed)
        assert "silent" in side.closed[0]


async def test_a_connection_that_stalls_for_a_while_is_resumed(link: Connect) -> None:
    each = await link(timeout_s=2.0)
    client = await each.connect()
    each.proxy.frozen = True
    client.send(numbered(7))
    async with asyncio.timeout(PATIENCE_S):
        while client.connected:
            await asyncio.sleep(0.01)
    each.proxy.frozen = False
    await each.server_side.wait(lambda: each.server_side.numbers == [7])
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


async def test_a_message_that_no_frame_can_carry_is_never_sent(link: Connect) -> None:
    """The peer would refuse it on every connection."""
    each = await link(timeout_s=0.4)  # the client leaves without a word, and the server waits for its return
    client = await each.connect()
    await each.server_side.wait(lambda: each.server_side.opened)
    client.send(numbered(1, MAX_FRAME_BYTES))
    await each.client_side.wait(lambda: each.client_side.closed)
    assert each.client_side.closed[0].startswith("overflow")
    await each.server_side.wait(lambda: each.server_side.closed)
    assert each.server_side.numbers == [] and each.proxy.num_connections == 1
