"""Where steps are pipelined: what is opened, measured and captured, and every reason why nothing is."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from pdray.config import Config
from pdray.engine.build import build_engine
from pdray.engine.mux.engine import MuxEngine
from pdray.engine.pipeline import pipeline as module
from pdray.engine.pipeline import tuner
from pdray.engine.pipeline.halves import Halves, split_halves
from pdray.engine.pipeline.lane import PipelinedLane, Way
from pdray.engine.pipeline.measure import Timing, time_in_turn
from pdray.engine.pipeline.pipeline import DecodePipeline, open_pipeline
from pdray.engine.pipeline.table import Cell
from pdray.engine.pipeline.tuner import PLAIN, grid_of
from pdray.engine.request import EngineRequest
from pdray.engine.schedule.limits import EngineLimits
from pdray.engine.step.inputs import StepShape
from pdray.kernels.green_context import Partition, SmSplit, UnavailableError
from pdray.sampling_params import SamplingParams

GPU = torch.device("cuda", 0)
LIMITS = EngineLimits(
    block_size=16,
    num_blocks=9000,
    max_model_len=10000,
    max_num_seqs=48,
    max_num_batched_tokens=64,
    headroom_tokens=0,
    vocab_size=9,
    eos_token_ids=(),
)


class FakeGraphs:
    """Graphs that are only counted."""

    def __init__(self) -> None:
        self.shapes: set[StepShape] = set()

    def replay(self, shape: StepShape) -> None:
        pass

    def __contains__(self, shape: StepShape) -> bool:
        return shape in self.shapes


class FakeLane:
    """Attributes:
    log: what was captured, as (way, size). error: raised instead of the next capture. rehearsed: cells.
    """

    def __init__(self) -> None:
        self.limits = LIMITS
        self.pool = SimpleNamespace(device=GPU)
        self.graphs = FakeGraphs()
        self.log: list[tuple[str, int]] = []
        self.rehearsed: list[Cell] = []
        self.error: Exception | None = None
        self.choose: Callable[[int, float], Way | None] | None = None
        self.num_pipelined = 0

    def make_way(self, halves: Halves, number: int, sizes: list[int]) -> Way:
        return Way(halves, number, tuple(sizes), cast(Any, FakeGraphs()))

    def capture_way(self, way: Way) -> Iterator[StepShape]:
        for size in sorted(way.sizes, reverse=True):
            if self.error is not None:
                raise self.error
            self.log.append((way.name, size))
            cast(Any, way.graphs).shapes.add(StepShape(size, size, size, True))
            yield StepShape(size, size, size, True)

    def rehearse(self, num_seqs: int, kv_len: int) -> None:
        self.rehearsed.append(Cell(num_seqs, kv_len))


class Splits:
    """Hands out SMs in eights, of 132. fails: sizes that it does not hand out."""

    def __init__(self, *fails: int) -> None:
        self.fails = fails
        self.asked: list[int] = []
        self.closed: list[int] = []

    def __call__(self, device: torch.device, num_sms: int) -> SmSplit:
        self.asked.append(num_sms)
        if num_sms in self.fails or num_sms % 8:
            raise UnavailableError(f"cuGreenCtxCreate failed for {num_sms}")
        split = SmSplit(*(Partition(n, cast(Any, object())) for n in (num_sms, 132 - num_sms)))
        split._release.callback(self.closed.append, num_sms)
        return split


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PDRAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "device_processors", lambda device: 132)
    monkeypatch.setattr("pdray.engine.pipeline.halves.device_processors", lambda device: 132)
    stream = SmSplit(Partition(132, cast(Any, object())), Partition(132, cast(Any, object())), "asked for")
    monkeypatch.setattr("pdray.engine.pipeline.halves.plain_streams", lambda device, reason: stream)
    monkeypatch.setattr(module, "table_key", lambda lane: {"device": "fake"})
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)


def open_on(lane: FakeLane, split: Splits, **settings: Any) -> DecodePipeline:
    opened = open_pipeline(Config(decode_pipeline="on", **settings), cast(PipelinedLane, lane), split)
    assert opened is not None
    return opened


def open_auto(lane: FakeLane, split: Splits, **settings: Any) -> DecodePipeline:
    opened = open_pipeline(Config(decode_pipeline="auto", **settings), cast(PipelinedLane, lane), split)
    assert opened is not None
    return opened


def timed(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[str, Cell], float], lane: FakeLane) -> list[Cell]:
    """Let each way take so long. Returns the cells that are measured from now on."""
    measured: list[Cell] = []

    def fake(launches: dict[str, object], device: torch.device) -> dict[str, Timing]:
        measured.append(lane.rehearsed[-1])
        return {name: Timing(seconds(name, measured[-1]), 1e-5) for name in launches}

    monkeypatch.setattr(tuner, "time_in_turn", fake)
    return measured


def finish(pipeline: DecodePipeline) -> int:
    steps = 1
    while pipeline.prepare_more():
        steps += 1
    return steps


def test_the_grid_is_what_the_pool_holds() -> None:
    grid = grid_of(LIMITS)
    assert [cell.num_seqs for cell in grid] == sorted((cell.num_seqs for cell in grid), reverse=True)
    assert {cell.num_seqs for cell in grid} == {2, 4, 8, 16, 32, 48}
    assert Cell(16, 8192) in grid and Cell(32, 8192) not in grid and Cell(2, 32768) not in grid
    assert {cell.context for cell in grid_of(replace(LIMITS, max_model_len=400))} == {400}, "a short model's, too"


@pytest.mark.usefixtures("gpu")
def test_auto_uses_what_wins_and_the_next_start_does_not_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(name: str, cell: Cell) -> float:
        return 0.008 if name.startswith("64 + 68") and cell.num_seqs >= 32 and cell.context == 2048 else 0.010

    lane, split = FakeLane(), Splits()
    measured = timed(monkeypatch, seconds, lane)
    pipeline = open_auto(lane, split)
    assert lane.choose is None and not measured and not lane.log, "nothing at the start"
    assert pipeline.state().is_preparing
    num_cells, num_ways, num_sizes = len(grid_of(LIMITS)), 4, 6
    assert finish(pipeline) == num_ways * num_sizes + num_cells + 3 + 1, "one graph or one cell at a time"
    assert measured == grid_of(LIMITS) and split.asked == [64, 48, 32]
    name = "64 + 68 SMs, 2 micro-batches"
    assert lane.log[-3:] == [(name, 48), (name, 40), (name, 32)]
    assert lane.choose is not None
    chosen = lane.choose(40, 1500.0)
    assert chosen is not None and chosen.name == name and StepShape(40, 40, 40, True) in cast(Any, chosen.graphs)
    assert lane.choose(40, 600.0) is None and lane.choose(16, 1500.0) is None
    state = pipeline.state()
    assert state[:6] == ("auto", {name: [32, 40, 48]}, num_cells, 2, False, 0) and state.unavailable is None

    again = FakeLane()
    timed(monkeypatch, lambda *_: pytest.fail("measured again"), again)
    assert finish(open_auto(again, Splits())) == 4 and again.choose is not None
    other = FakeLane()
    more = timed(monkeypatch, seconds, other)
    finish(open_auto(other, Splits(), decode_micro_batches=3))
    assert more == measured, "another number of micro-batches is another table"


@pytest.mark.usefixtures("gpu")
def test_auto_that_wins_nowhere_costs_steps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lane = FakeLane()
    timed(monkeypatch, lambda name, cell: 0.010 if name == PLAIN else 0.0099, lane)
    pipeline = open_auto(lane, Splits())
    finish(pipeline)
    assert lane.choose is None and pipeline.state().ways == {} and pipeline.state().num_won == 0
    again = FakeLane()
    assert finish(open_auto(again, Splits())) == 1 and not again.log, "nothing is captured where nothing won before"


@pytest.mark.usefixtures("gpu")
def test_auto_with_a_split_tries_that_and_plain_streams() -> None:
    lane, split = FakeLane(), Splits()
    opened = open_auto(lane, split, decode_ffn_sm=48)._opened
    assert split.asked == [48] and [each.halves.name for each in opened] == ["84 + 48 SMs", "two streams"]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("given", "asked", "name"),
    [
        ({}, [48], "84 + 48 SMs, 2 micro-batches"),
        ({"decode_attention_sm": 64}, [64], "64 + 68 SMs, 2 micro-batches"),
        ({"decode_attention_sm": 100, "decode_ffn_sm": 32}, [32], "100 + 32 SMs, 2 micro-batches"),
        ({"decode_ffn_sm": 92, "decode_micro_batches": 4}, [40], "40 + 92 SMs, 4 micro-batches"),
    ],
)
def test_on_pipelines_every_step_from_the_start(given: dict[str, int], asked: list[int], name: str) -> None:
    lane, split = FakeLane(), Splits()
    pipeline = open_on(lane, split, **given)
    assert split.asked == asked and lane.log == [(name, size) for size in (48, 40, 32, 24, 16, 8, 4, 2)]
    assert lane.choose is not None and pipeline.prepare_more() is False
    chosen = lane.choose(24, 77.0)
    assert chosen is not None and chosen.name == name
    assert pipeline.state()[:5] == ("on", {name: [2, 4, 8, 16, 24, 32, 40, 48]}, 0, 0, False)
    pipeline.close()
    pipeline.close()
    assert lane.choose is None and split.closed == asked


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("mode", "given", "fails", "text"),
    [
        ("on", {"decode_attention_sm": 64, "decode_ffn_sm": 64}, (), "are 128 SMs, and the device has 132"),
        ("on", {"decode_attention_sm": 13}, (), "failed for 119"),
        ("on", {"decode_ffn_sm": 40}, (40,), "cuGreenCtxCreate failed for 40"),
        ("on", {"decode_ffn_sm": 132}, (), "132 of the device's 132 SMs for one half leave none"),
        ("auto", {"decode_ffn_sm": 132}, (), "set decode_ffn_sm to fewer"),
        ("on", {"decode_attention_sm": 140}, (), "set decode_attention_sm to fewer"),
        ("auto", {}, (32,), "cuGreenCtxCreate failed for 32"),
    ],
)
def test_what_the_device_cannot_leaves_plain_steps_and_one_line(
    mode: str, given: dict[str, int], fails: tuple[int, ...], text: str, caplog: pytest.LogCaptureFixture
) -> None:
    lane, split = FakeLane(), Splits(*fails)
    config = Config(decode_pipeline=cast(Any, mode), **cast(Any, given))
    pipeline = open_pipeline(config, cast(PipelinedLane, lane), split)
    assert pipeline is not None and lane.choose is None and pipeline.prepare_more() is False
    assert [record.getMessage() for record in caplog.records if "decode steps are plain" in record.getMessage()] == [
        f"no decode pipeline, decode steps are plain: {pipeline.state().unavailable}"
    ]
    assert text in str(pipeline.state().unavailable)
    assert sorted(split.closed) == sorted(n for n in split.asked if n not in fails and n % 8 == 0), "all is released"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("mode", ["on", "auto"])
def test_no_memory_for_graphs_leaves_plain_steps(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    lane = FakeLane()
    lane.error = RuntimeError("CUDA error: out of memory")
    pipeline = open_pipeline(Config(decode_pipeline=cast(Any, mode)), cast(PipelinedLane, lane), Splits())
    assert pipeline is not None and pipeline.prepare_more() is False and lane.choose is None
    assert "gpu_memory_utilization" in str(pipeline.state().unavailable) and len(caplog.records) == 1


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("mode", ["on", "auto"])
def test_graphs_are_gone_when_their_memory_is_given_back(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what was captured before memory ran out, and of ways that were measured and lost."""
    lane, made, alive = FakeLane(), list[weakref.ref[Any]](), list[int]()
    timed(monkeypatch, lambda name, cell: 0.010, lane)

    def make_way(halves: Halves, number: int, sizes: list[int]) -> Way:
        way = FakeLane.make_way(lane, halves, number, sizes)
        made.append(weakref.ref(cast(Any, way.graphs)))
        return way

    def capture_way(way: Way) -> Iterator[StepShape]:
        for shape in FakeLane.capture_way(lane, way):
            yield shape
            if mode == "on":
                raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(lane, "make_way", make_way)
    monkeypatch.setattr(lane, "capture_way", capture_way)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(sum(ref() is not None for ref in made)))
    pipeline = open_pipeline(Config(decode_pipeline=cast(Any, mode)), cast(PipelinedLane, lane), Splits())
    assert pipeline is not None
    finish(pipeline)
    assert made and alive == [0]


@pytest.mark.usefixtures("gpu")
def test_auto_measures_plain_steps_of_the_whole_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the lane's last step ran beside prompts, on a partition with graphs of its own."""
    lane, measured = FakeLane(), set[Any]()
    whole = lane.graphs
    pipeline = open_auto(lane, Splits())
    lane.graphs = FakeGraphs()

    def fake(launches: dict[str, Any], device: torch.device) -> dict[str, Timing]:
        measured.add(launches[PLAIN].func.__self__)
        return {name: Timing(0.010, 1e-5) for name in launches}

    monkeypatch.setattr(tuner, "time_in_turn", fake)
    finish(pipeline)
    assert measured == {whole}


@pytest.mark.usefixtures("gpu")
def test_another_error_of_capturing_is_not_hidden() -> None:
    lane = FakeLane()
    lane.error = RuntimeError("operation not permitted when stream is capturing")
    with pytest.raises(RuntimeError, match="not permitted"):
        open_on(lane, Splits())


def test_a_cpu_says_so_and_decodes_plainly(llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    common = {"model": str(llama.folder), "skip_tokenizer_init": True, "num_kv_blocks": 60, "max_num_seqs": 4}
    wanted = [EngineRequest(i, [5, 6, 7 + i], SamplingParams(temperature=0, max_tokens=9)) for i in range(3)]
    for settings in ({}, {"mode": "colocated", "sm_partition": "on"}):
        caplog.clear()
        config = Config(decode_pipeline="on", **common, **cast(Any, settings))
        with caplog.at_level(logging.WARNING):
            engine = build_engine(config, llama.loaded, torch.device("cpu"))
        assert isinstance(engine, MuxEngine) == bool(settings)
        lines = [line for line in caplog.messages if "pipeline" in line]
        assert lines == ["no decode pipeline, decode steps are plain: cpu has no SMs to split; only CUDA devices have"]
        assert engine.pipeline is not None and engine.pipeline.state().unavailable in lines[0]
        for request in wanted:
            engine.add(request)
        while engine.has_work():
            engine.step()
        assert engine.stats().num_pipelined_steps == 0 and engine.prepare_more() is False
    assert build_engine(Config(**cast(Any, common)), llama.loaded, torch.device("cpu")).pipeline is None


def test_halves_of_a_device() -> None:
    split = Splits()
    assert split_halves(torch.device("cpu"), 40, split).halves.name == "40 + 92 SMs"
    assert Halves().name == "in turn"


def test_launches_take_turns() -> None:
    """Each once for warming up, and then in rounds."""
    seen: list[str] = []
    launches = {name: lambda name=name: seen.append(name) for name in ("a", "b")}
    timings = time_in_turn(launches, torch.device("cpu"), repetitions=3)
    assert seen == ["a", "b"] * 4 and all(each.median_s >= 0 for each in timings.values())
