"""A client that goes away, or a server that cancels, leaves no request behind: at whatever moment."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from pdray.serve import connection
from pdray.serve.connection import ClientGone, EventStream, unless_gone
from pdray.testing.patience import PATIENCE_S


def request_to(path: str, body: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An ASGI scope, and the messages that bring the body."""
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    return {**scope, "headers": []}, [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]


async def settle() -> None:
    """Let everything that can run, run."""
    for _ in range(50):
        await asyncio.sleep(0)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("moment", ["waiting", "running"])
async def test_client_closes(url: str, router: Any, until: Any, path: str, stream: bool, moment: str) -> None:
    prompt = {"prompt": ["a", "b"]} if path == "completions" else {"messages": [{"role": "user", "content": "x"}]}
    if moment == "waiting":
        router.admission.clear()
    router.stop_after = 3
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        asking = asyncio.ensure_future(client.post(f"{url}/v1/{path}", json={**prompt, "stream": stream}))
        expected = len(prompt.get("prompt", ["x"]))
        await until(lambda: (router.num_waiting if moment == "waiting" else router.num_running) == expected)
        asking.cancel()
        await asyncio.wait([asking])
    await until(lambda: not router.num_running and not router.num_waiting)
    assert len(router.aborted) == (0 if moment == "waiting" else expected)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["cancel", "disconnect"])
@pytest.mark.parametrize("prompt", ["a", ["a", "b", "c"]])
async def test_every_moment(app: FastAPI, router: Any, stream: bool, how: str, prompt: Any) -> None:
    """The handler is cancelled, as by Serve's proxy, or told of the disconnect, as by uvicorn, after k steps of the
    loop, for every k until the answer is whole."""
    for moment in range(1000):
        gone = asyncio.Event()
        scope, messages = request_to("/v1/completions", {"prompt": prompt, "stream": stream, "n": 2, "max_tokens": 9})
        sent: list[Any] = []

        async def receive(messages: Any = messages, gone: Any = gone) -> Any:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any, sent: Any = sent) -> None:
            await asyncio.sleep(0)
            sent.append(message)

        serving = asyncio.ensure_future(app(scope, receive, send))
        for _ in range(moment):
            await asyncio.sleep(0)
        if how == "cancel":
            serving.cancel()
        else:
            gone.set()
        await asyncio.wait([serving], timeout=5)
        assert serving.done(), f"moment {moment}: it hangs"
        await settle()
        assert not router.num_running, f"moment {moment}: {router.num_running} requests were left"
        if sent and sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False} and moment > 50:
            break
        if not stream and sent and sent[-1]["type"] == "http.response.body" and sent[0]["status"] == 200:
            break
    else:
        raise AssertionError("no answer was ever whole")
    assert router.aborted and moment > 3


async def test_a_stream_that_never_begins_is_released() -> None:
    """The client is gone before the first event is asked for, so the generator's own finally would never run."""
    released = asyncio.Event()

    async def events() -> AsyncGenerator[bytes, None]:
        yield b"never"

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await asyncio.Event().wait()

    await EventStream(events(), released.set)({"type": "http"}, receive, send)
    assert released.is_set()


async def test_a_send_that_fails_is_a_client_gone() -> None:
    released = asyncio.Event()
    closed = asyncio.Event()

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"data: x\n\n"
        finally:
            closed.set()

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            raise ConnectionResetError

    await EventStream(events(), released.set)({"type": "http"}, receive, send)
    assert released.is_set() and closed.is_set()


async def test_a_client_that_takes_nothing_for_long_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_STALL_S", 0.01)
    released = asyncio.Event()

    async def events() -> AsyncGenerator[bytes, None]:
        yield b"data: x\n\n"

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    await asyncio.wait_for(EventStream(events(), released.set)({"type": "http"}, receive, send), 10)
    assert released.is_set()


ASYNCIO_BUFFER = 64 * 1024  # bytes from which a transport tells its writer to wait


@contextlib.asynccontextmanager
async def slow_client(server: uvicorn.Server, body: dict[str, Any]) -> AsyncGenerator[socket.socket, None]:
    """A connection whose kernel buffers are small on both sides, and the request sent."""
    listening = server.servers[0].sockets[0]
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    loop, content = asyncio.get_running_loop(), json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: pdray\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await loop.sock_connect(client, listening.getsockname())
        await loop.sock_sendall(client, head.encode() + content)
        yield client


def num_buffered(server: uvicorn.Server, client: socket.socket) -> int:
    """Bytes for this client that wait in the server's process."""
    [transport] = [
        each.transport
        for each in server.server_state.connections
        if each.transport.get_extra_info("peername") == client.getsockname()
    ]
    return int(transport.get_write_buffer_size())


@pytest.mark.parametrize("then", ["close", "read on"])
async def test_a_slow_reader(server: uvicorn.Server, url: str, router: Any, until: Any, then: str) -> None:
    """It is sent what it takes, others are served, and what it has not taken is little more than the text itself."""
    num_tokens = 20_000
    router.max_model_len = 10 * num_tokens
    router.stop_after = num_tokens if then == "close" else None
    body = {"prompt": "x", "stream": True, "ignore_eos": True, "max_tokens": num_tokens + (then == "close")}
    loop = asyncio.get_running_loop()
    async with slow_client(server, body) as client, httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as other:
        received = await loop.sock_recv(client, 1)
        [request] = router.requests
        num_seen, most_buffered = 0, 0
        while len(request.output.outputs[0].token_ids) < num_tokens:
            received += await loop.sock_recv(client, 1)
            answer = await other.post("/v1/completions", json={"prompt": "y", "max_tokens": 5})
            assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 5
            num_seen += 1
            most_buffered = max(most_buffered, num_buffered(server, client))
        assert num_seen > 5
        assert ASYNCIO_BUFFER < most_buffered < 2 * ASYNCIO_BUFFER + num_tokens, "unmerged, it would be 3 MB"
        if then == "read on":
            while not received.endswith(b"0\r\n\r\n"):
                received += await asyncio.wait_for(loop.sock_recv(client, 1 << 16), PATIENCE_S)
        else:
            assert router.num_running == 1
    await until(lambda: not router.num_running)
    assert router.aborted == ([request.request_id] if then == "close" else [])
    if then == "read on":
        text = "".join(
            json.loads(line[6:])["choices"][0]["text"]
            for line in received.decode().splitlines()
            if line.startswith("data: {")
        )
        assert text == request.output.outputs[0].text and len(text) == num_tokens
        assert b"data: [DONE]" in received


async def test_unless_gone() -> None:
    forever = asyncio.Event().wait

    async def value() -> int:
        return 3

    async def fail() -> None:
        raise KeyError

    async def gone() -> Any:
        return {"type": "http.disconnect"}

    async def proxy_died() -> Any:
        raise ConnectionError("the proxy died")

    assert await unless_gone(forever, value()) == 3  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        await unless_gone(forever, fail())  # type: ignore[arg-type]
    with pytest.raises(ClientGone):
        await unless_gone(gone, asyncio.Event().wait())
    with pytest.raises(ClientGone) as caught:
        await unless_gone(proxy_died, asyncio.Event().wait())
    assert isinstance(caught.value.__cause__, ConnectionError)


async def test_a_body_that_never_ends_is_no_server_error(app: FastAPI, caplog: pytest.LogCaptureFixture) -> None:
    scope, _ = request_to("/v1/completions", {})
    messages: list[Any] = [{"type": "http.request", "body": b'{"pro', "more_body": True}, {"type": "http.disconnect"}]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    assert sent[0]["status"] == 499 and not caplog.records
