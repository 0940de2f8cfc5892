"""Metrics, through ray.util.metrics: Ray exports each as `ray_<name>` on every node's metrics port.

Made only inside a Ray process (a router replica, a worker); about 2 µs an operation. Ray exports a histogram's sum as
that of its buckets' midpoints: read quantiles from a histogram, and means only roughly.

Every metric has the tags `application` and `model`: the Serve application's name, and the model's name in the API.
Every counter is there from the start, at 0.

/metrics of the API's own port has its router's, with sums that are exact, and under vLLM's names, too
(pdray.metric_table); of several routers behind one port, those of whichever answers.

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
    pdray_decode_sms                         gauge, SMs of decodes beside prompts; 0 while there is no split
    pdray_split_changes                      counter, of the split, or between a split and one step of both
    pdray_prompt_pieces                      counter, of prompts, computed beside decodes
    pdray_pipelined_steps                    counter, decode steps in micro-batches; the others are plain
    pdray_integrity_problems                 gauge, found by the last check of the block accounting at rest
    pdray_rank_steps                         gauge, tag `rank`: launched since its start; of workers of several ranks
    pdray_rank_memory_bytes                  gauge, tag `rank`: of its GPU that torch holds; on CPU, of the process
    pdray_transfers                          counter, completed puts of this worker
    pdray_transfer_bytes                     counter, KV that they pushed
    pdray_transfer_seconds                   counter, time that they took

Every process (tag `process`: coordinator, or the router or worker):
    pdray_loop_failures                      counter, tag `loop`: exceptions after which a background loop runs again
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ray.util.metrics import Counter, Gauge, Histogram

from pdray.engine.request import EngineStats
from pdray.exposition import Exposition
from pdray.metric_table import LATENCY_BOUNDARIES_S, TABLE, Metric
from pdray.outputs import Outcome, RequestOutput, RequestTimings

if TYPE_CHECKING:
    from pdray.ranks.facts import RankState

FIRST_TOKEN_PARTS = ("queue", "lease_wait", "prefill_queue", "prefill", "ttft_unexplained")
FIRST_GAP_PARTS = ("transfer_wait", "first_decode_step", "first_gap_unexplained")


class RouterMetrics:
    """Metrics of one router: for Ray, and for the API's own /metrics. Called on its event loop."""

    def __init__(self, router_id: str, *, application: str, model: str) -> None:
        tags = {"application": application, "model": model, "router": router_id}
        self.exposition = Exposition(tags, model)
        self._ray: dict[str, Gauge | Counter | Histogram] = {
            key: _of_row(metric, metric.pdray, tags)
            for key, metric in TABLE.items()
            if metric.pdray is not None and metric.in_ray
        }

    def on_queue_depth(self, depth: int) -> None:
        """The number of requests that wait has changed."""
        self._gauge("queue_depth").set(depth)
        self.exposition.samples["queue_depth"].set(depth)

    def on_first_token(self, timings: RequestTimings) -> None:
        """A request's first token reached the router; `timings` holds everything up to ttft."""
        if timings.ttft is not None:
            self._observe("ttft", timings.ttft)
        self._observe_parts(timings, FIRST_TOKEN_PARTS)

    def on_inter_token(self, seconds: float) -> None:
        """Seconds between two messages with tokens of one completion."""
        self._observe("inter_token", seconds)

    def on_replay(self) -> None:
        """A worker was lost under an attempt, and another goes on."""
        self._count("replays", 1)

    def on_finished(self, outcome: Outcome, output: RequestOutput | None) -> None:
        """A request ended. `output` is None if it never started (rejected, invalid, no worker)."""
        self._count("requests", 1, str(outcome))
        if output is None:
            return
        num_prompt_tokens = len(output.prompt_token_ids)
        num_output_tokens = sum(len(completion.token_ids) for completion in output.outputs)
        self._count("prompt_tokens", num_prompt_tokens)
        self._count("generation_tokens", num_output_tokens)
        self._count("cache_queries", num_prompt_tokens)
        self._count("cache_hits", output.num_cached_tokens)
        self._observe("request_prompt", num_prompt_tokens)
        self._observe("request_generation", num_output_tokens)
        if output.timings.e2e is not None:
            self._observe("e2e", output.timings.e2e)
        self._observe_parts(output.timings, FIRST_GAP_PARTS)
        self._observe_vllm(output.timings, max((len(each.token_ids) for each in output.outputs), default=0))

    def text(self, *, vllm: bool, cache_config: Mapping[str, str] | None, running: int, kv_usage: float) -> bytes:
        """The API's /metrics; see Exposition.text. What is not told by events is given here."""
        self.exposition.samples["running"].set(running)
        self.exposition.samples["kv_usage"].set(kv_usage)
        return self.exposition.text(vllm=vllm, cache_config=cache_config)

    def _observe_parts(self, timings: RequestTimings, parts: tuple[str, ...]) -> None:
        for part in parts:
            seconds: float | None = getattr(timings, part)
            if seconds is not None:
                self._observe("timing", max(0.0, seconds), part)

    def _observe_vllm(self, timings: RequestTimings, num_tokens: int) -> None:
        """The parts as vLLM cuts them; of requests that came to their first token."""
        if timings.ttft is None or timings.e2e is None:
            return
        prefill = timings.prefill or 0.0
        decode = max(0.0, timings.e2e - timings.ttft)
        self._observe("queue_time", max(0.0, timings.ttft - prefill))
        self._observe("prefill_time", prefill)
        self._observe("decode_time", decode)
        self._observe("inference_time", prefill + decode)
        if num_tokens > 1:
            self._observe("token_time", decode / (num_tokens - 1))

    def _gauge(self, key: str) -> Gauge:
        metric = self._ray[key]
        assert isinstance(metric, Gauge)
        return metric

    def _observe(self, key: str, value: float, tag: str = "") -> None:
        self.exposition.samples[key].observe(value, tag)
        if (metric := self._ray.get(key)) is not None:
            assert isinstance(metric, Histogram)
            metric.observe(value, tags=_tags(key, tag))

    def _count(self, key: str, amount: int, tag: str = "") -> None:
        if not amount:
            return
        self.exposition.samples[key].add(amount, tag)
        if (metric := self._ray.get(key)) is not None:
            assert isinstance(metric, Counter)
            metric.inc(amount, tags=_tags(key, tag))


def _of_row(metric: Metric, name: str, tags: dict[str, str]) -> Gauge | Counter | Histogram:
    more: dict[str, Sequence[str]] = {} if metric.tag is None else {metric.tag: metric.values}
    match metric.kind:
        case "gauge":
            return _gauge(name, metric.description, tags)
        case "counter":
            return _counter(name, metric.description, tags, more)
        case "histogram":
            return _histogram(name, metric.description, tags, tuple(more))


def _tags(key: str, value: str) -> dict[str, str]:
    tag = TABLE[key].tag
    return {} if tag is None else {tag: value}


class WorkerMetrics:
    """Metrics of one worker. Called on its event loop, never from the engine's thread."""

    _COUNTERS = {
        "prefix_cache_queries": ("pdray_prefix_cache_queries", "Tokens looked up in the prefix cache"),
        "prefix_cache_hits": ("pdray_prefix_cache_hits", "Tokens found in the prefix cache"),
        "num_preemptions": ("pdray_preemptions", "Sequences preempted for memory"),
        "num_prompt_tokens": ("pdray_engine_prompt_tokens", "Prompt tokens computed"),
        "num_output_tokens": ("pdray_engine_output_tokens", "Tokens sampled"),
        "num_split_changes": ("pdray_split_changes", "Changes of how prompts and decodes share the GPU"),
        "num_prompt_pieces": ("pdray_prompt_pieces", "Pieces of prompts computed beside decodes"),
        "num_pipelined_steps": ("pdray_pipelined_steps", "Decode steps in micro-batches"),
    }

    def __init__(self, worker_id: str, role: str, *, application: str, model: str) -> None:
        tags = {"application": application, "model": model, "worker": worker_id, "role": role}
        self._running = _gauge("pdray_num_requests_running", "Sequences in the batch", tags)
        self._waiting = _gauge("pdray_num_requests_waiting", "Sequences that wait to be computed", tags)
        self._kv_usage = _gauge("pdray_kv_cache_usage_ratio", "Share of KV blocks in use", tags)
        self._decode_sms = _gauge("pdray_decode_sms", "SMs of decodes beside prompts", tags)
        self._counters = {
            field: _counter(name, description, tags) for field, (name, description) in self._COUNTERS.items()
        }
        self._counted = dict.fromkeys(self._COUNTERS, 0)
        self._integrity_problems = _gauge("pdray_integrity_problems", "Found by the last check at rest", tags)
        self._rank_steps = _gauge("pdray_rank_steps", "Steps of a rank since its start", tags, ("rank",))
        self._rank_memory = _gauge("pdray_rank_memory_bytes", "Memory that a rank holds", tags, ("rank",))
        self._transfers = _counter("pdray_transfers", "Completed puts", tags)
        self._transfer_bytes = _counter("pdray_transfer_bytes", "KV bytes pushed", tags)
        self._transfer_seconds = _counter("pdray_transfer_seconds", "Time that puts took", tags)

    def update(self, stats: EngineStats, ranks: Iterable[RankState] = ()) -> None:
        """Publish the state of the engine and of its ranks; counters grow by what was added since the last call."""
        for rank in ranks:
            rank_tag = {"rank": str(rank.rank)}
            self._rank_steps.set(rank.num_steps, rank_tag)
            self._rank_memory.set(rank.memory_bytes, rank_tag)
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._kv_usage.set(1.0 - stats.free_blocks / stats.num_blocks)
        self._decode_sms.set(stats.decode_sms)
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


def _gauge(name: str, description: str, tags: dict[str, str], more_keys: tuple[str, ...] = ()) -> Gauge:
    metric = Gauge(name, description, tag_keys=(*tags, *more_keys))
    metric.set_default_tags(tags)
    return metric


def _counter(
    name: str, description: str, tags: dict[str, str], more: dict[str, Sequence[str]] | None = None
) -> Counter:
    """A counter that starts at 0 for each value of each further tag. One that appears with its first increase has no
    rate then, and cannot be told from one that is not measured.
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
