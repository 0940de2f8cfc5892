"""Thoughts over HTTP: apart from the content, streamed and whole; and what switches them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

ASK: list[Any] = [{"role": "user", "content": "2 + 2?"}]
# As Qwen 3's: without thoughts the prompt closes them at once.
QWEN3 = (
    "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# As DeepSeek R1's: the prompt opens them.
R1 = "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}\n{% endfor %}assistant: <think>\n"
EFFORT = QWEN3.replace("assistant: {%", "[{{ reasoning_effort }}]assistant: {%")


@pytest.fixture(autouse=True)
def _model(router: Any) -> None:
    router.tokenizer.chat_template = QWEN3
    router.max_model_len = 1000
    router.reply = "<think>\nEasy.\n</think>\n\nIt is 4."


async def ask(http: httpx.AsyncClient, stream: bool = False, **fields: Any) -> tuple[str, str | None, dict[str, Any]]:
    """Thoughts, content and the last choice."""
    response = await http.post("/v1/chat/completions", json={"messages": ASK, "stream": stream} | fields)
    assert response.status_code == 200, response.text
    if not stream:
        choice = response.json()["choices"][0]
        message = choice["message"]
        assert message.get("reasoning_content") == message.get("reasoning")
        return message.get("reasoning_content") or "", message["content"], choice
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    deltas = [choice["delta"] for choice in choices]
    assert not any(delta.get("content") and delta.get("reasoning") for delta in deltas)
    thoughts = "".join(delta.get("reasoning_content", "") for delta in deltas)
    assert thoughts == "".join(delta.get("reasoning", "") for delta in deltas)
    return thoughts, "".join(delta.get("content", "") for delta in deltas) or None, choices[-1]


@pytest.mark.parametrize("stream", [False, True])
async def test_thoughts(http: httpx.AsyncClient, router: Any, stream: bool) -> None:
    assert (await ask(http, stream))[:2] == ("Easy.", "It is 4.")
    router.tokenizer.chat_template = R1
    router.reply = "Easy.\n</think>\n\nIt is 4."
    assert (await ask(http, stream))[:2] == ("Easy.", "It is 4.")


@pytest.mark.parametrize("stream", [False, True])
async def test_cut_thoughts(http: httpx.AsyncClient, stream: bool) -> None:
    thoughts, content, choice = await ask(http, stream, max_tokens=12)
    assert (thoughts, content, choice["finish_reason"]) == ("Easy", None, "length")


@pytest.mark.parametrize("stream", [False, True])
async def test_without_thoughts(http: httpx.AsyncClient, router: Any, stream: bool) -> None:
    """The prompt has closed them; tags in the answer are text."""
    router.reply = "It is 4, not <think>5</think>."
    for fields in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        assert (await ask(http, stream, **fields))[:2] == ("", router.reply)
        assert bytes(router.requests[-1].output.prompt_token_ids).endswith(b"<think>\n\n</think>\n\n")
    await ask(http, stream, reasoning_effort="low")
    assert not bytes(router.requests[-1].output.prompt_token_ids).endswith(b"</think>\n\n")


@pytest.mark.parametrize("stream", [False, True])
async def test_thoughts_left_out_or_left_in(http: httpx.AsyncClient, router: Any, stream: bool) -> None:
    assert (await ask(http, stream, include_reasoning=False))[:2] == ("", "It is 4.")
    assert (await ask(http, stream, separate_reasoning=False))[:2] == ("", router.reply)


async def test_a_grammar_leaves_no_place_for_thoughts(http: httpx.AsyncClient, router: Any) -> None:
    """Though the prompt has opened them: the answer is its content, or its calls."""
    router.tokenizer.chat_template = R1
    router.reply = '{"a": 1}'
    assert (await ask(http, response_format={"type": "json_object"}))[:2] == ("", router.reply)
    tools = [{"type": "function", "function": {"name": "now"}}]
    choice = {"type": "function", "function": {"name": "now"}}
    thoughts, content, answer = await ask(http, tools=tools, tool_choice=choice)
    assert (thoughts, content) == ("", None)
    assert answer["message"]["tool_calls"][0]["function"] == {"name": "now", "arguments": router.reply}


async def test_effort_is_the_templates_own_where_it_knows_it(http: httpx.AsyncClient, router: Any) -> None:
    router.tokenizer.chat_template = EFFORT
    await ask(http, reasoning_effort="high")
    assert b"[high]assistant" in bytes(router.requests[-1].output.prompt_token_ids)
    await ask(http, reasoning_effort="high", chat_template_kwargs={"reasoning_effort": "low"})
    assert b"[low]assistant" in bytes(router.requests[-1].output.prompt_token_ids)


@pytest.mark.parametrize("stream", [False, True])
async def test_thoughts_and_calls(http: httpx.AsyncClient, router: Any, stream: bool) -> None:
    """A call in the thoughts is a thought."""
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    router.reply = f"<think>{call}</think>\n{call}"
    tools = [{"type": "function", "function": {"name": "now"}}]
    thoughts, content, choice = await ask(http, stream, tools=tools)
    assert (thoughts, content, choice["finish_reason"]) == (call, None, "tool_calls")
