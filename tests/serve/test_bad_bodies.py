"""Every field and body that the API does not understand is refused by name, in OpenAI's error shape."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from pdray.testing.api_bodies import USER, chat, check_shape, completion

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
DEEP = json.loads("[" * 400 + "]" * 400)


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": fields}


FUNCTION = function(name="f")


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
