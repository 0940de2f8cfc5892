"""LLM.chat and /v1/chat/completions make the same prompts, and refuse the same with the same words."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from pdray.errors import InvalidRequestError
from pdray.llm import LLM
from pdray.router.chat_template import ChatTemplate
from pdray.router.prompt import CompleteText

USER = {"role": "user", "content": "hi"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
TEMPLATES = {
    "strings": "{% for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}",
    "parts": "{% for m in messages %}{{ m.role }}:{% for c in m.content %}{{ c.text }},{% endfor %};{% endfor %}",
    "users": "{% for m in messages if m.role == 'user' %}{{ m.content }};{% endfor %}",
    "raises": "{{ raise_exception('not today') }}",
    "none": None,
}
CONVERSATIONS: list[Any] = [
    [USER],
    [PARTS],
    [PARTS, {"role": "assistant", "content": None}, USER],
    [{"role": "developer", "content": "x"}, USER],
    [USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, USER],
    [{"role": "user", "content": None}],
    [{"role": "user"}],
    [{"role": "User", "content": "x"}],
    [{"role": "user", "content": 5}],
    [USER, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    [USER, {"role": "tool", "content": "4"}],
    [USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}],
    [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}, USER],
    [{**USER, "mood": "calm"}],
    ["hi"],
    "hi",
]


class Offline(LLM):
    """Its chat() alone: no actors; what would be computed is kept."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._chat_template = ChatTemplate(tokenizer)
        self.prompts: list[Any] = []

    def generate(self, prompts: Any, *_: Any, **__: Any) -> list[Any]:
        assert all(isinstance(prompt, CompleteText) for prompt in prompts)
        self.prompts = prompts
        return []


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
@pytest.mark.parametrize("name", TEMPLATES)
async def test_both_doors(http: httpx.AsyncClient, router: Any, name: str, conversation: Any) -> None:
    router.tokenizer.chat_template = TEMPLATES[name]
    answer = await http.post("/v1/chat/completions", json={"messages": conversation, "max_tokens": 1})
    llm = Offline(router.tokenizer)
    try:
        llm.chat(conversation)
    except InvalidRequestError as error:
        assert answer.status_code == 400
        assert (answer.json()["error"]["message"], answer.json()["error"]["param"]) == (str(error), error.param)
    else:
        assert answer.status_code == 200, answer.text
        assert llm.prompts == [bytes(router.requests[0].output.prompt_token_ids).decode()]


def test_many_conversations(router: Any) -> None:
    llm = Offline(router.tokenizer)
    llm.chat([[USER], [PARTS]], chat_template_kwargs={"mood": "[calm]"})
    assert llm.prompts == ["user: hi\n[calm]assistant: ", "user: a\nb\n[calm]assistant: "]
    llm.chat([[USER, {"role": "assistant", "content": "It"}]], add_generation_prompt=False, continue_final_message=True)
    assert llm.prompts == ["user: hi\nassistant: It"]
    llm.chat([[USER]], tools=[{"type": "function", "function": {"name": "now"}}])
    assert llm.prompts[0].startswith("system: You can call functions") and '"now"' in llm.prompts[0]
    assert llm.chat([]) == []
    with pytest.raises(InvalidRequestError, match=r"^messages\[0\]") as caught:
        llm.chat([[USER], [{"role": "user"}], [USER]])
    assert caught.value.__notes__ == ["in conversation 1 of 3, counted from 0"]
    for options, param in (
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            llm.chat([USER], **options)
        assert caught.value.param == param


@pytest.mark.parametrize("messages", [[USER, [USER]], [[USER], USER], [[]], [None], {"role": "user"}, None])
def test_what_is_neither_one_conversation_nor_many(router: Any, messages: Any) -> None:
    llm = Offline(router.tokenizer)
    with pytest.raises(InvalidRequestError, match="^messages"):
        llm.chat(messages)
    assert not llm.prompts
