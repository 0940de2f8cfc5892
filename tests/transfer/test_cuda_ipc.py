"""The cuda_ipc channel over memory of one process: what arrives, what is said, and what is never written."""

from __future__ import annotations

import asyncio
import importlib.util
import random
import sys
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from pdray.config import Config
from pdray.engine.kv.layout import KVLayout
from pdray.engine.kv.pool import KVPool
from pdray.errors import TransferError
from pdray.testing.patience import PATIENCE_S
from pdray.transfer.channel import Link, Put, PutResult, Site
from pdray.transfer.cuda_ipc import outgoing as outgoing_module
from pdray.transfer.cuda_ipc.block_ids import BlockIds
from pdray.transfer.cuda_ipc.kind import CudaIpcKind
from pdray.transfer.cuda_ipc.messages import (
    NUM_PROBES,
    PROBE_BYTES,
    SPARE_BYTES,
    Ask,
    Lend,
    Places,
    Probe,
    Proven,
    Refuse,
    Written,
    decode_to_receiver,
    decode_to_sender,
    encode,
    probe_pattern,
)
from pdray.transfer.cuda_ipc.sender import CudaIpcSender
from pdray.transfer.pending_writes import PendingWrites
from pdray.wire.message import LegKey

_spec = importlib.util.spec_from_file_location("transfer_conftest", Path(__file__).with_name("conftest.py"))
assert _spec is not None and _spec.loader is not None
conftest = sys.modules["transfer_conftest"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(conftest)
fake_device = sys.modules["fake_device"]  # see conftest.py

ALL_LAYERS = range(0, 6)
LAYOUT = KVLayout(6, 4, 2, 8, torch.float32)
NUM_BLOCKS = 60
CPU = torch.device("cpu")


async def result(future: Future[PutResult]) -> PutResult:
    async with asyncio.timeout(PATIENCE_S):
        return await asyncio.wrap_future(future)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)


def assert_(condition: bool) -> None:
    assert condition


class PrefillEnd:
    """One prefill worker's kind, and its channel in each epoch. ``said``: what it told the receiver."""

    def __init__(self, world: World, name: str, timeout_s: float) -> None:
        self.world, self.name = world, name
        self.transport = fake_device.HostMemory(gpu=name)
        site = Site(Config(worker_timeout_s=timeout_s), name, CPU, 1, world.fatal.append)
        self.kind = CudaIpcKind(site, self.transport)
        self.pool = KVPool.allocate(LAYOUT, 70, CPU)
        self.pool.tensor.normal_()
        self.kind.attach(self.pool)
        self.epoch = 0
        self.said: list[Any] = []
        self.heard: list[Any] = []
        self.failures: list[str] = []
        self.deaf = False
        self.channel: CudaIpcSender

    @property
    def stream(self) -> Any:
        return self.transport.streams[-1]

    async def open(self) -> None:
        """As the two workers do, without the test write."""
        self.epoch += 1
        await self.world.receiver.close_link(self.name)
        offer = await self.world.receiver.accept(self.name, self.epoch)
        link = Link(self.name, self.epoch, self._send, print, self.failures.append)
        self.channel = await self.kind.open(link, offer)

    async def connect(self) -> None:
        await self.open()
        await self.channel.check()

    def _send(self, payload: bytes) -> None:
        self.said.append(decode_to_receiver(payload))
        if not self.deaf:
            self.world.receiver.on_message(self.name, self.epoch, payload, self.hear)

    def hear(self, payload: bytes) -> None:
        self.heard.append(decode_to_sender(payload))
        self.channel.on_message(self.epoch, payload)

    def lease(self, name: str, blocks: list[int], *, lend: bool = True) -> LegKey:
        """A leg that this worker may fill; its blocks are lent at once, as after BeginPut, or only if it asks."""
        key = LegKey(f"{self.name}-{name}", 0)
        self.world.leases.open[key] = blocks
        if lend:
            self.world.receiver.let_in(key, self.name, self.epoch, range(len(blocks)))
        return key

    def put(self, key: LegKey, layers: range, source: list[int], **more: Any) -> Future[PutResult]:
        return self.channel.put(Put(key, layers, source, **{"first_position": 0} | more))

    def written(self) -> list[list[Places]]:
        return [message.puts for message in self.said if isinstance(message, Written)]


class World:
    """The decode worker, and who writes to it."""

    def __init__(self) -> None:
        self.fatal: list[BaseException] = []
        self.leases = conftest.Leases()
        self.transport = fake_device.HostMemory(gpu="decode")
        self.kind = CudaIpcKind(Site(Config(), "decode", CPU, 1, self.fatal.append), self.transport)
        self.pool = KVPool.allocate(LAYOUT, NUM_BLOCKS, CPU, spare_bytes=self.kind.spare_bytes)
        self.kind.attach(self.pool)
        self.receiver = self.kind.make_receiver(self.leases, PendingWrites())
        self.ends: list[PrefillEnd] = []

    async def sender(self, name: str, timeout_s: float = 5.0) -> PrefillEnd:
        end = PrefillEnd(self, name, timeout_s)
        self.ends.append(end)
        await end.connect()
        return end

    def take(self, layers: range, blocks: list[int]) -> torch.Tensor:
        """What these blocks hold; they are zeros again."""
        part = self.pool.tensor[layers.start : layers.stop]
        taken = part[:, blocks].clone()
        part[:, blocks] = 0
        return taken


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    for end in world.ends:
        await asyncio.to_thread(end.channel.close)
        assert len(end.channel._ids.ring) == 0 and all(mapping.closed for mapping in end.transport.mappings)
    await world.receiver.close()
    assert world.fatal == []
    streams = [*world.transport.streams, *(stream for end in world.ends for stream in end.transport.streams)]
    assert [error for stream in streams for error in stream.errors] == []


async def test_puts_of_any_size_arrive_where_they_should(world: World) -> None:
    end = await world.sender("a")
    rng = random.Random(3)
    for number, count in enumerate([1, 59, 7, 30, 2]):
        source, target = rng.sample(range(1, 70), count), rng.sample(range(1, NUM_BLOCKS), count)
        layers = ALL_LAYERS if number % 2 else range(number, 6)
        key = end.lease(str(number), target)
        done = await result(end.put(key, layers, source))
        assert done.accepted and done.seconds > 0
        assert done.num_bytes == len(layers) * count * LAYOUT.layer_block_bytes
        assert torch.equal(world.take(layers, target), end.pool.tensor[layers.start :, source])
        assert not world.pool.tensor.any(), "and nowhere else"
    assert [key.request_id for key in world.leases.received] == [f"a-{number}" for number in range(5)]


async def test_a_part_of_a_leg_goes_to_its_positions(world: World) -> None:
    end = await world.sender("a")
    key = end.lease("0", [11, 12, 13, 14, 15])
    await result(end.put(key, range(1, 3), [4, 9], first_position=2))
    assert torch.equal(world.take(range(1, 3), [13, 14]), end.pool.tensor[1:3, [4, 9]])
    assert not world.pool.tensor.any()


async def test_a_put_costs_one_message(world: World) -> None:
    """Its blocks were lent when the worker was let in; nothing is asked and nothing is answered."""
    end = await world.sender("a")
    key = end.lease("0", [7, 8])
    said, heard = len(end.said), len(end.heard)
    for layers in (range(0, 3), range(3, 6)):
        await result(end.put(key, layers, [1, 2]))
    assert [type(message) for message in end.said[said:]] == [Written, Written] and len(end.heard) == heard
    assert world.leases.received == [key, key]


async def test_what_was_not_lent_is_asked_for_once(world: World) -> None:
    end = await world.sender("a")
    key = end.lease("0", [7, 8, 9], lend=False)
    await result(end.put(key, range(0, 3), [1, 2, 3]))
    await result(end.put(key, range(3, 6), [1, 2, 3]))
    assert sum(isinstance(message, Ask) for message in end.said) == 1
    assert torch.equal(world.take(ALL_LAYERS, [7, 8, 9]), end.pool.tensor[:, [1, 2, 3]])
    end.channel.end_leg(key)
    assert end.channel._lent == {}


async def test_a_source_is_read_only_once_it_is_ready(world: World) -> None:
    end = await world.sender("a")
    event = fake_device.HostEvent()
    key = end.lease("0", [5])
    end.pool.tensor[:, 3] = -1.0
    future = end.put(key, ALL_LAYERS, [3], ready=event)
    await asyncio.sleep(0.03)
    assert not future.done() and not end.written() and not world.pool.tensor.any()
    end.pool.tensor[:, 3] = 7.0
    event.passed.set()
    assert (await result(future)).accepted
    assert (world.pool.tensor[:, 5] == 7.0).all()


async def test_puts_of_one_step_share_a_kernel_and_a_message(world: World) -> None:
    end = await world.sender("a")
    events = [fake_device.HostEvent(), fake_device.HostEvent()]
    keys = [end.lease(str(number), [10 * number + 1, 10 * number + 2]) for number in range(4)]
    runs: list[int] = []
    end.stream.before_work = lambda: runs.append(1)
    futures = [
        end.put(key, layers, [2 * number + 1, 2 * number + 2], ready=event)
        for layers, event in zip((range(0, 4), range(4, 6)), events, strict=True)
        for number, key in enumerate(keys)
    ]
    for event in events:
        event.passed.set()
    assert all([(await result(future)).accepted for future in futures])
    assert len(runs) == 2 and sum(len(puts) for puts in end.written()) == 8
    for number in range(4):
        target, source = [10 * number + 1, 10 * number + 2], [2 * number + 1, 2 * number + 2]
        assert torch.equal(world.take(ALL_LAYERS, target), end.pool.tensor[:, source])


async def test_a_put_that_has_arrived_is_told_as_soon_as_the_step_has_ended(world: World) -> None:
    """Not at the next poll: the message that the prompt is done follows at once."""
    end = await world.sender("a")
    event = fake_device.HostEvent()
    key = end.lease("0", [5])
    future = end.put(key, ALL_LAYERS, [3], ready=event)
    await until(lambda: end.channel._writing)
    done = end.channel._writing[0].done
    event.passed.set()
    assert done.passed.wait(PATIENCE_S)
    end.channel.step_ended()
    assert future.done() and len(end.written()) == 1


async def test_the_last_of_a_step_is_watched_behind_what_was_hidden_in_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the step goes on nobody waits for its first layers; once it has ended, for all of them."""
    monkeypatch.setattr("pdray.transfer.cuda_ipc.sender.SPIN_S", PATIENCE_S)
    end = await world.sender("a")
    gate, events = threading.Event(), [fake_device.HostEvent(), fake_device.HostEvent()]
    end.stream.before_work = lambda: assert_(gate.wait(PATIENCE_S))
    key = end.lease("0", [5])
    futures = [
        end.put(key, layers, [3], ready=event) for layers, event in zip((range(0, 4), range(4, 6)), events, strict=True)
    ]
    await until(lambda: len(end.channel._writing) == 2)
    events[0].passed.set()
    end.channel.step_ended()  # another one
    assert end.channel._next_poll() > 0.0
    events[1].passed.set()
    end.channel.step_ended()
    assert end.channel._next_poll() == 0.0
    gate.set()
    assert all([(await result(future)).accepted for future in futures])


async def test_more_blocks_than_there_is_room_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A put is cut into writes, and told once all of them have ended."""
    end = await world.sender("a")
    monkeypatch.setattr(outgoing_module, "MAX_BLOCKS", 8)
    end.channel._ids = BlockIds(CPU, 256)
    keys = [end.lease(str(number), list(range(1 + 20 * number, 20 + 20 * number))) for number in range(3)]
    futures = [end.put(key, ALL_LAYERS, list(range(1, 20))) for key in keys]
    assert all([(await result(future)).accepted for future in futures])
    for number in range(3):
        target = list(range(1 + 20 * number, 20 + 20 * number))
        assert torch.equal(world.take(ALL_LAYERS, target), end.pool.tensor[:, 1:20])
    assert world.leases.received == keys


async def test_without_a_lease_nothing_is_written(world: World) -> None:
    end = await world.sender("a")
    refused = await result(end.put(LegKey("a-0", 0), ALL_LAYERS, [1]))
    assert refused == PutResult(False, 0, refused.seconds)
    assert not world.pool.tensor.any() and isinstance(end.heard[-1], Refuse)


async def test_a_lease_that_ends_on_the_way_is_not_counted(world: World) -> None:
    """The blocks are written all the same: the lease table holds them until the writer has said that it has stopped."""
    end = await world.sender("a")
    event = fake_device.HostEvent()
    key = end.lease("0", [5])
    future = end.put(key, ALL_LAYERS, [3], ready=event)
    del world.leases.open[key]
    await until(lambda: end.channel._writing)
    event.passed.set()
    await result(future)
    assert world.leases.received == [] and torch.equal(world.take(ALL_LAYERS, [5]), end.pool.tensor[:, [3]])


async def test_closing_waits_for_what_is_being_written(world: World) -> None:
    """Only then are puts over, for their blocks may be taken after that, and only then is the memory unmapped."""
    end = await world.sender("a")
    gate, entered = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert gate.wait(PATIENCE_S)

    end.stream.before_work = hold
    keys = [end.lease(str(number), [5 + number]) for number in range(2)]
    events = [None, fake_device.HostEvent()]
    futures = [end.put(key, ALL_LAYERS, [3], ready=event) for key, event in zip(keys, events, strict=True)]
    await asyncio.to_thread(entered.wait, PATIENCE_S)
    closing = [asyncio.ensure_future(asyncio.to_thread(end.channel.close)) for _ in range(2)]
    await asyncio.sleep(0.05)
    assert not any(future.done() for future in (*futures, *closing)) and not end.transport.mappings[0].closed
    gate.set()
    events[1].passed.set()
    await asyncio.gather(*closing)
    assert end.transport.mappings[0].closed and all(future.done() for future in futures)
    for future in futures:
        with pytest.raises(TransferError, match="closed"):
            await result(future)
    with pytest.raises(TransferError, match="closed"):
        await result(end.put(keys[0], ALL_LAYERS, [1]))
    await end.connect()
    key = end.lease("next", [9])
    assert (await result(end.put(key, ALL_LAYERS, [9]))).accepted, "the next epoch works, with the same room for ids"


async def test_messages_of_another_epoch_are_ignored(world: World) -> None:
    end = await world.sender("a")
    key = end.lease("0", [5])
    await asyncio.to_thread(end.channel.close)
    await end.connect()
    for message in (Written([Places(*key, 0, 6, 0, 1)]), Ask(0, Places(*key, 0, 6, 0, 1)), Probe()):
        world.receiver.on_message("a", 1, encode(message), end.hear)
        world.receiver.on_message("nobody", 2, encode(message), end.hear)
    for answer in (Lend(None, *key, 0, [33]), Refuse(0), Proven()):
        end.channel.on_message(1, encode(answer))
    world.receiver.let_in(key, "a", 1, range(1))
    assert world.leases.received == [] and end.channel._lent == {} and end.failures == []


async def test_before_its_test_write_a_sender_is_told_nothing(world: World) -> None:
    end = PrefillEnd(world, "a", 5.0)
    world.ends.append(end)
    await end.open()
    key = end.lease("0", [5])
    world.receiver.on_message("a", 1, encode(Ask(0, Places(*key, 0, 6, 0, 1))), end.hear)
    world.receiver.on_message("a", 1, encode(Written([Places(*key, 0, 6, 0, 1)])), end.hear)
    assert end.heard == [] and world.leases.received == [] and world.receiver.senders() == []
    await end.channel.check()
    assert world.receiver.senders() == ["a"]


HOSTILE = {
    "the dummy block": Lend(None, "a-0", 0, 0, [0]),
    "a block after the end": Lend(None, "a-0", 0, 0, [NUM_BLOCKS]),
    "a block before the start": Lend(None, "a-0", 0, 0, [-1]),
    "a block twice": Lend(None, "a-0", 0, 0, [3, 3]),
    "an answer without a question": Lend(7, "a-0", 0, 0, [3]),
    "a refusal without a question": Refuse(7),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_table_that_cannot_be_fails_the_channel(world: World, name: str) -> None:
    end = await world.sender("a")
    end.channel.on_message(1, encode(HOSTILE[name]))
    assert len(end.failures) == 1 and "what it must not" in end.failures[0]
    with pytest.raises(TransferError):
        await result(end.put(LegKey("a-0", 0), ALL_LAYERS, [1]))
    assert not world.pool.tensor.any()


async def test_an_answer_for_another_put_fails_the_channel(world: World) -> None:
    end = await world.sender("a")
    end.deaf = True
    future = end.put(LegKey("a-0", 0), ALL_LAYERS, [1, 2])
    end.channel.on_message(1, encode(Lend(0, "a-0", 0, 0, [3])))
    assert len(end.failures) == 1
    await asyncio.to_thread(end.channel.close)
    with pytest.raises(TransferError, match="another put"):
        await result(future)


async def test_what_cannot_be_read_fails_the_channel_or_is_raised(world: World) -> None:
    end = await world.sender("a")
    with pytest.raises(msgspec.DecodeError):
        world.receiver.on_message("a", 1, b"\xc1", end.hear)
    end.channel.on_message(1, b"\xc1")
    assert len(end.failures) == 1


@pytest.mark.parametrize(
    ("layers", "first"), [(range(4, 8), 0), (range(-1, 2), 0), (range(0, 6), -1), (range(0, 6), 3)], ids=str
)
async def test_a_put_that_its_lease_does_not_hold_is_for_the_receiver_to_judge(
    world: World, layers: range, first: int
) -> None:
    """It ends the lease of whoever asks for what is not there."""
    end = await world.sender("a")
    asked: list[tuple[range, range]] = []

    def resolve(key: Any, worker_id: str, epoch: int, layers: range, positions: range) -> None:
        asked.append((layers, positions))

    key = end.lease("0", [5, 6])
    world.leases.resolve = resolve
    assert not (await result(end.put(key, layers, [1, 2], first_position=first))).accepted
    assert asked == [(layers, range(first, first + 2))] and not world.pool.tensor.any()


async def test_a_question_that_nobody_answers_fails_the_channel(world: World) -> None:
    end = await world.sender("a", timeout_s=0.05)
    end.deaf = True
    future = end.put(LegKey("a-0", 0), ALL_LAYERS, [1])
    await until(lambda: end.failures)
    await asyncio.to_thread(end.channel.close)
    with pytest.raises(TransferError, match="not answered for 0.05 s"):
        await result(future)


async def test_a_test_write_that_does_not_arrive(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    end = PrefillEnd(world, "a", 5.0)
    world.ends.append(end)
    await end.open()
    monkeypatch.setattr("pdray.transfer.cuda_ipc.sender.write_peer_blocks", lambda *args, **kwargs: None)
    with pytest.raises(TransferError, match="test write of a did not arrive"):
        await end.channel.check()
    reason = world.receiver.take_failure("a")
    assert reason is not None and "did not arrive" in reason
    assert world.receiver.take_failure("a") is None and world.receiver.senders() == []


async def test_a_test_write_of_an_older_epoch_proves_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    end = await world.sender("a")
    await asyncio.to_thread(end.channel.close)
    monkeypatch.setattr("pdray.transfer.cuda_ipc.sender.write_probe", lambda *args: None)
    with pytest.raises(TransferError, match="did not arrive"):
        await end.connect()


async def test_a_pool_that_cannot_be_mapped(world: World) -> None:
    end = PrefillEnd(world, "a", 5.0)
    end.transport.refuses = "peer access is not supported"
    await end.open()
    with pytest.raises(TransferError, match="peer access"):
        await result(end.put(LegKey("a-0", 0), ALL_LAYERS, [1]))
    with pytest.raises(TransferError, match="cannot be mapped here: RuntimeError: peer access is not supported$"):
        await end.channel.check()
    assert world.receiver.take_failure("a") == "RuntimeError: peer access is not supported"


async def test_a_device_that_fails_ends_the_channel(world: World) -> None:
    end = await world.sender("a")
    key = end.lease("0", [5])

    def fails() -> bool:
        raise RuntimeError("an illegal memory access was encountered")

    event = fake_device.HostEvent()
    future = end.put(key, ALL_LAYERS, [1], ready=event)
    await until(lambda: end.channel._writing)
    query, event.query = event.query, fails
    await until(lambda: end.failures)
    assert "illegal memory access" in end.failures[0] and not future.done()
    event.query = query
    event.passed.set()


async def test_as_many_senders_as_there_is_room_for_test_writes(world: World) -> None:
    assert world.pool.spare is not None and len(world.pool.spare) == SPARE_BYTES
    offers = [await world.receiver.accept(f"p{number}", 1) for number in range(NUM_PROBES)]
    assert len({offer.probe_offset for offer in offers}) == NUM_PROBES
    end_of_blocks = world.pool.tensor.numel() * 4
    assert all(end_of_blocks <= offer.probe_offset < end_of_blocks + SPARE_BYTES for offer in offers)
    with pytest.raises(TransferError, match="64 prefill workers are connecting"):
        await world.receiver.accept("one more", 1)
    assert (await world.receiver.accept("p7", 2)).probe_offset == offers[7].probe_offset
    place = offers[9].probe_offset - end_of_blocks
    world.pool.spare[place : place + PROBE_BYTES] = probe_pattern(1)
    world.receiver.on_message("p9", 1, encode(Probe()), lambda payload: None)
    await until(lambda: world.receiver.senders() == ["p9"])
    assert (await world.receiver.accept("one more", 1)).probe_offset == offers[9].probe_offset


async def test_the_end_of_an_older_session_leaves_what_was_offered_since(world: World) -> None:
    """The decode worker hears of it late."""
    end = PrefillEnd(world, "a", 5.0)
    world.ends.append(end)
    await end.open()
    await world.receiver.close_link("a")
    await end.channel.check()
    await world.receiver.close_link("a")
    assert world.receiver.senders() == []
