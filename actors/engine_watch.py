"""What a worker watches of its engine: its figures, its block accounting, and that its steps end."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from pdray.errors import EngineHungError

if TYPE_CHECKING:
    from pdray.engine.engine import Engine
    from pdray.engine.loop import EngineLoop
    from pdray.metrics import WorkerMetrics
    from pdray.ranks.facts import RankState
    from pdray.ranks.leader import Leader

logger = logging.getLogger(__name__)

METRICS_INTERVAL_S = 1.0
IDLE_CHECK_INTERVAL_S = 5.0
HUNG_CHECK_INTERVAL_S = 1.0


def fingerprint(engine: Engine) -> str:
    """Of weights, dtype, block size and KV layout, whatever ranks they are divided among; see WorkerInfo."""
    from pdray.engine.kv.layout import KVLayout

    model = engine.model
    return f"{model.fingerprint}-{KVLayout.of(model.config, engine.block_size, engine.pool.layout.dtype)}"


def rank_states(engine: Engine, leader: Leader | None) -> list[RankState]:
    """Of every rank, this process first; none where it is the only one."""
    if leader is None:
        return []
    from pdray.ranks.facts import RankState, memory_bytes

    own = RankState(0, os.getpid(), engine.stats().num_steps, memory_bytes(engine.pool.device))
    return [own, *leader.states()]


def describe_engine(engine: Engine, leader: Leader | None) -> dict[str, Any]:
    """The engine's state for `pdray status`, and that of its ranks."""
    stats, steps, split = engine.stats(), engine.step_times(), engine.split_state()
    return {
        "running": stats.running,
        "waiting": stats.waiting,
        "queued_tokens": stats.queued_tokens,
        "free_blocks": stats.free_blocks,
        "num_blocks": stats.num_blocks,
        "preemptions": stats.num_preemptions,
        "ranks": [state._asdict() for state in rank_states(engine, leader)],
        "step_ms": None if steps is None else {"step": steps.step._asdict(), "host": steps.host._asdict()},
        "split": None if split is None else split._asdict(),
        "decode_pipeline": None if (pipeline := engine.pipeline) is None else pipeline.state()._asdict(),
    }


async def report_metrics(engine: Engine, metrics: WorkerMetrics, leader: Leader | None) -> None:
    """Export the engine's figures, and its ranks', for ever."""
    while True:
        metrics.update(engine.stats(), rank_states(engine, leader))
        await asyncio.sleep(METRICS_INTERVAL_S)


async def check_when_idle(
    engine: Engine, check: Callable[[], Awaitable[list[str]]], metrics: WorkerMetrics, name: str
) -> None:
    """Check the block accounting whenever work has come to rest: leaked blocks are seen before they are missed.

    Args:
        check: returns problems. name: of the worker.
    """
    checked = 0
    while True:
        await asyncio.sleep(IDLE_CHECK_INTERVAL_S)
        stats = engine.stats()
        if stats.num_steps != checked and not stats.running + stats.waiting + stats.reserved:
            checked, problems = stats.num_steps, await check()
            metrics.on_integrity_check(len(problems))
            for problem in problems:
                logger.error("%s: integrity: %s", name, problem)


async def wait_until_hung(engine_loop: EngineLoop, step_timeout_s: float) -> EngineHungError:
    """Return once a step has taken too long: a device that hangs holds the engine's thread alone; heartbeats go on."""
    while (seconds := engine_loop.seconds_since_progress()) <= step_timeout_s:
        await asyncio.sleep(min(step_timeout_s / 4, HUNG_CHECK_INTERVAL_S))
    return EngineHungError(f"a step has taken {seconds:.1f} s (step_timeout_s is {step_timeout_s:g})")
