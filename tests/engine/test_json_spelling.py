"""Strings of JSON: a name or a text has no second spelling that a schema would not know."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from pdray.engine.grammar.compiler import GrammarCompiler
from pdray.engine.grammar.grammar import Grammar
from pdray.engine.grammar.matcher import GrammarError, num_words
from pdray.engine.grammar.pieces import TokenPieces
from pdray.engine.grammar.spelling import STEPS, Spelling
from pdray.errors import InvalidRequestError
from pdray.structured_outputs import StructuredOutputsParams
from pdray.testing.patience import PATIENCE_S

WORDS = (b"\\u00", b"\\u", b"a\\", b"\\\\u0061", b"0061", b'\\"', b"\\/", b"\\n\\u001f", b"e9", b"n1")
PIECES = [bytes([i]) for i in range(256)] + list(WORDS)
COMPILER = GrammarCompiler(lambda: TokenPieces(PIECES, frozenset()))
OPEN = {"type": "object", "properties": {"a": {"type": "integer"}, "é🐲/": {"type": "integer"}}}


def compiled(schema: Any) -> Grammar:
    return COMPILER.check(StructuredOutputsParams(json=schema)).result(PATIENCE_S)


def allows(grammar: Grammar, text: str) -> bool:
    """Whether the whole text may come out, byte by byte, each of which its mask must allow."""
    matcher, words = grammar.matcher(), grammar.empty_mask()
    for byte in text.encode():
        matcher.fill(words)
        if not words[byte // 32] >> byte % 32 & 1:
            with pytest.raises(GrammarError):
                matcher.take(byte)
            return False
        matcher.take(byte)
    matcher.fill(words)
    return bool(words[grammar.vocab_size // 32] >> grammar.vocab_size % 32 & 1)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (OPEN, ['{"a":1}', '{"b":"x"}', '{"é🐲/":1}', r'{"\n\"\\":0}', r'{"\u0001":0}'], [r'{"\u0061":"x"}']),
        (OPEN, [], [r'{"\u00e9\ud83d\udc32/":"x"}', r'{"é🐲\/":"x"}', r'{"\u0062":1}', '{"a":"x"}', '{"é🐲/":"x"}']),
        ({"type": "object", "patternProperties": {"^n": {"type": "integer"}}}, ['{"n1":1}'], [r'{"\u006e1":"x"}']),
        ({"type": "object", "required": ["a"], "additionalProperties": {"const": 1}}, ['{"a":1}'], [r'{"\u0061":1}']),
        ({"type": "object"}, [r'{"a":"\\u0061"}', r'{"\\u0061":"\u001f"}'], [r'{"a":"\u0061"}']),
    ],
)
def test_a_name_is_spelled_in_one_way(schema: Any, good: list[str], bad: list[str]) -> None:
    grammar = compiled(schema)
    for text in good:
        assert json.loads(text) is not None and allows(grammar, text), text
    for text in bad:
        assert json.loads(text) is not None and not allows(grammar, text), text


def test_every_character_can_come_out() -> None:
    """Whatever of its spellings is drawn, there is a way on."""
    for code in (*range(256), 0x2028, 0xFFFD, 0x1F432):
        grammar = compiled({"enum": [chr(code) + "x", "x" + chr(code)]})
        for seed in range(3):
            matcher, words, text, chance = grammar.matcher(), grammar.empty_mask(), b"", random.Random(seed)
            while not matcher.ended:
                matcher.fill(words)
                ids = [i for i in range(len(PIECES)) if words[i // 32] >> i % 32 & 1]
                assert ids, (hex(code), text)
                token_id = chance.choice(ids)
                matcher.take(token_id)
                text += PIECES[token_id]
            assert json.loads(text) in (chr(code) + "x", "x" + chr(code))


def test_masks_are_what_the_steps_say() -> None:
    """Against each token's bytes one by one, from every state."""
    spelling = Spelling(PIECES, num_words(len(PIECES) + 1))
    for state in range(len(STEPS)):
        for token_id, piece in enumerate(PIECES):
            now: int | None = state
            for byte in piece:
                now = None if now is None else STEPS[now].get(byte, 0 if now == 0 else None)
            allowed = bool(spelling.allowed[state][token_id // 32] >> token_id % 32 & 1)
            assert allowed == (now is not None) and spelling.after(state, token_id) == now, (state, piece)


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"properties": {"a\nb": {}}}, r"'?\"a\\nb\" \(at #, in properties or required\)"),
        ({"items": {"required": ["\x7f"]}}, "control character"),
        ({"type": "object", "minProperties": 2}, "minProperties 2"),
        ({"type": "object", "minProperties": 3, "properties": {"a": {}}, "required": ["a"]}, "minProperties 3"),
        ({"$ref": "http://localhost/a.json"}, r"its \$ref or \$schema leads out"),
        ({"patternProperties": {"a*": {}, "aa*": {}}}, "several of its patternProperties"),
        ({"type": "number", "maximum": 1e30}, "maximum"),
        ({"pattern": "(?=a)"}, "a pattern"),
        ({"enum": []}, "no value satisfies it"),
    ],
)
def test_refusals_name_the_keyword(schema: Any, named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        compiled(schema)


def test_as_many_properties_as_differ_by_name() -> None:
    schema = {"type": "object", "minProperties": 2, "properties": {"a": {}}, "required": ["a"]}
    grammar = compiled(schema)
    assert allows(grammar, '{"a":1,"b":2}') and not allows(grammar, '{"a":1}') and not allows(grammar, '{"a":1,"a":2}')


@pytest.mark.parametrize(
    ("name", "is_valid"),
    [
        *((name, True) for name in ("a", "ab", "a-b", "a--b", "ab-c", "abc-d", "1.b2.example.com", "a" * 63)),
        *((name, False) for name in ("", "-a", "a-", "a..b", "a.", "ab--c", "xn--a", "a_b", "é", "a" * 64)),
        (".".join(["a" * 63] * 3 + ["b" * 61]), True),
        (".".join(["a" * 63] * 3 + ["b" * 62]), False),
    ],
)
def test_host_names(name: str, is_valid: bool) -> None:
    schemas = [{"type": "string", "format": "hostname"}, {"type": "string", "format": "hostname", "maxLength": 1000}]
    assert all(allows(compiled(schema), json.dumps(name)) is is_valid for schema in schemas)
    shorter = compiled({"type": "string", "format": "hostname", "maxLength": 5})
    assert allows(shorter, json.dumps(name)) is (is_valid and len(name) <= 5)
