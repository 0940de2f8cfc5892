"""The router against scripted workers: what it sends, what the consumer sees, and what it forgets."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pdray.errors import InvalidRequestError
from pdray.router.completion import CompletionDelta
from pdray.router.leg import Leg
from pdray.router.request import Request
from pdray.router.routed import RoutedRequest
from pdray.sampling_params import SamplingParams
from pdray.testing.patience import PATIENCE_S
from pdray.wire.lease_messages import CloseLease, Credit, EndCompletion, LeaseRequest
from pdray.wire.message import LegKey
from pdray.wire.prefill_messages import CancelPrefill, PrefillRequest

MakeCluster = Callable[..., Awaitable[Any]]
GREEDY = SamplingParams(temperature=0, max_tokens=8)


async def start(cluster: Any, name: str, params: SamplingParams = GREEDY, **kwargs: Any) -> RoutedRequest:
    """Submit, grant, and wait until the prefill worker has it."""
    task = cluster.submit(name, params, **kwargs)
    await cluster.decode.expect(LeaseRequest, name)
    cluster.decode.grant(name)
    await cluster.prefill.expect(PrefillRequest, name)
    return await asyncio.wait_for(task, PATIENCE_S)


async def rest(request: RoutedRequest) -> list[CompletionDelta]:
    """All remaining deltas."""
    async with asyncio.timeout(PATIENCE_S):
        return [delta async for deltas in request for delta in deltas]


async def test_streaming_in_order(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster()
    request = await start(cluster, "r", priority=3)
    lease, prefill = cluster.decode.received[0], cluster.prefill.received[0]
    assert (lease.prefill_worker_id, lease.indices, lease.priority) == ("prefill-0", [0], 3)
    assert (prefill.decode_worker_id, prefill.epoch, prefill.num_cached_tokens) == ("decode-0", 7, 0)
    assert lease.prompt_token_ids == prefill.prompt_token_ids == [ord(c) for c in "prompt"]

    stream = aiter(request)
    cluster.prefill.first("r", "a")
    assert await anext(stream) == [CompletionDelta(0, "a", [ord("a")])]
    cluster.decode.tokens("r", 1, "b")
    assert await anext(stream) == [CompletionDelta(0, "b", [ord("b")])]
    cluster.decode.tokens("r", 1, "bc")  # a repeated position
    cluster.decode.tokens("r", 3, "d$", finish="stop")
    deltas = [delta async for deltas in stream for delta in deltas]
    assert "".join(d.text for d in deltas) == "cd" and deltas[-1].finish_reason == "stop"

    output = request.output
    assert output.finished and output.prompt == "prompt"
    assert output.outputs[0].text == "abcd" and output.outputs[0].token_ids == [*b"abcd", 128]
    assert "CloseLease" not in cluster.decode.about("r")  # the worker has ended it by itself
    assert cluster.metrics.outcomes == [("stop", output)] and len(cluster.metrics.first_tokens) == 1
    cluster.assert_clean()


async def test_what_has_ended_does_not_wait_for_the_garbage_collector(make_cluster: MakeCluster) -> None:
    gc.collect()
    gc.disable()
    before = [each for each in gc.get_objects() if type(each) in (Leg, Request)]
    try:
        # A connection that is given up, as after a second's pause, keeps the frames in which that was noticed.
        cluster = await make_cluster(worker_timeout_s=PATIENCE_S)
        request = await start(cluster, "r")
        cluster.prefill.first("r", "a")
        cluster.decode.tokens("r", 1, "b", finish="length")
        assert (await asyncio.wait_for(request.wait(), PATIENCE_S)).outputs[0].text == "ab"
        del request
        await asyncio.sleep(0)
        assert len([each for each in gc.get_objects() if type(each) in (Leg, Request)]) == len(before)
    finally:
        gc.enable()


async def test_a_consumer_may_wait_for_the_whole_answer(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster()
    request = await start(cluster, "r")
    waiting = asyncio.create_task(request.wait())
    cluster.prefill.first("r", "a")
    cluster.decode.tokens("r", 1, "bc")
    await asyncio.sleep(0.05)
    assert not waiting.done()
    cluster.decode.tokens("r", 3, "d", finish="length")
    async with asyncio.timeout(PATIENCE_S):
        assert await waiting is request.output
    assert request.output.finished and request.output.outputs[0].text == "abcd"
    cluster.assert_clean()


@pytest.mark.parametrize("comes", [True, False], ids=["late", "never"])
async def test_the_prefill_workers_answer_may_be_late_or_lost(make_cluster: MakeCluster, comes: bool) -> None:
    """It comes through another connection than the decode worker's tokens, which begin with the same first one."""
    cluster = await make_cluster()
    request = await start(cluster, "r")
    cluster.decode.tokens("r", 0, "a")
    cluster.decode.tokens("r", 1, "b")
    await asyncio.sleep(0.05)
    if comes:
        cluster.prefill.first("r", "a")
    await asyncio.sleep(0.05)
    cluster.decode.tokens("r", 2, "c", finish="length")
    assert "".join(d.text for d in await rest(request)) == "abc"
    assert request.output.outputs[0].finish_reason == "length"
    cluster.assert_clean()


async def test_a_slow_consumer_gets_merged_deltas(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster()
    request = await start(cluster, "r", SamplingParams(n=2, temperature=0, max_tokens=20))
    assert cluster.decode.received[0].indices == [0, 1]
    cluster.prefill.first("r", "aA")
    for position in range(1, 20):
        for index, char in enumerate("bB"):
            cluster.decode.tokens("r", position, char, index=index, finish="length" if position == 19 else None)
    async with asyncio.timeout(PATIENCE_S):
        while not request.ended:
            await asyncio.sleep(0.01)
    deltas = await rest(request)
    assert [(d.index, d.text, d.finish_reason) for d in deltas] == [
        (0, "a" + "b" * 19, "length"),
        (1, "A" + "B" * 19, "length"),
    ]
    assert [c.text for c in request.output.outputs] == ["a" + "b" * 19, "A" + "B" * 19]
    cluster.assert_clean()


async def test_logprobs(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster()
    request = await start(cluster, "r", SamplingParams(temperature=0, max_tokens=3, logprobs=0))
    cluster.prefill.first("r", "A")
    cluster.decode.tokens("r", 1, "BC", finish="length")
    completion = (await asyncio.wait_for(request.wait(), PATIENCE_S)).outputs[0]
    assert completion.cumulative_logprob == pytest.approx(-1.5)
    assert [
        entry[token_id].decoded_token for entry, token_id in zip(completion.logprobs or [], b"ABC", strict=True)
    ] == [*"ABC"]


async def test_logprobs_of_a_stream_are_kept_no_longer_than_until_they_are_taken(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster()
    request = await start(cluster, "r", SamplingParams(temperature=0, max_tokens=3, logprobs=0))
    cluster.prefill.first("r", "A")
    await cluster.settled(lambda: request.output.outputs[0].token_ids)
    cluster.decode.tokens("r", 1, "BC", finish="length")
    deltas = await rest(request)
    entries = [entry for delta in deltas for entry in delta.logprobs or []]
    assert [entry[token_id].decoded_token for entry, token_id in zip(entries, b"ABC", strict=True)] == [*"ABC"]
    completion = request.output.outputs[0]
    assert completion.logprobs is None and completion.cumulative_logprob == pytest.approx(-1.5)


async def test_a_stop_string_ends_the_lease(make_cluster: MakeCluster) -> None:
    """Text, token ids and logprobs end with the token that completed it; what the worker overran is dropped."""
    cluster = await make_cluster()
    request = await start(cluster, "r", SamplingParams(temperature=0, max_tokens=20, stop=("CD",), logprobs=0))
    cluster.prefill.first("r", "A")
    cluster.decode.tokens("r", 1, "BCDEF")
    await cluster.decode.expect(CloseLease, "r")
    cluster.decode.tokens("r", 6, "GH")
    deltas = await rest(request)
    completion = request.output.outputs[0]
    assert "".join(d.text for d in deltas) == completion.text == "AB"
    assert completion.token_ids == [*b"ABCD"]
    assert sum(len(delta.logprobs or []) for delta in deltas) == 4
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "CD")
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "CD")
    cluster.assert_clean()


async def test_one_stopped_completion_leaves_the_others_running(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster()
    request = await start(cluster, "r", SamplingParams(n=2, temperature=0, max_tokens=4, stop=("x",)))
    cluster.prefill.first("r", "aa")
    cluster.decode.tokens("r", 1, "x", index=0)
    assert (await cluster.decode.expect(EndCompletion, "r")).index == 0
    cluster.decode.tokens("r", 2, "y", index=0)
    cluster.decode.tokens("r", 1, "bcd", index=1, finish="length")
    await rest(request)
    assert [(c.text, c.finish_reason) for c in request.output.outputs] == [("a", "stop"), ("abcd", "length")]
    await cluster.decode.expect(CloseLease, "r")  # completion 0 still runs there
    cluster.assert_clean()


@pytest.mark.parametrize("state", ["queued", "asked", "prefilling", "decoding"])
async def test_abort_in_every_state(make_cluster: MakeCluster, state: str) -> None:
    """It tells who must know, forgets the request, and the next one is served."""
    cluster = await make_cluster()
    if state == "queued":
        cluster.decode.credit = Credit(0, 0, 0, 0, 0)
        link = cluster.router.machine.workers.links["decode-0"]
        await cluster.settled(lambda: link.credit.free_places == 0)  # by the next heartbeat
    task = cluster.submit("r")
    if state == "queued":
        await cluster.settled(lambda: cluster.router.machine.queue_depth == 1)
    else:
        await cluster.decode.expect(LeaseRequest, "r")
    if state in ("prefilling", "decoding"):
        cluster.decode.grant("r")
        await cluster.prefill.expect(PrefillRequest, "r")
        request = await task
        if state == "decoding":
            cluster.prefill.first("r", "a")
            cluster.decode.tokens("r", 1, "b")
            async for _ in request:
                if len(request.output.outputs[0].token_ids) == 2:
                    break
        request.abort()
        request.abort()
        assert await rest(request) is not None and request.output.outputs[0].finish_reason == "abort"
        await cluster.prefill.expect(CancelPrefill, "r")
    else:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    cluster.assert_clean()
    if state == "queued":
        await asyncio.sleep(0.05)
        assert cluster.decode.about("r") == cluster.prefill.about("r") == []
        cluster.decode.credit = Credit(100, 10, 0, 0, 0)
    else:
        await cluster.decode.expect(CloseLease, "r")
    if state == "asked":
        cluster.decode.grant("r")  # crossed the close
        await cluster.decode.wait(lambda: cluster.decode.about("r").count("CloseLease") == 2)
        await cluster.prefill.expect(CancelPrefill, "r")
        assert cluster.prefill.about("r") == ["PrefillRequest", "CancelPrefill"], "it had begun ahead of the lease"
    assert [outcome for outcome, _ in cluster.metrics.outcomes] == ["abort"]
    following = await start(cluster, "next")
    cluster.prefill.first("next", "z", finish="length")
    assert [d.text for d in await rest(following)] == ["z"]
    cluster.assert_clean()


async def test_leases_are_renewed_while_they_live(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster()
    request = await start(cluster, "r")
    await cluster.decode.wait(lambda: LegKey("r", 0) in cluster.decode.renewed)
    request.abort()
    await cluster.decode.expect(CloseLease, "r")
    cluster.decode.renewed.clear()
    await asyncio.sleep(0.6)
    assert not cluster.decode.renewed


async def test_timings_add_up(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster()
    cluster.router.machine.workers.links["prefill-0"].told_queued_tokens = 1  # so that it waits for the lease
    task = cluster.submit("r")
    await cluster.decode.expect(LeaseRequest, "r")
    await asyncio.sleep(0.05)
    cluster.decode.grant("r")
    request = await task
    await cluster.prefill.expect(PrefillRequest, "r")
    await asyncio.sleep(0.03)
    cluster.prefill.first("r", "a")  # says 0.01 s of queue, 0.02 s of prefill
    stream = aiter(request)
    await anext(stream)
    await asyncio.sleep(0.05)
    cluster.decode.tokens("r", 1, "b", transfer_wait=0.02, first_decode_step=0.03)
    await anext(stream)
    await asyncio.sleep(0.02)
    cluster.decode.tokens("r", 2, "c", finish="length")
    await anext(stream)
    timings = request.output.timings
    assert timings.lease_wait is not None and timings.lease_wait >= 0.05
    parts = [timings.queue, timings.lease_wait, timings.prefill_queue, timings.prefill]
    assert None not in parts and timings.ttft is not None and timings.ttft_unexplained is not None
    assert timings.ttft == pytest.approx(sum(p for p in parts if p is not None) + timings.ttft_unexplained)
    assert timings.ttft_unexplained >= 0 and timings.first_gap is not None and timings.first_gap >= 0.05
    assert timings.first_gap_unexplained == pytest.approx(timings.first_gap - 0.05)
    assert timings.e2e is not None and timings.e2e >= timings.ttft + timings.first_gap + 0.02


@pytest.mark.parametrize(
    ("prompt", "params", "text"),
    [
        ("", {}, "at least one token"),
        ([], {}, "at least one token"),
        ([1, 129], {}, r"129 is not in \[0, 129\)"),
        ([1, -1], {}, "-1 is not in"),
        ([1, "x"], {}, "'x' is not in"),
        ("x" * 100, {"max_tokens": None}, "maximum context length is 100 tokens.*100 in the prompt"),
        ("x" * 95, {"max_tokens": 6}, "max_tokens is 6.*95 tokens leave 5"),
        ("x", {"n": 5}, "max_num_seqs"),
        ("x" * 95, {"max_tokens": None, "min_tokens": 6}, "min_tokens is 6"),
    ],
)
async def test_invalid_requests(make_cluster: MakeCluster, prompt: Any, params: dict[str, Any], text: str) -> None:
    cluster = await make_cluster(max_num_seqs=4)
    with pytest.raises(InvalidRequestError, match=text):
        await cluster.router.submit(prompt, SamplingParams(**params), request_id="r")
    assert cluster.decode.received == [] and cluster.metrics.outcomes == [("rejected", None)]
    cluster.assert_clean()


async def test_the_vocabulary_is_the_models(make_cluster: MakeCluster) -> None:
    """Ids that the tokenizer has not, but the model, which may have drawn them."""
    cluster = await make_cluster(empty=True)
    workers = cluster.new_worker("prefill-0", "prefill"), cluster.new_worker("decode-0", "decode")
    for worker in workers:
        worker.vocab_size = 160
    await cluster.show(*workers)
    await asyncio.wait_for(cluster.router.wait_ready(), PATIENCE_S)
    await start(cluster, "r", GREEDY, prompt=[1, 159])
    assert (await cluster.prefill.expect(PrefillRequest, "r")).prompt_token_ids == [1, 159]
    with pytest.raises(InvalidRequestError, match=r"160 is not in \[0, 160\)"):
        await cluster.router.submit([160], GREEDY, request_id="s")


async def test_what_the_router_fills_in(make_cluster: MakeCluster) -> None:
    """max_tokens up to the context's end, and seeds that differ, unless greedy or given."""
    cluster = await make_cluster()
    seeds = []
    for number, params in enumerate([{}, {}, {"seed": 5}, {"temperature": 0}]):
        await start(cluster, str(number), SamplingParams(max_tokens=None, **params), prompt="x" * 60)  # type: ignore[arg-type]
        sent = cluster.decode.received[-1].params
        prefill = await cluster.prefill.expect(PrefillRequest, str(number))
        assert sent == prefill.params and sent.max_tokens == 40
        seeds.append(sent.seed)
    assert seeds[0] is not None and seeds[0] != seeds[1] and seeds[2:] == [5, None]


async def test_a_long_text_is_tokenized_beside_the_loop(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster()
    first = cluster.submit("r", prompt="x" * 10_000)
    with pytest.raises(InvalidRequestError, match="10000 in the prompt"):
        await first


async def test_a_request_id_is_unique(make_cluster: MakeCluster) -> None:
    cluster = await make_cluster()
    await start(cluster, "r")
    with pytest.raises(InvalidRequestError, match="in use"):
        await cluster.router.submit("x", GREEDY, request_id="r")
