"""Where worker actors go, and how to be sure that one of their processes is gone."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import signal
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pdray.config import Config

NAMESPACE = "pdray"
OUTSIDE_PLACEMENT_GROUPS = "DEFAULT"  # Ray's name for it
DEATH_POLL_S = 0.01
RAY_KILL_GRACE_S = 1.0


def uses_cuda(config: Config) -> bool:
    """Whether workers run on GPUs: as configured, or because the cluster has some."""
    if config.device == "auto":
        return ray.cluster_resources().get("GPU", 0) > 0
    return config.device == "cuda"


def worker_options(config: Config, app_name: str, worker_id: str, *, detached: bool) -> dict[str, Any]:
    """Options of one worker's actor, but for its GPU: readable name, fractional CPUs, its own number of threads.

    Ray gives a process with num_cpus < 1 a single OpenMP thread, hence OMP_NUM_THREADS. Without an environment of its
    own an actor gets a process that Ray has ready: on a GPU, where threads do not matter, that saves a start.
    The scheduling strategy is named because the default is the creator's placement group, where that captures child
    tasks: its bundles have no room for a worker, which would be pending for ever.
    """
    options: dict[str, Any] = {
        "name": f"{app_name}:{worker_id}",
        "namespace": NAMESPACE,
        "num_cpus": config.worker_num_cpus,
        "max_restarts": 0,
        "scheduling_strategy": OUTSIDE_PLACEMENT_GROUPS,
    }
    environment = {} if uses_cuda(config) else {"OMP_NUM_THREADS": str(config.num_threads)}
    environment |= {name: value.replace("{worker_id}", worker_id) for name, value in config.worker_env.items()}
    if environment:
        options["runtime_env"] = {"env_vars": environment}
    if detached:
        options["lifetime"] = "detached"
    return options


def listen_address(config: Config) -> str:
    """Where a worker listens: as configured; loopback while the cluster is one node; else the node's address."""
    if config.host:
        return config.host
    if not ray.is_initialized() or sum(node["Alive"] for node in ray.nodes()) == 1:
        return "127.0.0.1"
    return str(ray.util.get_node_ip_address())


def origin(config: Config, secret: bytes) -> str:
    """The same in two processes only if they share configuration and secret, neither of which it gives away."""
    return hmac.new(secret, config.fingerprint().encode(), "sha256").hexdigest()


async def make_dead(pid: int, node_id: str) -> None:
    """Return once a worker's process, which Ray was told to kill, is gone; one that lingers is sent SIGKILL.

    A node that is gone took its processes along.
    """
    if node_id == ray.get_runtime_context().get_node_id():
        await asyncio.to_thread(_kill_and_wait, pid)
        return
    if not any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes()):
        return
    on_its_node = NodeAffinitySchedulingStrategy(node_id, soft=False)
    await ray.remote(_kill_and_wait).options(num_cpus=0, scheduling_strategy=on_its_node).remote(pid)


def _kill_and_wait(pid: int) -> None:
    """Blocks until the process has ended. A pid that is no Ray worker's belongs to somebody else by now."""
    try:
        process = psutil.Process(pid)
        if not any(part.startswith("ray::") for part in process.cmdline()):
            return
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(timeout=RAY_KILL_GRACE_S)
            return
        os.kill(pid, signal.SIGKILL)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            with contextlib.suppress(psutil.TimeoutExpired):
                process.wait(timeout=DEATH_POLL_S)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return
