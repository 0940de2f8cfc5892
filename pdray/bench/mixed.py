"""The row "mixed" of `pdray bench offline --rows`: prompts that arrive while others decode, as in a colocated worker.

Poisson arrivals of prompts of INPUT_LEN tokens, each answered with OUTPUT_LEN. What counts is when the tokens come: the
first one, the mean gap of a stream and its longest one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pdray.bench.rows import Requests, Workload
from pdray.bench.workload import poisson_arrivals

INPUT_LEN, OUTPUT_LEN = 2048, 256
TTFT_LIMIT_S = 1.0
TPOT_LIMITS_S = (0.015, 0.008)
WARM_UP_REQUESTS = 4
FILLING = 0.2  # share of the requests that come while the batch still fills, and do not count

Play = Callable[[Requests, list[float]], list[list[float]]]
"""Send the requests at these times; returns, for each, when its tokens came. All in seconds from the start."""


class MixedMeasured(NamedTuple):
    """One way at one rate; milliseconds. gap: the longest of each stream. within: shares of the requests."""

    name: str
    way: str
    request_rate: float
    num_requests: int
    ttft_p50: float
    ttft_p90: float
    tpot_p50: float
    tpot_p90: float
    gap_p50: float
    gap_max: float
    within_15_ms: float
    within_8_ms: float


HEADER = (
    "| mixed, requests/s | way | TTFT p50, p90 ms | TPOT p50, p90 ms | longest gap p50, max ms "
    "| within 1 s and 15 ms, 8 ms |\n|---|---|---|---|---|---|"
)


def measure_mixed(
    way: str,
    play: Play,
    vocab_size: int,
    request_rate: float,
    seconds: float,
    *,
    input_len: int = INPUT_LEN,
    output_len: int = OUTPUT_LEN,
) -> MixedMeasured:
    """Requests for so many seconds, after a few that warm up; the same for every way.

    Raises:
        ConfigError: the rate is not above 0.
    """
    num_requests = max(2, round(request_rate * seconds))
    arrivals = poisson_arrivals(num_requests, request_rate, 1.0, np.random.default_rng(0))
    play(Workload(WARM_UP_REQUESTS, input_len, output_len).requests(vocab_size, 0), [0.0] * WARM_UP_REQUESTS)
    requests = Workload(num_requests, input_len, output_len).requests(vocab_size, 1)
    times = play(requests, arrivals)
    assert [len(each) for each in times] == requests.output_lens
    row = summarize(way, request_rate, arrivals, times)
    print(format_row(row), flush=True)
    return row


def summarize(
    way: str, request_rate: float, arrivals: Sequence[float], times: Sequence[Sequence[float]]
) -> MixedMeasured:
    """Figures of all requests but those that came while the batch was filling."""
    first = int(FILLING * len(arrivals))
    counted = list(zip(arrivals, times, strict=True))[first:]
    ttft = [tokens[0] - arrival for arrival, tokens in counted]
    tpot = [(tokens[-1] - tokens[0]) / (len(tokens) - 1) for _, tokens in counted]
    gaps = [max(b - a for a, b in pairwise(tokens)) for _, tokens in counted]
    fast, faster = (
        float(np.mean([a <= TTFT_LIMIT_S and b <= limit for a, b in zip(ttft, tpot, strict=True)]))
        for limit in TPOT_LIMITS_S
    )
    ttft_p50, ttft_p90 = (1000 * float(each) for each in np.percentile(ttft, (50, 90)))
    tpot_p50, tpot_p90 = (1000 * float(each) for each in np.percentile(tpot, (50, 90)))
    gap_p50, gap_max = (1000 * float(each) for each in np.percentile(gaps, (50, 100)))
    figures = ttft_p50, ttft_p90, tpot_p50, tpot_p90, gap_p50, gap_max
    return MixedMeasured("mixed", way, request_rate, len(counted), *figures, fast, faster)


def format_row(row: MixedMeasured) -> str:
    return (
        f"| {row.request_rate:g} | {row.way} | {row.ttft_p50:.0f}, {row.ttft_p90:.0f} | {row.tpot_p50:.2f}, "
        f"{row.tpot_p90:.2f} | {row.gap_p50:.1f}, {row.gap_max:.1f} | {row.within_15_ms:.0%}, {row.within_8_ms:.0%} |"
    )
