"""thinking_token_budget, and answers that must have a form from a model that thinks first."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from pdray.sampling_params import SamplingParams
from pdray.thinking import Thinking, think_tags

ASK: list[Any] = [{"role": "user", "content": "2 + 2?"}]
BODIES: dict[str, dict[str, Any]] = {"/v1/chat/completions": {"messages": ASK}, "/v1/completions": {"prompt": "x"}}
QWEN3 = (
    "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
R1 = QWEN3.replace("{% if enable_thinking is def", "<think>\n{% if enable_thinking is def")
TOOLS = [{"type": "function", "function": {"name": "now"}}]
NAMED = {"type": "function", "function": {"name": "now"}}
FORMS: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "json_object"}}, '{"a": 1}'),
    ({"structured_outputs": {"regex": "[a-z]+"}}, "four"),
    ({"tools": TOOLS, "tool_choice": NAMED}, "{}"),
    ({"tools": TOOLS, "tool_choice": "required"}, '[{"name": "now", "parameters": {}}]'),
]


@pytest.fixture(autouse=True)
def _model(router: Any) -> None:
    router.tokenizer.add_tokens(["<think>", "</think>"])
    router.tokenizer.chat_template = QWEN3
    router.max_model_len = 1000


def params_of(router: Any) -> SamplingParams:
    params: SamplingParams = router.requests[-1].params
    return params


@pytest.mark.parametrize("path", BODIES)
async def test_the_workers_are_told_of_the_budget(http: httpx.AsyncClient, router: Any, path: str) -> None:
    tags = think_tags(router.tokenizer)
    assert tags is not None
    answer = await http.post(path, json={**BODIES[path], "thinking_token_budget": 7})
    assert answer.status_code == 200, answer.text
    assert (params_of(router).thinking_token_budget, params_of(router).thinking) == (7, Thinking(*tags))
    for value in (None, -1):
        await http.post(path, json={**BODIES[path], "thinking_token_budget": value})
        assert params_of(router).thinking_token_budget is None and params_of(router).thinking is None


async def test_thoughts_that_the_prompt_has_opened_count(http: httpx.AsyncClient, router: Any) -> None:
    router.tokenizer.chat_template = R1
    await http.post("/v1/chat/completions", json={"messages": ASK, "thinking_token_budget": 7})
    thinking = params_of(router).thinking
    assert thinking is not None and thinking.num_open == 1  # the line's end
    body = {"messages": ASK, "thinking_token_budget": 7, "chat_template_kwargs": {"enable_thinking": False}}
    await http.post("/v1/chat/completions", json=body)
    thinking = params_of(router).thinking
    assert thinking is not None and thinking.num_open is None


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("budget", [-2, 1.5, "7", True, 2**31])
async def test_what_it_may_not_be(http: httpx.AsyncClient, path: str, budget: Any) -> None:
    answer = await http.post(path, json={**BODIES[path], "thinking_token_budget": budget})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "thinking_token_budget", answer.text


@pytest.mark.parametrize("path", BODIES)
async def test_a_model_without_thoughts_has_no_budget(http: httpx.AsyncClient, router: Any, path: str) -> None:
    router.tokenizer.chat_template = QWEN3.replace("think>", "thought>")
    router.reasoning_parser = "none"
    for budget in (0, 7):
        answer = await http.post(path, json={**BODIES[path], "thinking_token_budget": budget})
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == "thinking_token_budget", answer.text
        assert "reasoning_parser" in error["message"]


async def test_nor_has_a_form_without_a_place_for_thoughts(http: httpx.AsyncClient) -> None:
    body = {"thinking_token_budget": 7, "structured_outputs": {"regex": "a"}}
    for path, more in (("/v1/completions", {}), ("/v1/chat/completions", {"separate_reasoning": False})):
        error = (await http.post(path, json={**BODIES[path], **body, **more})).json()["error"]
        assert error["param"] == "thinking_token_budget" and "leaves no place for thoughts" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "text"), FORMS)
async def test_thoughts_come_before_the_form(
    http: httpx.AsyncClient, client: Any, router: Any, fields: dict[str, Any], text: str, stream: bool
) -> None:
    for template, reply in ((R1, f"Easy.\n</think>\n\n{text}"), (QWEN3, f"<think>Easy.</think>{text}"), (QWEN3, text)):
        router.tokenizer.chat_template, router.reply = template, reply
        options: dict[str, Any] = {"messages": ASK, "model": "smol", **fields}
        structured = options.pop("structured_outputs", None)
        options |= {"extra_body": {"structured_outputs": structured}} if structured else {}
        if stream:
            async with client.chat.completions.stream(**options) as events:
                message = (await events.get_final_completion()).choices[0].message
        else:
            message = (await client.chat.completions.create(**options)).choices[0].message
        assert getattr(message, "reasoning_content", None) == (None if reply == text else "Easy.")
        if "tools" in fields:
            [call] = message.tool_calls
            assert (call.function.name, call.function.arguments, message.content or "") == ("now", "{}", "")
        else:
            assert message.content == text
        assert params_of(router).structured_outputs_after_thinking and params_of(router).thinking is not None


@pytest.mark.parametrize("fields", [{"reasoning_effort": "none"}, {"separate_reasoning": False}])
async def test_without_a_place_for_thoughts_the_form_holds_at_once(
    http: httpx.AsyncClient, router: Any, fields: dict[str, Any]
) -> None:
    router.reply = '{"a": 1}'
    body = {"messages": ASK, "response_format": {"type": "json_object"}, **fields}
    answer = await http.post("/v1/chat/completions", json=body)
    assert answer.json()["choices"][0]["message"]["content"] == router.reply
    assert not params_of(router).structured_outputs_after_thinking and params_of(router).thinking is None
