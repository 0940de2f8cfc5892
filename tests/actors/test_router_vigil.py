"""What a Coordinator does about a router replica that does not watch: whom it asks, and whom it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, RayTaskError

from pdray.actors import router_vigil as module
from pdray.actors.questions import ActorProcess, NoAnswerError
from pdray.actors.router_vigil import RouterVigil
from pdray.background import BackgroundTasks
from pdray.control.silent_routers import RouterProcess
from pdray.testing.patience import PATIENCE_S

PROCESS = RouterProcess("abc", "actor-abc", 10, "node")


async def healthy() -> None: ...


async def unhealthy() -> None:
    raise RayTaskError("check_health", "", RuntimeError("the Coordinator was ended"))


async def unreachable() -> None:
    raise ActorUnavailableError("no connection", None)


async def hangs() -> None:
    await asyncio.Event().wait()


@dataclass
class Cluster:
    """What Ray and Serve say, and who was ended."""

    process: ActorProcess | Exception = ActorProcess("ALIVE", 10, "node")
    name: str | Exception | None = "SERVE_REPLICA::app#router#abc"
    health: Callable[[], Any] = hangs
    kill_fails: bool = False
    ended: list[tuple[int, str]] = field(default_factory=list)

    async def find_process(self, actor_id: str) -> ActorProcess:
        assert actor_id == PROCESS.actor_id
        if isinstance(self.process, Exception):
            raise self.process
        return self.process

    def replica_actor_name(self, app_name: str, replica_id: str) -> str | None:
        assert (app_name, replica_id) == ("app", "abc")
        if isinstance(self.name, Exception):
            raise self.name
        return self.name

    def get_actor(self, name: str, namespace: str) -> Any:
        assert (name, namespace) == (self.name, "serve")
        return self

    @property
    def check_health(self) -> Any:
        return self

    def remote(self) -> Any:
        return asyncio.ensure_future(self.health())

    async def make_dead(self, pid: int, node_id: str, *, grace_s: float) -> None:
        if self.kill_fails:
            raise NoAnswerError("its node does not answer")
        self.ended.append((pid, node_id))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    fake = Cluster()
    for name in ("find_process", "replica_actor_name", "make_dead"):
        monkeypatch.setattr(module, name, getattr(fake, name))
    monkeypatch.setattr(module.ray, "get_actor", fake.get_actor)
    monkeypatch.setattr(module, "ANSWER_TIMEOUT_S", 0.05)
    return fake


@pytest.fixture
async def vigil() -> Any:
    """A router watches once, and `pass_limit` lets it be silent for another limit."""
    clock = [0.0]
    tasks = BackgroundTasks(pytest.fail)
    made: Any = RouterVigil("app", 5.0, 2.0, healthy, tasks, now=lambda: clock[0])
    made.watched("router-a", PROCESS)

    async def pass_limit() -> None:
        clock[0] += 5.0
        made.tick()
        async with asyncio.timeout(PATIENCE_S):
            while tasks._tasks:  # one may begin another
                await asyncio.gather(*tasks._tasks)

    made.pass_limit = pass_limit
    yield made
    await tasks.stop()


async def test_one_that_hangs_is_ended_at_the_second_look_and_only_once(cluster: Cluster, vigil: Any) -> None:
    await vigil.pass_limit()
    assert cluster.ended == []
    await vigil.pass_limit()
    assert cluster.ended == [(10, "node")]
    for _ in range(4):
        await vigil.pass_limit()
    assert cluster.ended == [(10, "node")]


@pytest.mark.parametrize("health", [healthy, unhealthy, unreachable])
async def test_one_that_answers_or_cannot_be_reached_lives(
    health: Callable[[], Any], cluster: Cluster, vigil: Any
) -> None:
    cluster.health = health
    for _ in range(6):
        await vigil.pass_limit()
    assert cluster.ended == []


@pytest.mark.parametrize(
    "ignorance",
    [{"process": NoAnswerError("")}, {"name": None}, {"name": NoAnswerError("")}, {"name": OSError("not foreseen")}],
    ids=str,
)
async def test_without_rays_and_serves_word_nobody_is_ended(
    ignorance: dict[str, Any], cluster: Cluster, vigil: Any
) -> None:
    for name, value in ignorance.items():
        setattr(cluster, name, value)
    for _ in range(6):
        await vigil.pass_limit()
    assert cluster.ended == []
    for name, value in vars(Cluster()).items():
        setattr(cluster, name, value)
    for _ in range(2):  # it is known again, and still silent: two looks in a row
        await vigil.pass_limit()
    assert cluster.ended == [(10, "node")]


@pytest.mark.parametrize("process", [ActorProcess("DEAD", 10, "node"), ActorProcess("ALIVE", 11, "node")])
@pytest.mark.parametrize("looks", [0, 1])
async def test_what_has_ended_is_not_ended_again(
    process: ActorProcess, looks: int, cluster: Cluster, vigil: Any
) -> None:
    for _ in range(looks):
        await vigil.pass_limit()
    cluster.process = process
    for _ in range(4):
        await vigil.pass_limit()
    assert cluster.ended == [] and vigil.growing() == []


async def test_a_kill_that_fails_is_tried_again(cluster: Cluster, vigil: Any) -> None:
    cluster.kill_fails = True
    for _ in range(3):
        await vigil.pass_limit()
    cluster.kill_fails = False
    await vigil.pass_limit()
    assert cluster.ended == [(10, "node")]
