"""`pdray bench handover`: what it costs an answer that its prompt was computed on another device.

One request at a time on an idle system, for each prompt length: first colocated, then disaggregated over each channel.
The first gap (first token to the second) less a normal step is the price; TTFT must not change. The columns from there
on say where the first gap went: `transfer wait` from the first token's sampling until the decode batch is joined, and
the first decode step, of which the host needs `launch` before the device can begin. Medians; the warm-up requests do
not count. Every answer must be the colocated one's.

With --beside also the steps of other answers, while prompts of that length are handed over; see beside.py.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pdray.bench.beside import HEADER as BESIDE_HEADER
from pdray.bench.beside import Beside, Decode, format_beside, measure_beside
from pdray.config import Config
from pdray.engine.step.times import Spread
from pdray.errors import ConfigError
from pdray.gpu_settings import as_colocated
from pdray.options import add_config_arguments, config_from_args
from pdray.outputs import RequestOutput
from pdray.sampling_params import SamplingParams
from pdray.transfer.registry import KINDS
from pdray.wire.peers import Role

COLOCATED = "colocated"
NUM_WARM_UPS = 2

# Answers a prompt with so many tokens.
Ask = Callable[[list[int], int], RequestOutput]


class Served(NamedTuple):
    """One way. decode: see beside.py."""

    name: str
    ask: Ask
    decode: Decode


class Row(NamedTuple):
    """Medians of one way at one prompt length, in milliseconds. What a colocated worker does not tell is None.

    Attributes:
        cost: the first gap less a normal step.
        same_answers: how many are the colocated ones, token for token, e.g. "10/10".
    """

    way: str
    input_len: int
    ttft: float
    first_gap: float
    step: float
    cost: float
    transfer_wait: float | None
    first_launch: float | None
    first_decode_step: float | None
    unexplained: float | None
    same_answers: str


class Answer(NamedTuple):
    """One request's figures, in milliseconds; see Row."""

    ttft: float
    first_gap: float
    step: float
    transfer_wait: float | None
    first_launch: float | None
    first_decode_step: float | None
    token_ids: list[int]

    @property
    def unexplained(self) -> float | None:
        """The first gap less its parts."""
        if self.transfer_wait is None or self.first_decode_step is None:
            return None
        return self.first_gap - self.transfer_wait - self.first_decode_step

    @classmethod
    def of(cls, output: RequestOutput) -> Answer:
        times, token_ids = output.timings, output.outputs[0].token_ids
        assert times.ttft is not None and times.first_gap is not None and times.e2e is not None
        step = (times.e2e - times.ttft - times.first_gap) / (len(token_ids) - 2)
        parts = times.transfer_wait, times.first_launch, times.first_decode_step
        wait, launch, first_step = (None if seconds is None else 1e3 * seconds for seconds in parts)
        return cls(1e3 * times.ttft, 1e3 * times.first_gap, 1e3 * step, wait, launch, first_step, token_ids)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `pdray bench handover`."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="as for `pdray serve`")
    parser.add_argument(
        "--channels", nargs="+", choices=["auto", *KINDS], default=["auto"], help="each in turn (default: auto)"
    )
    parser.add_argument(
        "--input-len", type=int, nargs="+", default=[128, 1024, 4096], help="prompt tokens (default: 128 1024 4096)"
    )
    parser.add_argument("--output-len", type=int, default=33, help="output tokens (default: 33)")
    parser.add_argument("--repeat", type=int, default=10, help="requests that count, for each length (default: 10)")
    parser.add_argument(
        "--beside", type=int, metavar="TOKENS", help="also measure decode steps beside prompts of so many tokens"
    )
    parser.add_argument("--save-result", type=Path, metavar="FILE", help="write the rows as JSON")
    add_config_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Measure, print a table, save it; 1 if an answer was not the colocated one's."""
    if args.output_len < 3 or args.repeat < 1 or min(args.input_len) < 1:
        raise ConfigError("--output-len must be at least 3, --repeat and --input-len at least 1")
    if args.beside is not None and args.beside < 1:
        raise ConfigError("--beside must be at least 1")
    config = config_from_args(args)
    rows: list[Row] = []
    beside: list[Beside] = []
    expected: dict[int, list[list[int]]] = {}
    print(HEADER, flush=True)
    for channel in (None, *args.channels):
        given = config.model_dump(exclude_unset=True)
        own = as_colocated(given) if channel is None else given | {"mode": "disaggregated", "channel": channel}
        with serve(Config(**own)) as served:
            for input_len in args.input_len:
                rows.append(measure(served.name, served.ask, input_len, args, expected))
                print(format_row(rows[-1]), flush=True)
            if args.beside is not None:
                one = measure(served.name, served.ask, args.beside, args, expected)
                beside.append(measure_beside(served.name, served.decode, args.beside, one.ttft, one.step))
        gc.collect()
    if beside:
        print(BESIDE_HEADER, *map(format_beside, beside), sep="\n", flush=True)
    if args.save_result:
        results = [row._asdict() for row in rows] + [row._asdict() for row in beside]
        args.save_result.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(len(set(row.same_answers.split("/"))) == 1 for row in rows) else 1


def measure(name: str, ask: Ask, input_len: int, args: argparse.Namespace, expected: dict[int, list[list[int]]]) -> Row:
    """The same prompts for every way. The first way's answers are what the others are compared with."""
    prompts = np.random.default_rng((7, input_len)).integers(5, 500, size=(args.repeat + NUM_WARM_UPS, input_len))
    answers = [Answer.of(ask(prompt.tolist(), args.output_len)) for prompt in prompts][NUM_WARM_UPS:]
    token_ids = [answer.token_ids for answer in answers]
    same = sum(a == b for a, b in zip(token_ids, expected.setdefault(input_len, token_ids), strict=True))
    return Row(
        way=name,
        input_len=input_len,
        ttft=statistics.median(answer.ttft for answer in answers),
        first_gap=statistics.median(answer.first_gap for answer in answers),
        step=statistics.median(answer.step for answer in answers),
        cost=statistics.median(answer.first_gap - answer.step for answer in answers),
        transfer_wait=_median([answer.transfer_wait for answer in answers]),
        first_launch=_median([answer.first_launch for answer in answers]),
        first_decode_step=_median([answer.first_decode_step for answer in answers]),
        unexplained=_median([answer.unexplained for answer in answers]),
        same_answers=f"{same}/{len(answers)}",
    )


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


@contextlib.contextmanager
def serve(config: Config) -> Iterator[Served]:
    """pdray.LLM in the configured mode, on a Ray cluster that it joins or starts."""
    from pdray.llm import LLM

    with LLM(**config.model_dump(exclude_unset=True)) as llm:

        def ask(prompt: list[int], output_len: int) -> RequestOutput:
            params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
            return llm.generate([prompt], params, use_tqdm=False)[0]

        def decode(prompts: list[list[int]], params: list[SamplingParams]) -> Spread:
            llm.generate(prompts, params, use_tqdm=False)
            worker = next(worker for worker in llm.status()["workers"] if worker["role"] != Role.PREFILL)
            return Spread(**worker["step_ms"]["step"])

        yield Served(name_of(llm.status()["workers"]), ask, decode)


def name_of(workers: list[dict[str, Any]]) -> str:
    """The channels between these workers, or "colocated"."""
    kinds = {kind for worker in workers for kind in worker.get("channels", {}).values()}
    return ", ".join(sorted(kinds)) or COLOCATED


HEADER = (
    "| prompt | way | TTFT ms | first gap | step | **gap less step** | transfer wait | first decode step "
    "| of it launch | unexplained | same |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def format_row(row: Row) -> str:
    figures = [f"{value:.2f}" for value in (row.ttft, row.first_gap, row.step)] + [f"**{row.cost:.2f}**"]
    parts = (row.transfer_wait, row.first_decode_step, row.first_launch, row.unexplained)
    figures += ["-" if part is None else f"{part:.2f}" for part in parts]
    return f"| {row.input_len} | {row.way} | {' | '.join(figures)} | {row.same_answers} |"
