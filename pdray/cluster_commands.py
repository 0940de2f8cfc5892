"""Commands that act on a Ray cluster: `pdray serve`, `pdray status`, `pdray stop`."""

from __future__ import annotations

import json
import signal
import sys
import time
from typing import Any

import ray
from ray import serve as ray_serve

from pdray.config import Config
from pdray.errors import PdrayError
from pdray.interrupts import interrupts_ignored
from pdray.ray_cluster import join, join_or_start

POLL_INTERVAL_S = 0.5
STOP_TIMEOUT_S = 60.0
WORKER_COLUMNS = {
    "worker": "worker_id",
    "role": "role",
    "device": "device",
    "state": "state",
    "running": "running",
    "waiting": "waiting",
    "queued tokens": "queued_tokens",
    "free blocks": "free_blocks",
    "blocks": "num_blocks",
    "leases": "leases",
    "preempted": "preemptions",
    "pid": "pid",
}
LEASE_COLUMNS = {
    "request": "request_id",
    "attempt": "attempt",
    "state": "state",
    "router": "router_id",
    "filled by": "prefill_worker_id",
    "blocks": "num_blocks",
}


def serve(config: Config, *, name: str, host: str, port: int, address: str | None) -> int:
    """Deploy the application, wait until it answers, and keep it until Ctrl-C, SIGTERM or its deletion by another.

    What was started here ends here: the application, and Ray if it was not running before.

    Raises:
        PdrayError: the deployment failed, or was not ready within start_timeout_s.
    """
    from pdray.cli import wait_until_ready
    from pdray.serve import build

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    try:
        join_or_start(address, shared=True)
        print(f"Loading {config.model} ...", flush=True)
        ray_serve.start(http_options={"host": host, "port": port})
        try:
            ray_serve.run(build(config), name=name, route_prefix="/")
        except RuntimeError as error:
            raise PdrayError(f"application {name!r} could not be deployed: {error}") from error
        wait_until_ready(url, config.start_timeout_s)
        print(f"{config.model_name} is served at {url}/v1; Ctrl-C stops it", flush=True)
        while name in ray_serve.status().applications:
            time.sleep(POLL_INTERVAL_S)
        print(f"application {name!r} was deleted", flush=True)
    except KeyboardInterrupt:
        print("Stopping ...", file=sys.stderr, flush=True)
    finally:
        with interrupts_ignored():
            try:
                if ray.is_initialized():
                    stop_applications(name, STOP_TIMEOUT_S)
            finally:
                ray.shutdown()
    return 0


def cluster_status() -> list[dict[str, Any]]:
    """One dict for each application of the cluster: name, model, mode, workers, routers.

    `workers` holds what each worker's describe() says.
    """
    from pdray.actors.client import describe, list_applications

    return [{"name": name} | describe(name) for name in list_applications()]


def status(address: str | None, *, as_json: bool, leases: bool, check: bool) -> int:
    """Print the state of every application. Returns 1 if `check` finds a worker whose blocks do not add up."""
    from pdray.actors.client import check_integrity

    join(address)
    try:
        applications = cluster_status()
        if check:
            for application in applications:
                application["integrity"] = check_integrity(application["name"])
    finally:
        ray.shutdown()
    print(json.dumps(applications, indent=1, default=str) if as_json else format_status(applications, leases=leases))
    return int(any(any(application.get("integrity", {}).values()) for application in applications))


def format_status(applications: list[dict[str, Any]], *, leases: bool = False) -> str:
    """A heading and a table of workers for each application, then its routers' queues, what a check has found, and its
    leases."""
    if not applications:
        return "no pdray application is running"
    parts = []
    for application in applications:
        workers = application.get("workers", [])
        lines = [" ".join(str(application[key]) for key in ("name", "model", "mode", "state") if key in application)]
        lines += _table(
            [{title: _cell(worker.get(key)) for title, key in WORKER_COLUMNS.items()} for worker in workers]
        )
        if error := application.get("error"):
            lines.append(f"error: {error}")
        lines += [f"trouble: {row['worker_id']}: {row['trouble']}" for row in workers if row.get("trouble")]
        lines += [f"suspicion: {suspicion}" for suspicion in application.get("suspicions", [])]
        lines += [f"loop failed: {name}: {text}" for name, text in application.get("loop_failures", {}).items()]
        for router in application.get("routers", []):
            facts = ", ".join(
                f"{key.replace('_', ' ')} {_cell(value)}" for key, value in router.items() if key != "router_id"
            )
            lines.append(f"router {router.get('router_id', '?')}: {facts}")
        for worker_id, problems in application.get("integrity", {}).items():
            lines += [f"integrity {worker_id}: {problem}" for problem in problems or ["ok"]]
        if leases:
            lines += _lease_lines(workers)
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _lease_lines(workers: list[dict[str, Any]]) -> list[str]:
    rows = [
        {title: _cell(lease[key]) for title, key in LEASE_COLUMNS.items()}
        | {"on": worker["worker_id"], "expires in": f"{lease['expires_in_s']:.1f} s"}
        for worker in workers
        for lease in worker.get("leases", [])
    ]
    return ["leases:", *_table(rows)] if rows else ["no leases"]


def stop(address: str | None, *, name: str | None, timeout_s: float) -> int:
    """Delete applications and wait for their workers to end.

    Raises:
        PdrayError: no such application, or one that is still there after timeout_s.
    """
    join(address)
    try:
        stopped = stop_applications(name, timeout_s)
    finally:
        ray.shutdown()
    print(f"stopped {', '.join(stopped)}" if stopped else "no pdray application is running")
    return 0


def stop_applications(name: str | None, timeout_s: float) -> list[str]:
    """Delete the Serve application of each coordinator, stop the coordinator, and wait until it is gone."""
    from pdray.actors.client import list_applications, stop_application

    names = [name] if name is not None else list_applications()
    deployed = ray_serve.status().applications
    for application in names:
        if application in deployed:
            ray_serve.delete(application)
        if application in list_applications():
            stop_application(application)
    deadline = time.monotonic() + timeout_s
    while remaining := set(names) & set(list_applications()):
        if time.monotonic() > deadline:
            raise PdrayError(f"{', '.join(sorted(remaining))}: still there after {timeout_s:g} s; see Ray's dashboard")
        time.sleep(POLL_INTERVAL_S)
    return names


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return str(len(value)) if isinstance(value, list | dict) else str(value)


def _table(rows: list[dict[str, str]]) -> list[str]:
    """Rows under their titles, numbers to the right; columns that hold nothing are left out."""
    titles = [title for title in (rows[0] if rows else ()) if any(row[title] != "-" for row in rows)]
    widths = {title: max(len(title), *(len(row[title]) for row in rows)) for title in titles}

    def line(row: dict[str, str]) -> str:
        cells = [
            row[title].rjust(widths[title]) if row[title].isdigit() else row[title].ljust(widths[title])
            for title in titles
        ]
        return "  " + "  ".join(cells).rstrip()

    return [line({title: title for title in titles}), *(line(row) for row in rows)] if titles else ["  no workers"]
