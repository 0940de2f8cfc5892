"""The second table of `pdray bench mux`: requests that come at random, and how many were served in time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pdray.bench.plot import Series, line_plot
from pdray.bench.workload import poisson_arrivals
from pdray.config import Config
from pdray.errors import ConfigError

if TYPE_CHECKING:  # these need torch, which the command line's help does without
    from pdray.bench.mux_load import Served
    from pdray.bench.ways import Way
    from pdray.engine.mux.engine import MuxEngine
    from pdray.engine.request import EngineRequest

COLORS = ("#1f6feb", "#d73a49", "#2da44e", "#bf8700", "#8250df", "#57606a", "#0a7ea4", "#e16f24", "#24292f")
HEAD = (
    "| in | req/s | TPOT target ms | arrangement | TTFT p50 / p99 ms | TPOT p50 / p90 ms | longest gap ms | in time |\n"
    "|---:|---:|---:|---|---:|---:|---:|---:|"
)
LOAD = re.compile(r"(\d+)@([\d.]+)(?:x([\d.]+))?(?::(.+))?")
ROW = re.compile(r"(chunk|sms)(\d+)|controller(\d*)|halves")
LEAST_REQUESTS = 16  # of each load whose seconds are not its own
DEFAULT_CHUNKS = (128, 256, 512, 1024, 2048)


class OfferedLoad(NamedTuple):
    """One value of --serve.

    Attributes:
        rate: requests a second. rows: as they were named; none: all.
        seconds: about how long requests come; None: see Asked.
    """

    input_len: int
    rate: float
    rows: tuple[str, ...]
    seconds: float | None = None


def parse_load(text: str) -> OfferedLoad:
    """IN@RATE, IN@RATExSECONDS, and either with :ROW,ROW.

    Raises:
        ConfigError: it is neither, or a row is none.
    """
    match = LOAD.fullmatch(text)
    numbers = [each for each in match.group(1, 2, 3) if each is not None] if match is not None else []
    if match is None or any(each.count(".") > 1 or each == "." or not float(each) for each in numbers):
        raise ConfigError(
            f"--serve {text!r} is not TOKENS@RATE, TOKENS@RATExSECONDS or either with :ROW,ROW, with a rate above 0, "
            "as 2048@3.5:chunk256,controller"
        )
    rows = tuple(match[4].split(",")) if match[4] else ()
    for row in rows:
        if ROW.fullmatch(row) is None:
            raise ConfigError(f"--serve has no row {row!r}; use chunkN, smsN, controller, controllerN or halves")
    return OfferedLoad(int(match[1]), float(match[2]), rows, float(match[3]) if match[3] else None)


class Asked(NamedTuple):
    """What is measured of each load, beside what it says itself.

    Attributes:
        seconds: about how long requests come. ttft_ms, tpot_ms: limits; the controller gets each tpot_ms as its target.
    """

    seconds: float
    output_len: int
    ttft_ms: float
    tpot_ms: list[float]


def run_served(engine: MuxEngine, loads: list[OfferedLoad], asked: Asked) -> list[dict[str, Any]]:
    """The rows of one engine."""
    from pdray.bench.mux_load import serve
    from pdray.engine.mux.controller import Targets

    results = []
    for load in loads:
        for row in load.rows or default_rows(engine):
            if row == "halves":
                continue
            if not row.startswith("controller"):
                engine.controller.fixed = arrangement_of(row, engine)
                served = serve(engine, arrivals(engine, load, asked))
                results += tell(name_of(row, engine.num_sms), load, asked.tpot_ms, asked, served)
                continue
            engine.controller.fixed = None
            only = row.removeprefix("controller")
            for tpot_ms in [float(only)] if only else asked.tpot_ms:
                engine.controller.targets = Targets(tpot_ms / 1000, asked.ttft_ms / 1000)
                served = serve(engine, arrivals(engine, load, asked))
                results += tell("controller", load, [tpot_ms], asked, served)
    engine.controller.fixed = None
    return results


def run_halves(
    config: Config, loads: list[OfferedLoad], asked: Asked, make: Callable[[Config], AbstractContextManager[Way]]
) -> list[dict[str, Any]]:
    """The rows "halves": a prefill worker and a decode worker that share the GPU, each with half of its memory.

    Args:
        make: pdray.bench.ways.make_llm.
    """
    wanted = [load for load in loads if "halves" in load.rows]
    if not wanted:
        return []
    halves: dict[str, Any] = {"num_kv_blocks": config.num_kv_blocks // 2} if config.num_kv_blocks is not None else {}
    if config.device != "cpu":
        halves |= {"prefill_num_gpus": 0.5, "decode_num_gpus": 0.5}
    alone = {"mode": "disaggregated", "sm_partition": "off", "decode_sms": None, "target_ttft_ms": None}
    results = []
    with make(config.model_copy(update=alone | halves)) as way:
        for load in wanted:
            results += tell("two half-GPU actors", load, asked.tpot_ms, asked, play(way, config, load, asked))
    return results


def play(way: Way, config: Config, load: OfferedLoad, asked: Asked) -> list[Served]:
    """The same arrivals as of the other rows, through workers of their own."""
    from pdray.bench.mux_load import served_of
    from pdray.bench.rows import Workload
    from pdray.models.load import load_model_config

    vocab_size = load_model_config(config).vocab_size
    times = arrival_times(load, asked.seconds)
    warm = Workload(2, load.input_len, 8).requests(vocab_size, 0)
    way.play(warm, [0.0] * 2)
    tokens = way.play(Workload(len(times), load.input_len, asked.output_len).requests(vocab_size, 1), times)
    return [served_of(at, each) for at, each in zip(times, tokens, strict=True)]


def default_rows(engine: MuxEngine) -> list[str]:
    """Every arrangement that this engine has, and the controller."""
    most = engine.config.max_num_batched_tokens
    chunks = [f"chunk{n}" for n in DEFAULT_CHUNKS if n <= most]
    return [*chunks, *(f"sms{n}" for n in engine.split_state().ready), "controller"]


def arrangement_of(row: str, engine: MuxEngine) -> Any:
    """Raises:
    ConfigError: the engine has no such split.
    """
    from pdray.engine.mux.costs import Arrangement

    match = ROW.fullmatch(row)
    assert match is not None and match[1]
    if match[1] == "chunk":
        return Arrangement(chunk=int(match[2]))
    ready = engine.split_state().ready
    if int(match[2]) not in ready:
        raise ConfigError(f"--serve has a row {row}, but decodes can have {ready} SMs; see --decode-sms")
    return Arrangement(decode_sms=int(match[2]))


def name_of(row: str, num_sms: int) -> str:
    """As it is shown."""
    match = ROW.fullmatch(row)
    assert match is not None and match[1]
    number = int(match[2])
    if match[1] == "chunk":
        return f"mixed, {number}"
    return f"{number} + {num_sms - number} SMs" if number else "two plain streams"


def arrival_times(load: OfferedLoad, seconds: float) -> list[float]:
    """The same for every arrangement; those of a load with fewer seconds of its own are the first of them."""
    usual = max(LEAST_REQUESTS, round(load.rate * seconds))
    number = usual if load.seconds is None else max(2, round(load.rate * load.seconds))
    return poisson_arrivals(max(usual, number), load.rate, 1.0, np.random.default_rng(7))[:number]


def arrivals(engine: MuxEngine, load: OfferedLoad, asked: Asked) -> Iterator[tuple[float, EngineRequest]]:
    """Requests with their times."""
    from pdray.bench.mux_load import Prompts

    prompts = Prompts(engine.model.config.vocab_size, 1)
    for at in arrival_times(load, asked.seconds):
        request = prompts.request(load.input_len, asked.output_len)
        yield at, replace(request, key=("served", request.key))


def tell(
    name: str, load: OfferedLoad, tpot_ms: list[float], asked: Asked, served: list[Served]
) -> list[dict[str, Any]]:
    """Print the rows of one run, one for each limit."""
    rows = [summary(name, load.input_len, load.rate, each, asked.ttft_ms, served) for each in tpot_ms]
    for row in rows:
        print(format_served(row), flush=True)
    return rows


def summary(
    name: str, input_len: int, rate: float, tpot_ms: float, ttft_ms: float, served: list[Served]
) -> dict[str, Any]:
    """One row of the table."""
    from pdray.bench.mux_load import goodput

    ttft, tpot = ([getattr(each, field) * 1000 for each in served] for field in ("ttft_s", "tpot_s"))
    in_time = goodput(served, lambda each: each.ttft_s * 1000 <= ttft_ms and each.tpot_s * 1000 <= tpot_ms)
    percentiles = {
        f"{field}_{p}": round(float(np.percentile(values, p)), 2)
        for field, values in (("ttft", ttft), ("tpot", tpot))
        for p in (50, 90, 99)
    }
    longest = max(each.longest_gap_s for each in served) * 1000
    where = {"name": name, "input_len": input_len, "rate": rate, "tpot_target": tpot_ms, "num_requests": len(served)}
    return where | percentiles | {"longest_gap": round(longest, 1), "in_time": in_time}


def format_served(row: dict[str, Any]) -> str:
    cells = [str(row["input_len"]), f"{row['rate']:g}", f"{row['tpot_target']:g}", row["name"]]
    cells += [f"{row['ttft_50']:.0f} / {row['ttft_99']:.0f}", f"{row['tpot_50']:.2f} / {row['tpot_90']:.2f}"]
    cells += [f"{row['longest_gap']:.0f}", f"{row['in_time']:.0%}"]
    return f"| {' | '.join(cells)} |"


def plot(rows: list[dict[str, Any]], input_len: int, tpot_ms: float) -> str:
    """Requests in time a second over requests offered a second."""
    mine = [row for row in rows if (row["input_len"], row["tpot_target"]) == (input_len, tpot_ms)]
    series = []
    for color, name in zip(COLORS, dict.fromkeys(row["name"] for row in mine), strict=False):
        points = [(row["rate"], row["rate"] * row["in_time"]) for row in mine if row["name"] == name]
        series.append(Series(name, color, sorted(points)))
    title = f"{input_len} tokens in: requests within a TPOT of {tpot_ms:g} ms"
    return line_plot(title, "offered requests/s", "in time requests/s", series)
