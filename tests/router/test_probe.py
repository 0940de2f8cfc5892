"""Probes: workers that do not serve are found when nothing is asked, and nobody's requests notice."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pdray.wire.lease_messages import CloseLease, Credit, CreditUpdate, LeaseRequest
from pdray.wire.peers import Role
from pdray.wire.prefill_messages import PrefillFailed, PrefillRequest

MakeCluster = Callable[..., Awaitable[Any]]
TIMEOUT_S = 0.3
PROBE = "probe-router-0-1"


@pytest.fixture
async def probing(make_cluster: MakeCluster) -> Callable[..., Awaitable[Any]]:
    """A cluster whose router is told when to probe, and what it has reported."""

    async def make(*workers: Any, **config: Any) -> Any:
        return await make_cluster(*workers, probe_interval_s=None, **{"probe_timeout_s": TIMEOUT_S} | config)

    return make


async def answer(cluster: Any, number: int = 1, tokens: int = 2) -> None:
    """Do as workers do, but for tokens that do not come."""
    name = f"probe-router-0-{number}"
    lease = await cluster.decode.expect(LeaseRequest, name)
    assert lease.prompt_token_ids == [0] and lease.params.max_tokens == 2
    cluster.decode.grant(name)
    prefill = await cluster.prefill.expect(PrefillRequest, name)
    assert prefill.priority == lease.priority > 1_000_000
    if tokens >= 1:
        cluster.prefill.first(name, "a")
    if tokens >= 2:
        cluster.decode.tokens(name, 1, "b", finish="length")


async def test_a_pair_that_serves_is_left_alone_and_nobody_counts_it(probing: Any) -> None:
    cluster = await probing()
    await asyncio.gather(cluster.router.probe_round(), answer(cluster))
    await cluster.decode.expect(CloseLease, PROBE)
    assert cluster.router.ready and not cluster.broken
    assert not cluster.metrics.outcomes and not cluster.metrics.first_tokens and not cluster.metrics.gaps
    assert cluster.router.stats()["running"] == 0
    cluster.assert_clean()


@pytest.mark.parametrize("tokens", [0, 1])
async def test_a_pair_that_does_not_is_taken_out_until_it_is_connected_anew(probing: Any, tokens: int) -> None:
    cluster = await probing()
    await asyncio.gather(cluster.router.probe_round(), answer(cluster, tokens=tokens))
    (pair,) = cluster.broken
    assert pair[:3] == ("prefill-0", "decode-0", 7) and "0.3 s" in pair.reason
    assert not cluster.router.ready and cluster.router.machine.workers.pairs == {}
    await cluster.decode.expect(CloseLease, PROBE)
    await cluster.router.probe_round()
    assert cluster.broken == [pair, pair]  # the Coordinator may have been away
    await cluster.show_pairs(epoch=8)
    await cluster.settled(lambda: cluster.router.ready)
    await asyncio.gather(cluster.router.probe_round(), answer(cluster, 2))
    assert len(cluster.broken) == 2 and cluster.router.ready


async def test_a_failure_that_is_told_need_not_be_waited_for(probing: Any) -> None:
    cluster = await probing()
    await asyncio.gather(cluster.router.probe_round(), answer_with_failure(cluster))
    assert cluster.broken[0].reason == "no such channel"


async def answer_with_failure(cluster: Any) -> None:
    await answer(cluster, tokens=0)
    cluster.prefill.send(PrefillFailed(PROBE, 0, "no such channel"))


async def test_a_pair_beside_a_broken_one_serves(probing: Any, make_cluster: MakeCluster) -> None:
    cluster = await probing()
    await cluster.show(cluster.prefill, cluster.decode, cluster.new_worker("decode-1", "decode"))
    await cluster.settled(lambda: len(cluster.router.machine.workers.open_links(Role.DECODE)) == 2)
    cluster.router.machine.workers.mark_broken("prefill-0", "decode-0")
    assert cluster.router.ready
    cluster.submit("r")
    await cluster.workers["decode-1"].expect(LeaseRequest, "r")


async def test_who_is_busy_is_not_probed_and_not_broken(probing: Any) -> None:
    cluster = await probing()
    probe = asyncio.create_task(cluster.router.probe_round())
    await cluster.decode.expect(LeaseRequest, PROBE)
    cluster.decode.deny(PROBE, "no place", retriable=True)
    await probe
    assert not cluster.broken and cluster.router.ready
    busy = Credit(free_blocks=100, free_places=3, running=1, waiting=0, leases=1)
    cluster.decode.credit = busy
    cluster.decode.send(CreditUpdate(busy))
    await cluster.settled(lambda: cluster.router.machine.workers.links["decode-0"].credit == busy)
    await cluster.router.probe_round()
    assert len([m for m in cluster.decode.received if isinstance(m, LeaseRequest)]) == 1


async def test_a_probes_lease_is_renewed(probing: Any) -> None:
    cluster = await probing(probe_timeout_s=5.0)
    probe = asyncio.create_task(cluster.router.probe_round())
    await cluster.decode.expect(LeaseRequest, PROBE)
    await cluster.decode.wait(lambda: any(key.request_id == PROBE for key in cluster.decode.renewed))
    await answer(cluster)
    await probe


async def test_a_worker_that_does_both_is_asked_twice(probing: Any, make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(empty=True, probe_interval_s=None, probe_timeout_s=TIMEOUT_S)
    await cluster.show(cluster.new_worker("decode-0", "both"))
    await cluster.settled(lambda: cluster.router.ready)
    await cluster.router.probe_round()
    assert cluster.router.ready and not cluster.broken
    await cluster.router.probe_round()
    assert not cluster.router.ready and [pair[:2] for pair in cluster.broken] == [("decode-0", "decode-0")]
    again = asyncio.create_task(cluster.router.probe_round())
    await cluster.decode.expect(LeaseRequest, "probe-router-0-3")
    cluster.decode.grant("probe-router-0-3")
    cluster.decode.tokens("probe-router-0-3", 0, "ab", finish="length")
    await again
    assert cluster.router.ready
