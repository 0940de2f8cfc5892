"""Decode steps beside transfers: what it costs a running batch that prompts are computed elsewhere and handed over.

Streams decode, first alone, then while the prefill worker computes prompts at its own rate and hands each over for one
step. Durations are the decode worker's own, over its last 512 steps. Colocated, the same shows what transfers replace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pdray.engine.step.times import NUM_STEPS, Spread
from pdray.sampling_params import SamplingParams

NUM_STREAMS = 8
STREAM_LEN = 16
LAUNCH_STEPS = 16  # of the streams, until all decode

# Runs these prompts together; returns the spread of the decode steps meanwhile.
Decode = Callable[[list[list[int]], list[SamplingParams]], Spread]


class Beside(NamedTuple):
    """Attributes:
    num_prompts: of input_len tokens, handed over beside the streams.
    alone, beside: steps of the streams, in milliseconds.
    """

    way: str
    input_len: int
    num_prompts: int
    alone: Spread
    beside: Spread

    @property
    def ratio(self) -> float:
        """Of the 99th percentiles."""
        return self.beside.p99 / self.alone.p99


def measure_beside(way: str, decode: Decode, input_len: int, ttft_ms: float, step_ms: float) -> Beside:
    """As many prompts as last for the streams' steps.

    Args:
        ttft_ms, step_ms: of one prompt of input_len tokens, on an idle system.
    """
    rng = np.random.default_rng((8, input_len))
    streams = rng.integers(5, 500, size=(NUM_STREAMS, STREAM_LEN)).tolist()
    long = SamplingParams(temperature=0, max_tokens=NUM_STEPS + LAUNCH_STEPS, ignore_eos=True)
    alone = decode(streams, [long] * NUM_STREAMS)
    number = max(1, int(NUM_STEPS * step_ms / ttft_ms))
    prompts = rng.integers(5, 500, size=(number, input_len)).tolist()
    short = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    beside = decode([*streams, *prompts], [long] * NUM_STREAMS + [short] * number)
    return Beside(way, input_len, number, alone, beside)


HEADER = (
    f"| prompts | way | handed over beside {NUM_STREAMS} streams | step alone p50 | p99 | step beside p50 | p99 "
    "| **p99 beside / alone** |\n|---|---|---|---|---|---|---|---|"
)


def format_beside(row: Beside) -> str:
    figures = (row.alone.p50, row.alone.p99, row.beside.p50, row.beside.p99)
    cells = " | ".join(f"{figure:.2f}" for figure in figures)
    return f"| {row.input_len} | {row.way} | {row.num_prompts} | {cells} | **{row.ratio:.2f}** |"
