"""What `pdray status` shows of an application, as its Coordinator gathers it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

from ray.exceptions import RayError

from pdray.actors.fleet import WorkerFleet
from pdray.wire.cluster_view import WorkerInfo

CHECK_TIMEOUT_S = 10.0
FORGET_ROUTER_S = 20.0


class WatchingRouters:
    """What routers that watch the Coordinator say of themselves.

    Args:
        lately_s: a router that was not seen for so long is not ready.
    """

    def __init__(self, lately_s: float) -> None:
        self._lately_s = lately_s
        self._facts: dict[str, dict[str, Any]] = {}
        self._seen: dict[str, float] = {}

    def seen(self, now: float, facts: dict[str, Any]) -> None:
        """A router has called, and said this of itself: "router_id", "ready", ..."""
        self._facts[facts["router_id"]] = facts
        self._seen[facts["router_id"]] = now

    def left(self, router_id: str) -> None:
        self._facts.pop(router_id, None)
        self._seen.pop(router_id, None)

    def has_ready(self, now: float) -> bool:
        """Whether one of them can serve."""
        return any(
            facts.get("ready") and self._seen[name] > now - self._lately_s for name, facts in self._facts.items()
        )

    def current(self, now: float) -> list[dict[str, Any]]:
        """Those seen within FORGET_ROUTER_S; the others are forgotten."""
        for router_id in [name for name, seen in self._seen.items() if seen <= now - FORGET_ROUTER_S]:
            self.left(router_id)
        return list(self._facts.values())


async def describe_worker(fleet: WorkerFleet, info: WorkerInfo, timeout_s: float) -> dict[str, Any]:
    """A worker's own description, or that it gives none."""
    try:
        async with asyncio.timeout(timeout_s):
            answer: dict[str, Any] = await fleet.actor(info).describe.remote()
    except (RayError, TimeoutError, KeyError) as error:
        return {"worker_id": info.worker_id, "state": f"no answer ({type(error).__name__})"}
    return answer


async def check_workers(fleet: WorkerFleet, workers: list[WorkerInfo]) -> dict[str, list[str]]:
    """Problems of each worker's block accounting. Raises TimeoutError, RayError: one of them does not answer."""
    async with asyncio.timeout(CHECK_TIMEOUT_S):
        answers: list[list[str]] = await asyncio.gather(
            *(fleet.actor(info).check_integrity.remote() for info in workers)
        )
    return {info.worker_id: problems for info, problems in zip(workers, answers, strict=True)}


def loop_failures(
    own: Mapping[str, str], workers: Mapping[str, Mapping[str, str]], routers: Iterable[Mapping[str, Any]]
) -> dict[str, str]:
    """Failures of background loops in every process of an application, by process and loop."""
    found = {f"coordinator: {name}": text for name, text in own.items()}
    for worker_id, failures in workers.items():
        found |= {f"{worker_id}: {name}": text for name, text in failures.items()}
    for router in routers:
        found |= {f"{router['router_id']}: {name}": text for name, text in router.get("loop_failures", {}).items()}
    return found
