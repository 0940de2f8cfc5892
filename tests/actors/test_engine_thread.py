"""When a worker's engine is woken, and what its event loop spends on a call. Without Ray's processes."""

from __future__ import annotations

import asyncio
import inspect
import threading
from types import SimpleNamespace
from typing import Any, cast

from ray.util.tracing.tracing_helper import _inject_tracing_into_class

from pdray.actors.decode_worker import DecodeWorker
from pdray.actors.engine_thread import GatheredWake
from pdray.actors.prefill_worker import PrefillWorker
from pdray.actors.untraced import TRACING, without_tracing
from pdray.config import Config
from pdray.control.effects import Release, Send
from pdray.router.link import NO_CREDIT
from pdray.testing.patience import PATIENCE_S
from pdray.wire.lease_messages import CreditUpdate
from pdray.wire.message import LegKey
from pdray.wire.peers import PeerName, Role
from pdray.wire.put_messages import PutDone


async def test_an_engine_is_woken_once_for_all_that_came_in_one_piece() -> None:
    seen: list[str] = []
    wake = GatheredWake(asyncio.get_running_loop(), lambda: seen.append("woken"))
    for number in range(3):
        seen.append(f"message {number}")
        wake()
    assert seen == ["message 0", "message 1", "message 2"]
    await asyncio.sleep(0)
    assert seen[3:] == ["woken"]
    wake()
    await asyncio.sleep(0)
    assert seen[4:] == ["woken"], "and again for what comes later"


async def test_work_that_another_thread_brings_waits_for_no_message() -> None:
    woken: list[int] = []
    wake = GatheredWake(asyncio.get_running_loop(), lambda: woken.append(threading.get_ident()))
    thread = threading.Thread(target=wake)
    thread.start()
    thread.join(PATIENCE_S)
    assert woken == [thread.ident]


class ListeningSession:
    def __init__(self, seen: list[str]) -> None:
        self.peer = PeerName("prefill-0", "1", Role.PREFILL)
        self._seen = seen

    def send(self, message: object) -> None:
        self._seen.append("told")


async def test_an_engine_is_woken_before_anything_else_is_done_about_a_start() -> None:
    seen: list[str] = []
    worker = DecodeWorker(Config(), "decode-0", "1", b"secret")
    worker._loop = asyncio.get_running_loop()
    wake, session = GatheredWake(worker._loop, lambda: seen.append("woken")), ListeningSession(seen)

    def start(*_: object) -> list[Send]:
        wake()
        return [Send("router", CreditUpdate(NO_CREDIT))]

    worker.leases = cast(Any, SimpleNamespace(put_done=start, put_received=start, may_write=lambda *_: True))
    worker.engine = cast(Any, SimpleNamespace(expect=lambda key: None))
    worker.sessions["router"] = cast(Any, session)
    worker.on_message(cast(Any, session), PutDone("r", 0, 1, [], 0.0))
    assert seen == []
    await asyncio.sleep(0)
    assert seen == ["woken", "told"]
    worker.put_received(LegKey("r", 0), "prefill-0", 1)
    await asyncio.sleep(0)
    assert seen[2:] == ["woken", "told"]


async def test_blocks_return_when_what_others_wait_for_has_left() -> None:
    """A loop may write only at the end of its turn, and hundreds of blocks take a while."""
    seen: list[str] = []
    worker = PrefillWorker(Config(), "prefill-0", "1", b"secret")
    worker._loop = asyncio.get_running_loop()
    worker.engine = cast(Any, SimpleNamespace(release=lambda key: seen.append("released")))
    worker.sessions["router"] = cast(Any, ListeningSession(seen))
    worker._perform([Release(LegKey("r", 0)), Send("router", CreditUpdate(NO_CREDIT))])
    assert seen == ["told"]
    await asyncio.sleep(0)
    assert seen == ["told", "released"]


class Actor:
    def __init__(self) -> None:
        without_tracing(type(self))

    def each_token(self, token: int) -> int:
        return token + 1

    async def called_by_others(self) -> int:
        return self.each_token(1)

    @staticmethod
    def plain() -> str:
        return "plain"


def test_only_what_other_processes_call_is_traced() -> None:
    class AsActor(Actor):
        """As Ray makes it: a class of its own, whose methods are wrapped."""

    _inject_tracing_into_class(AsActor)
    wrapped: Any = AsActor.each_token
    assert wrapped is not Actor.each_token and wrapped.__globals__["__name__"] == TRACING
    actor = AsActor()
    assert inspect.unwrap(AsActor.each_token) is AsActor.each_token
    assert AsActor.called_by_others.__globals__["__name__"] == TRACING  # type: ignore[attr-defined]
    assert asyncio.run(actor.called_by_others()) == 2 and actor.plain() == "plain"
    assert actor.each_token(2) == 3
