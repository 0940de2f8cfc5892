"""Blocks and places that a request holds before its prompt is there, after it has gone, and while it is released."""

from __future__ import annotations

import pytest
from fake_engine import FakeEngine, assert_outputs, make, receive_and_start

from pdray.engine.request import EngineRequest
from pdray.outputs import SampledToken
from pdray.sampling_params import SamplingParams


def test_completions_share_the_prompts_full_blocks_and_nothing_else() -> None:
    engine = FakeEngine(40, max_num_seqs=4)
    engine.add(make("a", 10, 8, n=3))
    engine.step()
    tables = [s.block_table for s in engine.scheduler.requests["a"].sequences]
    assert [len(table) for table in tables] == [3, 3, 3]
    assert len({tuple(table[:2]) for table in tables}) == 1 and len({table[2] for table in tables}) == 3
    assert len(engine.step().copies) == 2
    engine.run()
    assert_outputs(engine, make("a", 10, 8, n=3))
    engine.assert_empty()


def test_a_prompt_that_is_wholly_cached_still_computes_its_last_token() -> None:
    engine = FakeEngine(40)
    for key in ("a", "b"):
        engine.add(EngineRequest(key, list(range(8)), SamplingParams(max_tokens=1)))
        last = engine.step()
    assert [(chunk.start, chunk.num_tokens) for chunk in last.chunks] == [(4, 4)]
    assert engine.scheduler.counters.prefix_cache_hits == 4


@pytest.mark.parametrize("max_tokens", [1, 9])
def test_a_reservation_of_a_wholly_cached_prompt_can_be_decoded_or_prefilled(max_tokens: int) -> None:
    engine = FakeEngine(40)
    prompt = list(range(8))
    engine.add(EngineRequest("first", prompt, SamplingParams(max_tokens=1)))
    engine.run()
    requests = [
        EngineRequest(key, prompt, SamplingParams(n=2, max_tokens=max_tokens), (0, 1)) for key in ("prefill", "decode")
    ]
    reservations = [engine.reserve(request) for request in requests]
    # With one output token there is no head-room, and the last block stays private so that it can be computed.
    assert [r.num_cached_tokens for r in reservations] == [8 if max_tokens > 1 else 4] * 2
    engine.scheduler.start_prefill("prefill", engine.now)
    receive_and_start(engine, requests[1], reservations[1])
    engine.run()
    for request in requests:
        assert_outputs(engine, request)
    engine.assert_empty()


def test_a_reservation_holds_head_room_and_places_for_every_completion() -> None:
    engine = FakeEngine(40, max_num_seqs=4, headroom=6)
    reservation = engine.reserve(make("a", 10, 20, n=3))
    assert reservation is not None and len(reservation.block_ids) == 3 and reservation.num_cached_tokens == 0
    assert engine.scheduler.pool.num_free == 39 - (2 + 3 * 2)  # 16 tokens: two shared blocks, two for each
    assert engine.scheduler.num_places == 3
    assert engine.reserve(make("b", 4, 8, n=2)) is None
    engine.scheduler.release("a")
    assert engine.reserve(make("b", 4, 8, n=2)) is not None
    engine.scheduler.release("b")
    engine.assert_empty()


def test_first_tokens_that_end_their_completions_finish_the_request() -> None:
    engine = FakeEngine(40)
    engine.reserve(make("a", 10, 1, n=2))
    tokens = [SampledToken(index, 0, 3, None, "length") for index in (0, 1)]
    engine.scheduler.start_decode("a", tokens, 0.0)
    engine.step()
    assert engine.finished == {"a"} and engine.outputs == {}
    engine.assert_empty()


def test_a_prefill_only_request_keeps_its_blocks_until_it_is_released() -> None:
    engine = FakeEngine(40, budget=8)
    engine.add(make("a", 10, 8, n=3, prefill_only=True))
    engine.run()
    assert [len(engine.outputs["a"][index]) for index in range(3)] == [1, 1, 1]
    assert engine.finished == {"a"} and engine.scheduler.num_places == 0
    assert engine.scheduler.pool.num_free == 39 - 3
    engine.scheduler.release("a")
    engine.scheduler.release("a")
    engine.assert_empty()


def test_a_release_in_flight_returns_the_blocks_only_with_the_step() -> None:
    engine = FakeEngine(40)
    engine.add(make("a", 10, n=2))
    plan = engine.begin()
    rows = engine.compute(plan)
    engine.scheduler.release("a")
    assert engine.scheduler.pool.num_free == 39 - 3, "nothing is written to the other completion's own block"
    engine.add(make("a", 3, 1))  # the key is free again
    engine.end(plan, rows)
    assert engine.scheduler.pool.num_free == 39 and engine.outputs == {}
    engine.run()
    assert_outputs(engine, make("a", 3, 1))
