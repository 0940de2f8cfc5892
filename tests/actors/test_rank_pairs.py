"""Prefill and decode workers of different numbers of ranks: together they say what one engine says."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from worker_pairs import PROMPT, SECRET, Pair, make_config

from pdray.actors.decode_worker import DecodeWorker
from pdray.actors.prefill_worker import PrefillWorker
from pdray.actors.worker import Worker
from pdray.config import Config
from pdray.engine.build import build_engine
from pdray.engine.request import EngineRequest
from pdray.errors import RankDiedError
from pdray.models import load_model
from pdray.sampling_params import SamplingParams
from pdray.testing.patience import PATIENCE_S
from pdray.wire.message import LegKey
from pdray.wire.prefill_messages import PrefillFailed

NUM_TOKENS = 12
LEGS = {
    "greedy": (PROMPT, SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)),
    "two": (PROMPT[3:40], SamplingParams(temperature=1, n=2, seed=3, max_tokens=NUM_TOKENS, ignore_eos=True)),
    "cached": (PROMPT + [5], SamplingParams(temperature=1, seed=4, max_tokens=NUM_TOKENS, ignore_eos=True)),
    "short": (PROMPT[:5], SamplingParams(temperature=1, seed=5, max_tokens=NUM_TOKENS, ignore_eos=True)),
}


def config_of(folder: Path, num_prefill: int, num_decode: int) -> Config:
    sizes = {"prefill_tensor_parallel_size": num_prefill, "decode_tensor_parallel_size": num_decode}
    return Config(**make_config(folder, "auto").model_dump(exclude_unset=True) | sizes)


def said_by_one(config: Config) -> dict[tuple[str, int], list[int]]:
    """Tokens of every completion, by one engine of one rank."""
    device, said = torch.device("cpu"), {}
    engine = build_engine(config, load_model(config, device), device)
    for name, (prompt, params) in LEGS.items():
        engine.add(EngineRequest(name, prompt, params, tuple(range(params.n))))
    while engine.has_work():
        for update in engine.step():
            for token in update.tokens:
                said.setdefault((update.key, token.index), []).append(token.token_id)
    return said


async def said_by(pair: Pair, epoch: int) -> dict[tuple[str, int], list[int]]:
    """The same by a pair of workers; afterwards they hold nothing."""
    said = {}
    for name, (prompt, params) in LEGS.items():
        key = pair.lease(f"{name} {epoch}", prompt, params)
        await pair.start_prefill(key, prompt, params, epoch)
        for index in range(params.n):
            await pair.router.wait(lambda k=key, i=index: len(pair.router.tokens(k, i)) == NUM_TOKENS)
            said[name, index] = pair.router.tokens(key, index)
    await pair.quiet()
    return said


def ranks(worker: Worker) -> list[int]:
    """Processes other than this one."""
    return [] if worker._leader is None else [state.pid for state in worker._leader.states()]


async def start(worker: Worker, pair: Pair) -> None:
    await worker.start()
    await pair.router.open(worker.info)


async def lose(pair: Pair, incarnation: str) -> None:
    """The prefill worker is gone; the decode worker hears of it."""
    pair.prefill._stopped.clear()
    await pair.prefill.stop()
    await pair.decode.worker_gone("prefill-0", incarnation)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


async def kill_in_a_transfer(worker: Worker, pair: Pair, is_moving: Callable[[LegKey], bool], epoch: int) -> LegKey:
    """A rank of the worker stops; once its blocks are waited for it is killed, and ends the worker."""
    rank = ranks(worker)[-1]
    prompt, params = [(5 * i) % 90 for i in range(28)], LEGS["greedy"][1]  # one step: the engine waits for nobody
    key = pair.lease(f"lost {epoch}", prompt, params)
    hold = asyncio.Event()
    pools = worker._leader and next(iter(worker.kinds.values()))._open()  # type: ignore[attr-defined]
    order, loop = pools._order, asyncio.get_running_loop()

    def stop_first(asked: Any, message: Any) -> None:
        os.kill(rank, signal.SIGSTOP)
        loop.call_soon_threadsafe(hold.set)
        order(asked, message)

    pools._order = stop_first
    await pair.start_prefill(key, prompt, params, epoch)
    async with asyncio.timeout(PATIENCE_S):
        await hold.wait()
    assert is_moving(key)
    os.kill(rank, signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(RankDiedError, match=r"rank \d \(process \d+\) has ended: signal 9") as death:
            await worker.join()
    assert death.value.was_killed  # also where the engine has waited for that rank, and failed
    return key


async def test_workers_of_different_numbers_of_ranks(tmp_path: Path) -> None:
    """1 to 2, 2 to 2, 2 to 1 and 4 to 2, where two ranks have the same keys; then ranks die while blocks travel."""
    expected = said_by_one(make_config(tmp_path, "auto"))
    pair = Pair(config_of(tmp_path, 1, 2))
    await pair.start()
    assert (await pair.prefill.describe())["channels"] == {"decode-0": "object_store"}
    reason = "decode-0 has 2 ranks, and nccl joins workers of one"
    assert (await pair.prefill.describe())["passed_over"]["decode-0"]["nccl"] == reason
    assert await said_by(pair, 1) == expected

    await lose(pair, "p1")
    two = pair.prefill = PrefillWorker(config_of(tmp_path, 2, 2), "prefill-0", "p2", SECRET)
    await start(two, pair)
    await pair.connect(2)
    assert await said_by(pair, 2) == expected
    states = (await two.describe())["ranks"]
    assert [state["rank"] for state in states] == [0, 1]
    assert states[0]["num_steps"] == states[1]["num_steps"] > 0 and states[1]["memory_bytes"] > 0

    sessions = dict(pair.router.sessions)  # with processes that live to the end
    of_two, one = pair.decode, DecodeWorker(config_of(tmp_path, 2, 1), "decode-0", "d2", SECRET)
    pair.decode = one
    await start(one, pair)
    await pair.connect(3)
    assert await said_by(pair, 3) == expected
    await one.stop()

    pair.decode = of_two
    await until(lambda: "decode-0" not in pair.router.sessions)
    pair.router.sessions["decode-0"] = sessions["decode-0"]
    four = pair.prefill = PrefillWorker(config_of(tmp_path, 4, 2), "prefill-0", "p3", SECRET)
    await start(four, pair)
    await pair.connect(4)
    assert await said_by(pair, 4) == expected

    await kill_in_a_transfer(four, pair, lambda key: bool(pair.prefill.ledger.leg(key)), 4)
    await lose(pair, "p3")
    await until(lambda: not pair.decode.leases.leases(0.0))
    assert await pair.decode.check_integrity() == []

    pair.prefill = two
    await until(lambda: "prefill-0" not in pair.router.sessions)
    pair.router.sessions["prefill-0"] = sessions["prefill-0"]
    await pair.connect(5)
    assert await said_by(pair, 5) == expected
    key = await kill_in_a_transfer(of_two, pair, lambda key: key in of_two._writes._number, 5)
    await pair.router.first(PrefillFailed, key)
    await until(lambda: not len(two.ledger))
    assert await two.check_integrity() == []
    for worker in (two, of_two):
        worker._stopped.clear()
        await worker.stop()
