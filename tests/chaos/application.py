"""One Serve application of real processes, in a Ray cluster that this process starts and ends."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import serve

from pdray.actors.client import check_integrity, describe
from pdray.cli import wait_until_ready
from pdray.config import Config
from pdray.interrupts import interrupts_ignored
from pdray.ray_cluster import start_local
from pdray.serve import build

NAME = "chaos"
REPLICA_TITLE = f"ray::ServeReplica:{NAME}:router"
POLL_S = 0.1
EXIT_TIMEOUT_S = 30.0
METRICS_INTERVAL_MS = 1000


@dataclass(slots=True)
class Application:
    """What the cases need of a running application.

    Attributes:
        load_s: how long the start of all of it took: an upper bound of a model's load.
        left: processes of the cluster that outlived its end, as "pid name"; filled when it has ended.
    """

    config: Config
    url: str
    log_folder: Path
    load_s: float = 0.0
    left: list[str] = field(default_factory=list)

    async def workers(self) -> dict[str, dict[str, Any]]:
        """What every worker says of itself, by worker id."""
        state = await asyncio.to_thread(describe, NAME)
        return {row["worker_id"]: row for row in state["workers"]}

    async def pids(self) -> dict[str, int]:
        """Process ids of the Coordinator, of the workers that are up, and of the router replica."""
        state = await asyncio.to_thread(describe, NAME)
        pids = {row["worker_id"]: row["pid"] for row in state["workers"] if "pid" in row}
        replica = next((process.pid for process in processes() if has_title(process, REPLICA_TITLE)), None)
        return {"coordinator": state["pid"]} | pids | ({} if replica is None else {"replica": replica})

    async def kill(self, name: str, signal_number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to one of pids(). Returns the pid."""
        pid = (await self.pids())[name]
        os.kill(pid, signal_number)
        return pid

    async def healthy(self) -> bool:
        """Whether a request could be served now."""
        try:
            await asyncio.to_thread(wait_until_ready, self.url, 0.1)
        except Exception:  # whatever it is, it is no answer of 200
            return False
        return True

    async def whole(self, without: set[int]) -> bool:
        """Whether every process is there, none of them one of `without`, all is connected, and /health says so."""
        state = await asyncio.to_thread(describe, NAME)
        pids = await self.pids()
        num_workers = len(state["workers"])
        return (
            state["state"] == "serving"
            and len(pids) == num_workers + 2
            and without.isdisjoint(pids.values())
            and await self.healthy()
        )

    async def problems_at_rest(self, timeout_s: float = 30.0) -> list[str]:
        """What is in use after the last request has ended, or does not add up; empty as soon as nothing is."""
        deadline = time.monotonic() + timeout_s
        while in_use := _in_use(await self.workers()):
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(POLL_S)
        integrity = await asyncio.to_thread(check_integrity, NAME)
        return in_use + [f"{worker}: {problem}" for worker, found in integrity.items() for problem in found]


def _in_use(workers: dict[str, dict[str, Any]]) -> list[str]:
    found = []
    for worker_id, row in workers.items():
        if "pid" not in row:
            found.append(f"{worker_id} is {row['state']}")
            continue
        if row["free_blocks"] != row["num_blocks"] - 1:
            found.append(f"{worker_id}: {row['num_blocks'] - 1 - row['free_blocks']} blocks in use")
        if row["running"] or row["waiting"]:
            found.append(f"{worker_id}: {row['running']} sequences running, {row['waiting']} waiting")
        if leases := row.get("leases"):
            found.append(f"{worker_id}: {len(leases)} leases")
    return found


async def seconds_until(condition: Callable[[], Awaitable[bool]], since: float, timeout_s: float) -> float:
    """From `since`, a time of time.monotonic(), until the condition holds.

    Raises:
        TimeoutError: it does not within timeout_s from now.
    """
    deadline = time.monotonic() + timeout_s
    while not await condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{getattr(condition, '__name__', 'a condition')} did not hold within {timeout_s:g} s")
        await asyncio.sleep(POLL_S)
    return time.monotonic() - since


def replaced(before: dict[str, int], after: dict[str, int], sick: Collection[str] = ()) -> list[str]:
    """Who was replaced between two looks at pids() though it was not sick."""
    return [f"{name} was replaced" for name, pid in before.items() if name not in sick and after.get(name) != pid]


def processes() -> list[psutil.Process]:
    """All processes of the cluster that this process has started."""
    return psutil.Process().children(recursive=True)


def has_title(process: psutil.Process, title: str) -> bool:
    """Whether Ray calls it so; what has ended has no title."""
    try:
        return any(part.startswith(title) for part in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def application(config: Config) -> Iterator[Application]:
    """Start a cluster and the application, and end both; what then still runs is killed and told in `left`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    port = free_port()
    num_workers = config.num_decode_workers + (config.num_prefill_workers if config.mode == "disaggregated" else 0)
    resources = {name: amount * num_workers for name, amount in config.worker_resources.items()}
    start_local(
        include_dashboard=False, resources=resources, _system_config={"metrics_report_interval_ms": METRICS_INTERVAL_MS}
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # after ray.init(), which sets its own
    session_folder = Path(ray.nodes()[0]["RayletSocketName"]).parent.parent
    app = Application(config, f"http://127.0.0.1:{port}", session_folder / "logs")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        began = time.monotonic()
        serve.run(build(config), name=NAME, route_prefix="/")
        wait_until_ready(app.url, config.start_timeout_s)
        app.load_s = time.monotonic() - began
        yield app
    finally:
        started = processes()
        with interrupts_ignored():
            try:
                serve.delete(NAME)
            finally:
                ray.shutdown()
                _, alive = psutil.wait_procs(started, timeout=EXIT_TIMEOUT_S)
                app.left = [f"{process.pid} {process.name()}" for process in alive]
                for process in alive:
                    process.kill()
