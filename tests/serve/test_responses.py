"""/v1/responses, asked by openai's client and parsed by its types."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call>;{% endif %}{% for m in messages %}{{ m.role }}: "
    "{% if m.reasoning_content %}({{ m.reasoning_content }})</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %};{% endfor %}"
    "{% if enable_thinking %}[think]{% endif %}"
)
TOOL: dict[str, Any] = {"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}}}
USER = {"role": "user", "content": "x"}
CALL = {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"}
REPLY = '<think>Hm.</think>Well.\n<tool_call>{"name": "now", "arguments": {"a": 1}}</tool_call>'


@pytest.fixture(autouse=True)
def _model(router: Any) -> None:
    router.tokenizer.chat_template = TEMPLATE
    router.max_model_len = 2000
    router.reply = REPLY


def prompt_of(router: Any) -> str:
    return bytes(router.requests[-1].output.prompt_token_ids).decode()


async def test_a_text(client: openai.AsyncOpenAI, router: Any) -> None:
    router.reply = "It is noon."
    answer = await client.responses.create(
        model="smol", input="When?", instructions="Be brief.", max_output_tokens=50, metadata={"a": "b"}, store=False
    )
    assert (answer.output_text, answer.status, answer.object) == ("It is noon.", "completed", "response")
    assert prompt_of(router) == "system: Be brief.;user: When?;" and answer.id.startswith("resp_")
    assert answer.usage is not None and answer.usage.output_tokens == len("It is noon.") + 1
    assert answer.usage.output_tokens_details.reasoning_tokens == 0
    assert (answer.instructions, answer.metadata, answer.store) == ("Be brief.", {"a": "b"}, False)


async def test_items(client: openai.AsyncOpenAI) -> None:
    answer = await client.responses.create(model="smol", input="When?", tools=[TOOL], reasoning={"effort": "high"})
    reasoning, message, call = answer.output
    assert reasoning.type == "reasoning" and reasoning.content and reasoning.content[0].text == "Hm."
    assert message.type == "message" and answer.output_text == "Well."
    assert call.type == "function_call" and (call.name, call.arguments, call.status) == ("now", '{"a": 1}', "completed")
    assert answer.usage is not None and answer.usage.output_tokens_details.reasoning_tokens == len("Hm.")


async def test_a_stream_tells_what_the_whole_says(http: httpx.AsyncClient, client: openai.AsyncOpenAI) -> None:
    """Every event is of a type of openai's; the deltas add up to the items, and the items to the response's."""
    asked: dict[str, Any] = {"model": "smol", "input": "When?", "tools": [TOOL]}
    response = await http.post("/v1/responses", json=asked | {"stream": True})
    blocks = [block.splitlines() for block in response.text.strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name.removeprefix("event: ") for name, _ in blocks] == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event)
    assert [e["type"] for e in events[:2]] == ["response.created", "response.in_progress"]
    final = events[-1]["response"]
    assert events[-1]["type"] == "response.completed" and final["usage"]["output_tokens"] == len(REPLY) + 1
    for index, (kind, expected) in enumerate(
        (("reasoning_text", "Hm."), ("output_text", "Well."), ("function_call_arguments", '{"a": 1}'))
    ):
        mine = [event for event in events if event.get("output_index") == index]
        deltas = [event["delta"] for event in mine if event["type"] == f"response.{kind}.delta"]
        assert "".join(deltas) == expected and deltas
        assert mine[0]["type"] == "response.output_item.added" and mine[-1]["type"] == "response.output_item.done"
        assert mine[-1]["item"] == final["output"][index] and mine[0]["item"]["status"] == "in_progress"
    async with client.responses.stream(**asked) as stream:
        whole = await stream.get_final_response()
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    assert whole.output_text == "Well."


async def test_a_format(client: openai.AsyncOpenAI, router: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    router.reply = '{"a": 1}'
    form: Any = {"format": {"type": "json_schema", "name": "a", "schema": schema, "strict": True}}
    answer = await client.responses.create(model="smol", input="When?", text=form)
    assert answer.output_text == router.reply and [item.type for item in answer.output] == ["message"]
    assert json.loads(router.requests[-1].params.structured_outputs.json) == schema


@pytest.mark.parametrize("stream", [False, True])
async def test_cut(http: httpx.AsyncClient, stream: bool) -> None:
    body = {"input": "When?", "tools": [TOOL], "max_output_tokens": len(REPLY) - 15, "stream": stream}
    answer = await http.post("/v1/responses", json=body)
    final = json.loads(answer.text.strip().split("data: ")[-1])["response"] if stream else answer.json()
    assert (final["status"], final["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert final["output"][-1]["status"] == "incomplete"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("num_tokens", "status"), [(3, "incomplete"), (None, "completed")])
async def test_a_text_that_is_cut(
    http: httpx.AsyncClient, router: Any, num_tokens: int | None, status: str, stream: bool
) -> None:
    router.reply = "abcdef"
    body = {"input": "When?", "max_output_tokens": num_tokens, "stream": stream}
    answer = await http.post("/v1/responses", json=body)
    final = json.loads(answer.text.strip().split("data: ")[-1])["response"] if stream else answer.json()
    [item] = final["output"]
    assert (final["status"], item["status"]) == (status, status)


async def test_a_stream_that_fails(http: httpx.AsyncClient, router: Any) -> None:
    router.die_after = 5
    text = (await http.post("/v1/responses", json={"input": "When?", "stream": True})).text
    event = json.loads(text.strip().split("data: ")[-1])
    assert event["type"] == "response.failed" and "decode-0 is gone" in event["response"]["error"]["message"]
    TypeAdapter(ResponseStreamEvent).validate_python(event)


async def test_a_conversation(client: openai.AsyncOpenAI, router: Any) -> None:
    """What was answered is sent back, with the tool's result."""
    answer = await client.responses.create(model="smol", input="When?", tools=[TOOL])
    items = [{"role": "user", "content": [{"type": "input_text", "text": "When?"}]}]
    items += [item.model_dump(exclude_none=True) for item in answer.output]
    items += [{"type": "function_call_output", "call_id": answer.output[-1].call_id, "output": "noon"}]  # type: ignore[union-attr]
    router.reply = "Noon."
    again = await client.responses.create(model="smol", input=items, tools=[TOOL])  # type: ignore[arg-type]
    assert again.output_text == "Noon."
    expected = 'user: When?;assistant: (Hm.)</think>Well.<tool_call>{"name": "now", "arguments": {"a": 1}}</tool_call>;'
    assert prompt_of(router).endswith(expected + "tool: noon;")


@pytest.mark.parametrize(
    "fields,named,param",
    [
        ({"previous_response_id": "resp_1"}, "nothing is stored", "previous_response_id"),
        ({"store": True}, "nothing is stored", "store"),
        ({"background": True}, "background", "background"),
        ({"truncation": "auto"}, "shorten the input", "truncation"),
        ({"max_tokens": 5}, "max_output_tokens", "max_tokens"),
        ({"tools": [{"type": "web_search"}]}, "web_search", "tools"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "a b", "tools"),
        ({"tool_choice": {"type": "function", "name": "g"}, "tools": [TOOL]}, "'g'", "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "now", "x": 1}, "tools": [TOOL]}, "tool_choice", "tool_choice"),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [TOOL], "x": 1}, "tools": [TOOL]},
            "tool_choice",
            "tool_choice",
        ),
        ({"include": ["file_search_call.results"]}, "include", "include"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference", "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_image", "input"),
        ({"input": [{"type": "reasoning", "summary": 5}]}, "input[0].summary must be a list", "input"),
        ({"text": {"format": {"name": "x"}}}, "text.format.type", "text"),
        ({"input": []}, "input has 0 messages; it must have 1 to", "input"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content must be", "input"),
        ({"input": [{"role": "user"}], "instructions": "Hi."}, "input[0] (role 'user') has no content", "input"),
        ({"input": [], "instructions": "Hi.", "tools": [TOOL] * 2}, "tools has several", "tools"),
        ({"input": [{"role": 5, "content": "x"}]}, "input[0].role is 5", "input"),
        ({"input": [USER, CALL, CALL | {"arguments": "["}]}, "input[2].arguments is no valid JSON", "input"),
        ({"input": [USER, CALL, CALL | {"call_id": 5}]}, "input[2].call_id must be a string", "input"),
        ({"input": [USER, CALL, {"type": "function_call_output", "output": 5}]}, "input[2].output must be", "input"),
        ({"input": 5}, "input", "input"),
        ({"max_output_tokens": 0}, "max_output_tokens is 0", "max_output_tokens"),
        ({"temprature": 1}, "did you mean 'temperature'", "temprature"),
        ({"text": {"verbosity": "high"}}, "verbosity", "text"),
    ],
)
async def test_refusals(http: httpx.AsyncClient, router: Any, fields: Any, named: str, param: str) -> None:
    answer = await http.post("/v1/responses", json={"input": "When?"} | fields)
    error = answer.json()["error"]
    assert answer.status_code == 400 and named in error["message"] and error["param"] == param, error
    assert not router.num_submitted


async def test_what_the_template_drops_is_named_by_its_place(http: httpx.AsyncClient, router: Any) -> None:
    router.tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    items = [USER, {"role": "assistant", "content": "y"}, USER]
    answer = await http.post("/v1/responses", json={"input": items})
    error = answer.json()["error"]
    assert answer.status_code == 400 and "drops input[1] (role 'assistant')" in error["message"], error
    answer = await http.post("/v1/responses", json={"input": "x", "instructions": "y"})
    assert "drops instructions (role 'system')" in answer.json()["error"]["message"]
