"""`pdray bench serve`: load a running OpenAI-compatible server and measure it from the client's side."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np
from tqdm import tqdm

from pdray.bench.client import authorization, send_request
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
    base_url = args.base_url.rstrip("/")
    timeout = aiohttp.ClientTimeout(total=args.request_timeout)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        headers=authorization(), timeout=timeout, connector=connector, read_bufsize=2**18
    ) as session:
        model = args.model or await _first_model(session, base_url)
        url = base_url + args.endpoint
        trial = await send_request(session, url, model, workload.requests[0], ignore_eos=args.ignore_eos)
        if trial.outcome != "ok":
            raise PdrayError(f"{url} did not complete the first request, so none was timed: {trial.error}")

        async def send(request: BenchRequest) -> RequestRecord:
            return await send_request(session, url, model, request, ignore_eos=args.ignore_eos)

        started = time.perf_counter()
        records = await send_all(workload.requests, send, args.max_concurrency, show_progress=not args.disable_tqdm)
        duration = time.perf_counter() - started
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model_id": model,
        "endpoint": url,
        "num_prompts": len(records),
        "request_rate": args.request_rate if np.isfinite(args.request_rate) else "inf",
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
        "seed": args.seed,
        "ignore_eos": args.ignore_eos,
        "workload": workload.description,
    }
    result |= calculate_metrics(records, duration, goodput)
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


async def send_all(
    requests: list[BenchRequest],
    send: Callable[[BenchRequest], Any],
    max_concurrency: int | None = None,
    *,
    show_progress: bool = False,
) -> list[RequestRecord]:
    """Send each request at its arrival time, or later if max_concurrency are in flight.

    Records come in the order of the requests.
    """
    places = asyncio.Semaphore(max_concurrency or len(requests))
    loop = asyncio.get_running_loop()
    started = loop.time()

    async def send_one(request: BenchRequest, progress: tqdm[Any]) -> RequestRecord:
        async with places:
            record: RequestRecord = await send(request)
        progress.update(1)
        return record

    tasks = []
    with tqdm(total=len(requests), disable=not show_progress, dynamic_ncols=True) as progress:
        async with asyncio.TaskGroup() as group:
            for request in requests:
                delay = started + request.arrival_s - loop.time()
                if delay > 0:
                    await asyncio.sleep(delay)
                tasks.append(group.create_task(send_one(request, progress)))
    return [task.result() for task in tasks]


async def _first_model(session: aiohttp.ClientSession, base_url: str) -> str:
    try:
        async with session.get(f"{base_url}/v1/models") as response:
            response.raise_for_status()
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, OSError, KeyError, IndexError) as error:
        raise PdrayError(
            f"{base_url}/v1/models does not name a model ({type(error).__name__}: {error}); give --base-url or --model"
        ) from error
