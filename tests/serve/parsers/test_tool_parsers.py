"""Tool calls are found however the text is cut; what only looks like a call stays text."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdray.serve.parsers.answer import AnswerFormat
from pdray.serve.parsers.events import CallArguments, CallEnd, CallStart, Event, Parser, Reasoning, Text, joined
from pdray.serve.parsers.forced import NamedCallParser, RequiredCallsParser
from pdray.serve.parsers.hermes import HermesParser
from pdray.serve.parsers.json_value import JsonValue
from pdray.serve.parsers.llama3_json import Llama3JsonParser
from pdray.serve.parsers.pythonic import PythonicParser
from pdray.serve.parsers.reasoning import ThinkParser, ends_in_thoughts

NAMES = {"get", "now"}
PARSERS: dict[str, Callable[[], Parser]] = {
    "hermes": lambda: HermesParser(NAMES),
    "llama3_json": lambda: Llama3JsonParser(NAMES),
    "pythonic": lambda: PythonicParser(NAMES),
    "required": lambda: RequiredCallsParser(NAMES),
    "named": lambda: NamedCallParser("get"),
    "think": lambda: ThinkParser(thinking=False),
    "thinking": lambda: ThinkParser(thinking=True),
    "both": AnswerFormat(lambda: ThinkParser(thinking=False), lambda: HermesParser(NAMES)).parser,
}


def parsed(parser: Parser, *pieces: str) -> list[Event]:
    events = [event for piece in pieces for event in parser.feed(piece)]
    return joined(events + parser.finish())


def call(name: str, arguments: str) -> list[Event]:
    return [CallStart(name), CallArguments(arguments), CallEnd()]


GET = '{"name": "get", "arguments": {"city": "Paris", "n": [1, {"a": null}]}}'
GET_ARGUMENTS = '{"city": "Paris", "n": [1, {"a": null}]}'
NOW = '{"name":"now"}'


def tags(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in calls)


@pytest.mark.parametrize(
    "text,expected",
    [
        (tags(GET), call("get", GET_ARGUMENTS)),
        (f"Let me see. \n{tags(GET, NOW)}\n", [Text("Let me see."), *call("get", GET_ARGUMENTS), *call("now", "{}")]),
        (
            f"{tags(GET)} Done. {tags(NOW)}!",
            [*call("get", GET_ARGUMENTS), Text("Done."), *call("now", "{}"), Text("!")],
        ),
        (tags(f"[{GET}, {NOW}]"), [*call("get", GET_ARGUMENTS), *call("now", "{}")]),
        (tags('{"arguments": {"a": 1}, "id": "7", "name": "get"}'), call("get", '{"a": 1}')),
        (tags('{"name": "get", "parameters": {"a": "</tool_call>"}}'), call("get", '{"a": "</tool_call>"}')),
        (f"<tool_call>{GET}", call("get", GET_ARGUMENTS)),  # ended by its end-of-sequence
        (f"<tool_call>{GET[:-1]}", call("get", GET_ARGUMENTS)),  # one brace too few
        # cut
        (f"<tool_call>{GET[:40]}", [CallStart("get"), CallArguments(GET[29:40])]),
        (f"<tool_call>{GET[:25]}", [Text(f"<tool_call>{GET[:25]}")]),
        ("a <tool_ca", [Text("a <tool_ca")]),
        (f"<tool_call>{GET}</tool_", call("get", GET_ARGUMENTS)),
        # no calls
        ("a < b\n", [Text("a < b\n")]),
        (tags('{"name": "unknown", "arguments": {}}'), [Text(tags('{"name": "unknown", "arguments": {}}'))]),
        (tags("get()"), [Text(tags("get()"))]),
        (tags("[]"), [Text(tags("[]"))]),
        (tags('{"name": "get", "arguments": "x"}'), [Text(tags('{"name": "get", "arguments": "x"}'))]),
        (tags('{"arguments": {}}'), [Text(tags('{"arguments": {}}'))]),
        (f"<tool_call>x {tags(NOW)}", [Text("<tool_call>x"), *call("now", "{}")]),
    ],
)
def test_hermes(text: str, expected: list[Event]) -> None:
    assert parsed(HermesParser(NAMES), text) == expected


@pytest.mark.parametrize(
    "text,expected",
    [
        (GET, call("get", GET_ARGUMENTS)),
        (f"\n<|python_tag|>{GET}; {NOW}", [*call("get", GET_ARGUMENTS), *call("now", "{}")]),
        (f"{GET}\nThat is it.", [*call("get", GET_ARGUMENTS), Text("That is it.")]),
        (f"{GET}; and", [*call("get", GET_ARGUMENTS), Text("; and")]),
        (GET[:40], [CallStart("get"), CallArguments(GET[29:40])]),
        (f"Use {GET}", [Text(f"Use {GET}")]),
        ('{"answer": 42}', [Text('{"answer": 42}')]),
        ("{", [Text("{")]),
        ("<|python", [Text("<|python")]),
        (" \n", [Text(" \n")]),
    ],
)
def test_llama3_json(text: str, expected: list[Event]) -> None:
    assert parsed(Llama3JsonParser(NAMES), text) == expected


@pytest.mark.parametrize(
    "text,expected",
    [
        ('[get(city="Paris", n=[1, {"a": None}])]', call("get", GET_ARGUMENTS)),
        (
            "[now(), get(a='it\\'s ]', b=True, c=-1.5)]",
            [*call("now", "{}"), *call("get", '{"a": "it\'s ]", "b": true, "c": -1.5}')],
        ),
        ("[now()] Done.", [*call("now", "{}"), Text("Done.")]),
        ("[now(), get(a=", [*call("now", "{}"), Text(", get(a=")]),
        ("[get(1)]", [Text("[get(1)]")]),
        ("[get(a=b)]", [Text("[get(a=b)]")]),
        ("[get(a=1e999)]", [Text("[get(a=1e999)]")]),
        ("[unknown()]", [Text("[unknown()]")]),
        ("[1, 2]", [Text("[1, 2]")]),
        ("now()", [Text("now()")]),
        (r"[get(a='\ud800')]", [Text(r"[get(a='\ud800')]")]),
    ],
)
def test_pythonic(text: str, expected: list[Event]) -> None:
    assert parsed(PythonicParser(NAMES), text) == expected


@pytest.mark.parametrize(
    "thinking,text,expected",
    [
        (False, "<think>\nHm.\n</think>\n\n4", [Reasoning("Hm."), Text("4")]),
        (True, "\nHm. <b>\n</think>\n4", [Reasoning("Hm. <b>"), Text("4")]),
        (False, "<think>\n\n</think>\n\n4", [Text("4")]),
        (False, " 4 <think>no</think>", [Text(" 4 <think>no</think>")]),
        (True, "a</think>b</think>", [Reasoning("a"), Text("b</think>")]),
        (True, "a\n</thi", [Reasoning("a\n</thi")]),
        (False, "<thi", [Text("<thi")]),
        (False, "<think>a", [Reasoning("a")]),
    ],
)
def test_thoughts(thinking: bool, text: str, expected: list[Event]) -> None:
    assert parsed(ThinkParser(thinking=thinking), text) == expected


def test_a_prompt_may_open_the_thoughts() -> None:
    assert ends_in_thoughts("<think>a</think>b<|assistant|><think>\n")
    assert not ends_in_thoughts("<|assistant|><think>\n\n</think>\n\n")
    assert not ends_in_thoughts("hi")


def test_forced_calls() -> None:
    required = '[{"name": "get", "parameters": {"a": 1}}, {"name": "now", "parameters": {}}]'
    assert parsed(RequiredCallsParser(NAMES), required) == [*call("get", '{"a": 1}'), *call("now", "{}")]
    assert parsed(RequiredCallsParser(NAMES), required[:38]) == [CallStart("get"), CallArguments('{"a": 1')]
    for end in (40, 42, 46, 60):
        assert parsed(RequiredCallsParser(NAMES), required[:end]) == call("get", '{"a": 1}')
    for end in range(required.index('{"a"') + 1):
        assert parsed(RequiredCallsParser(NAMES), required[:end]) == [], "what is no call yet is no content"
    assert parsed(NamedCallParser("get"), ' {"a": 1}\n') == call("get", '{"a": 1}')
    assert parsed(NamedCallParser("get"), '{"a": ') == [CallStart("get"), CallArguments('{"a": ')]


FRAGMENTS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<|python_tag|>", "<tool_", "\n", " ", ",", ";", ":"),
    *("[", "]", "{", "}", '"', "'", "\\", "u00e9", '"name"', '"arguments"', '"parameters"', '"get"', '"now"', '"x"'),
    *("get", "now", "(", ")", "a=", "1", "-0.5e3", "01", "true", "None", "é", "x", GET, NOW, tags(GET), "[now()]"),
]


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A text of fragments of every format, and the same text in pieces."""
    whole = "".join(draw(st.lists(st.sampled_from(FRAGMENTS), max_size=14)))
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    return whole, [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


@pytest.mark.parametrize("name", PARSERS)
@given(cut=cut_texts())
def test_pieces_give_what_the_whole_gives(name: str, cut: tuple[str, list[str]]) -> None:
    whole, pieces = cut
    expected = parsed(PARSERS[name](), whole)
    assert parsed(PARSERS[name](), *pieces) == expected
    assert parsed(PARSERS[name](), *whole) == expected
    _check(expected)


def _check(events: list[Event]) -> None:
    """Calls are of known tools, in order, and a complete one's arguments are a JSON object."""
    arguments: str | None = None
    for event in events:
        match event:
            case CallStart(name):
                assert name in NAMES
                arguments = ""
            case CallArguments(text):
                assert arguments is not None
                arguments += text
            case CallEnd():
                assert arguments is not None and isinstance(json.loads(arguments), dict)
                arguments = None


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "pythonic"])
@given(text=st.lists(st.sampled_from([f for f in FRAGMENTS if "get" not in f and "now" not in f])).map("".join))
def test_without_a_call_the_text_is_the_text(name: str, text: str) -> None:
    assert parsed(PARSERS[name](), text) == ([Text(text)] if text else [])


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)


@given(
    arguments=st.dictionaries(st.text(max_size=4), values, max_size=3),
    ascii=st.booleans(),
    indent=st.sampled_from([None, 2]),
)
def test_arguments_arrive_as_written(arguments: dict[str, Any], ascii: bool, indent: int | None) -> None:
    written = json.dumps(arguments, ensure_ascii=ascii, indent=indent)
    body = f'{{"name": "get", "arguments": {written}}}'
    for name, text in (("hermes", tags(body)), ("llama3_json", body), ("required", f"[{body}]"), ("named", written)):
        assert parsed(PARSERS[name](), *text) == call("get", written)


@given(
    text=st.lists(
        st.sampled_from(
            ['"a"', "{", "}", "[", "]", ",", ":", "1", "-", "1.", "01", "true", "nul", " ", '"\\u00', "e5", '"', "\n"]
        )
    ).map("".join)
)
def test_json_is_what_python_calls_json(text: str) -> None:
    value = JsonValue()
    end = value.feed(text + " ")
    try:
        json.loads(text)
        is_json = True
    except ValueError:
        is_json = False
    assert (value.done and not text[end:].strip()) is is_json


def test_reasons() -> None:
    """tool_calls only where the engine says stop, and every call is complete."""
    how = AnswerFormat(tools=lambda: HermesParser(NAMES))
    for text, reason, expected in (
        (tags(NOW), "stop", "tool_calls"),
        (tags(NOW), "length", "length"),
        (tags(NOW) + f"<tool_call>{GET[:40]}", "stop", "stop"),
        (f"<tool_call>{GET[:40]}", "length", "length"),
        ("hi", "stop", "stop"),
        (tags(NOW), "abort", "abort"),
    ):
        parser = how.parser()
        parsed(parser, text)
        assert parser.finish_reason(reason) == expected
    named = AnswerFormat(tools=lambda: NamedCallParser("now"), named=True).parser()
    parsed(named, "{}")
    assert (named.num_complete, named.finish_reason("stop")) == (1, "stop")


def test_a_single_call() -> None:
    parser = AnswerFormat(tools=lambda: HermesParser(NAMES), single_call=True).parser()
    assert parsed(parser, f"{tags(NOW, GET)} Bye.") == [*call("now", "{}"), Text("Bye.")]
    assert (parser.num_calls, parser.finish_reason("stop")) == (1, "tool_calls")
