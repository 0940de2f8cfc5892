"""Room for an application's workers in Ray's cluster: finds it, or says what it waits for.

On GPUs the room is reserved first (GpuGroups); on CPU each worker's actor reserves its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pdray.actors.gpu_groups import GpuGroups
from pdray.actors.placement import cluster_nodes, uses_cuda, worker_options, worker_resources
from pdray.actors.questions import ask
from pdray.config import Config
from pdray.control.gpu_plan import plan_gpus
from pdray.control.room import Held, Resources, Room, explain, find_room
from pdray.errors import PlacementError
from pdray.wire.cluster_view import WorkerInfo

RETRY_S = 0.5
LEFT = "what had room for them has left the cluster, and is waited for"
PATIENCE_S = 1.0  # resources that are being freed are no reason to speak of


def demands(config: Config) -> list[Resources]:
    """Resources that each worker reserves, or on GPUs each bundle of workers that share one."""
    each = worker_resources(config)
    if uses_cuda(config):
        return [
            {"GPU": 1.0 if bundle.device_id is not None else bundle.num_gpus}
            | {name: amount * len(bundle.shares) for name, amount in each.items()}
            for bundle in plan_gpus(config)
        ]
    num_prefill = 0 if config.mode == "colocated" else config.num_prefill_workers
    return [each] * (num_prefill + config.num_decode_workers)


class WorkerPlaces:
    """The room of one application. Runs on the Coordinator's event loop.

    Args:
        on_wait: called with a worker's id and what it waits for.
        had_room: all workers had room before. What had room for a worker and has left the cluster is waited for: a
            cluster is too small for ever only if it was so from the beginning.
    """

    def __init__(
        self,
        config: Config,
        app_name: str,
        *,
        detached: bool,
        on_wait: Callable[[str, str], None],
        had_room: bool = False,
    ) -> None:
        self._config = config
        self._app_name = app_name
        self._detached = detached
        self._on_wait = on_wait
        self._had_room = had_room
        self._placed: set[str] = set()  # have had a place
        self._gpus = GpuGroups(config, app_name, detached=detached) if uses_cuda(config) else None
        self._lock = asyncio.Lock()
        self._starting: set[str] = set()  # have a place, and Ray may not have counted it yet

    async def place(self, worker_id: str, lender: WorkerInfo | None = None) -> dict[str, Any]:
        """Options of a worker's actor that put it where there is room; returns once there is some.

        Args:
            lender: of a guest, which must be on that one's node; on GPUs their bundle sees to it.

        Raises:
            PlacementError: there never will be. PdrayError: the GPUs that the configuration names are not free.
        """
        make = partial(worker_options, self._config, self._app_name, worker_id, detached=self._detached)
        options = await ask(make, what="which resources there are")
        if self._gpus is not None:
            await self._gpus.reserve(lambda reason: self._on_wait(worker_id, reason))
            return options | self._gpus.options(worker_id)
        demand = worker_resources(self._config)
        node_id = "" if lender is None else lender.node_id
        if demand:
            await self._wait_for_room(worker_id, demand, node_id)
        self._starting.add(worker_id)
        if node_id:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node_id, soft=False)
        return options

    def started(self, worker_id: str) -> None:
        """The worker's actor runs, or has ended: Ray's own count includes it from now on."""
        self._starting.discard(worker_id)

    async def _wait_for_room(self, worker_id: str, demand: Resources, node_id: str) -> None:
        since = asyncio.get_running_loop().time()
        while True:
            async with self._lock:
                nodes = await ask(cluster_nodes, what="which nodes there are")
                if node_id:
                    nodes = [node for node in nodes if node.node_id == node_id]
                starting = [demand] * len(self._starting - {worker_id})
                room = find_room([demand, *starting], nodes)
                if room is Room.HERE:
                    self._starting.add(worker_id)
                    self._placed.add(worker_id)
                    return
            if room is Room.NEVER and not self._had_room and worker_id not in self._placed:
                wanted = await ask(partial(demands, self._config), what="which resources there are")
                raise PlacementError(explain(wanted, nodes))
            if asyncio.get_running_loop().time() - since > PATIENCE_S:
                left = f"; {LEFT}" if room is Room.NEVER else ""
                self._on_wait(worker_id, explain([demand, *starting], nodes) + left)
            await asyncio.sleep(RETRY_S)

    def held(self, workers: Iterable[WorkerInfo], num_starting: int) -> list[Held]:
        """Resources that this application reserves now. On GPUs asks Ray's GCS."""
        if self._gpus is not None:
            return self._gpus.held()
        demand = worker_resources(self._config)
        return [Held(info.node_id, demand) for info in workers] + [Held("", demand)] * num_starting

    async def release(self) -> None:
        """Give everything back that does not end with its worker. Idempotent."""
        self._starting.clear()
        if self._gpus is not None:
            await self._gpus.release()
