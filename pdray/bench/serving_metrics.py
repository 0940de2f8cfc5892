"""Figures of a serving benchmark, with the names and formulas of vLLM's `vllm bench serve`.

Source: vllm/benchmarks/serve.py, `calculate_metrics`. Per successful request: TTFT, sending until the first
token; ITL, each gap between two chunks with tokens; TPOT, (E2EL - TTFT) / (output tokens - 1), for more than one
output token; E2EL, sending until the last token. Throughputs divide by the whole benchmark's duration.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from pdray.errors import ConfigError

PERCENTILES = (50, 90, 99)
METRIC_TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}


@dataclass(slots=True)
class RequestRecord:
    """One request as the client saw it; durations in seconds.

    Attributes:
        outcome: "rejected" is HTTP 429; "failed" is everything else that is not a full answer.
        status: HTTP status; None if there was no answer.
        output_len: completion tokens from the server's usage, or the number of chunks if it sent none.
        timings: the server's own breakdown, in seconds by part; empty if it sent none.
        lateness: from its arrival time until it was sent: a client that cannot keep up, or has reached max_concurrency.
    """

    prompt_len: int
    outcome: Literal["ok", "rejected", "failed"] = "failed"
    status: int | None = None
    error: str = ""
    retry_after_s: float | None = None
    output_len: int = 0
    ttft: float = 0.0
    itls: list[float] = field(default_factory=list)
    e2el: float = 0.0
    timings: dict[str, float] = field(default_factory=dict)
    lateness: float = 0.0

    @property
    def tpot(self) -> float | None:
        return (self.e2el - self.ttft) / (self.output_len - 1) if self.output_len > 1 else None


def parse_goodput(limits: list[str]) -> dict[str, float]:
    """["ttft:500", "tpot:50"] (milliseconds) → seconds by metric. As vLLM: ttft, tpot and e2el may be named.

    Raises:
        ConfigError: another form, name or a negative limit.
    """
    parsed: dict[str, float] = {}
    for limit in limits:
        name, _, milliseconds = limit.partition(":")
        try:
            parsed[name] = float(milliseconds) / 1000
        except ValueError:
            raise ConfigError(f"goodput limit {limit!r} must read NAME:MILLISECONDS, e.g. ttft:500") from None
        if name not in ("ttft", "tpot", "e2el") or parsed[name] < 0:
            raise ConfigError(f"goodput limit {limit!r}: the name must be ttft, tpot or e2el, and the limit at least 0")
    return parsed


def calculate_metrics(
    records: list[RequestRecord], duration_s: float, goodput: dict[str, float] | None = None
) -> dict[str, Any]:
    """All figures of a run; times in milliseconds under vLLM's names (mean_ttft_ms, p99_itl_ms, ...).

    Args:
        duration_s: from the first request's sending until the last answer's end.
        goodput: limits in seconds; request_goodput counts the requests that meet all of them.
    """
    done = [record for record in records if record.outcome == "ok"]
    total_input = sum(record.prompt_len for record in done)
    total_output = sum(record.output_len for record in done)
    samples = {
        "ttft": [record.ttft for record in done],
        "tpot": [record.tpot for record in done if record.tpot is not None],
        "itl": [itl for record in done for itl in record.itls],
        "e2el": [record.e2el for record in done],
    }
    result: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(done),
        "rejected": sum(record.outcome == "rejected" for record in records),
        "failed": sum(record.outcome == "failed" for record in records),
        "p99_lateness_ms": 1000 * float(np.percentile([record.lateness for record in records], 99))
        if records
        else None,
        "errors": dict(Counter(record.error for record in records if record.outcome != "ok").most_common(10)),
        "total_input_tokens": total_input,
        "total_output_tokens": total_output,
        "request_throughput": len(done) / duration_s,
        "output_throughput": total_output / duration_s,
        "total_token_throughput": (total_input + total_output) / duration_s,
        "request_goodput": None,
    }
    if goodput:
        result["request_goodput"] = sum(meets(record, goodput) for record in done) / duration_s
    for name, seconds in samples.items():
        result |= distribution(name, seconds)
    return result


def meets(record: RequestRecord, goodput: dict[str, float]) -> bool:
    """Whether an answer is within the limits. vLLM counts the TPOT of a single-token answer as 0."""
    values = {"ttft": record.ttft, "tpot": record.tpot or 0.0, "e2el": record.e2el}
    return all(values[name] <= limit for name, limit in goodput.items())


def distribution(name: str, seconds: list[float]) -> dict[str, float | None]:
    """Mean, median and percentiles in milliseconds; None where nothing was measured."""
    milliseconds = np.asarray(seconds) * 1000
    keys = [f"mean_{name}_ms", f"std_{name}_ms", f"median_{name}_ms", *(f"p{p}_{name}_ms" for p in PERCENTILES)]
    if not len(milliseconds):
        return dict.fromkeys(keys)
    percentiles = np.percentile(milliseconds, PERCENTILES)
    values = [milliseconds.mean(), milliseconds.std(), np.median(milliseconds), *percentiles]
    return {key: float(value) for key, value in zip(keys, values, strict=True)}


def format_metrics(result: dict[str, Any]) -> str:
    """The table that `vllm bench serve` prints, with rejections apart from failures."""
    lines = [f"{' Serving Benchmark Result ':=^60}"]
    counts = {
        "Successful requests": "completed",
        "Rejected requests (429)": "rejected",
        "Failed requests": "failed",
        "Benchmark duration (s)": "duration",
        "Total input tokens": "total_input_tokens",
        "Total generated tokens": "total_output_tokens",
        "Request throughput (req/s)": "request_throughput",
        "Request goodput (req/s)": "request_goodput",
        "Output token throughput (tok/s)": "output_throughput",
        "Total token throughput (tok/s)": "total_token_throughput",
    }
    lines += [_line(title, result[key]) for title, key in counts.items() if result[key] is not None]
    for name, title in METRIC_TITLES.items():
        lines.append(f"{f' {title} ':-^60}")
        short = name.upper()
        for label, key in {"Mean": "mean", "Median": "median", "P90": "p90", "P99": "p99"}.items():
            lines.append(_line(f"{label} {short} (ms)", result[f"{key}_{name}_ms"]))
    lines.append("=" * 60)
    lines += [f"{count} x {error}" for error, count in result["errors"].items()]
    return "\n".join(lines)


def _line(title: str, value: float | int | None) -> str:
    text = "-" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"
    return f"{title + ':':<42}{text:>18}"
