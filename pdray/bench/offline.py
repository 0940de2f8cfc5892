"""`pdray bench offline`: generation speed of the engine alone, of pdray.LLM, and of transformers.generate.

With --rows, the named workloads of pdray.bench.rows. Without:

All rows of one run use the same weights, the same random prompts and the same number of threads, greedy decoding and
answers of exactly --output-len tokens. Every repetition has new prompts, so that no prefix cache helps. The ways take
turns, so that a machine's slow minute hits all of them; the first turn is warm-up, the median of the others counts.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pdray.bench import mixed
from pdray.bench.rows import HEADER, WORKLOADS, Measured, Requests, Timed, measure_rows, needs_tokenizer
from pdray.bench.ways import Generate, Generation, Way, make_engine, make_llm, make_transformers
from pdray.config import OFFLINE_TARGET_TPOT_MS, Config
from pdray.errors import ConfigError
from pdray.models.model_config import ModelConfig
from pdray.options import add_config_arguments, config_from_args
from pdray.sampling_params import SamplingParams

MIXED = "mixed"  # the row of pdray.bench.mixed


class OfflineRow(NamedTuple):
    """Medians of one way to generate at one batch size.

    Attributes:
        decode_tokens_per_s: after the first token of every prompt.
        same_answers: how many of the answers are the first row's, token for token.
    """

    name: str
    batch_size: int
    input_len: int
    output_len: int
    seconds: float
    output_tokens_per_s: float
    decode_tokens_per_s: float
    first_token_ms: float
    same_answers: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `pdray bench offline`."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="as for `pdray serve`")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=[*WORKLOADS, MIXED, "all"],
        metavar="NAME",
        help=f"all, or some of: {', '.join(WORKLOADS)}, {MIXED}",
    )
    parser.add_argument(
        "--request-rate", type=float, nargs="+", default=[7.0, 11.0], help=f"of {MIXED}, each second (default: 7 11)"
    )
    parser.add_argument("--mixed-seconds", type=float, default=20.0, help=f"of {MIXED} at each rate (default: 20)")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8], help="prompts at once (default: 1 8)")
    parser.add_argument("--input-len", type=int, default=128, help="prompt tokens (default: 128)")
    parser.add_argument("--output-len", type=int, default=64, help="output tokens (default: 64)")
    parser.add_argument("--repeat", type=int, default=3, help="timed repetitions of each row (default: 3)")
    parser.add_argument("--prompt-seed", type=int, default=0, help="of the random prompts")
    parser.add_argument(
        "--engine", action=argparse.BooleanOptionalAction, default=True, help="the engine in this process"
    )
    parser.add_argument("--transformers", action="store_true", help="transformers.generate in this process")
    parser.add_argument("--llm", action="store_true", help="pdray.LLM: Ray actors, router, detokenizer")
    parser.add_argument("--save-result", type=Path, metavar="FILE", help="write the rows as JSON")
    add_config_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Measure every row that was asked for, print a table, save it."""
    config = config_from_args(args)
    if not (args.engine or args.transformers or args.llm):
        raise ConfigError("nothing to measure: give --engine, --transformers or --llm")
    if min(*args.batch_size, args.input_len, args.repeat) < 1 or args.output_len < 2:
        raise ConfigError("--batch-size, --input-len and --repeat must be at least 1, and --output-len at least 2")
    rows: list[Any]
    if args.rows:
        rows = run_rows(config, args)
    else:
        rows = run(config, args)
        print(format_rows(rows))
    if args.save_result:
        result = {"config": config.model_dump(), "rows": [row._asdict() for row in rows]} | machine()
        args.save_result.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def run(config: Config, args: argparse.Namespace) -> list[OfflineRow]:
    """Rows by batch size, in the order engine, transformers, llm."""
    import torch

    from pdray.models import load_model_config

    torch.set_num_threads(config.num_threads)
    vocab_size = load_model_config(config).vocab_size
    makers: dict[str, Callable[[Config], contextlib.AbstractContextManager[Generate]]]
    makers = {"engine": make_engine, "transformers": make_transformers, "llm": make_llm}
    with contextlib.ExitStack() as stack:
        ways: dict[str, Generate] = {}
        for name, make in makers.items():
            if getattr(args, name):
                ways[name] = stack.enter_context(make(config))
        return [row for batch_size in args.batch_size for row in measure(ways, batch_size, vocab_size, args)]


def run_rows(config: Config, args: argparse.Namespace) -> list[Measured | mixed.MixedMeasured]:
    """The named workloads, one way after the other: two do not fit one GPU. Also how long each took to start."""
    from pdray.models import load_model_config

    model = load_model_config(config)
    makers = {"engine": make_engine, "llm": make_llm}
    rows: list[Measured | mixed.MixedMeasured] = []
    for way, make in makers.items():
        if getattr(args, way):
            rows += _rows_of(way, make, config, model, args)
            gc.collect()  # the engine's memory is needed for the next way's
    return rows


def _rows_of(
    way: str,
    make: Callable[[Config], contextlib.AbstractContextManager[Way]],
    config: Config,
    model: ModelConfig,
    args: argparse.Namespace,
) -> list[Measured | mixed.MixedMeasured]:
    names = list(WORKLOADS) if "all" in args.rows else [name for name in args.rows if name != MIXED]
    if way == "llm" and config.skip_tokenizer_init and (left_out := [name for name in names if needs_tokenizer(name)]):
        print(f"{way} has no tokenizer (--skip-tokenizer-init), and so not: {', '.join(left_out)}", flush=True)
        names = [name for name in names if name not in left_out]
    rows: list[Measured | mixed.MixedMeasured] = []
    if names:
        started = time.perf_counter()
        print(HEADER)
        with make(with_target(config, OFFLINE_TARGET_TPOT_MS)) as generate:
            print(f"| start | {way} | {time.perf_counter() - started:.1f} | s | | | | | |")
            rows += measure_rows(names, {way: lambda requests: time_requests(generate, requests)}, model, args.repeat)
        gc.collect()
    if not {MIXED, "all"}.isdisjoint(args.rows):
        print(f"\n{mixed.HEADER}")
        with make(with_target(config, None)) as served:
            for rate in args.request_rate:
                rows.append(mixed.measure_mixed(way, served.play, model.vocab_size, rate, args.mixed_seconds))
    return rows


def with_target(config: Config, target_tpot_ms: float | None) -> Config:
    """A copy with this target, unless the configuration gives one."""
    given = "target_tpot_ms" in config.model_fields_set
    return config if given else config.model_copy(update={"target_tpot_ms": target_tpot_ms})


def time_requests(generate: Generate, requests: Requests) -> Timed:
    """Seconds that the requests took. Checks that every answer has the requested length."""
    generation = generate(requests.prompts, requests.params)
    assert [len(tokens) for tokens in generation.token_ids] == requests.output_lens
    return Timed(generation.seconds, generation.steps)


def measure(ways: dict[str, Generate], batch_size: int, vocab_size: int, args: argparse.Namespace) -> list[OfflineRow]:
    """A row for each way; its answers of the last turn are compared with those of the first way."""
    timed: dict[str, list[Generation]] = {name: [] for name in ways}
    for turn in range(args.repeat + 1):
        rng = np.random.default_rng((args.prompt_seed, batch_size, turn))
        prompts = rng.integers(min(1000, vocab_size // 2), vocab_size, size=(batch_size, args.input_len)).tolist()
        for name, generate in ways.items():
            generation = generate(prompts, [greedy(args.output_len)] * batch_size)
            lengths = [len(tokens) for tokens in generation.token_ids]
            assert lengths == [args.output_len] * batch_size, f"{name}: answers of {lengths} tokens"
            timed[name].append(generation)
    rows = []
    expected = next(iter(timed.values()))[-1].token_ids
    for name, generations in timed.items():
        same = sum(a == b for a, b in zip(expected, generations[-1].token_ids, strict=True))
        counted = generations[1:]
        seconds = statistics.median(g.seconds for g in counted)
        decode_s = statistics.median(g.seconds - g.first_token_s for g in counted)
        rows.append(
            OfflineRow(
                name=name,
                batch_size=batch_size,
                input_len=args.input_len,
                output_len=args.output_len,
                seconds=seconds,
                output_tokens_per_s=batch_size * args.output_len / seconds,
                decode_tokens_per_s=batch_size * (args.output_len - 1) / decode_s,
                first_token_ms=1000 * statistics.median(g.first_token_s for g in counted),
                same_answers=f"{same}/{batch_size}",
            )
        )
    return rows


def greedy(output_len: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)


def machine() -> dict[str, Any]:
    """The machine and versions that the figures depend on."""
    import platform

    import torch
    import transformers

    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "num_threads": torch.get_num_threads(),
    }


def format_rows(rows: list[OfflineRow]) -> str:
    """One line per row."""
    titles = ("", "batch", "in", "out", "seconds", "output tok/s", "decode tok/s", "first token ms", "same answers")
    lines = [f"{titles[0]:<14}" + "".join(f"{title:>{max(8, len(title) + 2)}}" for title in titles[1:])]
    for row in rows:
        cells = [
            str(row.batch_size),
            str(row.input_len),
            str(row.output_len),
            f"{row.seconds:.2f}",
            f"{row.output_tokens_per_s:.1f}",
            f"{row.decode_tokens_per_s:.1f}",
            f"{row.first_token_ms:.1f}",
            row.same_answers,
        ]
        widths = [max(8, len(title) + 2) for title in titles[1:]]
        lines.append(f"{row.name:<14}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    return "\n".join(lines)
