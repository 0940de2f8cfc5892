"""Chat templates of every kind: each message's text is in the prompt, or the conversation is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pdray.errors import InvalidRequestError
from pdray.router.chat_template import ChatOptions, ChatTemplate
from pdray.router.conversation import parse_messages

GENERATION = "{% if add_generation_prompt %}[assistant]\n{% endif %}"
# Any role, content as a string: most models.
STRINGS = "{% for m in messages %}{{ '[' + m.role + ']\n' + m.content + '[end]\n' }}{% endfor %}" + GENERATION
# Content as a list of parts alone: a string's characters have no type.
PARTS = (
    "{% for m in messages %}{% if m['role'] in ['user', 'assistant'] %}[{{ m['role'] }}]"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] | trim }}{% endif %}{% endfor %}{{ '\n' }}"
    "{% endif %}{% endfor %}" + GENERATION
)
FIRST_PART = "{% for m in messages %}[{{ m.role }}]{{ m.content[0].text }}\n{% endfor %}" + GENERATION
# Both.
EITHER = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}<{{ c.text }}>{% endfor %}{% endif %}{{ '\n' }}{% endfor %}" + GENERATION
)
# A system message that must be a string, and users' that must be lists.
MIXED = (
    "{% if messages[0].role == 'system' %}[system]{{ messages[0].content | trim }}\n"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{% for c in m.content %}{{ c.text }}{% endfor %}{{ '\n' }}{% endfor %}"
    + GENERATION
)
# The system message goes into the first user's; roles must alternate; contents are trimmed.
MERGED = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
    "{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "[{{ m.role }}]{% if loop.first and system is defined %}{{ system }} {% endif %}{{ m.content | trim }}\n"
    "{% endfor %}" + GENERATION
)
# Known roles alone, others are dropped.
DROPS = (
    "{% for m in messages %}{% if m.role == 'system' and loop.first %}[system]{{ m.content }}\n"
    "{% elif m.role == 'user' %}[user]{{ m.content }}\n{% elif m.role == 'assistant' %}[assistant]{{ m.content }}\n"
    "{% endif %}{% endfor %}" + GENERATION
)
DEVELOPER = DROPS.replace("m.role == 'system'", "m.role in ['system', 'developer']")
LAST_ONLY = "[user]{{ messages[-1].content }}\n" + GENERATION
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    "[{{ m.role }}]{{ m.content | upper }}\n{% endfor %}" + GENERATION
)
# Shows an assistant's message without the thoughts in it, as reasoning models' templates do.
THOUGHTS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}" + GENERATION
)
ALL = {name: value for name, value in globals().items() if name.isupper() and isinstance(value, str)}


def make(template: Any) -> ChatTemplate:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer)


def render(template: Any, *messages: Any, **options: Any) -> str:
    """Messages are (role, content)."""
    parsed = parse_messages([{"role": role, "content": content} for role, content in messages])
    return make(template).render(parsed, ChatOptions(**options))


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


ASK = ("user", "Where?")


@pytest.mark.parametrize(
    "template,messages,expected",
    [
        (STRINGS, [ASK], "[user]\nWhere?[end]\n[assistant]\n"),
        (STRINGS, [("user", parts("Where", "is it?"))], "[user]\nWhere\nis it?[end]\n[assistant]\n"),
        (PARTS, [ASK], "[user]Where?\n[assistant]\n"),
        (PARTS, [("user", parts("Where", "is it?"))], "[user]Whereis it?\n[assistant]\n"),
        (PARTS, [ASK, ("assistant", None), ASK], "[user]Where?\n[assistant]\n[user]Where?\n[assistant]\n"),
        (FIRST_PART, [ASK], "[user]Where?\n[assistant]\n"),
        (FIRST_PART, [("user", parts("Where", "is it?"))], "[user]Where\nis it?\n[assistant]\n"),
        (EITHER, [ASK], "[user]Where?\n[assistant]\n"),
        (EITHER, [("system", "S"), ("user", parts("a", "b"))], "[system]S\n[user]<a><b>\n[assistant]\n"),
        (MIXED, [("system", "S"), ASK], "[system]S\n[user]Where?\n[assistant]\n"),
        (MIXED, [("system", parts("S", "T")), ("user", parts("a", "b"))], "[system]S\nT\n[user]ab\n[assistant]\n"),
        (MERGED, [("system", "S"), ASK], "[user]S Where?\n[assistant]\n"),
        (MERGED, [("developer", "S"), ASK], "[user]S Where?\n[assistant]\n"),
        (DROPS, [("system", "S"), ASK], "[system]S\n[user]Where?\n[assistant]\n"),
        (DROPS, [("developer", "S"), ASK], "[system]S\n[user]Where?\n[assistant]\n"),
        (DROPS, [ASK, ("critic", "")], "[user]Where?\n[assistant]\n"),  # nothing is lost with it
        (DEVELOPER, [("developer", "S"), ASK], "[system]S\n[user]Where?\n[assistant]\n"),
        (STRINGS, [("developer", "S"), ASK], "[system]\nS[end]\n[user]\nWhere?[end]\n[assistant]\n"),
        (STRINGS, [("critic", "S"), ASK], "[critic]\nS[end]\n[user]\nWhere?[end]\n[assistant]\n"),
        (LAST_ONLY, [ASK], "[user]Where?\n[assistant]\n"),
        (NO_SYSTEM, [ASK], "[user]WHERE?\n[assistant]\n"),
        (
            THOUGHTS,
            [ASK, ("assistant", "<think>zqx0x0xqz</think>There."), ASK],
            "[user]Where?\n[assistant]There.\n[user]Where?\n[assistant]\n",
        ),
        ({"default": STRINGS, "tool_use": PARTS}, [ASK], "[user]\nWhere?[end]\n[assistant]\n"),
    ],
)
def test_prompts(template: Any, messages: list[Any], expected: str) -> None:
    assert render(template, *messages) == expected


@pytest.mark.parametrize(
    "template,messages,named",
    [
        (PARTS, [("system", "S"), ASK], r"drops messages\[0\] \(role 'system'\)"),
        (DROPS, [("User", "Where?")], r"drops messages\[0\] \(role 'User'\)"),
        (DROPS, [ASK, ("system", "S")], r"drops messages\[1\] \(role 'system'\)"),
        (DROPS, [("system", "S"), ("developer", "T"), ASK], r"messages\[1\] \(role 'developer', sent as 'system'\)"),
        (LAST_ONLY, [ASK, ("assistant", "There."), ASK], r"drops messages\[0\] \(role 'user'\)"),
        (NO_SYSTEM, [("system", "S"), ASK], "refuses these messages: no system messages"),
        (NO_SYSTEM, [("developer", "S"), ASK], "refuses these messages: no system messages"),
        (MERGED, [ASK, ASK], "refuses these messages: roles must alternate"),
        (MERGED, [("system", "S")], r"drops messages\[0\] \(role 'system'\)"),
        ("{% for m in messages %}", [ASK], "cannot be read"),
        ("{{ messages[0].content.nothing.more }}", [ASK], "refuses these messages"),
        ("nothing", [ASK], r"drops messages\[0\]"),
        ({"tool_use": PARTS}, [ASK], "no default chat template"),
        (None, [ASK], "no chat template"),
        ({}, [ASK], "no chat template"),
    ],
)
def test_refusals(template: Any, messages: list[Any], named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named) as caught:
        render(template, *messages)
    assert caught.value.param == "messages"


def test_without_a_tokenizer() -> None:
    with pytest.raises(InvalidRequestError, match="no chat template"):
        ChatTemplate(None).render(parse_messages([{"role": "user", "content": "hi"}]), ChatOptions())


ROLES = ("system", "developer", "user", "assistant", "User")


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_word_is_in_the_prompt_or_it_is_refused(name: str) -> None:
    """All conversations of up to three roles, with contents as strings and as parts."""
    template, served = make(ALL[name]), 0
    for roles in itertools.chain.from_iterable(itertools.product(ROLES, repeat=n) for n in (1, 2, 3)):
        for forms in itertools.product((False, True), repeat=len(roles)):
            words = [[f"word{2 * i}.", f"word{2 * i + 1}."] for i in range(len(roles))]
            contents = [parts(*both) if form else " ".join(both) for both, form in zip(words, forms, strict=True)]
            given = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
            try:
                prompt = template.render(parse_messages(given), ChatOptions())
            except InvalidRequestError:
                continue
            served += 1
            assert all(prompt.lower().count(word) == 1 for both in words for word in both), (roles, prompt)
            assert "'type'" not in prompt
    assert served or name == "GENERATION"


@pytest.mark.parametrize("template", [STRINGS, EITHER, MERGED])
def test_strings_are_rendered_as_by_transformers(template: str) -> None:
    messages = [("user", " a "), ("assistant", "b"), ("user", "c\n")]
    tokenizer = make(template).tokenizer
    assert tokenizer is not None
    chat = [{"role": role, "content": content} for role, content in messages]
    for add_generation_prompt in (False, True):
        expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert render(template, *messages, add_generation_prompt=add_generation_prompt) == expected


@pytest.mark.parametrize(
    "template,prefill,expected",
    [
        (STRINGS, "The", "[user]\nWhere?[end]\n[assistant]\nThe"),
        (STRINGS, "The ", "[user]\nWhere?[end]\n[assistant]\nThe "),
        (STRINGS, "", "[user]\nWhere?[end]\n[assistant]\n"),
        (STRINGS, parts("It", "is"), "[user]\nWhere?[end]\n[assistant]\nIt\nis"),
        (PARTS, parts("It ", "is"), "[user]Where?\n[assistant]Itis"),
        (PARTS, "", "[user]Where?\n[assistant]"),
        (MERGED, "The", "[user]Where?\n[assistant]The"),
        (MERGED, "", "[user]Where?\n[assistant]"),
        (STRINGS.replace("m.content", "m.content | trim"), "", "[user]\nWhere?[end]\n[assistant]\n"),
        (STRINGS.replace("m.content", "m.content | trim"), "Where?", "[user]\nWhere?[end]\n[assistant]\nWhere?"),
        (THOUGHTS, "<think>a</think>b", "[user]Where?\n[assistant]b"),
    ],
)
def test_a_last_message_is_left_open(template: str, prefill: Any, expected: str) -> None:
    """An empty one, too: the header's newline is not the message's."""
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert render(template, ASK, ("assistant", prefill), **options) == expected


def test_what_cannot_be_continued() -> None:
    with pytest.raises(InvalidRequestError, match="needs add_generation_prompt=false") as caught:
        render(STRINGS, ASK, continue_final_message=True)
    assert caught.value.param == "continue_final_message"
    cut = "{% for m in messages %}[{{ m.role }}]{{ m.content[:12] }}{% endfor %}"
    with pytest.raises(InvalidRequestError, match="cannot be continued"):
        render(cut, ("user", "a" * 20), add_generation_prompt=False, continue_final_message=True)


def test_variables() -> None:
    template = STRINGS + "{{ mood }}"
    assert render(template, ASK, variables={"mood": "calm"}).endswith("calm")
    refused = {"moood": "calm", "m": 1, "tokenize": False, "chat_template": "x", "messages": []}
    for name, value in refused.items():
        with pytest.raises(InvalidRequestError, match=rf"'{name}' is no variable .* \['mood'\]") as caught:
            render(template, ASK, variables={name: value})
        assert caught.value.param == "chat_template_kwargs"
    with pytest.raises(InvalidRequestError, match="JSON"):
        render(template, ASK, variables={"mood": object()})


def test_variables_decide_what_is_shown() -> None:
    template = make("{% if not quiet %}{% for m in messages %}{{ m.content }}{% endfor %}{% endif %}")
    messages = parse_messages([{"role": "user", "content": "hi"}])
    assert template.render(messages, ChatOptions(variables={"quiet": False})) == "hi"
    with pytest.raises(InvalidRequestError, match="drops"):
        template.render(messages, ChatOptions(variables={"quiet": True}))


def test_a_shape_is_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    template = make(PARTS)
    rendered: list[Any] = []
    apply = template._apply
    monkeypatch.setattr(template, "_apply", lambda *args: rendered.append(args) or apply(*args))
    for word in ("a", "b", "c"):
        template.render(parse_messages([{"role": "user", "content": word}]), ChatOptions())
    assert len(rendered) == 2 + 3  # as strings, as lists, and the three
