"""A Coordinator that was started again goes on with workers that load still, and asks them for their outcome."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from pdray.actors import fleet as fleet_module
from pdray.actors import places as places_module
from pdray.actors import worker as worker_module
from pdray.actors import worker_process
from pdray.actors.assembly import assemble
from pdray.actors.decode_worker import DecodeWorker
from pdray.actors.fleet import WorkerFleet
from pdray.actors.placement import origin
from pdray.actors.places import LEFT, WorkerPlaces
from pdray.background import LoopFailures
from pdray.config import Config
from pdray.control.membership import Membership
from pdray.control.room import NodeRoom
from pdray.control.startup import Startup
from pdray.errors import ModelLoadError, PlacementError
from pdray.testing.patience import PATIENCE_S
from pdray.testing.tiny_model import TINY_CONFIG
from pdray.wire.cluster_view import Heartbeat, WorkerIdentity, WorkerInfo, WorkerLoading

CONFIG = Config(device="cpu", mode="colocated", worker_timeout_s=1.0, worker_num_cpus=1.0)
SECRET = b"secret"
INFO = WorkerInfo("decode-0", "decode-0.1.1", "both", "127.0.0.1", 1, 0, "", "", "f", 8, 16, 100, 8, 64)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


class Method:
    def __init__(self, answer: Callable[[], Any]) -> None:
        self._answer = answer

    def remote(self, *_: Any) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self._answer())


class LoadingActor:
    """A worker's actor; `loaded` is how its start ends."""

    def __init__(self, secret: bytes = SECRET) -> None:
        self.loaded: asyncio.Future[WorkerInfo] = asyncio.get_running_loop().create_future()
        self._loading = WorkerLoading("decode-0", INFO.incarnation, origin(CONFIG, secret))
        self.identify, self.start = Method(self._identify), Method(self._start)
        self.heartbeat, self.join = Method(self._heartbeat), Method(asyncio.Event().wait)

    async def _identify(self) -> WorkerLoading:
        return self._loading

    async def _start(self) -> WorkerInfo:
        return await asyncio.shield(self.loaded)

    async def _heartbeat(self) -> Heartbeat:
        return Heartbeat({}, [], {})


class Owner:
    def on_change(self) -> None: ...
    def on_heartbeat(self, worker_id: str, heartbeat: Heartbeat) -> None: ...
    async def check_current(self) -> None: ...


@pytest.fixture
async def fleet(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    """Of a Coordinator that knows nobody yet; `ended` are the actors that it ends."""
    ended: list[Any] = []

    async def end_actor(actor: Any) -> None:
        ended.append(actor)

    monkeypatch.setattr(fleet_module, "end_actor", end_actor)
    made: Any = WorkerFleet(
        CONFIG, "app", Membership(0, 1, 60.0, 2), Startup(), SECRET, Owner(), LoopFailures(), detached=True
    )
    made.ended = ended
    yield made
    made._stopping = True
    await made._tasks.stop()


async def adopt(fleet: Any, actor: LoadingActor, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(worker_process.ray, "get_actor", lambda *_, **__: actor)
    kept: bool = await fleet.adopt()
    return kept


async def test_a_worker_that_loads_is_waited_for_and_kept(fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    actor = LoadingActor()
    assert await adopt(fleet, actor, monkeypatch)
    fleet.tick()
    assert fleet.membership.states() == {"decode-0": "starting"}
    actor.loaded.set_result(INFO)
    await until(lambda: fleet.membership.states() == {"decode-0": "ready"})
    assert fleet.membership.view.workers == [INFO] and fleet.ended == []


async def test_one_that_fails_to_load_is_ended_and_its_error_told(fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    actor = LoadingActor()
    await adopt(fleet, actor, monkeypatch)
    actor.loaded.set_exception(ModelLoadError("no such file"))
    await until(lambda: fleet.membership.states() == {"decode-0": "absent"})
    assert fleet.ended == [actor]
    assert fleet.startup.state(ready=False).failed == "decode-0 did not start: no such file"


async def test_one_of_another_secret_is_ended(fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    actor = LoadingActor(b"another")
    assert not await adopt(fleet, actor, monkeypatch)
    await until(lambda: fleet.ended == [actor])


async def test_a_worker_loads_once_and_says_that_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two Coordinators, one after the other, ask it to start."""
    model = tmp_path / "config.json"
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
    worker = DecodeWorker(config, "decode-0", "d1", SECRET)
    go_on, num_built = threading.Event(), 0

    def slowly(*arguments: Any) -> Any:
        nonlocal num_built
        num_built += 1
        assert go_on.wait(PATIENCE_S)
        return assemble(*arguments)

    monkeypatch.setattr(worker_module, "assemble", slowly)
    starts = [asyncio.ensure_future(worker.start()) for _ in range(2)]
    await until(lambda: num_built)
    assert await worker.identify() == WorkerLoading("decode-0", "d1", origin(config, SECRET))
    go_on.set()
    first, second = await asyncio.gather(*starts)
    assert first == second and num_built == 1
    assert isinstance(await worker.identify(), WorkerIdentity)
    await worker.stop()


async def test_a_worker_that_could_not_load_says_so_again(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = DecodeWorker(CONFIG, "decode-0", "d1", SECRET)

    def fail(*arguments: Any) -> Any:
        raise ModelLoadError("no such file")

    monkeypatch.setattr(worker_module, "assemble", fail)
    for _ in range(2):
        with pytest.raises(ModelLoadError, match="no such file"):
            await worker.start()
        monkeypatch.setattr(worker_module, "assemble", lambda *_: pytest.fail("loaded again"))


# --- room that has left the cluster -----------------------------------------------------------------


@pytest.mark.parametrize("adopted", [True, False])
async def test_room_that_has_left_the_cluster_is_waited_for(adopted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [NodeRoom("n", {"CPU": 1.0}, {"CPU": 1.0})]
    monkeypatch.setattr(places_module, "cluster_nodes", lambda: nodes)
    for name, value in (("RETRY_S", 0.01), ("PATIENCE_S", 0.0)):
        monkeypatch.setattr(places_module, name, value)
    reasons: list[str] = []

    def waits(_worker_id: str, reason: str) -> None:
        reasons.append(reason)

    places = WorkerPlaces(CONFIG, "app", detached=True, on_wait=waits, had_room=adopted)
    if not adopted:
        await places.place("decode-0")
        places.started("decode-0")
    nodes = [NodeRoom("head", {"CPU": 0.0}, {"CPU": 0.0})]
    again = asyncio.ensure_future(places.place("decode-0"))
    await until(lambda: again.done() or reasons)
    assert not again.done() and reasons[0].endswith(LEFT)
    nodes = [NodeRoom("another", {"CPU": 1.0}, {"CPU": 1.0})]
    await asyncio.wait_for(again, PATIENCE_S)


async def test_room_that_never_was_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places_module, "cluster_nodes", lambda: [NodeRoom("n", {"CPU": 0.5}, {"CPU": 0.5})])
    places = WorkerPlaces(CONFIG, "app", detached=True, on_wait=lambda *_: None)
    with pytest.raises(PlacementError, match="lower worker_num_cpus"):
        await places.place("decode-0")


async def test_a_guest_goes_to_its_lenders_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much room there is elsewhere."""
    name, other = "0a" * 28, "0b" * 28
    here, there = NodeRoom(name, {"CPU": 2.0}, {"CPU": 0.0}), NodeRoom(other, {"CPU": 2.0}, {"CPU": 2.0})
    monkeypatch.setattr(places_module, "cluster_nodes", lambda: [here, there])
    for setting, value in (("RETRY_S", 0.01), ("PATIENCE_S", 0.0)):
        monkeypatch.setattr(places_module, setting, value)
    reasons: list[str] = []
    places = WorkerPlaces(CONFIG, "app", detached=True, on_wait=lambda _, reason: reasons.append(reason))
    placing = asyncio.ensure_future(places.place("prefill-0", structs.replace(INFO, node_id=name)))
    await until(lambda: placing.done() or reasons)
    assert not placing.done()
    here = NodeRoom(name, {"CPU": 2.0}, {"CPU": 1.0})
    options = await asyncio.wait_for(placing, PATIENCE_S)
    assert (options["scheduling_strategy"].node_id, options["scheduling_strategy"].soft) == (name, False)
