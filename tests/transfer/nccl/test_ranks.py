"""The nccl channel between workers of several ranks: each rank sends its heads to those that are to have them."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nccl_world import ALL_LAYERS, LAYOUT, NUM_BLOCKS, STAGING_BYTES, World, fake_device
from waits import result, until

from pdray.errors import ConfigError, HandshakeError
from pdray.transfer.channel import Link
from pdray.transfer.nccl.messages import OpenCommunicators, RefuseTransfer, Staged
from pdray.transfer.nccl.receiver import Offer

PAIRS = [(4, 1, 2), (4, 2, 1), (4, 2, 2), (4, 4, 2), (2, 4, 2), (2, 2, 4), (6, 2, 3), (1, 2, 2)]


@pytest.mark.parametrize(("num_heads", "num_sources", "num_targets"), PAIRS)
async def test_blocks_arrive_with_all_their_heads(
    num_heads: int, num_sources: int, num_targets: int, world_of: Callable[..., World]
) -> None:
    """In every rank that is to have them, in these blocks and layers, and nowhere else; in many pieces, and in one."""
    world = world_of(num_heads, num_targets, num_sources)
    end = await world.sender("a")
    rng, expected = random.Random(5), torch.zeros(6, NUM_BLOCKS, 2, 4, num_heads, 8)
    for number, (layers, count) in enumerate([(ALL_LAYERS, 50), (range(2, 5), 1), (ALL_LAYERS, 30)]):
        source, target = rng.sample(range(1, NUM_BLOCKS), count), rng.sample(range(1, NUM_BLOCKS), count)
        done = await result(end.put(end.lease(str(number), target), layers, source))
        assert done.accepted
        assert done.num_bytes == len(layers) * count * LAYOUT.layer_block_bytes // LAYOUT.num_kv_heads * num_heads
        expected[layers.start : layers.stop, target] = end.data[layers.start : layers.stop, source]
    assert torch.equal(world.worker.whole(), expected)
    assert [key.request_id for key in world.leases.received] == ["a-0", "a-1", "a-2"]
    assert sum(isinstance(message, Staged) for message in end.said) == 4, "one for each put, and for the probe"


async def test_other_ranks_send_when_the_source_is_final_and_a_put_counts_once_all_have_come(
    world_of: Callable[..., World],
) -> None:
    world = world_of(4, 2, 2)
    end = await world.sender("a")
    ready, gate = fake_device.HostEvent(), threading.Event()
    unpacking = world.worker.transports[1].streams[0]
    key = end.lease("0", [5])
    future = end.put(key, ALL_LAYERS, [3], ready=ready)
    end.data.fill_(7.0)
    end.worker.fill(end.data)
    unpacking.before_work = lambda: gate.wait(20)
    ready.passed.set()
    await until(lambda: (world.worker.pools[0].tensor[:, 5] == 7.0).all())
    freed: list[int] = []
    world.writes.when_done(key, lambda: freed.append(1))
    await asyncio.sleep(0.02)
    assert not future.done() and not world.leases.received and not freed, "its blocks are held in every rank"
    assert not world.worker.pools[1].tensor.any()
    gate.set()
    assert (await result(future)).accepted and freed and world.leases.received == [key]
    assert (world.worker.whole()[:, 5] == 7.0).all()


async def test_a_put_whose_lease_ended_is_sent_by_no_rank(world_of: Callable[..., World]) -> None:
    world = world_of(4, 2, 2)
    end = await world.sender("a")
    key = end.lease("0", [1])
    del world.leases.open[key]
    refused, granted = end.put(key, ALL_LAYERS, [1]), end.put(end.lease("1", [2]), ALL_LAYERS, [2])
    assert not (await result(refused)).accepted and (await result(granted)).accepted
    assert sum(isinstance(message, RefuseTransfer) for message in end.heard) == 1
    assert not world.worker.whole()[:, 1].any()
    assert [end.wire(rank, rank).num_sends for rank in range(2)] == [2, 2], "the probe and a put"


@pytest.mark.parametrize("sizes", [(4, 2, 2), (4, 1, 2), (4, 2, 1)])
async def test_blocks_of_a_freed_lease_are_never_written_again(
    sizes: tuple[int, int, int], world_of: Callable[..., World]
) -> None:
    """In any rank. Legs end at any time; once the writer has stopped and nothing of them is being written, their blocks
    get a new owner."""
    world, rng = world_of(*sizes), random.Random(sizes[1] + 2 * sizes[2])
    ends = [await world.sender(f"s{number}") for number in range(2)]
    free = list(range(1, NUM_BLOCKS))
    owned: dict[int, float] = {}  # block -> its new owner's value

    async def leg(number: int) -> None:
        end, count = rng.choice(ends), rng.randint(1, 12)
        while len(free) < count:
            await asyncio.sleep(0.001)
        blocks = [free.pop(rng.randrange(len(free))) for _ in range(count)]
        for block in blocks:
            owned.pop(block, None)
        key = end.lease(str(number), blocks)
        puts = [end.put(key, range(i, i + 2), blocks) for i in (0, 2, 4)]
        cancelled = rng.random() < 0.6
        if cancelled:
            await asyncio.sleep(rng.random() * 0.02)
            world.leases.open.pop(key, None)
        done = [await result(put) for put in puts]
        if not cancelled:
            assert all(each.accepted for each in done)
            assert torch.equal(world.worker.whole()[:, blocks], end.data[:, blocks])
        world.leases.open.pop(key, None)
        freed = asyncio.get_running_loop().create_future()
        world.writes.when_done(key, lambda: freed.set_result(None))
        await freed
        for pool in world.worker.pools:
            pool.tensor[:, blocks] = float(number + 100)
        owned.update(dict.fromkeys(blocks, float(number + 100)))
        free.extend(blocks)

    for transport in world.worker.transports:
        transport.streams[0].before_work = lambda: threading.Event().wait(rng.random() * 0.002)
    await asyncio.gather(*(leg(number) for number in range(24)))
    await asyncio.sleep(0.02)
    for block, value in owned.items():
        assert all((pool.tensor[:, block] == value).all() for pool in world.worker.pools), block


async def test_ranks_that_were_not_expected_are_refused_before_anything_is_entered(
    world_of: Callable[..., World],
) -> None:
    world = world_of(4, 2, 1)
    end = world.end("a")
    with pytest.raises(HandshakeError, match="d has 4 ranks, where 2 are configured; start both from one"):
        await end.kind.open(Link("d", 1, end._send, print, print), Offer(4, 4096))
    assert not end.said and not end.worker.communicators


async def test_staging_that_is_too_little_for_its_lanes_names_the_setting(
    world_of: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is shared by as many as send here."""
    monkeypatch.setattr("nccl_world.STAGING_BYTES", 19_000)
    world_of(4, 1, 1)
    with pytest.raises(
        ConfigError, match="transfer_staging_bytes is 19000 among 2 pairs of ranks, too little .* at least 36864"
    ):
        World(4, 1, 2)


async def test_what_the_sender_says_of_its_ranks(world_of: Callable[..., World]) -> None:
    """A communicator for each pair of ranks that share heads; all cut puts into pieces that fit the smallest slot."""
    world = world_of(4, 4, 2)
    end = await world.sender("a")
    opening: Any = end.said[0]
    assert isinstance(opening, OpenCommunicators) and opening.num_ranks == 2 and len(set(opening.unique_ids)) == 4
    assert opening.piece_bytes <= STAGING_BYTES // 2 // 4, "two lanes share the staging of a sender's rank"
    assert [len(transport.communicators) for transport in end.worker.transports] == [2, 2]
