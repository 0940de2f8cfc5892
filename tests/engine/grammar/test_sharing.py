"""Outputs with equal parameters share what is known of their grammar, and threads walk grammars beside the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from grammar_rules import PIECES, RULES, SCHEMA, SPECIAL, VOCAB_SIZE, answers, requests, wanted

from pdray.engine.grammar import compiler, pieces
from pdray.engine.grammar.compiler import GrammarCompiler
from pdray.engine.grammar.pieces import TokenPieces
from pdray.engine.request import EngineRequest
from pdray.engine.step.mask_filling import MaskFiller
from pdray.structured_outputs import StructuredOutputsParams
from pdray.testing.patience import PATIENCE_S

FORM = StructuredOutputsParams(json=SCHEMA)
GROWING = "((a{1,100}){1,100}){1,100}"  # what may follow grows with every character


def make_compiler(most_starts: int = 1) -> GrammarCompiler:
    compiled = GrammarCompiler(lambda: TokenPieces(PIECES, SPECIAL), most_starts)
    for params in RULES.values():
        if params.structured_outputs is not None:
            compiled.check(params.structured_outputs).result(PATIENCE_S)
    return compiled


@pytest.fixture
def with_threads(make: Callable[..., Any]) -> Callable[..., Any]:
    """Engines that fill masks as on CUDA, beside the booking of the step before."""
    grammars = make_compiler(3)

    def with_threads(**settings: Any) -> Any:
        engine = make(**settings)
        engine.grammars = grammars
        engine._mask_filler = MaskFiller(VOCAB_SIZE, engine.model.config.eos_token_ids, 3)
        return engine

    return with_threads


@pytest.mark.parametrize("settings", [{}, {"num_kv_blocks": 17, "max_num_seqs": 8}], ids=["roomy", "preempting"])
@pytest.mark.parametrize("ahead", [False, True])
def test_threads_change_no_token(
    make: Callable[..., Any], with_threads: Callable[..., Any], settings: dict[str, int], ahead: bool
) -> None:
    engine = with_threads(async_scheduling=ahead, **settings).run(*requests())
    assert answers(engine) == answers(make().run(*requests()))
    engine.assert_empty()


def test_a_fault_of_a_thread_is_the_engines(with_threads: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of luck")

    engine = with_threads()
    monkeypatch.setattr("pdray.engine.grammar.matcher.Fill.run", fail)
    engine.run(EngineRequest("r", [5, 6, 7], RULES["schema"]))
    assert "out of luck" in (engine.updates["r"][-1].failure or "")


def count_compilations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    compiled = []
    start = GrammarCompiler._start

    def counted(self: GrammarCompiler, *args: Any) -> Any:
        compiled.append(args)
        return start(self, *args)

    monkeypatch.setattr(GrammarCompiler, "_start", counted)
    return compiled


@pytest.mark.parametrize(("most", "expected"), [(1, 1), (3, 3), (64, 5)])
def test_requests_with_one_schema_share_what_is_compiled(
    monkeypatch: pytest.MonkeyPatch, most: int, expected: int
) -> None:
    compiled = count_compilations(monkeypatch)
    grammars = GrammarCompiler(lambda: TokenPieces(PIECES, SPECIAL), most)
    grammar = grammars.check(FORM).result(PATIENCE_S)
    assert [grammars.compile(FORM).result() for _ in range(20)] == [grammar] * 20
    grammars.check(StructuredOutputsParams(regex="a")).result(PATIENCE_S)  # behind all that was to be compiled
    assert len(compiled) == expected + 1
    matchers = [grammar.matcher() for _ in range(20)]
    groups = [matcher.shared_with for matcher in matchers]
    assert len(set(groups)) == expected and max(map(groups.count, groups)) == -(-20 // expected)


def test_no_output_pays_for_what_others_have_derived(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where too much is shared each goes on as if it had been alone from its first token."""
    expected = answers(make().run(*requests()))
    for states in (40, 90, 200):
        monkeypatch.setattr(compiler, "MAX_SHARED_STATES", states)
        engine = make()
        engine.grammars = make_compiler()
        params = wanted("json", SCHEMA, max_tokens=150, seed=5)
        more = [EngineRequest(i, [5, 6, 7 + i], params) for i in range(3)]
        engine.run(*requests(), *more)
        got = answers(engine)
        assert {key: got[key] for key in expected} == expected, states
        grammar = engine.grammars.check(FORM).result()
        assert grammar.starts.is_expensive == (states < 200), "else the test shows nothing"


def test_an_expensive_output_ends_where_it_would_alone(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "MAX_SHARED_STATES", 300)
    monkeypatch.setattr(compiler, "MAX_STATES", 700)
    bomb = wanted("regex", GROWING, max_tokens=400, ignore_eos=True)
    lengths = []
    for delays in ((0,), (0, 3, 7)):
        engine = make()
        engine.grammars = make_compiler()
        engine.grammars.check(bomb.structured_outputs).result(PATIENCE_S)
        for i, delay in enumerate(delays):
            for _ in range(delay):
                engine.step()
            engine.add(EngineRequest(i, [5, 6, 7], bomb))
        while engine.has_work():
            engine.step()
        for i in range(len(delays)):
            assert "too many" in (engine.updates[i][-1].failure or ""), engine.updates[i][-1]
            lengths.append(len(engine.ids(i)))
    assert 10 < lengths[0] < 400 and len(set(lengths)) == 1, lengths


def test_ids_that_stand_for_nothing_are_in_no_trie() -> None:
    wrapped = pieces._Wrapped(TokenPieces([b"a", b"", b"<s>", b""], frozenset({1, 2, 3})))
    assert wrapped.special_token_ids == [2, 4] and wrapped.tokens == [b"a", b"", b"<s>", b"", b"<end>"]
    padded = TokenPieces([*PIECES, *[b""] * 5000], SPECIAL | frozenset(range(len(PIECES), len(PIECES) + 5000)))
    words = GrammarCompiler(lambda: padded).check(FORM).result(PATIENCE_S).empty_mask()
    GrammarCompiler(lambda: padded).check(FORM).result(PATIENCE_S).matcher().fill(words)
    assert not words[VOCAB_SIZE // 32 + 1 :].any()
