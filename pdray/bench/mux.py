"""`pdray bench mux`: prompts and decodes on one GPU, mixed in one step or beside each other on partitions of its SMs.

One engine and one set of weights for all rows. First what a decode step suffers beside prompts that never end, and what
those get: alone, mixed with chunks of several sizes, on two plain streams, on each partition. Then, with --serve,
requests that come at random: the share that has its first token and its further tokens in time, in each arrangement, as
the controller chooses, and on two workers that share the GPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdray.bench.mux_served import (
    HEAD,
    Asked,
    OfferedLoad,
    arrangement_of,
    name_of,
    parse_load,
    plot,
    run_halves,
    run_served,
)
from pdray.bench.offline import machine
from pdray.config import Config
from pdray.errors import ConfigError
from pdray.gpu_settings import require_one_rank
from pdray.options import add_config_arguments, config_from_args

if TYPE_CHECKING:  # these need torch, which the command line's help does without
    from pdray.bench.mux_load import Beside
    from pdray.engine.mux.engine import MuxEngine

BESIDE_HEAD = (
    "| arrangement | decode p50 ms | p99 | longest | to alone (p99) | prompt tok/s | of alone |\n"
    "|---|---:|---:|---:|---:|---:|---:|"
)


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
    parser.add_argument(
        "--compare-plain", action="store_true", help="first: decodes alone, in turn with an engine without partitions"
    )
    parser.add_argument(
        "--serve",
        nargs="*",
        default=[],
        metavar="IN@RATE[xSECONDS][:ROW,…]",
        help="loads of the second table: prompt tokens, requests a second, seconds instead of --serve-seconds, rows: "
        "chunkN (mixed steps of N tokens), smsN (decodes on N SMs; sms0: two plain streams), controller, controllerN "
        "(for a TPOT of N ms alone), halves (two workers, each with half of the GPU); default: all but halves",
    )
    parser.add_argument(
        "--serve-seconds", type=float, default=10.0, help="about how long each load is offered: 16 requests or more"
    )
    parser.add_argument("--served-output-len", type=int, default=256, help="output tokens (default: 256)")
    parser.add_argument("--ttft-ms", type=float, default=1000.0, help="within which a first token is in time")
    parser.add_argument("--tpot-ms", type=float, nargs="+", default=[15.0, 8.0], help="the same of further tokens")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="of the first --serve's prompts and each TPOT: requests in time over rate, as SVG; FILE-8ms.svg and so on",
    )
    parser.add_argument("--save-result", type=Path, metavar="FILE", help="write the rows as JSON")
    add_config_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Measure, print, save."""
    from pdray.bench.ways import make_llm

    config = config_from_args(args)
    require_one_rank(config, "bench mux")
    if config.sm_partition == "off":
        config = config.model_copy(update={"mode": "colocated", "sm_partition": "auto"})
    if args.seconds <= 0 or min(args.num_decodes, args.context, args.input_len) < 1:
        raise ConfigError("--seconds, --num-decodes, --context and --input-len must be above 0")
    loads = [parse_load(text) for text in args.serve]
    if args.plot and not loads:
        raise ConfigError("--plot draws the second table: give --serve")
    asked = Asked(args.serve_seconds, args.served_output_len, args.ttft_ms, args.tpot_ms)
    result = measure(config, loads, asked, args)
    result["served"] += run_halves(config, loads, asked, make_llm)
    for tpot_ms in args.tpot_ms if args.plot else []:
        where = args.plot.with_name(f"{args.plot.stem}-{tpot_ms:g}ms.svg")
        where.write_text(plot(result["served"], loads[0].input_len, tpot_ms))
    if args.save_result:
        args.save_result.write_text(json.dumps({"config": config.model_dump()} | result | machine(), indent=1) + "\n")
    return 0


def measure(config: Config, loads: list[OfferedLoad], asked: Asked, args: argparse.Namespace) -> dict[str, Any]:
    """All that one engine measures; its memory is free again."""
    result: dict[str, Any] = {"plain": [], "beside": [], "served": []}
    if not args.compare_plain and args.no_beside and all(load.rows == ("halves",) for load in loads):
        return result
    engine = make_engine(config, args.piece_tokens)
    try:
        if args.compare_plain:
            result["plain"] = compare_plain(engine, config, args)
        if not args.no_beside:
            result["beside"] = run_beside(engine, args)
        if loads:
            print(f"\n{HEAD}", flush=True)
            result["served"] = run_served(engine, loads, asked)
    finally:
        engine.close()
        del engine
        free_memory()
    return result


def free_memory() -> None:
    """Give the device back what nothing holds any more."""
    import gc

    import torch

    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


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


def compare_plain(engine: MuxEngine, config: Config, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Decodes alone on this engine and on one that never had partitions, over the same weights, in turn."""
    from pdray.bench.mux_load import Prompts, measure_beside
    from pdray.engine.build import make_pool
    from pdray.engine.engine import Engine

    plain = Engine(config, engine.model, make_pool(config, engine.model, engine.device))
    prompts, rows = Prompts(engine.model.config.vocab_size, 2), []
    for name, each in (("without", plain), ("with", engine), ("with", engine), ("without", plain)):
        sizes = {"context": args.context, "seconds": args.seconds}
        row = measure_beside(each, prompts, num_decodes=args.num_decodes, input_len=0, **sizes)
        print(f"decodes alone, {name} partitions: p50 {row.gap_p50} ms, p99 {row.gap_p99} ms", flush=True)
        rows.append({"name": name} | row._asdict())
    del plain, each
    free_memory()
    return rows


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
    splits = [f"sms{n}" for n in engine.split_state().ready]
    for word in (*(f"chunk{n}" for n in args.chunks), *splits):
        engine.controller.fixed, name = arrangement_of(word, engine), name_of(word, engine.num_sms)
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
