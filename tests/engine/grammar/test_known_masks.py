"""Masks that are known by a text's position are those that a walk gives."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from grammar_rules import SPECIAL, VOCAB_SIZE
from schemas import FREE, NOT_FREE, OTHERS, VOCABULARY, listed, walked

from pdray.engine.grammar.compiler import GrammarCompiler
from pdray.engine.grammar.grammar import Grammar
from pdray.engine.grammar.json_text import START, JsonRules, JsonText
from pdray.engine.grammar.known_masks import KnownMasks, Mask, MaskMemory, Node
from pdray.engine.grammar.matcher import fill_all
from pdray.engine.grammar.pieces import TokenPieces
from pdray.engine.grammar.runs import Runs
from pdray.structured_outputs import StructuredOutputsParams
from pdray.testing.patience import PATIENCE_S

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "ab", None]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name"],
    "additionalProperties": False,
}
MORE = {
    "person": listed(PERSON),
    "tuple": {"type": "array", "prefixItems": [{"const": "ab"}, {"type": "boolean"}], "items": {"type": "integer"}},
    "other names": {"type": "object", "properties": {"a": {"const": 1}, "ab": True}, "additionalProperties": PERSON},
    "any": {},
}
SHARED = {**FREE, **OTHERS, **MORE, "pattern": NOT_FREE["pattern"]}
NOT_SHARED = {
    **{name: NOT_FREE[name] for name in ("two lengths", "two objects", "all of")},
    **{
        "values that are objects": listed({"enum": [{"a": 1, "b": 2}, {"a": 2, "b": 1}]}),
        "names by pattern": {"type": "object", "patternProperties": {"^a": {"type": "integer"}}},
        "numbers of names": {"type": "object", "additionalProperties": {"type": "null"}, "maxProperties": 2},
    },
}
BY_PIECE = {piece: i for i, piece in reversed(list(enumerate(VOCABULARY))) if piece}


def encode(text: str) -> list[int]:
    """What is written for a text depends on the token before it, with which it is encoded."""
    ids, data = [], text.encode()
    sizes = (5, 4, 3, 2, 1) if len(data) % 2 else (2, 1)
    while data:
        size = next(n for n in sizes if data[:n] in BY_PIECE)
        ids.append(BY_PIECE[data[:size]])
        data = data[size:]
    return ids


def compile_schema(schema: Any, **more: Any) -> Grammar:
    grammars = GrammarCompiler(lambda: TokenPieces(VOCABULARY, SPECIAL, encode))
    return grammars.check(StructuredOutputsParams(json=schema, **more)).result(PATIENCE_S)


def draw(grammar: Grammar, num_outputs: int, num_tokens: int, seed: int) -> float:
    """Draw at random, several outputs by turns, and compare each mask; returns the share that needed no walk."""
    choose, matchers = random.Random(seed), [grammar.matcher() for _ in range(num_outputs)]
    num_known = 0
    for turn in range(num_outputs * num_tokens):
        at = turn % num_outputs
        matcher, words = matchers[at], grammar.empty_mask()
        expected = walked(matcher)
        num_known += matcher.mask is not None
        fill_all([matcher], words[None], None)
        if matcher.mask is None:
            matcher.narrow(words)
        assert not matcher.error and (words == expected).all(), (matcher._text, matcher._done)
        bits = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
        solid = [i for i in bits if i < VOCAB_SIZE and not VOCABULARY[i].isspace()]
        token_id = choose.choice(solid if solid and choose.random() < 0.8 else bits)
        if token_id == VOCAB_SIZE or len(matcher._done) > 250:
            matchers[at] = grammar.matcher()
            continue
        matcher.take(token_id)
        if matcher.ended:
            matchers[at] = grammar.matcher()
    return num_known / num_outputs / num_tokens


@pytest.mark.parametrize("name", SHARED)
def test_masks_are_known_by_position(name: str) -> None:
    grammar = compile_schema(SHARED[name])
    assert grammar.known is not None
    assert draw(grammar, 6, 300, 1) > 0.05


def test_few_masks_are_walked_where_texts_are_alike() -> None:
    grammar = compile_schema(PERSON, disable_any_whitespace=True)
    draw(grammar, 6, 300, 1)
    assert draw(grammar, 6, 300, 2) > 0.9


def test_items_are_counted_where_positions_are_shared() -> None:
    """Also behind tokens that lead from one known mask to the next, whatever number of items there is."""
    items = {
        "type": "object",
        "properties": {"a": {"enum": ["ab", "b"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    grammar = compile_schema(
        {"type": "array", "items": items, "minItems": 9, "maxItems": 12}, disable_any_whitespace=True
    )
    assert draw(grammar, 4, 500, 1) > 0.9


@pytest.mark.parametrize("name", NOT_SHARED)
def test_masks_that_depend_on_more_are_not_shared(name: str) -> None:
    grammar = compile_schema(NOT_SHARED[name])
    assert grammar.known is None
    draw(grammar, 2, 100, 1)


def test_what_is_known_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdray.engine.grammar.known_masks.MAX_MASKS", 8)
    monkeypatch.setattr("pdray.engine.grammar.known_masks.MAX_EDGES", 5)
    grammar = compile_schema(MORE["person"])
    draw(grammar, 6, 100, 1)
    assert grammar.known is not None and 0 < len(grammar.known) <= 9


def test_the_grammar_that_has_learnt_nothing_for_the_longest_forgets() -> None:
    memory = MaskMemory(VOCABULARY, 1200)
    rules, runs = JsonRules.of(PERSON), Runs(VOCABULARY, SPECIAL, 7)
    assert rules is not None
    first, second = (KnownMasks(rules, memory, runs.string) for _ in range(2))
    mask = Mask(np.full(7, -1, np.int32), VOCAB_SIZE)
    for known, num in ((first, 10), (second, 20), (first, 10)):
        for i in range(num):
            text = JsonText(blanks=i)
            known.add(Node(text, mask, None, 0, may_break=False, ended=False), None, b"")
    assert len(first) == 10 and len(second) == 20
    second.add(Node(START, mask, None, 0, may_break=False, ended=False), None, b"")
    for i in range(10):
        second.add(Node(JsonText(blanks=100 + i), mask, None, 0, may_break=False, ended=False), None, b"")
    assert len(first) == 0 and first.find(JsonText(blanks=1), None) is None
    assert len(second) == 30 and second.find(START, None) is not None


@pytest.mark.parametrize(
    ("texts", "are_alike"),
    [
        (['{"name":"a', '{"name":"a'], True),
        (['[{"age":1,', '[{"age":20,'], True),
        (['{"x":1,"y":2,', '{"z":[3, "a"],'], True),
        (['{"name":1,', '{"age":1,'], False),
        (['{"name":1,', '{"x":1,'], False),
        (['{"na\\u006de":1,', '{"x":1,'], False),
        (["[1,", "[1,2,"], True),
        (["[1,", "["], False),
        (["{", '{"a":1,'], False),
        (["[1 ", "[1  "], False),
        (["[1 ,", "[\t1   ,"], True),
        (['["a\\"', '["b\\"'], False),
        (['["a\\\\",', '["b",'], True),
        (["[12", "[123"], False),
        (["[tru", "[true"], False),
    ],
)
def test_positions_leave_out_what_a_grammar_forgets(texts: list[str], are_alike: bool) -> None:
    rules = JsonRules.of(listed(PERSON) | {"minItems": 0})
    assert rules is not None and rules.most_items == 3
    one, other = (rules.after(START, text.encode()) for text in texts)
    assert one is not None and other is not None
    few = rules._replace(most_items=1)
    assert (few.after(START, texts[0].encode()) == few.after(START, texts[1].encode())) == are_alike


@pytest.mark.parametrize("text", ["]", "[1}", "{1", '{"a",', "[,", '{"a"]', "1,"])
def test_a_text_that_is_no_json_has_no_position(text: str) -> None:
    rules = JsonRules.of({})
    assert rules is not None and rules.after(START, text.encode()) is None
