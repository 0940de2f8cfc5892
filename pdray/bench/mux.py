"""`pdray bench mux`: prompts and decodes on one GPU, mixed in one step or beside each other on partitions of its SMs.

One engine and one set of weights for all rows. First what a decode step suffers beside prompts that never end, and what
those get: alone, mixed with chunks of several sizes, on two plain streams, on each partition. Then, with --rates,
requests that come at random: the share that has its first token and its further tokens in time, in each arrangement and
as the controller chooses.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pdray.bench.offline import machine
from pdray.bench.plot import Series, line_plot
from pdray.bench.workload import poisson_arrivals
from pdray.config import Config
from pdray.errors import ConfigError
from pdray.options import add_config_arguments, config_from_args

if TYPE_CHECKING:  # these need torch, which the command line's help does without
    from pdray.bench.mux_load import Beside, Served
    from pdray.engine.mux.costs import Arrangement
    from pdray.engine.mux.engine import MuxEngine
    from pdray.engine.request import EngineRequest

COLORS = ("#1f6feb", "#d73a49", "#2da44e", "#bf8700", "#8250df", "#57606a", "#0a7ea4", "#e16f24", "#24292f")
BESIDE_HEAD = (
    "| arrangement | decode p50 ms | p99 | longest | to alone (p99) | prompt tok/s | of alone |\n"
    "|---|---:|---:|---:|---:|---:|---:|"
)
SERVED_HEAD = (
    "| in | req/s | TPOT target ms | arrangement | TTFT p50 / p99 ms | TPOT p50 / p99 ms | longest gap ms | in time |\n"
    "|---:|---:|---:|---|---:|---:|---:|---:|"
)


class Row(NamedTuple):
    """A named arrangement; None: as the controller chooses."""

    name: str
    arrangement: Arrangement | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `pdray bench mux`."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="as for `pdray serve`")
    parser.add_argument("--seconds", type=float, default=3.0, help="measured for each row (default: 3)")
    parser.add_argument("--num-decodes", type=int, default=32, help="sequences that decode (default: 32)")
    parser.add_argument("--context", type=int, default=1024, help="tokens that each begins with (default: 1024)")
    parser.add_argument("--input-len", type=int, default=4096, help="of the prompts beside them (default: 4096)")
    parser.add_argument(
        "--chunks", type=int, nargs="*", default=[128, 256, 512, 1024, 2048], help="of mixed steps, tokens"
    )
    parser.add_argument("--piece-tokens", type=int, default=2048, help="of prompts on a partition at a time")
    parser.add_argument("--no-beside", action="store_true", help="leave out the first table")
    parser.add_argument("--rates", type=float, nargs="*", default=[], help="requests a second of the second table")
    parser.add_argument("--rate-chunks", type=int, nargs="*", default=[512, 1024, 2048], help="of its mixed steps")
    parser.add_argument("--rate-seconds", type=float, default=10.0, help="about how long each rate is offered")
    parser.add_argument("--served-input-len", type=int, default=2048, help="prompt tokens (default: 2048)")
    parser.add_argument("--served-output-len", type=int, default=256, help="output tokens (default: 256)")
    parser.add_argument("--ttft-ms", type=float, default=1000.0, help="within which a first token is in time")
    parser.add_argument("--tpot-ms", type=float, nargs="+", default=[15.0, 8.0], help="the same of further tokens")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="requests in time over rate, as SVG")
    parser.add_argument("--save-result", type=Path, metavar="FILE", help="write the rows as JSON")
    add_config_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Measure, print, save."""
    config = config_from_args(args)
    if config.sm_partition == "off":
        config = config.model_copy(update={"mode": "colocated", "sm_partition": "auto"})
    if args.seconds <= 0 or min(args.num_decodes, args.context, args.input_len) < 1:
        raise ConfigError("--seconds, --num-decodes, --context and --input-len must be above 0")
    if args.plot and not args.rates:
        raise ConfigError("--plot draws the second table: give --rates")
    engine = make_engine(config, args.piece_tokens)
    try:
        result: dict[str, Any] = {"beside": [], "served": []}
        if not args.no_beside:
            result["beside"] = run_beside(engine, args)
        for input_len in [args.served_input_len] if args.rates else []:
            result["served"] += run_served(engine, args, input_len)
        if args.plot:
            args.plot.write_text(plot(result["served"], args.tpot_ms))
    finally:
        engine.close()
    if args.save_result:
        args.save_result.write_text(json.dumps({"config": config.model_dump()} | result | machine(), indent=1) + "\n")
    return 0


def make_engine(config: Config, piece_tokens: int) -> MuxEngine:
    """An engine of two lanes with every graph, and a pair of plain streams besides its partitions."""
    from pdray.engine.build import make_pool
    from pdray.engine.device import select_device
    from pdray.engine.mux.engine import MuxEngine, wanted_sizes
    from pdray.garbage_collection import quiet_garbage_collection
    from pdray.kernels.green_context import open_splits, plain_streams
    from pdray.models import load_model

    device = select_device(config)
    model = load_model(config, device)
    splits = open_splits(device, wanted_sizes(config))
    if splits[0].unavailable is None:
        splits.append(plain_streams(device, "plain streams were asked for"))
    engine = MuxEngine(config, model, make_pool(config, model, device), splits=splits, piece_tokens=piece_tokens)
    while engine.prepare_more():
        pass
    quiet_garbage_collection()
    return engine


def rows_of(engine: MuxEngine, chunks: list[int]) -> list[Row]:
    """Every arrangement that this engine has."""
    from pdray.engine.mux.costs import Arrangement

    mixed = [Row(f"mixed, {chunk}", Arrangement(chunk=chunk)) for chunk in chunks]
    total = engine.num_sms
    splits = [
        Row(f"{n} + {total - n} SMs" if n else "two plain streams", Arrangement(decode_sms=n))
        for n in engine.split_state().ready
    ]
    return mixed + splits


def run_beside(engine: MuxEngine, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The first table."""
    from pdray.bench.mux_load import Prompts, measure_beside

    prompts = Prompts(engine.model.config.vocab_size, 0)
    sizes = {"context": args.context, "seconds": args.seconds}
    print(BESIDE_HEAD, flush=True)
    decode = measure_beside(engine, prompts, num_decodes=args.num_decodes, input_len=0, **sizes)
    prompt = measure_beside(engine, prompts, num_decodes=0, input_len=args.input_len, **sizes)
    rows = [("decodes alone", decode), ("prompts alone", prompt)]
    for name, row in rows:
        print(format_beside(name, row, decode, prompt), flush=True)
    for name, arrangement in rows_of(engine, args.chunks):
        engine.controller.fixed = arrangement
        row = measure_beside(engine, prompts, num_decodes=args.num_decodes, input_len=args.input_len, **sizes)
        rows.append((name, row))
        print(format_beside(name, row, decode, prompt), flush=True)
    engine.controller.fixed = None
    return [{"name": name} | row._asdict() for name, row in rows]


def format_beside(name: str, row: Beside, decode: Beside, prompt: Beside) -> str:
    gaps = ["" if ms is None else f"{ms:.2f}" for ms in row[:3]]
    slower = "" if row.gap_p99 is None or not decode.gap_p99 else f"{row.gap_p99 / decode.gap_p99:.2f}"
    rate = [f"{row.prompt_rate:,.0f}", f"{row.prompt_rate / prompt.prompt_rate:.0%}"] if row.prompt_rate else ["", ""]
    return f"| {' | '.join([name, *gaps, slower, *rate])} |"


def run_served(engine: MuxEngine, args: argparse.Namespace, input_len: int) -> list[dict[str, Any]]:
    """The second table."""
    from pdray.bench.mux_load import serve
    from pdray.engine.mux.controller import Targets

    print(f"\n{SERVED_HEAD}", flush=True)
    fixed = rows_of(engine, args.rate_chunks)
    results = []
    for rate in args.rates:
        for name, arrangement in fixed:
            engine.controller.fixed = arrangement
            served = serve(engine, arrivals(engine, args, input_len, rate))
            for tpot_ms in args.tpot_ms:
                results.append(summary(name, input_len, rate, tpot_ms, args.ttft_ms, served))
                print(format_served(results[-1]), flush=True)
        engine.controller.fixed = None
        for tpot_ms in args.tpot_ms:
            engine.controller.targets = Targets(tpot_ms / 1000, None)
            changes = engine.split_state().num_changes
            served = serve(engine, arrivals(engine, args, input_len, rate))
            results.append(summary("controller", input_len, rate, tpot_ms, args.ttft_ms, served))
            print(format_served(results[-1]), f"{engine.split_state().num_changes - changes} changes", flush=True)
    return results


def arrivals(
    engine: MuxEngine, args: argparse.Namespace, input_len: int, rate: float
) -> Iterator[tuple[float, EngineRequest]]:
    """The same times for every arrangement, with other prompts."""
    from pdray.bench.mux_load import Prompts

    number = max(2, round(rate * args.rate_seconds))
    times = poisson_arrivals(number, rate, 1.0, np.random.default_rng(7))
    prompts = Prompts(engine.model.config.vocab_size, 1)
    for at in times:
        request = prompts.request(input_len, args.served_output_len)
        yield at, replace(request, key=("served", request.key))


def summary(
    name: str, input_len: int, rate: float, tpot_ms: float, ttft_ms: float, served: list[Served]
) -> dict[str, Any]:
    """One row of the second table."""
    from pdray.bench.mux_load import goodput

    ttft, tpot = ([getattr(each, field) * 1000 for each in served] for field in ("ttft_s", "tpot_s"))
    in_time = goodput(served, lambda each: each.ttft_s * 1000 <= ttft_ms and each.tpot_s * 1000 <= tpot_ms)
    percentiles = {
        f"{field}_{p}": round(float(np.percentile(values, p)), 2)
        for field, values in (("ttft", ttft), ("tpot", tpot))
        for p in (50, 99)
    }
    longest = max(each.longest_gap_s for each in served) * 1000
    where = {"name": name, "input_len": input_len, "rate": rate, "tpot_target": tpot_ms}
    return where | percentiles | {"longest_gap": round(longest, 1), "in_time": in_time}


def format_served(row: dict[str, Any]) -> str:
    cells = [str(row["input_len"]), f"{row['rate']:g}", f"{row['tpot_target']:g}", row["name"]]
    cells += [f"{row['ttft_50']:.0f} / {row['ttft_99']:.0f}", f"{row['tpot_50']:.2f} / {row['tpot_99']:.2f}"]
    cells += [f"{row['longest_gap']:.0f}", f"{row['in_time']:.0%}"]
    return f"| {' | '.join(cells)} |"


def plot(rows: list[dict[str, Any]], tpot_ms: list[float]) -> str:
    """Requests in time a second over requests offered a second, for the strictest TPOT."""
    strictest = min(tpot_ms)
    mine = [row for row in rows if row["tpot_target"] == strictest]
    series = []
    for color, name in zip(COLORS, dict.fromkeys(row["name"] for row in mine), strict=False):
        points = [(row["rate"], row["rate"] * row["in_time"]) for row in mine if row["name"] == name]
        series.append(Series(name, color, points))
    return line_plot(f"Requests within a TPOT of {strictest:g} ms", "offered requests/s", "in time requests/s", series)
