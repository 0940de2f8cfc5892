"""Requests of a benchmark and their arrival times: random prompts with Poisson arrivals, or a recorded trace."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pdray.errors import ConfigError

MOONCAKE_BLOCK_TOKENS = 512  # tokens that one id of hash_ids stands for


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request to send.

    Attributes:
        arrival_s: seconds after the start of the benchmark.
        prompt_token_ids: the prompt; sent as token ids, so that its length is exact.
        output_len: max_tokens.
    """

    arrival_s: float
    prompt_token_ids: list[int]
    output_len: int


class TraceRow(NamedTuple):
    """One line of a trace. hash_ids: one id per 512 prompt tokens; equal ids are equal prefixes."""

    arrival_s: float
    input_len: int
    output_len: int
    hash_ids: tuple[int, ...] = ()


class CappedTrace(NamedTuple):
    """Trace rows after scaling and cutting, and how many of them were cut."""

    rows: list[TraceRow]
    num_inputs_cut: int
    num_outputs_cut: int


def poisson_arrivals(
    num_requests: int, request_rate: float, burstiness: float, rng: np.random.Generator
) -> list[float]:
    """Arrival times in seconds, the first at 0.

    As vLLM's `get_request`: gaps follow a gamma distribution of shape `burstiness` and mean 1/rate (1 is
    a Poisson process, less is burstier), rescaled so that num_requests / request_rate is met exactly. An infinite
    rate sends everything at once.

    Raises:
        ConfigError: rate or burstiness is not positive.
    """
    if request_rate <= 0 or burstiness <= 0:
        raise ConfigError(f"request rate {request_rate} and burstiness {burstiness} must be above 0")
    if np.isinf(request_rate):
        return [0.0] * num_requests
    ends = np.cumsum(rng.gamma(burstiness, 1.0 / (request_rate * burstiness), size=num_requests))
    ends *= (num_requests / request_rate) / ends[-1]
    return [0.0, *ends[:-1].tolist()]


def random_requests(
    arrivals: list[float],
    *,
    input_len: int,
    output_len: int,
    range_ratio: float,
    prefix_len: int,
    token_ids: range,
    rng: np.random.Generator,
) -> list[BenchRequest]:
    """Prompts of independent random tokens behind one common prefix.

    Lengths are uniform in [len * (1 - range_ratio), len * (1 + range_ratio)]; the prefix comes on top.

    Raises:
        ConfigError: a ratio or length outside its range.
    """
    if not 0.0 <= range_ratio < 1.0:
        raise ConfigError(f"random range ratio {range_ratio} must be in [0, 1)")
    if input_len < 1 or output_len < 1 or prefix_len < 0:
        raise ConfigError(f"lengths must be at least 1: input {input_len}, output {output_len}, prefix {prefix_len}")
    input_lens = _uniform_lengths(input_len, range_ratio, len(arrivals), rng)
    output_lens = _uniform_lengths(output_len, range_ratio, len(arrivals), rng)
    prefix = _random_tokens(prefix_len, token_ids, rng)
    return [
        BenchRequest(arrival, prefix + _random_tokens(num_inputs, token_ids, rng), num_outputs)
        for arrival, num_inputs, num_outputs in zip(arrivals, input_lens, output_lens, strict=True)
    ]


def read_trace(path: Path, num_rows: int | None = None) -> list[TraceRow]:
    """The first rows of an Azure LLM inference trace (.csv) or of a Mooncake trace (.jsonl).

    Azure: TIMESTAMP (7 decimals), ContextTokens, GeneratedTokens. Mooncake: timestamp (ms), input_length,
    output_length, hash_ids. Times are made relative to the first row.

    Raises:
        ConfigError: no such file, another ending, a line that lacks a field, or no line at all.
    """
    readers = {".csv": _read_azure, ".jsonl": _read_mooncake}
    if path.suffix not in readers:
        raise ConfigError(f"trace {path} ends in {path.suffix!r}; known are .csv (Azure) and .jsonl (Mooncake)")
    try:
        rows = readers[path.suffix](path, num_rows)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"trace {path} is not what its ending says: {error!r}") from error
    except OSError as error:
        raise ConfigError(f"trace {path} cannot be read: {error}") from error
    if not rows:
        raise ConfigError(f"trace {path} holds no request")
    return [row._replace(arrival_s=row.arrival_s - rows[0].arrival_s) for row in rows]


def scale_trace(
    rows: list[TraceRow], *, time_scale: float, max_input_len: int | None, max_output_len: int | None
) -> CappedTrace:
    """Multiply arrival times by time_scale (0.5 doubles the rate) and cut longer lengths to the caps."""
    if time_scale <= 0:
        raise ConfigError(f"trace scale {time_scale} must be above 0")
    input_cap, output_cap = max_input_len or float("inf"), max_output_len or float("inf")
    scaled = [
        TraceRow(
            row.arrival_s * time_scale,
            int(max(1, min(row.input_len, input_cap))),
            int(max(1, min(row.output_len, output_cap))),
            row.hash_ids,
        )
        for row in rows
    ]
    return CappedTrace(
        scaled,
        sum(row.input_len > input_cap for row in rows),
        sum(row.output_len > output_cap for row in rows),
    )


def trace_requests(rows: list[TraceRow], token_ids: range, seed: int) -> list[BenchRequest]:
    """Random prompts of the trace's lengths. Rows that share leading hash_ids share those tokens.

    Without hash_ids no two prompts share a prefix.
    """
    requests = []
    for index, row in enumerate(rows):
        blocks = row.hash_ids[: -(-row.input_len // MOONCAKE_BLOCK_TOKENS)]
        tokens: list[int] = []
        for hash_id in blocks:
            tokens += _random_tokens(MOONCAKE_BLOCK_TOKENS, token_ids, np.random.default_rng((seed, 0, hash_id)))
        missing = row.input_len - len(tokens)
        if missing > 0:
            tokens += _random_tokens(missing, token_ids, np.random.default_rng((seed, 1, index)))
        requests.append(BenchRequest(row.arrival_s, tokens[: row.input_len], row.output_len))
    return requests


def _uniform_lengths(length: int, range_ratio: float, count: int, rng: np.random.Generator) -> list[int]:
    low, high = int(np.floor(length * (1 - range_ratio))), int(np.ceil(length * (1 + range_ratio)))
    return rng.integers(max(1, low), high + 1, size=count).tolist()


def _random_tokens(count: int, token_ids: range, rng: np.random.Generator) -> list[int]:
    return rng.integers(token_ids.start, token_ids.stop, size=count).tolist()


def _read_azure(path: Path, num_rows: int | None) -> list[TraceRow]:
    rows: list[TraceRow] = []
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            if num_rows is not None and len(rows) == num_rows:
                break
            seconds, _, fraction = line["TIMESTAMP"].partition(".")
            whole = datetime.fromisoformat(seconds + "+00:00").timestamp()
            arrival = whole + float(f"0.{fraction or 0}")
            rows.append(TraceRow(arrival, int(line["ContextTokens"]), int(line["GeneratedTokens"])))
    return rows


def _read_mooncake(path: Path, num_rows: int | None) -> list[TraceRow]:
    rows: list[TraceRow] = []
    with path.open() as file:
        for line in file:
            if num_rows is not None and len(rows) == num_rows:
                break
            row = json.loads(line)
            hash_ids = tuple(row.get("hash_ids", ()))
            rows.append(TraceRow(row["timestamp"] / 1000, row["input_length"], row["output_length"], hash_ids))
    return rows
