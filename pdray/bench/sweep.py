"""`pdray bench serve --sweep`: the same load at rising rates, as a table and a plot of what came out."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from pdray.bench.plot import Series, line_plot
from pdray.bench.serving_metrics import RequestRecord
from pdray.errors import ConfigError

Run = Callable[[argparse.Namespace], Coroutine[Any, Any, tuple[dict[str, Any], list[RequestRecord]]]]

HEAD = (
    "| offered req/s | completed req/s | output tok/s | rejected | failed | TTFT p99 ms | ITL p99 ms |\n"
    "|---:|---:|---:|---:|---:|---:|---:|"
)


def run_sweep(args: argparse.Namespace, run: Run) -> list[dict[str, Any]]:
    """Results of one run for each rate of --sweep, each about --sweep-seconds long; a line is printed for each.

    Raises:
        ConfigError: a rate that is not above 0, or a trace, which has a rate of its own.
    """
    if args.trace is not None or args.num_prompts is not None:
        raise ConfigError("--sweep sets the number of requests and their rate: leave out --trace and --num-prompts")
    if any(not 0 < rate < float("inf") for rate in args.sweep):
        raise ConfigError(f"--sweep {' '.join(f'{rate:g}' for rate in args.sweep)}: rates must be above 0 and finite")
    print(HEAD, flush=True)
    results = []
    for rate in args.sweep:
        step = {"request_rate": rate, "num_prompts": max(2, round(rate * args.sweep_seconds)), "disable_tqdm": True}
        result, _ = asyncio.run(run(argparse.Namespace(**vars(args) | step)))
        results.append(result)
        print(
            f"| {rate:g} | {result['request_throughput']:.2f} | {result['output_throughput']:.1f} | "
            f"{result['rejected']} | {result['failed']} | {_ms(result['p99_ttft_ms'])} | {_ms(result['p99_itl_ms'])} |",
            flush=True,
        )
    if args.plot is not None:
        plot(results, args.plot)
    return results


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Requests completed a second over requests offered a second, as SVG."""
    offered = [(result["request_rate"], result["request_rate"]) for result in results]
    completed = [(result["request_rate"], result["request_throughput"]) for result in results]
    series = [Series("offered", "#888888", offered), Series("completed", "#1f6feb", completed)]
    path.write_text(line_plot(f"Goodput of {results[0]['model_id']}", "offered requests/s", "requests/s", series))
