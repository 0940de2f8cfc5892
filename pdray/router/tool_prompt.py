"""Tools for models whose chat template has no place for them: described in the system message.

The form is what SmolLM2-Instruct was trained with; other models follow it by the description. Calls and their results
in the history are texts of the same form.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pdray.router.conversation import Message
from pdray.router.tool_calls import ToolCall

PROMPT = """You can call functions to help with the user's question. The functions, as JSON schemas:
<tools>{tools}</tools>

To call functions, answer with nothing but their names and arguments, in this form:
<tool_call>[
{{"name": "func_name1", "arguments": {{"argument1": "value1", "argument2": "value2"}}}},
(more calls as required)
]</tool_call>
If no function fits the question, or a parameter it requires is missing, answer in words."""


def with_tool_prompt(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    """The same conversation for a template that knows neither tools nor messages about them."""
    result: list[Message] = []
    after_result = False
    for message in messages:
        if message.role == "tool":
            text = f"<tool_response>\n{message.text}\n</tool_response>"
            if after_result:  # results of one message's calls are one message, for roles must alternate
                result[-1] = replace(result[-1], texts=(f"{result[-1].text}\n{text}",))
            else:
                result.append(Message("user", (text,)))
        elif message.tool_calls:
            text = "\n".join(filter(None, (message.text, f"<tool_call>{_as_json(message.tool_calls)}</tool_call>")))
            result.append(replace(message, texts=(text,), in_parts=False, tool_calls=()))
        else:
            result.append(message)
        after_result = message.role == "tool"
    if not tools:
        return result
    prompt = PROMPT.format(tools=json.dumps([tool["function"] for tool in tools], ensure_ascii=False))
    if result[0].role in ("system", "developer"):
        return [replace(result[0], texts=(f"{result[0].text}\n\n{prompt}",), in_parts=False), *result[1:]]
    return [Message("system", (prompt,)), *result]


def _as_json(calls: Sequence[ToolCall]) -> str:
    return json.dumps([{"name": call.name, "arguments": call.arguments} for call in calls], ensure_ascii=False)
