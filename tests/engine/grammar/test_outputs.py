"""Structured outputs in the engine: what comes out follows the grammar, whatever way its steps are made."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import llguidance
import numpy as np
import pytest
from grammar_rules import PIECES, RULES, SCHEMA, SPECIAL, VOCAB_SIZE, answers, requests, run, text_of, wanted
from jsonschema.validators import validator_for

from pdray.engine.grammar.compiler import GrammarCompiler
from pdray.engine.grammar.matcher import fill_all, num_words
from pdray.engine.grammar.pieces import TokenPieces
from pdray.engine.pipeline.halves import Halves
from pdray.engine.pipeline.lane import Way
from pdray.engine.request import EngineRequest
from pdray.sampling_params import SamplingParams
from pdray.structured_outputs import StructuredOutputsParams
from pdray.testing.patience import PATIENCE_S


def test_every_output_follows_its_grammar(make: Callable[..., Any]) -> None:
    engine = make().run(*requests())
    validator = validator_for(SCHEMA)(SCHEMA)
    for name in ("schema", "greedy", "compact"):
        assert engine.tokens[name][0][-1].finish_reason == "stop"
        validator.validate(json.loads(text_of(engine.ids(name))))
    assert " " not in text_of(engine.ids("compact")).partition('"age"')[0].partition('"name":')[0]
    for index in range(3):
        assert re.fullmatch("[a-c]{5,25}d?", text_of(engine.ids("three", index)))
    assert len({text_of(engine.ids("three", index)) for index in range(3)}) > 1
    assert text_of(engine.ids("choice")) in ("abé", 'a"b', "12")
    assert re.fullmatch("[a-z]{20}", text_of(engine.ids("penalties")))
    assert re.fullmatch("x[0-9]+", text_of(engine.ids("filters")))
    engine.assert_empty()


@pytest.mark.parametrize("settings", [{}, {"num_kv_blocks": 17, "max_num_seqs": 8}], ids=["roomy", "preempting"])
def test_steps_planned_ahead_give_the_same_tokens(make: Callable[..., Any], settings: dict[str, int]) -> None:
    plain = make(async_scheduling=False, **settings).run(*requests())
    ahead = make(async_scheduling=True, **settings).run(*requests())
    assert answers(plain).keys() == RULES.keys()
    assert answers(ahead) == answers(plain) == answers(make().run(*requests()))
    if settings:
        assert plain.stats().num_preemptions > 0 and ahead.stats().num_preemptions > 0
    for engine in (plain, ahead):
        engine.assert_empty()


@pytest.mark.parametrize("settings", [{}, {"num_kv_blocks": 17, "max_num_seqs": 8}], ids=["roomy", "preempting"])
def test_steps_in_micro_batches_give_the_same_tokens(make: Callable[..., Any], settings: dict[str, int]) -> None:
    plain = make(async_scheduling=True, **settings).run(*requests())
    other = make(async_scheduling=True, **settings)
    other.lane.choose = lambda num_seqs, mean_len: Way(Halves(), 2)
    assert answers(other.run(*requests())) == answers(plain)
    assert other.stats().num_pipelined_steps > 20
    other.assert_empty()


def test_a_mask_costs_no_step(make: Callable[..., Any]) -> None:
    """The next step is launched before the last token is known, with a grammar as without."""
    steps = {}
    for name, params in (
        ("free", SamplingParams(temperature=1.0, seed=3, max_tokens=20, ignore_eos=True)),
        ("grammar", wanted("regex", "[q-z]{20}")),
    ):
        if params.structured_outputs is not None:
            make().grammars.check(params.structured_outputs).result(PATIENCE_S)
        engine = make(async_scheduling=True).run(EngineRequest("r", [5, 6, 7], params))
        assert len(engine.ids("r")) == 20
        steps[name] = engine.stats().num_steps
    assert steps["grammar"] <= steps["free"] + 1  # over-run where the grammar has ended


@pytest.mark.parametrize("ahead", [False, True])
def test_disaggregated_equals_colocated(make: Callable[..., Any], disaggregated: Any, ahead: bool) -> None:
    whole = make().run(*requests())
    pair = disaggregated(make(async_scheduling=ahead), make(async_scheduling=ahead, max_num_seqs=16))
    assert answers(pair.run(*requests())) == answers(whole)
    for engine in (pair.prefill, pair.decode):
        engine.assert_empty()


@pytest.mark.parametrize("name", ["schema", "compact", "penalties", "filters"])
def test_a_replay_goes_on_where_the_output_was(make: Callable[..., Any], name: str) -> None:
    request = next(r for r in requests() if r.key == name)
    whole = make().run(request).tokens[name][0]
    for cut in (1, len(whole) // 2, len(whole) - 1):
        outputs = tuple(token.token_id for token in whole[:cut])
        again = make().run(EngineRequest(name, request.prompt_token_ids, request.params, output_token_ids=outputs))
        assert again.tokens[name][0] == whole[cut:]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_cached_prompt_gives_the_same_tokens(make: Callable[..., Any], ahead: bool) -> None:
    engine = make(async_scheduling=ahead).run(*requests())
    once = {key: [list(tokens) for tokens in indices.values()] for key, indices in answers(engine).items()}
    engine.tokens.clear()
    engine.run(*requests())
    assert {key: [list(tokens) for tokens in indices.values()] for key, indices in answers(engine).items()} == once
    assert engine.stats().prefix_cache_hits > 0


def test_requests_without_a_grammar_draw_what_they_draw_alone(make: Callable[..., Any]) -> None:
    together = make().run(*requests())
    alone = make().run(next(r for r in requests() if r.key == "free"))
    assert together.tokens["free"] == alone.tokens["free"]


def test_logprobs_are_those_of_the_raw_logits(make: Callable[..., Any]) -> None:
    engine = run(make, wanted("regex", "[0-9]{8}", logprobs=2))
    for token in engine.tokens["r"][0]:
        logprobs = engine.logits["r", 0, token.position].log_softmax(-1)
        assert token.logprobs[token.token_id].logprob == pytest.approx(float(logprobs[token.token_id]), abs=1e-5)
        best = max(token.logprobs, key=lambda each: token.logprobs[each].logprob)
        assert best == int(logprobs.argmax())


def test_threads_fill_the_masks_that_one_fills(grammars: GrammarCompiler) -> None:
    """Also where the grammar leaves one text, for which they call back into Python."""
    tokens = TokenPieces(PIECES, SPECIAL, lambda text: [PIECES.index(char.encode()) for char in text])
    grammar = GrammarCompiler(lambda: tokens).check(StructuredOutputsParams(choice=("name: abc", "12")))
    executor, texts = llguidance.LLExecutor(2), [b"", b"n", b"na", b"name: a", b"1", b"12"]
    words = [np.full((len(texts) + 1, num_words(VOCAB_SIZE + 1)), -1, np.int32) for _ in range(2)]
    for each, threads in zip(words, (None, executor), strict=True):
        matchers = [grammar.result(PATIENCE_S).matcher(PIECES.index(bytes([c])) for c in text) for text in texts]
        fill_all(matchers, each, threads, list(range(len(texts))))
    assert (words[0] == words[1]).all() and (words[0][-1] == -1).all()
