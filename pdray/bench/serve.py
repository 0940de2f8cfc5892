"""`pdray bench serve`: load a running OpenAI-compatible server and measure it from the client's side."""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np

from pdray.bench.client import send_request
from pdray.bench.sending import Target, new_session, send_from_here, send_from_processes
from pdray.bench.serving_metrics import RequestRecord, calculate_metrics, format_metrics, parse_goodput
from pdray.bench.sweep import run_sweep
from pdray.bench.timings import breakdown_table, mean_timings
from pdray.bench.workload import (
    BenchRequest,
    poisson_arrivals,
    random_requests,
    read_trace,
    scale_trace,
    trace_requests,
)
from pdray.errors import ConfigError, PdrayError


class ServingWorkload(NamedTuple):
    """Requests in order of arrival, and what the result file should say of where they came from."""

    requests: list[BenchRequest]
    description: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `pdray bench serve`; names as in `vllm bench serve` where the meaning is the same."""
    server = parser.add_argument_group("server", "its API key is read from $PDRAY_API_KEY, else $OPENAI_API_KEY")
    server.add_argument("--base-url", default="http://127.0.0.1:8000", help="of the server")
    server.add_argument("--endpoint", default="/v1/completions", help="path that takes completion requests")
    server.add_argument("--model", help="name in the API; default: the first of /v1/models")
    load = parser.add_argument_group("load")
    load.add_argument("--num-prompts", type=int, help="requests to send; default 100, or the whole trace")
    load.add_argument("--request-rate", type=float, default=float("inf"), help="requests per second; inf: all at once")
    load.add_argument("--burstiness", type=float, default=1.0, help="1 is Poisson, less is burstier, more is steadier")
    load.add_argument("--max-concurrency", type=int, help="requests in flight at most; others wait at the client")
    load.add_argument(
        "--num-client-processes",
        type=int,
        default=1,
        help="processes that send, in turn; more where one would be late (default: 1)",
    )
    load.add_argument("--seed", type=int, default=0, help="of arrivals, lengths and prompts")
    load.add_argument("--ignore-eos", action="store_true", help="let every answer have its full length")
    load.add_argument("--request-timeout", type=float, default=6 * 3600.0, help="seconds for one request")
    load.add_argument("--sweep", type=float, nargs="+", metavar="RATE", help="run once at each of these request rates")
    load.add_argument("--sweep-seconds", type=float, default=30.0, help="about how long each rate is offered")
    random = parser.add_argument_group("random prompts")
    random.add_argument("--random-input-len", type=int, default=1024, help="prompt tokens")
    random.add_argument("--random-output-len", type=int, default=128, help="output tokens")
    random.add_argument("--random-range-ratio", type=float, default=0.0, help="lengths vary by this share, up and down")
    random.add_argument("--random-prefix-len", type=int, default=0, help="tokens that all prompts begin with")
    random.add_argument("--min-token-id", type=int, default=1000, help="lowest random token id, above special tokens")
    random.add_argument("--max-token-id", type=int, default=30000, help="random token ids stay below this")
    trace = parser.add_argument_group("trace")
    trace.add_argument("--trace", type=Path, help="replay arrivals and lengths: an Azure .csv or a Mooncake .jsonl")
    trace.add_argument(
        "--trace-scale", type=float, default=1.0, help="factor on the arrival times; 0.5: twice the rate"
    )
    trace.add_argument("--max-input-len", type=int, help="cut longer prompts of the trace to this")
    trace.add_argument("--max-output-len", type=int, help="cut longer outputs of the trace to this")
    result = parser.add_argument_group("result")
    result.add_argument("--goodput", nargs="+", default=[], metavar="NAME:MS", help="e.g. ttft:500 tpot:50 e2el:9000")
    result.add_argument("--save-result", type=Path, metavar="FILE", help="write the figures as JSON")
    result.add_argument("--save-detailed", action="store_true", help="with every request's record")
    result.add_argument("--plot", type=Path, metavar="FILE", help="of a sweep: completed over offered rate, as SVG")
    result.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def main(args: argparse.Namespace) -> int:
    """Run, print, save. Returns 1 if a request failed (a rejected one did not)."""
    if args.sweep:
        results = run_sweep(args, run)
        if args.save_result:
            args.save_result.write_text(json.dumps(results, indent=1) + "\n")
        return int(any(result["failed"] for result in results))
    if args.plot:
        raise ConfigError("--plot draws a sweep: give --sweep RATE ...")
    result, records = asyncio.run(run(args))
    print(format_metrics(result))
    timings = mean_timings([record.timings for record in records if record.timings])
    if timings:
        print("\nServer's breakdown, mean over requests")
        print(breakdown_table({"mean": timings}))
    if args.save_result:
        if args.save_detailed:
            result["requests"] = [asdict(record) for record in records]
        args.save_result.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["failed"] else 0


async def run(args: argparse.Namespace) -> tuple[dict[str, Any], list[RequestRecord]]:
    """Build the workload, prove that the server answers, send everything, compute the figures.

    Raises:
        ConfigError: an option that cannot work. PdrayError: the server does not answer the first, untimed request.
    """
    goodput = parse_goodput(args.goodput)
    workload = build_workload(args)
    num_processes = _num_client_processes(args)
    base_url = args.base_url.rstrip("/")
    async with new_session(args.request_timeout) as session:
        model = args.model or await _first_model(session, base_url)
        url = base_url + args.endpoint
        trial = await send_request(session, url, model, workload.requests[0], ignore_eos=args.ignore_eos)
        if trial.outcome != "ok":
            raise PdrayError(f"{url} did not complete the first request, so none was timed: {trial.error}")
    target = Target(url, model, args.ignore_eos, args.request_timeout)
    if num_processes > 1:
        sent = await asyncio.to_thread(send_from_processes, workload.requests, target, num_processes)
    else:
        sent = await send_from_here(
            workload.requests, target, args.max_concurrency, show_progress=not args.disable_tqdm
        )
    records = sent.records
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model_id": model,
        "endpoint": url,
        "num_prompts": len(records),
        "request_rate": args.request_rate if np.isfinite(args.request_rate) else "inf",
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
        "num_client_processes": num_processes,
        "seed": args.seed,
        "ignore_eos": args.ignore_eos,
        "workload": workload.description,
    }
    result |= calculate_metrics(records, sent.duration_s, goodput)
    result["server_timings_mean_s"] = mean_timings([record.timings for record in records if record.timings])
    return result, records


def build_workload(args: argparse.Namespace) -> ServingWorkload:
    """Requests from the options; a trace if one is named, random prompts otherwise."""
    if not 0 <= args.min_token_id < args.max_token_id:
        raise ConfigError(
            f"--min-token-id {args.min_token_id} must be at least 0 and below --max-token-id {args.max_token_id}"
        )
    if args.num_prompts is not None and args.num_prompts < 1:
        raise ConfigError(f"--num-prompts {args.num_prompts} must be at least 1")
    if args.max_concurrency is not None and args.max_concurrency < 1:
        raise ConfigError(f"--max-concurrency {args.max_concurrency} must be at least 1")
    token_ids = range(args.min_token_id, args.max_token_id)
    if args.trace is not None:
        return _trace_workload(args, token_ids)
    rng = np.random.default_rng(args.seed)
    arrivals = poisson_arrivals(args.num_prompts or 100, args.request_rate, args.burstiness, rng)
    lengths = {
        "input_len": args.random_input_len,
        "output_len": args.random_output_len,
        "range_ratio": args.random_range_ratio,
        "prefix_len": args.random_prefix_len,
    }
    return ServingWorkload(
        random_requests(arrivals, **lengths, token_ids=token_ids, rng=rng), {"dataset": "random"} | lengths
    )


def _trace_workload(args: argparse.Namespace, token_ids: range) -> ServingWorkload:
    rows = read_trace(args.trace, args.num_prompts)
    capped = scale_trace(
        rows, time_scale=args.trace_scale, max_input_len=args.max_input_len, max_output_len=args.max_output_len
    )
    print(
        f"{args.trace.name}: {len(rows)} requests in {capped.rows[-1].arrival_s:.0f} s; "
        f"{capped.num_inputs_cut} inputs and {capped.num_outputs_cut} outputs cut to the caps"
    )
    description = {
        "dataset": "trace",
        "file": args.trace.name,
        "time_scale": args.trace_scale,
        "max_input_len": args.max_input_len,
        "max_output_len": args.max_output_len,
        "num_inputs_cut": capped.num_inputs_cut,
        "num_outputs_cut": capped.num_outputs_cut,
    }
    return ServingWorkload(trace_requests(capped.rows, token_ids, args.seed), description)


def _num_client_processes(args: argparse.Namespace) -> int:
    num_processes: int = args.num_client_processes
    if num_processes < 1:
        raise ConfigError(f"--num-client-processes {num_processes} must be at least 1")
    if num_processes > 1 and args.max_concurrency is not None:
        raise ConfigError(
            f"--max-concurrency {args.max_concurrency} counts the requests of one process: leave it out, or leave out "
            f"--num-client-processes {num_processes}"
        )
    return num_processes


async def _first_model(session: aiohttp.ClientSession, base_url: str) -> str:
    try:
        async with session.get(f"{base_url}/v1/models") as response:
            response.raise_for_status()
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, OSError, KeyError, IndexError) as error:
        raise PdrayError(
            f"{base_url}/v1/models does not name a model ({type(error).__name__}: {error}); give --base-url or --model"
        ) from error
