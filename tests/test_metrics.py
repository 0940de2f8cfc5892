"""Metrics as Ray exports them, read from the node's metrics port."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Iterator

import pytest
import ray

from pdray.engine.request import EngineStats
from pdray.metric_table import OUTCOMES
from pdray.metrics import LoopMetrics, RouterMetrics, WorkerMetrics
from pdray.outputs import CompletionOutput, Outcome, RequestOutput, RequestTimings
from pdray.ranks.facts import RankState

pytestmark = pytest.mark.ray
EXPORT_DEADLINE_S = 120.0
OWN_TAGS = ("application", "model", "router", "worker", "role", "part", "outcome", "le", "process", "loop", "rank")
ROLE = "role=decode,worker=decode-0"
NAMED = {"application": "app", "model": "tiny"}


@pytest.fixture(scope="module")
def metrics_url() -> Iterator[str]:
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        _system_config={"metrics_report_interval_ms": 200},
    )
    node = ray.nodes()[0]
    yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    ray.shutdown()


def exported(url: str) -> dict[tuple[str, str], float]:
    """pdray's samples by (name, sorted own tags)."""
    samples = {}
    with urllib.request.urlopen(url, timeout=5) as response:
        for line in response.read().decode().splitlines():
            match = re.fullmatch(r"(ray_pdray_\w+)\{(.*)\} (\S+)", line)
            if match:
                tags = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
                own = {k: v for k, v in tags.items() if k in OWN_TAGS}
                samples[match[1], ",".join(f"{k}={own[k]}" for k in sorted(own))] = float(match[3])
    return samples


def wait_for(url: str, expected: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    """Samples, once they hold `expected`; the export is periodic."""
    deadline = time.monotonic() + EXPORT_DEADLINE_S
    while True:
        try:
            samples = exported(url)
        except OSError:
            samples = {}
        if all(samples.get(key) == pytest.approx(value) for key, value in expected.items()):
            return samples
        if time.monotonic() > deadline:
            got = {key: samples.get(key) for key in expected}
            raise AssertionError(f"exported {got}, expected {expected}; all names: {sorted({n for n, _ in samples})}")
        time.sleep(0.2)


def stats(**values: int) -> EngineStats:
    fields = dict.fromkeys(EngineStats.__dataclass_fields__, 0) | {"num_blocks": 100, "free_blocks": 100}
    return EngineStats(**(fields | values))


def routers(own: str = "") -> str:
    """Tags of a sample of router-0, in order."""
    tags = ["application=app", "model=tiny", "router=router-0", *(own.split(",") if own else ())]
    return ",".join(sorted(tags))


def test_router_metrics_are_exported(metrics_url: str) -> None:
    metrics = RouterMetrics("router-0", **NAMED)
    timings = RequestTimings(queue=0.1, lease_wait=0.1, prefill_queue=0.0, prefill=0.2, ttft=0.39)
    output = RequestOutput("r", None, [1, 2, 3], [CompletionOutput(0, token_ids=[4, 5])], timings=timings)
    metrics.on_queue_depth(3)
    metrics.on_first_token(timings)
    metrics.on_inter_token(0.02)
    timings.first_decode_step, timings.first_gap, timings.e2e = 0.01, 0.03, 0.7
    metrics.on_finished("stop", output)
    metrics.on_finished("rejected", None)
    samples = wait_for(
        metrics_url,
        {
            ("ray_pdray_queue_depth", routers()): 3,
            ("ray_pdray_time_to_first_token_seconds_bucket", routers("le=0.25")): 0,
            ("ray_pdray_time_to_first_token_seconds_bucket", routers("le=0.5")): 1,
            ("ray_pdray_inter_token_latency_seconds_count", routers()): 1,
            (
                "ray_pdray_request_timing_seconds_bucket",
                routers("le=0.1,part=prefill"),
            ): 0,
            (
                "ray_pdray_request_timing_seconds_bucket",
                routers("le=0.25,part=prefill"),
            ): 1,
            (
                "ray_pdray_request_timing_seconds_bucket",
                routers("le=0.001,part=ttft_unexplained"),
            ): 1,
            (
                "ray_pdray_request_timing_seconds_bucket",
                routers("le=0.01,part=first_gap_unexplained"),
            ): 0,
            (
                "ray_pdray_request_timing_seconds_bucket",
                routers("le=0.025,part=first_gap_unexplained"),
            ): 1,
            ("ray_pdray_e2e_request_latency_seconds_bucket", routers("le=0.5")): 0,
            ("ray_pdray_e2e_request_latency_seconds_bucket", routers("le=1.0")): 1,
            ("ray_pdray_requests_total", routers("outcome=stop")): 1,
            ("ray_pdray_requests_total", routers("outcome=rejected")): 1,
            ("ray_pdray_prompt_tokens_total", routers()): 3,
            ("ray_pdray_generation_tokens_total", routers()): 2,
        },
    )
    assert not any("part=transfer_wait" in tags for _, tags in samples)  # not reached, so not reported as 0


def test_worker_counters_grow_by_the_difference(metrics_url: str) -> None:
    metrics = WorkerMetrics("decode-0", "decode", **NAMED)
    metrics.update(stats(free_blocks=75, running=2, waiting=1, prefix_cache_queries=64, prefix_cache_hits=32))
    metrics.update(stats(free_blocks=25, running=4, prefix_cache_queries=96, prefix_cache_hits=32, num_preemptions=1))
    metrics.update(stats(free_blocks=25, running=4, decode_sms=48, num_split_changes=3, num_prompt_pieces=70))
    ranks = [RankState(0, 41, 6, 2000), RankState(1, 42, 7, 3000)]
    metrics.update(stats(free_blocks=25, running=4, decode_sms=48, num_pipelined_steps=7), ranks)
    metrics.on_transfer(1024, 0.004)
    metrics.on_transfer(1024, 0.002)
    tags = f"application=app,model=tiny,{ROLE}"
    wait_for(
        metrics_url,
        {
            ("ray_pdray_num_requests_running", tags): 4,
            ("ray_pdray_num_requests_waiting", tags): 0,
            ("ray_pdray_kv_cache_usage_ratio", tags): 0.75,
            ("ray_pdray_prefix_cache_queries_total", tags): 96,
            ("ray_pdray_prefix_cache_hits_total", tags): 32,
            ("ray_pdray_preemptions_total", tags): 1,
            ("ray_pdray_decode_sms", tags): 48,
            ("ray_pdray_split_changes_total", tags): 3,
            ("ray_pdray_prompt_pieces_total", tags): 70,
            ("ray_pdray_pipelined_steps_total", tags): 7,
            ("ray_pdray_rank_steps", f"application=app,model=tiny,rank=1,{ROLE}"): 7,
            ("ray_pdray_rank_memory_bytes", f"application=app,model=tiny,rank=0,{ROLE}"): 2000,
            ("ray_pdray_transfer_bytes_total", tags): 2048,
            ("ray_pdray_transfers_total", tags): 2,
            ("ray_pdray_transfer_seconds_total", tags): 0.006,
        },
    )


def test_failures_of_loops_are_counted_by_process_and_loop(metrics_url: str) -> None:
    worker, router = LoopMetrics("decode-0", "app"), LoopMetrics("router-1", "app")
    worker.on_failure("expire leases")
    worker.on_failure("expire leases")
    router.on_failure("follow the view")
    wait_for(
        metrics_url,
        {
            ("ray_pdray_loop_failures_total", "application=app,loop=expire leases,process=decode-0"): 2,
            ("ray_pdray_loop_failures_total", "application=app,loop=follow the view,process=router-1"): 1,
        },
    )


def test_counters_that_have_not_counted_are_there_at_0(metrics_url: str) -> None:
    RouterMetrics("router-1", **NAMED)
    WorkerMetrics("prefill-1", "prefill", **NAMED)
    tags = "application=app,model=tiny,router=router-1"
    expected = {(f"ray_pdray_{name}_total", tags): 0 for name in ("replays", "prompt_tokens", "generation_tokens")}
    for outcome in ("stop", "length", "abort", "timeout", "error", "rejected"):
        expected["ray_pdray_requests_total", f"application=app,model=tiny,outcome={outcome},router=router-1"] = 0
    worker = "application=app,model=tiny,role=prefill,worker=prefill-1"
    names = ("prefix_cache_queries", "prefix_cache_hits", "preemptions", "engine_prompt_tokens", "engine_output_tokens")
    for name in (*names, "transfers", "transfer_bytes", "transfer_seconds"):
        expected[f"ray_pdray_{name}_total", worker] = 0
    wait_for(metrics_url, expected)


def test_two_applications_are_told_apart(metrics_url: str) -> None:
    for application, free in (("one", 90), ("other", 40)):
        metrics = WorkerMetrics("decode-2", "decode", application=application, model=f"model-{application}")
        metrics.update(stats(free_blocks=free))
    name, tags = "ray_pdray_kv_cache_usage_ratio", "role=decode,worker=decode-2"
    wait_for(
        metrics_url,
        {
            (name, f"application=one,model=model-one,{tags}"): 0.1,
            (name, f"application=other,model=model-other,{tags}"): 0.6,
        },
    )


def test_long_waits_have_buckets_of_their_own(metrics_url: str) -> None:
    """A queue's default bound is 60 s, and an answer of many tokens takes minutes."""
    metrics = RouterMetrics("router-2", **NAMED)
    for e2e in (90.0, 400.0, 1500.0):
        metrics.on_finished("length", RequestOutput("r", None, [1], [], timings=RequestTimings(e2e=e2e)))
    name = "ray_pdray_e2e_request_latency_seconds_bucket"
    counts = {60.0: 0, 120.0: 1, 600.0: 2, 1800.0: 3}
    tags = "application=app,le={},model=tiny,router=router-2"
    wait_for(metrics_url, {(name, tags.format(bound)): count for bound, count in counts.items()})


def test_every_outcome_of_a_router_is_known_in_advance() -> None:
    """Each name that the router reports; a completion's own finish reasons are stop, length and abort."""
    assert set(OUTCOMES) == set(Outcome) >= {"stop", "length", "abort"}
