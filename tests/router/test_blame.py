"""An engine that fails says whose step it was: suspects are replayed alone, one of them fails, nobody else pays."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pdray.control.losses import Loss, Losses, blame
from pdray.errors import InvalidRequestError, RequestFailedError, WorkerDiedError
from pdray.router.routed import RoutedRequest
from pdray.sampling_params import SamplingParams
from pdray.testing.patience import PATIENCE_S
from pdray.wire.lease_messages import LeaseClosed, LeaseDenied, LeaseRequest
from pdray.wire.message import LegKey
from pdray.wire.prefill_messages import PrefillFailed, PrefillRequest
from pdray.wire.worker_news import StepFailed

MakeCluster = Callable[..., Awaitable[Any]]
GREEDY = SamplingParams(temperature=0, max_tokens=8)


async def colocated(make_cluster: MakeCluster, **config: Any) -> Any:
    """A router before one worker that does both."""
    from_fixture = await make_cluster(empty=True, **config)
    await from_fixture.show(from_fixture.new_worker("decode-0", "both"))
    await asyncio.wait_for(from_fixture.router.wait_ready(), PATIENCE_S)
    return from_fixture


async def restart(cluster: Any, generation: int) -> None:
    """decode-0 dies, and its successor is there."""
    await cluster.decode.die()
    await cluster.show(cluster.new_worker("decode-0", "both", f"{generation}"))
    await cluster.settled(lambda: cluster.router.machine.workers.is_open("decode-0"))


async def lease(cluster: Any, name: str, attempt: int = 0, *, alone: bool = False) -> Any:
    message = await cluster.decode.expect(LeaseRequest, name, attempt)
    assert message.alone is alone, (name, attempt)
    cluster.decode.grant(name, attempt)
    return message


async def running(cluster: Any, *names: str, params: SamplingParams = GREEDY) -> dict[str, RoutedRequest]:
    """Requests of which the first token is there."""
    requests = {}
    for name in names:
        task = cluster.submit(name, params)
        await lease(cluster, name)
        for index in range(params.n):
            cluster.decode.tokens(name, 0, "a", index=index)
        requests[name] = await task
        await cluster.settled(lambda name=name: all(o.token_ids for o in requests[name].output.outputs))
    return requests


async def test_suspects_are_replayed_alone_and_the_guilty_one_fails(make_cluster: MakeCluster) -> None:
    """Two deaths, however small max_replays is: the others go on, and the third worker sees nothing of it."""
    cluster = await colocated(make_cluster, max_replays=0)
    requests = await running(cluster, "poison", "suspect", "bystander")
    cluster.decode.send(StepFailed("IndexError: -1", [LegKey("poison", 0), LegKey("suspect", 0), LegKey("other", 9)]))
    await cluster.settled(lambda: not cluster.router.ready)
    await restart(cluster, 2)
    for name in ("poison", "suspect"):
        message = await lease(cluster, name, 1, alone=True)
        assert message.output_token_ids == [97]
    await lease(cluster, "bystander", 1)
    cluster.decode.tokens("bystander", 1, "b", attempt=1)
    await cluster.settled(lambda: len(requests["bystander"].output.outputs[0].token_ids) == 2)
    cluster.decode.send(StepFailed("IndexError: -1", [LegKey("poison", 1)]))
    with pytest.raises(RequestFailedError, match=r"request poison and no other.*decode-0 failed \(IndexError: -1\)"):
        await cluster.text_of(requests["poison"])
    await restart(cluster, 3)
    await lease(cluster, "suspect", 2, alone=True)  # it has not been cleared yet
    await lease(cluster, "bystander", 2)
    cluster.decode.tokens("suspect", 1, "bc", finish="length", attempt=2)
    cluster.decode.tokens("bystander", 2, "c", finish="length", attempt=2)
    for name in ("suspect", "bystander"):
        assert await cluster.text_of(requests[name]) == "abc"
    assert not cluster.decode.about("poison")
    cluster.assert_clean()


async def test_a_step_of_one_request_needs_no_second_try(make_cluster: MakeCluster) -> None:
    """Even with several completions and legs: they are one request."""
    cluster = await colocated(make_cluster, max_replays=0)
    requests = await running(cluster, "poison", "bystander", params=SamplingParams(n=2, temperature=0, max_tokens=8))
    cluster.decode.send(StepFailed("ValueError: odd", [LegKey("poison", 0)]))
    with pytest.raises(RequestFailedError, match="ValueError: odd"):
        await cluster.text_of(requests["poison"])
    await restart(cluster, 2)
    for attempt in (1, 2):
        await lease(cluster, "bystander", attempt)
        cluster.decode.tokens("bystander", 1, "b", finish="length", index=attempt - 1, attempt=attempt)
    await cluster.text_of(requests["bystander"])
    assert [output.text for output in requests["bystander"].output.outputs] == ["ab", "ab"]
    cluster.assert_clean()


async def test_every_leg_of_a_suspect_goes_alone(make_cluster: MakeCluster) -> None:
    """n = 3: three legs take over, and a step of two of them is still a step of one request."""
    cluster = await colocated(make_cluster)
    requests = await running(cluster, "poison", params=SamplingParams(n=3, temperature=0, max_tokens=8))
    requests |= await running(cluster, "suspect")
    cluster.decode.send(StepFailed("x", [LegKey("poison", 0), LegKey("suspect", 0)]))
    await cluster.settled(lambda: not cluster.router.ready)
    await restart(cluster, 2)
    for attempt in (1, 2, 3):
        await lease(cluster, "poison", attempt, alone=True)
    cluster.decode.send(StepFailed("x", [LegKey("poison", 1), LegKey("poison", 3)]))
    with pytest.raises(RequestFailedError):
        await cluster.text_of(requests["poison"])
    await restart(cluster, 3)
    await lease(cluster, "suspect", 2, alone=True)
    cluster.decode.tokens("suspect", 1, "b", finish="length", attempt=2)
    assert await cluster.text_of(requests["suspect"]) == "ab"
    cluster.assert_clean()


async def test_a_failed_worker_is_not_asked_again(make_cluster: MakeCluster) -> None:
    """Between its last word and its end it still has credit."""
    cluster = await colocated(make_cluster)
    await running(cluster, "a", "b")
    cluster.decode.received.clear()
    cluster.decode.send(StepFailed("x", [LegKey("a", 0)]))
    await cluster.settled(lambda: not cluster.router.ready)
    await cluster.settled(lambda: cluster.router.machine.queue_depth == 1)
    await asyncio.sleep(0.1)
    assert not any(isinstance(message, LeaseRequest) for message in cluster.decode.received)


async def test_a_prefill_worker_that_fails(make_cluster: MakeCluster) -> None:
    """Suspects go alone to both workers; legs that it has handed over go on."""
    cluster = await make_cluster(max_replays=0)
    tasks = {}
    for name in ("done", "poison", "suspect", "bystander"):
        tasks[name] = cluster.submit(name)
        await lease(cluster, name)
        await cluster.prefill.expect(PrefillRequest, name)
    cluster.prefill.first("done", "a")
    cluster.decode.tokens("done", 1, "b")
    done = await tasks["done"]
    await cluster.settled(lambda: len(done.output.outputs[0].token_ids) == 2)
    cluster.prefill.send(StepFailed("x", [LegKey("poison", 0), LegKey("suspect", 0)]))
    await cluster.settled(lambda: not cluster.router.ready)
    await cluster.prefill.die()
    await cluster.show(cluster.decode, cluster.new_worker("prefill-0", "prefill", "2"))
    for name in ("poison", "suspect", "bystander"):
        await lease(cluster, name, 1, alone=name != "bystander")
        assert (await cluster.prefill.expect(PrefillRequest, name, 1)).alone == (name != "bystander")
    cluster.prefill.send(StepFailed("x", [LegKey("poison", 1)]))
    with pytest.raises(RequestFailedError):
        await cluster.text_of(await tasks["poison"])
    await cluster.prefill.die()
    await cluster.show(cluster.decode, cluster.new_worker("prefill-0", "prefill", "3"))
    for name in ("suspect", "bystander"):
        await lease(cluster, name, 2, alone=name == "suspect")
        await cluster.prefill.expect(PrefillRequest, name, 2)
        cluster.prefill.first(name, "a", finish="length", attempt=2)
        assert await cluster.text_of(await tasks[name]) == "a"
    cluster.decode.tokens("done", 2, "c", finish="length")
    assert await cluster.text_of(done) == "abc"
    cluster.assert_clean()


@pytest.mark.parametrize("kind", [LeaseClosed, PrefillFailed])
async def test_a_worker_that_survives_tells_of_each_leg(make_cluster: MakeCluster, kind: type) -> None:
    cluster = await make_cluster(max_replays=0)
    tasks = {name: cluster.submit(name) for name in ("poison", "suspect")}
    for name in tasks:
        await lease(cluster, name)
        await cluster.prefill.expect(PrefillRequest, name)
    worker = cluster.decode if kind is LeaseClosed else cluster.prefill
    for name in tasks:
        worker.send(kind(name, 0, "ValueError: odd", verdict="suspect"))
    for name in tasks:
        await lease(cluster, name, 1, alone=True)
        assert (await cluster.prefill.expect(PrefillRequest, name, 1)).alone
    worker.send(kind("poison", 1, "ValueError: odd", verdict="failed"))
    with pytest.raises(RequestFailedError, match=f"{worker.worker_id}: ValueError: odd"):
        await cluster.text_of(await tasks["poison"])
    cluster.prefill.first("suspect", "a", finish="length", attempt=1)
    assert await cluster.text_of(await tasks["suspect"]) == "a"
    cluster.assert_clean()


async def test_what_a_worker_finds_invalid_ends_at_once(make_cluster: MakeCluster) -> None:
    """At prefill, after the lease; and a lease that is denied, for either reason, with the field where one is known."""
    cluster = await make_cluster()
    at_prefill = cluster.submit("p")
    await lease(cluster, "p")
    await cluster.prefill.expect(PrefillRequest, "p")
    cluster.prefill.send(PrefillFailed("p", 0, "the pool holds 16 tokens", "invalid", "max_tokens"))
    with pytest.raises(InvalidRequestError, match=r"^the pool holds 16 tokens$") as raised:
        await cluster.text_of(await at_prefill)
    assert raised.value.param == "max_tokens"
    for name, verdict, error in (("i", "invalid", InvalidRequestError), ("f", "failed", RequestFailedError)):
        denied = cluster.submit(name)
        await cluster.decode.expect(LeaseRequest, name)
        cluster.decode.send(LeaseDenied(name, 0, "no", False, cluster.decode.credit, verdict, "n"))
        with pytest.raises(error, match=r"^no$") as refusal:
            await denied
        assert getattr(refusal.value, "param", "n") == "n"
    assert cluster.metrics.num_replays == 0
    cluster.assert_clean()


async def test_one_death_is_one_loss_however_many_legs_it_hits(make_cluster: MakeCluster) -> None:
    """n = 8 and max_replays 2: eight legs survive a second death, and not a third one more than allowed."""
    cluster = await colocated(make_cluster, max_replays=2)
    requests = await running(cluster, "r", params=SamplingParams(n=8, temperature=0, max_tokens=8))
    for death in (1, 2):
        await restart(cluster, death + 1)
        for attempt in range(8 * death - 7, 8 * death + 1):
            message = await lease(cluster, "r", attempt)
            assert len(message.indices) == 1
            cluster.decode.tokens("r", death, "b", index=message.indices[0], attempt=attempt)
        await cluster.settled(
            lambda death=death: all(len(o.token_ids) == death + 1 for o in requests["r"].output.outputs)
        )
    assert cluster.router.machine.requests["r"].losses.num == 2 and cluster.metrics.num_replays == 9
    await cluster.decode.die()
    with pytest.raises(WorkerDiedError, match=r"3 times \(max_replays is 2\)"):
        await cluster.text_of(requests["r"])
    cluster.assert_clean()


def test_what_counts() -> None:
    """Events, not legs; and nothing that somebody can be blamed for."""
    losses = Losses()
    for num_losses, source in ((0, "decode-0"), (1, "decode-0"), (1, "decode-0"), (1, "decode-1"), (2, "decode-0")):
        losses.count(Loss("gone", source), num_losses)
    assert losses.num == 4
    for verdict in ("innocent", "suspect", "failed", "invalid"):
        losses.count(Loss("gone", "decode-7", verdict), 7)
    assert losses.num == 4


def test_blame() -> None:
    assert blame([LegKey("a", 1), LegKey("a", 2)]) == "failed"
    assert blame([LegKey("a", 1), LegKey("b", 1)]) == "suspect"
