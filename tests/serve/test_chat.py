"""/v1/chat/completions, asked by openai's client, parsed by openai's types; and the small endpoints."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionChunk
from tokenizers import processors

import pdray
from pdray.config import Config
from pdray.serve.api import create_app

REPLY = "The capital of France is Paris."
ASK: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}]


def prompt_of(router: Any) -> str:
    return bytes(router.requests[-1].output.prompt_token_ids).decode()


async def test_chat(client: openai.AsyncOpenAI, router: Any) -> None:
    answer = await client.chat.completions.create(model="smol", messages=ASK)
    assert prompt_of(router) == "system: Be brief.\nuser: Where?\nassistant: "
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", REPLY, "stop")
    assert choice.logprobs is None and answer.to_dict()["timings"]
    assert answer.usage is not None and answer.usage.prompt_tokens == len(prompt_of(router))


async def test_without_a_limit_the_context_is_one(client: openai.AsyncOpenAI, router: Any) -> None:
    answer = await client.chat.completions.create(model="smol", messages=ASK, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.total_tokens == router.max_model_len


async def test_newer_name_of_max_tokens_wins(client: openai.AsyncOpenAI, router: Any) -> None:
    await client.chat.completions.create(model="smol", messages=ASK, max_tokens=9, max_completion_tokens=5)
    assert router.requests[0].params.max_tokens == 5


async def test_the_role_comes_with_the_first_token(client: openai.AsyncOpenAI, router: Any) -> None:
    """Clients that measure take the first chunk for it."""
    router.die_after = 0
    chunks = []
    with pytest.raises(openai.APIError):
        async for chunk in await client.chat.completions.create(model="smol", messages=ASK, stream=True):
            chunks.append(chunk)
    assert not chunks


async def test_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="smol", messages=ASK, n=2, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    for index in (0, 1):
        first, *middle, last = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert (first.delta.role, first.delta.content, first.finish_reason) == ("assistant", "", None)
        assert all(choice.delta.role is None and choice.finish_reason is None for choice in middle)
        assert "".join(choice.delta.content or "" for choice in middle) == REPLY
        assert last.finish_reason == "stop" and last.delta.to_dict() == {}
    usage = chunks[-1].usage
    assert not chunks[-1].choices and usage is not None and usage.completion_tokens == 2 * (len(REPLY) + 1)
    assert all(chunk.usage is None for chunk in chunks[:-1]) and "timings" in chunks[-1].to_dict()


async def test_stream_bytes(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/chat/completions", json={"messages": ASK, "stream": True, "logprobs": True})
    *events, done, end = response.content.split(b"\n\n")
    assert (done, end) == (b"data: [DONE]", b"")
    for event in events:
        assert event.startswith(b"data: {") and b"\n" not in event
        chunk = json.loads(event[6:])
        ChatCompletionChunk.model_validate(chunk, strict=True, extra="allow")
        assert "finish_reason" in chunk["choices"][0]


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs(client: openai.AsyncOpenAI, stream: bool) -> None:
    options: dict[str, Any] = {"model": "smol", "messages": ASK, "logprobs": True, "top_logprobs": 3, "max_tokens": 7}
    if stream:
        chunks = [chunk async for chunk in await client.chat.completions.create(**options, stream=True)]
        found = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs is not None]
    else:
        logprobs = (await client.chat.completions.create(**options)).choices[0].logprobs
        found = [] if logprobs is None else [logprobs]
    entries = [entry for part in found for entry in part.content or []]
    assert "".join(entry.token for entry in entries) == REPLY[:7]
    for entry in entries:
        assert bytes(entry.bytes or []).decode() == entry.token and entry.logprob == -1.0
        assert [top.logprob for top in entry.top_logprobs] == [-1.0, -2.0, -3.0]
        assert entry.top_logprobs[0].token == entry.token


async def test_logprobs_without_top(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="smol", messages=ASK, logprobs=True, max_tokens=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and [entry.top_logprobs for entry in logprobs.content or []] == [[], [], []]


async def test_messages(client: openai.AsyncOpenAI, router: Any) -> None:
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
        {"role": "assistant", "content": None, "refusal": None},
        {"role": "user", "content": "c"},
    ]
    await client.chat.completions.create(model="smol", messages=messages)
    assert prompt_of(router) == "user: a\nb\nassistant: \nuser: c\nassistant: "


async def test_continue_final_message(client: openai.AsyncOpenAI, router: Any) -> None:
    messages: list[Any] = [*ASK, {"role": "assistant", "content": "The capital"}]
    extra = {"add_generation_prompt": False, "continue_final_message": True}
    await client.chat.completions.create(model="smol", messages=messages, extra_body=extra)
    assert prompt_of(router).endswith("assistant: The capital")


@pytest.mark.parametrize("prefill", ["", "The ", None])
async def test_a_prefill_is_continued_where_it_ends(http: httpx.AsyncClient, router: Any, prefill: str | None) -> None:
    """A template that trims has not trimmed the header's end with it."""
    router.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ '\n' + m.content | trim }}[end]{% endfor %}"
    )
    messages = [*ASK, {"role": "assistant", "content": prefill}]
    body = {"messages": messages, "add_generation_prompt": False, "continue_final_message": True}
    assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
    assert prompt_of(router).endswith(f"[assistant]\n{prefill or ''}")


PARTS_ONLY = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}"
    "{% endfor %};{% endfor %}"
)


@pytest.mark.parametrize("content", ["Where?", [{"type": "text", "text": "Where?"}]])
async def test_a_template_that_takes_parts(http: httpx.AsyncClient, router: Any, content: Any) -> None:
    router.tokenizer.chat_template = PARTS_ONLY
    body = {"messages": [{"role": "user", "content": content}]}
    assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
    assert prompt_of(router) == "user: Where?;"


async def test_a_refusal_in_the_history(http: httpx.AsyncClient, router: Any) -> None:
    for assistant in (
        {"content": [{"type": "refusal", "refusal": "I cannot."}]},
        {"content": None, "refusal": "I cannot."},
    ):
        messages = [*ASK, {"role": "assistant", **assistant}, {"role": "user", "content": "Why?"}]
        assert (await http.post("/v1/chat/completions", json={"messages": messages})).status_code == 200
        assert prompt_of(router).endswith("assistant: I cannot.\nuser: Why?\nassistant: ")


async def test_developer_is_system_where_the_template_does_not_know_it(http: httpx.AsyncClient, router: Any) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, ASK[1]]
    assert (await http.post("/v1/chat/completions", json={"messages": messages})).status_code == 200
    assert prompt_of(router).startswith("system: Be brief.\nuser: Where?")
    router.tokenizer.chat_template = "{% if messages[0].role == 'developer' %}!{{ messages[0].content }}{% endif %}"
    body = {"messages": messages[:1]}
    assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
    assert prompt_of(router) == "!Be brief."


async def test_a_message_that_would_be_dropped_is_refused(http: httpx.AsyncClient, router: Any) -> None:
    router.tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    for role in ("User", "system", "developer"):
        body = {"messages": [{"role": "user", "content": "a"}, {"role": role, "content": "a"}]}
        refused = await http.post("/v1/chat/completions", json=body)
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert error["param"] == "messages" and f"messages[1] (role '{role}'" in error["message"]
    assert not router.num_submitted


@pytest.mark.parametrize("stream", [False, True])
async def test_echo(client: openai.AsyncOpenAI, stream: bool) -> None:
    """Of a last message of the assistant's own; a user's is not the answer's."""
    for last, expected in (({"role": "assistant", "content": "Well: "}, "Well: " + REPLY), (ASK[1], REPLY)):
        options: dict[str, Any] = {"model": "smol", "messages": [*ASK, last], "extra_body": {"echo": True}}
        if stream:
            chunks = [chunk async for chunk in await client.chat.completions.create(**options, stream=True)]
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        else:
            text = (await client.chat.completions.create(**options)).choices[0].message.content
        assert text == expected


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
async def test_token_ids(http: httpx.AsyncClient, router: Any, path: str) -> None:
    """Where vLLM has them: the prompt's in a chat's answer, or a completion's choices; an answer's in choices."""
    body = {"n": 2, "max_tokens": 40, "return_token_ids": True}
    body |= {"messages": ASK} if path == "chat/completions" else {"prompt": "Hello"}
    answer = (await http.post(f"/v1/{path}", json=body)).json()
    prompt_ids, expected = router.requests[0].output.prompt_token_ids, [*REPLY.encode(), 128]
    for choice in answer["choices"]:
        assert choice["token_ids"] == expected
        assert (choice if path == "completions" else answer)["prompt_token_ids"] == prompt_ids
    text = (await http.post(f"/v1/{path}", json=body | {"stream": True})).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    for index in (0, 1):
        mine = [(chunk, choice) for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert sum((choice.get("token_ids", []) for _, choice in mine), []) == expected
        said = [(choice if path == "completions" else chunk).get("prompt_token_ids") for chunk, choice in mine]
        assert said == [prompt_ids, *[None] * (len(said) - 1)]


async def test_special_tokens_are_the_templates(http: httpx.AsyncClient, router: Any) -> None:
    """A tokenizer that begins each text by itself does so for prompts, and not for conversations, unless asked."""
    eos = router.tokenizer.eos_token
    router.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{eos} $A", special_tokens=[(eos, 128)]
    )
    conversation, prompt = {"messages": ASK[1:]}, {"prompt": "x"}
    for path, body, begins in (
        ("chat/completions", conversation, False),
        ("chat/completions", conversation | {"add_special_tokens": True}, True),
        ("completions", prompt, True),
        ("completions", prompt | {"add_special_tokens": False}, False),
    ):
        assert (await http.post(f"/v1/{path}", json=body)).status_code == 200
        assert (router.requests[-1].output.prompt_token_ids[0] == 128) is begins, (path, body)


async def test_template_variables(http: httpx.AsyncClient, router: Any) -> None:
    body = {"messages": ASK, "chat_template_kwargs": {"mood": "[calm]"}}
    assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
    assert "[calm]assistant" in prompt_of(router)


async def test_long_conversations_are_rendered_beside_the_loop(http: httpx.AsyncClient, router: Any) -> None:
    router.max_model_len = 10_000
    body = {"messages": [{"role": "user", "content": "x" * 6000}], "max_tokens": 2}
    assert (await http.post("/v1/chat/completions", json=body)).json()["usage"]["prompt_tokens"] > 6000


async def test_models(client: openai.AsyncOpenAI) -> None:
    [model] = (await client.models.list()).data
    assert model.id == "smol" and model.object == "model" and model.created > 0
    assert model.to_dict()["max_model_len"] == 200
    assert await client.models.retrieve("smol") == model
    with pytest.raises(openai.NotFoundError, match="other/model"):
        await client.models.retrieve("other/model")


async def test_health_tells_whether_the_router_is_ready(http: httpx.AsyncClient, router: Any) -> None:
    for path in ("/health", "/ping"):
        assert (await http.get(path)).status_code == 200
    router.ready = False
    refused = await http.get("/health")
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    assert (await http.get("/version")).json() == {"version": pdray.__version__}


async def test_before_there_is_a_router() -> None:
    transport = httpx.ASGITransport(create_app(Config(served_model_name="smol"), lambda: None))
    async with httpx.AsyncClient(transport=transport, base_url="http://pdray") as http:
        assert (await http.get("/health")).status_code == 503
        assert (await http.get("/v1/models")).json()["data"][0]["max_model_len"] is None
        for path, body in (("completions", {"prompt": "x"}), ("chat/completions", {"messages": ASK})):
            refused = await http.post(f"/v1/{path}", json=body)
            assert refused.status_code == 503 and "starting" in refused.json()["error"]["message"]
