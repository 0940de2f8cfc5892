"""Requests in time of the controller and of mixed steps of fixed sizes, over many seeds, in simulated time.

`python -m pdray.testing.simulated_goodput [SEEDS]` prints a table with the costs of a measured run, and one with those
of an earlier version's steps. Nothing in it is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from statistics import fmean
from typing import NamedTuple

from pdray.engine.mux.costs import Arrangement
from pdray.engine.mux.pace import Targets
from pdray.testing.simulated_load import H100_8B, Costs
from pdray.testing.simulated_mux import MEASURED, MEASURED_8K, SPLITS, SPLITS_MEASURED_8K, TTFT_MS, in_time, serve

CHUNKS = (256, 512, 1024, 2048)
Rates = dict[tuple[int, int], tuple[float, ...]]
NUM_REQUESTS = 200  # of which the last 175 count
RATES: Rates = {(2048, 15): (11, 13), (2048, 8): (4, 5.5), (8192, 15): (1.5, 2), (8192, 8): (0.8, 1.2)}
EARLIER_RATES: Rates = {
    (2048, 15): (7.5, 9, 11),
    (2048, 8): (2.5, 3.5, 5),
    (8192, 15): (1.1, 1.5),
    (8192, 8): (0.4, 0.7, 1),
}


class Row(NamedTuple):
    """Attributes:
    shares: of requests in time, of the controller and of each of CHUNKS.
    """

    input_len: int
    tpot_ms: int
    rate: float
    shares: list[float]


def rows(rates: Rates, num_seeds: int, *, measured: bool) -> Iterator[Row]:
    """Rows of one table, one for each rate.

    Args:
        rates: by prompt length and TPOT. measured: with the costs of a measured run.
    """
    for (input_len, tpot_ms), each in rates.items():
        costs, splits = costs_of(input_len) if measured else (H100_8B, SPLITS)
        ways: list[Targets | Arrangement] = [Targets(tpot_ms / 1000, TTFT_MS / 1000)]
        ways += [Arrangement(chunk=n) for n in CHUNKS]
        for rate in each:
            shares = []
            for way in ways:
                runs = (
                    serve(way, rate, num_requests=NUM_REQUESTS, input_len=input_len, costs=costs, splits=splits, seed=n)
                    for n in range(num_seeds)
                )
                shares.append(fmean(in_time(run, tpot_ms) for run in runs))
            yield Row(input_len, tpot_ms, rate, shares)


def costs_of(input_len: int) -> tuple[Costs, dict[int, tuple[float, float]]]:
    """Of the measured run."""
    return (MEASURED_8K, SPLITS_MEASURED_8K) if input_len > 4096 else (MEASURED, SPLITS)


def main() -> None:
    num_seeds = int(sys.argv[1]) if sys.argv[1:] else 8
    for measured, rates in ((True, RATES), (False, EARLIER_RATES)):
        print(f"| in, TPOT ms, requests/s | controller | {' | '.join(map(str, CHUNKS))} |")
        print("|---|---|" + "---|" * len(CHUNKS))
        for row in rows(rates, num_seeds, measured=measured):
            shares = " | ".join(f"{share:.1%}" for share in row.shares)
            print(f"| {row.input_len}, {row.tpot_ms}, {row.rate:g} | {shares} |", flush=True)
        print()


if __name__ == "__main__":
    main()
