"""What workers do beside serving: none of it holds the event loop up, and credit is what a lease can get."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pdray.actors.decode_worker import DecodeWorker
from pdray.actors.prefill_worker import PrefillWorker
from pdray.config import Config
from pdray.control.prefixes import PART
from pdray.engine.kv.block_pool import PrefixChanges
from pdray.engine.request import EngineRoom
from pdray.testing.patience import PATIENCE_S
from pdray.wire.message import LegKey
from pdray.wire.peers import PeerName, Role
from pdray.wire.worker_news import PrefixUpdate, unpack_hashes

CONFIG = Config(model="config.json", skip_tokenizer_init=True)


def make_worker(**engine: Any) -> Any:
    """One that was not started, around a few methods of an engine."""
    worker = PrefillWorker(CONFIG, "prefill-0", "1", b"secret")
    worker.engine = cast(Any, SimpleNamespace(**engine))
    return worker


async def test_the_integrity_check_runs_beside_the_event_loop() -> None:
    ticked = threading.Event()

    def check() -> list[str]:
        return ["fault"] if ticked.wait(10) else ["the event loop stood still"]

    worker = make_worker(check_integrity=check, live_keys=set)
    asyncio.get_running_loop().call_later(0.01, ticked.set)
    assert await worker.check_integrity() == ["fault"]


class RecordingSession:
    def __init__(self, name: str, role: Role = Role.ROUTER) -> None:
        self.peer = PeerName(name, "1", role)
        self.closed = False
        self.sent: list[PrefixUpdate] = []

    def send(self, message: PrefixUpdate) -> None:
        self.sent.append(message)

    @property
    def known(self) -> set[int]:
        known: set[int] = set()
        for update in self.sent:
            known = (set() if update.is_all else known - set(unpack_hashes(update.removed))) | set(
                unpack_hashes(update.added)
            )
        return known


async def test_prefixes_are_told_in_parts_to_old_routers_and_new_ones() -> None:
    changes = [PrefixChanges(set(range(3 * PART)), set()), PrefixChanges({-1 % 2**64}, set(range(PART + 1)))]
    held = (changes[0].added - changes[1].removed) | changes[1].added
    worker = make_worker(take_prefix_changes=lambda: changes.pop(0) if changes else PrefixChanges(set(), set()))
    old, new = RecordingSession("first"), RecordingSession("second")  # whatever a router is called
    other = RecordingSession("router-like", Role.DECODE)
    worker.on_open(old)
    worker.on_open(other)
    publishing = asyncio.create_task(worker._prefix_news.publish(worker.engine))
    await asyncio.sleep(0)
    assert len(old.sent) == 1, "more than a part without a pause"
    worker.on_open(new)
    async with asyncio.timeout(PATIENCE_S):
        while not (old.known == new.known == held):
            await asyncio.sleep(0.01)
    assert not other.sent
    for session in (old, new):
        assert all(len(update.added) <= 8 * 2 * PART and len(update.removed) <= 8 * PART for update in session.sent)
    publishing.cancel()
    worker._tasks.cancel()


@pytest.mark.parametrize("preempted", [0, 1])
def test_credit_is_what_a_lease_can_get(preempted: int) -> None:
    """While a preempted sequence waits, every lease is denied."""
    worker = DecodeWorker(CONFIG, "decode-0", "1", b"secret")
    room = EngineRoom(free_blocks=9, free_places=3, running=2, waiting=1, preempted=preempted)
    worker.engine = cast(Any, SimpleNamespace(room=lambda: room))
    worker.leases = cast(Any, SimpleNamespace(keys=lambda: [LegKey(str(i), 0) for i in range(7)]))
    credit = worker._credit()
    assert (credit.free_blocks, credit.free_places) == ((0, 0) if preempted else (9, 3))
    assert (credit.running, credit.waiting, credit.leases) == (2, 1, 7)
