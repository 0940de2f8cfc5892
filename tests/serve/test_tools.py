"""Tools over HTTP: as openai's client sees them, streamed and whole."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion

from pdray.config import Config
from pdray.errors import InvalidRequestError
from pdray.serve.api import create_app
from pdray.serve.parsers import registry
from pdray.serve.parsers.forced_call import forced_call
from pdray.serve.tools import Tool, ToolChoice, choose, parse_tool_choice, parse_tools
from pdray.setting_types import REASONING_PARSERS, TOOL_CALL_PARSERS

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]
ASK: list[Any] = [{"role": "user", "content": "Weather in Paris?"}]
ONE = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TWO = f'Let me see.\n{ONE}\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>'
QWEN = (
    "{% if tools %}# Tools {{ tools | tojson }} in <tool_call></tool_call>;{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %};{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(autouse=True)
def _model(router: Any) -> None:
    router.tokenizer.chat_template = QWEN
    router.max_model_len = 4000
    router.reply = TWO


def prompt_of(router: Any) -> str:
    return bytes(router.requests[-1].output.prompt_token_ids).decode()


async def ask(client: openai.AsyncOpenAI, stream: bool, **options: Any) -> tuple[Any, Any]:
    """The message and the finish reason; a stream's by openai's own accumulation."""
    options = {"model": "smol", "messages": ASK, "tools": TOOLS} | options
    if not stream:
        answer = await client.chat.completions.create(**options)
    else:
        async with client.chat.completions.stream(**options) as events:
            answer = await events.get_final_completion()
    return answer.choices[0].message, answer.choices[0].finish_reason


@pytest.mark.parametrize("stream", [False, True])
async def test_calls(client: openai.AsyncOpenAI, router: Any, stream: bool) -> None:
    message, reason = await ask(client, stream)
    assert (message.content, reason) == ("Let me see.", "tool_calls")
    assert [(c.type, c.function.name, c.function.arguments) for c in message.tool_calls] == [
        ("function", "get_weather", '{"city": "Paris"}'),
        ("function", "now", "{}"),
    ]
    ids = [c.id for c in message.tool_calls]
    assert len({*ids}) == 2 and all(each.startswith("call_") for each in ids)
    assert '"get_weather"' in prompt_of(router)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_message_of_calls_alone_has_no_content(http: httpx.AsyncClient, router: Any, stream: bool) -> None:
    router.reply = ONE
    body = {"messages": ASK, "tools": TOOLS, "stream": stream}
    answer = await http.post("/v1/chat/completions", json=body)
    if stream:
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        assert not any(choice["delta"].get("content") for chunk in chunks for choice in chunk["choices"])
    else:
        ChatCompletion.model_validate(answer.json(), strict=True)
        assert answer.json()["choices"][0]["message"]["content"] is None


async def test_deltas_are_as_openai_s(http: httpx.AsyncClient, router: Any) -> None:
    """First id, type and name with empty arguments, then pieces with the index alone."""
    answer = await http.post("/v1/chat/completions", json={"messages": ASK, "tools": TOOLS, "stream": True})
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    for index, name, arguments in ((0, "get_weather", '{"city": "Paris"}'), (1, "now", "{}")):
        first, *rest = [call for call in calls if call["index"] == index]
        assert first == {
            "index": index, "id": first["id"], "type": "function", "function": {"name": name, "arguments": ""}
        }  # fmt: skip
        assert all(each == {"index": index, "function": {"arguments": each["function"]["arguments"]}} for each in rest)
        assert "".join(each["function"]["arguments"] for each in rest) == arguments
    assert len(calls) > 6  # they come as they are made
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls" and deltas[-1] == {}


@pytest.mark.parametrize("stream", [False, True])
async def test_cut_calls(http: httpx.AsyncClient, router: Any, stream: bool) -> None:
    """max_tokens is length at whatever token it cuts; all but whole calls are no tool_calls."""
    router.reply = ONE
    for max_tokens in range(1, len(ONE) + 2):
        body = {"messages": ASK, "tools": TOOLS, "max_tokens": max_tokens, "stream": stream}
        answer = await http.post("/v1/chat/completions", json=body)
        data = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        choice = data[-1]["choices"][0] if stream else answer.json()["choices"][0]
        assert choice["finish_reason"] == ("tool_calls" if max_tokens > len(ONE) else "length"), max_tokens
    router.reply = ONE[:-20]
    body = {"messages": ASK, "tools": TOOLS}
    answer = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]
    assert answer["finish_reason"] == "stop" and answer["message"]["tool_calls"]


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_and_ids_of_every_token(http: httpx.AsyncClient, router: Any, stream: bool) -> None:
    """Also of those that a parser has taken in."""
    body = {"messages": ASK, "tools": TOOLS, "logprobs": True, "return_token_ids": True, "n": 2, "stream": stream}
    answer = await http.post("/v1/chat/completions", json=body)
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    choices = [choice for each in (chunks if stream else [answer.json()]) for choice in each["choices"]]
    for index in (0, 1):
        mine = [choice for choice in choices if choice["index"] == index]
        assert sum((choice.get("token_ids") or [] for choice in mine), []) == [*TWO.encode(), 128]
        entries = [entry for choice in mine if choice["logprobs"] for entry in choice["logprobs"]["content"]]
        assert "".join(entry["token"] for entry in entries).startswith(TWO)


async def test_no_tools_no_calls(client: openai.AsyncOpenAI, router: Any) -> None:
    """With tool_choice none, and without tools, the model is not told of any, and what it writes is text."""
    for options in ({"tool_choice": "none"}, {"tools": []}):
        message, reason = await ask(client, False, **options)
        assert (message.content, message.tool_calls, reason) == (TWO, None, "stop")
        assert "# Tools" not in prompt_of(router)


async def test_one_call_at_a_time(client: openai.AsyncOpenAI) -> None:
    for stream in (False, True):
        message, reason = await ask(client, stream, parallel_tool_calls=False)
        assert ([c.function.name for c in message.tool_calls], reason) == (["get_weather"], "tool_calls")


@pytest.mark.parametrize("stream", [False, True])
async def test_forced_calls(client: openai.AsyncOpenAI, router: Any, stream: bool) -> None:
    """The grammar is the choice's schema, and what follows it is calls; finish_reason of a named one is OpenAI's."""
    named = {"type": "function", "function": {"name": "get_weather"}}
    router.reply = '{"city": "Paris"}'
    message, reason = await ask(client, stream, tool_choice=named)
    [call] = message.tool_calls
    assert (call.function.name, call.function.arguments, reason) == ("get_weather", router.reply, "stop")
    assert json.loads(router.requests[-1].params.structured_outputs.json) == PARAMETERS
    router.reply = '[{"name": "now", "parameters": {}}, {"name": "get_weather", "parameters": {"city": "Rome"}}]'
    message, reason = await ask(client, stream, tool_choice="required")
    assert not message.content and reason == "tool_calls"
    calls = [(c.function.name, c.function.arguments) for c in message.tool_calls]
    assert calls == [("now", "{}"), ("get_weather", '{"city": "Rome"}')]
    schema = json.loads(router.requests[-1].params.structured_outputs.json)
    assert schema["minItems"] == 1 and len(schema["items"]["anyOf"]) == 2
    await ask(client, stream)
    assert router.requests[-1].params.structured_outputs is None


async def test_a_forced_call_and_another_form(http: httpx.AsyncClient) -> None:
    body = {"messages": ASK, "tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}
    error = (await http.post("/v1/chat/completions", json=body)).json()["error"]
    assert error["param"] == "tool_choice" and "leave one of them out" in error["message"]


async def test_allowed_tools(client: openai.AsyncOpenAI, router: Any) -> None:
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "now"}}]}
    message, _ = await ask(client, False, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert [c.function.name for c in message.tool_calls] == ["now"]
    assert '"get_weather"' in prompt_of(router)  # the prompt stays the same, and cached


async def test_a_conversation_with_results(client: openai.AsyncOpenAI, router: Any) -> None:
    """What the API answers can be sent back."""
    message, _ = await ask(client, False)
    history = [*ASK, message.model_dump(exclude_none=True)]
    history += [{"role": "tool", "tool_call_id": each.id, "content": "sunny"} for each in message.tool_calls]
    router.reply = "It is sunny."
    answer, reason = await ask(client, False, messages=history)
    assert (answer.content, reason) == ("It is sunny.", "stop")
    assert '"arguments": {"city": "Paris"}' in prompt_of(router) and "tool: sunny;" in prompt_of(router)


@pytest.mark.parametrize("arguments", [r'{"a": "\ud800"}', '{"a": NaN}', "[1]", "{", "[" * 5000])
async def test_arguments_in_a_history_are_the_json_of_an_object(http: httpx.AsyncClient, arguments: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": arguments}}
    history = [*ASK, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c", "content": "x"}]
    answer = await http.post("/v1/chat/completions", json={"messages": history, "tools": TOOLS})
    assert answer.status_code == 400 and "tool_calls[0].function.arguments" in answer.json()["error"]["message"]


async def test_unknown_forms_are_refused(http: httpx.AsyncClient, router: Any) -> None:
    router.tokenizer.chat_template = QWEN.replace("<tool_call>", "<tool_call><function=f>")
    body = {"messages": ASK, "tools": TOOLS}
    error = (await http.post("/v1/chat/completions", json=body)).json()["error"]
    assert error["param"] == "tools" and "set tool_call_parser to one of hermes" in error["message"]
    assert (await http.post("/v1/chat/completions", json=body | {"tool_choice": "none"})).status_code == 200


@pytest.mark.parametrize(
    "parser,reply", [("llama3_json", '{"name": "now", "parameters": {}}'), ("pythonic", "[now()]"), ("none", "")]
)
async def test_the_parser_is_a_setting(router: Any, parser: str, reply: str) -> None:
    router.reply = reply
    app = create_app(Config(served_model_name="smol", tool_call_parser=parser), lambda: router)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://pdray") as http:
        answer = await http.post("/v1/chat/completions", json={"messages": ASK, "tools": TOOLS})
    if parser == "none":
        assert answer.status_code == 400 and "tool_call_parser" in answer.json()["error"]["message"]
    else:
        [call] = answer.json()["choices"][0]["message"]["tool_calls"]
        assert call["function"] == {"name": "now", "arguments": "{}"}


def test_parsers_by_template() -> None:
    for template, reads_tools, expected in (
        (QWEN, True, "hermes"),
        ('{{ tools }}Respond in the format {"name": function name, "parameters": ...}', True, "llama3_json"),
        ("{{ tools }}[func_name1(params_name1=params_value1)]", True, "pythonic"),
        ("{{ tools }}<tool_call><function=f>", True, None),
        ("{{ tools }}[TOOL_CALLS]", True, None),
        ("{{ messages }}", False, "smollm2"),
    ):
        assert registry.tool_parser_of(template, reads_tools=reads_tools) == expected


def test_the_configuration_names_the_parsers_there_are() -> None:
    assert ("auto", "none", *registry.TOOL_PARSERS) == TOOL_CALL_PARSERS
    assert ("auto", "none", *registry.REASONING_PARSERS) == REASONING_PARSERS


def test_forced_schemas() -> None:
    """References of a tool's schema lead to where it stands."""
    node = {"type": "object", "properties": {"next": {"$ref": "#"}, "n": {"$ref": "#/$defs/n"}}, "$defs": {"n": {}}}
    tools = [Tool("a", parameters=node), Tool("b")]
    assert forced_call(tools, ToolChoice("auto"), parallel=True) is None
    assert forced_call(tools[:1], ToolChoice("required", frozenset("a"), "a"), parallel=True) == node
    schema = forced_call(tools, ToolChoice("required"), parallel=False)
    assert schema is not None and (schema["minItems"], schema["maxItems"]) == (1, 1)
    assert [call["properties"]["name"] for call in schema["items"]["anyOf"]] == [{"const": "a"}, {"const": "b"}]
    moved = schema["$defs"]["tool0"]["properties"]
    assert moved == {"next": {"$ref": "#/$defs/tool0"}, "n": {"$ref": "#/$defs/tool0/$defs/n"}}
    assert "maxItems" not in (forced_call(tools, ToolChoice("required"), parallel=True) or {})


def test_a_tool_without_parameters_is_called_with_none() -> None:
    for choice in (ToolChoice("required"), ToolChoice("required", frozenset("a"), "a")):
        schema = forced_call([Tool("a")], choice, parallel=True)
        assert schema is not None
        arguments = schema if choice.named else schema["$defs"]["tool0"]
        assert arguments == {"type": "object", "properties": {}, "additionalProperties": False}


def test_forced_arguments_are_an_object() -> None:
    """Whether the tool's schema says so or not; and what only looks like a reference stays as it is."""
    loose = {"properties": {"a": {"const": {"$ref": "#/x"}}, "$ref": {"enum": [{"$ref": "#"}]}}, "required": ["a"]}
    tool = Tool("a", parameters=loose)
    named = forced_call([tool], ToolChoice("required", frozenset("a"), "a"), parallel=True)
    required = forced_call([tool], ToolChoice("required"), parallel=True)
    assert required is not None
    assert named == required["$defs"]["tool0"] == {"type": "object", **loose}


def test_choices() -> None:
    tools = parse_tools(TOOLS)
    named = {"type": "function", "function": {"name": "now"}}
    assert choose(tools, None) == (ToolChoice("auto"), tools) and choose([], None) == (ToolChoice("none"), [])
    assert choose(tools, parse_tool_choice(named))[1] == [tools[1]]
    assert choose(tools, parse_tool_choice("none"))[1] == []


@pytest.mark.parametrize(
    "allowed",
    [
        {"mode": "auto", "tools": [TOOLS[1]], "x": 1},
        {"mode": "auto", "tools": [TOOLS[1] | {"x": 1}]},
        {"mode": "auto", "tools": [{"type": "function", "function": {"name": "now", "x": 1}}]},
        {"mode": "auto", "tools": [{"type": "function", "name": "now", "x": 1}]},
    ],
)
def test_nothing_of_a_choice_is_ignored(allowed: Any) -> None:
    with pytest.raises(InvalidRequestError, match="tool_choice"):
        parse_tool_choice({"type": "allowed_tools", "allowed_tools": allowed})
    fine = {"mode": "auto", "tools": TOOLS}  # which repeat what they are
    assert parse_tool_choice({"type": "allowed_tools", "allowed_tools": fine}) is not None
    with pytest.raises(InvalidRequestError, match="tool_choice"):
        parse_tool_choice({"type": "allowed_tools", "allowed_tools": fine, "x": 1})
