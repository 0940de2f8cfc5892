"""Decode steps in micro-batches compute every bit that plain ones do, on CPU, where turns come one after another."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pdray.engine.pipeline.halves import Halves
from pdray.engine.pipeline.lane import Way
from pdray.engine.pipeline.micro_batches import cut_rows
from pdray.engine.request import EngineRequest
from pdray.engine.schedule.plan import StepPlan
from pdray.sampling_params import SamplingParams
from pdray.testing.every_draw import EVERY_DRAW, requests_of

SETTINGS = {
    "roomy": {},
    "preempting": {"num_kv_blocks": 18},
    "short chunks": {"max_num_batched_tokens": 16},
    "no prefix cache": {"enable_prefix_caching": False, "max_num_batched_tokens": 32},
}


def pipelined(engine: Any, number: int) -> Any:
    """Every decode step of two sequences or more goes in so many micro-batches."""
    engine.lane.choose = lambda num_seqs, mean_len: Way(Halves(), number)
    return engine


def serve(engine: Any, wanted: list[EngineRequest], every: int = 2) -> Any:
    """Requests come one after the other, so that batches have every size."""
    waiting, steps = list(wanted), 0
    while waiting or engine.has_work():
        if waiting and steps % every == 0:
            engine.add(waiting.pop(0))
        engine.step()
        steps += 1
    return engine


def assert_same(one: Any, other: Any) -> None:
    """Tokens, log-probabilities, and every logit that a token was drawn from."""
    assert one.tokens == other.tokens
    assert one.logits.keys() == other.logits.keys()
    assert all(torch.equal(row, other.logits[place]) for place, row in one.logits.items())


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "ahead"])
@pytest.mark.parametrize(("settings", "number"), [*((name, 2) for name in SETTINGS), ("roomy", 3), ("preempting", 7)])
def test_every_kind_of_request_is_the_same(llama: Any, settings: str, number: int, overlap: bool) -> None:
    plain = serve(llama.engine(async_scheduling=overlap, **SETTINGS[settings]), requests_of(EVERY_DRAW))
    other = pipelined(llama.engine(async_scheduling=overlap, **SETTINGS[settings]), number)
    assert_same(serve(other, requests_of(EVERY_DRAW)), plain)
    assert other.stats().num_pipelined_steps > 20 and plain.stats().num_pipelined_steps == 0
    assert (plain.stats().num_preemptions > 0) == (settings == "preempting")
    other.assert_empty()


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("size", [1, 3, 7, 16])
def test_every_batch_size_has_the_same_logits(tiny_model: Any, architecture: str, size: int) -> None:
    """Odd ones, and such with fewer sequences than micro-batches; contexts that end in and at a block's end."""
    model, params = tiny_model(architecture), SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    wanted = [EngineRequest(i, [5 + (i + j) % 180 for j in range(10 + 5 * i)], params) for i in range(size)]
    plain = model.engine(max_num_seqs=16, max_num_batched_tokens=1024).run(*wanted)
    for number in (2, 3, 5):
        other = pipelined(model.engine(max_num_seqs=16, max_num_batched_tokens=1024), number).run(*wanted)
        assert_same(other, plain)
        assert other.stats().num_pipelined_steps == (0 if size == 1 else 4)


def test_prefix_hits_are_the_same(llama: Any) -> None:
    shared = [9 + i % 70 for i in range(64)]
    wanted = [EngineRequest(i, [*shared, *range(20, 21 + 5 * i)], EVERY_DRAW["greedy"]) for i in range(6)]
    plain, other = serve(llama.engine(), wanted, 8), serve(pipelined(llama.engine(), 2), wanted, 8)
    assert_same(other, plain)
    assert other.stats().prefix_cache_hits == plain.stats().prefix_cache_hits >= 5 * 64
    assert other.stats().num_pipelined_steps > 0


def test_a_decode_worker_fed_by_another_is_the_same(llama: Any, disaggregated: Any) -> None:
    plain = disaggregated(llama.engine(), llama.engine(max_num_seqs=16)).run(*requests_of(EVERY_DRAW))
    decode = pipelined(llama.engine(max_num_seqs=16), 2)
    assert disaggregated(llama.engine(), decode).run(*requests_of(EVERY_DRAW)).tokens == plain.tokens
    assert decode.stats().num_pipelined_steps > 20


def test_the_main_lane_of_two_is_the_same(llama: Any) -> None:
    plain = serve(llama.engine(), requests_of(EVERY_DRAW), 3)
    mux, rng = pipelined(llama.mux(async_scheduling=True), 2), random.Random(1)
    mux.hold = lambda: rng.randrange(4)
    assert serve(mux, requests_of(EVERY_DRAW), 3).tokens == plain.tokens
    assert mux.stats().num_pipelined_steps > 20 and mux.split_state().num_pieces > 5


def test_aborts_leave_nothing_and_touch_no_other(llama: Any) -> None:
    rng, plain = random.Random(4), serve(llama.engine(), requests_of(EVERY_DRAW))
    other, waiting, released = pipelined(llama.engine(async_scheduling=True), 2), requests_of(EVERY_DRAW), set()
    while waiting or other.has_work():
        if waiting and rng.random() < 0.5:
            other.add(waiting.pop(0))
        if other.live_keys() and rng.random() < 0.05:
            victim = rng.choice(sorted(other.live_keys(), key=str))
            other.release(victim)
            released.add(victim)
        other.step()
    assert released
    for key in EVERY_DRAW.keys() - released:
        assert other.tokens[key] == plain.tokens[key]
    other.assert_empty()


def test_only_decode_steps_on_the_whole_device_are_pipelined(llama: Any) -> None:
    lane = pipelined(llama.engine(), 2).lane
    lane.rehearse(4, 20)
    assert lane._way_of(lane.rehearsed) is not None
    assert lane._way_of(lane.rehearsed._replace(shape=lane.rehearsed.shape._replace(is_decode=False))) is None
    graphs = lane.more_graphs([8], [])
    lane.choose = lambda num_seqs, mean_len: Way(Halves(), 2, (8,), graphs)
    assert lane._way_of(lane.rehearsed) is None, "no graph of this size was captured"
    asked: list[tuple[int, float]] = []
    lane.choose = lambda *size: asked.append(size)
    assert lane._way_of(lane.rehearsed) is None and asked == [(4, 20.0)]
    lane.stream = object()
    assert lane._way_of(lane.rehearsed) is None and len(asked) == 1, "a partition's steps are plain"


def test_a_rehearsal_leaves_no_trace_in_the_next_step(llama: Any) -> None:
    """It fills the buffers that real steps use."""
    wanted = requests_of(EVERY_DRAW)
    plain, other = llama.engine(), llama.engine()
    for engine in (plain, other):
        for request in wanted[:4]:
            engine.add(request)
    for step in range(40):
        plain.step()
        if step % 5 == 4:
            other.lane.rehearse(8, 100)
            assert other.lane.rehearsed.attention.kv_lens == [100] * 8
            assert other.lane.rehearsed.attention.block_tables.max() < other.num_blocks
        other.step()
    assert_same(other, plain)


@pytest.mark.parametrize(("rows", "parts"), [(1, 2), (2, 2), (3, 2), (7, 3), (8, 4), (256, 5)])
def test_rows_are_cut_evenly(rows: int, parts: int) -> None:
    cut = cut_rows(rows, parts)
    sizes = [each.stop - each.start for each in cut]
    assert [i for each in cut for i in range(rows)[each]] == list(range(rows))
    assert len(cut) == min(rows, parts) and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("prefill_only", [False, True])
def test_a_step_whose_layers_are_told_of_is_no_decode_step(prefill_only: bool) -> None:
    """Graphs of decode steps tell nobody, so that the KV of a prompt of one token would never be handed over."""
    request = SimpleNamespace(forked=False, prefill_only=prefill_only, num_scores_between=lambda start, stop: 0)
    sequence = SimpleNamespace(
        num_computed_tokens=0, num_tokens=1, num_pending=0, num_in_flight=0, num_output_tokens=0, pending_copy=None
    )
    sequence.request, request.sequences = request, [sequence]
    plan = StepPlan()
    plan.add(sequence, 1)  # type: ignore[arg-type]
    assert plan.is_decode is not prefill_only and plan.num_decodes == 1


@pytest.mark.parametrize("kind", ["engine", "mux"])
def test_an_engine_closes_its_pipeline(llama: Any, kind: str) -> None:
    engine, closed = getattr(llama, kind)(), []
    engine.pipeline = SimpleNamespace(close=lambda: closed.append(kind))
    engine.close()
    assert closed == [kind]
