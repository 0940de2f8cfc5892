"""Commands that look at, or end, what runs in a Ray cluster: `pdray status`, `pdray stop`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import ray
from ray import serve as ray_serve

from pdray.errors import PdrayError
from pdray.ray_cluster import join
from pdray.reachable import ClusterEndedError, is_reachable, while_reachable
from pdray.serve_applications import applications

POLL_INTERVAL_S = 0.5
FAILED = ("DEPLOY_FAILED", "UNHEALTHY")
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


def cluster_status() -> list[dict[str, Any]]:
    """One dict for each application of the cluster: name, model, mode, workers, routers.

    `workers` holds each worker's describe(). An application without a Coordinator, as after a failed deployment, has
    only Serve's status.
    """
    from pdray.actors.client import describe, list_applications

    deployed = {name: each for name, each in applications().items() if each.is_pdrays}
    states = [{"name": name} | describe(name) for name in list_applications()]
    for name in sorted(deployed.keys() - {state["name"] for state in states}):
        states.append({"name": name, "state": deployed[name].status, "error": deployed[name].message})
    for state in states:
        found = deployed.get(state["name"])
        if found is not None and found.status in FAILED and not state.get("error"):
            state["error"] = found.message
    return states


def status(address: str | None, *, as_json: bool, leases: bool, check: bool) -> int:
    """Print the state of every application. Returns 1 if `check` finds a worker whose blocks do not add up."""
    from pdray.actors.client import check_integrity

    join(address)
    try:
        states = cluster_status()
        if check:
            for state in states:
                state["integrity"] = check_integrity(state["name"])
    finally:
        ray.shutdown()
    print(json.dumps(states, indent=1, default=str) if as_json else format_status(states, leases=leases))
    return int(any(any(state.get("integrity", {}).values()) for state in states))


def format_status(states: list[dict[str, Any]], *, leases: bool = False) -> str:
    """A heading and a table of workers for each application, then its routers' queues, what a check has found, and its
    leases."""
    if not states:
        return "no pdray application is running"
    parts = []
    for application in states:
        workers = application.get("workers", [])
        lines = [" ".join(str(application[key]) for key in ("name", "model", "mode", "state") if key in application)]
        lines += _table(
            [{title: _cell(worker.get(key)) for title, key in WORKER_COLUMNS.items()} for worker in workers]
        )
        if error := application.get("error"):
            lines.append(f"error: {error}")
        lines += [line for worker in workers for line in _rank_lines(worker)]
        lines += [f"trouble: {row['worker_id']}: {row['trouble']}" for row in workers if row.get("trouble")]
        lines += [line for worker in workers for line in _channel_lines(worker)]
        lines += [_split_line(worker["worker_id"], worker["split"]) for worker in workers if worker.get("split")]
        lines += [_pipeline_line(w["worker_id"], w["decode_pipeline"]) for w in workers if w.get("decode_pipeline")]
        lines += [f"suspicion: {suspicion}" for suspicion in application.get("suspicions", [])]
        lines += [f"loop failed: {name}: {text}" for name, text in application.get("loop_failures", {}).items()]
        if coming := application.get("next"):
            lines.append(f"next configuration: {coming.get('error') or coming['state']}")
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


def _rank_lines(worker: dict[str, Any]) -> list[str]:
    """The processes that share a worker's model, rank 0 first; fields of RankState."""
    return [
        f"rank {rank['rank']} of {worker['worker_id']}: process {rank['pid']}, {rank['num_steps']} steps, "
        f"{rank['memory_bytes'] / 2**30:.2f} GiB"
        for rank in worker.get("ranks", [])
    ]


def _channel_lines(worker: dict[str, Any]) -> list[str]:
    """Which kind of channel each pair has, why not a faster one, and what it has sent."""
    lines = []
    for peer, kind in worker.get("channels", {}).items():
        reasons = worker.get("passed_over", {}).get(peer, {})
        faster = f" (not {'; not '.join(f'{name}: {why}' for name, why in reasons.items())})" if reasons else ""
        sent = worker.get("sent", {}).get(peer)
        so_far = f", {sent['num_bytes'] / 1e6:.1f} MB in {sent['num_puts']} puts" if sent else ""
        lines.append(f"channel {worker['worker_id']} to {peer}: {kind}{faster}{so_far}")
    return lines


def _split_line(worker_id: str, split: dict[str, Any]) -> str:
    """How prompts and decodes share a worker's GPU."""
    decode_sms, num_sms = split["decode_sms"], split["num_sms"]
    if decode_sms is None:
        how = f"in one step of {split['chunk']} tokens at most"
    elif decode_sms == 0:
        how = "on two streams"
    else:
        how = f"decodes on {decode_sms} SMs, prompts on {num_sms - decode_sms}"
    reason = f" (no partitions: {split['unavailable']})" if split["unavailable"] else ""
    return f"split of {worker_id}: {how}{reason}; {split['num_changes']} changes, {split['num_pieces']} pieces"


def _pipeline_line(worker_id: str, pipeline: dict[str, Any]) -> str:
    """How a worker computes its decode steps; fields of PipelineState."""
    ways = "; ".join(f"{name}, with {_ranges(sizes)} sequences" for name, sizes in pipeline["ways"].items())
    if pipeline["unavailable"]:
        how = f"plain steps ({pipeline['unavailable']})"
    elif pipeline["is_preparing"]:
        how = "plain steps until it is measured"
    elif pipeline["mode"] == "auto":
        how = f"{ways or 'plain steps'}, faster in {pipeline['num_won']} of {pipeline['num_measured']} cases measured"
    else:
        how = ways
    return f"decode pipeline of {worker_id}: {how}; {pipeline['num_steps']} pipelined steps"


def _ranges(sizes: list[int]) -> str:
    """Batch sizes in order, neighbours on the ladder of graphs together; see decode_sizes()."""
    runs: list[list[int]] = []
    for size in sizes:
        if runs and size - runs[-1][-1] <= (8 if size <= 256 else 32):
            runs[-1].append(size)
        else:
            runs.append([size])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


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
        PdrayError: no such application, it is not pdray's, or it is still there after timeout_s.
    """
    join(address)
    cluster = str(ray.get_runtime_context().gcs_address)
    try:
        stopped = while_reachable(
            cluster if is_reachable(cluster) else None, lambda: stop_applications(name, timeout_s)
        )
    except ClusterEndedError as error:
        print(f"stopped {name or 'all'}: {error}", flush=True)
        os._exit(0)  # ray.shutdown() would hang
    finally:
        ray.shutdown()
    print(f"stopped {', '.join(stopped)}" if stopped else "no pdray application is running")
    return 0


def pdrays_applications() -> list[str]:
    """Names of the applications of pdray's that Serve or a Coordinator knows; other people's are left out."""
    from pdray.actors.client import list_applications

    deployed = applications()
    others = {name for name, each in deployed.items() if not each.is_pdrays}
    return sorted({*list_applications(), *deployed} - others)


def stop_applications(name: str | None, timeout_s: float) -> list[str]:
    """Delete pdray's applications from Serve, stop their Coordinators, and wait until they are gone.

    Args:
        name: only this one.
        timeout_s: beyond the time for which the applications' requests may go on.

    Raises:
        PdrayError: there is none of that name, it is not pdray's, or it is still there after timeout_s.
    """
    from pdray.actors.client import list_applications, stop_application

    deployed = applications()
    ours = pdrays_applications()
    if name is not None and name not in ours:
        problem = "is not pdray's" if name in deployed else "does not exist"
        raise PdrayError(f"application {name!r} {problem}; pdray's are: {', '.join(ours) or 'none'}")
    names = ours if name is None else [name]
    limit_s = timeout_s + max((deployed[each].grace_s for each in names if each in deployed), default=0.0)
    deadline = time.monotonic() + limit_s
    for application in names:
        if application in deployed:
            ray_serve.delete(application, _blocking=False)
    in_serve = _wait_until_gone(names, applications, deadline)  # requests that run end there, with their workers
    for application in set(names) & set(list_applications()):
        stop_application(application)
    if remaining := in_serve | _wait_until_gone(names, list_applications, deadline):
        raise PdrayError(f"{', '.join(sorted(remaining))}: still there after {limit_s:g} s; see Ray's dashboard")
    return names


def _wait_until_gone(names: list[str], present: Callable[[], Iterable[str]], deadline: float) -> set[str]:
    """Names that are still present at the deadline."""
    while (remaining := set(names) & set(present())) and time.monotonic() < deadline:
        time.sleep(POLL_INTERVAL_S)
    return remaining


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
