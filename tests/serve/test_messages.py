"""/v1/messages over HTTP, in the shapes that Anthropic's client reads."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from pdray.config import Config
from pdray.errors import InvalidRequestError, NoWorkerError, QueueFullError
from pdray.serve.api import create_app

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call>;{% endif %}{% for m in messages %}{{ m.role }}: "
    "{% if m.reasoning_content %}({{ m.reasoning_content }})</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %};{% endfor %}"
    "{% if enable_thinking is defined %}[{{ enable_thinking }}]{% endif %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL: dict[str, Any] = {"name": "now", "description": "Time.", "input_schema": SCHEMA}
CALL = '<tool_call>{"name": "now", "arguments": {"a": 1}}</tool_call>'
REPLY = f"<think>Hm.</think>Well.\n{CALL}"
USER = {"role": "user", "content": "When?"}
USE = {"type": "tool_use", "id": "toolu_1", "name": "now", "input": {"a": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "noon"}


@pytest.fixture(autouse=True)
def _model(router: Any) -> None:
    router.tokenizer.add_tokens(["<think>", "</think>"])
    router.tokenizer.chat_template = TEMPLATE
    router.max_model_len = 4000
    router.reply = REPLY


def prompt_of(router: Any) -> str:
    return str(router.tokenizer.decode(router.requests[-1].output.prompt_token_ids))


async def ask(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.post("/v1/messages", json={"max_tokens": 500, "messages": [USER]} | fields)


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    blocks = [block.splitlines() for block in response.text.strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name.removeprefix("event: ") for name, _ in blocks] == [event["type"] for event in events]
    return events


def accumulated(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What the events add up to, as Anthropic's client adds them."""
    message: dict[str, Any] = events[0]["message"]
    assert events[0]["type"] == "message_start" and message["content"] == [] and message["stop_reason"] is None
    pieces: list[str] = []
    for event in events[1:]:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
                pieces = []
            case "content_block_delta":
                delta = event["delta"]
                kind = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}
                pieces.append(delta[kind[delta["type"]]])
            case "content_block_stop":
                block, text = message["content"][-1], "".join(pieces)
                if block["type"] == "tool_use":
                    block["input"] = json.loads(text)
                else:
                    block[block["type"]] = text
            case "message_delta":
                message |= event["delta"]
                message["usage"] |= event["usage"]
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    return message


async def test_a_text(http: httpx.AsyncClient, router: Any) -> None:
    router.reply = "It is noon."
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    response = await ask(
        http, model="smol", system=system, temperature=0.5, top_k=5, top_p=0.9, metadata={"user_id": "u"}
    )
    answer = response.json()
    assert response.status_code == 200 and answer["id"].startswith("msg_")
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", "smol")
    assert answer["content"] == [{"type": "text", "text": "It is noon."}]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)
    assert prompt_of(router) == "system: Be brief.;user: When?;assistant: "
    num_prompt = len(router.requests[-1].output.prompt_token_ids)
    usage = answer["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == num_prompt
    assert (usage["cache_creation_input_tokens"], usage["output_tokens"]) == (0, len("It is noon.") + 1)
    params = router.requests[-1].params
    assert (params.temperature, params.top_k, params.max_tokens) == (0.5, 5, 500)


@pytest.mark.parametrize("stream", [False, True])
async def test_thoughts_text_and_calls(http: httpx.AsyncClient, stream: bool) -> None:
    response = await ask(http, tools=[TOOL], stream=stream)
    message = accumulated(events_of(response)) if stream else response.json()
    thinking, text, use = message["content"]
    assert thinking == {"type": "thinking", "thinking": "Hm.", "signature": ""}
    assert text == {"type": "text", "text": "Well."}
    assert use == {"type": "tool_use", "id": use["id"], "name": "now", "input": {"a": 1}}
    assert use["id"].startswith("toolu_") and message["stop_reason"] == "tool_use"
    assert message["usage"]["output_tokens"] == len(REPLY) + 1


@pytest.mark.parametrize("stream", [False, True])
async def test_why_it_ended(http: httpx.AsyncClient, router: Any, stream: bool) -> None:
    async def end(**fields: Any) -> tuple[str, str | None, int]:
        response = await ask(http, stream=stream, **fields)
        message = accumulated(events_of(response)) if stream else response.json()
        return message["stop_reason"], message["stop_sequence"], len(message["content"])

    assert await end(stop_sequences=["W", "el"]) == ("stop_sequence", "W", 1)
    assert await end(max_tokens=9) == ("max_tokens", None, 1)
    router.reply = '{"a": 1}'
    assert await end(tools=[TOOL], tool_choice={"type": "tool", "name": "now"}) == ("tool_use", None, 1)
    if not stream:
        assert await end(tools=[TOOL], tool_choice={"type": "tool", "name": "now"}, max_tokens=4) == (
            "max_tokens",
            None,
            0,
        )


async def test_what_choices_force(http: httpx.AsyncClient, router: Any) -> None:
    router.reply = '[{"name": "now", "parameters": {"a": 2}}]'
    answer = (await ask(http, tools=[TOOL], tool_choice={"type": "any", "disable_parallel_tool_use": True})).json()
    assert [block["input"] for block in answer["content"]] == [{"a": 2}]
    assert json.loads(router.requests[-1].params.structured_outputs.json)["maxItems"] == 1
    router.reply = CALL
    answer = (await ask(http, tools=[TOOL], tool_choice={"type": "none"})).json()
    assert answer["content"] == [{"type": "text", "text": CALL}] and answer["stop_reason"] == "end_turn"
    router.reply = '{"a": 3}'
    form = {"format": {"type": "json_schema", "schema": SCHEMA}}
    assert (await ask(http, output_config=form)).json()["content"][0]["text"] == router.reply
    assert json.loads(router.requests[-1].params.structured_outputs.json) == SCHEMA


async def test_a_conversation(http: httpx.AsyncClient, router: Any) -> None:
    """What was answered is sent back, with the tool's result; results come before the user's text."""
    answer = (await ask(http, tools=[TOOL])).json()
    use = answer["content"][-1]
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": [{"type": "text", "text": "noon"}]}
    failed = result | {"is_error": True}
    messages = [USER, {"role": "assistant", "content": answer["content"]}]
    messages += [{"role": "user", "content": [result, failed, {"type": "text", "text": "So?"}]}]
    router.reply = "Noon."
    assert (await ask(http, messages=messages, tools=[TOOL])).json()["content"][0]["text"] == "Noon."
    call = '<tool_call>{"name": "now", "arguments": {"a": 1}}</tool_call>'
    expected = f"user: When?;assistant: (Hm.)</think>Well.{call};tool: noon;tool: Error:\nnoon;user: So?;assistant: "
    assert prompt_of(router).endswith(expected)


async def test_an_assistants_last_message_is_continued(http: httpx.AsyncClient, router: Any) -> None:
    router.reply = "noon."
    answer = (await ask(http, messages=[USER, {"role": "assistant", "content": "It is "}])).json()
    assert answer["content"] == [{"type": "text", "text": "noon."}] and prompt_of(router).endswith("assistant: It is ")


async def test_thinking(http: httpx.AsyncClient, router: Any) -> None:
    await ask(http, thinking={"type": "enabled", "budget_tokens": 20})
    assert router.requests[-1].params.thinking_token_budget == 20
    await ask(http, thinking={"type": "disabled"})
    assert "[False]" in prompt_of(router) and router.requests[-1].params.thinking_token_budget is None
    await ask(http, thinking={"type": "adaptive"})
    assert "[" not in prompt_of(router)
    await ask(http, output_config={"effort": "high"})
    assert "[True]" in prompt_of(router)


async def test_tokens_are_counted(http: httpx.AsyncClient, router: Any) -> None:
    asked = {"messages": [USER], "system": "Be brief.", "tools": [TOOL]}
    counted = await http.post("/v1/messages/count_tokens", json=asked)
    await ask(http, **asked)
    assert counted.json() == {"input_tokens": len(router.requests[-1].output.prompt_token_ids)}
    long = await http.post("/v1/messages/count_tokens", json={"messages": [USER | {"content": "x" * 9000}]})
    assert long.json()["input_tokens"] > 9000


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages has 0 messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role is 'system'"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content must be"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content must be"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages[0].content[0]: blocks of type 'image'",
        ),
        ({"messages": [{"role": "user", "content": [USE]}]}, "messages[0].content[0]: blocks of type 'tool_use'"),
        (
            {"messages": [USER, {"role": "assistant", "content": [USE | {"input": "{}"}]}]},
            "messages[1].content[0].input",
        ),
        ({"messages": [USER, {"role": "assistant", "content": [USE | {"name": 5}]}]}, "messages[1].content[0].name"),
        ({"messages": [USER, {"role": "assistant", "content": [USE | {"id": 5}]}]}, "messages[1].content[0].id"),
        ({"messages": [{"role": "user", "content": [RESULT | {"content": 5}]}]}, "messages[0].content[0].content must"),
        (
            {"messages": [{"role": "user", "content": [RESULT | {"tool_use_id": 5}]}]},
            "messages[0].content[0].tool_use_id",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages[0].content[0].text must",
        ),
        ({"messages": [USER | {"name": "x"}]}, "messages[0]: field 'name'"),
        ({"system": [{"type": "image"}]}, "system[0]: blocks of type 'image'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type is 'web_search_20250305'"),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema"),
        ({"tools": [TOOL | {"name": "a b"}]}, "'a b'"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "'g'"),
        ({"tools": [TOOL], "tool_choice": {"type": "some"}}, "tool_choice is 'some'"),
        ({"tool_choice": {"type": "any"}}, "set tools"),
        (
            {"tool_choice": {"type": "auto", "disable_parallel_tool_use": 1}},
            "disable_parallel_tool_use must be a boolean",
        ),
        ({"thinking": {"type": "enabled"}}, "needs budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "budget_tokens"),
        ({"output_config": {"format": {"type": "json_object"}}}, "output_config.format"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "'not'"),
        ({"stop_sequences": [""]}, "non-empty"),
        ({"temperature": -1}, "temperature"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"stop": ["x"]}, "use stop_sequences"),
        ({"temprature": 1}, "did you mean 'temperature'"),
    ],
)
async def test_refusals(http: httpx.AsyncClient, router: Any, fields: Any, named: str) -> None:
    answer = await ask(http, **fields)
    body = answer.json()
    assert answer.status_code == 400 and named in body["error"]["message"], body
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error") and not router.requests


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (QueueFullError("full", 3.0), 429, "rate_limit_error"),
        (NoWorkerError("nobody"), 503, "overloaded_error"),
        (InvalidRequestError("no", "structured_outputs"), 400, "invalid_request_error"),
        (RuntimeError("oops"), 500, "api_error"),
    ],
)
async def test_errors(http: httpx.AsyncClient, router: Any, error: Exception, status: int, kind: str) -> None:
    router.refusals = {0: error}
    answer = await ask(http)
    assert answer.status_code == status and answer.json()["error"]["type"] == kind
    assert "oops" not in answer.text and ("retry-after" in answer.headers) == (status in (429, 503))


async def test_other_errors_have_the_same_shape(http: httpx.AsyncClient) -> None:
    unknown = await ask(http, model="other")
    assert unknown.status_code == 404 and unknown.json()["error"]["type"] == "not_found_error"
    assert (await http.get("/v1/messages")).json()["type"] == "error"
    large = await http.post("/v1/messages", content=b" " * 30_000)
    assert large.status_code == 413 and large.json()["error"]["type"] == "request_too_large"


async def test_a_stream_that_fails(http: httpx.AsyncClient, router: Any) -> None:
    router.die_after = 20
    last = events_of(await ask(http, stream=True))[-1]
    assert last["type"] == "error" and last["error"]["type"] == "api_error"
    assert "decode-0 is gone" in last["error"]["message"]


async def test_the_key_may_come_as_anthropics_clients_send_it(router: Any) -> None:
    app = create_app(Config(served_model_name="smol", api_key=SecretStr("right")), lambda: router)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://pdray") as http:
        for headers, status in (({"x-api-key": "right"}, 200), ({"x-api-key": "wrong"}, 401), ({}, 401)):
            answer = await http.post("/v1/messages", json={"max_tokens": 9, "messages": [USER]}, headers=headers)
            assert answer.status_code == status
            assert status == 200 or answer.json()["error"]["type"] == "authentication_error"
        assert (
            await http.get("/v1/models", headers={"Authorization": "Bearer wrong", "x-api-key": "right"})
        ).status_code == 401
