"""The cuda_ipc channel between workers of several ranks, which are threads here: every rank writes its heads."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_ipc_world import ALL_LAYERS, CPU, LAYOUT, NUM_BLOCKS, PrefillEnd, World, fake_device
from waits import result, until

from pdray.errors import ConfigError, HandshakeError, TransferError
from pdray.testing.patience import PATIENCE_S
from pdray.transfer.channel import Link
from pdray.transfer.cuda_ipc.block_ids import BlockIds
from pdray.transfer.cuda_ipc.rank_orders import CloseLink, WriteBlocks, encode
from pdray.transfer.cuda_ipc.writer import pack_ids
from pdray.transfer.registry import choose_kind
from pdray.wire.cluster_view import WorkerInfo

PAIRS = [(4, 1, 2), (4, 2, 1), (4, 2, 2), (4, 4, 2), (2, 4, 2), (2, 2, 4), (3, 3, 1)]


def passed_event() -> Any:
    """One of its own, so that a put has a write of its own."""
    event = fake_device.HostEvent()
    event.passed.set()
    return event


@pytest.mark.parametrize(("num_heads", "num_sources", "num_targets"), PAIRS)
async def test_blocks_arrive_with_all_their_heads(
    num_heads: int, num_sources: int, num_targets: int, world_of: Callable[[int, int], World]
) -> None:
    """In every rank that is to have them, in these blocks and layers, and nowhere else."""
    world = world_of(num_heads, num_targets)
    end = await world.sender("a", num_ranks=num_sources)
    rng, expected = random.Random(5), torch.zeros(6, NUM_BLOCKS, 2, 4, num_heads, 8)
    for number, (layers, count) in enumerate([(ALL_LAYERS, 50), (range(2, 5), 1)]):
        source, target = rng.sample(range(1, 70), count), rng.sample(range(1, NUM_BLOCKS), count)
        key = end.lease(str(number), target)
        done = await result(end.put(key, layers, source))
        assert done.accepted
        assert done.num_bytes == len(layers) * count * LAYOUT.layer_block_bytes // LAYOUT.num_kv_heads * num_heads
        expected[layers.start : layers.stop, target] = end.data[layers.start : layers.stop, source]
    assert torch.equal(world.worker.whole(), expected)
    assert [key.request_id for key in world.leases.received] == ["a-0", "a-1"]
    assert len(end.written()) == 2, "one message a put, however many ranks write"


async def test_other_ranks_begin_when_the_source_is_final(world_of: Callable[[int, int], World]) -> None:
    """Each group of layers by itself; a put is told once every rank has written."""
    world = world_of(4, 2)
    end = await world.sender("a", num_ranks=2)
    events = [fake_device.HostEvent(), fake_device.HostEvent()]
    key = end.lease("0", [5])
    futures = [
        end.put(key, layers, [3], ready=event) for layers, event in zip((range(0, 4), range(4, 6)), events, strict=True)
    ]
    await until(lambda: len(end.channel._writing) == 2)
    gate = threading.Event()
    other = end.worker.transports[1].streams[-1]
    other.before_work = lambda: gate.wait(PATIENCE_S)
    end.data.fill_(7.0)
    end.worker.fill(end.data)
    events[0].passed.set()
    await until(lambda: (world.worker.pools[0].tensor[:4, 5] == 7.0).all())
    assert not futures[0].done() and not end.written() and not world.worker.pools[1].tensor.any()
    gate.set()
    assert (await result(futures[0])).accepted and not futures[1].done()
    assert (world.worker.whole()[:4, 5] == 7.0).all() and not world.worker.whole()[4:].any()
    events[1].passed.set()
    assert (await result(futures[1])).accepted
    assert (world.worker.whole()[:, 5] == 7.0).all()


async def test_writes_wait_for_none_before_them_but_for_room(world_of: Callable[[int, int], World]) -> None:
    """They are enqueued one behind the other, also where the ids of all of them have no room at once."""
    world = world_of(4, 2)
    end = PrefillEnd(world, "a", 5.0, 2)
    world.ends.append(end)
    end.worker.kinds[1]._block_ids = [BlockIds(CPU, 128)]  # of one write
    await end.connect()
    gate, other = threading.Event(), end.worker.transports[1].streams[-1]
    other.before_work = lambda: gate.wait(PATIENCE_S)
    (ids,) = end.worker.kinds[1]._block_ids_of.values()
    keys = [end.lease(str(number), list(range(1 + 19 * number, 20 + 19 * number))) for number in range(3)]
    blocks = [list(range(1 + number, 20 + number)) for number in range(3)]
    futures = []
    for key, source in zip(keys, blocks, strict=True):
        futures.append(end.put(key, ALL_LAYERS, source, ready=passed_event()))
        await until(lambda: len(end.channel._writing) == len(futures))
    await until(lambda: len(ids.ring) == 1)
    gate.set()
    assert all([(await result(future)).accepted for future in futures])
    for number, source in enumerate(blocks):
        target = slice(1 + 19 * number, 20 + 19 * number)
        assert torch.equal(world.worker.whole()[:, target], end.data[:, source])


async def test_a_write_that_has_no_room_before_its_link_is_closed_is_not_begun(
    world_of: Callable[[int, int], World],
) -> None:
    """Nothing is mapped then: it would write to memory that is nobody's."""
    end = await world_of(4, 2).sender("a", num_ranks=2)
    (ids,) = end.worker.kinds[1]._block_ids_of.values()
    region = ids.ring.allocate(ids.ring.capacity)
    assert region is not None
    (rank,), link = end.channel._others
    write = rank.ask("cuda_ipc", encode(WriteBlocks(link, 0, 6, pack_ids([3], [5]), None)))
    rank.ask("cuda_ipc", encode(CloseLink(link)))
    transport = end.worker.transports[1]
    await until(lambda: all(mapping.closed for mapping in transport.mappings))
    ids.free(region)
    with pytest.raises(TransferError, match="no room before its channel was closed"):
        await result(write)


async def test_a_test_write_of_every_rank_must_arrive(
    world_of: Callable[[int, int], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where each writes a part of it."""
    world = world_of(4, 1)
    end = PrefillEnd(world, "a", 5.0, 4)
    world.ends.append(end)
    await end.open()
    answer = end.worker.kinds[3].begin_answer

    def writes_nothing(payload: bytes) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr("pdray.transfer.cuda_ipc.writer.write_probe", lambda *args: None)
            return answer(payload)

    monkeypatch.setattr(end.worker.kinds[3], "begin_answer", writes_nothing)
    with pytest.raises(TransferError, match="test write of a did not arrive"):
        await end.channel.check()
    assert world.receiver.senders() == []


async def test_a_pool_that_another_rank_cannot_map(world_of: Callable[[int, int], World]) -> None:
    world = world_of(4, 2)
    end = PrefillEnd(world, "a", 5.0, 2)
    end.worker.transports[1].refuses = "peer access is not supported"
    await end.open()
    with pytest.raises(TransferError, match="mapped here: TransferError: rank 1: RuntimeError: peer access"):
        await end.channel.check()
    assert "peer access" in (world.receiver.take_failure("a") or "")
    assert all(mapping.closed for mapping in end.mappings) and end.mappings


@pytest.mark.parametrize("number", [0, 3])
async def test_an_offer_of_ranks_that_share_no_heads_evenly_is_refused(
    number: int, world_of: Callable[[int, int], World]
) -> None:
    """Nothing is mapped for it."""
    end = PrefillEnd(world_of(4, 1), "a", 5.0, 2)
    offer = (await end.world.receiver.accept("a", 1))._replace(handles=(b"?",) * number)
    with pytest.raises(HandshakeError, match=f"d offers the memory of {number} ranks, by which the 4 heads"):
        await end.kind.open(Link("d", 1, print, print, print), offer)
    assert not end.mappings
    end.worker.close()


async def test_an_opening_that_is_cancelled_leaves_nothing_mapped(
    world_of: Callable[[int, int], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread maps on, and so do the other ranks."""
    end = PrefillEnd(world_of(4, 2), "a", 5.0, 2)
    begun, gate, transport = threading.Event(), threading.Event(), end.worker.transports[0]
    borrow = transport.borrow
    monkeypatch.setattr(transport, "borrow", lambda handle: (begun.set(), gate.wait(PATIENCE_S), borrow(handle))[-1])
    opening = asyncio.ensure_future(end.open())
    await until(begun.is_set)
    opening.cancel()
    await asyncio.sleep(0.01)
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert len(end.mappings) == 1 and all(mapping.closed for mapping in end.mappings)
    monkeypatch.undo()
    end.world.ends.append(end)
    await end.connect()
    assert (await result(end.put(end.lease("0", [5]), ALL_LAYERS, [3]))).accepted


async def test_a_rank_that_cannot_write_fails_the_channel(world_of: Callable[[int, int], World]) -> None:
    """The next epoch works, with the same room for ids."""
    world = world_of(4, 2)
    end = await world.sender("a", num_ranks=2)
    kind = end.worker.kinds[1]
    answer: Any = kind.begin_answer

    def fails(payload: bytes) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    kind.begin_answer = fails
    future = end.put(end.lease("0", [5]), ALL_LAYERS, [3])
    await until(lambda: end.failures)
    assert "rank 1: RuntimeError: an illegal memory access" in end.failures[0] and not future.done()
    kind.begin_answer = answer
    await asyncio.to_thread(end.channel.close)
    with pytest.raises(TransferError, match="illegal memory access"):
        await result(future)
    assert all(mapping.closed for mapping in end.mappings)
    await end.connect()
    assert (await result(end.put(end.lease("1", [6]), ALL_LAYERS, [3]))).accepted
    assert torch.equal(world.worker.whole()[:, 6], end.data[:, 3])


async def test_of_a_rank_that_dies_nothing_is_told_before_it_was_seen_dead(
    world_of: Callable[[int, int], World],
) -> None:
    """Until then its GPU may go on writing: a put that had failed would let its blocks be freed."""
    world = world_of(4, 2)
    end = await world.sender("a", num_ranks=2)
    begun, gate = threading.Event(), threading.Event()
    end.worker.transports[1].streams[-1].before_work = lambda: (begun.set(), gate.wait(PATIENCE_S))
    future = end.put(end.lease("0", [5]), ALL_LAYERS, [3])
    await until(begun.is_set)  # an order that is killed on its way would bring nothing
    end.worker.kill(1)
    closing = asyncio.ensure_future(asyncio.to_thread(end.channel.close))
    await asyncio.sleep(0.05)
    assert not future.done() and not closing.done() and not end.failures
    end.worker.dead.set()
    await closing
    with pytest.raises(TransferError, match="closed"):
        await result(future)
    gate.set()
    await until(lambda: world.worker.pools[1].tensor.any())
    for mapping in end.worker.transports[1].mappings:
        mapping.closed = True  # with the process


@pytest.mark.parametrize("peers", [["decode.0", "decode.1"], ["decode.0"]])
async def test_every_rank_must_reach_those_it_writes_to(
    peers: list[str], world_of: Callable[[int, int], World]
) -> None:
    """Else another channel is chosen, and asking for this one is refused with the GPUs that do not reach each other."""
    world = world_of(4, 2)
    end = PrefillEnd(world, "a", 5.0, 2)
    end.worker.close()
    for rank, reach in enumerate((["decode.0"], peers)):
        end.kind._gpus[rank] = end.kind._gpus[rank].__class__(f"a.{rank}", "here", reach)
    infos = [
        WorkerInfo(
            name, "1", "both", "", 0, 0, "", "cuda", "f", 1, 16, 64, 8, 64, {"cuda_ipc": kind.facts}, num_ranks=2
        )
        for name, kind in (("a", end.kind), ("decode", world.kind))
    ]
    if len(peers) == 2:
        assert choose_kind("auto", *infos).kind == choose_kind("cuda_ipc", *infos).kind == "cuda_ipc"
        return
    reason = "a's GPU a.1 cannot write to decode's decode.1"
    choice = choose_kind("auto", *infos)
    assert choice.kind == "object_store" and choice.passed_over["cuda_ipc"] == reason
    with pytest.raises(ConfigError, match=f"channel is cuda_ipc, but {reason}"):
        choose_kind("cuda_ipc", *infos)
