"""Reserves the GPUs of one application: placement groups with one bundle for each physical GPU, or for each worker of
several.

Workers that share a GPU share a bundle: two bundles of half a GPU might lie on two. Ray does not let a caller choose a
GPU; where the configuration names some, groups of one GPU are taken until they are those, and the others are given
back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pdray.actors.placement import cluster_nodes, worker_resources
from pdray.actors.questions import ask
from pdray.config import Config
from pdray.control.gpu_plan import plan_gpus
from pdray.control.room import SETTINGS, Held, explain
from pdray.errors import PdrayError, PlacementError

POLL_S = 0.05
FREE_GPU_TIMEOUT_S = 5.0  # a GPU that is free is reserved in milliseconds
REMOVE_TIMEOUT_S = 30.0
PROBE_SHARE = 0.001  # of a named GPU that no worker gets, so that it can be asked at any time which one it is


class GpuGroups:
    """The placement groups of one application. Runs on the Coordinator's event loop.

    They carry the application's name and its configuration's fingerprint: a Coordinator that Ray has started again
    finds them.
    """

    def __init__(self, config: Config, app_name: str, *, detached: bool) -> None:
        self._config = config
        self._name = f"pdray:{app_name}:{config.fingerprint()}:"
        self._lifetime = "detached" if detached else None
        self._bundles = plan_gpus(config)
        self._groups: dict[int, tuple[PlacementGroup, int]] = {}  # group and index in it, by number in _bundles
        self._lock = asyncio.Lock()

    async def reserve(self, on_wait: Callable[[str], None] = lambda reason: None) -> None:
        """Returns once every bundle is reserved; finds what is there. Waits for GPUs that are in use.

        Args:
            on_wait: called with what it waits for, while it does.

        Raises:
            PlacementError: the cluster has too few GPUs. PdrayError: not the ones that the configuration names.
        """
        async with self._lock:
            alive = {group.id for group in (await self._ask_groups()).values()}
            self._groups = {number: place for number, place in self._groups.items() if place[0].id in alive}
            if len(self._groups) == len(self._bundles):
                return
            resources = await ask(ray.cluster_resources, what="which resources there are")
            total, needed = resources.get("GPU", 0.0), sum(bundle.num_gpus for bundle in self._bundles)
            if total < needed:
                raise PlacementError(
                    f"the workers need {needed:g} GPUs and Ray's cluster has {total:g}; lower {SETTINGS['GPU']}"
                )
            named = [number for number, bundle in enumerate(self._bundles) if bundle.device_id is not None]
            if named:
                await self._reserve_named(named)
            if len(named) < len(self._bundles):
                await self._reserve_any(range(len(named), len(self._bundles)), on_wait)

    def options(self, worker_id: str) -> dict[str, Any]:
        """Ray options that put a worker into its bundle, once it is reserved."""
        number, bundle = next((n, b) for n, b in enumerate(self._bundles) if worker_id in b.shares)
        group, index = self._groups[number]
        share = bundle.shares[worker_id] - (PROBE_SHARE if bundle.device_id is not None else 0.0)
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        return {"num_gpus": round(share, 4), "scheduling_strategy": strategy}

    async def release(self) -> None:
        """Give everything back, also what a former Coordinator has reserved. Idempotent."""
        self._groups = {}
        groups = await self._ask_groups()
        for group in groups.values():
            await ask(partial(remove_placement_group, group), what="to remove a placement group")
        deadline = time.monotonic() + REMOVE_TIMEOUT_S
        while await self._ask_groups() and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)

    async def _reserve_any(self, numbers: range, on_wait: Callable[[str], None]) -> None:
        """One group for all that may lie on any GPU: it gets all of them or none."""
        bundles = [self._bundles[number] for number in numbers]
        wanted = [{"GPU": b.num_gpus} | self._beside(len(b.shares)) for b in bundles]
        group = await ask(partial(self._group, "any", wanted), what="for a placement group")
        while not await asyncio.to_thread(group.wait, 1):
            on_wait(await asyncio.to_thread(_why_waiting, wanted))
        self._groups |= {number: (group, index) for index, number in enumerate(numbers)}

    async def _reserve_named(self, numbers: list[int]) -> None:
        wanted = {self._bundles[number].device_id: number for number in numbers}
        node, total = await ask(self._only_gpu_node, what="which nodes there are")
        num_workers = max(len(self._bundles[number].shares) for number in numbers)
        bundle = {"GPU": 1.0, f"node:{node}": 0.001} | self._beside(num_workers)
        seen: dict[int | str, PlacementGroup] = {}
        for attempt in range(total):
            group = await ask(partial(self._group, f"gpu{attempt}", [bundle]), what="for a placement group")
            if not await asyncio.to_thread(group.wait, FREE_GPU_TIMEOUT_S):
                break  # no other is free
            seen[await _which_gpu(group)] = group
            if wanted.keys() <= seen.keys():
                break
        missing = sorted(wanted.keys() - seen.keys())  # type: ignore[type-var]
        kept = {} if missing else {device_id: seen[device_id] for device_id in wanted if device_id is not None}
        for name, group in (await self._ask_groups()).items():
            if name.startswith(f"{self._name}gpu") and group.id not in {each.id for each in kept.values()}:
                await ask(partial(remove_placement_group, group), what="to remove a placement group")
        if missing:
            raise PdrayError(
                f"prefill_device_id and decode_device_id name GPUs {missing}, which Ray does not give: of its {total} "
                f"the free ones are {sorted(map(str, seen))}; see `ray status` and the CUDA_VISIBLE_DEVICES that Ray "
                "was started with, or leave the choice to Ray"
            )
        self._groups |= {wanted[device_id]: (group, 0) for device_id, group in kept.items()}

    def held(self) -> list[Held]:
        """Resources that this application's groups reserve. Asks Ray's GCS."""
        return [
            Held(row["bundles_to_node_id"].get(number) or "", bundle)
            for row in placement_group_table().values()
            if row["name"].startswith(self._name) and row["state"] not in ("REMOVED", "PENDING")
            for number, bundle in row["bundles"].items()
        ]

    def _beside(self, num_workers: int) -> dict[str, float]:
        """Resources that so many workers reserve besides their GPU."""
        return {name: amount * num_workers for name, amount in worker_resources(self._config).items()}

    def _group(self, kind: str, bundles: list[dict[str, float]]) -> PlacementGroup:
        """The group of that name; a new one if there is none."""
        found = self._find().get(self._name + kind)
        if found is not None:
            return found
        bundles = [{name: amount for name, amount in bundle.items() if amount > 0} for bundle in bundles]
        return placement_group(bundles, strategy="PACK", name=self._name + kind, lifetime=self._lifetime)

    def _only_gpu_node(self) -> tuple[str, int]:
        """Address and number of GPUs of the node that has any.

        Raises:
            PdrayError: several have.
        """
        nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("GPU", 0) > 0]
        if len(nodes) > 1:
            raise PdrayError(
                f"prefill_device_id and decode_device_id name GPUs of one host, and Ray has some on {len(nodes)}; "
                "leave them unset"
            )
        return nodes[0]["NodeManagerAddress"], int(nodes[0]["Resources"]["GPU"])

    async def _ask_groups(self) -> dict[str, PlacementGroup]:
        return await ask(self._find, what="which placement groups there are")

    def _find(self) -> dict[str, PlacementGroup]:
        """The groups of this application that were not removed, by name."""
        return {
            row["name"]: PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id)))
            for group_id, row in placement_group_table().items()
            if row["name"].startswith(self._name) and row["state"] != "REMOVED"
        }


def _why_waiting(bundles: list[dict[str, float]]) -> str:
    return explain(bundles, cluster_nodes())


async def _which_gpu(group: PlacementGroup) -> int | str:
    """The GPU of a group's only bundle, by the number or name that Ray knows it by."""
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
    ask = ray.remote(ray.get_gpu_ids).options(num_cpus=0, num_gpus=PROBE_SHARE, scheduling_strategy=strategy)
    (gpu,) = await ask.remote()
    return int(gpu) if str(gpu).isdigit() else str(gpu)
