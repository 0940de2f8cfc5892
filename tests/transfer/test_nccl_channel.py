"""The nccl channel over fake streams and communicators: what arrives, in which order, and what never happens."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from typing import Any

import pytest
import torch
from waits import result, until

from pdray.transfer.channel import PutResult
from pdray.transfer.nccl.messages import GrantTransfers, RefuseTransfer
from pdray.transfer.nccl.staging import ID_AREA_BYTES, NUM_SLOTS
from pdray.wire.message import LegKey

ALL_LAYERS = range(0, 6)


async def test_puts_of_any_size_arrive_in_order(world: Any) -> None:
    """The largest is a whole pool, many times the staging."""
    sender = await world.sender("a")
    rng, futures, keys = random.Random(3), [], []
    for number, num_blocks in enumerate([1, 59, 7, 30, 2, 16, 17, 59]):
        blocks = rng.sample(range(1, 60), num_blocks)
        layers = ALL_LAYERS if number % 2 else range(number % 5, 6)
        keys.append(sender.lease(number))
        futures.append((sender.put(number, layers, blocks, blocks), layers, blocks))
    for future, layers, blocks in futures:
        done = await result(future)
        assert done.accepted and done.seconds > 0
        assert done.num_bytes == len(layers) * len(blocks) * world.staging.bytes_per_block
    assert torch.equal(world.pool[:, 1:], sender.pool[:, 1:])
    assert not world.pool[:, 0].any()
    assert world.leases.received == keys
    assert sender.wire.num_sends > 20, "the large ones went in pieces"


@pytest.mark.parametrize("slow", ["pack", "send", "unpack"])
async def test_whatever_is_slow_no_piece_overtakes_another_step(world: Any, slow: str) -> None:
    """Each put goes through the whole ring several times."""
    sender = await world.sender("a")
    pack_stream, send_stream = sender.transport.streams
    stream = {"pack": pack_stream, "send": send_stream, "unpack": world.unpack_stream}[slow]
    stream.before_work = lambda: time.sleep(0.002)
    futures = []
    for number in range(2):
        sender.lease(number)
        futures.append(sender.put(number, range(3 * number, 3 * number + 3), list(range(60)), list(range(59, -1, -1))))
    assert all([(await result(future)).accepted for future in futures])
    assert torch.equal(world.pool, sender.pool.flip(1))


async def test_blocks_go_where_they_should(world: Any) -> None:
    sender = await world.sender("a")
    sender.lease(0)
    assert (await result(sender.put(0, range(2, 5), [4, 9, 1], [33, 5, 40]))).accepted
    assert torch.equal(world.pool[2:5, [33, 5, 40]], sender.pool[2:5, [4, 9, 1]])
    world.pool[2:5, [33, 5, 40]] = 0
    assert not world.pool.any()


async def test_a_source_is_read_only_once_it_is_ready(world: Any) -> None:
    sender = await world.sender("a")
    event = type(sender.transport.streams[0].record())()
    sender.lease(0)
    sender.pool[:, 3] = -1.0
    future = sender.put(0, ALL_LAYERS, [3], [3], ready=event)
    await asyncio.sleep(0.05)
    assert len(world.staged) == 1, "nothing but the probe was announced"
    sender.pool[:, 3] = 7.0
    event.passed.set()
    assert (await result(future)).accepted
    assert (world.pool[:, 3] == 7.0).all()


async def test_many_senders_take_turns(world: Any) -> None:
    """One grant at a time: world.check() asserts that no two senders' receives were posted at once."""
    senders = [await world.sender(f"s{i}") for i in range(4)]
    futures = []
    for number in range(6):
        for index, sender in enumerate(senders):
            blocks = list(range(1 + 14 * index, 15 + 14 * index))
            sender.lease(number)
            futures.append(sender.put(number, range(number, number + 1), blocks, blocks))
    assert all([(await result(future)).accepted for future in futures])
    for index, sender in enumerate(senders):
        blocks = slice(1 + 14 * index, 15 + 14 * index)
        assert torch.equal(world.pool[:, blocks], sender.pool[:, blocks])
        assert [key for key in world.leases.received if key.request_id.startswith(sender.name)] == [
            LegKey(f"{sender.name}-{number}", 0) for number in range(6)
        ]


async def test_what_waits_is_granted_together_and_senders_do_not_starve(world: Any) -> None:
    """While one large put is received, small ones of two senders pile up."""
    first, second = await world.sender("a"), await world.sender("b")
    gate = threading.Event()
    first.wire.faults = lambda number: gate.wait(20)
    futures = []
    for sender, base in ((first, 1), (second, 30)):
        for number in range(5):
            sender.lease(number)
            futures.append(sender.put(number, ALL_LAYERS, [base + number], [base + number]))
    await until(lambda: len(world.staged) == 2 + 10)
    gate.set()
    assert all([(await result(future)).accepted for future in futures])
    grants = [m.seqs for s in (first, second) for m in s.replies if isinstance(m, GrantTransfers)]
    assert max(len(seqs) for seqs in grants) >= 4


async def test_without_a_lease_nothing_is_sent(world: Any) -> None:
    sender = await world.sender("a")
    sends = sender.wire.num_sends
    sender.lease(1)
    refused, large = sender.put(0, ALL_LAYERS, [1], [1]), sender.put(2, ALL_LAYERS, list(range(60)), list(range(60)))
    granted = sender.put(1, ALL_LAYERS, [2], [2])
    assert await result(refused) == PutResult(False, 0, refused.result().seconds)
    assert not (await result(large)).accepted
    assert (await result(granted)).accepted
    assert sender.wire.num_sends == sends + 1
    assert sum(isinstance(m, RefuseTransfer) for m in sender.replies) == 2
    await until(lambda: len(sender.staging.ids) == 0)  # freed by the channel's thread, after the result
    assert not world.pool[:, 1].any()


@pytest.mark.parametrize("written", [0, 1, 4])
async def test_a_lease_that_ends_on_the_way_does_not_count(world: Any, written: int) -> None:
    """It is held until what was granted has been written, into its own blocks alone; another put goes on."""
    sender = await world.sender("a")
    gate, begun = threading.Event(), []

    def slow() -> None:
        begun.append(1)
        assert len(begun) <= written + 1 or gate.wait(20)

    world.unpack_stream.before_work = slow
    key = sender.lease(0)
    future = sender.put(0, ALL_LAYERS, list(range(1, 41)), list(range(1, 41)))
    await until(lambda: len(begun) == written + 2)
    world.leases.open.pop(key)
    freed: list[bool] = []
    world.writes.when_done(key, lambda: freed.append(True))
    await asyncio.sleep(0.02)
    assert not freed and not future.done()
    gate.set()
    assert not (await result(future)).accepted and world.leases.received == []
    await until(lambda: freed)
    assert not world.pool[:, 0].any() and not world.pool[:, 41:].any()
    sender.lease(1)
    assert (await result(sender.put(1, ALL_LAYERS, [50], [50]))).accepted, "the channel goes on"


async def test_a_lease_is_not_freed_while_a_piece_is_written(world: Any) -> None:
    sender = await world.sender("a")
    gate, freed = threading.Event(), []
    world.unpack_stream.before_work = lambda: gate.wait(20)
    key = sender.lease(0)
    world.writes.when_done(key, lambda: freed.append("before"))
    future = sender.put(0, ALL_LAYERS, [5], [5])
    await until(lambda: world.writes._number)
    await until(lambda: sender.wire.num_sends == 2 and world.receiver._group._threads[0]._unpacking)
    await until(lambda: all(each.done.query() for each in list(world.receiver._group._threads[0]._receiving)))
    world.writes.when_done(key, lambda: freed.append("after"))
    closing = asyncio.create_task(world.receiver.close_link("a"))
    await asyncio.sleep(0.05)
    assert freed == ["before"] and not closing.done()
    gate.set()
    await closing
    assert freed == ["before", "after"] and torch.equal(world.pool[:, 5], sender.pool[:, 5])
    await asyncio.to_thread(sender.channel.close)
    assert future.done()


@pytest.mark.parametrize("factor", [0.6, 2])
async def test_ends_with_stagings_of_different_sizes_cut_alike(world: Any, factor: float) -> None:
    """Into the pieces of the smaller one."""
    slots_bytes = int(NUM_SLOTS * world.staging.piece_bytes * factor)
    sender = await world.sender("a", staging_bytes=ID_AREA_BYTES + slots_bytes)
    futures = []
    for number in range(3):
        sender.lease(number)
        blocks = list(range(1 + number, 58, 3))
        futures.append(sender.put(number, ALL_LAYERS, blocks, blocks))
    assert all([(await result(future)).accepted for future in futures])
    assert torch.equal(world.pool[:, 1:58], sender.pool[:, 1:58])


@pytest.mark.parametrize("seed", range(6))
async def test_blocks_of_a_freed_lease_are_never_written_again(world: Any, seed: int) -> None:
    """Legs end at any time. Once the writer has stopped and no piece is being written, their blocks get a new owner."""
    rng = random.Random(seed)
    senders = [await world.sender(f"s{i}") for i in range(3)]
    free = list(range(1, 60))
    owned: dict[int, float] = {}  # block -> its new owner's value

    async def leg(number: int) -> None:
        sender, count = rng.choice(senders), rng.randint(1, 12)
        while len(free) < count:
            await asyncio.sleep(0.001)
        blocks = [free.pop(rng.randrange(len(free))) for _ in range(count)]
        for block in blocks:
            owned.pop(block, None)
        key = sender.lease(number)
        puts = [sender.put(number, range(i, i + 2), blocks, blocks) for i in (0, 2, 4)]
        cancelled = rng.random() < 0.6
        if cancelled:
            await asyncio.sleep(rng.random() * 0.02)
            world.leases.open.pop(key, None)
        done = [await result(put) for put in puts]
        if not cancelled:
            assert all(each.accepted for each in done)
            assert torch.equal(world.pool[:, blocks], sender.pool[:, blocks])
        world.leases.open.pop(key, None)
        freed = asyncio.get_running_loop().create_future()
        world.writes.when_done(key, lambda: freed.set_result(None))
        await freed
        world.pool[:, blocks] = float(number + 100)
        owned.update(dict.fromkeys(blocks, float(number + 100)))
        free.extend(blocks)

    world.unpack_stream.before_work = lambda: threading.Event().wait(rng.random() * 0.002)
    await asyncio.gather(*(leg(number) for number in range(40)))
    await asyncio.sleep(0.05)
    for block, value in owned.items():
        assert (world.pool[:, block] == value).all(), block
