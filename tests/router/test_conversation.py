"""Messages: what is understood, and that the rest is refused by the name of its place."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pdray.errors import InvalidRequestError
from pdray.router.conversation import MAX_MESSAGES, Message, parse_messages
from pdray.router.tool_calls import ToolCall

DEEP = json.loads("[" * 400 + "]" * 400)
USER = {"role": "user", "content": "hi"}


def called(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


CALL = {"id": "c1", **called("f", '{"a": 1}')}


def text(value: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **more}


@pytest.mark.parametrize(
    "given,expected",
    [
        (USER, Message("user", ("hi",))),
        ({"role": "user", "content": ""}, Message("user", ("",))),
        ({"role": "user", "content": []}, Message("user", ("",), in_parts=True)),
        ({"role": "user", "content": [text("a"), text("b")]}, Message("user", ("a", "b"), in_parts=True)),
        ({"role": "user", "content": (text("a"),), "name": "Ann"}, Message("user", ("a",), True, "Ann")),
        ({"role": "assistant"}, Message("assistant", ("",))),
        ({"role": "assistant", "content": None, "tool_calls": []}, Message("assistant", ("",))),
        ({"role": "assistant", "content": None, "refusal": "No."}, Message("assistant", ("No.",))),
        ({"role": "assistant", "content": "Hm.", "refusal": "No."}, Message("assistant", ("Hm.", "No."))),
        (
            {"role": "assistant", "content": [text("Hm."), {"type": "refusal", "refusal": "No."}]},
            Message("assistant", ("Hm.", "No."), in_parts=True),
        ),
        # as other servers answer, and clients send back
        (
            {**USER, "role": "assistant", "refusal": None, "annotations": [], "audio": None, "function_call": None},
            Message("assistant", ("hi",)),
        ),
        ({"role": "user", "content": [text("a", cache_control={"type": "ephemeral"})]}, Message("user", ("a",), True)),
        ({"role": "user", "content": [text("a", annotations=[])]}, Message("user", ("a",), True)),
        # tools
        (
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            Message("assistant", ("",), tool_calls=(ToolCall("f", {"a": 1}, "c1"),)),
        ),
        (
            {"role": "assistant", "tool_calls": [called("f", {})]},
            Message("assistant", ("",), tool_calls=(ToolCall("f", {}),)),
        ),
        (
            {"role": "assistant", "tool_calls": [called("f", "")]},
            Message("assistant", ("",), tool_calls=(ToolCall("f", {}),)),
        ),
        ({"role": "tool", "content": "4", "tool_call_id": "c1"}, Message("tool", ("4",), tool_call_id="c1")),
        ({"role": "tool", "content": [text("4")]}, Message("tool", ("4",), True)),
        # thoughts
        (
            {"role": "assistant", "content": "4", "reasoning_content": "Hm."},
            Message("assistant", ("4",), reasoning="Hm."),
        ),
        ({"role": "assistant", "content": "4", "reasoning": "Hm."}, Message("assistant", ("4",), reasoning="Hm.")),
    ],
)
def test_what_is_understood(given: dict[str, Any], expected: Message) -> None:
    assert parse_messages([USER, given]) == [Message("user", ("hi",)), expected]


def test_parts_are_lines() -> None:
    [message] = parse_messages([{"role": "user", "content": [text("a"), text(""), text("b")]}])
    assert message.text == "a\n\nb"


@pytest.mark.parametrize(
    "given,named",
    [
        ("hi", "messages[1] must be an object with role and content, not a string"),
        (None, "messages[1] must be an object"),
        ({"content": "hi"}, "messages[1].role is null"),
        ({"role": ["user"], "content": "hi"}, "messages[1].role is an array"),
        ({"role": "x" * 65, "content": "hi"}, "1 to 64"),
        ({"role": "user"}, "messages[1] (role 'user') has no content"),
        ({"role": "system", "content": None}, "messages[1] (role 'system') has no content"),
        ({"role": "user", "content": 5}, "messages[1].content must be a string or a list of parts, not a number"),
        ({"role": "user", "content": {"text": "hi"}}, "not an object"),
        ({"role": "user", "content": ["hi"]}, "messages[1].content[0]"),
        ({"role": "user", "content": [text("a"), {"type": "image_url"}]}, "messages[1].content[1]: content parts"),
        ({"role": "user", "content": [{"type": DEEP}]}, "type an array"),
        ({"role": "user", "content": [{"type": "text"}]}, "not null"),
        ({"role": "user", "content": [text("a", lang="en")]}, "field 'lang'"),
        ({"role": "user", "content": [{"type": "refusal", "refusal": "No."}]}, "role 'assistant'"),
        ({"role": "assistant", "content": [{"type": "refusal"}]}, "a refusal must be a string"),
        ({**USER, "refusal": "No."}, "messages[1].refusal"),
        ({**USER, "name": 5}, "messages[1].name is 5"),
        ({**USER, "name": "x" * 65}, "at most 64"),
        ({**USER, "reasoning_content": "because"}, "messages[1].reasoning_content: only a message of role 'assistant'"),
        ({**USER, "weight": 0}, "field 'weight'"),
        ({"role": "assistant", "reasoning": 5}, "messages[1].reasoning must be a string"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages[1].tool_calls[0] must be an object with id"),
        ({"role": "assistant", "tool_calls": 5}, "messages[1].tool_calls must be a list"),
        ({**USER, "tool_calls": [CALL]}, "messages[1].tool_calls: only a message of role 'assistant'"),
        ({"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}, "tool_calls[0].type must be 'function'"),
        ({"role": "assistant", "tool_calls": [{**CALL, "id": 5}]}, "tool_calls[0].id must be a string"),
        ({"role": "assistant", "tool_calls": [{**CALL, "mood": 5}]}, "field 'mood'"),
        ({"role": "assistant", "tool_calls": [called("", "{}")]}, "function.name must be a string"),
        ({"role": "assistant", "tool_calls": [called("f", "{")]}, "tool_calls[0].function.arguments is no valid JSON"),
        ({"role": "assistant", "tool_calls": [called("f", "[" * 10_000)]}, "function.arguments is no valid JSON"),
        ({"role": "assistant", "tool_calls": [called("f", "[]")]}, "must be the JSON of an object"),
        ({"role": "assistant", "tool_calls": [CALL] * 129}, "at most 128"),
        ({"role": "assistant", "function_call": {"name": "f"}}, "use tools"),
        ({"role": "function", "content": "4", "name": "f"}, "use tools"),
        ({"role": "tool", "tool_call_id": "1"}, "messages[1] (role 'tool') has no content"),
        ({"role": "tool", "content": "4", "tool_call_id": 1}, "messages[1].tool_call_id must be a string"),
        ({**USER, "tool_call_id": "1"}, "messages[1].tool_call_id: only a message of role 'tool'"),
    ],
)
def test_what_is_refused(given: Any, named: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_messages([USER, given])
    assert named in str(caught.value) and caught.value.param == "messages"


@pytest.mark.parametrize("given", ["hi", None, {"role": "user"}, [], [USER] * (MAX_MESSAGES + 1)])
def test_what_is_no_conversation(given: Any) -> None:
    with pytest.raises(InvalidRequestError, match="^messages ") as caught:
        parse_messages(given)
    assert caught.value.param == "messages"
