"""The cuda_ipc channel and what cannot be: it fails, alone, and nothing is written where it should not."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from cuda_ipc_world import ALL_LAYERS, NUM_BLOCKS, PrefillEnd, World, fake_device
from waits import result, until

from pdray.errors import TransferError
from pdray.transfer.cuda_ipc.messages import Ask, Lend, Places, Probe, Proven, Refuse, Written, encode
from pdray.wire.message import LegKey


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
