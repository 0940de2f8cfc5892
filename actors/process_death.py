"""End an actor's process, on whatever node it runs, and make sure that it is gone."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import psutil
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pdray.actors.questions import ask, find_process, node_is_alive
from pdray.ranks.member import process_name

DEATH_POLL_S = 0.01
RAY_KILL_GRACE_S = 1.0
NODE_POLL_S = 0.5
KILL_TIMEOUT_S = 30.0


async def end_actor(actor: ActorHandle) -> None:
    """Return once the actor's process is gone. It is not started again.

    Raises:
        NoAnswerError: Ray's GCS does not answer.
    """
    actor_id = actor._actor_id.hex()
    await ask(lambda: ray.kill(actor, no_restart=True), what="to end an actor")
    while (process := await find_process(actor_id)).pid == 0 and process.state != "DEAD":
        await asyncio.sleep(DEATH_POLL_S)
    if process.pid:
        await make_dead(process.pid, process.node_id)


async def make_dead(pid: int, node_id: str, *, grace_s: float = RAY_KILL_GRACE_S) -> None:
    """Return once an actor's process is gone; one that still runs after grace_s is sent SIGKILL on its own node.

    A node that Ray's GCS has given up counts as the death of its processes. It is the best evidence there is of a
    machine that does not answer, and not only a timeout: Ray lets that node never come back, and its raylet ends itself
    and its processes as soon as it hears so. Until then a process there might run, cut off. What it could still send
    is refused where it arrives: sessions and channels to it are closed, and channels between machines write into a
    pool only what the receiver itself takes, in the epoch that it knows. A pool that is mapped (cuda_ipc) lies on the
    writer's own node, and is lost with it.

    Raises:
        NoAnswerError: Ray's GCS does not answer, or a process of this node does not end.
    """
    if node_id == ray.get_runtime_context().get_node_id():
        await ask(lambda: _kill_and_wait(pid, grace_s), what=f"to end process {pid}", timeout_s=KILL_TIMEOUT_S)
        return
    on_its_node = NodeAffinitySchedulingStrategy(node_id, soft=False)
    kill = ray.remote(_kill_and_wait).options(num_cpus=0, max_retries=0, scheduling_strategy=on_its_node)
    while await node_is_alive(node_id):
        killed = await ask(lambda: kill.remote(pid, grace_s), what="to run a task")
        done = asyncio.ensure_future(_outcome(killed))
        try:
            while not done.done() and await node_is_alive(node_id):
                await asyncio.wait({done}, timeout=NODE_POLL_S)
            if done.done() and done.result():
                return
        finally:
            if not done.done():
                done.cancel()
                ray.cancel(killed)
        await asyncio.sleep(NODE_POLL_S)


async def _outcome(killed: ray.ObjectRef[None]) -> bool:
    """Whether the process was seen dead; if not, its node is on its way out, or the killer itself was killed."""
    try:
        await killed
    except RayError:
        return False
    return True


def _kill_and_wait(pid: int, grace_s: float) -> None:
    """Kill a process and block until it has ended, and those that it has started, as other ranks of its worker: they
    end after it, and until then may write into memory that another worker has lent.

    A pid that is not a Ray worker's has been used again: left alone.
    """
    others: list[psutil.Process] = []
    try:
        process = psutil.Process(pid)
        if _is_rays(process):
            others = process.children(recursive=True)
            _see_dead(process, grace_s)
    except psutil.NoSuchProcess:
        pass  # nobody's children any more, and known by their name
    name = process_name(pid)
    others += [each for each in psutil.process_iter(["name"]) if each.info["name"] == name]
    for other in others:
        _see_dead(other, 0.0)


def _see_dead(process: psutil.Process, grace_s: float) -> None:
    try:
        can_end = process.status() != psutil.STATUS_STOPPED  # a stopped one cannot end by itself
        deadline = time.monotonic() + (grace_s if can_end else 0.0)
        while not _is_gone(process) and time.monotonic() < deadline:
            time.sleep(DEATH_POLL_S)
        if not _is_gone(process):
            os.kill(process.pid, signal.SIGKILL)
        while not _is_gone(process):
            time.sleep(DEATH_POLL_S)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return


def _is_rays(process: psutil.Process) -> bool:
    """By its title. When its first thread has ended before others, the command line is gone and the name stays."""
    if process.name().startswith("ray::"):
        return True
    try:
        return any(part.startswith("ray::") for part in process.cmdline())
    except psutil.ZombieProcess:
        return False


def _is_gone(process: psutil.Process) -> bool:
    """Whether all of its threads have ended. The last one closes its devices: until then a GPU works off what it was
    given, and may write into memory that another process has lent."""
    return not process.is_running() or (process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1)
