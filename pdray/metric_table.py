"""What a router measures, under pdray's names and under vLLM's: one row a metric.

Ray exports a row that has a name of pdray's as `ray_<name>`; /metrics of the API shows every row, under both names.
A row whose values are read where they are shown has no metric in Ray, or a worker's, which is the better source there.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from pdray.outputs import Outcome

LATENCY_BOUNDARIES_S = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
LATENCY_BOUNDARIES_S += [120.0, 300.0, 600.0, 1800.0]  # waits reach max_queue_wait_s, long answers take minutes
TOKEN_BOUNDARIES = [float(2**power) for power in range(18)]
OUTCOMES = tuple(str(outcome) for outcome in Outcome)
PARTS = (
    *("queue", "lease_wait", "prefill_queue", "prefill", "ttft_unexplained"),
    *("transfer_wait", "first_decode_step", "first_gap_unexplained"),
)

Kind = Literal["gauge", "counter", "histogram"]


class Metric(NamedTuple):
    """One row.

    Attributes:
        pdray: its name here, without Prometheus' _total. None: it is only vLLM's.
        vllm: its name there, likewise. None: vLLM has none.
        tag: a further tag's name, and vllm_tag vLLM's name of it; values: all that it takes.
        vllm_values: those that vLLM knows; None are all.
        in_ray: Ray exports it, too.
    """

    kind: Kind
    pdray: str | None
    vllm: str | None
    description: str
    boundaries: tuple[float, ...] = ()
    tag: str | None = None
    values: tuple[str, ...] = ()
    vllm_tag: str | None = None
    vllm_values: tuple[str, ...] | None = None
    in_ray: bool = True


_SECONDS = tuple(LATENCY_BOUNDARIES_S)
_TOKENS = tuple(TOKEN_BOUNDARIES)

TABLE: dict[str, Metric] = {
    "queue_depth": Metric("gauge", "pdray_queue_depth", "vllm:num_requests_waiting", "Requests waiting for credit"),
    "running": Metric(
        "gauge", "pdray_requests_running", "vllm:num_requests_running", "Requests that hold a lease", in_ray=False
    ),
    "kv_usage": Metric(
        "gauge",
        "pdray_kv_cache_usage_ratio",
        "vllm:kv_cache_usage_perc",
        "Share of the decode workers' KV blocks in use, 0 to 1",
        in_ray=False,
    ),
    "ttft": Metric(
        "histogram",
        "pdray_time_to_first_token_seconds",
        "vllm:time_to_first_token_seconds",
        "Arrival until the first token",
        _SECONDS,
    ),
    "inter_token": Metric(
        "histogram",
        "pdray_inter_token_latency_seconds",
        "vllm:inter_token_latency_seconds",
        "Between two tokens of a request",
        _SECONDS,
    ),
    "e2e": Metric(
        "histogram",
        "pdray_e2e_request_latency_seconds",
        "vllm:e2e_request_latency_seconds",
        "Arrival until the last token",
        _SECONDS,
    ),
    "timing": Metric(
        "histogram", "pdray_request_timing_seconds", None, "Parts of a request's latency", _SECONDS, "part", PARTS
    ),
    "queue_time": Metric(
        "histogram", None, "vllm:request_queue_time_seconds", "Arrival until the prefill is scheduled", _SECONDS
    ),
    "prefill_time": Metric(
        "histogram", None, "vllm:request_prefill_time_seconds", "Scheduled until the first token", _SECONDS
    ),
    "decode_time": Metric(
        "histogram", None, "vllm:request_decode_time_seconds", "First token until the last", _SECONDS
    ),
    "inference_time": Metric(
        "histogram", None, "vllm:request_inference_time_seconds", "Scheduled until the last token", _SECONDS
    ),
    "token_time": Metric(
        "histogram",
        None,
        "vllm:request_time_per_output_token_seconds",
        "Mean time of a request's tokens after the first",
        _SECONDS,
    ),
    "request_prompt": Metric(
        "histogram", None, "vllm:request_prompt_tokens", "Prompt tokens of a finished request", _TOKENS
    ),
    "request_generation": Metric(
        "histogram", None, "vllm:request_generation_tokens", "Output tokens of a finished request", _TOKENS
    ),
    "requests": Metric(
        "counter",
        "pdray_requests",
        "vllm:request_success",
        "Requests by outcome",
        (),
        "outcome",
        OUTCOMES,
        "finished_reason",
        ("stop", "length", "abort"),
    ),
    "replays": Metric("counter", "pdray_replays", None, "Attempts lost with a worker and replayed on another"),
    "prompt_tokens": Metric(
        "counter", "pdray_prompt_tokens", "vllm:prompt_tokens", "Prompt tokens of finished requests"
    ),
    "generation_tokens": Metric(
        "counter", "pdray_generation_tokens", "vllm:generation_tokens", "Output tokens of finished requests"
    ),
    "cache_queries": Metric(
        "counter",
        "pdray_prefix_cache_queries",
        "vllm:prefix_cache_queries",
        "Prompt tokens of finished requests, which a prefix cache was asked for",
        in_ray=False,
    ),
    "cache_hits": Metric(
        "counter",
        "pdray_prefix_cache_hits",
        "vllm:prefix_cache_hits",
        "Prompt tokens of finished requests that came from a prefix cache",
        in_ray=False,
    ),
}
