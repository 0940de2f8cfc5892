"""Where the router sends a request: to the worker that has its prefix, to the decode worker alone, or nowhere."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pdray.engine.kv.block_pool import hash_blocks, short_hash
from pdray.errors import NoWorkerError
from pdray.router.completion import CompletionDelta
from pdray.router.routed import RoutedRequest
from pdray.router.router import DecodePool
from pdray.sampling_params import SamplingParams
from pdray.testing.patience import PATIENCE_S
from pdray.wire.lease_messages import Credit, CreditUpdate, LeaseRequest
from pdray.wire.prefill_messages import PrefillRequest
from pdray.wire.worker_news import PrefixUpdate, pack_hashes

MakeCluster = Callable[..., Awaitable[Any]]
GREEDY = SamplingParams(temperature=0, max_tokens=8)


async def rest(request: RoutedRequest) -> list[CompletionDelta]:
    """All remaining deltas."""
    async with asyncio.timeout(PATIENCE_S):
        return [delta async for deltas in request for delta in deltas]


async def test_local_prefill(make_cluster: MakeCluster) -> None:
    """Short prompts are prefilled by the decode worker, long ones are not."""
    cluster = await make_cluster(local_prefill_max_tokens=6)
    task = cluster.submit("short", prompt="123456")
    lease = await cluster.decode.expect(LeaseRequest, "short")
    assert lease.prefill_worker_id is None
    cluster.decode.grant("short")
    request = await task
    cluster.decode.tokens("short", 0, "a", prefill_queue=0.1, prefill=0.2)
    cluster.decode.tokens("short", 1, "b", finish="length", first_decode_step=0.3)
    assert "".join(d.text for d in await rest(request)) == "ab"
    timings = request.output.timings
    assert (timings.prefill_queue, timings.prefill, timings.first_decode_step) == (0.1, 0.2, 0.3)
    assert cluster.prefill.received == []
    cluster.submit("long", prompt="1234567")
    assert (await cluster.decode.expect(LeaseRequest, "long")).prefill_worker_id == "prefill-0"


@pytest.mark.parametrize("is_guest", [False, True])
async def test_only_a_worker_with_blocks_of_its_own_computes_without_a_lease(
    is_guest: bool, make_cluster: MakeCluster
) -> None:
    """Neither a request that ends with its first token, nor one whose lease is as good as granted."""
    cluster = await make_cluster(empty=True)
    prefill, decode = cluster.new_worker("prefill-0", "prefill"), cluster.new_worker("decode-0", "decode")
    prefill.lender = "1" if is_guest else ""
    await cluster.show(prefill, decode)
    await asyncio.wait_for(cluster.router.wait_ready(), PATIENCE_S)
    one = cluster.submit("one", SamplingParams(temperature=0, max_tokens=1))
    if not is_guest:
        assert (await prefill.hear(PrefillRequest, "one")).decode_worker_id is None
        assert decode.received == []
    else:
        assert (await decode.expect(LeaseRequest, "one")).prefill_worker_id == "prefill-0"
        assert prefill.received == []
        decode.grant("one")
        asked = await prefill.hear(PrefillRequest, "one")
        assert (asked.decode_worker_id, asked.has_lease) == ("decode-0", True)
    prefill.first("one", "a", finish="length")
    assert await cluster.text_of(await one) == "a"
    cluster.submit("more", GREEDY)
    await decode.expect(LeaseRequest, "more")
    if is_guest:
        await asyncio.sleep(0.02)
        assert prefill.about("more") == []
        decode.grant("more")
    assert (await prefill.hear(PrefillRequest, "more")).has_lease is is_guest


async def test_a_first_token_of_a_guest_waits_for_credit(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(empty=True)
    prefill, decode = cluster.new_worker("prefill-0", "prefill"), cluster.new_worker("decode-0", "decode")
    prefill.lender, decode.credit = "1", Credit(free_blocks=0, free_places=0, running=1, waiting=0, leases=1)
    await cluster.show(prefill, decode)
    await asyncio.wait_for(cluster.router.wait_ready(), PATIENCE_S)
    cluster.submit("one", SamplingParams(temperature=0, max_tokens=1))
    await decode.wait(lambda: decode.wanted)
    assert prefill.received == decode.received == []
    decode.credit = Credit(free_blocks=10, free_places=4, running=0, waiting=0, leases=0)
    decode.send(CreditUpdate(decode.credit))
    await decode.expect(LeaseRequest, "one")


async def test_a_colocated_worker_serves_alone(make_cluster: MakeCluster) -> None:
    from_nowhere = await make_cluster(empty=True)
    await from_nowhere.show(from_nowhere.new_worker("both-0", "both"))
    await asyncio.wait_for(from_nowhere.router.wait_ready(), PATIENCE_S)
    task = from_nowhere.submit("r")
    assert (await from_nowhere.both.expect(LeaseRequest, "r")).prefill_worker_id is None
    from_nowhere.both.grant("r")
    from_nowhere.both.tokens("r", 0, "ab", finish="length")
    assert [d.text for d in await rest(await task)] == ["ab"]


async def test_no_worker(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(empty=True)
    assert not cluster.router.ready and cluster.router.max_model_len is None
    with pytest.raises(NoWorkerError):
        await cluster.router.submit("x", GREEDY, request_id="r")
    await cluster.show(cluster.new_worker("decode-0", "decode"))  # alone it cannot serve
    await cluster.decode.wait(lambda: cluster.decode.session)
    with pytest.raises(NoWorkerError):
        await cluster.router.submit("x", GREEDY, request_id="r")


async def test_prompts_go_where_their_prefix_is_cached(make_cluster: MakeCluster) -> None:
    """Workers tell what they have cached: all of it at first, then what has come and gone."""
    cluster = await make_cluster()
    other = cluster.new_worker("prefill-1", "prefill")
    await cluster.show(cluster.prefill, other, cluster.decode)
    await other.wait(lambda: other.session)
    prompt = list(range(1, 50))
    hashes = [short_hash(block_hash) for block_hash in hash_blocks(prompt, 16)]

    async def goes_to(name: str) -> str:
        task = asyncio.create_task(cluster.router.submit(prompt, GREEDY, request_id=name))
        lease = await cluster.decode.expect(LeaseRequest, name)
        task.cancel()
        return str(lease.prefill_worker_id)

    def known(worker_id: str) -> int:
        return int(cluster.router.machine.workers.links[worker_id].num_cached(hashes))

    async def told(worker: Any, message: PrefixUpdate, num_blocks: int) -> None:
        worker.send(message)
        async with asyncio.timeout(PATIENCE_S):
            while known(worker.worker_id) != num_blocks:
                await asyncio.sleep(0.005)

    assert await goes_to("a") == "prefill-0"
    await told(other, PrefixUpdate(pack_hashes(hashes[:2]), is_all=True), 2)
    assert await goes_to("b") == "prefill-1"
    await told(cluster.prefill, PrefixUpdate(pack_hashes(hashes)), 3)
    assert await goes_to("c") == "prefill-0"
    await told(cluster.prefill, PrefixUpdate(b"", pack_hashes(hashes[1:2])), 1)
    assert await goes_to("d") == "prefill-1"
    await told(other, PrefixUpdate(b"", is_all=True), 0)
    assert await goes_to("e") == "prefill-0"


async def test_the_decode_workers_blocks(make_cluster: MakeCluster) -> None:
    """As they have told last; of the prefill workers nothing."""
    cluster = await make_cluster()
    cluster.decode.credit = Credit(free_blocks=5, free_places=1, running=2, waiting=0, leases=2)
    cluster.decode.send(CreditUpdate(cluster.decode.credit))
    info = cluster.decode.info
    await cluster.settled(lambda: cluster.router.pools == [DecodePool(info.num_blocks, 5, info.block_size)])
