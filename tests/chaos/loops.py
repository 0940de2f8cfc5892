"""An exception injected into every background loop of every process, under streams: nothing stops, and it shows."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import ray
from application import NAME, Application, replaced
from deaths import differences, with_problems
from rows import Row
from streams import Answer, Body, Clients

from pdray.actors.client import describe

PREFIX = "SERVE_REPLICA::"


async def loops_fail(
    app: Application, clients: Clients, bodies: list[Body], expected: list[Answer], midway: int
) -> Row:
    """Every loop raises once, midway; every stream says the same, nobody is replaced, and status names every loop."""
    before = await app.pids()
    tasks = [asyncio.ensure_future(clients.ask(body)) for body in bodies]
    await clients.pieces(midway)
    since = time.monotonic()
    injected = await asyncio.to_thread(_inject_everywhere)
    answers = await asyncio.gather(*tasks)
    last = max(answer.finished_at for answer in answers) - since
    problems = differences(answers, expected) + await app.problems_at_rest()
    await asyncio.sleep(3.0)  # a watch, and a heartbeat, bring the news
    told = (await asyncio.to_thread(describe, NAME))["loop_failures"]
    problems += [f"status does not tell of {name!r}" for name in injected - {key.split(": ")[1] for key in told}]
    problems += replaced(before, await app.pids())
    figure = f"{len(injected)} kinds, {len(told)} loops of {len(before)} processes; the last stream {last:.1f} s later"
    limit = "streams the same; nobody replaced; status names every loop; nothing in use"
    return Row("an exception in every loop", with_problems(figure, problems), limit, not problems)


def _inject_everywhere() -> set[str]:
    """Names of the loops."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # those processes cannot import it
    names: set[str] = set()
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if f"{NAME}:" in actor["name"] or actor["name"].startswith(f"{PREFIX}{NAME}#"):
            handle: Any = ray.get_actor(actor["name"], namespace=actor["namespace"])
            names |= ray.get(handle.__ray_call__.remote(_inject_here), timeout=30)
    return names


def _inject_here(actor: Any) -> set[str]:
    """Runs beside the actor's event loop, in its process."""
    if hasattr(actor, "_replica_impl"):
        router = getattr(actor._replica_impl._user_callable_wrapper._callable, "router", None)
        owners = [] if router is None else [router.tasks]  # the other replica has none
    else:
        owners = [actor._tasks, *([actor._fleet._tasks] if hasattr(actor, "_fleet") else [])]

    def inject(task: Any) -> None:
        waiter: Any = task
        while waiter is not None and hasattr(waiter, "get_coro"):
            waiter = waiter._fut_waiter
        if waiter is None or waiter.done():  # it runs just now
            task.get_loop().call_soon(inject, task)
        else:
            waiter.set_exception(RuntimeError("injected"))

    names = set()
    for owner in owners:
        for key, task in dict(owner.loops).items():
            names.add(next(name for name in (key, key.rpartition(" ")[0]) if name in KNOWN))
            task.get_loop().call_soon_threadsafe(inject, task)
    return names


KNOWN = {
    "hand over",
    "probe pairs",
    "follow the view",
    "keep house",
    "renew leases",
    "end if hung",
    "report metrics",
    "check when idle",
    "end if orphaned",
    "publish prefixes",
    "expire leases",
    "supervise",
    "ask Serve",
    "await a worker's end",
    "heartbeats of a worker",
}
