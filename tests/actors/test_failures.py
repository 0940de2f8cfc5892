"""Workers whose engine fails, without Ray: who is told of what, what ends, and what goes on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from worker_pairs import SECRET, TINY, Pair

from pdray.actors.decode_worker import DecodeWorker
from pdray.config import Config
from pdray.engine.engine import Engine
from pdray.engine.schedule.sequence import LiveRequest
from pdray.errors import EngineHungError, RankDiedError, StepFailedError
from pdray.sampling_params import SamplingParams
from pdray.testing.patience import PATIENCE_S
from pdray.wire.lease_messages import CloseLease, LeaseClosed, LeaseDenied, LeaseGranted, LeaseRequest
from pdray.wire.message import LegKey
from pdray.wire.prefill_messages import FirstTokens, PrefillFailed, PrefillRequest
from pdray.wire.worker_news import StepFailed

PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
POISON = 91  # a token id that no other prompt here has


class DeviceLostError(BaseException):
    """Stands for what no engine can survive."""


def poison(engine: Engine, error: BaseException, *, from_outputs: int = 0) -> None:
    """Makes every step raise that computes a request with POISON in its prompt, and so many outputs."""
    launch = engine.lane.launch

    def is_poison(live: LiveRequest) -> bool:
        return POISON in live.prompt_token_ids and live.lead.num_output_tokens >= from_outputs

    def failing(*arguments: Any) -> Any:
        plan = engine._scheduler.plans_in_flight[-1]
        if any(is_poison(chunk.sequence.request) for chunk in plan.chunks):
            raise error
        return launch(*arguments)

    engine.lane.launch = failing  # type: ignore[method-assign]


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Any]:
    model = tmp_path / "config.json"
    model.write_text(json.dumps(TINY))
    pair = Pair(
        Config(
            channel="object_store",
            model=str(model),
            load_format="dummy",
            skip_tokenizer_init=True,
            device="cpu",
            num_kv_blocks=80,
            max_num_seqs=4,
            max_num_batched_tokens=64,
            lease_timeout_s=60,
            worker_timeout_s=5,
        )
    )
    await pair.start()
    yield pair
    for worker in (pair.prefill, pair.decode):
        worker._stopped.clear()  # one that has failed is stopped, too
        worker._tasks.cancel()
    await pair.stop()


def prompt(*extra: int) -> list[int]:
    return [3 + len(extra), *extra, *range(10, 40)]


def lease(pair: Any, name: str, ids: list[int], params: SamplingParams = PARAMS, **fields: Any) -> LegKey:
    """A leg that the decode worker computes from the beginning."""
    message = LeaseRequest(name, 0, ids, params, [0], [], None, **fields)
    pair.router.sessions["decode-0"].send(message)
    return message.key


async def prefill(pair: Any, name: str, ids: list[int], **fields: Any) -> LegKey:
    """A leg for the prefill worker."""
    message = LeaseRequest(name, 0, ids, PARAMS, [0], [], "prefill-0", **fields)
    pair.router.sessions["decode-0"].send(message)
    grant = await pair.router.first(LeaseGranted, message.key)
    parts = (ids, PARAMS, [0], [], "decode-0", 1, grant.num_cached_tokens)
    pair.router.sessions["prefill-0"].send(PrefillRequest(*message.key, *parts, **fields))
    return message.key


async def ended(pair: Any, key: LegKey) -> None:
    await pair.router.wait(lambda: len(pair.router.tokens(key)) == PARAMS.max_tokens)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


def stand_still(worker: Any) -> Callable[[], None]:
    """Holds the engine between two steps, so that what is asked for meanwhile is in one step; returns what lets it go
    on."""
    gate = threading.Event()
    step = worker.engine.step

    def waiting() -> Any:
        gate.wait(20)
        return step()

    worker.engine.step = waiting

    def go_on() -> None:
        worker.engine.step = step
        gate.set()

    return go_on


async def test_a_decode_worker_that_survives_ends_the_leases_of_the_step(pair: Any) -> None:
    """Each with who is to blame as far as it is known; it goes on, alone means alone, and nothing is left."""
    poison(pair.decode.engine, IndexError("index -1"), from_outputs=2)
    go_on = stand_still(pair.decode)
    keys = [lease(pair, "poison", prompt(POISON)), lease(pair, "suspect", prompt())]
    for key in keys:
        await pair.router.first(LeaseGranted, key)
    go_on()
    for key in keys:
        closed = await pair.router.first(LeaseClosed, key)
        assert (closed.verdict, closed.reason) == ("suspect", "IndexError: index -1")
        assert len(pair.router.tokens(key)) == 2
    again = [lease(pair, f"{name}-again", ids, alone=True) for name, ids in (("p", prompt(POISON)), ("s", prompt()))]
    assert (await pair.router.first(LeaseClosed, again[0])).verdict == "failed"
    await ended(pair, again[1])
    assert pair.decode._fatal is None
    await pair.quiet()


async def test_a_prefill_worker_that_survives_ends_the_legs_of_the_step(pair: Any) -> None:
    poison(pair.prefill.engine, IndexError("index -1"))
    go_on = stand_still(pair.prefill)
    keys = [await prefill(pair, "poison", prompt(POISON)), await prefill(pair, "suspect", prompt())]
    await until(lambda: all(pair.prefill.ledger.leg(key) for key in keys))
    go_on()
    for key in keys:
        failed = await pair.router.first(PrefillFailed, key)
        assert (failed.verdict, failed.reason) == ("suspect", "IndexError: index -1")
    again = await prefill(pair, "again", prompt(POISON), alone=True)
    assert (await pair.router.first(PrefillFailed, again)).verdict == "failed"
    for key in (*keys, again):
        pair.router.sessions["decode-0"].send(CloseLease(*key, "test"))
    good = await prefill(pair, "good", prompt(), alone=True)
    await ended(pair, good)
    await pair.quiet()


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_that_ends_says_whose_step_it_was(pair: Any, role: str) -> None:
    """The word is with the router before the session closes and join() raises; who waited is not among the suspects."""
    worker = getattr(pair, role)
    poison(worker.engine, DeviceLostError("CUDA error: an illegal memory access"))
    bystander = LeaseRequest("bystander", 0, prompt(), PARAMS, [0], [], "prefill-0")
    pair.router.sessions["decode-0"].send(bystander)  # has a lease, and is in no step
    await pair.router.first(LeaseGranted, bystander.key)
    joined = asyncio.create_task(worker.join())
    go_on = stand_still(worker)
    prompts = {"poison": prompt(POISON), "suspect": prompt()}
    if role == "decode":
        keys = [lease(pair, name, ids) for name, ids in prompts.items()]
    else:
        keys = [await prefill(pair, name, ids) for name, ids in prompts.items()]
    await until(lambda: set(keys) <= worker.engine.live_keys())
    go_on()
    with pytest.raises(StepFailedError, match="DeviceLostError: CUDA error") as raised:
        await asyncio.wait_for(joined, PATIENCE_S)
    assert set(raised.value.keys) == set(keys)
    (news,) = [message for message in pair.router.messages if isinstance(message, StepFailed)]
    assert {LegKey(*key) for key in news.suspects} == set(keys) and "illegal memory access" in news.reason
    await pair.router.wait(lambda: worker.worker_id not in pair.router.sessions)
    with pytest.raises(OSError):
        await pair.router.open(worker.info)


async def test_a_router_that_does_not_listen_delays_the_end_only_a_little(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its acknowledgement never comes: the worker ends all the same."""
    session = pair.decode.sessions["router-test"]
    monkeypatch.setattr(type(session), "delivered", property(lambda self: False))
    poison(pair.decode.engine, DeviceLostError("gone"))
    joined = asyncio.create_task(pair.decode.join())
    lease(pair, "poison", prompt(POISON))
    with pytest.raises(StepFailedError):
        await asyncio.wait_for(joined, PATIENCE_S)


async def test_a_step_that_hangs_has_suspects_too(pair: Any) -> None:
    gate = threading.Event()
    launch = pair.decode.engine.lane.launch

    def hang(*arguments: Any) -> Any:
        gate.wait(20)
        return launch(*arguments)

    pair.decode.engine.lane.launch = hang
    watch = asyncio.create_task(pair.decode._end_if_hung(0.2))
    joined = asyncio.create_task(pair.decode.join())
    key = lease(pair, "r", prompt())
    with pytest.raises(EngineHungError, match=r"step_timeout_s is 0\.2"):
        await asyncio.wait_for(joined, PATIENCE_S)
    (news,) = [message for message in pair.router.messages if isinstance(message, StepFailed)]
    assert [LegKey(*each) for each in news.suspects] == [key] and "EngineHungError" in news.reason
    gate.set()
    await watch


async def test_a_request_that_cannot_be_looked_at_costs_no_session(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the lease and at prefill: it is refused by itself, and everybody else's stream goes on."""
    other = lease(pair, "other", prompt())

    def fail_for(worker: Any) -> None:
        prepare = worker.engine._scheduler.prepare

        def failing(request: Any, **settings: Any) -> Any:
            if POISON in request.prompt_token_ids:
                raise ZeroDivisionError("by zero")
            return prepare(request, **settings)

        monkeypatch.setattr(worker.engine._scheduler, "prepare", failing)

    fail_for(pair.prefill)
    key = await prefill(pair, "at prefill", prompt(POISON))
    failed = await pair.router.first(PrefillFailed, key)
    assert failed.verdict == "failed" and "ZeroDivisionError: by zero" in failed.reason
    pair.router.sessions["decode-0"].send(CloseLease(*key, "test"))
    fail_for(pair.decode)
    denied = await pair.router.first(LeaseDenied, lease(pair, "at the lease", prompt(POISON)))
    assert (denied.retriable, denied.verdict) == (False, "failed")
    await ended(pair, other)
    await pair.quiet()


async def test_what_a_prefill_worker_finds_invalid_is_told_as_such(pair: Any) -> None:
    key = LegKey("r", 0)
    parts = (list(range(90)) * 6, PARAMS, [0], [], "decode-0", 1, 0)
    pair.router.sessions["prefill-0"].send(PrefillRequest(*key, *parts))
    failed = await pair.router.first(PrefillFailed, key)
    assert (failed.verdict, failed.param) == ("invalid", "prompt") and "max_model_len" in failed.reason
    assert not any(isinstance(message, FirstTokens) for message in pair.router.messages)


async def test_a_worker_ends_with_one_of_its_ranks(tmp_path: Path) -> None:
    """As a whole, and at once, also while it has nothing to do."""
    model = tmp_path / "config.json"
    model.write_text(json.dumps(TINY))
    config = Config(
        model=str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        device="cpu",
        num_kv_blocks=80,
        mode="colocated",
        tensor_parallel_size=2,
    )
    worker = DecodeWorker(config, "decode-0", "d1", SECRET)
    await worker.start()
    rank = (await worker.describe())["ranks"][1]["pid"]
    os.kill(rank, signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(RankDiedError, match=r"rank 1 \(process \d+\) has ended: signal 9"):
            await worker.join()
    worker._stopped.clear()
    await worker.stop()
