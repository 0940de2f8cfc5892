"""A prompt that is computed while its lease is being asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from msgspec import structs

from pdray.errors import InvalidRequestError
from pdray.outputs import RequestOutput, SampledToken
from pdray.router.routed import RoutedRequest
from pdray.sampling_params import SamplingParams
from pdray.testing.patience import PATIENCE_S
from pdray.wire.lease_messages import CloseLease, CreditUpdate, LeaseRequest
from pdray.wire.messages import AnyMessage
from pdray.wire.prefill_messages import (
    CancelPrefill,
    FirstTokens,
    LeaseConfirmed,
    Pong,
    PrefillFailed,
    PrefillRequest,
)

MakeCluster = Callable[..., Awaitable[Any]]
GREEDY = SamplingParams(temperature=0, max_tokens=3)


async def ask(cluster: Any, name: str = "r", attempt: int = 0) -> tuple[PrefillRequest, LeaseRequest]:
    prefill = await cluster.prefill.hear(PrefillRequest, name, attempt)
    return prefill, await cluster.decode.expect(LeaseRequest, name, attempt)


async def finish(cluster: Any, task: asyncio.Task[RoutedRequest], attempt: int = 0) -> RequestOutput:
    """The decode worker's part, after the first token."""
    request = await asyncio.wait_for(task, PATIENCE_S)
    cluster.decode.tokens("r", 1, "bc", finish="length", attempt=attempt)
    assert (await cluster.text_of(request)).endswith("bc")
    cluster.assert_clean()
    return request.output


async def test_the_prefill_worker_begins_before_the_lease_is_granted(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster()
    task = cluster.submit("r", GREEDY)
    prefill, _ = await ask(cluster)
    assert (prefill.has_lease, prefill.decode_worker_id, prefill.epoch) == (False, "decode-0", 7)
    cluster.decode.grant("r", cached=16)
    assert (await cluster.prefill.expect(LeaseConfirmed, "r")).num_cached_tokens == 16
    cluster.prefill.first("r", "a")
    output = await finish(cluster, task)
    assert cluster.prefill.about("r") == ["PrefillRequest", "LeaseConfirmed"]
    assert output.timings.lease_wait == 0.0, "nothing has waited for it"


async def test_first_tokens_that_come_before_the_lease_wait_for_it(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster()
    task = cluster.submit("r", GREEDY)
    await ask(cluster)
    cluster.prefill.first("r", "a")
    await cluster.settled(lambda: not cluster.router.machine.workers.links["prefill-0"].queued)
    await asyncio.sleep(0.02)
    assert not task.done() and cluster.metrics.first_tokens == []
    cluster.decode.grant("r")
    output = await finish(cluster, task)
    timings = output.timings
    assert output.outputs[0].text == "abc" and timings.prefill == 0.02 and timings.lease_wait >= 0.02
    assert timings.ttft >= timings.queue + timings.lease_wait


async def test_a_denial_ends_what_was_begun(make_cluster: MakeCluster) -> None:
    """It is computed anew once there is room, in another attempt; what came of the first is nobody's."""
    cluster = await make_cluster()
    credit = cluster.decode.credit
    task = cluster.submit("r", GREEDY)
    await ask(cluster)
    cluster.prefill.first("r", "x")
    await cluster.settled(lambda: not cluster.router.machine.workers.links["prefill-0"].queued)
    cluster.decode.credit = structs.replace(credit, free_blocks=0)
    cluster.decode.deny("r", "no free blocks or places", retriable=True)
    await cluster.prefill.expect(CancelPrefill, "r")
    assert cluster.router.machine.queue_depth == 1
    cluster.decode.send(CreditUpdate(credit))
    prefill, _ = await ask(cluster, attempt=1)
    assert not prefill.has_lease
    cluster.prefill.first("r", "y")  # of the first attempt, late
    cluster.decode.grant("r", 1)
    await cluster.prefill.expect(LeaseConfirmed, "r", 1)
    cluster.prefill.first("r", "a", attempt=1)
    assert (await finish(cluster, task, 1)).outputs[0].text == "abc"


@pytest.mark.parametrize(
    "late",
    [
        FirstTokens("r", 0, [SampledToken(0, 0, ord("x")), SampledToken(1, 0, ord("y"))], 0, 0.0, 0.0),
        PrefillFailed("r", 0, "the channel to decode-0 was lost"),
    ],
    ids=["first tokens", "failure"],
)
async def test_what_comes_late_of_a_denied_attempt_is_dropped(make_cluster: MakeCluster, late: AnyMessage) -> None:
    """The prefill worker had not heard of the denial; the request waits for its first lease as before."""
    cluster = await make_cluster(max_replays=0)
    credit = cluster.decode.credit
    task = cluster.submit("r", SamplingParams(temperature=0, max_tokens=3, n=2, stop=("x",)))
    await ask(cluster)
    cluster.decode.credit = structs.replace(credit, free_blocks=0)
    cluster.decode.deny("r", "no free blocks or places", retriable=True)
    await cluster.prefill.expect(CancelPrefill, "r")
    cluster.prefill.send(late)
    cluster.prefill.queued_tokens = 7
    cluster.prefill.send(Pong(7))
    await cluster.settled(lambda: cluster.router.machine.workers.links["prefill-0"].told_queued_tokens == 7)
    assert not task.done() and cluster.metrics.first_tokens == [] and cluster.router.machine.queue_depth == 1
    cluster.decode.send(CreditUpdate(credit))
    await cluster.decode.expect(LeaseRequest, "r", 1)


async def test_a_final_denial_ends_it_for_good(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster()
    task = cluster.submit("r", GREEDY)
    await ask(cluster)
    cluster.decode.deny("r", "it needs 99 blocks", retriable=False)
    with pytest.raises(InvalidRequestError, match="99 blocks"):
        await asyncio.wait_for(task, PATIENCE_S)
    await cluster.prefill.expect(CancelPrefill, "r")
    cluster.assert_clean()


async def test_an_abort_before_the_lease_reaches_both(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster()
    task = cluster.submit("r", GREEDY)
    await ask(cluster)
    task.cancel()
    await cluster.prefill.expect(CancelPrefill, "r")
    await cluster.decode.expect(CloseLease, "r")
    cluster.assert_clean()


async def test_a_prefill_worker_that_fails_before_the_lease(make_cluster: MakeCluster) -> None:
    """The lease that was asked for is closed, and another attempt made."""
    cluster = await make_cluster()
    task = cluster.submit("r", GREEDY)
    await ask(cluster)
    cluster.prefill.send(PrefillFailed("r", 0, "the channel to decode-0 was lost"))
    await cluster.decode.expect(CloseLease, "r")
    await ask(cluster, attempt=1)
    cluster.decode.grant("r", 0)  # under way since before
    cluster.decode.grant("r", 1)
    cluster.prefill.first("r", "a", attempt=1)
    await finish(cluster, task, 1)


@pytest.mark.parametrize("why", ["the prefill worker has work", "credit is scarce"])
async def test_where_it_might_be_in_vain_or_delay_others_it_waits(make_cluster: MakeCluster, why: str) -> None:
    cluster = await make_cluster()
    link = cluster.router.machine.workers.links["prefill-0" if "prefill" in why else "decode-0"]
    if "prefill" in why:
        link.told_queued_tokens = 1
    else:
        link.update_credit(structs.replace(cluster.decode.credit, free_places=1))
    task = cluster.submit("r", GREEDY)
    await cluster.decode.expect(LeaseRequest, "r")
    await asyncio.sleep(0.02)
    assert cluster.prefill.about("r") == []
    cluster.decode.grant("r", cached=16)
    prefill = await cluster.prefill.expect(PrefillRequest, "r")
    assert prefill.has_lease and prefill.num_cached_tokens == 16
    cluster.prefill.first("r", "a")
    assert (await finish(cluster, task)).timings.lease_wait >= 0.02
