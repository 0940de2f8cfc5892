"""A worker, a session or a lease is lost: the request goes on elsewhere, each token once and in order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from pdray.errors import NoWorkerError, QueueFullError, RequestTimeoutError, WorkerDiedError
from pdray.outputs import SampledToken
from pdray.prompt_scores import PromptScores
from pdray.router.routed import RoutedRequest
from pdray.sampling_params import SamplingParams
from pdray.testing.patience import PATIENCE_S
from pdray.wire.lease_messages import CloseLease, LeaseClosed, LeaseRequest
from pdray.wire.prefill_messages import FirstTokens, PrefillFailed, PrefillRequest

MakeCluster = Callable[..., Awaitable[Any]]


async def brought_to(cluster: Any, state: str, name: str = "r") -> asyncio.Task[RoutedRequest]:
    task = cluster.submit(name)
    await cluster.decode.expect(LeaseRequest, name)
    if state != "asked":
        cluster.decode.grant(name)
        await cluster.prefill.expect(PrefillRequest, name)
    if state == "decoding":
        cluster.prefill.first(name, "a")
        cluster.decode.tokens(name, 1, "b")
        request = await task
        await cluster.settled(lambda: len(request.output.outputs[0].token_ids) == 2)
    return task


async def finish(cluster: Any, name: str, state: str) -> None:
    """Attempt 1 runs to its end: "abc", of which "ab" was told by attempt 0 if it was decoding."""
    before = [97, 98] if state == "decoding" else []
    lease = await cluster.decode.expect(LeaseRequest, name, attempt=1)
    assert lease.output_token_ids == before and lease.indices == [0]
    cluster.decode.grant(name, attempt=1)
    prefill = await cluster.prefill.expect(PrefillRequest, name, attempt=1)
    assert prefill.output_token_ids == before and prefill.prompt_token_ids == lease.prompt_token_ids
    if state == "decoding":
        cluster.prefill.first(name, "c", finish="length", attempt=1, position=2)
    else:
        cluster.prefill.first(name, "a", attempt=1)
        cluster.decode.tokens(name, 1, "bc", finish="length", attempt=1)


@pytest.mark.parametrize("state", ["asked", "prefilling", "decoding"])
@pytest.mark.parametrize("how", ["killed", "gone from the view", "restarted"])
async def test_death_of_the_decode_worker(make_cluster: MakeCluster, state: str, how: str) -> None:
    cluster = await make_cluster()
    task = await brought_to(cluster, state)
    decode, prefill = cluster.decode, cluster.prefill
    successor = cluster.new_worker("decode-0", "decode", "2")
    if how == "killed":
        await decode.die()
    if how != "restarted":
        await cluster.show(prefill)
        await cluster.settled(lambda: not cluster.router.ready)
        with pytest.raises(NoWorkerError):
            await cluster.router.submit("x", SamplingParams(), request_id="s")
    await cluster.show(prefill, successor)
    await finish(cluster, "r", state)
    request = await asyncio.wait_for(task, PATIENCE_S)
    assert await cluster.text_of(request) == "abc"
    assert request.output.outputs[0].token_ids == [97, 98, 99]
    assert cluster.metrics.num_replays == 1 and [outcome for outcome, _ in cluster.metrics.outcomes][-1] == "length"
    cluster.assert_clean()
    await decode.stop()


async def test_death_of_the_prefill_worker(make_cluster: MakeCluster) -> None:
    """What it was computing gives its lease back and is replayed on another; what it has handed over goes on."""
    cluster = await make_cluster()
    computing, decoding = await brought_to(cluster, "prefilling"), await brought_to(cluster, "decoding", "d")
    await cluster.prefill.die()
    await cluster.decode.expect(CloseLease, "r")
    await cluster.show(cluster.decode, cluster.new_worker("prefill-0", "prefill", "2"))
    await finish(cluster, "r", "prefilling")
    cluster.decode.tokens("d", 2, "c", finish="length")
    assert await cluster.text_of(await computing) == "abc"
    assert await cluster.text_of(await decoding) == "abc"
    cluster.assert_clean()


async def test_a_prefill_worker_that_dies_after_its_answer(make_cluster: MakeCluster) -> None:
    """The router has the first token, but until the decode worker has told one, its blocks may never have arrived."""
    cluster = await make_cluster()
    task = await brought_to(cluster, "prefilling")
    cluster.prefill.first("r", "a")
    request = await task
    await cluster.settled(lambda: request.output.outputs[0].token_ids == [97])
    await cluster.prefill.die()
    await cluster.decode.expect(CloseLease, "r")
    await cluster.show(cluster.decode, cluster.new_worker("prefill-0", "prefill", "2"))
    assert (await cluster.decode.expect(LeaseRequest, "r", attempt=1)).output_token_ids == [97]
    cluster.decode.grant("r", attempt=1)
    await cluster.prefill.expect(PrefillRequest, "r", attempt=1)
    cluster.prefill.first("r", "b", finish="length", attempt=1, position=1)
    assert await cluster.text_of(request) == "ab"
    cluster.assert_clean()


async def test_the_other_worker_takes_over(make_cluster: MakeCluster) -> None:
    """With a second decode worker nothing waits for a restart, and what the dead one still says is dropped."""
    cluster = await make_cluster()
    other = cluster.new_worker("decode-1", "decode")
    await cluster.show(cluster.prefill, cluster.decode, other)
    await cluster.settled(lambda: cluster.router.machine.workers.is_open("decode-1"))
    task = await brought_to(cluster, "decoding")
    request = await task
    dead = cluster.decode
    await cluster.show(cluster.prefill, other)
    assert (await other.expect(LeaseRequest, "r", attempt=1)).output_token_ids == [97, 98]
    other.grant("r", attempt=1)
    await cluster.prefill.expect(PrefillRequest, "r", attempt=1)
    cluster.prefill.first("r", "c", attempt=1, position=2)
    other.tokens("r", 2, "cd", finish="length", attempt=1)
    assert await cluster.text_of(request) == "abcd"
    cluster.assert_clean()
    await dead.stop()


async def test_each_completion_is_replayed_from_where_it_was(make_cluster: MakeCluster) -> None:
    """n = 3: one has ended, the others had different lengths. A second death hits one of the two."""
    cluster = await make_cluster()
    task = cluster.submit("r", SamplingParams(temperature=0, max_tokens=8, n=3))
    await cluster.decode.expect(LeaseRequest, "r")
    cluster.decode.grant("r")
    await cluster.prefill.expect(PrefillRequest, "r")
    cluster.prefill.first("r", "abc")
    cluster.decode.tokens("r", 1, "A", finish="length", index=0)
    cluster.decode.tokens("r", 1, "BB", index=1)
    request = await task
    await cluster.settled(lambda: [len(o.token_ids) for o in request.output.outputs] == [2, 3, 1])
    first = cluster.decode
    second = cluster.new_worker("decode-0", "decode", "2")
    await cluster.show(cluster.prefill, second)
    legs = {
        tuple(lease.indices): lease for lease in [await second.expect(LeaseRequest, "r", attempt=i) for i in (1, 2)]
    }
    assert {indices: lease.output_token_ids for indices, lease in legs.items()} == {(1,): [98, 66, 66], (2,): [99]}
    for lease in legs.values():
        second.grant("r", lease.attempt)
        await cluster.prefill.expect(PrefillRequest, "r", attempt=lease.attempt)
    second.tokens("r", 3, "b", finish="length", index=1, attempt=legs[(1,)].attempt)
    await cluster.settled(lambda: request.output.outputs[1].finished)
    third = cluster.new_worker("decode-0", "decode", "3")
    await cluster.show(cluster.prefill, third)
    assert (await third.expect(LeaseRequest, "r", attempt=3)).output_token_ids == [99]
    third.grant("r", 3)
    third.tokens("r", 1, "CC", finish="length", index=2, attempt=3)
    await cluster.text_of(request)
    assert [o.text for o in request.output.outputs] == ["aA", "bBBb", "cCC"]
    cluster.assert_clean()
    await first.stop()
    await second.stop()


@pytest.mark.parametrize("kind", [LeaseClosed, PrefillFailed])
async def test_a_failed_leg_is_tried_again_and_again_up_to_a_limit(make_cluster: MakeCluster, kind: type) -> None:
    cluster = await make_cluster(max_replays=2)
    task = cluster.submit("r")
    for attempt in range(3):
        await cluster.decode.expect(LeaseRequest, "r", attempt=attempt)
        cluster.decode.grant("r", attempt=attempt)
        await cluster.prefill.expect(PrefillRequest, "r", attempt=attempt)
        worker = cluster.decode if kind is LeaseClosed else cluster.prefill
        worker.send(kind("r", attempt, "because"))
    request = await task
    with pytest.raises(WorkerDiedError, match=r"3 times \(max_replays is 2\).*because"):
        await cluster.text_of(request)
    with pytest.raises(WorkerDiedError):
        await request.wait()
    assert cluster.metrics.num_replays == 2
    cluster.assert_clean()


async def test_a_lost_session_is_opened_again(make_cluster: MakeCluster) -> None:
    """The worker lives: the request goes on there in a new attempt, without a new view."""
    cluster = await make_cluster()
    task = await brought_to(cluster, "decoding")
    await cluster.decode.session.close()
    await finish(cluster, "r", "decoding")
    assert await cluster.text_of(await task) == "abc"
    cluster.assert_clean()


async def test_no_replacement_in_time(make_cluster: MakeCluster) -> None:
    """A stream that has begun waits for a worker as long as a new request would."""
    cluster = await make_cluster(max_queue_wait_s=0.4)
    running, asked = await brought_to(cluster, "decoding"), await brought_to(cluster, "asked", "s")
    request = await running
    await cluster.show(cluster.prefill)
    for answer in (cluster.text_of(request), asked):
        with pytest.raises((NoWorkerError, QueueFullError)):
            await answer
    assert sorted(outcome for outcome, _ in cluster.metrics.outcomes) == ["error", "rejected"]
    cluster.assert_clean()


async def test_an_abort_between_two_workers(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster()
    request = await (await brought_to(cluster, "decoding"))
    await cluster.show(cluster.prefill)
    await cluster.settled(lambda: cluster.router.machine.queue_depth == 1)
    request.abort()
    assert await cluster.text_of(request) == "ab"
    cluster.assert_clean()


@pytest.mark.parametrize("state", ["asked", "prefilling", "decoding"])
async def test_a_request_that_takes_too_long(make_cluster: MakeCluster, state: str) -> None:
    cluster = await make_cluster(request_timeout_s=1000)
    task = await brought_to(cluster, state)
    (request,) = cluster.router.machine.requests.values()
    request.arrival -= 1001
    with pytest.raises(RequestTimeoutError, match="request_timeout_s"):
        await cluster.text_of(await task)
    await cluster.decode.expect(CloseLease, "r")
    assert [outcome for outcome, _ in cluster.metrics.outcomes] == ["timeout"]
    cluster.assert_clean()


async def test_a_worker_that_cannot_be_reached_yet(make_cluster: MakeCluster) -> None:
    """It does not keep the router from the others, and is tried until it is there."""
    cluster = await make_cluster(empty=True)
    late = cluster.new_worker("decode-1", "decode")
    await late.start()
    assert late._server._server is not None
    late._server._server.close()
    prefill, decode = cluster.new_worker("prefill-0", "prefill"), cluster.new_worker("decode-0", "decode")
    await prefill.start()
    await decode.start()
    late.session = prefill.session = decode.session = object()  # type: ignore[assignment]  # started already
    await cluster.show(prefill, decode, late)
    await asyncio.wait_for(cluster.router.wait_ready(), PATIENCE_S)
    await brought_to(cluster, "decoding")
    late._server._server = await asyncio.start_server(late._server._accept, "127.0.0.1", late.info.port)
    await cluster.settled(lambda: cluster.router.machine.workers.is_open("decode-1"))


@pytest.mark.parametrize("max_tokens", [0, 3])
async def test_scores_of_the_prompt_are_asked_for_until_they_are_known(
    make_cluster: MakeCluster, max_tokens: int
) -> None:
    cluster = await make_cluster()
    params = SamplingParams(temperature=0, max_tokens=max_tokens, prompt_logprobs=1)
    task = asyncio.ensure_future(cluster.router.submit("xyz", params, request_id="r"))
    if max_tokens:
        await cluster.decode.expect(LeaseRequest, "r")
        cluster.decode.grant("r")
    asked = await cluster.prefill.expect(PrefillRequest, "r")
    assert asked.params.prompt_logprobs == 1 and asked.params.max_tokens == max(1, max_tokens)
    words = np.array([[ord("y"), 1, 0, ord("y"), 0], [ord("z"), 2, 0, ord("q"), 0]], "<i4")
    token = SampledToken(0, 0, ord("a"), None, None if max_tokens else "stop")
    cluster.prefill.send(FirstTokens("r", 0, [token], 0, 0.01, 0.02, PromptScores(1, words.tobytes())))
    request = await task
    if max_tokens:
        await cluster.settled(lambda: request.output.outputs[0].token_ids == [97])
        await cluster.decode.die()
        await cluster.show(cluster.prefill, cluster.new_worker("decode-0", "decode", "2"))
        assert (await cluster.decode.expect(LeaseRequest, "r", attempt=1)).params.prompt_logprobs is None
        cluster.decode.grant("r", attempt=1)
        assert (await cluster.prefill.expect(PrefillRequest, "r", attempt=1)).params.prompt_logprobs is None
        cluster.prefill.first("r", "b", finish="stop", attempt=1, position=1)
    output = await asyncio.wait_for(request.wait(), PATIENCE_S)
    assert output.outputs[0].token_ids == ([97, 98] if max_tokens else [])
    assert output.outputs[0].finish_reason == ("stop" if max_tokens else "length")
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    assert [list(step or ()) for step in output.prompt_logprobs[1:]] == [[ord("y")], [ord("z"), ord("q")]]
    cluster.assert_clean()
