"""Where an output with a grammar ends: the end of sequence, stop tokens, min_tokens and max_tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from grammar_rules import EOS, PIECES, SPECIAL, run, text_of, wanted


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
