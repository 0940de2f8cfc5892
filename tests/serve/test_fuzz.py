"""No body, however made, is answered with anything but 2xx or 4xx, and no request outlives its answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
from fastapi import FastAPI
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pdray.config import Config
from pdray.serve.fields import FIELDS as OTHER_FIELDS
from pdray.serve.protocol import ChatBody, ChatMessage, CompletionBody
from pdray.testing.patience import PATIENCE_S

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.sampled_from([2**31 - 1, 2**31, -(2**31) - 1, 2**63 - 1, 2**63, 2**64, 10**30])
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(max_size=8)
    | st.sampled_from(["\ud800", "\udfff\ud800", "\x00", "text", "user", "smol", "json_object"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
FIELDS = sorted({*CompletionBody.model_fields, *ChatBody.model_fields, *OTHER_FIELDS} - {"prompt", "messages"})
MESSAGES = st.lists(
    st.dictionaries(
        st.sampled_from([*ChatMessage.model_fields, "tool_calls", "type", "text"]),
        st.sampled_from(["user", "assistant", "system"]) | VALUES | st.lists(st.fixed_dictionaries({"type": VALUES})),
        max_size=3,
    ),
    max_size=3,
)
BODIES = st.builds(
    lambda prompt, extra: {**extra, **prompt},
    st.fixed_dictionaries({"prompt": VALUES | st.just("x")})
    | st.fixed_dictionaries({"messages": MESSAGES | VALUES | st.just([{"role": "user", "content": "x"}])}),
    st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), VALUES, max_size=3),
)
PATHS = st.sampled_from(["/v1/completions", "/v1/chat/completions"])


async def post(app: FastAPI, path: str, content: bytes) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://pdray") as http:
        response = await http.post(path, content=content)
    assert 200 <= response.status_code < 500, response.text
    assert b"server_error" not in response.content
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    await asyncio.wait_for(asyncio.gather(*left, return_exceptions=True), PATIENCE_S)


@settings(max_examples=400)
@given(path=PATHS, body=BODIES | VALUES)
@example(path="/v1/completions", body={"prompt": "x", "stream": True, "n": 3, "logprobs": 2})
@example(path="/v1/chat/completions", body={"messages": [{"role": "user", "content": "x"}], "logprobs": True})
def test_no_json_is_a_server_error(make_app: Callable[[Config], FastAPI], path: str, body: Any) -> None:
    content = json.dumps(body).encode()

    async def run() -> None:
        await post(make_app(Config(served_model_name="smol")), path, content)

    asyncio.run(run())


@settings(max_examples=150)
@given(path=PATHS, content=st.binary(max_size=60) | st.text(alphabet='{}[]":,\\ud0891eE-NaInfty', max_size=40))
def test_no_bytes_are_a_server_error(make_app: Callable[[Config], FastAPI], path: str, content: bytes | str) -> None:
    async def run() -> None:
        raw = content if isinstance(content, bytes) else content.encode()
        await post(make_app(Config(served_model_name="smol")), path, raw)

    asyncio.run(run())
