"""The test write of the cuda_ipc channel, before which a sender is told nothing."""

from __future__ import annotations

import asyncio

import pytest
from cuda_ipc_world import PrefillEnd, World
from waits import until

from pdray.errors import TransferError
from pdray.transfer.cuda_ipc.messages import (
    NUM_PROBES,
    PROBE_BYTES,
    SPARE_BYTES,
    Ask,
    Places,
    Probe,
    Written,
    encode,
    probe_pattern,
)


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


async def test_a_test_write_that_does_not_arrive(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    end = PrefillEnd(world, "a", 5.0)
    world.ends.append(end)
    await end.open()
    monkeypatch.setattr("pdray.transfer.cuda_ipc.writer.write_peer_blocks", lambda *args, **kwargs: None)
    with pytest.raises(TransferError, match="test write of a did not arrive"):
        await end.channel.check()
    reason = world.receiver.take_failure("a")
    assert reason is not None and "did not arrive" in reason
    assert world.receiver.take_failure("a") is None and world.receiver.senders() == []


async def test_a_test_write_of_an_older_epoch_proves_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    end = await world.sender("a")
    await asyncio.to_thread(end.channel.close)
    monkeypatch.setattr("pdray.transfer.cuda_ipc.writer.write_probe", lambda *args: None)
    with pytest.raises(TransferError, match="did not arrive"):
        await end.connect()


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
