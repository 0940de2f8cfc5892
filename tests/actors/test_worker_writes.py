"""Blocks of a decode worker that another process writes: nobody else has them, and it can name no others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from worker_pairs import PROMPT, SECRET, Pair, finish

from pdray.actors.prefill_worker import PrefillWorker
from pdray.engine.request import LayerGroupReady
from pdray.sampling_params import SamplingParams
from pdray.testing.patience import PATIENCE_S
from pdray.transfer.channel import Put
from pdray.wire.lease_messages import CloseLease, LeaseClosed


def hold_writes(pair: Pair) -> tuple[threading.Event, threading.Event]:
    """The prefill worker's writes wait for the first event; the second says that one does."""
    gate, entered = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert gate.wait(PATIENCE_S)

    pair.prefill.kinds["cuda_ipc"]._transport.streams[-1].before_work = hold  # type: ignore[attr-defined]
    return gate, entered


async def held(pair: Pair) -> int:
    """Blocks of the decode worker that somebody may use or write."""
    stats = pair.decode.engine.stats()
    return stats.num_blocks - 1 - stats.free_blocks


@pytest.mark.parametrize("pair", ["cuda_ipc"], indirect=True)
async def test_blocks_that_are_being_written_are_nobody_elses(pair: Pair) -> None:
    """Neither a closed lease nor a lost session, nor time, frees them: only the writer's word."""
    expected = await finish(pair, "before", 1)
    other = [token + 1 for token in PROMPT]
    gate, entered = hold_writes(pair)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    key = pair.lease("lost", other, params)
    await pair.start_prefill(key, other, params)
    assert await asyncio.to_thread(entered.wait, PATIENCE_S)
    pair.router.sessions["decode-0"].send(CloseLease(*key, "test"))
    closing = pair.prefill.disconnect("decode-0")
    pair.prefill._on_layer_group(LayerGroupReady(key, range(0, 1), 0, [1], None))  # computed since, and put nowhere
    closed = asyncio.ensure_future(closing)
    await asyncio.sleep(0.1)
    assert await held(pair) == 5 and not closed.done()
    connecting = asyncio.ensure_future(pair.connect(2))
    await asyncio.sleep(0.1)
    assert await held(pair) == 5 and not connecting.done(), "the old channel ends first"
    gate.set()
    await connecting
    await pair.quiet()
    assert await finish(pair, "after", 2) == expected
    await pair.quiet()


@pytest.mark.parametrize("pair", ["cuda_ipc"], indirect=True)
async def test_a_writer_that_is_seen_dead_holds_no_blocks(pair: Pair) -> None:
    gate, entered = hold_writes(pair)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    key = pair.lease("lost", PROMPT, params)
    await pair.start_prefill(key, PROMPT, params)
    assert await asyncio.to_thread(entered.wait, PATIENCE_S)
    pair.router.sessions["decode-0"].send(CloseLease(*key, "test"))
    stopping = asyncio.ensure_future(pair.prefill.stop())
    await asyncio.sleep(0.1)
    assert await held(pair) == 5
    gate.set()  # a process that is gone writes nothing any more
    await stopping
    await pair.decode.worker_gone("prefill-0", "p1")
    assert await held(pair) == 0
    pair.prefill = PrefillWorker(pair.config, "prefill-0", "p2", SECRET)
    await pair.prefill.start()
    await pair.connect(2)
    await pair.router.open(pair.prefill.info)
    await finish(pair, "after", 2)
    await pair.quiet()


FORGERIES: dict[str, Callable[[Put], Put]] = {
    "after the end": lambda put: put._replace(first_position=5),
    "before the start": lambda put: put._replace(first_position=-1),
    "too many": lambda put: put._replace(source_blocks=put.source_blocks * 2),
    "cached blocks": lambda put: put._replace(first_position=0),
}


@pytest.mark.parametrize("forgery", FORGERIES)
async def test_a_put_cannot_name_what_its_lease_does_not_hold(
    pair: Pair, forgery: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written, the lease ends, and both workers go on."""
    expected = await finish(pair, "honest", 1)  # 64 of its 70 tokens are cached from now on
    channel = pair.prefill._channels["decode-0"]
    before, put = pair.decode.engine.pool.tensor.clone(), channel.put
    key = pair.lease("forged", PROMPT, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    monkeypatch.setattr(channel, "put", lambda each: put(FORGERIES[forgery](each)))
    await pair.start_prefill(key, PROMPT, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    closed = await pair.router.first(LeaseClosed, key)
    assert "which the lease does not hold" in closed.reason
    monkeypatch.undo()
    await pair.quiet()
    assert torch.equal(pair.decode.engine.pool.tensor[:, 1:], before[:, 1:])
    assert await finish(pair, "after", 1) == expected
    await pair.quiet()


@pytest.mark.parametrize("layers", [range(4, 6), range(-1, 1), range(2, 2), range(3, 1)], ids=str)
async def test_a_put_cannot_name_layers_that_are_not_there(
    pair: Pair, layers: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = pair.prefill._channels["decode-0"]
    put, resolved = channel.put, []

    def put_and_ask(each: Put) -> Any:
        resolved.append(pair.decode.resolve(each.key, "prefill-0", 1, layers, each.positions))
        return put(each)

    monkeypatch.setattr(channel, "put", put_and_ask)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    key = pair.lease("forged", PROMPT, params)
    await pair.start_prefill(key, PROMPT, params)
    closed = await pair.router.first(LeaseClosed, key)
    assert f"layers {layers.start} to {layers.stop}, which the lease does not hold" in closed.reason
    assert resolved[0] is None
    await pair.quiet()
