"""Placement of worker actors: nodes, Ray options, addresses."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from typing import Any, NamedTuple

import ray
from ray._private.state import available_resources_per_node

from pdray.config import Config
from pdray.control.room import NodeRoom

NAMESPACE = "pdray"
OUTSIDE_PLACEMENT_GROUPS = "DEFAULT"  # Ray's name for it
LOOPBACK = "127.0.0.1"


def cluster_nodes() -> list[NodeRoom]:
    """The live nodes of Ray's cluster. Asks Ray's GCS: not for an event loop's thread."""
    free = available_resources_per_node()
    return [
        NodeRoom(node["NodeID"], node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]


def uses_cuda(config: Config) -> bool:
    """Whether workers run on GPUs: as configured, or because the cluster has some."""
    if config.device == "auto":
        return ray.cluster_resources().get("GPU", 0) > 0
    return config.device == "cuda"


def worker_options(config: Config, app_name: str, worker_id: str, *, detached: bool) -> dict[str, Any]:
    """Options of one worker's actor, but for its GPU: readable name, fractional CPUs, its own number of threads.

    The name carries the configuration's fingerprint: workers of two configurations may run side by side.
    Ray gives a process with num_cpus < 2 a single OpenMP thread, hence OMP_NUM_THREADS where it is to have more.
    Without an environment of its own an actor gets a process that Ray has ready, which saves a start.
    The scheduling strategy is named because the default is the creator's placement group, where that captures child
    tasks: its bundles have no room for a worker, which would stay pending.
    """
    options: dict[str, Any] = {
        "name": f"{app_name}:{config.fingerprint()}:{worker_id}",
        "namespace": NAMESPACE,
        "num_cpus": config.worker_num_cpus,
        "max_restarts": 0,
        "scheduling_strategy": OUTSIDE_PLACEMENT_GROUPS,
    }
    others = dict(config.worker_resources)
    if memory := others.pop("memory", 0):
        options["memory"] = memory
    if others:
        options["resources"] = others
    has_one_thread = config.num_threads == 1 and config.worker_num_cpus < 2
    environment = {} if has_one_thread or uses_cuda(config) else {"OMP_NUM_THREADS": str(config.num_threads)}
    environment |= {name: value.replace("{worker_id}", worker_id) for name, value in config.worker_env.items()}
    if environment:
        options["runtime_env"] = {"env_vars": environment}
    if detached:
        options["lifetime"] = "detached"
    return options


def worker_resources(config: Config) -> dict[str, float]:
    """Resources that each worker reserves besides a GPU, in Ray's names; may be empty."""
    resources = {"CPU": config.worker_num_cpus} | dict(config.worker_resources)
    return {name: amount for name, amount in resources.items() if amount > 0}


class ListenAddress(NamedTuple):
    """Attributes:
    bind: where a worker listens. dial: what its peers connect to.
    """

    bind: str
    dial: str


def listen_address(config: Config) -> ListenAddress:
    """The configured address, else the node's, by which nodes that join the cluster later reach it too.

    Without Ray it is loopback. An address that stands for all of them (0.0.0.0) is none to dial: peers get the node's.
    """
    node = str(ray.util.get_node_ip_address()) if ray.is_initialized() else LOOPBACK
    if not config.host:
        return ListenAddress(node, node)
    return ListenAddress(config.host, node if is_wildcard(config.host) else config.host)


def is_wildcard(host: str) -> bool:
    """Whether it stands for all addresses of a machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False  # a name


class OneNode:
    """Admits connections only from this machine while Ray's cluster is this one node.

    Args:
        config: if `host` is set, any machine may connect.
        address: where the worker listens.
    """

    def __init__(self, config: Config, address: ListenAddress) -> None:
        self._own = {address.bind, address.dial}
        self._open = bool(config.host)

    async def admits(self, peer: str) -> bool:
        """See SessionServer."""
        if self._open or peer in self._own or ipaddress.ip_address(peer).is_loopback:
            return True
        self._open = await asyncio.to_thread(_num_nodes) > 1
        return self._open


def _num_nodes() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def origin(config: Config, secret: bytes) -> str:
    """A digest of configuration and secret, by which two processes see that they share both. Reveals neither."""
    return hmac.new(secret, config.fingerprint().encode(), "sha256").hexdigest()
