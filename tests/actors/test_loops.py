"""Every background loop goes on after an exception, and says so; no task and no thread is made elsewhere."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import json
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pdray.actors import coordinator as coordinator_module
from pdray.actors import serve_status
from pdray.actors import succession as succession_module
from pdray.actors import worker as worker_module
from pdray.actors.coordinator import Coordinator
from pdray.actors.decode_worker import DecodeWorker
from pdray.background import BackgroundTasks, LoopFailures
from pdray.config import Config
from pdray.testing.patience import PATIENCE_S
from pdray.testing.tiny_model import TINY_CONFIG
from pdray.wire.cluster_view import Heartbeat, WorkerIdentity, WorkerInfo
from pdray.wire.lease_messages import LeaseRequest

ROOT = Path(__file__).parents[2]


def imported_from(path: str) -> Any:
    name = Path(path).stem if "conftest" not in path else "router_conftest"
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


router_tests = imported_from("router/conftest.py")


class InjectedError(Exception):
    """What no loop expects."""


def inject(task: asyncio.Task[Any]) -> bool:
    """Raise InjectedError where the task waits. False if it waits for nothing just now."""
    waiter: Any = task
    while isinstance(waiter, asyncio.Task):
        waiter = waiter._fut_waiter  # type: ignore[attr-defined]
    if waiter is None or waiter.done():
        return False
    waiter.set_exception(InjectedError("injected"))
    return True


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def a_router() -> AsyncIterator[tuple[list[BackgroundTasks], LoopFailures, Callable[[], Any]]]:
    """Afterwards it still follows the view, and its leases are still renewed."""
    cluster = router_tests.Cluster(lease_timeout_s=0.4)
    workers = router_tests.FakeWorker("prefill-0", "prefill"), router_tests.FakeWorker("decode-0", "decode")
    await cluster.router.start()
    await cluster.show(*workers)
    await asyncio.wait_for(cluster.router.wait_ready(), PATIENCE_S)
    unreachable = WorkerInfo("decode-9", "1", "decode", "127.0.0.1", 1, 0, "", "", "f", 8, 16, 100, 8, 64)
    cluster.router._connections.connect(unreachable, 0.0)  # its connecting goes on

    async def works() -> None:
        task = cluster.submit("r", prompt="prompt")
        await cluster.decode.expect(LeaseRequest, "r")
        cluster.decode.grant("r")
        await task
        cluster.decode.renewed.clear()
        await cluster.decode.wait(lambda: cluster.decode.renewed)
        third = router_tests.FakeWorker("decode-1", "decode")
        await cluster.show(*workers, third)
        await third.wait(lambda: third.session)

    yield [cluster.router.tasks], cluster.router.failures, works
    await cluster.router.stop()
    for worker in cluster.workers.values():
        await worker.stop()


class NoMetrics:
    """Stands for metrics, which need Ray."""

    def __init__(self, *args: Any, **named: Any) -> None: ...
    def update(self, *args: Any) -> None: ...
    def on_failure(self, loop: str) -> None: ...
    def on_integrity_check(self, num_problems: int) -> None: ...


@asynccontextmanager
async def a_worker() -> AsyncIterator[tuple[list[BackgroundTasks], LoopFailures, Callable[[], Any]]]:
    """Afterwards it still answers heartbeats, and tells what its loops have raised."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "config.json"
        model.write_text(json.dumps(TINY_CONFIG))
        config = Config(
            model=str(model),
            mode="colocated",
            load_format="dummy",
            skip_tokenizer_init=True,
            device="cpu",
            num_kv_blocks=40,
            max_num_seqs=4,
            max_num_batched_tokens=32,
        )
        worker = DecodeWorker(config, "decode-0", "d1", b"secret")
        await worker.start()
        worker._start_loops(60.0, in_ray=True)

        async def works() -> None:
            heartbeat = await worker.heartbeat()
            assert len(heartbeat.loop_failures) == 1 and not worker._stopped.is_set()

        yield [worker._tasks], worker._failures, works
        await worker.stop()


class FakeFence:
    async def established(self) -> None: ...
    async def check(self) -> None: ...


class FakeMethod:
    def __init__(self, answer: Callable[[], Any]) -> None:
        self._answer = answer

    def remote(self, *args: Any) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self._answer())


class FakeActor:
    """A worker's actor that lives until it is told to end."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.num_heartbeats = 0
        self.heartbeat, self.join = FakeMethod(self._heartbeat), FakeMethod(self.ended.wait)
        self.describe = FakeMethod(self._describe)

    async def _heartbeat(self) -> Heartbeat:
        self.num_heartbeats += 1
        return Heartbeat({}, ["router-0"], {})

    async def _describe(self) -> dict[str, str]:
        return {"worker_id": "decode-0"}


@asynccontextmanager
async def a_coordinator() -> AsyncIterator[tuple[list[BackgroundTasks], LoopFailures, Callable[[], Any]]]:
    """Afterwards heartbeats still come, and a worker's end is still seen."""
    coordinator = Coordinator(Config(device="cpu", mode="colocated", worker_timeout_s=1.0), "app", b"s", detached=True)
    actor = FakeActor()
    info = WorkerInfo("decode-0", "d1", "both", "127.0.0.1", 1, 0, "", "", "f", 8, 16, 100, 8, 64)

    async def find(worker_id: str) -> Any:
        return WorkerIdentity(info, "", {}, []), actor

    coordinator._fleet._find = find  # type: ignore[method-assign]
    await until(lambda: actor.num_heartbeats)

    async def works() -> None:
        seen = actor.num_heartbeats
        await until(lambda: actor.num_heartbeats > seen)
        assert coordinator._membership.states() == {"decode-0": "ready"}
        assert len((await coordinator.describe())["loop_failures"]) == 1
        actor.ended.set()
        await until(lambda: coordinator._membership.states() == {"decode-0": "dying"})

    yield [coordinator._tasks, coordinator._fleet._tasks], coordinator._failures, works
    coordinator._fleet._stopping = True
    await coordinator._fleet._tasks.stop()
    await coordinator._tasks.stop()


SCENARIOS: dict[str, Callable[[], Any]] = {
    "follow the view": a_router,
    "connect to a worker": a_router,
    "keep house": a_router,
    "renew leases": a_router,
    "probe pairs": a_router,
    "end if hung": a_worker,
    "report metrics": a_worker,
    "check when idle": a_worker,
    "end if orphaned": a_worker,
    "publish prefixes": a_worker,
    "expire leases": a_worker,
    "supervise": a_coordinator,
    "ask Serve": a_coordinator,
    "hand over": a_coordinator,
    "await a worker's end": a_coordinator,
    "heartbeats of a worker": a_coordinator,
}


@pytest.mark.parametrize("name", SCENARIOS)
async def test_an_exception_in_any_loop_stops_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "WorkerMetrics", NoMetrics)
    monkeypatch.setattr(worker_module, "LoopMetrics", NoMetrics)
    monkeypatch.setattr(coordinator_module, "LoopMetrics", NoMetrics)
    monkeypatch.setattr(coordinator_module, "Fence", FakeFence)
    monkeypatch.setattr(serve_status, "is_listed", lambda app_name: True)
    monkeypatch.setattr(succession_module, "coordinator_names", lambda: [])
    async with SCENARIOS[name]() as (owners, failures, works):
        (tasks, key) = next(
            (owner, key) for owner in owners for key in owner.loops if key == name or key.startswith(f"{name} ")
        )
        await until(lambda: inject(tasks.loops[key]))
        await until(lambda: failures.counts.get(name) == 1)
        assert "InjectedError" in failures.describe()[name]
        await works()
        assert failures.counts == {name: 1}


MAKERS = {"create_task", "ensure_future", "Thread", "Timer", "start_soon", "run_in_executor"}
# Where else a task or thread is made, and why it cannot end unseen.
OTHERS = {
    ("pdray/background.py", "spawn"): "the policy",
    ("pdray/background.py", "start_thread"): "the policy",
    ("pdray/background.py", "unless_ended"): "awaited where they are made",
    ("pdray/engine/step/mask_filling.py", "__init__"): "whoever waits for a job is told what it has raised",
    ("pdray/engine/loop.py", "__init__"): "the engine stands alone; its on_error ends the worker",
    ("pdray/transfer/cuda_ipc/kind.py", "_map"): "awaited where it is made, or by what takes it back",
    ("pdray/transfer/nccl/communicator.py", "open_communicators"): "awaited where they are made",
    ("pdray/transfer/nccl/kind.py", "_connect"): "awaited where it is made",
    ("pdray/transfer/nccl/receive_group.py", "open"): "awaited where it is made",
    ("pdray/transfer/object_store/kind.py", "on_array"): "awaited where it is made",
    ("pdray/llm.py", "_start"): "awaited where it is made",
    ("pdray/router/batch.py", "answer"): "a task group",
    ("pdray/serve/app.py", "__init__"): "check_health() raises what they raised, and Serve replaces the replica",
    ("pdray/serve/connection.py", "unless_gone"): "awaited where they are made",
    ("pdray/serve/generation.py", "_submit"): "awaited where they are made",
    ("pdray/serve/generation.py", "merged"): "what they raise comes through the queue that is read",
    ("actors/client.py", "open"): "awaited where they are made",
    ("actors/questions.py", "within"): "awaited where it is made",
    ("actors/process_death.py", "make_dead"): "awaited where it is made",
    ("actors/vigil.py", "keep_vigil"): "awaited where it is made",
}


def library() -> list[Path]:
    files = [*(ROOT / "actors").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    for path in (ROOT / "pdray").rglob("*.py"):
        if path.relative_to(ROOT).parts[1] not in ("actors", "kernels", "bench"):
            files.append(path)
    return files


def calls(path: Path) -> list[tuple[str, str, ast.Call]]:
    """Every call in a file: the function that it stands in, what is called, and the call."""
    found = []

    def visit(node: ast.AST, inside: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside = node.name
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            found.append((inside, called, node))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(path.read_text()), "")
    return found


def test_every_task_and_thread_is_made_by_the_policy() -> None:
    made = {
        (str(path.relative_to(ROOT)), inside)
        for path in library()
        for inside, called, _ in calls(path)
        if called in MAKERS
    }
    assert made - OTHERS.keys() == set(), "use pdray.background, or say here why it cannot end unseen"
    assert OTHERS.keys() - made == set(), "no longer there"


def test_every_loop_is_tried_above() -> None:
    """Their names are literals, so that a log, a metric and this test can name them."""
    names: list[str] = []
    for path in library():
        for _, called, call in calls(path):
            if called == "keep_running":
                assert isinstance(call.args[0], ast.Constant), f"{path}:{call.lineno}"
                names.append(call.args[0].value)
    assert sorted(names) == sorted(SCENARIOS)


def test_a_task_of_spawn_comes_to_an_end() -> None:
    """What is given to spawn() holds no endless loop, but where its end is its owner's."""
    endless = {"_keep_alive", "_stay_connected"}  # of a session, which ends with them and tells its handler
    for path in library():
        if path.name == "background.py":
            continue
        functions = {
            node.name: node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.AsyncFunctionDef)
        }
        for _, called, call in calls(path):
            if called == "spawn" and isinstance(call.args[0], ast.Call):
                target = call.args[0].func
                name = target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")
                loops = [
                    node
                    for node in ast.walk(functions.get(name, ast.Module([], [])))
                    if isinstance(node, ast.While) and isinstance(node.test, ast.Constant)
                ]
                assert not loops or name in endless, f"{path}:{call.lineno} spawns {name}, which must not end"


def test_threads_that_watch_go_on_after_an_exception() -> None:
    from pdray.transfer.nccl.threads import Watchdog

    expired = threading.Semaphore(0)

    def on_expire() -> None:
        expired.release()
        raise InjectedError("injected")

    watchdog = Watchdog("w", on_expire)
    try:
        for _ in range(2):
            watchdog.set(0.0)
            assert expired.acquire(timeout=10)
    finally:
        watchdog.stop()
