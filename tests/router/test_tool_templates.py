"""Tools, calls and their results in prompts: through the model's template where it has a place for them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pdray.errors import InvalidRequestError
from pdray.router.chat_template import ChatOptions, ChatTemplate
from pdray.router.conversation import parse_messages

TOOL = {"type": "function", "function": {"name": "get", "parameters": {"type": "object", "properties": {}}}}
# As Qwen's: arguments are objects, printed as JSON.
OBJECTS = (
    "{% if tools %}[tools]{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}"
    '<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>'
    "{% endfor %};{% endfor %}"
)
# As DeepSeek's: arguments are JSON already.
JSON = OBJECTS.replace("{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}")
REPR = OBJECTS.replace("{{ c.function.arguments | tojson }}", "{{ c.function.arguments }}")
# As Llama 3.1's: one call at a time.
SINGLE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]"
    "{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
NO_CALLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)
NO_SCHEMA = "{% if tools %}some tools{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
# Knows nothing of tools, as SmolLM2's.
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
ALTERNATING = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no role') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
)


def render(template: str, messages: list[Any], *tools: Any) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer).render(parse_messages(messages), ChatOptions(tools=tools))


def call(arguments: str = '{"a": 1}') -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "get", "arguments": arguments}}


ASK = {"role": "user", "content": "Where?"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [call()]}
RESULT = {"role": "tool", "content": "Paris", "tool_call_id": "c1"}
HISTORY = [ASK, CALLED, RESULT]


@pytest.mark.parametrize("template", [OBJECTS, JSON, REPR])
def test_calls_are_json_however_the_template_writes_them(template: str) -> None:
    prompt = render(template, HISTORY, TOOL)
    assert prompt.startswith("[tools]" + json.dumps(TOOL))
    assert '[assistant]<tool_call>{"name": "get", "arguments": {"a": 1}}</tool_call>;[tool]Paris' in prompt


def test_several_calls() -> None:
    both = {**CALLED, "tool_calls": [call(), call('{"b": 2}')]}
    assert '"arguments": {"a": 1}}</tool_call><tool_call>' in render(OBJECTS, [ASK, both, RESULT, RESULT], TOOL)
    with pytest.raises(InvalidRequestError, match="one call at a time"):
        render(SINGLE, [ASK, both, RESULT], TOOL)
    assert '[assistant]{"name": "get", "arguments": {"a": 1}}[tool]Paris' in render(SINGLE, HISTORY, TOOL)


def test_what_would_be_dropped_is_refused() -> None:
    for template in (NO_CALLS, NO_SCHEMA):
        with pytest.raises(InvalidRequestError, match=r"drops messages\[1\]"):
            render(template, HISTORY)
    with pytest.raises(InvalidRequestError, match=r"drops messages\[1\]"):  # its text beside the call
        render(SINGLE, [ASK, {**CALLED, "content": "Let me see."}, RESULT])
    with pytest.raises(InvalidRequestError, match="does not show the tools") as caught:
        render(NO_SCHEMA, [ASK], TOOL)
    assert caught.value.param == "tools"


@pytest.mark.parametrize("template", [PLAIN, ALTERNATING])
def test_a_template_without_tools(template: str) -> None:
    """They are described in the system message, and calls and results are texts."""
    prompt = render(template, HISTORY, TOOL)
    assert prompt.startswith("[system]You can call functions") and json.dumps([TOOL["function"]]) in prompt
    assert '[assistant]<tool_call>[{"name": "get", "arguments": {"a": 1}}]</tool_call>\n' in prompt
    assert prompt.endswith("[user]<tool_response>\nParis\n</tool_response>\n")
    prompt = render(template, [{"role": "system", "content": "Be brief."}, ASK, CALLED, RESULT, RESULT], TOOL)
    assert prompt.startswith("[system]Be brief.\n\nYou can call functions") and prompt.count("[user]") == 2
    assert "functions" not in render(template, HISTORY)
    assert render(template, [ASK]) == "[user]Where?\n"


def test_thoughts_are_given_to_the_template() -> None:
    assert "[assistant](Hm.)4;" in render(OBJECTS, [ASK, {"role": "assistant", "content": "4", "reasoning": "Hm."}])
    assert render(PLAIN, [{"role": "assistant", "content": "4", "reasoning": "Hm."}]) == "[assistant]4\n"
