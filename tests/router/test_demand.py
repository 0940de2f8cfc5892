"""What a request asks of workers: who is large enough, who is asked when, and for how much."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import pytest

from pdray.errors import InvalidRequestError
from pdray.sampling_params import SamplingParams
from pdray.testing.patience import PATIENCE_S
from pdray.wire.lease_messages import Credit, CreditUpdate, CreditWanted, LeaseRequest
from pdray.wire.peers import Role
from pdray.wire.prefill_messages import PrefillRequest

MakeCluster = Callable[..., Awaitable[Any]]
PLENTY = Credit(free_blocks=1000, free_places=64, running=0, waiting=0, leases=0)
PROMPT = [1] * 30  # with 64 tokens of head-room 6 blocks of 16


def greedy(max_tokens: int | None, n: int = 1) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, n=n)


async def tell(cluster: Any, worker: Any, credit: Credit) -> None:
    worker.credit = credit
    worker.send(CreditUpdate(credit))
    await cluster.settled(lambda: cluster.router.machine.workers.links[worker.worker_id].credit == credit)


def worker_of(cluster: Any, name: str, role: Literal["prefill", "decode"], incarnation: str = "1", **sizes: int) -> Any:
    worker = cluster.new_worker(name, role, incarnation)
    for field, size in sizes.items():
        setattr(worker, field, size)
    return worker


async def make_small(make_cluster: MakeCluster, *decodes: dict[str, int], **config: Any) -> Any:
    """A cluster whose decode workers have these sizes."""
    cluster = await make_cluster(empty=True, num_decode_workers=len(decodes), **config)
    workers = [worker_of(cluster, f"decode-{i}", "decode", **sizes) for i, sizes in enumerate(decodes)]
    await cluster.show(worker_of(cluster, "prefill-0", "prefill"), *workers)
    await cluster.settled(lambda: len(cluster.router.machine.workers.open_links(Role.DECODE)) == len(decodes))
    await cluster.router.wait_ready()
    return cluster


async def test_what_no_pool_can_hold_is_refused_at_once(make_cluster: MakeCluster) -> None:
    cluster = await make_small(make_cluster, {"num_blocks": 10}, max_queue_wait_s=1000)
    with pytest.raises(InvalidRequestError, match="3 completions of 60 tokens.*240 tokens at once.*than 144; lower n"):
        await asyncio.wait_for(cluster.router.submit([1] * 60, greedy(40, n=3), request_id="r"), 5)
    assert cluster.decode.received == [] and cluster.metrics.outcomes == [("rejected", None)]
    task = cluster.submit("fits", greedy(40), prompt=[1] * 60)
    await cluster.decode.expect(LeaseRequest, "fits")
    task.cancel()


async def test_max_tokens_left_out_is_what_the_smallest_pool_leaves(make_cluster: MakeCluster) -> None:
    cluster = await make_small(make_cluster, {"max_model_len": 48})
    assert cluster.router.max_model_len == 48
    cluster.submit("r", greedy(None), prompt=PROMPT)
    assert (await cluster.decode.expect(LeaseRequest, "r")).params.max_tokens == 18
    with pytest.raises(InvalidRequestError, match="48"):
        await asyncio.wait_for(cluster.router.submit([1] * 48, greedy(None), request_id="long"), 5)


async def test_a_worker_that_is_too_small_is_not_asked(make_cluster: MakeCluster) -> None:
    """It would refuse for good what the other one can serve."""
    cluster = await make_small(make_cluster, {"num_blocks": 7}, {"num_blocks": 1000})
    await tell(cluster, cluster.workers["decode-1"], Credit(900, 1, running=60, waiting=0, leases=60))
    task = cluster.submit("r", greedy(60, n=2), prompt=PROMPT)
    await cluster.settled(lambda: cluster.router.machine.queue_depth == 1)
    await tell(cluster, cluster.workers["decode-1"], PLENTY)
    await cluster.workers["decode-1"].expect(LeaseRequest, "r")
    assert cluster.workers["decode-0"].received == [] and cluster.workers["decode-0"].wanted == []
    task.cancel()


async def test_who_fits_nobody_now_lets_others_pass_and_is_served_when_a_worker_comes(
    make_cluster: MakeCluster,
) -> None:
    cluster = await make_small(make_cluster, {"num_blocks": 10}, {"num_blocks": 1000})
    small, large, prefill = (cluster.workers[name] for name in ("decode-0", "decode-1", "prefill-0"))
    full = Credit(free_blocks=9, free_places=0, running=64, waiting=0, leases=64)
    await tell(cluster, small, full)
    await tell(cluster, large, full)
    wide, behind = (cluster.submit(name, greedy(60, n), prompt=PROMPT) for name, n in (("wide", 9), ("behind", 1)))
    await cluster.settled(lambda: cluster.router.machine.queue_depth == 2)
    await cluster.show(prefill, small)
    await large.die()
    await cluster.settled(lambda: "decode-1" not in cluster.router.machine.workers.links)
    await tell(cluster, small, PLENTY)
    await small.expect(LeaseRequest, "behind")
    small.grant("behind")
    await asyncio.wait_for(behind, PATIENCE_S)
    assert not wide.done()
    again = worker_of(cluster, "decode-1", "decode", "2", num_blocks=1000)
    await cluster.show(prefill, small, again)
    await again.expect(LeaseRequest, "wide")
    assert "LeaseRequest" not in small.about("wide")
    wide.cancel()


async def test_who_waits_is_refused_once_all_workers_are_too_small(make_cluster: MakeCluster) -> None:
    cluster = await make_small(make_cluster, {"num_blocks": 1000}, max_queue_wait_s=1000)
    prefill, decode = cluster.prefill, cluster.decode
    await tell(cluster, decode, Credit(free_blocks=9, free_places=0, running=64, waiting=0, leases=64))
    wide = cluster.submit("wide", greedy(60, 9), prompt=PROMPT)
    await cluster.settled(lambda: cluster.router.machine.queue_depth == 1)
    await decode.die()
    smaller = worker_of(cluster, "decode-0", "decode", "2", num_blocks=10)
    await cluster.show(prefill, smaller)
    with pytest.raises(InvalidRequestError, match="lower n"):
        await asyncio.wait_for(wide, PATIENCE_S)
    cluster.assert_clean()


async def test_a_denied_leg_asks_again_only_when_there_is_enough(make_cluster: MakeCluster) -> None:
    """Not with every step that the worker tells of."""
    cluster = await make_cluster(lease_timeout_s=1000)
    running = cluster.submit("running")
    await cluster.decode.expect(LeaseRequest, "running")
    cluster.decode.grant("running")
    await cluster.prefill.expect(PrefillRequest, "running")
    cluster.prefill.first("running", "a")
    task = cluster.submit("r", greedy(60, n=2), prompt=PROMPT)  # 1 block shared, and twice 5
    await cluster.decode.expect(LeaseRequest, "r")
    cluster.decode.credit = Credit(free_blocks=5, free_places=9, running=1, waiting=0, leases=1)
    cluster.decode.deny("r", "no free blocks or places", retriable=True)
    for step in range(1, 6):
        cluster.decode.credit = Credit(free_blocks=5 + step, free_places=9, running=1, waiting=0, leases=1)
        cluster.decode.tokens("running", step, "b")
    await cluster.settled(lambda: len(cluster.router.machine.requests["running"].output.outputs[0].token_ids) == 6)
    assert cluster.decode.about("r") == ["LeaseRequest"] and set(cluster.decode.wanted) == {CreditWanted(11, 2)}
    cluster.decode.credit = Credit(free_blocks=11, free_places=9, running=1, waiting=0, leases=1)
    cluster.decode.tokens("running", 6, "b")
    await cluster.decode.expect(LeaseRequest, "r", attempt=1)
    for each in (running, task):
        each.cancel()


async def test_a_worker_is_told_what_the_head_of_the_line_needs(make_cluster: MakeCluster) -> None:
    """Each time that it changes, and once."""
    cluster = await make_cluster(lease_timeout_s=1000)
    full = Credit(free_blocks=2, free_places=5, running=1, waiting=0, leases=1)
    await tell(cluster, cluster.decode, full)
    first = cluster.submit("first", greedy(60), prompt=PROMPT)
    await cluster.settled(lambda: cluster.decode.wanted == [CreditWanted(6, 1)])
    second = cluster.submit("second", greedy(2, n=2), prompt=PROMPT)
    cluster.decode.send(CreditUpdate(full))
    await asyncio.sleep(0.05)
    assert cluster.decode.wanted == [CreditWanted(6, 1)] and cluster.decode.received == []
    first.cancel()
    await cluster.settled(lambda: cluster.decode.wanted == [CreditWanted(6, 1), CreditWanted(3, 2)])
    await tell(cluster, cluster.decode, Credit(free_blocks=3, free_places=2, running=1, waiting=0, leases=1))
    await cluster.decode.expect(LeaseRequest, "second")
    second.cancel()


async def test_one_token_takes_no_lease(make_cluster: MakeCluster) -> None:
    """Nobody decodes: the decode worker need not have room, and hears of nothing."""
    cluster = await make_cluster(lease_timeout_s=1000)
    await tell(cluster, cluster.decode, Credit(free_blocks=0, free_places=0, running=64, waiting=0, leases=64))
    task = cluster.submit("r", greedy(1, n=2))
    sent = await cluster.prefill.expect(PrefillRequest, "r")
    assert sent.decode_worker_id is None and sent.indices == [0, 1]
    cluster.prefill.first("r", "xy", finish="length", cached=3)
    request = await task
    output = await asyncio.wait_for(request.wait(), PATIENCE_S)
    assert [completion.text for completion in output.outputs] == ["x", "y"] and output.num_cached_tokens == 3
    assert output.timings.queue is not None and output.timings.lease_wait is not None
    assert cluster.decode.received == [] and cluster.prefill.about("r") == ["PrefillRequest"]
    cluster.assert_clean()


async def test_one_token_is_replayed_and_cancelled_without_a_lease(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster()
    request = await cluster.submit("r", greedy(1))
    await cluster.prefill.expect(PrefillRequest, "r")
    await cluster.prefill.die()
    again = cluster.new_worker("prefill-0", "prefill", "2")
    await cluster.show(again, cluster.decode)
    await again.expect(PrefillRequest, "r", attempt=1)
    request.abort()
    await again.wait(lambda: again.about("r") == ["PrefillRequest", "CancelPrefill"])
    assert cluster.decode.received == []
    cluster.assert_clean()


async def test_cached_tokens_are_of_the_prompt_after_a_replay(make_cluster: MakeCluster) -> None:
    """The worker that takes over may have all of it cached, and the outputs so far, too."""
    cluster = await make_cluster()
    prompt = [ord("p")] * 16
    task = cluster.submit("r", SamplingParams(temperature=0, max_tokens=60), prompt=prompt)
    await cluster.decode.expect(LeaseRequest, "r")
    cluster.decode.grant("r")
    await cluster.prefill.expect(PrefillRequest, "r")
    cluster.prefill.first("r", "a", cached=0)
    cluster.decode.tokens("r", 1, "b" * 50)
    request = await task
    await cluster.settled(lambda: len(request.output.outputs[0].token_ids) == 51)
    await cluster.decode.die()
    again = cluster.new_worker("decode-0", "decode", "2")
    await cluster.show(cluster.prefill, again)
    await again.expect(LeaseRequest, "r", attempt=1)
    again.grant("r", attempt=1, cached=64)
    await cluster.prefill.expect(PrefillRequest, "r", attempt=1)
    cluster.prefill.first("r", "c", attempt=1, position=51, cached=64)
    again.tokens("r", 52, "d", attempt=1, finish="stop", num_cached_tokens=64, prefill=0.1, prefill_queue=0.1)
    assert (await asyncio.wait_for(request.wait(), PATIENCE_S)).num_cached_tokens == 0
