"""Requests that wait or are refused: each ends, with the right error, and nothing stays behind."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pdray.errors import InvalidRequestError, NoWorkerError, QueueFullError
from pdray.router.routed import RoutedRequest
from pdray.sampling_params import SamplingParams
from pdray.testing.patience import PATIENCE_S
from pdray.wire.cluster_view import Draining
from pdray.wire.lease_messages import CloseLease, Credit, CreditUpdate, LeaseRequest
from pdray.wire.message import LegKey
from pdray.wire.prefill_messages import Pong, PrefillRequest

MakeCluster = Callable[..., Awaitable[Any]]
GREEDY = SamplingParams(temperature=0, max_tokens=8)
FULL = Credit(free_blocks=100, free_places=0, running=1, waiting=0, leases=1)
ONE_PLACE = Credit(free_blocks=100, free_places=1, running=0, waiting=0, leases=0)


async def make_full(cluster: Any) -> None:
    cluster.decode.credit = FULL
    cluster.decode.send(CreditUpdate(FULL))
    await cluster.settled(lambda: cluster.router.machine.workers.links["decode-0"].credit == FULL)


async def test_waiting_for_credit_in_order(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster()
    await make_full(cluster)
    priorities = {"late": 5, "a": 0, "b": 0, "first": -1}
    tasks = [cluster.submit(name, priority=priority) for name, priority in priorities.items()]
    await cluster.settled(lambda: cluster.router.stats()["queue_depth"] == 4)
    assert cluster.decode.received == [] and 4 in cluster.metrics.depths
    for name in ("first", "a", "b", "late"):
        cluster.decode.send(CreditUpdate(ONE_PLACE))
        await cluster.decode.expect(LeaseRequest, name)
        assert len(cluster.decode.received) == len({m.request_id for m in cluster.decode.received})
        cluster.decode.credit = FULL
        cluster.decode.grant(name)
    await asyncio.gather(*tasks)


async def test_one_place_is_asked_for_once(make_cluster: MakeCluster) -> None:
    """What was asked for and not answered counts as taken."""
    cluster = await make_cluster()
    await make_full(cluster)
    tasks = [cluster.submit(str(i)) for i in range(5)]
    await cluster.settled(lambda: cluster.router.machine.queue_depth == 5)
    cluster.decode.send(CreditUpdate(ONE_PLACE))
    cluster.decode.send(CreditUpdate(ONE_PLACE))
    await cluster.decode.expect(LeaseRequest, "0")
    await asyncio.sleep(0.05)
    assert len(cluster.decode.received) == 1
    for task in tasks:
        task.cancel()


@pytest.mark.parametrize("size", [0, 3])
async def test_a_full_queue_refuses_at_once(make_cluster: MakeCluster, size: int) -> None:
    cluster = await make_cluster(max_queue_size=size)
    await make_full(cluster)
    tasks = [cluster.submit(str(i)) for i in range(size)]
    await cluster.settled(lambda: cluster.router.machine.queue_depth == size)
    with pytest.raises(QueueFullError, match=f"max_queue_size is {size}") as caught:
        await cluster.router.submit("x", GREEDY, request_id="one more")
    assert caught.value.retry_after_s >= 1
    assert cluster.metrics.outcomes == [("rejected", None)] and not any(task.done() for task in tasks)


async def test_waiting_too_long(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(max_queue_wait_s=0.3)
    await make_full(cluster)
    with pytest.raises(QueueFullError, match="max_queue_wait_s"):
        async with asyncio.timeout(PATIENCE_S):
            await cluster.router.submit("x", GREEDY, request_id="r")
    assert cluster.decode.received == [] and cluster.metrics.outcomes[0][0] == "rejected"
    cluster.assert_clean()


async def test_a_denied_lease_keeps_its_place_in_the_queue(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster()
    first = cluster.submit("first")
    await cluster.decode.expect(LeaseRequest, "first")
    cluster.decode.credit = FULL
    cluster.decode.deny("first", "no free blocks or places", retriable=True)
    await cluster.settled(lambda: cluster.router.machine.queue_depth == 1)
    second = cluster.submit("second")
    await cluster.settled(lambda: cluster.router.machine.queue_depth == 2)
    cluster.decode.send(CreditUpdate(ONE_PLACE))
    assert (await cluster.decode.expect(LeaseRequest, "first", attempt=1)).indices == [0]
    assert "LeaseRequest" not in cluster.decode.about("second")
    cluster.decode.grant("first", attempt=1)
    await asyncio.wait_for(first, PATIENCE_S)
    assert not second.done()
    second.cancel()


async def test_aborting_a_denied_request_sends_nothing(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster()
    task = cluster.submit("r")
    await cluster.decode.expect(LeaseRequest, "r")
    cluster.decode.credit = FULL
    cluster.decode.deny("r", "no free blocks or places", retriable=True)
    await cluster.settled(lambda: cluster.router.machine.queue_depth == 1)
    task.cancel()
    await asyncio.sleep(0.05)
    assert cluster.decode.about("r") == ["LeaseRequest"]
    cluster.assert_clean()


async def test_a_final_denial_is_the_requests_fault(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster()
    task = cluster.submit("r")
    await cluster.decode.expect(LeaseRequest, "r")
    cluster.decode.deny("r", "it needs 99 blocks, the pool has 9", retriable=False)
    with pytest.raises(InvalidRequestError, match="99 blocks"):
        await asyncio.wait_for(task, PATIENCE_S)
    cluster.assert_clean()


async def test_a_closed_lease_gives_its_place_to_the_next(make_cluster: MakeCluster) -> None:
    """Without waiting for a heartbeat: the decode worker sends no credit for a lease that the router closes."""
    cluster = await make_cluster(lease_timeout_s=1000)
    cluster.decode.credit = FULL
    first = cluster.submit("first")
    await cluster.decode.expect(LeaseRequest, "first")
    cluster.decode.grant("first")
    request = await first
    second = cluster.submit("second")
    await cluster.settled(lambda: cluster.router.machine.queue_depth == 1)
    request.abort()
    await cluster.decode.expect(LeaseRequest, "second")
    second.cancel()


async def test_one_token_requests_do_not_use_up_the_credit(make_cluster: MakeCluster) -> None:
    """They end at the prefill worker's answer, and no decode step tells of their places."""
    cluster = await make_cluster(lease_timeout_s=1000)
    for name in ("a", "b", "c"):
        cluster.decode.credit = FULL
        task = cluster.submit(name)
        await cluster.decode.expect(LeaseRequest, name)
        cluster.decode.grant(name)
        await cluster.prefill.expect(PrefillRequest, name)
        cluster.prefill.first(name, "x", finish="length")
        assert await cluster.text_of(await task) == "x"


async def test_a_long_prefill_queue_gets_nothing_more(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster(max_num_batched_tokens=64, max_queue_size=100)
    tasks = [cluster.submit(str(i), prompt=[1] * 50) for i in range(6)]
    # those before are more than two batches, asked for or sent
    await cluster.settled(lambda: cluster.router.machine.queue_depth == 3)
    for i in range(3):
        await cluster.decode.expect(LeaseRequest, str(i))
        cluster.decode.grant(str(i))
        await cluster.prefill.expect(PrefillRequest, str(i))
    cluster.prefill.first("0", "x", finish="length")
    await cluster.decode.expect(LeaseRequest, "3")
    cluster.decode.deny("3", "no free blocks or places", retriable=False)
    await cluster.decode.expect(LeaseRequest, "4")
    assert cluster.router.machine.queue_depth == 1
    await cluster.settled(
        lambda: cluster.router.machine.workers.links["prefill-0"].prefill_state().queued_tokens == 150
    )
    await asyncio.gather(*tasks[:3])
    for task in tasks:
        task.cancel()
        if task is tasks[3]:
            with pytest.raises(InvalidRequestError):
                await task


async def test_a_queue_of_other_routers_prompts_is_asked_for_while_requests_wait(make_cluster: MakeCluster) -> None:
    """Long before the next renewal."""
    cluster = await make_cluster(max_num_batched_tokens=64, lease_timeout_s=1000)
    cluster.prefill.queued_tokens = 1000
    cluster.prefill.send(Pong(1000))
    await cluster.settled(lambda: cluster.router.machine.workers.links["prefill-0"].told_queued_tokens == 1000)
    task = cluster.submit("r")
    await cluster.settled(lambda: cluster.router.machine.queue_depth == 1)
    cluster.prefill.queued_tokens = 0
    await cluster.decode.expect(LeaseRequest, "r")
    task.cancel()


async def begun(cluster: Any) -> RoutedRequest:
    """A request "r" that has said "ab"."""
    task = cluster.submit("r")
    await cluster.decode.expect(LeaseRequest, "r")
    cluster.decode.grant("r")
    await cluster.prefill.expect(PrefillRequest, "r")
    cluster.prefill.first("r", "a")
    cluster.decode.tokens("r", 1, "b")
    running: RoutedRequest = await task
    await cluster.settled(lambda: len(running.output.outputs[0].token_ids) == 2)
    return running


async def test_stop_ends_everything(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster()
    running = await begun(cluster)
    cluster.decode.credit = FULL
    await make_full(cluster)
    waiting = cluster.submit("waiting")
    await cluster.settled(lambda: cluster.router.machine.queue_depth == 1)
    await asyncio.wait_for(cluster.router.stop(), PATIENCE_S)
    for cut_off in (cluster.text_of(running), running.wait(), waiting):
        with pytest.raises(NoWorkerError, match="stopping"):
            await cut_off
    assert running.output.outputs[0].text == "ab" and running.output.outputs[0].finish_reason is None
    assert [outcome for outcome, _ in cluster.metrics.outcomes] == ["error", "rejected"]
    await cluster.decode.wait(lambda: cluster.decode.session is None)


async def test_what_workers_say_while_it_stops_is_dropped(
    make_cluster: MakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = await make_cluster()
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def slow_to_end() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            await may_end.wait()

    cluster.router.tasks.spawn(slow_to_end())
    await begun.wait()
    stopping = asyncio.create_task(cluster.router.stop())
    cluster.prefill.send(Pong(7))
    cluster.decode.send(CreditUpdate(cluster.decode.credit))
    await cluster.decode.wait(lambda: cluster.prefill.session is None and cluster.decode.session is None)
    may_end.set()
    await asyncio.wait_for(stopping, PATIENCE_S)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_drain_refuses_what_is_new_and_ends_what_outlasts_it(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster()
    running = await begun(cluster)
    cluster.decode.credit = FULL
    await make_full(cluster)
    waiting = cluster.submit("waiting")
    await cluster.settled(lambda: cluster.router.machine.queue_depth == 1)
    await cluster.show_draining(Draining("a newer one comes", PATIENCE_S))
    with pytest.raises(NoWorkerError, match="a newer one comes"):
        await waiting
    assert not cluster.router.ready and "a newer one comes" in cluster.router.why_not_ready
    with pytest.raises(NoWorkerError, match="a newer one comes"):
        await cluster.submit("new")
    assert not running.ended
    await cluster.show_draining(Draining("a newer one comes", 0.01))
    with pytest.raises(NoWorkerError, match="cut short: a newer one comes"):
        await cluster.text_of(running)


async def test_a_drain_that_is_called_off_ends_nothing(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster()
    running = await begun(cluster)
    await cluster.show_draining(Draining("a newer one comes", PATIENCE_S))
    await cluster.settled(lambda: not cluster.router.ready)
    await cluster.show_draining(None)
    await cluster.settled(lambda: cluster.router.ready)
    assert cluster.router.machine._drain.due(float("inf")) is None
    cluster.decode.tokens("r", 2, "c", finish="length")
    assert await cluster.text_of(running) == "abc"


async def test_many_requests_leave_nothing(make_cluster: MakeCluster) -> None:
    """200 at once over 8 places: finished, stopped, aborted, denied. Every text is right, every place comes back."""
    rng = random.Random(1)
    cluster = await make_cluster(max_queue_size=200, max_num_seqs=8)
    decode, prefill = cluster.decode, cluster.prefill
    held: dict[LegKey, LeaseRequest] = {}

    def credit() -> Credit:
        return Credit(1000 - len(held), 8 - len(held), len(held), 0, len(held))

    def on_decode(message: Any) -> None:
        if isinstance(message, LeaseRequest):
            if len(held) >= 8 or rng.random() < 0.1:
                decode.deny(message.request_id, "no free blocks or places", retriable=True, attempt=message.attempt)
                asyncio.get_running_loop().call_later(0.005, lambda: decode.send(CreditUpdate(credit())))
            else:
                held[message.key] = message
                decode.credit = credit()
                decode.grant(message.request_id, message.attempt)
        elif isinstance(message, CloseLease):
            held.pop(message.key, None)
            decode.credit = credit()

    def on_prefill(message: Any) -> None:
        if isinstance(message, PrefillRequest):
            prefill.first(message.request_id, message.request_id[0], attempt=message.attempt)
            asyncio.get_running_loop().create_task(run(message.key))

    async def run(key: LegKey) -> None:
        for position in range(1, 8):
            await asyncio.sleep(rng.uniform(0, 0.003))
            if key not in held:
                return
            if position == 7:
                del held[key]
                decode.credit = credit()
            char = (key.request_id * 8)[position]
            decode.tokens(
                key.request_id, position, char, finish="length" if position == 7 else None, attempt=key.attempt
            )

    decode.on_received, prefill.on_received = on_decode, on_prefill
    decode.credit = credit()
    decode.send(CreditUpdate(credit()))

    async def one(number: int) -> str:
        name = f"{chr(97 + number % 26)}{number:03d}"
        kind = ("finish", "stop", "abort", "cancel")[number % 4]
        params = SamplingParams(temperature=0, max_tokens=8, stop=(name[-1] + name[0],) if kind == "stop" else ())
        waiting = asyncio.create_task(cluster.router.submit("x", params, request_id=name, priority=number % 3))
        if kind == "cancel":
            await asyncio.sleep(rng.uniform(0, 0.2))
            waiting.cancel()
            if (await asyncio.gather(waiting, return_exceptions=True))[0].__class__ is not RoutedRequest:
                return kind
            (await waiting).abort()
            return kind
        request = await waiting
        text = ""
        async for deltas in request:
            text += "".join(delta.text for delta in deltas)
            if kind == "abort" and len(text) > number % 8:
                request.abort()
        assert text == request.output.outputs[0].text
        assert text == {"finish": name * 2, "stop": name[:3]}.get(kind, text) and (name * 2).startswith(text)
        return kind

    async with asyncio.timeout(PATIENCE_S):
        kinds = await asyncio.gather(*(one(number) for number in range(200)))
        assert len(kinds) == 200
        await cluster.settled(lambda: not held)
    cluster.assert_clean()
    assert len(cluster.metrics.outcomes) == 200
