"""Masks within strings and whitespace that are derived from earlier ones are those that a walk gives."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from grammar_rules import PIECES, SPECIAL, VOCAB_SIZE, answers, wanted

from pdray.engine.grammar.compiler import GrammarCompiler
from pdray.engine.grammar.free_strings import has_closed_objects, has_free_strings
from pdray.engine.grammar.matcher import Grammar, GrammarMatcher, fill_all
from pdray.engine.grammar.pieces import TokenPieces
from pdray.engine.request import EngineRequest
from pdray.engine.step.mask_buffer import MaskBuffer
from pdray.engine.step.mask_filling import MaskFiller
from pdray.sampling_params import SamplingParams
from pdray.structured_outputs import StructuredOutputsParams
from pdray.testing.patience import PATIENCE_S

MORE = (
    [("aéb " * 3)[:num] for num in range(2, 13)]
    + [" " * num for num in range(3, 42)]
    + ["\n\t", "\n  ", 'é"', 'ab",', "\\n", "a\\", '":\n']
)
VOCABULARY = [
    piece or (MORE[i - 113].encode() if 113 <= i < 113 + len(MORE) else b"") for i, piece in enumerate(PIECES)
]
SHORT = {"type": "string", "maxLength": 5}
NODE = {
    "type": "object",
    "properties": {
        "v": {"type": "string", "minLength": 1, "maxLength": 6},
        "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
    },
    "required": ["v", "next"],
    "additionalProperties": False,
}
NAMES = {
    "type": "object",
    "properties": {"é": {"type": "string"}, "a": {"type": "string"}},
    "required": ["a", "é"],
    "additionalProperties": False,
}


def listed(items: Any) -> dict[str, Any]:
    return {"type": "array", "minItems": 40, "items": items}


FREE: dict[str, Any] = {
    "limited": listed(SHORT),
    "with a least length": listed({"type": "string", "minLength": 3, "maxLength": 7}),
    "unlimited": listed({"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False}),
    "recursive": {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
    "several types": listed({"anyOf": [SHORT, {"type": "null"}, {"type": "integer"}]}),
    "open": {"type": "object", "properties": {"a": SHORT}, "required": ["a"], "additionalProperties": SHORT},
    "date": listed(
        {"type": "object", "properties": {"a": SHORT, "b": {"type": "string", "format": "date"}}, "required": ["a"]}
    ),
}
# A walk alone knows what may follow in their strings: what follows depends on more than how many characters are left.
NOT_FREE: dict[str, Any] = {
    "pattern": listed({"type": "string", "pattern": "^[a-zé]{3,9}$"}),
    "two lengths": listed({"anyOf": [SHORT, {"type": "string", "enum": ["name ab name ab", "12"]}]}),
    "two objects": listed(
        {
            "anyOf": [
                {"type": "object", "properties": {"a": SHORT, "b": {"const": 1}}, "required": ["a", "b"]},
                {"type": "object", "properties": {"a": {"type": "string", "maxLength": 12}}, "required": ["a"]},
            ]
        }
    ),
    "all of": listed({"allOf": [SHORT, {"type": "string", "minLength": 2}]}),
}
OTHERS: dict[str, Any] = {
    "any names": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "string"}},
        "required": ["name"],
    },
    "any names within": {"type": "object", "properties": {"a": True}, "required": ["a"], "additionalProperties": False},
    "the witness in a name": NAMES,
    "spaces in a value": listed({"enum": ["a  ", "a  b", "a   ab"]}),
}


@pytest.fixture(scope="module")
def compile_schema() -> Callable[[Any], Grammar]:
    grammars = GrammarCompiler(lambda: TokenPieces(VOCABULARY, SPECIAL))
    return lambda schema: grammars.check(StructuredOutputsParams(json=schema)).result(PATIENCE_S)


def walked(matcher: GrammarMatcher) -> np.ndarray[Any, Any]:
    """The mask of this place, by a copy that has taken the same tokens and derives nothing."""
    copy = matcher._matcher.deep_copy()
    assert not matcher._untold or copy.consume_tokens(matcher._untold)
    words = np.zeros(-(-(VOCAB_SIZE + 1) // 32), dtype=np.int32)
    copy.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    matcher.narrow(words)
    return words


def walk(grammar: Grammar, num_tokens: int, seed: int) -> list[str]:
    """Draw at random, and compare each mask; returns the runs whose masks were derived."""
    choose, matcher, runs = random.Random(seed), grammar.matcher(), []
    for _ in range(num_tokens):
        run, words = matcher._run, grammar.empty_mask()
        fill_all([matcher], words[None], None)
        matcher.narrow(words)
        assert not matcher.error
        if run is not None:
            assert grammar.finder is not None
            runs.append("string" if run is grammar.finder.runs.string else "whitespace")
            assert (words == walked(matcher)).all(), matcher._done
        bits = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        blanks, inner = (
            [i for i in bits if i < VOCAB_SIZE and VOCABULARY[i].isspace() == want] for want in (True, False)
        )
        token_id = int(choose.choice(blanks if blanks and choose.random() < 0.3 else inner or list(bits)))
        matcher = grammar.matcher() if token_id == VOCAB_SIZE else matcher
        if token_id < VOCAB_SIZE:
            matcher.take(token_id)
        if matcher.ended:
            matcher = grammar.matcher()
    return runs


@pytest.mark.parametrize("name", FREE)
def test_masks_of_free_strings_are_derived(compile_schema: Callable[[Any], Grammar], name: str) -> None:
    assert has_free_strings(FREE[name])
    runs = walk(compile_schema(FREE[name]), 2000, 1)
    assert runs.count("string") > 10 and runs.count("whitespace") > 10, runs


@pytest.mark.parametrize("name", [*NOT_FREE, *OTHERS])
def test_masks_of_other_strings_are_not(compile_schema: Callable[[Any], Grammar], name: str) -> None:
    schema = {**NOT_FREE, **OTHERS}[name]
    assert has_free_strings(schema) == (name in OTHERS)
    assert "string" not in walk(compile_schema(schema), 1000, 2)


def test_names_that_are_not_listed_are_not_free() -> None:
    assert has_closed_objects(FREE["unlimited"]) and has_closed_objects(FREE["recursive"])
    for schema in (
        True,
        {},
        {"type": "array"},
        {"type": "object"},
        listed({"type": "object", "properties": {"a": {}}}),
    ):
        assert not has_closed_objects(schema), schema


def test_masks_that_stay_are_not_sent_again(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With outputs beside each other that begin and end their strings, and change rows when others end."""
    unlimited = StructuredOutputsParams(json=FREE["unlimited"], disable_any_whitespace=True)
    params = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=20 + 15 * i, structured_outputs=unlimited) for i in range(5)
    ]
    params += [wanted("json", FREE["limited"], max_tokens=60, seed=7), wanted("regex", "[a-z]{50}", max_tokens=40)]
    requests = [EngineRequest(i, [5 + i, 6, 7], each) for i, each in enumerate(params)]
    with monkeypatch.context() as without:
        without.setattr("pdray.engine.grammar.compiler.find_runs", lambda *_: None)
        engine = make()
        engine.grammars = GrammarCompiler(lambda: TokenPieces(VOCABULARY, SPECIAL))
        expected = answers(engine.run(*requests))
    sent: list[int] = []
    change = MaskBuffer.change

    def counted(self: MaskBuffer, changes: Any) -> None:
        sent.append(len(changes))
        change(self, changes)

    monkeypatch.setattr(MaskBuffer, "change", counted)
    for threads in (1, 3):
        engine = make()
        engine.grammars = GrammarCompiler(lambda: TokenPieces(VOCABULARY, SPECIAL))
        engine._mask_filler = MaskFiller(VOCAB_SIZE, engine.model.config.eos_token_ids, threads)
        assert answers(engine.run(*requests)) == expected
    num_masks = 2 * sum(len(tokens) for indices in expected.values() for tokens in indices.values())
    assert sum(sent) < 0.8 * num_masks, (sum(sent), num_masks)
