"""Every bad input has its status and OpenAI's error shape; nothing is submitted for it, or nothing stays."""

from __future__ import annotations

import json
import logging
import re
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

USER = {"role": "user", "content": "hi"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
DEEP = json.loads("[" * 400 + "]" * 400)


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": fields}


FUNCTION = function(name="f")


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "smol", "prompt": "x", **fields}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "smol", "messages": [USER], **fields}


# body, and what the message must name
BAD_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"model": "smol"}, "prompt"),
    (completion(model=3), "model"),
    (completion(prompt=None), "prompt"),
    (completion(prompt=""), "empty"),
    (completion(prompt=[]), "empty"),
    (completion(prompt=[[]]), "empty"),
    (completion(prompt=["a", ""]), "empty"),
    (completion(prompt=["a", 1]), "prompt"),
    (completion(prompt=[1, True]), "prompt"),
    (completion(prompt=[1.0]), "prompt"),
    (completion(prompt=[[1], "a"]), "prompt"),
    (completion(prompt=[[1, None]]), "prompt"),
    (completion(prompt={"a": 1}), "prompt"),
    (completion(prompt=DEEP), "prompt"),
    (completion(prompt=[-1]), "-1"),
    (completion(prompt=[129]), "129"),
    (completion(prompt=[2**70]), "prompt token id"),
    (completion(prompt=[2**70], echo=True), "prompt token id"),
    (completion(prompt=["a"] * 129), "129 prompts"),
    (completion(prompt=["a"] * 100, n=3), "100 prompts"),
    (completion(prompt="x" * 201), "context length"),
    (completion(max_tokens=-1), "max_tokens"),
    (completion(max_tokens=-5), "max_tokens"),
    (completion(max_tokens=200), "max_tokens"),
    (completion(max_tokens=2**31), "max_tokens"),
    (completion(max_tokens=1.5), "max_tokens"),
    (completion(max_tokens="10"), "max_tokens"),
    (completion(max_tokens=True), "max_tokens"),
    (completion(temperature=-0.1), "temperature"),
    (completion(temperature=101), "temperature"),
    (completion(temperature="hot"), "temperature"),
    (completion(temperature="1"), "temperature"),
    (completion(temperature=True), "temperature"),
    (completion(temperature=10**400), "temperature"),
    (completion(top_p=0), "top_p"),
    (completion(top_p=1.01), "top_p"),
    (completion(top_k=-2), "top_k"),
    (completion(top_k=2**70), "top_k"),
    (completion(min_p=2), "min_p"),
    (completion(repetition_penalty=0), "repetition_penalty"),
    (completion(presence_penalty=3), "presence_penalty"),
    (completion(frequency_penalty=-3), "frequency_penalty"),
    (completion(n=0), "n is 0"),
    (completion(n=65), "n is 65"),
    (completion(n=[1]), "n:"),
    (completion(seed=-(2**63) - 1), "seed"),
    (completion(seed=2**63), "seed"),
    (completion(stop=""), "stop"),
    (completion(stop=["a"] * 257), "at most 256"),
    (completion(stop=["x" * 1000] * 17), "at most 16384"),
    (completion(stop=["a", 1]), "stop"),
    (completion(stop="x" * 1025), "1025"),
    (completion(stop=["a", "x" * 1025]), "1024"),
    (completion(stop=5), "stop"),
    (completion(stop_token_ids=[-1]), "stop_token_ids"),
    (completion(stop_token_ids=[2**64]), "stop_token_ids"),
    (completion(stop_token_ids=[1] * 129), "stop_token_ids"),
    (completion(min_tokens=17), "min_tokens"),
    (completion(min_tokens=2**31), "min_tokens"),
    (completion(logprobs=21), "logprobs"),
    (completion(logprobs=-1), "logprobs"),
    (completion(logprobs=True), "logprobs"),
    (completion(priority=2**40), "priority"),
    (completion(stream="yes"), "stream"),
    (completion(stream_options={"include_usage": True}), "stream_options"),
    (completion(stream=True, stream_options=5), "stream_options"),
    (completion(prompt_logprobs=21), "prompt_logprobs"),
    (completion(seed=1.5), "seed"),
    (completion(max_tokens=1e300), "max_tokens"),
    (completion(add_special_tokens=1), "add_special_tokens"),
    (completion(suffix="end"), "suffix"),
    (completion(best_of=2), "best_of"),
    (completion(best_of=2**31), "best_of"),
    (completion(logit_bias={"5": 101}), "logit_bias"),
    (completion(logit_bias={str(token_id): 1 for token_id in range(1025)}), "logit_bias"),
    (completion(response_format={"type": "json_object", "json_schema": None, "strict": True}), "strict"),
    (completion(response_format={"type": DEEP}), "response_format"),
    (completion(response_format={}), "response_format"),
    (completion(guided_regex="a*"), "guided_regex"),
    (completion(prompt_logprobs=-1), "prompt_logprobs"),
]
BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"model": "smol"}, "messages"),
    (chat(messages=[]), "messages"),
    (chat(messages="hi"), "messages"),
    (chat(messages=["hi"]), "messages"),
    (chat(messages=[{"content": "hi"}]), "role"),
    (chat(messages=[{"role": 1, "content": "hi"}]), "role"),
    (chat(messages=[{"role": "", "content": "hi"}]), "role"),
    (chat(messages=[{"role": "user"}]), "content"),
    (chat(messages=[{"role": "user", "content": None}]), "content"),
    (chat(messages=[{"role": "user", "content": 5}]), "content"),
    (chat(messages=[{"role": "user", "content": ["hi"]}]), "content"),
    (chat(messages=[{"role": "user", "content": [IMAGE]}]), "image_url"),
    (chat(messages=[{"role": "user", "content": [{"type": "text"}]}]), "text"),
    (chat(messages=[{"role": "user", "content": [{"type": DEEP}]}]), "content"),
    (chat(messages=[{"role": "pirate", "content": "arr"}]), "no pirates"),
    (chat(messages=[USER, {"role": "tool", "tool_call_id": "1"}]), "tool"),
    (chat(messages=[{"role": "assistant", "tool_calls": [{"id": "1"}]}]), "tool"),
    (chat(messages=[{"role": "user", "content": "x" * 200}]), "context length"),
    (chat(messages=[{"role": "x" * 65, "content": "hi"}]), "role"),
    (chat(messages=[{"role": "user", "content": "hi", "name": "x" * 65}]), "name"),
    (chat(messages=[{}] * 2049), "2048"),
    (chat(messages=[{"role": "user", "content": DEEP}]), "content"),
    (chat(messages=[USER, DEEP]), "messages"),
    (chat(messages=[USER, {"role": "user", "content": "hi", "refusal": "no"}]), "messages[1].refusal"),
    (chat(messages=[{"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}]), "refusal"),
    (chat(prompt_logprobs=1, stream=True), "prompt_logprobs"),
    (chat(n=65), "n is 65"),
    (chat(tools=[FUNCTION], tool_choice={"type": "function", "function": {"name": "g"}}), "'g'"),
    (chat(tools=[FUNCTION], tool_choice="any"), "tool_choice"),
    (chat(tools=[FUNCTION], tool_choice={"type": "allowed_tools", "allowed_tools": {}}), "tool_choice"),
    (chat(tool_choice="required"), "set tools"),
    (chat(tools=[FUNCTION, FUNCTION]), "several functions of the name 'f'"),
    (chat(tools=[FUNCTION] * 129), "at most 128"),
    (chat(tools={}, tool_choice="required"), "set tools"),
    (chat(tools="f"), "tools must be a list"),
    (chat(tools=["f"]), "tools[0]"),
    (chat(tools=[{"type": "web_search"}]), "web_search"),
    (chat(tools=[{"type": "function"}]), "tools[0].function"),
    (chat(tools=[{**FUNCTION, "mood": 1}]), "mood"),
    (chat(tools=[function(name="a b")]), "tools[0].function.name"),
    (chat(tools=[function(name=DEEP)]), "tools[0].function.name"),
    (chat(tools=[function(name="f", parameters=5)]), "parameters"),
    (chat(tools=[function(name="f", parameters={"type": "array"})]), "type 'object'"),
    (chat(tools=[function(name="f", strict="yes")]), "strict"),
    (chat(tools=[function(name="f", mood="calm")]), "mood"),
    (chat(reasoning_effort="enormous"), "reasoning_effort"),
    (chat(reasoning_effort="high"), "no switch for thoughts"),
    (chat(thinking_token_budget=100), "thinking_token_budget"),
    (chat(functions=[{"name": "f"}]), "functions"),
    (chat(response_format={"type": "json_schema", "json_schema": {}}), "json_schema"),
    (chat(logprobs=5), "logprobs"),
    (chat(top_logprobs=2), "top_logprobs"),
    (chat(logprobs=True, top_logprobs=21), "logprobs"),
    (chat(logprobs=True, top_logprobs=2**31), "logprobs"),
    (chat(max_completion_tokens=-1), "max_tokens"),
    (chat(min_tokens=500), "min_tokens"),
    (chat(continue_final_message=True), "continue_final_message"),
    (chat(chat_template_kwargs={"tokenize": False}), "tokenize"),
    (chat(chat_template_kwargs={"chat_template": "x"}), "chat_template"),
    (chat(chat_template_kwargs={"messages": []}), "messages"),
    (chat(chat_template_kwargs={"mood": "x" * 17_000}), "16384"),
    (chat(chat_template_kwargs=DEEP), "chat_template_kwargs"),
]


def check_shape(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["type"], str) and (error["param"] is None or isinstance(error["param"], str))
    return error


@pytest.mark.parametrize(
    "path,body,named",
    [("completions", *case) for case in BAD_COMPLETIONS] + [("chat/completions", *case) for case in BAD_CHATS],
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_bad_fields(
    http: httpx.AsyncClient, router: Any, path: str, body: dict[str, Any], named: str, streamed: bool
) -> None:
    if streamed and not ({"stream", "stream_options"} & body.keys()):
        body = body | {"stream": True}
    error = check_shape(await http.post(f"/v1/{path}", content=json.dumps(body)), 400)
    assert error["type"] == "invalid_request_error"
    assert named in error["message"] or named == error["param"], error
    assert not router.num_running


RAW_BODIES: list[bytes] = [
    b"",
    b"nonsense",
    b'{"prompt": "x"',
    b'{"prompt": "x"} trailing',
    b"{'prompt': 'x'}",
    b"[]",
    b"null",
    b"3",
    b'"text"',
    b"true",
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "temperature": Infinity}',
    b'{"prompt": "x", "temperature": -Infinity}',
    b'{"prompt": "x", "temperature": 1e999}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "\\udc00 low first"}',
    b'{"\\ud800": 1, "prompt": "x"}',
    b'{"prompt": "\xff"}',
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "a\nb"}',
    b"\xef\xbb\xbf{}",
    '{"prompt": "x"}'.encode("utf-16"),
    b"[" * 10_000,
    b'{"a":' * 3_000 + b"1" + b"}" * 3_000,
    b'{"prompt": "x", "n": ' + b"1" * 5_000 + b"}",
]


@pytest.mark.parametrize("raw", RAW_BODIES, ids=range(len(RAW_BODIES)))
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
async def test_bad_bodies(http: httpx.AsyncClient, router: Any, path: str, raw: bytes) -> None:
    check_shape(await http.post(f"/v1/{path}", content=raw), 400)
    assert router.num_submitted == 0


@pytest.mark.parametrize(
    "path,body,param,numbers",
    [
        ("completions", completion(prompt="x" * 300), "prompt", (200, 301, 300)),
        ("completions", completion(prompt="x" * 300, max_tokens=500), "prompt", (200, 301, 300)),
        ("completions", completion(prompt="x" * 200, max_tokens=1), "prompt", (200, 201, 200)),
        ("completions", completion(prompt="x" * 150, max_tokens=60), "max_tokens", (200, 210, 150, 60)),
        ("completions", completion(prompt=[[65], [65] * 300]), "prompt", (200, 301, 300)),
        ("chat/completions", chat(messages=[{"role": "user", "content": "x" * 300}]), "messages", (200, 319, 318)),
        ("chat/completions", chat(max_tokens=199), "max_tokens", (200, 219, 20, 199)),
    ],
)
async def test_context_length(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], param: str, numbers: tuple[int, ...]
) -> None:
    """litellm and aider know it by its first words, and others by its code; some read the numbers."""
    error = check_shape(await http.post(f"/v1/{path}", json=body), 400)
    assert error["code"] == "context_length_exceeded" and error["param"] == param
    assert error["type"] == "invalid_request_error"
    pattern = (
        r"This model's maximum context length is (\d+) tokens\. However, you requested (\d+) tokens "
        r"\((\d+) in the prompt, (\d+|at least 1) in the completion\)\. .*Please .* \(the limit is max_model_len\)\."
    )
    matched = re.fullmatch(pattern, error["message"])
    assert matched, error["message"]
    assert tuple(int(number) for number in matched.groups()[: len(numbers)]) == numbers


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
