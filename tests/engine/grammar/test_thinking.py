"""Thoughts: how long they may get, and structured outputs that begin behind them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from grammar_rules import EOS, PIECES, SCHEMA, SPECIAL, answers, text_of

from pdray.engine.request import EngineRequest
from pdray.sampling_params import SamplingParams
from pdray.structured_outputs import StructuredOutputsParams
from pdray.testing.patience import PATIENCE_S
from pdray.thinking import Thinking

BEGIN, END = 120, 121
NAMED = PIECES.index(b'{"')
PROMPT = [5, 6, 7, 8]
OPEN = Thinking(BEGIN, END, 2)
CLOSED = Thinking(BEGIN, END)
FORM = StructuredOutputsParams(json=SCHEMA)


def wanted(thinking: Thinking = OPEN, budget: int | None = 9, **params: Any) -> SamplingParams:
    fields = {"temperature": 1.0, "seed": 3, "max_tokens": 40, "ignore_eos": True, **params}
    return SamplingParams(thinking_token_budget=budget, thinking=thinking, **fields)


def formed(thinking: Thinking = OPEN, budget: int | None = 9, **params: Any) -> SamplingParams:
    fields = {"max_tokens": 190, "ignore_eos": False, "structured_outputs": FORM, **params}
    return wanted(thinking, budget, structured_outputs_after_thinking=True, **fields)


ALL = {
    "free": wanted(),
    "greedy": wanted(temperature=0),
    "three": wanted(n=3, seed=4),
    "later": wanted(CLOSED, 5, logit_bias={BEGIN: 6.0}),
    "penalties": wanted(frequency_penalty=0.9, bad_words_token_ids=((50,), (60, 61)), min_tokens=20),
    "schema": formed(),
    "schema, later": formed(CLOSED, 4, seed=7, logit_bias={BEGIN: 60.0}),
    "schema, three": formed(n=3, seed=8),
}


@pytest.fixture
def requests(make: Callable[..., Any]) -> list[EngineRequest]:
    make().grammars.check(FORM).result(PATIENCE_S)
    return [EngineRequest(key, [*PROMPT, 9 + i], p, tuple(range(p.n))) for i, (key, p) in enumerate(ALL.items())]


def answer(ids: list[int]) -> list[int]:
    return ids[ids.index(END) + 1 :]


@pytest.mark.parametrize("budget", [0, 1, 2, 3, 9, 30])
@pytest.mark.parametrize("thinking", [OPEN, CLOSED])
def test_thoughts_end_with_their_budget(make: Callable[..., Any], budget: int, thinking: Thinking) -> None:
    """The prompt's own are counted; the tag is the very next token, and forced once."""
    bias = {END: -100.0} if thinking is OPEN else {END: -100.0, BEGIN: 6.0}
    ids = make().run(EngineRequest("r", PROMPT, wanted(thinking, budget, logit_bias=bias))).ids("r")
    begins = 0 if thinking is OPEN else ids.index(BEGIN) + 1
    assert ids.index(END) - begins == max(0, budget - (thinking.num_open or 0))
    assert ids.count(END) == 1 and len(ids) == 40


def test_thoughts_that_end_by_themselves_are_left_alone(make: Callable[..., Any]) -> None:
    free = make().run(EngineRequest("r", PROMPT, wanted(budget=None, logit_bias={END: 3.0}))).ids("r")
    place = free.index(END)
    assert 0 < place < 30, "else the test shows nothing"
    bounded = make().run(EngineRequest("r", PROMPT, wanted(budget=place + 2, logit_bias={END: 3.0}))).ids("r")
    assert bounded == free


def test_the_grammar_begins_behind_the_thoughts(make: Callable[..., Any], requests: list[EngineRequest]) -> None:
    engine = make().run(*requests)
    for key, n in (("schema", 1), ("schema, later", 1), ("schema, three", 3)):
        for index in range(n):
            ids = engine.ids(key, index)
            thoughts = ids[: ids.index(END)]
            assert not set(EOS).intersection(thoughts) and len(thoughts) <= 7
            jsonschema.validate(json.loads(text_of(answer(ids))), SCHEMA)
            assert engine.tokens[key][index][-1].finish_reason == "stop"
    assert engine.ids("schema, later")[0] == BEGIN
    engine.assert_empty()


def test_no_thoughts_are_needed(make: Callable[..., Any]) -> None:
    """Where the prompt has not opened them, the answer may begin at once; thoughts may not come later."""
    engine = make().run(EngineRequest("r", PROMPT, formed(CLOSED, None, logit_bias={BEGIN: -100.0})))
    jsonschema.validate(json.loads(text_of(engine.ids("r"))), SCHEMA)
    begun = EngineRequest("r", PROMPT, formed(CLOSED, 9, logit_bias={BEGIN: 100.0}), output_token_ids=(NAMED,))
    jsonschema.validate(json.loads(text_of([NAMED, *make().run(begun).ids("r")])), SCHEMA)
    late = StructuredOutputsParams(regex="[a-z]{9}")
    ids = make().run(EngineRequest("r", PROMPT, formed(CLOSED, None, structured_outputs=late))).ids("r")
    assert BEGIN not in ids[1:] and not SPECIAL.intersection(ids[1:])


@pytest.mark.parametrize("settings", [{}, {"num_kv_blocks": 33, "max_num_seqs": 12}], ids=["roomy", "preempting"])
def test_steps_planned_ahead_and_preempted_give_the_same_tokens(
    make: Callable[..., Any], requests: list[EngineRequest], settings: dict[str, int]
) -> None:
    whole = make(num_kv_blocks=400, max_num_seqs=16).run(*requests)
    for ahead in (False, True):
        engine = make(async_scheduling=ahead, **settings).run(*requests)
        assert answers(engine) == answers(whole)
        if settings:
            assert engine.stats().num_preemptions > 0
        engine.assert_empty()


@pytest.mark.parametrize("ahead", [False, True])
def test_disaggregated_equals_colocated(
    make: Callable[..., Any], disaggregated: Any, requests: list[EngineRequest], ahead: bool
) -> None:
    pair = disaggregated(make(async_scheduling=ahead), make(async_scheduling=ahead, max_num_seqs=16))
    assert answers(pair.run(*requests)) == answers(make().run(*requests))


@pytest.mark.parametrize("key", ["free", "later", "penalties", "schema", "schema, later"])
def test_a_replay_goes_on_where_the_output_was(
    make: Callable[..., Any], requests: list[EngineRequest], key: str
) -> None:
    request = next(r for r in requests if r.key == key)
    whole = make().run(request).tokens[key][0]
    place = [token.token_id for token in whole].index(END)
    for cut in sorted({1, place - 1, place, place + 1, place + 3, len(whole) - 1} - {0}):
        outputs = tuple(token.token_id for token in whole[:cut])
        again = make().run(EngineRequest(key, request.prompt_token_ids, request.params, output_token_ids=outputs))
        assert again.tokens[key][0] == whole[cut:], cut
