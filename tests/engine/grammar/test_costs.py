"""What a hostile grammar may cost: work is bounded, and nobody else's steps are fewer for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from grammar_rules import PIECES, SPECIAL, text_of, wanted

from pdray.engine.grammar.compiler import GrammarCompiler
from pdray.engine.grammar.pieces import TokenPieces
from pdray.engine.request import EngineRequest
from pdray.errors import InvalidRequestError
from pdray.sampling_params import SamplingParams
from pdray.structured_outputs import StructuredOutputsParams
from pdray.testing.patience import PATIENCE_S

AMBIGUOUS = 'start: a\na: a a a | a a | "x" | "y"'  # a text of n can be read in more ways than 2 to the n
FREE = SamplingParams(temperature=1.0, seed=13, max_tokens=150, ignore_eos=True)


@pytest.mark.parametrize("kind", ["choice", "regex", "json", "grammar"])
def test_a_long_text_that_is_the_only_one_is_not_encoded_in_every_step(kind: str) -> None:
    """Each step takes the first of its tokens; the rest of it costs nothing then."""
    text = "".join("abcdefghij klmnopqrstuvwxyz"[i * i % 27] for i in range(20_000))
    lengths = []

    def encode(text: str) -> list[int]:
        lengths.append(len(text))
        return [PIECES.index(char.encode()) for char in text]

    value = {"choice": (text,), "regex": text, "json": {"const": text}, "grammar": f'start: "{text}"'}[kind]
    compiler = GrammarCompiler(lambda: TokenPieces(PIECES, SPECIAL, encode))
    grammar = compiler.check(StructuredOutputsParams(**{kind: value})).result(PATIENCE_S)
    matcher, words = grammar.matcher(), grammar.empty_mask()
    for char in (f'"{text}"' if kind == "json" else text)[:100]:
        matcher.fill(words)
        token_id = PIECES.index(char.encode())
        assert words[token_id // 32] >> token_id % 32 & 1
        matcher.take(token_id)
    assert len(lengths) > 100 and max(lengths) <= 256


@pytest.mark.parametrize("ahead", [False, True])
def test_an_ambiguous_grammar_ends_its_own_request_early(make: Callable[..., Any], ahead: bool) -> None:
    alone = make(async_scheduling=ahead).run(EngineRequest("free", [5, 6, 7], FREE))
    bomb = wanted("grammar", AMBIGUOUS, max_tokens=400, ignore_eos=True)
    engine = make(async_scheduling=ahead)
    engine.run(EngineRequest("free", [5, 6, 7], FREE), EngineRequest("bomb", [5, 6, 7], bomb))
    news = engine.updates["bomb"][-1]
    assert news.finished and news.param == "structured_outputs" and "items" in (news.failure or "")
    assert 50 < len(engine.ids("bomb")) < 150 and set(text_of(engine.ids("bomb"))) <= {"x", "y"}
    assert engine.tokens["free"] == alone.tokens["free"]
    tokens = engine.stats().num_output_tokens
    assert tokens == 150 + len(engine.ids("bomb")) and engine.stats().num_steps <= alone.stats().num_steps + 3
    engine.assert_empty()


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "integer", "multipleOf": 999_983}, "multipleOf 999983"),
        ({"type": "number", "multipleOf": 12.34567}, "multipleOf 12.34567"),
        ({"type": "array", "items": {"multipleOf": 10**15 + 37}}, "multipleOf 1000000000000037"),
        ({"allOf": [{"type": "integer", "multipleOf": p} for p in (7, 11, 13, 17, 19, 23, 29)]}, "multiple 215656441"),
        ({"$ref": "#/$defs/a", "multipleOf": 9973, "$defs": {"a": {"multipleOf": 9967}}}, "least common multiple"),
    ],
)
@pytest.mark.parametrize("kind", ["json", "grammar"])
def test_a_multiple_that_takes_too_long_is_refused(
    grammars: GrammarCompiler, schema: Any, named: str, kind: str
) -> None:
    text = StructuredOutputsParams(json=schema).text
    params = StructuredOutputsParams(**{kind: text if kind == "json" else f"start: x\nx: %json {text}"})
    with pytest.raises(InvalidRequestError, match=named):
        grammars.check(params).result(PATIENCE_S)


@pytest.mark.parametrize("multiple", [1, 7, 60, 3600, 86_400, 10**6, 0.01, 0.25, 1e-7])
def test_usual_multiples_are_enforced(grammars: GrammarCompiler, multiple: float) -> None:
    schema = {"type": "number", "multipleOf": multiple}
    grammars.check(StructuredOutputsParams(json=schema)).result(PATIENCE_S)
    apart = {"type": "object", "properties": {"a": schema, "b": {"type": "integer", "multipleOf": 9973}}}
    grammars.check(StructuredOutputsParams(json=apart)).result(PATIENCE_S)
