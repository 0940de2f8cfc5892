"""Random traffic through the scheduler: nothing leaks, and everyone gets the tokens of running alone."""

from __future__ import annotations

from dataclasses import replace

from fake_engine import BLOCK_SIZE, FakeEngine, assert_outputs, receive_and_start
from hypothesis import event, given
from hypothesis import strategies as st

from pdray.engine.request import EngineRequest
from pdray.engine.schedule.token_budget import AdaptiveBudget
from pdray.sampling_params import SamplingParams


@st.composite
def requests(draw_: st.DrawFn, key: int, num_blocks: int, max_num_seqs: int) -> EngineRequest:
    """A request that the pool can take. Prompts come from two families, so that prefixes are shared."""
    n = draw_(st.integers(1, min(3, max_num_seqs)))
    room = (num_blocks - 1) * BLOCK_SIZE
    length = draw_(st.integers(1, max(1, min(24, room // (n + 1) - 2 * BLOCK_SIZE))))
    max_tokens = min(draw_(st.sampled_from([24, 12, 5, 1])), max(1, room - length))
    outputs = draw_(st.integers(0, max_tokens - 1)) if n == 1 and length < 8 else 0
    return EngineRequest(
        key,
        [draw_(st.integers(0, 1)), *(7 + i for i in range(length - 1))],
        SamplingParams(n=n, max_tokens=max_tokens, ignore_eos=draw_(st.booleans()), stop_token_ids=(11,)),
        indices=tuple(range(n)),
        output_token_ids=tuple(i % 3 for i in range(outputs)),
        priority=draw_(st.integers(0, 1)),
        alone=draw_(st.sampled_from([False, False, True])),
    )


@given(st.data())
def test_random_traffic_leaks_nothing_and_gives_everyone_the_tokens_of_running_alone(data: st.DataObject) -> None:
    num_blocks = data.draw(st.integers(9, 24), "num_blocks")
    max_num_seqs = data.draw(st.integers(1, 5), "max_num_seqs")
    budget = data.draw(st.integers(max_num_seqs, 24), "budget")
    adaptive = AdaptiveBudget(budget, (8, 12, 16)) if data.draw(st.booleans(), "adaptive") else None
    engine = FakeEngine(
        num_blocks, max_num_seqs, budget, caching=data.draw(st.booleans(), "caching"), adaptive=adaptive
    )
    overlap = data.draw(st.booleans(), "overlap")
    decoder_side = {}
    live: dict[int, EngineRequest] = {}
    released: set[int] = set()
    for key in range(data.draw(st.sampled_from([8, 12, 4, 1]), "requests")):
        request = data.draw(requests(key, num_blocks, max_num_seqs))
        way = data.draw(st.sampled_from(["add", "add", "prefill only", "reserve and prefill", "reserve and decode"]))
        if way == "prefill only":
            request = replace(request, prefill_only=True)
        if way in ("add", "prefill only"):
            engine.add(request)
        else:
            reservation = engine.reserve(request)
            if reservation is None:
                continue
            if way == "reserve and prefill":
                engine.scheduler.start_prefill(key, engine.now)
            else:
                decoder_side[key] = reservation
        live[key] = request
        for _ in range(data.draw(st.integers(0, 4))):
            plan = engine.begin()
            if plan.chunks and data.draw(st.integers(0, 9)) == 0:
                engine.fail(plan)
                for key in live.keys() & set(plan.keys):
                    released.add(key)
                    del live[key]
                if engine.in_flight:
                    engine.end(*engine.in_flight.pop(0))
                continue
            rows = engine.compute(plan)
            if overlap and plan.chunks:
                engine.in_flight.append((plan, rows))
            if live and data.draw(st.integers(0, 5)) == 0:
                victim = data.draw(st.sampled_from(sorted(live)))
                engine.scheduler.release(victim)  # while its step is in flight
                engine.assert_clean()
                released.add(victim)
                del live[victim]
                decoder_side.pop(victim, None)
            if decoder_side and data.draw(st.booleans()):
                arrived = data.draw(st.sampled_from(sorted(decoder_side)))
                receive_and_start(engine, live[arrived], decoder_side.pop(arrived))
                engine.assert_clean()
            if not engine.in_flight:
                engine.end(plan, rows)
            elif len(engine.in_flight) == 2 or not plan.chunks:
                engine.end(*engine.in_flight.pop(0))
    for key, reservation in decoder_side.items():
        receive_and_start(engine, live[key], reservation)
    for _ in range(len(live) + 1):  # what holds its blocks after the prefill may keep others waiting
        engine.run(overlap)
        held = [key for key in engine.scheduler.requests if key in engine.finished]
        if not held:
            break
        engine.scheduler.release(held[0])
    event(f"preemptions: {min(3, engine.scheduler.counters.num_preemptions)}")
    for key, request in live.items():
        assert key in engine.finished
        assert_outputs(engine, request)
    engine.assert_empty()
