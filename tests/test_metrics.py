"""Metrics as Ray exports them, read from the node's metrics port."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Iterator

import pytest
import ray

from pdray.engine.request import EngineStats
from pdray.metrics import LoopMetrics, RouterMetrics, WorkerMetrics
from pdray.outputs import CompletionOutput, RequestOutput, RequestTimings

pytestmark = pytest.mark.ray
EXPORT_DEADLINE_S = 20.0
OWN_TAGS = ("router", "worker", "role", "part", "outcome", "le", "process", "loop")


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


def test_router_metrics_are_exported(metrics_url: str) -> None:
    metrics = RouterMetrics("router-0")
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
            ("ray_pdray_queue_depth", "router=router-0"): 3,
            ("ray_pdray_time_to_first_token_seconds_bucket", "le=0.25,router=router-0"): 0,
            ("ray_pdray_time_to_first_token_seconds_bucket", "le=0.5,router=router-0"): 1,
            ("ray_pdray_inter_token_latency_seconds_count", "router=router-0"): 1,
            ("ray_pdray_request_timing_seconds_bucket", "le=0.1,part=prefill,router=router-0"): 0,
            ("ray_pdray_request_timing_seconds_bucket", "le=0.25,part=prefill,router=router-0"): 1,
            ("ray_pdray_request_timing_seconds_bucket", "le=0.001,part=ttft_unexplained,router=router-0"): 1,
            ("ray_pdray_request_timing_seconds_bucket", "le=0.01,part=first_gap_unexplained,router=router-0"): 0,
            ("ray_pdray_request_timing_seconds_bucket", "le=0.025,part=first_gap_unexplained,router=router-0"): 1,
            ("ray_pdray_e2e_request_latency_seconds_bucket", "le=0.5,router=router-0"): 0,
            ("ray_pdray_e2e_request_latency_seconds_bucket", "le=1.0,router=router-0"): 1,
            ("ray_pdray_requests_total", "outcome=stop,router=router-0"): 1,
            ("ray_pdray_requests_total", "outcome=rejected,router=router-0"): 1,
            ("ray_pdray_prompt_tokens_total", "router=router-0"): 3,
            ("ray_pdray_generation_tokens_total", "router=router-0"): 2,
        },
    )
    assert not any("part=transfer_wait" in tags for _, tags in samples)  # not reached, so not reported as 0


def test_worker_counters_grow_by_the_difference(metrics_url: str) -> None:
    metrics = WorkerMetrics("decode-0", "decode")
    metrics.update(stats(free_blocks=75, running=2, waiting=1, prefix_cache_queries=64, prefix_cache_hits=32))
    metrics.update(stats(free_blocks=25, running=4, prefix_cache_queries=96, prefix_cache_hits=32, num_preemptions=1))
    metrics.on_transfer(1024, 0.004)
    metrics.on_transfer(1024, 0.002)
    tags = "role=decode,worker=decode-0"
    wait_for(
        metrics_url,
        {
            ("ray_pdray_num_requests_running", tags): 4,
            ("ray_pdray_num_requests_waiting", tags): 0,
            ("ray_pdray_kv_cache_usage", tags): 0.75,
            ("ray_pdray_prefix_cache_queries_total", tags): 96,
            ("ray_pdray_prefix_cache_hits_total", tags): 32,
            ("ray_pdray_preemptions_total", tags): 1,
            ("ray_pdray_transfer_bytes_total", tags): 2048,
            ("ray_pdray_transfers_total", tags): 2,
            ("ray_pdray_transfer_seconds_total", tags): 0.006,
        },
    )


def test_failures_of_loops_are_counted_by_process_and_loop(metrics_url: str) -> None:
    worker, router = LoopMetrics("decode-0"), LoopMetrics("router-1")
    worker.on_failure("expire leases")
    worker.on_failure("expire leases")
    router.on_failure("follow the view")
    wait_for(
        metrics_url,
        {
            ("ray_pdray_loop_failures_total", "loop=expire leases,process=decode-0"): 2,
            ("ray_pdray_loop_failures_total", "loop=follow the view,process=router-1"): 1,
        },
    )
