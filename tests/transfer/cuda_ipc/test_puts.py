"""The cuda_ipc channel over memory of one process: what arrives, and when it is told."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest
import torch
from cuda_ipc_world import ALL_LAYERS, CPU, LAYOUT, NUM_BLOCKS, World, assert_, fake_device
from waits import result, until

from pdray.errors import TransferError
from pdray.testing.patience import PATIENCE_S
from pdray.transfer.channel import PutResult
from pdray.transfer.cuda_ipc import outgoing as outgoing_module
from pdray.transfer.cuda_ipc.block_ids import BlockIds
from pdray.transfer.cuda_ipc.messages import Ask, Refuse, Written
from pdray.wire.message import LegKey


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
    end.channel._writer.ids = BlockIds(CPU, 256)
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
