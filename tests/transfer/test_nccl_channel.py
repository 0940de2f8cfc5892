"""The nccl channel over fake streams and communicators: what arrives, in which order, and what never happens."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
import time
from typing import Any

import pytest
import torch

from pdray.errors import TransferError
from pdray.testing.patience import PATIENCE_S
from pdray.transfer.channel import PutResult
from pdray.transfer.nccl.communicator import GuardedCommunicator, open_communicator
from pdray.transfer.nccl.messages import (
    ChannelFailed,
    GrantTransfers,
    OpenCommunicator,
    RefuseTransfer,
    Staged,
    TransferDone,
    decode_to_sender,
    encode,
)
from pdray.transfer.nccl.staging import ID_AREA_BYTES, NUM_SLOTS
from pdray.wire.message import LegKey

fake_device = sys.modules["fake_device"]  # see conftest.py
ALL_LAYERS = range(0, 6)


async def result(future: Any) -> PutResult:
    async with asyncio.timeout(PATIENCE_S):
        return await asyncio.wrap_future(future)


async def until(condition: Any) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.002)


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
    await until(lambda: len(sender.channel._staging.ids) == 0)  # freed by the channel's thread, after the result
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
    world.writes.when_done(key, lambda: freed.append("after"))
    closing = asyncio.create_task(world.receiver.close_link("a"))
    await asyncio.sleep(0.05)
    assert freed == ["before"] and not closing.done()
    gate.set()
    await closing
    assert freed == ["before", "after"] and torch.equal(world.pool[:, 5], sender.pool[:, 5])
    await asyncio.to_thread(sender.channel.close)
    assert future.done()


async def test_a_hanging_transfer_fails_alone_and_the_pair_connects_again(hasty: Any) -> None:
    """The receiver's deadline: the sender's bytes never come. Another sender goes on, and so does this one, in the next
    epoch and on the same staging."""
    lost, other = await hasty.sender("lost", timeout_s=20.0), await hasty.sender("other", timeout_s=20.0)
    lost.wire.faults = lambda number: False
    for number in range(3):
        lost.lease(number)
        other.lease(number)
    hanging = [lost.put(number, ALL_LAYERS, [1 + number], [1 + number]) for number in range(3)]
    await until(lambda: hasty.receiver._granted is not None)
    fine = [other.put(number, ALL_LAYERS, [11 + number], [11 + number]) for number in range(3)]
    assert all([(await result(future)).accepted for future in fine])
    for future in hanging:
        with pytest.raises(TransferError, match="gave up.*did not get on for 0.3 s"):
            await result(future)
    await until(lambda: len(lost.failures) == 1)
    with pytest.raises(TransferError, match="gave up"):
        await result(lost.put(9, ALL_LAYERS, [1], [1]))
    await asyncio.to_thread(lost.channel.close)
    await lost.connect()
    again = [lost.put(number, ALL_LAYERS, [1 + number], [1 + number]) for number in range(3)]
    assert all([(await result(future)).accepted for future in again])
    assert torch.equal(hasty.pool[:, 1:4], lost.pool[:, 1:4])


async def test_the_senders_own_deadline(world: Any) -> None:
    """The receiver has granted and does not receive; its deadline is longer."""
    sender = await world.sender("a", timeout_s=0.3)
    sender.wire.faults = lambda number: False
    sender.lease(0)
    with pytest.raises(TransferError, match="did not get on for 0.3 s"):
        await result(sender.put(0, ALL_LAYERS, [1], [1]))
    await until(lambda: len(sender.failures) == 1)
    assert sender.transport.communicators[-1].num_aborts == 1


async def test_a_put_that_nobody_answers_fails_too(world: Any) -> None:
    sender = await world.sender("a", timeout_s=0.1)
    world.receiver.on_message = lambda *_: None
    with pytest.raises(TransferError, match="did not get on"):
        await result(sender.put(0, ALL_LAYERS, [1], [1]))


@pytest.mark.parametrize("side", ["sender", "receiver"])
async def test_closing_with_transfers_in_flight(world: Any, side: str) -> None:
    sender = await world.sender("a")
    sender.wire.faults = lambda number: number < 3
    futures = []
    for number in range(6):
        sender.lease(number)
        futures.append(sender.put(number, ALL_LAYERS, list(range(1, 30)), list(range(1, 30))))
    await until(lambda: sender.wire.num_sends == 4)
    if side == "sender":
        await asyncio.gather(*(asyncio.to_thread(sender.channel.close) for _ in range(3)))
        assert sender.failures == []
        await world.receiver.close_link("a")
    else:
        await world.receiver.close_link("a")
        await asyncio.to_thread(sender.channel.close)
    for future in futures:
        with pytest.raises(TransferError):
            await result(future)
    assert all(communicator.num_aborts == 1 for communicator in sender.transport.communicators)
    await sender.connect()
    assert (await result(sender.put(1, ALL_LAYERS, [7], [7]))).accepted


async def test_messages_of_another_epoch_are_ignored(world: Any) -> None:
    sender = await world.sender("a")
    old = encode(Staged(0, "a-0", 0, 0, 6, 0, 1))
    await asyncio.to_thread(sender.channel.close)
    await sender.connect()
    sender.lease(0)
    world.receiver.on_message("a", 1, old, sender.take)
    world.receiver.on_message("nobody", 2, old, sender.take)
    world.receiver.on_message("a", 1, encode(OpenCommunicator(1024)), sender.take)
    for message in (GrantTransfers([0]), RefuseTransfer(0), TransferDone(0, True)):
        sender.channel.on_message(1, encode(message))
    assert (await result(sender.put(0, ALL_LAYERS, [2], [2]))).accepted
    assert not world.pool[:, 1].any() and world.receiver._granted is None


async def test_a_wrong_probe_is_seen(world: Any) -> None:
    sender = await world.sender("a")
    staging = sender.channel._staging
    write = staging.write_probe
    staging.write_probe = lambda region, epoch: write(region, epoch + 1)
    assert not (await result(sender.channel.probe())).accepted


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


@pytest.mark.parametrize("piece_bytes", [0, 511, 10**9])
async def test_pieces_that_cannot_be_are_refused(world: Any, piece_bytes: int) -> None:
    said: list[bytes] = []
    await world.receiver.join("x", 1, piece_bytes, print, said.append)
    limits = f"{world.staging.bytes_per_block} to {world.staging.piece_bytes}"
    assert [decode_to_sender(message) for message in said] == [
        ChannelFailed(f"x sends pieces of {piece_bytes} bytes; here they have {limits}")
    ]
    assert world.receiver.senders() == []


async def test_an_abort_waits_for_a_call_and_no_call_follows_it() -> None:
    """A call during the abort would use what the abort has freed."""
    entered, leave, events = threading.Event(), threading.Event(), []

    class Slow:
        def send(self, *_: Any) -> None:
            events.append("send")
            entered.set()
            leave.wait(20)
            events.append("sent")

        def abort(self) -> None:
            events.append("abort")

    guarded = GuardedCommunicator(Slow())  # type: ignore[arg-type]
    sending = asyncio.create_task(asyncio.to_thread(guarded.send, 0, 1, None))  # type: ignore[arg-type]
    await asyncio.to_thread(entered.wait)
    closing = [asyncio.create_task(asyncio.to_thread(guarded.close)) for _ in range(2)]
    await until(lambda: guarded.closed)
    with pytest.raises(TransferError):
        guarded.send(0, 1, None)  # type: ignore[arg-type]
    leave.set()
    await asyncio.gather(*closing)
    with pytest.raises(TransferError):
        await sending
    assert events == ["send", "sent", "abort"]


async def test_an_abort_ends_a_call_that_hangs() -> None:
    aborted = threading.Event()

    class Hanging:
        def recv(self, *_: Any) -> None:
            assert aborted.wait(20)

        def abort(self) -> None:
            aborted.set()

    guarded = GuardedCommunicator(Hanging())  # type: ignore[arg-type]
    receiving = asyncio.create_task(asyncio.to_thread(guarded.recv, 0, 1, None))  # type: ignore[arg-type]
    await until(lambda: guarded._num_calls)
    await asyncio.to_thread(guarded.close)
    with pytest.raises(TransferError):
        await receiving


async def test_an_init_that_fails_or_hangs() -> None:
    stuck, gate = [], threading.Event()
    late = fake_device.HostCommunicator(fake_device.Wire(), print)

    def fails() -> Any:
        raise RuntimeError("Duplicate GPU detected")

    def hangs() -> Any:
        gate.wait(20)
        return late

    with pytest.raises(TransferError, match="Duplicate GPU"):
        await open_communicator(fails)
    with pytest.raises(TransferError, match="has not returned after 0.05 s"):
        await open_communicator(hangs, timeout_s=0.05, on_stuck=stuck.append)
    assert len(stuck) == 1
    gate.set()
    await until(lambda: late.num_aborts == 1)


async def test_a_receiver_that_cannot_join_says_so(world: Any) -> None:
    said: list[bytes] = []

    def fails() -> Any:
        raise RuntimeError("no network")

    await world.receiver.join("x", 1, 1024, fails, said.append)
    assert len(said) == 1 and "no network" in decode_to_sender(said[0]).reason
    await world.receiver.join("x", 2, 1024, fails, said.append)
    assert len(said) == 2


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
