"""Structured outputs in the engine: what comes out follows the grammar, in every mode, token for token."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import jsonschema
import llguidance
import numpy as np
import pytest
from jsonschema.validators import validator_for

from pdray.engine.grammar.compiler import GrammarCompiler
from pdray.engine.grammar.matcher import fill_all, num_words
from pdray.engine.grammar.pieces import TokenPieces
from pdray.engine.request import EngineRequest
from pdray.errors import InvalidRequestError
from pdray.sampling_params import SamplingParams
from pdray.structured_outputs import StructuredOutputsParams
from pdray.testing.patience import PATIENCE_S

VOCAB_SIZE = 199
SPECIAL = frozenset({0, 1, 2, 3})
EOS = (2, 3)
WORDS = ['{"', '":', '","', "true", "null", "12", "  ", "\n", "name", "age", "}]", "é", "ab", "\\u"]
# Ids 4 to 98 are printable ASCII, the next are pieces of several characters; those left are in no text.
PIECES = [b""] * 4 + [bytes([code]) for code in range(32, 127)] + [word.encode() for word in WORDS]
PIECES += [b""] * (VOCAB_SIZE - len(PIECES))

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", None]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
LONG = StructuredOutputsParams(regex="[a-z]{300}")
RULES = {
    "schema": SamplingParams(
        temperature=1.0, seed=5, max_tokens=150, structured_outputs=StructuredOutputsParams(json=SCHEMA)
    ),
    "greedy": SamplingParams(temperature=0, max_tokens=150, structured_outputs=StructuredOutputsParams(json=SCHEMA)),
    "compact": SamplingParams(
        temperature=1.5,
        seed=6,
        max_tokens=150,
        structured_outputs=StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True),
    ),
    "any": SamplingParams(
        temperature=1.0, seed=7, max_tokens=40, structured_outputs=StructuredOutputsParams(json_object=True)
    ),
    "three": SamplingParams(
        n=3, temperature=1.0, seed=8, max_tokens=30, structured_outputs=StructuredOutputsParams(regex="[a-c]{5,25}d?")
    ),
    "choice": SamplingParams(
        temperature=1.0, seed=9, max_tokens=30, structured_outputs=StructuredOutputsParams(choice=("abé", 'a"b', "12"))
    ),
    "penalties": SamplingParams(
        temperature=0.8,
        seed=10,
        max_tokens=30,
        frequency_penalty=0.9,
        structured_outputs=StructuredOutputsParams(regex="[a-z]{20}"),
    ),
    "filters": SamplingParams(
        temperature=1.2,
        seed=11,
        max_tokens=30,
        top_k=3,
        top_p=0.9,
        structured_outputs=StructuredOutputsParams(grammar='start: "x" digit+\ndigit: /[0-9]/'),
    ),
    "logprobs": SamplingParams(
        temperature=1.0, seed=12, max_tokens=20, logprobs=3, structured_outputs=StructuredOutputsParams(regex="[0-9]+")
    ),
    "free": SamplingParams(temperature=1.0, seed=13, max_tokens=30, ignore_eos=True),
    "long": SamplingParams(temperature=1.0, seed=1, max_tokens=110, structured_outputs=LONG),
    "longer": SamplingParams(temperature=1.0, seed=2, max_tokens=120, structured_outputs=LONG),
}


@pytest.fixture(scope="module")
def grammars() -> GrammarCompiler:
    return GrammarCompiler(lambda: TokenPieces(PIECES, SPECIAL))


@pytest.fixture
def make(llama: Any, grammars: GrammarCompiler) -> Callable[..., Any]:
    """Engines that share one compiler, in which all of RULES is compiled."""
    for params in RULES.values():
        if params.structured_outputs is not None:
            grammars.check(params.structured_outputs).result(PATIENCE_S)

    def make(**settings: Any) -> Any:
        engine = llama.engine(**settings)
        engine.grammars = grammars
        return engine

    return make


def requests() -> list[EngineRequest]:
    return [
        EngineRequest(name, [5 + (7 * i + j) % 150 for j in range(3 + 9 * i)], params, tuple(range(params.n)))
        for i, (name, params) in enumerate(RULES.items())
    ]


def answers(engine: Any) -> dict[Any, Any]:
    return {key: dict(indices) for key, indices in engine.tokens.items()}


def text_of(ids: list[int]) -> str:
    return b"".join(PIECES[i] for i in ids if i not in SPECIAL).decode()


def wanted(kind: str, value: Any, **params: Any) -> SamplingParams:
    defaults = {"temperature": 1.0, "seed": 3, "max_tokens": 30}
    return SamplingParams(**{**defaults, **params}, structured_outputs=StructuredOutputsParams(**{kind: value}))


def run(make: Callable[..., Any], params: SamplingParams, **settings: Any) -> Any:
    """An engine that has completed one request with these parameters."""
    engine = make(**settings)
    assert params.structured_outputs is not None
    engine.grammars.check(params.structured_outputs).result(PATIENCE_S)
    engine.run(EngineRequest("r", list(range(10, 30)), params))
    engine.assert_empty()
    return engine


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


# the end


def test_the_output_ends_where_nothing_may_follow(make: Callable[..., Any]) -> None:
    engine = run(make, wanted("regex", "[a-z]{6}"))
    last = engine.tokens["r"][0][-1]
    assert re.fullmatch("[a-z]{6}", text_of(engine.ids("r"))) and not SPECIAL.intersection(engine.ids("r"))
    assert (last.finish_reason, last.stop_reason) == ("stop", None)


def test_with_its_last_token_at_max_tokens_it_is_complete(make: Callable[..., Any]) -> None:
    last = run(make, wanted("regex", "[x-z]{6}", max_tokens=6)).tokens["r"][0][-1]
    assert last.finish_reason == "stop" and last.is_text
    assert run(make, wanted("regex", "[x-z]{7}", max_tokens=6)).tokens["r"][0][-1].finish_reason == "length"


def test_an_end_of_sequence_may_come_only_where_the_text_is_complete(make: Callable[..., Any]) -> None:
    ends = set()
    for seed in range(60):
        ids = run(make, wanted("regex", "(ab)+c*", temperature=20.0, seed=seed)).ids("r")
        assert re.fullmatch("(ab)+c*" if ids[-1] in EOS else "(ab)*a?c*", text_of(ids))
        assert not SPECIAL.intersection(ids[:-1])
        ends |= {ids[-1]} & set(EOS)
    assert ends == set(EOS), "each of the model's end-of-sequence ids can be drawn"


def test_ignore_eos_goes_on_as_long_as_the_grammar_lets_it(make: Callable[..., Any]) -> None:
    for seed in range(20):
        ids = run(make, wanted("regex", "x+", temperature=20.0, seed=seed, ignore_eos=True)).ids("r")
        assert len(ids) == 30 and not SPECIAL.intersection(ids)
    ended = run(make, wanted("regex", "x{4}", ignore_eos=True)).tokens["r"][0]
    assert len(ended) == 4 and ended[-1].finish_reason == "stop"


def test_min_tokens_holds_unless_the_grammar_leaves_nothing_else(make: Callable[..., Any]) -> None:
    for seed in range(20):
        assert len(run(make, wanted("regex", "x+", temperature=20.0, seed=seed, min_tokens=9)).ids("r")) > 9
    assert len(run(make, wanted("regex", "x{4}", min_tokens=9)).ids("r")) == 4
    # "y" is a stop token, which min_tokens bans as long as there is another.
    stop = PIECES.index(b"y")
    for seed in range(10):
        ids = run(make, wanted("regex", "[xy]{9}", seed=seed, min_tokens=5, stop_token_ids=(stop,))).ids("r")
        assert stop not in ids[:5]
    assert run(make, wanted("regex", "y{9}", min_tokens=5, stop_token_ids=(stop,))).ids("r") == [stop]


def test_a_special_stop_token_may_end_a_complete_text(make: Callable[..., Any]) -> None:
    endings = set()
    for seed in range(60):
        params = wanted("regex", "(ab)+", temperature=20.0, seed=seed, stop_token_ids=(1,), ignore_eos=True)
        last = run(make, params).tokens["r"][0][-1]
        endings.add((last.token_id, last.finish_reason, last.stop_reason))
    assert (1, "stop", 1) in endings and not {token_id for token_id, _, _ in endings}.intersection(EOS)


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


# what cannot be


BOMB = "((((a{1,100}){1,100}){1,100}){1,100})"  # what may follow grows with every character


def test_a_grammar_that_becomes_too_expensive_ends_its_own_request(make: Callable[..., Any]) -> None:
    bomb = wanted("regex", BOMB, max_tokens=400, ignore_eos=True)
    request = next(r for r in requests() if r.key == "schema")
    for ahead in (False, True):
        engine = make(async_scheduling=ahead)
        engine.run(*(EngineRequest(f"bomb-{i}", [5, 6, 7], bomb) for i in range(2)), request)
        assert engine.ids("bomb-0") == engine.ids("bomb-1"), "neither is charged for the other"
        for i in range(2):
            news = engine.updates[f"bomb-{i}"][-1]
            assert news.finished and news.param == "structured_outputs" and "too many" in (news.failure or "")
        assert engine.tokens["schema"] == make().run(request).tokens["schema"]
        engine.assert_empty()


def test_nothing_waits_for_a_grammar_that_is_being_compiled(llama: Any) -> None:
    go_on = threading.Event()

    def load() -> TokenPieces:
        assert go_on.wait(PATIENCE_S)
        return TokenPieces(PIECES, SPECIAL)

    engine = llama.engine()
    engine.grammars = GrammarCompiler(load)
    schema, free = (next(r for r in requests() if r.key == key) for key in ("schema", "free"))
    engine.add(schema)
    engine.add(free)  # comes later, and is not behind it
    while engine.has_work():
        engine.step()
    assert engine.tokens["free"][0][-1].finish_reason == "length" and "schema" not in engine.tokens
    assert engine.live_keys() == {"schema"} and not engine.has_work()
    woken = threading.Event()
    engine.on_work = woken.set
    go_on.set()
    assert woken.wait(PATIENCE_S)
    while engine.has_work():
        engine.step()
    jsonschema.validate(json.loads(text_of(engine.ids("schema"))), SCHEMA)
    engine.assert_empty()


@pytest.mark.parametrize("start", ["add", "reserve"])
def test_what_cannot_be_compiled_ends_the_request(llama: Any, grammars: GrammarCompiler, start: str) -> None:
    engine = llama.engine()
    engine.grammars = grammars
    request = EngineRequest("r", [5, 6, 7], wanted("regex", "(?=a)b"))
    if start == "add":
        engine.add(request)
    else:
        assert engine.reserve(request) is not None
        with pytest.raises(InvalidRequestError, match="look-around"):
            grammars.check(request.params.structured_outputs).result(PATIENCE_S)
        assert engine.live_keys() == {"r"}, "its blocks may be being written to"
        engine.start_prefill("r")
    deadline = time.monotonic() + PATIENCE_S
    while not engine.updates["r"] and time.monotonic() < deadline:
        engine.step()
    [news] = engine.updates["r"]
    assert news.finished and news.param == "structured_outputs" and "look-around" in news.failure
    engine.assert_empty()


def test_without_a_tokenizer_it_is_refused(llama: Any) -> None:
    with pytest.raises(InvalidRequestError, match="skip_tokenizer_init"):
        llama.engine().grammars.check(StructuredOutputsParams(regex="a")).result(PATIENCE_S)
