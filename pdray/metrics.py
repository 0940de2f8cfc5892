"""Metrics, through ray.util.metrics: Ray exports each as `ray_<name>` on every node's metrics port.

Made only inside a Ray process (a router replica, a worker); about 2 µs an operation. Ray exports a histogram's sum as
that of its buckets' midpoints: read quantiles from a histogram, and means only roughly.

Every metric has the tags `application` and `model`: the Serve application's name, and the model's name in the API.
Every counter is there from the start, at 0.

Router (tag `router`):
    pdray_queue_depth                        gauge, requests waiting for credit
    pdray_time_to_first_token_seconds        histogram
    pdray_inter_token_latency_seconds        histogram
    pdray_request_timing_seconds             histogram, tag `part`: queue, lease_wait, prefill_queue, prefill,
                                             ttft_unexplained, transfer_wait, first_decode_step,
                                             first_gap_unexplained; a remainder below 0 counts as 0
    pdray_e2e_request_latency_seconds        histogram
    pdray_requests                           counter, tag `outcome`: stop, length, abort, timeout, error, rejected
    pdray_replays                            counter, attempts that were lost with a worker
    pdray_prompt_tokens                      counter, of finished requests
    pdray_generation_tokens                  counter, of finished requests

Worker (tags `worker`, `role`):
    pdray_num_requests_running               gauge, sequences in the batch
    pdray_num_requests_waiting               gauge, sequences that wait to be computed
    pdray_kv_cache_usage_ratio               gauge, share of blocks that are not allocatable, 0 to 1
    pdray_prefix_cache_queries               counter, tokens looked up
    pdray_prefix_cache_hits                  counter, tokens found
    pdray_preemptions                        counter
    pdray_engine_prompt_tokens               counter, computed
    pdray_engine_output_tokens               counter, sampled
    pdray_integrity_problems                 gauge, found by the last check of the block accounting at rest
    pdray_transfers                          counter, completed puts of this worker
    pdray_transfer_bytes                     counter, KV that they pushed
    pdray_transfer_seconds                   counter, time that they took

Every process (tag `process`: coordinator, or the router or worker):
    pdray_loop_failures                      counter, tag `loop`: exceptions after which a background loop runs again
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ray.util.metrics import Counter, Gauge, Histogram

from pdray.engine.request import EngineStats
from pdray.outputs import Outcome, RequestOutput, RequestTimings

LATENCY_BOUNDARIES_S = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
LATENCY_BOUNDARIES_S += [120.0, 300.0, 600.0, 1800.0]  # waits reach max_queue_wait_s, long answers take minutes
OUTCOMES = tuple(str(outcome) for outcome in Outcome)
FIRST_TOKEN_PARTS = ("queue", "lease_wait", "prefill_queue", "prefill", "ttft_unexplained")
FIRST_GAP_PARTS = ("transfer_wait", "first_decode_step", "first_gap_unexplained")


class RouterMetrics:
    """What one router measures. Called on its event loop."""

    def __init__(self, router_id: str, *, application: str, model: str) -> None:
        tags = {"application": application, "model": model, "router": router_id}
        self._queue_depth = _gauge("pdray_queue_depth", "Requests waiting for credit", tags)
        self._ttft = _histogram("pdray_time_to_first_token_seconds", "Arrival until the first token", tags)
        self._inter_token = _histogram("pdray_inter_token_latency_seconds", "Between two tokens of a request", tags)
        self._timing = _histogram("pdray_request_timing_seconds", "Parts of a request's latency", tags, ("part",))
        self._e2e = _histogram("pdray_e2e_request_latency_seconds", "Arrival until the last token", tags)
        self._requests = _counter("pdray_requests", "Requests by outcome", tags, {"outcome": OUTCOMES})
        self._replays = _counter("pdray_replays", "Attempts lost with a worker and replayed on another", tags)
        self._prompt_tokens = _counter("pdray_prompt_tokens", "Prompt tokens of finished requests", tags)
        self._generation_tokens = _counter("pdray_generation_tokens", "Output tokens of finished requests", tags)

    def on_queue_depth(self, depth: int) -> None:
        """The number of requests that wait has changed."""
        self._queue_depth.set(depth)

    def on_first_token(self, timings: RequestTimings) -> None:
        """A request's first token reached the router; `timings` holds everything up to ttft."""
        if timings.ttft is not None:
            self._ttft.observe(timings.ttft)
        self._observe_parts(timings, FIRST_TOKEN_PARTS)

    def on_inter_token(self, seconds: float) -> None:
        """Seconds between two messages with tokens of one completion."""
        self._inter_token.observe(seconds)

    def on_replay(self) -> None:
        """A worker was lost under an attempt, and another goes on."""
        self._replays.inc()

    def on_finished(self, outcome: Outcome, output: RequestOutput | None) -> None:
        """A request ended. `output` is None if it never started (rejected, invalid, no worker)."""
        self._requests.inc(tags={"outcome": str(outcome)})
        if output is None:
            return
        if output.prompt_token_ids:
            self._prompt_tokens.inc(len(output.prompt_token_ids))
        num_output_tokens = sum(len(completion.token_ids) for completion in output.outputs)
        if num_output_tokens:
            self._generation_tokens.inc(num_output_tokens)
        if output.timings.e2e is not None:
            self._e2e.observe(output.timings.e2e)
        self._observe_parts(output.timings, FIRST_GAP_PARTS)

    def _observe_parts(self, timings: RequestTimings, parts: tuple[str, ...]) -> None:
        for part in parts:
            seconds: float | None = getattr(timings, part)
            if seconds is not None:
                self._timing.observe(max(0.0, seconds), tags={"part": part})


class WorkerMetrics:
    """What one worker measures. Called on its event loop, never from the engine's thread."""

    _COUNTERS = {
        "prefix_cache_queries": ("pdray_prefix_cache_queries", "Tokens looked up in the prefix cache"),
        "prefix_cache_hits": ("pdray_prefix_cache_hits", "Tokens found in the prefix cache"),
        "num_preemptions": ("pdray_preemptions", "Sequences preempted for memory"),
        "num_prompt_tokens": ("pdray_engine_prompt_tokens", "Prompt tokens computed"),
        "num_output_tokens": ("pdray_engine_output_tokens", "Tokens sampled"),
    }

    def __init__(self, worker_id: str, role: str, *, application: str, model: str) -> None:
        tags = {"application": application, "model": model, "worker": worker_id, "role": role}
        self._running = _gauge("pdray_num_requests_running", "Sequences in the batch", tags)
        self._waiting = _gauge("pdray_num_requests_waiting", "Sequences that wait to be computed", tags)
        self._kv_usage = _gauge("pdray_kv_cache_usage_ratio", "Share of KV blocks in use", tags)
        self._counters = {
            field: _counter(name, description, tags) for field, (name, description) in self._COUNTERS.items()
        }
        self._counted = dict.fromkeys(self._COUNTERS, 0)
        self._integrity_problems = _gauge("pdray_integrity_problems", "Found by the last check at rest", tags)
        self._transfers = _counter("pdray_transfers", "Completed puts", tags)
        self._transfer_bytes = _counter("pdray_transfer_bytes", "KV bytes pushed", tags)
        self._transfer_seconds = _counter("pdray_transfer_seconds", "Time that puts took", tags)

    def update(self, stats: EngineStats) -> None:
        """Publish the engine's state; counters grow by what was added since the last call."""
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._kv_usage.set(1.0 - stats.free_blocks / stats.num_blocks)
        for field, counter in self._counters.items():
            total: int = getattr(stats, field)
            if total > self._counted[field]:
                counter.inc(total - self._counted[field])
                self._counted[field] = total

    def on_integrity_check(self, num_problems: int) -> None:
        """The block accounting was checked at rest."""
        self._integrity_problems.set(num_problems)

    def on_transfer(self, num_bytes: int, seconds: float) -> None:
        """One put of this worker has completed."""
        self._transfers.inc()
        if num_bytes:
            self._transfer_bytes.inc(num_bytes)
        if seconds:
            self._transfer_seconds.inc(seconds)


class LoopMetrics:
    """Failures of one process's background loops; its on_failure is for pdray.background.LoopFailures.

    Args:
        process: a worker's or router's id, or "coordinator".
    """

    def __init__(self, process: str, application: str) -> None:
        tags = {"application": application, "process": process}
        self._failures = _counter("pdray_loop_failures", "Exceptions of background loops", tags, {"loop": ()})

    def on_failure(self, loop: str) -> None:
        """A background loop has raised, and runs again."""
        self._failures.inc(tags={"loop": loop})


def _gauge(name: str, description: str, tags: dict[str, str]) -> Gauge:
    metric = Gauge(name, description, tag_keys=tuple(tags))
    metric.set_default_tags(tags)
    return metric


def _counter(
    name: str, description: str, tags: dict[str, str], more: dict[str, Sequence[str]] | None = None
) -> Counter:
    """At 0 for each value of each further tag: what is absent until it counts cannot be told from what nobody measures,
    and has no rate at its first increase.
    """
    more = more or {}
    metric = Counter(name, description, tag_keys=(*tags, *more))
    metric.set_default_tags(tags)
    for values in itertools.product(*more.values()):
        metric._record(0, tags=dict(zip(more, values, strict=True)))  # inc() takes no 0
    return metric


def _histogram(name: str, description: str, tags: dict[str, str], more_keys: tuple[str, ...] = ()) -> Histogram:
    metric = Histogram(name, description, boundaries=LATENCY_BOUNDARIES_S, tag_keys=(*tags, *more_keys))
    metric.set_default_tags(tags)
    return metric
