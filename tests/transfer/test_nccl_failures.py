"""The nccl channel when a transfer hangs, an end closes, or what is said cannot be."""

from __future__ import annotations

import asyncio
import sys
import threading
from typing import Any

import pytest
import torch
from waits import result, until

from pdray.errors import TransferError
from pdray.transfer.nccl.communicator import GuardedCommunicator, open_communicator
from pdray.transfer.nccl.messages import (
    ChannelFailed,
    GrantTransfers,
    OpenCommunicators,
    RefuseTransfer,
    Staged,
    TransferDone,
    decode_to_sender,
    encode,
)

fake_device = sys.modules["fake_device"]  # see conftest.py
ALL_LAYERS = range(0, 6)


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


async def test_while_others_wait_a_hanging_transfer_is_given_up_sooner(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receiver's own deadline is far away; alone, a sender would have all of it."""
    monkeypatch.setattr("pdray.transfer.nccl.receive_thread.CROWDED_TIMEOUT_S", 0.3)
    lost, other = await world.sender("lost", timeout_s=20.0), await world.sender("other", timeout_s=20.0)
    lost.wire.faults = lambda number: False
    lost.lease(0)
    other.lease(0)
    hanging = lost.put(0, ALL_LAYERS, [1], [1])
    await until(lambda: world.receiver._granted is not None)
    assert (await result(other.put(0, ALL_LAYERS, [11], [11]))).accepted
    with pytest.raises(TransferError, match="gave up.*did not get on for 0.3 s .others waited"):
        await result(hanging)
    await until(lambda: len(lost.failures) == 1)
    assert not world.receiver._group.others_wait


async def test_a_sender_whose_connection_is_lost_is_given_up_soonest(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else waits, and other deadlines are far away: a process that was killed loses its connection at once."""
    monkeypatch.setattr("pdray.transfer.nccl.receive_thread.LOST_TIMEOUT_S", 0.1)
    lost = await world.sender("lost", timeout_s=20.0)
    lost.wire.faults = lambda number: False
    lost.lease(0)
    hanging = lost.put(0, ALL_LAYERS, [1], [1])
    await until(lambda: world.receiver._granted is not None)
    world.leases.disconnected.add("lost")
    with pytest.raises(TransferError, match="gave up.*did not get on for 0.1 s .its connection was lost"):
        await result(hanging)
    await until(lambda: world.receiver.senders() == [])


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
    world.receiver.on_message("a", 1, encode(OpenCommunicators(1024, 1, [b"?"])), sender.take)
    for message in (GrantTransfers([0]), RefuseTransfer(0), TransferDone(0, True)):
        sender.channel.on_message(1, encode(message))
    assert (await result(sender.put(0, ALL_LAYERS, [2], [2]))).accepted
    assert not world.pool[:, 1].any() and world.receiver._granted is None


async def test_a_wrong_probe_is_seen(world: Any) -> None:
    sender = await world.sender("a")
    staging = sender.staging
    write = staging.write_probe
    staging.write_probe = lambda region, epoch: write(region, epoch + 1)
    assert not (await result(sender.channel.probe())).accepted


@pytest.mark.parametrize(
    ("opening", "reason"),
    [
        (
            OpenCommunicators(1024, 2, [b"?"]),
            "x has 2 ranks, where 1 are configured; start both from one configuration",
        ),
        (OpenCommunicators(1024, 1, [b"?"] * 3), "x names 3 communicators for 1 pairs of ranks"),
    ],
)
async def test_ranks_that_were_not_expected_are_refused(world: Any, opening: Any, reason: str) -> None:
    said: list[bytes] = []
    await world.receiver.join("x", 1, opening, said.append)
    assert [decode_to_sender(message) for message in said] == [ChannelFailed(reason)]
    assert world.receiver.senders() == []


@pytest.mark.parametrize("piece_bytes", [0, 511, 10**9])
async def test_pieces_that_cannot_be_are_refused(world: Any, piece_bytes: int) -> None:
    said: list[bytes] = []
    await world.receiver.join("x", 1, OpenCommunicators(piece_bytes, 1, [b"?"]), said.append)
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


async def test_an_init_that_is_cancelled_as_it_returns_is_closed() -> None:
    """Nobody would have it then, and end it."""
    communicator = fake_device.HostCommunicator(fake_device.Wire(), print)
    opening = asyncio.create_task(open_communicator(lambda: communicator))
    await asyncio.sleep(0)
    for thread in threading.enumerate():
        if thread.name == "nccl-init":
            thread.join(20)
    asyncio.get_running_loop().call_soon(opening.cancel)  # behind what the thread has called
    with pytest.raises(asyncio.CancelledError):
        await opening
    await until(lambda: communicator.num_aborts == 1)


async def test_a_receiver_that_cannot_join_says_so(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[bytes] = []

    def fails(unique_id: bytes, rank: int) -> Any:
        raise RuntimeError("no network")

    monkeypatch.setattr(world.transport, "connect", fails)
    opening = OpenCommunicators(1024, 1, [b"?"])
    await world.receiver.join("x", 1, opening, said.append)
    assert len(said) == 1 and "no network" in decode_to_sender(said[0]).reason
    await world.receiver.join("x", 2, opening, said.append)
    assert len(said) == 2
