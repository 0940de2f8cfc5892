"""The named workloads of `pdray bench offline --rows`, and the least time that each can take on a GPU.

They are those that other engines publish figures for: one long answer, batches of equal length, nano-vllm's uniform
mix, prompts only, and one token. Tokens in, tokens out; temperature 0.6; no end-of-sequence; no prefix cache. Besides,
steps that decode under each of the settings that people use, and what they take next to plain ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pdray.engine.step.times import StepSpread
from pdray.models.model_config import ModelConfig
from pdray.sampling_params import SamplingParams
from pdray.structured_outputs import StructuredOutputsParams

BYTES_PER_S = 3.0e12  # what an H100's memory gives to a kernel that only reads
FLOPS_PER_S = 800e12  # dense bfloat16 products of random data on an H100
BYTES_PER_VALUE = 2
VOCABULARY_START = 1000  # prompts avoid special tokens


STEP_UNIT = "ms a step"
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-p": {"top_p": 0.95, "top_k": 20},  # what Qwen3's authors recommend
    "penalty": {"repetition_penalty": 1.05, "presence_penalty": 0.5},
    "logprobs": {"logprobs": 5},
    "min-p": {"min_p": 0.05},
}
MIXED_SETTINGS = tuple(SETTINGS)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["new", "vip", "late", None]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
# No answer of 257 tokens is a whole list.
SETTINGS["json"] = {
    "structured_outputs": StructuredOutputsParams(json={"type": "array", "items": PERSON, "minItems": 200})
}


class Requests(NamedTuple):
    """Prompts, how many tokens to answer each with, and names of settings, which they take by turns."""

    prompts: list[list[int]]
    output_lens: list[int]
    settings: tuple[str, ...] = ("plain",)

    @property
    def params(self) -> list[SamplingParams]:
        return [
            SamplingParams(
                temperature=0.6,
                seed=i,
                max_tokens=length,
                ignore_eos=True,
                **SETTINGS[self.settings[i % len(self.settings)]],
            )
            for i, length in enumerate(self.output_lens)
        ]


@dataclass(frozen=True, slots=True)
class Workload:
    """One row.

    Attributes:
        num_requests: all sent at once.
        input_len, output_len: tokens of each; (low, high) are drawn uniformly.
        unit: what the figure counts: "output tok/s", "prompt tok/s", "ms" until the end, or "ms a step", the median.
        settings: of Requests.
    """

    num_requests: int
    input_len: int | tuple[int, int]
    output_len: int | tuple[int, int]
    unit: str = "output tok/s"
    settings: tuple[str, ...] = ("plain",)

    def requests(self, vocab_size: int, seed: int) -> Requests:
        """Requests of the same lengths for every seed, with other prompts, so that no cache helps a repetition."""
        lengths = np.random.default_rng(0)
        inputs, outputs = (self._draw(lengths, length) for length in (self.input_len, self.output_len))
        tokens = np.random.default_rng((1, seed))
        start = min(VOCABULARY_START, vocab_size // 2)
        return Requests([tokens.integers(start, vocab_size, size=n).tolist() for n in inputs], outputs, self.settings)

    def _draw(self, rng: np.random.Generator, length: int | tuple[int, int]) -> list[int]:
        if isinstance(length, int):
            return [length] * self.num_requests
        low, high = length
        return [int(n) for n in rng.integers(low, high + 1, size=self.num_requests)]

    def figure(self, requests: Requests, seconds: float) -> float:
        """The measured figure in the workload's unit."""
        if self.unit == "ms":
            return seconds * 1000
        counted = requests.prompts if self.unit == "prompt tok/s" else [range(n) for n in requests.output_lens]
        return sum(map(len, counted)) / seconds


WORKLOADS = {
    "decode-1": Workload(1, 128, 512),
    "uniform-256": Workload(256, (100, 1024), (100, 1024)),
    "batch-16": Workload(16, 512, 257),
    "batch-64": Workload(64, 512, 257),
    "batch-256": Workload(256, 512, 257),
    "prefill-32x2048": Workload(32, 2048, 1, "prompt tok/s"),
    "first-token": Workload(1, 128, 1, "ms"),
} | {
    f"{name}-{num}x{length}": Workload(num, length, 257, STEP_UNIT, settings)
    for num, length in ((1, 512), (64, 512), (256, 512), (1, 8192), (32, 8192))
    for name, settings in [*((name, (name,)) for name in SETTINGS), ("mixed", MIXED_SETTINGS)]
}


def needs_tokenizer(name: str) -> bool:
    """Whether the named workload's answers are text of some form."""
    return "json" in WORKLOADS[name].settings


def floor_seconds(model: ModelConfig, requests: Requests) -> float:
    """The least time on one H100: prompts at FLOPS_PER_S, then steps that read every weight and all KV once.

    Every request decodes in every step until it ends; activations, launches and sampling cost nothing. A prompt's
    products count two operations for each weight, and causal attention half of its square.
    """
    weights = num_layer_weights(model)
    head_weights = model.vocab_size * model.hidden_size
    flops = 0.0
    for prompt in requests.prompts:
        attention = 2 * model.num_layers * model.num_heads * model.head_dim * len(prompt) ** 2
        flops += 2 * weights * len(prompt) + attention + 2 * head_weights
    weight_bytes = (weights + head_weights) * BYTES_PER_VALUE
    total = max(flops / FLOPS_PER_S, weight_bytes / BYTES_PER_S)
    return total + sum(floor_of_steps(model, requests))


def floor_of_steps(model: ModelConfig, requests: Requests) -> list[float]:
    """floor_seconds() of each step but the first."""
    weight_bytes = (num_layer_weights(model) + model.vocab_size * model.hidden_size) * BYTES_PER_VALUE
    kv_bytes = kv_bytes_of_token(model)
    floors = []
    for step in range(1, max(requests.output_lens)):
        running = [len(p) + step for p, n in zip(requests.prompts, requests.output_lens, strict=True) if n > step]
        floors.append((weight_bytes + kv_bytes * sum(running)) / BYTES_PER_S)
    return floors


def kv_bytes_of_token(model: ModelConfig) -> int:
    """Bytes of one token's keys and values in all layers, bfloat16."""
    import torch

    from pdray.engine.kv.layout import KVLayout

    return KVLayout.of(model, 1, torch.bfloat16).block_bytes


def num_layer_weights(model: ModelConfig) -> int:
    """Weights of all layers' matrices."""
    from pdray.models.decoder import shapes_of_layer  # and torch, which the command line's help does without

    return model.num_layers * sum(part.weight.numel() for part in shapes_of_layer(model).linears())


class Timed(NamedTuple):
    """One run. steps: the engine's last ones."""

    seconds: float
    steps: StepSpread | None = None


class Measured(NamedTuple):
    """Attributes:
    figure: median, in the workload's unit. share: of the floor's speed.
    to_plain: figure / that of the plain row of the same way and lengths, if that came before; else None.
    steps: of the last run.
    """

    name: str
    way: str
    figure: float
    unit: str
    floor: float
    share: float
    seconds: list[float]
    steps: StepSpread | None
    to_plain: float | None = None


def measure_rows(
    names: list[str],
    ways: dict[str, Callable[[Requests], Timed]],
    model: ModelConfig,
    repeat: int,
) -> list[Measured]:
    """Every way at every workload: one warm-up, then the median of ``repeat``.

    Args:
        ways: run the requests, and say how long it took.
    """
    rows: list[Measured] = []
    for name in names:
        workload = WORKLOADS[name]
        for way, run in ways.items():
            timed = [run(workload.requests(model.vocab_size, seed)) for seed in range(repeat + 1)][1:]
            taken = [run.seconds for run in timed]
            requests = workload.requests(model.vocab_size, 0)
            if workload.unit == STEP_UNIT:
                figure = statistics.median(run.steps.step.p50 for run in timed if run.steps is not None)
                floor = statistics.median(floor_of_steps(model, requests)) * 1000
                share = floor / figure
            else:
                seconds, least = statistics.median(taken), floor_seconds(model, requests)
                figure, floor = workload.figure(requests, seconds), workload.figure(requests, least)
                share = least / seconds
            row = Measured(name, way, figure, workload.unit, floor, share, taken, timed[-1].steps)
            rows.append(row._replace(to_plain=_to_plain(row, rows)))
            print(format_row(rows[-1]), flush=True)
    return rows


def _to_plain(row: Measured, rows: list[Measured]) -> float | None:
    plain = "plain-" + row.name.rpartition("-")[2]
    same = [r.figure for r in rows if r.name == plain and r.way == row.way and r.unit == row.unit == STEP_UNIT]
    return row.figure / same[0] if same else None


HEADER = (
    "| work | way | figure | unit | floor | share of it | step ms: p50, p99, max | host | to plain |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def format_row(row: Measured) -> str:
    digits = 2 if row.unit == "ms" else 3 if row.unit == STEP_UNIT else 0
    figure, floor = f"{row.figure:,.{digits}f}", f"{row.floor:,.{digits}f}"
    steps = ("", "") if row.steps is None else (", ".join(f"{ms:.2f}" for ms in part) for part in row.steps)
    to_plain = "" if row.to_plain is None else f" {row.to_plain:.3f}"
    cells = (row.name, row.way, figure, row.unit, floor, f"{row.share:.0%}", *steps)
    return f"| {' | '.join(cells)} |{to_plain} |"
