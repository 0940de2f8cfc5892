"""A Ray cluster for one driver, in a second: what ray.init() starts besides is for clusters that others look at.

Nearly all of ray.init()'s five seconds are waits, one after the other, for processes that start in a second each:

- the API server, which without a dashboard only reports that Ray is used, and is not started here;
- the node's two agents: a node registers once both have written their ports into files. Here the ports are chosen
  before, and the node waits for an agent only where it needs one (a runtime environment). What counters count in the
  second or two before that is not exported;
- the node: the driver looks once a second whether it has registered;
- one idle process for each CPU, here a few: the Coordinator and workers take them, others start when they are needed.

No autoscaler and no log monitor are started either: the cluster never grows, and its logs stay in their files.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import random
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray._private.node
import ray._private.parameter
import ray._private.services
import ray._raylet
from ray._private.ray_constants import DASHBOARD_ADDRESS, KV_NAMESPACE_DASHBOARD, PROCESS_TYPE_RAYLET

logger = logging.getLogger(__name__)

AGENT_PORTS = {  # parameters of a node, and Ray's constants for the files in which a raylet reads them
    "metrics_agent_port": "METRICS_AGENT_PORT_NAME",
    "runtime_env_agent_port": "RUNTIME_ENV_AGENT_PORT_NAME",
    "dashboard_agent_listen_port": "DASHBOARD_AGENT_LISTEN_PORT_NAME",
    "metrics_export_port": "METRICS_EXPORT_PORT_NAME",
}
PRESTART_FLAG, NODE_FLAG, SESSION_FLAG = "--num_prestart_python_workers=", "--node_id=", "--session_dir="
NUM_PRESTARTED = 3  # a Coordinator and the workers of most drivers; fewer where they would start on the same CPUs
NO_ADDRESS = "127.0.0.1:0"  # nobody listens there
FIRST_PORT = 20_000  # below, `ray start` has ports of its own
PORT_RANGE_FILE = Path("/proc/sys/net/ipv4/ip_local_port_range")
POLL_S = 0.02
REGISTER_TIMEOUT_S = 10.0  # then Ray waits in its own way, and tells what is wrong

_raylet: Any = ray._raylet


@contextlib.contextmanager
def quick_start() -> Iterator[None]:
    """While it is open, ray.init() starts a cluster as the module says.

    Not for two threads at once. With a Ray whose inner parts are not the ones it knows, nothing is changed.
    """
    if (missing := _unknown_parts()) is not None:
        logger.info("Ray %s starts in its own time: it has no %s", ray.__version__, missing)
        yield
        return
    node, params, services = ray._private.node.Node, ray._private.parameter, ray._private.services
    ports = dict(zip(AGENT_PORTS, free_ports(len(AGENT_PORTS)) or (), strict=False))
    with (
        _replaced(params, "RayParams", partial(_make_params, params.RayParams, ports)),
        _replaced(node, "start_api_server", _start_no_api_server),
        _replaced(services, "start_ray_process", partial(_start_process, services.start_ray_process, ports)),
        _replaced(services, "get_node", partial(_get_node, services.get_node)),
    ):
        yield


def _make_params(make: Callable[..., Any], ports: dict[str, int], **given: Any) -> Any:
    """Ray's parameters of a node. Ports that the caller names stay; ``ports`` has those that it gets."""
    ports |= {name: given[name] for name in ports if given.get(name)}
    return make(**given | ports | {"no_monitor": True, "include_log_monitor": False})


def _start_process(
    start: Callable[..., Any], ports: dict[str, int], command: list[str], process_type: str, *rest: Any, **others: Any
) -> Any:
    """Ray's start_ray_process(); a raylet gets the agents' ports before they have started, and fewer idle processes."""
    if process_type == PROCESS_TYPE_RAYLET:
        session, node_id = (
            next(part.removeprefix(flag) for part in command if part.startswith(flag))
            for flag in (SESSION_FLAG, NODE_FLAG)
        )
        for name, port in ports.items():
            _raylet.persist_port(session, node_id, getattr(_raylet, AGENT_PORTS[name]), port)
        command = [_fewer(part) for part in command]
    return start(command, process_type, *rest, **others)


def _fewer(part: str) -> str:
    if not part.startswith(PRESTART_FLAG):
        return part
    num_cpus = int(part.removeprefix(PRESTART_FLAG))
    return f"{PRESTART_FLAG}{max(1, min(NUM_PRESTARTED, num_cpus // 2))}"


@contextlib.contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _start_no_api_server(node: Any, **_: Any) -> None:
    """Leave what Ray's own leaves where there is no dashboard: an agent that finds no address complains each second."""
    node._webui_url = ""
    node.get_gcs_client().internal_kv_put(DASHBOARD_ADDRESS.encode(), NO_ADDRESS.encode(), True, KV_NAMESPACE_DASHBOARD)


def _get_node(get_node: Callable[[str, str], Any], gcs_address: str, node_id: str) -> Any:
    """Ray's get_node(), once the node has registered."""
    client, deadline = _raylet.GcsClient(address=gcs_address), time.monotonic() + REGISTER_TIMEOUT_S
    while time.monotonic() < deadline and all(id.hex() != node_id for id in client.get_all_node_info()):
        time.sleep(POLL_S)
    return get_node(gcs_address, node_id)


def _unknown_parts() -> str | None:
    """What this Ray has not, of all that is used here."""
    known = inspect.signature(ray._private.parameter.RayParams).parameters
    missing = [f"RayParams.{name}" for name in (*AGENT_PORTS, "no_monitor", "include_log_monitor") if name not in known]
    for owner, names in (
        (ray._private.node.Node, ("start_api_server",)),
        (ray._private.services, ("get_node", "start_ray_process")),
        (_raylet, ("GcsClient", "persist_port", *AGENT_PORTS.values())),
    ):
        missing += [f"{owner.__name__}.{name}" for name in names if not hasattr(owner, name)]
    return ", ".join(missing) or None


def free_ports(number: int) -> list[int] | None:
    """Ports at which nothing listens, and that no process gets which asks the system for any port.

    None if the system does not tell which it gives away, or too few others are free.
    """
    try:
        low = int(PORT_RANGE_FILE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    found: list[int] = []
    candidates = range(FIRST_PORT, low)
    for port in random.sample(candidates, min(len(candidates), 10 * number)):
        if len(found) < number and _is_free(port):
            found.append(port)
    return found if len(found) == number else None


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
