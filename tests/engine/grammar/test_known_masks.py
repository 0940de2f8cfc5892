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
from pdray.engine.grammar.matcher import fill_all
from pdray.engine.grammar.pieces import TokenPieces
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
    """Not the longest pieces first: what is written depends on where a text is cut."""
    ids, data = [], text.encode()
    while data:
        size = next(n for n in (2, 3, 5, 1, 4) if data[:n] in BY_PIECE)
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
