"""The nccl channel between workers of several ranks when a lane hangs, an end closes, or a rank dies."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nccl_world import ALL_LAYERS, PrefillEnd, World
from waits import result, until

from pdray.errors import TransferError
from pdray.transfer.nccl.messages import ChannelFailed

LANES = [(0, 0), (1, 1)]  # of two ranks to two


async def connects_again(end: PrefillEnd) -> None:
    """In the next epoch, over the same stagings; and a put arrives."""
    await end.disconnect()
    await end.connect()
    assert (await result(end.put(end.lease("again", [50, 51]), ALL_LAYERS, [3, 4]))).accepted
    assert torch.equal(end.world.worker.whole()[:, [50, 51]], end.data[:, [3, 4]])


@pytest.mark.parametrize("lane", LANES)
async def test_one_lane_that_hangs_ends_its_sender_alone(lane: tuple[int, int], world_of: Callable[..., World]) -> None:
    """By the receiver's deadline. Another sender goes on, and so does this one, in the next epoch."""
    world = world_of(4, 2, 2, timeout_s=0.3)
    lost, other = await world.sender("lost"), await world.sender("other")
    lost.wire(*lane).faults = lambda number: False
    hanging = [lost.put(lost.lease(str(i), [1 + i]), ALL_LAYERS, [1 + i]) for i in range(3)]
    await until(lambda: world.receiver._granted is not None)
    fine = [other.put(other.lease(str(i), [11 + i]), ALL_LAYERS, [11 + i]) for i in range(3)]
    assert all([(await result(future)).accepted for future in fine])
    for future in hanging:
        with pytest.raises(TransferError, match="gave up.*did not get on for 0.3 s"):
            await result(future)
    await until(lambda: len(lost.failures) == 1)
    assert [key.request_id for key in world.leases.received] == ["other-0", "other-1", "other-2"]
    await connects_again(lost)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(("why", "name"), [("others waited", "CROWDED"), ("its connection was lost", "LOST")])
async def test_other_ranks_know_how_patient_to_be(
    why: str, name: str, lane: tuple[int, int], world_of: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As rank 0 does, which sees who waits, and the sender's connection; every other deadline is far away."""
    monkeypatch.setattr(f"pdray.transfer.nccl.receive_thread.{name}_TIMEOUT_S", 0.2)
    world = world_of(4, 2, 2)
    lost, other = await world.sender("lost"), await world.sender("other")
    lost.wire(*lane).faults = lambda number: False
    hanging = lost.put(lost.lease("0", [1]), ALL_LAYERS, [1])
    await until(lambda: world.receiver._granted is not None)
    if name == "LOST":
        world.leases.disconnected.add("lost")
    else:
        assert (await result(other.put(other.lease("0", [11]), ALL_LAYERS, [11]))).accepted
    with pytest.raises(TransferError, match=f"gave up.*did not get on for 0.2 s .{why}"):
        await result(hanging)
    await until(lambda: world.receiver.senders() == ["other"])


@pytest.mark.parametrize("lane", LANES)
async def test_the_senders_own_deadline_in_every_rank(lane: tuple[int, int], world_of: Callable[..., World]) -> None:
    """The receiver's is longer. A put has failed only when no rank sends it any more."""
    world = world_of(4, 2, 2)
    end = await world.sender("a", timeout_s=0.3)
    end.wire(*lane).faults = lambda number: False
    with pytest.raises(TransferError, match="did not get on for 0.3 s"):
        await result(end.put(end.lease("0", [1]), ALL_LAYERS, [1]))
    assert [each.num_aborts for each in end.worker.communicators] == [1, 1]
    await until(lambda: len(end.failures) == 1)
    await connects_again(end)


@pytest.mark.parametrize("side", ["sender", "receiver"])
@pytest.mark.parametrize("sizes", [(4, 2, 2), (4, 1, 2), (4, 2, 1)])
async def test_closing_with_transfers_in_flight(
    side: str, sizes: tuple[int, int, int], world_of: Callable[..., World]
) -> None:
    """Everything fails, and nothing is left in any rank."""
    world = world_of(*sizes)
    end = await world.sender("a")
    last = sizes[2] - 1, sizes[1] - 1
    wire = end.wire(*last)
    wire.faults = lambda number: number < 3
    blocks = list(range(1, 30))
    futures = [end.put(end.lease(str(number), blocks), ALL_LAYERS, blocks) for number in range(6)]
    await until(lambda: wire.num_sends == 4)
    if side == "sender":
        await asyncio.gather(*(end.disconnect() for _ in range(3)))
        assert end.failures == []
        await world.receiver.close_link("a")
    else:
        await world.receiver.close_link("a")
        await end.disconnect()
    assert not world.writes._number
    for future in futures:
        with pytest.raises(TransferError):
            await result(future)
    assert all(each.num_aborts == 1 for each in (*end.worker.communicators, *world.worker.communicators))
    await connects_again(end)


async def test_of_a_senders_rank_that_dies_nothing_is_told_before_it_was_seen_dead(
    world_of: Callable[..., World],
) -> None:
    """Until then it may go on sending: a put that had failed would let its blocks be freed."""
    world = world_of(4, 2, 2)
    world.some_died = True
    end = await world.sender("a")
    end.wire(1, 1).faults = lambda number: False
    future = end.put(end.lease("0", [5]), ALL_LAYERS, [3])
    await until(lambda: end.wire(1, 1).num_sends == 2)
    end.worker.kill(1)
    closing = asyncio.ensure_future(end.disconnect())
    await asyncio.sleep(0.05)
    assert not future.done() and not closing.done()
    end.worker.dead.set()
    await closing
    with pytest.raises(TransferError, match="closed"):
        await result(future)
    assert not world.leases.received


async def test_of_a_receivers_rank_that_dies_blocks_are_held_until_it_was_seen_dead(
    world_of: Callable[..., World],
) -> None:
    """It may be writing into them."""
    world = world_of(4, 2, 2)
    world.some_died = True
    end = await world.sender("a")
    gate, begun = threading.Event(), threading.Event()
    world.worker.transports[1].streams[0].before_work = lambda: (begun.set(), gate.wait(20))
    key = end.lease("0", [5])
    future = end.put(key, ALL_LAYERS, [3])
    await until(begun.is_set)
    freed: list[int] = []
    world.writes.when_done(key, lambda: freed.append(1))
    world.worker.kill(1)
    closing = asyncio.ensure_future(world.receiver.close_link("a"))
    await asyncio.sleep(0.05)
    assert not freed and not closing.done()
    world.worker.dead.set()
    await closing
    assert freed and not world.leases.received
    gate.set()
    await end.disconnect()
    with pytest.raises(TransferError):
        await result(future)


async def test_a_wrong_probe_of_one_rank_is_seen(world_of: Callable[..., World]) -> None:
    world = world_of(4, 2, 2)
    end = world.end("a")
    await end.open()
    (stagings,) = end.worker.kinds[1]._stagings_of.values()
    write = stagings[0].write_probe
    stagings[0].write_probe = lambda slot, epoch: write(slot, epoch + 1)  # type: ignore[method-assign]
    assert end.channel is not None
    with pytest.raises(TransferError, match="a probe of the channel of epoch 1 did not arrive as it was sent"):
        await end.channel.check()


@pytest.mark.parametrize("side", ["sender", "receiver"])
@pytest.mark.parametrize("rank", [0, 1])
async def test_a_rank_that_cannot_connect(
    side: str, rank: int, world_of: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the others have opened is closed again, at the end that knows; the other end hears of it, or connects in
    vain. The next epoch works."""
    world = world_of(4, 2, 2)
    end = world.end("a")
    worker = end.worker if side == "sender" else world.worker
    connect = worker.transports[rank].connect

    def fails(unique_id: bytes, role: int) -> Any:
        connect(unique_id, role)
        raise RuntimeError("no network")

    with monkeypatch.context() as patch:
        patch.setattr(worker.transports[rank], "connect", fails)
        if side == "sender":
            with pytest.raises(TransferError, match="no network"):
                await end.open()
        else:
            await end.open()
            await until(lambda: end.heard)
            assert isinstance(end.heard[0], ChannelFailed) and "no network" in end.heard[0].reason
    worker.transports[rank].communicators.pop()  # the driver's
    own = [each for each in worker.communicators if each.num_aborts]
    await until(lambda: len([each for each in worker.communicators if each.num_aborts]) == 1)
    assert len(own) <= 1
    await world.receiver.close_link("a")
    await connects_again(end)


async def test_an_opening_that_is_cancelled_is_taken_back_in_every_rank(
    world_of: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what opens only then."""
    world = world_of(4, 2, 2)
    end = world.end("a")
    gate, connect = threading.Event(), end.worker.transports[1].connect
    entered = threading.Event()

    def slow(unique_id: bytes, role: int) -> Any:
        entered.set()
        gate.wait(20)
        return connect(unique_id, role)

    monkeypatch.setattr(end.worker.transports[1], "connect", slow)
    opening = asyncio.ensure_future(end.open())
    await until(entered.is_set)
    await until(lambda: len(end.worker.transports[0].communicators) == 1)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    gate.set()
    await until(lambda: [each.num_aborts for each in end.worker.communicators] == [1, 1])
    await world.receiver.close_link("a")
    await until(lambda: [each.num_aborts for each in world.worker.communicators] == [1, 1])
    await connects_again(end)
