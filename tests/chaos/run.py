"""Real processes and the default model through failures: prints one table, exits 1 if something did not hold.

Starts Ray clusters of its own on free ports, one for each configuration, and leaves no process. On CPU, or where the
options of the configuration say: one prefill and two decode workers on one GPU are ``--device cuda --dtype float32
--prefill-num-gpus 0.3 --decode-num-gpus 0.3``; on two GPUs the prefill worker has one of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from application import Application, application, seconds_until
from deaths import deaths
from handovers import handovers
from hangs import hangs
from mesh import mesh, said_by_one
from nodes import nodes
from only_decode import only_decode
from open_loop import open_loop
from overload import run_overload
from poison import faults, poison
from redeploy import PLACE, beside, cut_short, in_place
from rows import Row
from scale import QUICK, Scale
from slow_client import slow_client
from soak import soak
from storm import storm
from streams import MODEL, Answer
from topologies import topologies
from two_hosts import two_hosts

from pdray.config import Config
from pdray.gpu_settings import as_colocated
from pdray.options import add_config_arguments, config_values

BASE = {
    "device": "cpu",
    "served_model_name": MODEL,
    "num_decode_workers": 2,
    "num_threads": 1,
    "max_model_len": 512,
    "num_kv_blocks": 600,
    "graceful_shutdown_timeout_s": 60.0,
    "restart_backoff_s": 0.5,
}
SMALL_QUEUE = {"max_num_seqs": 8, "max_queue_size": 32, "max_queue_wait_s": 10.0}
NO_ROOM = {"num_decode_workers": 2, "worker_resources": {PLACE: 1.0}}
SMALL_POOL = {"num_kv_blocks": 200}
# They take long, need root, or are for machines of their own.
ON_REQUEST = ("handovers", "mesh", "topologies", "two-hosts")
HEAD = "| test | figure | must hold | ok |\n|---|---|---|---|"

MAX_WARNINGS, MAX_WARNING_CHARS = 80, 300

Case = Callable[[Application, Scale], Awaitable[list[Row]]]
RunsRows = Callable[[Scale], list[Row]]


def served(config: Config, case: Case) -> RunsRows:
    """Run a case with an application of this configuration."""

    async def when_whole(app: Application, scale: Scale) -> list[Row]:
        """/health is 200 as soon as one decode worker is there; the cases count on all of them."""
        await seconds_until(lambda: app.whole(set()), time.monotonic(), config.start_timeout_s)
        return await case(app, scale)

    def run(scale: Scale) -> list[Row]:
        with application(config) as app:
            rows = asyncio.run(when_whole(app, scale))
            if not all(row.ok for row in rows):
                print(f"Ray's logs are in {app.log_folder}; the last warnings in them:", file=sys.stderr)
                print("\n".join(last_warnings(app.log_folder)), file=sys.stderr)
        if app.left:
            rows.append(Row("processes left", ", ".join(app.left), "none", False))
        return rows

    return run


def last_warnings(folder: Path) -> list[str]:
    """What the application's processes warned of, in order: who was suspected and replaced, and why."""
    lines = {
        line[:MAX_WARNING_CHARS]
        for path in folder.glob("worker-*.err")
        for line in path.read_text(errors="replace").splitlines()
        if " WARNING pdray" in line or " ERROR pdray" in line
    }
    return sorted(lines)[-MAX_WARNINGS:]


def with_faults(runs: RunsRows) -> RunsRows:
    """Run it with processes whose engines fail on marked requests."""

    def run(scale: Scale) -> list[Row]:
        with faults():
            return runs(scale)

    return run


def meshed(given: dict[str, Any]) -> RunsRows:
    """Two prefill and two decode workers, if the command line says nothing else, after one worker that does both."""
    config = Config(**BASE | {"num_prefill_workers": 2} | given)
    expected: list[Answer] = []

    async def one(app: Application, scale: Scale) -> list[Row]:
        expected[:] = await said_by_one(app, scale)
        return []

    async def many(app: Application, scale: Scale) -> list[Row]:
        return await mesh(app, scale, expected)

    return all_of(served(configured(as_colocated(given), num_decode_workers=1), one), served(config, many))


def all_of(*cases: RunsRows) -> RunsRows:
    """One after the other."""
    return lambda scale: [row for case in cases for row in case(scale)]


CASES: dict[str, Callable[[dict[str, Any]], RunsRows]] = {
    "deaths": lambda given: served(configured(given), deaths),
    "handovers": lambda given: served(configured(given, num_decode_workers=1), handovers),
    "hangs": lambda given: served(configured(given), hangs),
    "mesh": meshed,
    "nodes": lambda _: nodes,
    "topologies": lambda given: lambda scale: topologies(given, scale),
    "only-decode": lambda given: served(configured(given, num_decode_workers=1), only_decode),
    "poison": lambda given: with_faults(served(configured(given), poison)),
    "storm": lambda given: served(configured(given), storm),
    "open-loop": lambda given: served(configured(given, **SMALL_QUEUE), open_loop),
    "slow-client": lambda given: served(configured(given), slow_client),
    "redeploy": lambda given: all_of(
        served(configured(given), beside),
        served(configured(given, **NO_ROOM), in_place),
        served(configured(given, **NO_ROOM, graceful_shutdown_timeout_s=1.0), cut_short),
    ),
    "soak": lambda given: served(configured(given, **SMALL_POOL), soak),
    "two-hosts": lambda _: two_hosts,
    "overload": lambda _: lambda scale: run_overload(scale.paced_overload_s),
}


def configured(given: dict[str, Any], **case: Any) -> Config:
    """What the case needs, over what the command line says, over BASE."""
    return Config(**BASE | given | case)


def rows_of(name: str, given: dict[str, Any], scale: Scale) -> list[Row]:
    """The rows of a case; an exception is a row that failed."""
    try:
        with redirect_stdout(sys.stderr):  # Ray tells stdout of every death
            return CASES[name](given)(scale)
    except Exception as error:
        traceback.print_exc()
        return [Row(name, f"{type(error).__name__}: {error}", "no exception", False)]


def line(row: Row) -> str:
    """Of the table, in Markdown."""
    cells = (row.name, row.figure, row.limit, "yes" if row.ok else "**no**")
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=list(CASES),
        default=[name for name in CASES if name not in ON_REQUEST],
        help=f"default: all but {', '.join(ON_REQUEST)}",
    )
    parser.add_argument("--soak-minutes", type=float, default=None)
    parser.add_argument("--soak-kills", action="store_true", help="kill a worker every minute of the soak")
    parser.add_argument("--mesh-seconds", type=float, default=None, help="of load on the mesh (default: 60)")
    parser.add_argument("--quick", action="store_true", help="fewer streams, tokens and requests")
    parser.add_argument("--num-streams", type=int, default=None, help="that are disturbed (default: 32)")
    parser.add_argument("--num-tokens", type=int, default=None, help="of each of them (default: 48)")
    add_config_arguments(parser, skip=())
    args = parser.parse_args()
    scale = QUICK if args.quick else Scale()
    scale = replace(
        scale,
        soak_kills=args.soak_kills,
        soak_minutes=args.soak_minutes or scale.soak_minutes,
        mesh_s=args.mesh_seconds or scale.mesh_s,
        num_streams=args.num_streams or scale.num_streams,
        num_tokens=args.num_tokens or scale.num_tokens,
    )
    given = config_values(args)
    rows: list[Row] = []
    print(HEAD, flush=True)
    for name in args.rows:
        print(f"{name} ...", file=sys.stderr, flush=True)
        done = rows_of(name, given, scale)
        rows += done
        print("\n".join(line(row) for row in done), flush=True)
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
