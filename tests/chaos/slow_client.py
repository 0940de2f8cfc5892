"""A client that reads a byte a second of a long stream must cost the others nothing."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from urllib.parse import urlsplit

import psutil
from application import Application, processes, seconds_until
from deaths import with_problems
from rows import Row
from scale import Scale
from streams import Answer, Body, Clients, new_session, story

NUM_OTHERS = 8
NUM_CHOICES = 8
MAX_SLOWDOWN = 1.5
MAX_GROWTH_MIB = 20.0
HEAD_START_S = 2.0
RECEIVE_BUFFER_BYTES = 4096
SOCKET_TIMEOUT_S = 20.0


async def slow_client(app: Application, scale: Scale) -> list[Row]:
    """Eight streams alone, beside a long stream that is read, and beside the same one read a byte a second."""
    others = [story(index, scale.num_tokens) for index in range(NUM_OTHERS)]
    long = story(0, app.config.max_model_len - 64 if app.config.max_model_len else 400)
    long |= {"n": NUM_CHOICES, "logprobs": 5, "temperature": 1.0}
    async with new_session() as session:
        clients = Clients(app.url, session)
        await _together(clients, others)
        alone, expected = await _together(clients, others)
        reader = asyncio.ensure_future(clients.ask(long))
        await asyncio.sleep(HEAD_START_S)
        beside_reader, _ = await _together(clients, others)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        problems = await app.problems_at_rest()

        replica = psutil.Process((await app.pids())["replica"])
        before = replica.memory_info().rss
        slow = _connect(app.url)
        port = slow.getsockname()[1]
        began = time.monotonic()
        reading = asyncio.ensure_future(_read_slowly(slow, app.url, long))
        await asyncio.sleep(HEAD_START_S)
        running = sum(row["running"] for row in (await app.workers()).values())
        beside_slow, answers = await _together(clients, others)
        growth = 0.0
        while time.monotonic() - began < scale.slow_client_s:
            growth = max(growth, (replica.memory_info().rss - before) / 2**20)
            await asyncio.sleep(0.5)
        reading.cancel()
        ended = (await asyncio.gather(reading, return_exceptions=True))[0]
        slow.close()
        if isinstance(ended, Exception):
            problems.append(f"the slow stream broke: {ended!r}")
    closed = await _closed_after(port)
    if [answer.content for answer in answers] != [answer.content for answer in expected]:
        problems.append("the others' texts differ")
    if beside_slow > MAX_SLOWDOWN * beside_reader:
        problems.append("the others waited for the slow one")
    if running != NUM_CHOICES:
        problems.append(f"{running} sequences of the slow stream were running when the others began")
    if growth > MAX_GROWTH_MIB:
        problems.append("the replica grew")
    if closed is None:
        problems.append(f"the socket was still open after {SOCKET_TIMEOUT_S:g} s")
    problems += await app.problems_at_rest()
    figure = (
        f"{NUM_OTHERS} others took {alone:.1f} s alone, {beside_reader:.1f} s beside the stream read at once, "
        f"{beside_slow:.1f} s beside it read slowly; replica {growth:+.1f} MiB; socket closed after {closed or 0:.1f} s"
    )
    limit = f"at most {MAX_SLOWDOWN:g}x beside a reader; < {MAX_GROWTH_MIB:g} MiB; socket closed; nothing in use"
    return [Row("slow client", with_problems(figure, problems), limit, not problems)]


async def _together(clients: Clients, bodies: list[Body]) -> tuple[float, list[Answer]]:
    """Seconds until all have ended, and what they said."""
    began = time.monotonic()
    answers = await asyncio.gather(*(clients.ask(body) for body in bodies))
    return time.monotonic() - began, answers


def _connect(url: str) -> socket.socket:
    """A connection whose end here holds little, so that the other end feels how slowly it is read."""
    address = urlsplit(url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
    connection.connect((address.hostname, address.port))
    connection.setblocking(False)
    return connection


async def _read_slowly(connection: socket.socket, url: str, body: Body) -> None:
    """Ask, then read a byte a second until cancelled.

    Raises:
        ConnectionError: the server closed it.
    """
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, head.encode() + content)
    while await loop.sock_recv(connection, 1):
        await asyncio.sleep(1.0)
    raise ConnectionError("closed by the server")


async def _closed_after(port: int) -> float | None:
    """Seconds until no process of the cluster is connected to this port of ours; None if one stays."""

    async def is_closed() -> bool:
        return not await asyncio.to_thread(_is_connected_to, port)

    try:
        return await seconds_until(is_closed, time.monotonic(), SOCKET_TIMEOUT_S)
    except TimeoutError:
        return None


def _is_connected_to(port: int) -> bool:
    for process in processes():
        try:
            connections = process.net_connections(kind="tcp")
        except psutil.Error:
            continue  # it has just ended
        if any(each.raddr and each.raddr.port == port for each in connections):
            return True
    return False
