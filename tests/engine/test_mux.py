"""Two lanes over one pool and one copy of the weights give what one lane gives, whatever is in flight in either."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from pdray.config import Config
from pdray.engine.build import build_engine
from pdray.engine.engine import Engine
from pdray.engine.mux.engine import MuxEngine
from pdray.engine.mux.partitions import PIECE_SIZES, Partitions, piece_shapes
from pdray.engine.request import EngineRequest
from pdray.engine.schedule.plan import LaneName
from pdray.engine.step.draws import DrawReader
from pdray.engine.step.graphs import StepGraphs
from pdray.engine.step.inputs import InputBuffers, StepShape
from pdray.engine.step.lane import Lane, Place
from pdray.engine.step.mask_buffer import MaskBuffer
from pdray.kernels.green_context import Partition, SmSplit
from pdray.sampling_params import SamplingParams
from pdray.testing.every_draw import EVERY_DRAW, requests_of

RULES = {
    **EVERY_DRAW,
    "allowed": SamplingParams(
        temperature=1.0, seed=10, max_tokens=20, ignore_eos=True, allowed_token_ids=tuple(range(5, 60))
    ),
    "banned": SamplingParams(
        temperature=0, max_tokens=20, ignore_eos=True, bad_words_token_ids=((7,), (9, 11), (30, 31, 32))
    ),
    "biased": SamplingParams(temperature=1.0, seed=11, max_tokens=20, ignore_eos=True, logit_bias={8: 9.0, 40: -50.0}),
    "scored": SamplingParams(temperature=1.0, seed=12, max_tokens=12, ignore_eos=True, prompt_logprobs=2),
}
SETTINGS = {
    "roomy": {},
    "preempting": {"num_kv_blocks": 18},
    "short chunks": {"max_num_batched_tokens": 16},
    "no prefix cache": {"enable_prefix_caching": False, "max_num_batched_tokens": 32},
}
HOLDS: dict[str, Callable[[random.Random], int]] = {
    "at once": lambda rng: 0,
    "late": lambda rng: rng.randrange(6),
}


class CapturingLane:
    """A lane whose places have one graph each; ``error`` is raised instead of the next."""

    def __init__(self, max_num_seqs: int) -> None:
        self.limits = SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=64)
        self.place = Place()
        self.error: Exception | None = None

    def more_graphs(self, decode: list[int], with_prompts: list[StepShape]) -> StepGraphs:
        return StepGraphs(torch.empty(10, 7), 64, decode=decode, with_prompts=with_prompts)

    def capture_one_by_one(self, place: Place) -> Iterator[StepShape]:
        if self.error is not None:
            raise self.error
        yield StepShape(8, 8, 8, True)


def requests() -> list[EngineRequest]:
    return requests_of(RULES)


def answers(engine: Any) -> dict[Any, Any]:
    return {key: dict(indices) for key, indices in engine.tokens.items()}


def serve(engine: Any, wanted: list[EngineRequest], every: int = 3) -> Any:
    """Requests come one after the other, so that prompts meet decodes."""
    waiting, steps = list(wanted), 0
    while waiting or engine.has_work():
        if waiting and steps % every == 0:
            engine.add(waiting.pop(0))
        engine.step()
        steps += 1
    return engine


def num_beside(engine: Any) -> int:
    """Decode steps that were launched while a piece of a prompt was in flight."""
    return sum(launch.lane is LaneName.MAIN and launch.num_pieces > 0 for launch in engine.launches)


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "ahead"])
@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_every_kind_of_request_gets_the_same_tokens(llama: Any, settings: str, hold: str, overlap: bool) -> None:
    plain = serve(llama.engine(async_scheduling=False, **SETTINGS[settings]), requests())
    mux, rng = llama.mux(async_scheduling=overlap, **SETTINGS[settings]), random.Random(1)
    mux.hold = lambda: HOLDS[hold](rng)
    serve(mux, requests())
    assert answers(plain).keys() == RULES.keys()
    assert answers(mux) == answers(plain)
    assert num_beside(mux) > 5 and mux.split_state().num_pieces > 5
    if settings == "preempting":
        assert mux.stats().num_preemptions > 0
    mux.assert_empty()


def test_a_step_beside_pieces_holds_decodes_alone(llama: Any) -> None:
    mux = llama.mux(async_scheduling=True, max_num_batched_tokens=16)
    mux.hold = lambda: 2
    serve(mux, requests())
    assert num_beside(mux) > 20
    for launch in mux.launches:
        if launch.lane is LaneName.PROMPTS:
            assert len(launch.prompts) + len(launch.decodes) <= 8 and launch.num_pieces < 2
        elif launch.num_pieces:
            assert launch.decodes and not launch.prompts


def test_one_side_alone_has_the_main_lane(llama: Any) -> None:
    mux = llama.mux()
    mux.run(EngineRequest("only", list(range(5, 90)), RULES["greedy"]))
    assert {launch.lane for launch in mux.launches} == {LaneName.MAIN}


def test_prefix_hits_are_the_same(llama: Any) -> None:
    """Prompts that begin alike, each coming when the one before it has decoded a little."""
    shared = [9 + i % 70 for i in range(64)]
    wanted = [EngineRequest(i, [*shared, *range(20, 21 + 5 * i)], RULES["greedy"]) for i in range(6)]
    plain, mux = serve(llama.engine(), wanted, 12), serve(llama.mux(), wanted, 12)
    assert answers(mux) == answers(plain)
    assert mux.stats().prefix_cache_hits == plain.stats().prefix_cache_hits >= 5 * 64
    mux.assert_empty()


@pytest.mark.parametrize("seed", range(4))
def test_aborts_leave_nothing_and_touch_no_other(llama: Any, seed: int) -> None:
    """Requests end in every state, also while one of their pieces is in flight."""
    rng = random.Random(seed)
    plain = serve(llama.engine(), requests())
    mux = llama.mux(async_scheduling=True, num_kv_blocks=40, max_num_batched_tokens=32)
    mux.hold = lambda: rng.randrange(5)
    waiting, released = requests(), set()
    while waiting or mux.has_work():
        if waiting and rng.random() < 0.4:
            mux.add(waiting.pop(0))
        if mux.live_keys() and rng.random() < 0.05:
            victim = rng.choice(sorted(mux.live_keys(), key=str))
            mux.release(victim)
            released.add(victim)
        mux.step()
    assert released
    for key in RULES.keys() - released:
        assert dict(mux.tokens[key]) == dict(plain.tokens[key])
    mux.assert_empty()


def test_reserved_requests_are_the_same(llama: Any) -> None:
    """As a lease has it: blocks first, the prompt later."""
    plain = serve(llama.engine(), requests())
    mux = llama.mux(async_scheduling=True, max_num_seqs=16)
    mux.hold = lambda: 2
    waiting = requests()
    for request in waiting:
        assert mux.reserve(request) is not None
    while waiting or mux.has_work():
        if waiting:
            mux.start_prefill(waiting.pop(0).key)
        for _ in range(3):
            mux.step()
    assert answers(mux) == answers(plain) and num_beside(mux) > 5
    mux.assert_empty()


def test_256_in_flight(llama: Any) -> None:
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=36, ignore_eos=True)
    wanted = [EngineRequest(i, [5 + (i + j) % 180 for j in range(4 + i % 9)], params) for i in range(256)]
    sizes = {"max_num_seqs": 256, "max_num_batched_tokens": 256, "num_kv_blocks": 1100}
    plain = llama.engine(async_scheduling=True, **sizes).run(*wanted)
    mux = llama.mux(async_scheduling=True, **sizes).run(*wanted)
    assert answers(mux) == answers(plain) and len(answers(mux)) == 256
    assert num_beside(mux) > 5 and max(len(launch.decodes) for launch in mux.launches) > 240
    mux.assert_empty()


def test_steps_of_a_request_under_suspicion_overlap_with_no_piece(llama: Any) -> None:
    mux = llama.mux(async_scheduling=True, max_num_batched_tokens=16)
    mux.hold = lambda: 3
    wanted = requests()
    wanted.insert(4, EngineRequest("suspect", list(range(9, 60)), RULES["greedy"], alone=True))
    launch = mux._launch
    seen = []

    def watched(plan: Any, lane: Any) -> Any:
        in_flight = list(mux._scheduler.plans_in_flight)
        assert len({id(other.alone) for other in in_flight}) == 1
        seen.append(plan.alone is not None)
        return launch(plan, lane)

    mux._launch = watched
    serve(mux, wanted)
    assert any(seen) and num_beside(mux) > 5
    mux.assert_empty()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_failing_piece_costs_its_requests_alone(llama: Any, overlap: bool) -> None:
    plain = serve(llama.engine(), requests())
    mux = llama.mux(async_scheduling=overlap)
    launch, failed = mux.prompt_lane.launch, {}

    def failing(*arguments: Any) -> Any:
        if "penalties" in mux._scheduler.plans_in_flight[-1].keys:
            raise ValueError("poisoned")
        return launch(*arguments)

    mux.prompt_lane.launch = failing
    serve(mux, requests())
    failed = {update.key: update for news in mux.updates.values() for update in news if update.failure is not None}
    assert "penalties" in failed and failed["penalties"].failure == "ValueError: poisoned"
    for key in RULES.keys() - failed.keys():
        assert dict(mux.tokens[key]) == dict(plain.tokens[key])
    mux.assert_empty()


def busy_in_both_lanes(llama: Any) -> Any:
    """With a step of "decodes" and a piece of "prompt" in flight."""
    mux = llama.mux(async_scheduling=True)
    mux.hold = lambda: 99
    mux.add(EngineRequest("decodes", list(range(5, 20)), RULES["greedy"]))
    for _ in range(3):
        mux.step()
    mux.add(EngineRequest("prompt", list(range(5, 90)), RULES["greedy"]))
    mux.step()
    return mux


def test_what_a_failed_engine_computed_is_named_for_both_lanes(llama: Any) -> None:
    mux = busy_in_both_lanes(llama)
    assert set(mux.suspects()) == {"decodes", "prompt"}


def test_a_slot_of_a_history_is_written_after_the_other_lane_has_done_with_it(llama: Any) -> None:
    """Only with penalties is there a slot to take over; on CPU there is nothing to wait for."""
    mux, waits = llama.mux(async_scheduling=True), []
    mux.prompt_lane.wait_for = waits.append
    serve(mux, [EngineRequest(i, list(range(5, 50)), RULES["greedy"]) for i in range(3)])
    assert not waits
    serve(mux, [EngineRequest(i, list(range(5, 50)), RULES["penalties"]) for i in range(3)])
    assert waits and set(waits) == {mux.lane}


def test_closing_drops_what_steps_in_flight_hand_to_the_host(llama: Any) -> None:
    """It remembers its lane's stream, and must go before that."""
    mux = busy_in_both_lanes(llama)
    assert mux._pieces and mux._in_flight is not None
    mux.close()
    assert not mux._pieces and mux._in_flight is None
    left = [each for lane in (mux.lane, mux.prompt_lane) for each in vars(lane).values()]
    assert not [each for each in left if isinstance(each, InputBuffers | MaskBuffer | DrawReader)]


@pytest.mark.parametrize(("setting", "kind"), [("off", Engine), ("auto", Engine), ("on", MuxEngine)])
def test_a_cpu_has_no_partitions_and_one_line_says_so(
    llama: Any, setting: str, kind: type, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config(
        model=str(llama.folder), skip_tokenizer_init=True, num_kv_blocks=50, mode="colocated", sm_partition=setting
    )
    with caplog.at_level(logging.WARNING):
        engine = build_engine(config, llama.loaded, torch.device("cpu"))
    assert type(engine) is kind
    lines = [record.getMessage() for record in caplog.records if "partition" in record.getMessage()]
    assert len(lines) == (setting != "off")
    assert all("cpu has no SMs to split" in line for line in lines)
    if isinstance(engine, MuxEngine):
        state = engine.split_state()
        assert state.unavailable is not None and state.unavailable in lines[0]
        assert engine.prepare_more() is False
        engine.close()
        engine.close()


@pytest.mark.parametrize(("setting", "kind"), [("auto", Engine), ("on", MuxEngine)])
def test_where_throughput_alone_counts_auto_is_off(
    llama: Any, setting: str, kind: type, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = [SmSplit(Partition(16, None), Partition(116, None))]
    monkeypatch.setattr("pdray.engine.build.open_splits", lambda device, sizes: splits)
    settings: Any = {"model": str(llama.folder), "skip_tokenizer_init": True, "num_kv_blocks": 50, "mode": "colocated"}
    with caplog.at_level(logging.WARNING):
        config = Config(**settings, sm_partition=setting, target_tpot_ms=0, target_ttft_ms=1000)
        engine = build_engine(config, llama.loaded, torch.device("cpu"))
    assert type(engine) is kind
    assert ("sm_partition auto is off: with target_tpot_ms 0" in caplog.text) == (setting == "auto")
    engine.close()


@pytest.mark.parametrize(
    ("most_tokens", "sizes"), [(16, [16]), (64, [64]), (1500, [64, 128, 256, 512, 1024, 1500]), (4096, [*PIECE_SIZES])]
)
def test_every_piece_fits_a_graph(most_tokens: int, sizes: list[int]) -> None:
    assert [shape.num_tokens for shape in piece_shapes(most_tokens, 256)] == sizes


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried …"), RuntimeError("CUDA error: out of memory")]
)
def test_without_memory_for_more_graphs_those_that_are_whole_are_used(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """Graphs of a partition that cannot be finished are given up."""
    main, prompts = CapturingLane(10), CapturingLane(10)
    splits = [SmSplit(Partition(n, None), Partition(132 - n, None)) for n in (16, 32, 48)]
    partitions = Partitions(cast(Lane, main), cast(Lane, prompts), splits, capture=True)
    assert partitions.capture_next() and partitions.capture_next() and partitions.ready == []
    assert partitions.capture_next() and partitions.ready == [32], "the middle one first"
    prompts.error = error
    with caplog.at_level(logging.WARNING):
        assert not partitions.capture_next()
    assert "[32]" in caplog.text and partitions.ready == [32] and len(partitions._places) == 1
    assert partitions.capture_next() is False and partitions.places(32)


def test_an_error_of_capturing_is_not_taken_for_lack_of_memory() -> None:
    lane = CapturingLane(10)
    lane.error = RuntimeError("operation not permitted when stream is capturing")
    splits = [SmSplit(Partition(16, None), Partition(116, None))]
    with pytest.raises(RuntimeError, match="not permitted"):
        Partitions(cast(Lane, lane), cast(Lane, lane), splits, capture=True).capture_next()
