"""`pdray bench pipeline`: decode steps in micro-batches, attention beside feed-forward, against plain ones.

One set of weights and one pool for all. Each row is one batch size and context; each column a way to compute the step:
plain; in micro-batches on one stream after the other; beside each other on two streams that share every SM; on
partitions. Sequences are alike, and their KV lies in distinct blocks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdray.bench.offline import machine
from pdray.config import Config
from pdray.errors import ConfigError
from pdray.gpu_settings import require_one_rank
from pdray.options import add_config_arguments, config_from_args

if TYPE_CHECKING:  # these need torch, which the command line's help does without
    import torch

    from pdray.engine.pipeline.halves import Halves, SplitHalves
    from pdray.engine.pipeline.lane import PipelinedLane, Way
    from pdray.engine.pipeline.measure import Timing

PLAIN = "plain"
Launches = dict[str, Callable[[], object]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `pdray bench pipeline`."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="as for `pdray serve`")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 8, 32, 64, 128, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192, 16384], help="tokens of each")
    parser.add_argument(
        "--splits", type=int, nargs="*", default=[16, 32, 48, 64, 84, 100, 116], help="SMs of the attention, each"
    )
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[2], help="how many (default: 2)")
    parser.add_argument("--repetitions", type=int, default=7, help="of each step (default: 7)")
    parser.add_argument("--save-result", type=Path, metavar="FILE", help="write the rows as JSON")
    add_config_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Measure, print, save."""
    config = config_from_args(args)
    require_one_rank(config, "bench pipeline")
    for name in ("batch_sizes", "contexts", "micro_batches"):
        if min(getattr(args, name)) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0")
    if args.repetitions < 1:
        raise ConfigError("--repetitions must be above 0")
    most = max(args.batch_sizes)
    config = config.model_copy(
        update={
            "enforce_eager": True,  # graphs are made here
            "decode_pipeline": "off",
            "max_num_seqs": most,
            "max_num_batched_tokens": max(config.max_num_batched_tokens, most),
        }
    )
    result = {"config": config.model_dump(), "rows": run(config, args)} | machine()
    if args.save_result:
        args.save_result.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def run(config: Config, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each batch size and context that fits the pool, printed as they come."""
    from pdray.engine.build import make_pool
    from pdray.engine.device import select_device
    from pdray.engine.engine import Engine
    from pdray.garbage_collection import quiet_garbage_collection
    from pdray.models import load_model

    device = select_device(config)
    model = load_model(config, device)
    lane = Engine(config, model, make_pool(config, model, device)).lane
    quiet_garbage_collection()
    opened = open_ways(device, args.splits)
    halves = [each.halves for each in opened]
    names = [PLAIN, *(way_name(each, number) for each in halves for number in args.micro_batches)]
    print(f"| batch | context | {' | '.join([PLAIN + ' ms', *names[1:]])} |", flush=True)
    print("|---:|---:|" + "---:|" * len(names), flush=True)
    rows: list[dict[str, Any]] = []
    for size in sorted(args.batch_sizes):
        contexts = [context for context in args.contexts if fits(lane, size, context)]
        launches = make_launches(lane, size, halves, args.micro_batches) if contexts else {}
        for context in contexts:
            timings = measure(lane, launches, size, context, args.repetitions)
            rows.append({"batch_size": size, "context": context, "ms": milliseconds(timings)})
            print(format_row(size, context, timings, names), flush=True)
        launches.clear()  # graphs go before their partitions
    for each in opened:
        each.split.close()
    return rows


def open_ways(device: torch.device, sizes: list[int]) -> list[SplitHalves]:
    """In turn on one stream, on two plain streams, and on each partition that the device hands out."""
    from pdray.engine.pipeline.halves import Halves, SplitHalves, split_halves, stream_halves
    from pdray.kernels.green_context import UnavailableError

    streams = stream_halves(device)
    ways = [SplitHalves(Halves(), streams.split)]
    if device.type == "cuda":
        ways.append(streams)
    for attention_sms in sizes:
        try:
            ways.append(split_halves(device, attention_sms))
        except UnavailableError as error:
            print(f"without {attention_sms} SMs for the attention: {error}", flush=True)
    return ways


def way_name(halves: Halves, number: int) -> str:
    return f"{number}: {halves.name}"


def fits(lane: PipelinedLane, size: int, context: int) -> bool:
    """Whether the pool has a block of its own for each block of theirs."""
    limits = lane.limits
    return context <= limits.max_model_len and size * limits.num_blocks_for(context) <= limits.num_blocks


def make_launches(lane: PipelinedLane, size: int, halves: list[Halves], numbers: list[int]) -> Launches:
    """What launches a step of this size each way: graphs on CUDA, and on CPU what graphs would hold."""
    from pdray.engine.step.inputs import StepShape
    from pdray.engine.step.lane import Place

    on_gpu = lane.pool.device.type == "cuda"
    shape = StepShape(size, size, size, True)
    launches: Launches = {}
    if on_gpu:
        import torch

        graphs = lane.more_graphs([size], [])
        for _ in lane.capture_one_by_one(Place(torch.cuda.Stream(lane.pool.device), graphs)):
            pass
        launches[PLAIN] = partial(graphs.replay, shape)
    else:
        launches[PLAIN] = lambda: lane.compute(lane.rehearsed)
    for each in halves:
        for number in numbers:
            way = lane.make_way(each, number, [size] if on_gpu else None)
            for _ in lane.capture_way(way) if on_gpu else ():
                pass
            if way.graphs is not None:
                launches[way_name(each, number)] = partial(way.graphs.replay, shape)
            else:
                launches[way_name(each, number)] = partial(compute_rehearsed, lane, way)
    return launches


def compute_rehearsed(lane: PipelinedLane, way: Way) -> None:
    lane.compute_in(way, lane.rehearsed)


def measure(lane: PipelinedLane, launches: Launches, size: int, context: int, repetitions: int) -> dict[str, Timing]:
    """One row."""
    from pdray.engine.pipeline.measure import time_in_turn

    lane.rehearse(size, context)
    return time_in_turn(launches, lane.pool.device, repetitions=repetitions)


def milliseconds(timings: dict[str, Timing]) -> dict[str, list[float]]:
    """Median, and spread between the quartiles."""
    return {name: [round(each.median_s * 1000, 4), round(each.spread_s * 1000, 4)] for name, each in timings.items()}


def format_row(size: int, context: int, timings: dict[str, Timing], names: list[str]) -> str:
    """The plain step's milliseconds, and how many times as long each other way takes."""
    plain_s = timings[PLAIN].median_s
    cells = [str(size), str(context), f"{plain_s * 1000:.2f}"]
    cells += [f"{timings[name].median_s / plain_s:.3f}" for name in names[1:]]
    return f"| {' | '.join(cells)} |"
