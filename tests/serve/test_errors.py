"""Every bad input has its status and OpenAI's error shape; nothing is submitted for it, or nothing stays."""

from __future__ import annotations

import json
import logging
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from pydantic import ValidationError

from pdray.errors import (
    ContextLengthError,
    InvalidRequestError,
    NoWorkerError,
    OutOfMemoryError,
    QueueFullError,
    RequestFailedError,
    WorkerDiedError,
)
from pdray.router.template_facts import renderer_options
from pdray.serve.errors import MAX_MESSAGE_CHARS, to_api_error
from pdray.serve.protocol import ChatBody, CompletionBody, GenerationBody
from pdray.testing.api_bodies import USER, chat, check_shape, completion


async def test_long_values_are_not_sent_back_whole(http: httpx.AsyncClient) -> None:
    error = check_shape(await http.post("/v1/completions", json=completion(model="m" * 5000)), 404)
    assert len(error["message"]) <= MAX_MESSAGE_CHARS + 1


@pytest.mark.parametrize(
    "method,path,status",
    [
        ("GET", "/", 404),
        ("GET", "/v1/engines", 404),
        ("POST", "/v2/completions", 404),
        ("GET", "/v1/models/unknown", 404),
        ("GET", "/v1/models/%FF%00", 404),
        ("GET", "/v1/completions", 405),
        ("PUT", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models/smol", 405),
        ("POST", "/health", 405),
    ],
)
async def test_routes_and_methods(http: httpx.AsyncClient, method: str, path: str, status: int) -> None:
    response = await http.request(method, path)
    check_shape(response, status)
    assert ("allow" in response.headers) is (status == 405)


@pytest.mark.parametrize("kind,body", [(CompletionBody, completion()), (ChatBody, chat())])
def test_what_is_ignored_is_not_kept(kind: type[GenerationBody], body: dict[str, Any]) -> None:
    """Not for as long as the request lives: small JSON can be large in memory."""
    ignored = {"user": "x" * 5000, "metadata": {str(number): [] for number in range(1000)}}
    checked = kind.model_validate({**body, **ignored})
    assert checked == kind.model_validate(body) and not checked.model_extra
    for place in ({"response_format": {"type": "text", **ignored}}, {"messages": [{**USER, **ignored}]}):
        with pytest.raises(ValidationError, match="user|metadata|messages"):
            kind.model_validate(body | place)


async def test_unknown_model(http: httpx.AsyncClient) -> None:
    for path, body in (("completions", completion(model="gpt")), ("chat/completions", chat(model="gpt"))):
        error = check_shape(await http.post(f"/v1/{path}", json=body), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model") and "smol" in error["message"]


async def test_large_bodies_are_refused(http: httpx.AsyncClient) -> None:
    """The limit is 20,000 bytes."""
    check_shape(await http.post("/v1/completions", json=completion(prompt="x" * 20_000)), 413)
    assert (await http.post("/v1/completions", json=completion(prompt="x", user="y" * 19_000))).status_code == 200


async def test_an_endless_body_is_refused_while_it_is_read(app: FastAPI) -> None:
    sent: list[Any] = []
    num_read = 0

    async def receive() -> Any:
        nonlocal num_read
        num_read += 1
        return {"type": "http.request", "body": b" " * 10_000, "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"", "query_string": b""}
    await app({**scope, "headers": []}, receive, send)
    assert sent[0]["status"] == 413
    assert num_read == 3


async def test_a_declared_length_is_believed_before_a_byte_is_read(app: FastAPI) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"", "query_string": b""}
    await app({**scope, "headers": [(b"content-length", b"20001")]}, receive, send)
    assert sent[0]["status"] == 413


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "refusal,status,retry_after,kind",
    [
        (QueueFullError("full", 0.0), 429, "1", openai.RateLimitError),
        (QueueFullError("full", 6.01), 429, "7", openai.RateLimitError),
        (NoWorkerError("none"), 503, "2", openai.InternalServerError),
        (WorkerDiedError("decode-0 is gone"), 500, None, openai.InternalServerError),
        (OutOfMemoryError("no memory"), 500, None, openai.InternalServerError),
        (RequestFailedError("IndexError"), 500, None, openai.InternalServerError),
    ],
)
async def test_refusals_have_a_status_even_for_streams(
    client: openai.AsyncOpenAI, router: Any, refusal: Exception, status: int, retry_after: str | None, kind: Any,
    stream: bool,
) -> None:  # fmt: skip
    router.refusals[0] = refusal
    with pytest.raises(kind) as caught:
        await client.completions.create(model="smol", prompt="x", stream=stream)
    assert caught.value.status_code == status
    assert caught.value.response.headers.get("retry-after") == retry_after
    check_shape(caught.value.response, status)


@pytest.mark.parametrize("stream", [False, True])
async def test_one_refused_prompt_gives_the_others_up(http: httpx.AsyncClient, router: Any, stream: bool) -> None:
    router.refusals[2] = QueueFullError("full", 3.0)
    router.stop_after = 1
    response = await http.post("/v1/completions", json=completion(prompt=["a", "b", "c", "d"], stream=stream))
    check_shape(response, 429)
    assert not router.num_running and len(router.aborted) == len(router.requests)


async def test_a_request_on_which_an_engine_failed_is_not_to_be_tried_again(
    client: openai.AsyncOpenAI, http: httpx.AsyncClient, router: Any
) -> None:
    """openai's client tries every other 500 again by itself, which would cost another worker."""
    router.refusals = {number: RequestFailedError("the engine failed on it: IndexError") for number in range(9)}
    error = check_shape(await http.post("/v1/completions", json=completion()), 500)
    assert "IndexError" in error["message"]
    with pytest.raises(openai.InternalServerError, match="IndexError"):
        await client.with_options(max_retries=3).completions.create(model="smol", prompt="x")
    assert router.num_submitted == 2


async def test_unexpected_errors_tell_nothing(
    http: httpx.AsyncClient, router: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """They are logged here, and do not go on into the server that called the app."""
    router.refusals[0] = KeyError("secret")
    with caplog.at_level(logging.ERROR):
        error = check_shape(await http.post("/v1/completions", json=completion()), 500)
    assert "secret" not in json.dumps(error) and error["type"] == "server_error"
    [record] = [record for record in caplog.records if record.exc_info]
    assert isinstance(record.exc_info[1], KeyError)  # type: ignore[index]


async def test_death_of_a_worker(client: openai.AsyncOpenAI, http: httpx.AsyncClient, router: Any) -> None:
    """A whole answer is a 500. A stream has begun: it ends with an error event, and without [DONE]."""
    router.die_after = 3
    error = check_shape(await http.post("/v1/completions", json=completion(prompt=["a", "b"])), 500)
    assert error["type"] == "server_error" and not router.num_running
    texts = []
    with pytest.raises(openai.APIError, match="decode-0"):
        async for chunk in await client.completions.create(model="smol", prompt="x", stream=True):
            texts.append(chunk.choices[0].text)
    assert "".join(texts) == "The"
    response = await http.post("/v1/chat/completions", json=chat(stream=True))
    assert response.status_code == 200
    assert b'data: {"error":{' in response.content and b"[DONE]" not in response.content
    assert response.content.endswith(b"}\n\n")


async def test_without_a_tokenizer(http: httpx.AsyncClient, router: Any) -> None:
    router.tokenizer = None
    check_shape(await http.post("/v1/completions", json=completion()), 400)
    check_shape(await http.post("/v1/completions", json=completion(prompt=[1], echo=True)), 400)
    assert "chat template" in check_shape(await http.post("/v1/chat/completions", json=chat()), 400)["message"]
    answer = await http.post("/v1/completions", json=completion(prompt=[1], max_tokens=3, logprobs=1))
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    "options", [{"stop": "a"}, {"include_stop_str_in_output": True}, {"skip_special_tokens": False}]
)
async def test_what_needs_a_tokenizer_is_not_ignored(
    http: httpx.AsyncClient, router: Any, options: dict[str, Any]
) -> None:
    router.tokenizer = None
    [name] = options
    error = check_shape(await http.post("/v1/completions", json=completion(prompt=[1], **options)), 400)
    assert error["param"] == name and "skip_tokenizer_init" in error["message"]


@pytest.mark.parametrize("wrong", ["x" * 200, "", [1] * 200, [1000]])
async def test_one_prompt_that_cannot_be_served_refuses_all_before_any_is(
    http: httpx.AsyncClient, router: Any, wrong: Any
) -> None:
    prompts = [*(["y"] * 20), wrong] if isinstance(wrong, str) else [*([[1]] * 20), wrong]
    check_shape(await http.post("/v1/completions", json=completion(prompt=prompts)), 400)
    assert router.num_submitted == 0


async def test_without_a_chat_template(http: httpx.AsyncClient, router: Any) -> None:
    router.tokenizer.chat_template = None
    assert "chat template" in check_shape(await http.post("/v1/chat/completions", json=chat()), 400)["message"]


def test_template_options_are_the_renderers() -> None:
    assert {"tokenize", "chat_template", "padding", "tools", "messages"} <= renderer_options()
    assert "enable_thinking" not in renderer_options()


def test_a_code_comes_from_the_errors_type_and_not_from_its_text() -> None:
    """Texts quote what clients send."""
    quoted = InvalidRequestError("stop is 'maximum context length'; it must be shorter", "stop")
    assert to_api_error(quoted).body["error"]["code"] is None
    assert to_api_error(ContextLengthError("too long", "prompt")).body["error"]["code"] == "context_length_exceeded"
    assert to_api_error(QueueFullError("context length", 1.0)).body["error"]["code"] == "rate_limit_exceeded"
