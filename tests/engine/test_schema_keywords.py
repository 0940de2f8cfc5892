"""Every keyword of a JSON Schema is enforced, means nothing, or is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import FormatChecker
from jsonschema.validators import validator_for

from pdray.engine.grammar.compiler import GrammarCompiler
from pdray.engine.grammar.keywords import ANNOTATIONS, ENFORCED
from pdray.engine.grammar.matcher import GrammarError
from pdray.engine.grammar.pieces import TokenPieces
from pdray.errors import InvalidRequestError
from pdray.structured_outputs import MAX_CHOICES, MAX_GRAMMAR_BYTES, MAX_SCHEMA_BYTES, StructuredOutputsParams
from pdray.testing.patience import PATIENCE_S

COMPILER = GrammarCompiler(lambda: TokenPieces([bytes([i]) for i in range(256)], frozenset()))
TAGGED = [{"type": "object", "properties": {"k": {"const": k}}, "required": ["k"]} for k in ("a", "b")]

# A schema with the keyword, a value that it allows, and one that only the keyword forbids.
KEYWORDS: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "$ref": ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "string"}}}, "x", 1),
    "additionalItems": ({"type": "array", "items": [{"type": "string"}], "additionalItems": False}, ["x"], ["x", 1]),
    "additionalProperties": ({"type": "object", "additionalProperties": {"type": "string"}}, {"a": "b"}, {"a": 1}),
    "allOf": ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, 4, 2),
    "anyOf": ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, None, "x"),
    "const": ({"const": {"a": [1, None]}}, {"a": [1, None]}, {"a": [1]}),
    "enum": ({"enum": ["a", 2, None]}, 2, 3),
    "exclusiveMaximum": ({"type": "integer", "exclusiveMaximum": 9}, 8, 9),
    "exclusiveMinimum": ({"type": "integer", "exclusiveMinimum": 9}, 10, 9),
    "format": ({"type": "string", "format": "ipv4"}, "10.0.0.1", "10.0.0.256"),
    "items": ({"type": "array", "items": {"type": "integer"}}, [1, 2], ["x"]),
    "maxItems": ({"type": "array", "maxItems": 2}, [1, 2], [1, 2, 3]),
    "maxLength": ({"type": "string", "maxLength": 2}, "éé", "ééé"),
    "maxProperties": ({"type": "object", "maxProperties": 1}, {"a": 1}, {"a": 1, "b": 2}),
    "maximum": ({"type": "number", "maximum": 2.5}, 2.5, 2.75),
    "minItems": ({"type": "array", "minItems": 2}, [1, 2], [1]),
    "minLength": ({"type": "string", "minLength": 2}, "éé", "é"),
    "minProperties": ({"type": "object", "minProperties": 1}, {"a": 1}, {}),
    "minimum": ({"type": "integer", "minimum": -7}, -7, -8),
    "multipleOf": ({"type": "integer", "multipleOf": 5}, 15, 16),
    "oneOf": ({"oneOf": TAGGED}, {"k": "a"}, {"k": "c"}),
    "pattern": ({"type": "string", "pattern": "^a+b"}, "aabc", "ba"),
    "patternProperties": ({"type": "object", "patternProperties": {"^n": {"type": "integer"}}}, {"n1": 1}, {"n1": "x"}),
    "prefixItems": ({"type": "array", "prefixItems": [{"type": "integer"}]}, [1, "x"], ["x"]),
    "properties": ({"type": "object", "properties": {"a": {"type": "integer"}}}, {"a": 1}, {"a": "x"}),
    "required": ({"type": "object", "properties": {"a": {}}, "required": ["a"]}, {"a": 1}, {}),
    "type": ({"type": ["integer", "boolean"]}, True, "x"),
}


def compiled(**params: Any) -> Any:
    return COMPILER.check(StructuredOutputsParams(**params)).result(PATIENCE_S)


def allows(grammar: Any, text: str) -> bool:
    """Whether the whole text may come out."""
    try:
        matcher = grammar.matcher(text.encode())
    except GrammarError:
        return False
    words = grammar.empty_mask()
    matcher.fill(words)
    return bool(words[256 // 32] & 1)


def test_every_enforced_keyword_is_tried() -> None:
    assert KEYWORDS.keys() == ENFORCED


@pytest.mark.parametrize("keyword", sorted(KEYWORDS))
def test_what_a_keyword_forbids_cannot_come_out(keyword: str) -> None:
    schema, good, bad = KEYWORDS[keyword]
    if keyword != "additionalItems":  # drafts before 2020-12
        validator = validator_for(schema)(schema, format_checker=FormatChecker())
        assert validator.is_valid(good) and not validator.is_valid(bad)
    grammar = compiled(json=schema)
    for separators in ((",", ":"), (", ", ": ")):
        assert allows(grammar, json.dumps(good, separators=separators, ensure_ascii=False))
        assert not allows(grammar, json.dumps(bad, separators=separators, ensure_ascii=False))


@pytest.mark.parametrize(
    "keyword",
    ["not", "if", "then", "else", "contains", "uniqueItems", "unevaluatedProperties", "unevaluatedItems"]
    + ["dependentRequired", "dependentSchemas", "propertyNames", "$dynamicRef", "$anchor", "minLenght", "x-guidance"],
)
@pytest.mark.parametrize("within", [lambda s: s, lambda s: {"properties": {"a": {"anyOf": [{"items": s}, True]}}}])
def test_other_keywords_are_refused_by_name(keyword: str, within: Any) -> None:
    with pytest.raises(InvalidRequestError, match=repr(keyword).replace("$", r"\$")):
        compiled(json=within({keyword: {}}))


def test_a_name_within_a_schema_is_refused() -> None:
    compiled(json={"$id": "http://here/a", "type": "integer"})
    with pytest.raises(InvalidRequestError, match=r"'\$id' \(at #/properties/a\)"):
        compiled(json={"properties": {"a": {"$id": "http://here/b"}}})


def test_annotations_and_own_extensions_change_nothing() -> None:
    schema = {"type": "integer", "maximum": 5}
    assert not ANNOTATIONS & ENFORCED
    described = {**schema, "title": "t", "default": 3, "x-unit": "m", "examples": [{"not": 1}], "deprecated": True}
    for grammar in (compiled(json=schema), compiled(json=described)):
        assert allows(grammar, "5") and not allows(grammar, "6")


def test_names_of_properties_are_no_keywords() -> None:
    schema = {"type": "object", "properties": {"not": {"type": "integer"}, "if": {"const": {"contains": 1}}}}
    assert allows(compiled(json=schema), '{"not":1,"if":{"contains":1}}')


@pytest.mark.parametrize(
    ("branches", "is_exclusive"),
    [
        (TAGGED, True),
        ([{"type": "string"}, {"type": "integer"}], True),
        ([{"const": 1}, {"enum": [2, 3]}], True),
        ([{"const": 1}, {"const": 1.0}], False),
        ([{"$ref": "#/$defs/a"}, TAGGED[1]], True),
        ([{"$ref": "#/$defs/a"}, TAGGED[0]], False),
        ([{**tagged, "required": []} for tagged in TAGGED], False),
        ([{"type": "object"}, {"type": "object"}], False),
    ],
)
def test_one_of_is_taken_where_its_branches_exclude_each_other(branches: list[Any], is_exclusive: bool) -> None:
    schema = {"oneOf": branches, "$defs": {"a": TAGGED[0]}}
    if is_exclusive:
        compiled(json=schema)
    else:
        with pytest.raises(InvalidRequestError, match="use anyOf"):
            compiled(json=schema)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"json": "{"}, "no JSON"),
        ({"json": "[1]"}, "must be an object"),
        ({"json": False}, "Unsatisfiable"),
        ({"json": {"type": "strnig"}}, "strnig"),
        ({"json": {"type": "string", "format": "phone"}}, "Unknown format: phone"),
        ({"json": {"$ref": "http://elsewhere/a"}}, "elsewhere"),
        ({"json": {"$ref": "#"}}, "no text"),
        ({"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}}, "no text"),
        ({"json": {"type": "number", "multipleOf": 0.1, "minimum": 0.05, "maximum": 0.15}}, "no text"),
        ({"json": {"const": 10**400}}, "number out of range"),
        ({"json": json.loads('{"items":' * 300 + "{}" + "}" * 300)}, "recursion limit"),
        ({"grammar": "start: start"}, "no text"),
        ({"regex": "\ud800"}, "surrogates"),
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"regex": ""}, "empty"),
        ({"grammar": "start: missing"}, "missing"),
        ({"grammar": "root ::= ("}, "GBNF"),
        ({"grammar": 'start: "a" <|im_end|> "b"'}, "<|im_end|>"),
        ({"grammar": 'start: "a" <[5]>'}, "tokens are no text"),
        ({"grammar": "start: a\na[lazy, temperature=0.5]: /b+/"}, "temperature"),
        ({"grammar": 'start: %json {"type": "array", "uniqeItems": true}'}, "'uniqeItems'"),
        ({"grammar": 'start: %json {"x-guidance": {"lenient": true}, "not": {}}'}, "'x-guidance'"),
        ({}, "exactly one of"),
        ({"regex": "a", "whitespace_pattern": " "}, "whitespace_pattern"),
        ({"json_object": True, "whitespace_pattern": " ", "disable_any_whitespace": True}, "whitespace_pattern"),
        ({"regex": "a", "json_object": True}, "regex and json_object"),
        ({"choice": []}, "between 1 and"),
        ({"choice": ["a", ""]}, "non-empty"),
        ({"json": {"title": "x" * MAX_SCHEMA_BYTES}}, "at most"),
        ({"regex": "a" * (MAX_GRAMMAR_BYTES + 1)}, "at most"),
    ],
)
def test_what_is_wrong_is_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message.replace("|", r"\|")) as raised:
        compiled(**params)
    assert raised.value.param == "structured_outputs" and ("<" in message or "<backtrace" not in str(raised.value))


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        (
            "date",
            "2024-02-29 2000-02-29 0004-02-29 1999-12-31 0001-01-01",
            "2023-02-29 1900-02-29 0000-01-01",
        ),
        ("date", "2024-11-30 2400-02-29", "2024-11-31 2100-02-29 2024-00-10 2024-13-01 2024-1-01 24-01-01"),
        ("time", "00:00:00Z 23:59:59.123456789+23:59", "24:00:00Z 12:60:00Z 12:00:60Z 12:00:00 12:00:00+24:00"),
        ("date-time", "2024-02-29T12:30:00-08:00", "2023-02-29T12:30:00Z 2024-02-29 12:30:00Z"),
    ],
)
def test_dates_and_times_exist(name: str, good: str, bad: str) -> None:
    grammar = compiled(json={"type": "string", "format": name})
    assert [text for text in good.split() if not allows(grammar, f'"{text}"')] == []
    assert [text for text in bad.split() if allows(grammar, f'"{text}"')] == []
    both = compiled(json={"type": "string", "format": name, "pattern": "^(2024|1)"})
    assert not allows(both, '"2023-01-01T00:00:00Z"') and not allows(both, '"23:00:00Z"')


def all_of_any_of(number: int) -> dict[str, Any]:
    parts = [[{"properties": {f"{side}{i}": {"type": "string"}}} for side in "ab"] for i in range(number)]
    return {"allOf": [{"anyOf": part} for part in parts]}


def nested(depth: int, keyword: str) -> str:
    return f'{{"{keyword}":' * depth + "{}" + "}" * depth


@pytest.mark.parametrize(
    "bomb",
    [
        {"json": all_of_any_of(20)},
        {"json": {"type": "string", "pattern": "(.*a.{40}){3}", "minLength": 5000, "maxLength": 90000}},
        {"json": nested(5000, "items")},
        {"json": nested(100_000 // 12, "items")},
        {"regex": "(" * 3000 + "a" + ")" * 3000},
        {"grammar": "start: A\nA: " + " & ".join(f"/.*[a-{c}].{{{30 + i}}}/" for i, c in enumerate("bcdefghijklmnop"))},
    ],
    ids=["schemas", "strings", "depth", "more depth", "groups", "intersection"],
)
def test_a_compile_bomb_is_refused(bomb: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be enforced"):
        compiled(**bomb)
    assert allows(compiled(regex="a+"), "aa"), "the compiler goes on"


def test_what_looks_like_a_token_may_stand_in_texts_and_comments() -> None:
    grammar = compiled(
        grammar="""// <a> %json {"x": 1}
start: "<a>" B C %json {"const": "<c>"} # <d>
B: /<b\\/>/
C: /<[a]>/
"""
    )
    assert allows(grammar, '<a><b/><a>"<c>"') and not allows(grammar, '<a><b/><b>"<c>"')
    assert allows(compiled(grammar='root ::= "<a>" [<>]'), "<a>>")


def test_long_chains_of_rules_do_not_overflow_the_stack() -> None:
    number = MAX_GRAMMAR_BYTES // 16
    compiled(grammar="start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(number)) + f'\nr{number}: "a"')


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4, unique=True))
def test_choices_are_literal(choices: list[str]) -> None:
    grammar = compiled(choice=tuple(choices))
    assert all(allows(grammar, each) for each in choices)
    assert not allows(grammar, "".join(choices) + "x")


def test_there_may_be_as_many_choices_as_the_limit_says() -> None:
    choices = tuple(str(i) for i in range(MAX_CHOICES))
    grammar = compiled(choice=choices)
    assert allows(grammar, "7") and allows(grammar, choices[-1]) and not allows(grammar, str(MAX_CHOICES))


@pytest.mark.parametrize("params", [{"choice": ("<s>",)}, {"json": {"const": "<s>"}}])
def test_a_text_that_looks_like_a_special_token_is_written_in_others(params: dict[str, Any]) -> None:
    special = 256

    def encode(text: str) -> list[int]:  # as tokenizers do
        before, found, behind = text.partition("<s>")
        return [*before.encode(), *([special] if found else ()), *behind.encode()]

    pieces = TokenPieces([*(bytes([i]) for i in range(special)), b"<s>"], frozenset({special}), encode)
    grammar = GrammarCompiler(lambda: pieces).check(StructuredOutputsParams(**params)).result(PATIENCE_S)
    text = "<s>" if "choice" in params else '"<s>"'
    for length in range(len(text)):
        words = grammar.empty_mask()
        grammar.matcher(text[:length].encode()).fill(words)
        assert words[ord(text[length]) // 32] >> ord(text[length]) % 32 & 1
        assert not words[special // 32] >> special % 32 & 1


def test_requests_with_equal_parameters_have_one_grammar() -> None:
    """See grammar/test_sharing.py. A failure is remembered."""
    good, wrong = StructuredOutputsParams(regex="a"), StructuredOutputsParams(regex="(a")
    assert COMPILER.check(good) is COMPILER.check(good) is COMPILER.compile(good)
    assert COMPILER.compile(good).result(PATIENCE_S) is COMPILER.compile(good).result(PATIENCE_S)
    assert isinstance(COMPILER.check(wrong).exception(PATIENCE_S), InvalidRequestError)
    assert COMPILER.compile(wrong) is COMPILER.compile(wrong)
