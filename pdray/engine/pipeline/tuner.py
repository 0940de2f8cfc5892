"""Measures plain decode steps against pipelined ones, for each batch size and context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from pdray.engine.pipeline.lane import PipelinedLane, Way
from pdray.engine.pipeline.measure import Timing, time_in_turn
from pdray.engine.pipeline.table import Cell, Found, Table
from pdray.engine.schedule.limits import EngineLimits
from pdray.engine.step.graphs import StepGraphs
from pdray.engine.step.inputs import StepShape

SIZES = (2, 4, 8, 16, 32, 64, 128, 256)  # of batches, and max_num_seqs
CONTEXTS = (512, 2048, 8192, 16384, 32768)  # tokens, or max_model_len if that is less; other means go by the nearest
MIN_GAIN = 0.02  # of a plain step's time, below which nothing is worth a change
PLAIN = "plain"


def grid_of(limits: EngineLimits) -> list[Cell]:
    """Cells that the pool can hold, the largest batch first."""
    sizes = {size for size in SIZES if size < limits.max_num_seqs} | {limits.max_num_seqs}
    contexts = [context for context in CONTEXTS if context <= limits.max_model_len] or [limits.max_model_len]
    return [
        Cell(size, context)
        for size in sorted(sizes, reverse=True)
        for context in contexts
        if size * limits.num_blocks_for(context) <= limits.num_blocks
    ]


def tune(
    lane: PipelinedLane, plain: StepGraphs, ways: Sequence[Way], grid: Sequence[Cell], table: Table
) -> Iterator[None]:
    """Fill the table; one graph is captured, or one cell measured, before each value. No step may be in flight.

    Args:
        plain: the lane's own graphs on every SM, wherever its last step ran.
        ways: their graphs have the grid's sizes, and none is captured yet.
    """
    captures = [lane.capture_way(way) for way in ways]
    for size, cells in groupby(grid, key=lambda cell: cell.num_seqs):
        for capture in captures:
            shape = next(capture)
            assert shape.num_seqs == size, f"a graph of {shape.num_seqs} sequences came where {size} were due"
            yield
        for cell in cells:
            lane.rehearse(*cell)
            table.cells[cell] = judge(time_in_turn(launches(plain, ways, size), lane.pool.device))
            yield


def launches(plain: StepGraphs, ways: Sequence[Way], size: int) -> dict[str, Any]:
    """What launches a step of ``size`` sequences, by the name of its way."""
    shape = StepShape(size, size, size, True)
    graphs = {PLAIN: plain} | {way.name: way.graphs for way in ways if way.graphs is not None}
    return {name: partial(each.replay, shape) for name, each in graphs.items()}


def judge(timings: dict[str, Timing]) -> Found:
    """The fastest way, and whether it beats plain steps by more than noise and MIN_GAIN."""
    plain = timings[PLAIN]
    best = min((name for name in timings if name != PLAIN), key=lambda name: timings[name].median_s)
    gain_s = plain.median_s - timings[best].median_s
    noise_s = plain.spread_s + timings[best].spread_s
    wins = gain_s > max(noise_s, MIN_GAIN * plain.median_s)
    return Found(round(plain.median_s * 1000, 4), best, round(timings[best].median_s * 1000, 4), wins)
