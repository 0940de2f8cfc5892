"""What the controller of two lanes is told of a real engine's prompts and streams."""

from __future__ import annotations

import time
from typing import Any

import pytest

from pdray.engine.mux.load import LEAST_LEFT, Lengths, measure_load, wait_of
from pdray.engine.request import EngineRequest
from pdray.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
TWO = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, n=2)


def test_streams_count_from_the_first_token_that_this_engine_drew(llama: Any) -> None:
    mux = llama.mux(async_scheduling=False)
    before = time.perf_counter()
    mux.add(EngineRequest("new", [5, 6, 7, 8], TWO, (0, 1)))
    mux.add(EngineRequest("resumed", [9, 10, 11], GREEDY, output_token_ids=[12, 13, 14, 15]))
    while len(mux.tokens["resumed"][0]) < 3:
        mux.step()
    now = time.perf_counter()
    assert measure_load(mux._scheduler, now, Lengths()) is None, "no prompt waits"
    mux.add(EngineRequest("waits", [5] * 30, GREEDY))
    load = measure_load(mux._scheduler, now, Lengths())
    assert load is not None and load.num_decodes == 3 and load.num_queued == 30
    num_new, num_resumed = len(mux.tokens["new"][0]) - 1, 2
    assert sorted((each.num_steps, each.num_left) for each in load.streams) == sorted(
        [(num_new, 19 - num_new)] * 2 + [(num_resumed, 19 - 4 - num_resumed)]
    )
    assert all(0 < each.age_s < now - before for each in load.streams)


def test_as_many_tokens_are_expected_as_streams_have_had_that_ended() -> None:
    lengths = Lengths()
    for _ in range(200):
        lengths.note(40)
    assert lengths.left(10, 4096) == 30
    assert lengths.left(10, 12) == 12, "no more than may come"
    assert lengths.left(500, 4096) == LEAST_LEFT


@pytest.mark.parametrize("overlap", [False, True])
def test_an_engine_learns_how_long_its_streams_are(llama: Any, overlap: bool) -> None:
    """Each counts once, also one that ends while another step computes it."""
    mux, noted = llama.mux(async_scheduling=overlap), []
    mux._lengths.note = noted.append
    for name, number in (("short", 3), ("long", 9)):
        mux.add(EngineRequest(name, [5, 6, 7], SamplingParams(temperature=0, max_tokens=number, ignore_eos=True)))
    mux.run()
    stopped = mux.tokens["long"][0][4].token_id
    mux.add(EngineRequest("stops", [5, 6, 7], SamplingParams(temperature=0, max_tokens=9, stop_token_ids=[stopped])))
    mux.run()
    assert noted == [2, 8, len(mux.tokens["stops"][0]) - 1]


def test_preempted_sequences_wait_too(llama: Any) -> None:
    """Else none would ever be overdue."""
    mux = llama.mux(async_scheduling=False, num_kv_blocks=8, sm_partition="auto")
    began = time.perf_counter()
    for name in range(3):
        mux.add(EngineRequest(name, [5 + name] * 30, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)))
    while not any(sequence.preempted for sequence in mux._scheduler.waiting):
        mux.step()
    preempted = wait_of(mux._scheduler.waiting[0], time.perf_counter() + 100)
    assert preempted.waited_s > 100 and preempted.is_stream
    assert wait_of(mux._scheduler.waiting[0], time.perf_counter()).waited_s < time.perf_counter() - began
