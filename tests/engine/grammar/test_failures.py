"""Grammars that cannot be compiled, take long to, or become too expensive."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from grammar_rules import PIECES, SCHEMA, SPECIAL, requests, text_of, wanted

from pdray.engine.grammar.compiler import GrammarCompiler
from pdray.engine.grammar.pieces import TokenPieces
from pdray.engine.request import EngineRequest
from pdray.errors import InvalidRequestError
from pdray.structured_outputs import StructuredOutputsParams
from pdray.testing.patience import PATIENCE_S

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


def test_no_step_takes_a_request_whose_grammar_has_just_failed(
    llama: Any, grammars: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A future has ended before its callbacks have run."""
    engine = llama.engine()
    engine.grammars = grammars
    watched: list[Any] = []
    monkeypatch.setattr(engine, "_watch_grammar", watched.append)
    request = EngineRequest("r", [5, 6, 7], wanted("regex", "(?=a)b"))
    engine.add(request)
    [live] = watched
    with pytest.raises(InvalidRequestError, match="look-around"):
        live.grammar.result(PATIENCE_S)
    engine.step()
    assert "r" not in engine.updates and not engine.has_work()
    type(engine)._watch_grammar(engine, live)
    engine.step()
    [news] = engine.updates["r"]
    assert news.finished and news.param == "structured_outputs"
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
